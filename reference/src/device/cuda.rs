//! Whether there is a GPU, and the library of libtorch that speaks to it.
#![allow(unsafe_code)]

use libloading::Library;
use std::{env, sync::OnceLock};
use tch::Cuda;

/// The driver's own library, which every installation of it brings.
const DRIVER: &str = "libcuda.so.1";
/// It lies beside the libtorch that the program was linked with, or where the
/// loader looks.
const TORCH: &str = "libtorch_cuda.so";

/// Why there is no CUDA device, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NoCuda {
    /// There is no driver.
    #[error(
        "no CUDA device: this machine has no NVIDIA driver ({DRIVER} is not there); \
         install one, or choose the device `cpu`"
    )]
    NoDriver,
    /// libtorch has no part for CUDA, or it does not load.
    #[error(
        "no CUDA device: there is an NVIDIA driver, but libtorch's {TORCH} does not load \
         ({reason}); set up with a torch 2.11.0 that is built for CUDA"
    )]
    NoLibrary {
        /// The loader's own words.
        reason: String,
    },
    /// Driver and libtorch are there, and see no device.
    #[error(
        "no CUDA device: driver and libtorch are there and see none{visible}; compare \
         `nvidia-smi`, and the driver's version with the CUDA of this torch"
    )]
    NoneVisible {
        /// What CUDA_VISIBLE_DEVICES has to do with it, if anything.
        visible: String,
    },
    /// A device was asked for that is not there.
    #[error("no device cuda:{index}: this process sees {count}, from cuda:0 on")]
    NoSuchDevice {
        /// The index that was asked for.
        index: usize,
        /// How many there are.
        count: usize,
    },
}

/// How many GPUs this process sees: at least one.
///
/// The first call loads libtorch's CUDA library where an NVIDIA driver is
/// there, which takes a second or two, and must come before all else that is
/// asked of libtorch.
///
/// # Errors
/// Why there is none, in one sentence.
pub fn cuda_devices() -> Result<usize, NoCuda> {
    static DEVICES: OnceLock<Result<usize, NoCuda>> = OnceLock::new();
    DEVICES.get_or_init(look).clone()
}

fn look() -> Result<usize, NoCuda> {
    let visible = env::var("CUDA_VISIBLE_DEVICES");
    let none_visible = || NoCuda::NoneVisible {
        visible: visible
            .iter()
            .map(|chosen| format!(" with CUDA_VISIBLE_DEVICES=\"{chosen}\""))
            .collect(),
    };
    // Who hides them all need not wait for the library.
    if matches!(visible.as_deref(), Ok("" | "-1")) {
        return Err(none_visible());
    }
    let is_driven = load(DRIVER).is_ok();
    if is_driven {
        load(TORCH).map_err(|reason| NoCuda::NoLibrary { reason })?;
    }
    match usize::try_from(Cuda::device_count()) {
        Ok(count) if count > 0 => Ok(count),
        _ if !is_driven => Err(NoCuda::NoDriver),
        _ => Err(none_visible()),
    }
}

/// Loads a library for as long as the process lives.
fn load(name: &str) -> Result<(), String> {
    // SAFETY: what these two libraries do when they are loaded is what every
    // program that is linked with them has done to it at its start.
    let library = unsafe { Library::new(name) }.map_err(|error| error.to_string())?;
    // What it registers with libtorch is used until the end.
    std::mem::forget(library);
    Ok(())
}
