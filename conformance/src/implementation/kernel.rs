//! The names of the reference's core attentions on a command line.

use clap::builder::{PossibleValuesParser, TypedValueParser};
use ulysses::Kernel;

/// The name of `kernel`.
pub fn kernel_name(kernel: Kernel) -> &'static str {
    match kernel {
        Kernel::Sdpa => "sdpa",
        Kernel::Eager => "eager",
    }
}

/// Takes such a name, and lists them in a help text.
pub fn kernel_parser() -> impl TypedValueParser<Value = Kernel> {
    const KERNELS: [Kernel; 2] = [Kernel::Sdpa, Kernel::Eager];
    PossibleValuesParser::new(KERNELS.map(kernel_name)).try_map(|name| {
        KERNELS
            .into_iter()
            .find(|&kernel| kernel_name(kernel) == name)
            .ok_or("is no kernel")
    })
}
