//! The processes that a launcher started, and the processes that those started:
//! whether they live, and their end.
//!
//! They are known by the session's folder, which every one of them carries in
//! its environment. A process group would miss the ranks of `mpirun` and
//! `torchrun`, which give each rank a group or a session of its own.

use std::ffi::OsStr;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use fixtures::exchange::FOLDER_VARIABLE;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use procfs::process::{Process, all_processes};

/// How long the processes of a session are hunted before they are let be.
const HUNT: Duration = Duration::from_secs(10);

/// Whether the process is there and not a zombie.
pub(super) fn is_alive(pid: u32) -> bool {
    Process::new(pid as i32)
        .and_then(|process| process.stat())
        .is_ok_and(|stat| !matches!(stat.state, 'Z' | 'X'))
}

/// Ends every process of the session in `folder`, at once.
///
/// Gives the processes that are still there in the end, which happens to those
/// that hang inside the kernel.
pub(super) fn end_all(folder: &Path) -> Vec<i32> {
    let start = Instant::now();
    loop {
        let processes = of_session(folder);
        if processes.is_empty() || start.elapsed() > HUNT {
            return processes;
        }
        for &pid in &processes {
            // One that has ended by itself since is as good.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        thread::sleep(Duration::from_millis(2));
    }
}

fn of_session(folder: &Path) -> Vec<i32> {
    let own = std::process::id() as i32;
    let belongs = |process: &Process| {
        process.pid != own
            && is_alive(process.pid as u32)
            && process.environ().is_ok_and(|environment| {
                environment.get(OsStr::new(FOLDER_VARIABLE)).map(Path::new) == Some(folder)
            })
    };
    all_processes()
        .into_iter()
        .flatten()
        .flatten()
        .filter(belongs)
        .map(|process| process.pid)
        .collect()
}
