//! On which device a rank computes, and what tch does not bind of it.
//!
//! One program serves machines with GPUs and without. libtorch's CUDA library
//! is not linked: it is loaded by [`cuda_devices`] where a driver of NVIDIA's
//! is there, so that a CPU alone needs no library of CUDA and starts as
//! quickly as before. Ask [`cuda_devices`] first, before anything else of
//! libtorch: a process that has once seen torch without CUDA stays without.
//!
//! A rank's GPU follows from its place on its host, [`local_rank`]: as many
//! ranks as GPUs have one each, more share them in turn.
//!
//! | module | holds |
//! |---|---|
//! | `choice` | `cpu`, `cuda` or `cuda:1`, and the device that a rank gets of it |
//! | `cuda` | whether there is one, and its library |
//! | `event` | when a device has come to a point of its stream |
//! | `ffi`, `device.cpp` | the border to c10's interfaces that know no vendor |
//!
//! Not here: what runs on a device, which the tensors' own device decides.

mod choice;
mod cuda;
mod event;
mod ffi;

pub use choice::{DeviceChoice, local_rank};
pub use cuda::{NoCuda, cuda_devices};
pub use event::Event;

use crate::error::Result;
use std::ffi::c_void;
use tch::{Device, TchError, Tensor};

/// Makes `device` the one that this thread's calls of CUDA and NCCL are for.
/// On a CPU there is nothing to do.
///
/// # Errors
/// When CUDA refuses.
pub fn set_current(device: Device) -> Result<()> {
    Ok(of_cuda(device, (), ffi::set_current)?)
}

/// Waits until everything that was given to `device` is done.
///
/// # Errors
/// When something of it failed.
pub fn synchronize(device: Device) -> Result<()> {
    Ok(of_cuda(device, (), ffi::synchronize)?)
}

/// Free and total bytes of a GPU; `None` for a CPU.
///
/// # Errors
/// When CUDA refuses.
pub fn memory(device: Device) -> Result<Option<(u64, u64)>> {
    Ok(of_cuda(device, None, |index| ffi::memory(index).map(Some))?)
}

/// The stream on which torch puts this thread's work on `device`, as CUDA's own
/// handle; null for the default stream and for a CPU.
#[cfg_attr(not(feature = "nccl"), allow(dead_code))]
pub(crate) fn stream(device: Device) -> Result<*mut c_void, TchError> {
    of_cuda(device, std::ptr::null_mut(), ffi::stream)
}

/// Room for `like` on the host, uninitialised: pinned where `like` is on a GPU,
/// which then copies from and to it by itself.
pub(crate) fn staging(like: &Tensor) -> Result<Tensor, TchError> {
    match like.device() {
        Device::Cuda(_) => ffi::pinned(like),
        _ => Tensor::f_empty(like.size(), (like.f_kind()?, Device::Cpu)),
    }
}

/// From now on a backward that this thread begins runs on this thread alone,
/// for every device.
///
/// torch gives the backward of all threads to one thread for each GPU. Where
/// ranks are threads, that one would have to be in a collective for several
/// ranks at once, and waits for itself.
pub(crate) fn keep_backward_on_this_thread() {
    ffi::keep_backward_on_this_thread();
}

/// torch's switches of attention kernels: a bit for each, the whole process'.
pub(crate) fn attention_switches() -> u8 {
    ffi::attention_switches()
}

pub(crate) fn set_attention_switches(switches: u8) {
    ffi::set_attention_switches(switches);
}

/// What `of_index` says of a GPU, or `otherwise`.
fn of_cuda<T>(
    device: Device,
    otherwise: T,
    of_index: impl FnOnce(i32) -> Result<T, TchError>,
) -> Result<T, TchError> {
    match device {
        Device::Cuda(index) => of_index(index as i32),
        _ => Ok(otherwise),
    }
}
