//! The program's arguments, and what it does with them.

mod faults;
mod kernels;
mod plan;
mod run;
mod show;

use std::io::{self, Write};

use clap::{Parser, Subcommand};

use crate::ExitCode;

/// Judges implementations of Ulysses sequence parallelism against dense
/// attention and its gradients.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "\
Exit codes:
  0    all that was asked was answered rightly, or refused where that was due,
       or failed as is known
  1    at least one case failed, crashed or hung, or is known to and does not
  2    the command line makes no sense
  3    no case was judged
  4    at least one case is unclear, and none failed
  5    something that the run needs is missing on this machine
  130  interrupted";

#[derive(Debug, Subcommand)]
enum Command {
    /// Asks implementations the cases of the catalogue and judges the answers
    Run(run::Arguments),
    /// Judges implementations that are wrong on purpose: whether the judge
    /// catches them, and names what is wrong
    Faults(faults::Arguments),
    /// Tells what a case can show, and how far a number of its answer may be off
    Show(show::Arguments),
    /// Lists the kernels of attention that a device offers
    Kernels(kernels::Arguments),
    /// Tells what training a model costs: bytes that travel, operations, memory
    Plan(plan::Arguments),
}

/// Does what the command line asks for. `program` is how it was called.
pub fn execute(arguments: &Arguments, program: &str) -> ExitCode {
    match &arguments.command {
        Command::Run(arguments) => run::execute(arguments, program),
        Command::Show(arguments) => show::execute(arguments),
        Command::Kernels(arguments) => kernels::execute(arguments),
        Command::Plan(arguments) => plan::execute(arguments),
        Command::Faults(arguments) => faults::execute(arguments),
    }
}

/// Prints on the standard output. That nobody reads on, as after `| head`, is no
/// reason to end the run.
fn print(text: &str) {
    let _ = io::stdout().write_all(text.as_bytes());
}
