//! The program `ulysses-conformance`: see `--help`.

use clap::Parser;
use ulysses_conformance::ExitCode;
use ulysses_conformance::command_line::{Arguments, execute};

fn main() -> ExitCode {
    let program = std::env::args().next().unwrap_or_default();
    execute(&Arguments::parse(), &program)
}
