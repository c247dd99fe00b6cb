//! The bundled reference behind the exchange, one MPI process for each rank:
//! it goes through the same door as everybody else.
//!
//! ```text
//! mpirun -n {world} reference-adapter
//! ```

use std::collections::BTreeMap;
use std::error::Error;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use fixtures::exchange::{FOLDER_VARIABLE, Hello, Judge, PROTOCOL, Session, judge_is_gone, serve};
use nix::sys::signal::{Signal, raise};
use nix::unistd::{dup2_stderr, dup2_stdout};
use ulysses::device::local_rank;
use ulysses::{Communicator, DeviceChoice, MpiWorld};
use ulysses_conformance::implementation::{
    Claims, Means, ReferenceRank, TellingCommunicator, claims, kernel, nccl_communicator,
};

/// Answers the cases of an exchange with the bundled reference. To be started
/// by mpirun, with the folder of the exchange in ULYSSES_EXCHANGE.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Over what the ranks exchange
    #[arg(long, value_enum, default_value = "mpi")]
    communicator: Carrier,
}

/// What carries blocks between ranks.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Carrier {
    /// MPI, by way of the host
    Mpi,
    /// NCCL, between GPUs; the ranks find each other over MPI
    Nccl,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    let folder = std::env::var_os(FOLDER_VARIABLE)
        .ok_or_else(|| format!("{FOLDER_VARIABLE} is not set: the judge sets it"))?;
    let (session, info) = Session::open(Path::new(&folder))?;
    let host = hostname::get()?.to_string_lossy().into_owned();
    leave_when_alone(session.clone(), info.judge.clone(), host.clone());
    let device = info.device.parse::<DeviceChoice>()?;
    let means = Means {
        device: device.device(local_rank())?,
        kernel: kernel(&info.kernel).ok_or_else(|| format!("no kernel is `{}`", info.kernel))?,
    };
    let world = MpiWorld::initialize()?;
    let over_mpi = Arc::new(world.communicator());
    let rank = over_mpi.rank();

    // What this rank says is kept apart from what the others say.
    let log = |stream| File::create(session.log_path(&format!("rank-{rank}"), stream));
    dup2_stdout(log("stdout")?)?;
    dup2_stderr(log("stderr")?)?;

    tch::set_num_threads(1);
    let (name, communicator): (&str, Arc<dyn Communicator>) = match arguments.communicator {
        Carrier::Mpi => ("reference-mpi", over_mpi),
        Carrier::Nccl => {
            let over_nccl = nccl_communicator(over_mpi, means.device)?;
            ("reference-nccl", over_nccl)
        }
    };
    let Claims {
        features, declared, ..
    } = claims(means)?;
    let hello = Hello {
        protocol: PROTOCOL,
        rank,
        world: communicator.size(),
        pid: std::process::id(),
        host,
        implementation: name.to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        libraries: BTreeMap::new(),
        features,
        declared,
    };
    let telling = Arc::new(TellingCommunicator::new(communicator, session.clone()));
    let mut reference = ReferenceRank::new(telling.clone(), means);
    serve(&session, &info, &hello, |case, inputs| {
        telling.begin(case.number);
        reference.answer(case, inputs)
    })?;
    Ok(())
}

/// How long the launcher has to end this rank once the judge is gone.
const LAUNCHER_FIRST: Duration = Duration::from_secs(15);

/// Ends this process when the judge is gone, out of a collective as well: on
/// another host than the judge's nobody else may be left to do so.
fn leave_when_alone(session: Session, judge: Judge, host: String) {
    thread::spawn(move || {
        while !judge_is_gone(&session, &judge, &host) {
            thread::sleep(Duration::from_secs(1));
        }
        // A daemon of the launcher on a host that was cut off finds that out as
        // long as it has nothing to say; the end of a rank is something to say.
        thread::sleep(LAUNCHER_FIRST);
        // Not through what a process does at its end: MPI is in use.
        raise(Signal::SIGKILL)
    });
}
