//! Whether ranks can exchange over NCCL, and how they do.

use std::sync::Arc;

use tch::Device;
use ulysses::Communicator;

/// Whether there is an NCCL that moves tensors on `device`.
#[cfg(feature = "nccl")]
pub(super) fn nccl_serves(device: Device) -> Result<(), String> {
    ulysses::nccl_serves(device)
}

/// A communicator over NCCL for tensors on `device`, whose ranks find each other
/// over `host`.
///
/// # Errors
///
/// If there is none: why.
#[cfg(feature = "nccl")]
pub fn nccl_communicator(
    host: Arc<dyn Communicator>,
    device: Device,
) -> Result<Arc<dyn Communicator>, String> {
    /// As long as MPI waits.
    const TIME_LIMIT: std::time::Duration = std::time::Duration::from_secs(300);
    let rendezvous = Arc::new(ulysses::HostRendezvous::new(host));
    match ulysses::NcclCommunicator::new(rendezvous, device, TIME_LIMIT) {
        Ok(communicator) => Ok(Arc::new(communicator)),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(not(feature = "nccl"))]
const WITHOUT: &str = "this program was built without NCCL: build it with the feature `nccl`";

/// There is none: this program was built without.
#[cfg(not(feature = "nccl"))]
pub(super) fn nccl_serves(_device: Device) -> Result<(), String> {
    Err(WITHOUT.to_owned())
}

/// There is none: this program was built without.
///
/// # Errors
///
/// Always.
#[cfg(not(feature = "nccl"))]
pub fn nccl_communicator(
    _host: Arc<dyn Communicator>,
    _device: Device,
) -> Result<Arc<dyn Communicator>, String> {
    Err(WITHOUT.to_owned())
}
