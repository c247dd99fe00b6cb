//! `kernels`: which kernels of attention this machine's devices offer, found out
//! by trying each.

use clap::Args;
use ulysses::{DeviceChoice, Kernel};

use super::print;
use crate::implementation::{Means, Offer};
use crate::{ExitCode, report};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The device: cpu, cuda or cuda:N [default: cuda where there is a device]
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceChoice>,
}

/// Lists them. That a kernel is not offered is no error.
pub(super) fn execute(arguments: &Arguments) -> ExitCode {
    let choice = arguments
        .device
        .unwrap_or_else(DeviceChoice::of_this_machine);
    let device = match choice.device(0) {
        Ok(device) => device,
        Err(reason) => {
            eprintln!("error: --device {choice}: {reason}");
            return ExitCode::Environment;
        }
    };
    tch::set_num_threads(1);
    let offers = Kernel::ALL.map(|kernel| (kernel, Offer::of(Means { device, kernel })));
    print(&report::kernels(choice, &offers));
    ExitCode::Success
}
