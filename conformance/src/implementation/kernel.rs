//! The core attentions by name.

use clap::builder::{PossibleValuesParser, TypedValueParser};
use ulysses::Kernel;

/// The kernel of this name.
pub fn kernel(name: &str) -> Option<Kernel> {
    Kernel::ALL.into_iter().find(|kernel| kernel.name() == name)
}

/// Takes such a name, and lists them in a help text.
pub fn kernel_parser() -> impl TypedValueParser<Value = Kernel> {
    PossibleValuesParser::new(Kernel::ALL.map(Kernel::name))
        .try_map(|name| kernel(&name).ok_or("is no kernel"))
}
