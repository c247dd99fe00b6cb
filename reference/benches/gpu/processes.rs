//! The exchange of ranks that are processes, each on the GPU of its place on
//! its host.

use crate::{
    Common, Measurement,
    ranks::seconds,
    workloads::{bytes_of, exchange},
};
use clap::ValueEnum;
use std::sync::Arc;
use tch::Device;
use ulysses::{
    Communicator, MpiWorld,
    device::{local_rank, set_current},
};

/// By what processes exchange.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Means {
    /// Messages of MPI, through pinned memory of the host.
    Mpi,
    /// NCCL, from GPU to GPU.
    #[cfg(feature = "nccl")]
    Nccl,
}

impl Means {
    #[cfg_attr(not(feature = "nccl"), expect(unused_variables))]
    fn communicator(self, world: &MpiWorld, device: Device) -> Arc<dyn Communicator> {
        let host = Arc::new(world.communicator());
        match self {
            Means::Mpi => host,
            #[cfg(feature = "nccl")]
            Means::Nccl => {
                let rendezvous = Arc::new(ulysses::HostRendezvous::new(host));
                let limit = std::time::Duration::from_secs(60);
                Arc::new(ulysses::NcclCommunicator::new(rendezvous, device, limit).unwrap())
            }
        }
    }
}

/// Rank 0 prints them.
pub(crate) fn exchanges(means: Means, common: &Common) {
    let device = common.device.device(local_rank());
    let device = device.unwrap_or_else(|reason| panic!("{reason}"));
    tch::set_num_threads(1);
    let world = MpiWorld::initialize().unwrap();
    set_current(device).unwrap();
    let communicator = means.communicator(&world, device);
    for &tokens in &common.tokens {
        let work = exchange(Arc::clone(&communicator), device, tokens);
        let seconds = seconds(&*communicator, device, common.repetitions, work);
        if communicator.rank() == 0 {
            let name = means.to_possible_value().unwrap();
            let measurement = Measurement {
                what: "processes",
                by: name.get_name().to_owned(),
                ranks: communicator.size(),
                tokens,
                bytes: bytes_of(tokens),
                seconds,
            };
            measurement.print();
        }
    }
}
