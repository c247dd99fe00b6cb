//! `cpu`, `cuda` or `cuda:1`, and the device that a rank gets of it.

use super::{NoCuda, cuda_devices};
use std::{env, fmt, str::FromStr};
use tch::Device;

/// On which device ranks compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    /// On the host.
    Cpu,
    /// On the GPUs that are there, dealt out by local rank.
    Cuda,
    /// All on this one.
    CudaAt(usize),
}

impl DeviceChoice {
    /// CUDA where there is a device, else the CPU.
    pub fn of_this_machine() -> DeviceChoice {
        match cuda_devices() {
            Ok(_) => DeviceChoice::Cuda,
            Err(_) => DeviceChoice::Cpu,
        }
    }

    /// All devices that ranks get, in the order of local ranks; at least one.
    ///
    /// # Errors
    /// As for [`DeviceChoice::device`].
    pub fn devices(self) -> Result<Vec<Device>, NoCuda> {
        let ranks = match self {
            DeviceChoice::Cuda => cuda_devices()?,
            DeviceChoice::Cpu | DeviceChoice::CudaAt(_) => 1,
        };
        (0..ranks).map(|rank| self.device(rank)).collect()
    }

    /// The device of the rank that is the `local_rank`-th of its host, which may
    /// be more than there are GPUs.
    ///
    /// # Errors
    /// When the device is not there: why, and what to do.
    pub fn device(self, local_rank: usize) -> Result<Device, NoCuda> {
        match self {
            DeviceChoice::Cpu => Ok(Device::Cpu),
            DeviceChoice::Cuda => Ok(Device::Cuda(local_rank % cuda_devices()?)),
            DeviceChoice::CudaAt(index) => match cuda_devices()? {
                count if index < count => Ok(Device::Cuda(index)),
                count => Err(NoCuda::NoSuchDevice { index, count }),
            },
        }
    }
}

/// As in torch: `cpu`, `cuda` or `cuda:1`.
impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceChoice::Cpu => f.write_str("cpu"),
            DeviceChoice::Cuda => f.write_str("cuda"),
            DeviceChoice::CudaAt(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let index = |text: &str| text.strip_prefix("cuda:")?.parse().ok();
        match text {
            "cpu" => Ok(DeviceChoice::Cpu),
            "cuda" => Ok(DeviceChoice::Cuda),
            _ => index(text)
                .map(DeviceChoice::CudaAt)
                .ok_or_else(|| format!("`{text}` is no device: give cpu, cuda or cuda:N")),
        }
    }
}

/// This process' place among the ranks of its host, as its launcher says it:
/// torchrun, Open MPI, MPICH and Intel's, or Slurm. 0 where nobody does.
pub fn local_rank() -> usize {
    const SAID_IN: [&str; 4] = [
        "LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "MPI_LOCALRANKID",
        "SLURM_LOCALID",
    ];
    let said = |name| env::var(name).ok()?.parse().ok();
    SAID_IN.into_iter().find_map(said).unwrap_or(0)
}
