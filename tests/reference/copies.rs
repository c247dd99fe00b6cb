//! Copies of a test program, each of which runs one of its tests: alone, with
//! an environment of its own, or as the ranks of a world.
// Each test program uses its own part of this.
#![allow(dead_code)]

use std::{
    env,
    io::Read,
    process::{Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

/// A copy that runs the test called `name`.
pub(crate) fn alone(name: &str) -> Command {
    with_arguments(Command::new(env::current_exe().unwrap()), name)
}

/// `size` of them under mpirun.
pub(crate) fn under_mpirun(name: &str, size: usize) -> Command {
    let mut mpirun = Command::new("mpirun");
    mpirun
        .args(["--oversubscribe", "-n", &size.to_string()])
        .arg(env::current_exe().unwrap())
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    with_arguments(mpirun, name)
}

/// Whether this process is one of those.
pub(crate) fn is_under_mpirun() -> bool {
    env::var_os("OMPI_COMM_WORLD_SIZE").is_some()
}

fn with_arguments(mut command: Command, name: &str) -> Command {
    command
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env("OMP_NUM_THREADS", "1");
    command
}

/// How it ended, after `limit` by force, and what it printed.
pub(crate) fn finish(command: &mut Command, limit: Duration) -> (ExitStatus, String) {
    // By itself Open MPI has one folder for all mpiruns of a user: one that ends
    // may remove it while another begins.
    let sessions = tempfile::tempdir().unwrap();
    let mut child = command
        .env("OMPI_MCA_orte_tmpdir_base", sessions.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("these tests need mpirun: install Open MPI");
    let mut streams: [Box<dyn Read + Send>; 2] = [
        Box::new(child.stdout.take().unwrap()),
        Box::new(child.stderr.take().unwrap()),
    ];
    thread::scope(|scope| {
        let readers: Vec<_> = streams
            .iter_mut()
            .map(|stream| {
                scope.spawn(move || {
                    let mut bytes = Vec::new();
                    stream.read_to_end(&mut bytes).unwrap();
                    String::from_utf8_lossy(&bytes).into_owned()
                })
            })
            .collect();
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if begun.elapsed() > limit {
                child.kill().unwrap();
                break child.wait().unwrap();
            }
            thread::sleep(Duration::from_millis(20));
        };
        (
            status,
            readers
                .into_iter()
                .map(|reader| reader.join().unwrap())
                .collect(),
        )
    })
}
