//! The bundled reference behind the exchange, one MPI process for each rank:
//! it goes through the same door as everybody else.
//!
//! ```text
//! mpirun -n {world} reference-adapter --kernel sdpa
//! ```

use std::collections::BTreeMap;
use std::error::Error;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use clap::{Parser, ValueEnum};
use fixtures::exchange::{FOLDER_VARIABLE, Hello, PROTOCOL, Session, serve};
use nix::unistd::{dup2_stderr, dup2_stdout};
use ulysses::{Communicator, Kernel, MpiWorld};
use ulysses_conformance::implementation::{
    Claims, ReferenceRank, TellingCommunicator, claims, kernel_parser, nccl_communicator,
    nccl_device,
};

/// Answers the cases of an exchange with the bundled reference. To be started
/// by mpirun, with the folder of the exchange in ULYSSES_EXCHANGE.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The core attention
    #[arg(long, value_parser = kernel_parser(), default_value = "sdpa")]
    kernel: Kernel,

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
    let world = MpiWorld::initialize()?;
    let host = Arc::new(world.communicator());
    let rank = host.rank();

    // What this rank says is kept apart from what the others say.
    let log = |stream| File::create(session.log_path(&format!("rank-{rank}"), stream));
    dup2_stdout(log("stdout")?)?;
    dup2_stderr(log("stderr")?)?;

    tch::set_num_threads(1);
    let (name, communicator): (&str, Arc<dyn Communicator>) = match arguments.communicator {
        Carrier::Mpi => ("reference-mpi", host),
        Carrier::Nccl => ("reference-nccl", nccl_communicator(host, nccl_device()?)?),
    };
    let Claims { features, declared } = claims(arguments.kernel);
    let hello = Hello {
        protocol: PROTOCOL,
        rank,
        world: communicator.size(),
        pid: std::process::id(),
        host: hostname::get()?.to_string_lossy().into_owned(),
        implementation: name.to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        libraries: BTreeMap::new(),
        features,
        declared,
    };
    let telling = Arc::new(TellingCommunicator::new(communicator, session.clone()));
    let mut reference = ReferenceRank::new(telling.clone(), arguments.kernel);
    serve(&session, &info, &hello, |case, inputs| {
        telling.begin(case.number);
        reference.answer(case, inputs)
    })?;
    Ok(())
}
