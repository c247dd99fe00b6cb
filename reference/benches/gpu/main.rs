//! What exchange and attention cost on a GPU, beside what they are held to on
//! the same GPU in the same run. `gpu.py` drives it and makes tables.
//!
//! Prints a line of JSON for each measurement: what it was, how many ranks and
//! tokens of all ranks, bytes that moved, and the seconds of each repetition.
//!
//! | module | holds |
//! |---|---|
//! | `ranks` | the one way in which time is taken: events of the device |
//! | `workloads` | what is measured |
//! | `processes` | ranks that are processes, over MPI or NCCL |
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod processes;
mod ranks;
mod workloads;

use clap::{Args, Parser, Subcommand};
use processes::Means;
use serde::Serialize;
use ulysses::{DeviceChoice, Kernel};

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    what: Option<What>,

    /// cargo adds this one.
    #[arg(long, hide = true, global = true)]
    bench: bool,
}

#[derive(Subcommand)]
enum What {
    /// Q, K and V from shards of tokens to shards of heads, 2 and 4 ranks as
    /// threads on one GPU, and a copy of as many bytes
    Exchange(Common),
    /// Attention, forward and backward, 1, 2 and 4 ranks as threads on one GPU,
    /// and dense attention by the same kernel
    Attention {
        #[command(flatten)]
        common: Common,
        /// The core attention of both
        #[arg(long, default_value = "flash", value_parser = kernel)]
        kernel: Kernel,
    },
    /// The exchange among the processes that mpirun has started this as
    Processes {
        #[command(flatten)]
        common: Common,
        /// By what they exchange
        #[arg(long, value_enum)]
        means: Means,
    },
}

#[derive(Args)]
struct Common {
    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cuda")]
    device: DeviceChoice,
    /// Tokens of all ranks together
    #[arg(long, value_delimiter = ',', required = true)]
    tokens: Vec<i64>,
    /// How often each is measured
    #[arg(long, default_value = "15")]
    repetitions: usize,
}

/// One line of what is printed.
#[derive(Serialize)]
struct Measurement {
    what: &'static str,
    by: String,
    ranks: usize,
    tokens: i64,
    bytes: i64,
    seconds: Vec<f64>,
}

impl Measurement {
    fn print(&self) {
        println!("{}", serde_json::to_string(self).unwrap());
    }
}

fn kernel(name: &str) -> Result<Kernel, String> {
    let named = Kernel::ALL.into_iter().find(|kernel| kernel.name() == name);
    named.ok_or_else(|| "is no kernel".to_owned())
}

fn main() {
    let Some(what) = Arguments::parse().what else {
        // `cargo test --benches` and `cargo bench` without words.
        return println!("for gpu.py: give exchange, attention or processes");
    };
    match what {
        What::Exchange(common) => {
            let device = one_device(common.device);
            for tokens in common.tokens {
                workloads::exchanges(device, tokens, common.repetitions);
            }
        }
        What::Attention { common, kernel } => {
            let device = one_device(common.device);
            for tokens in common.tokens {
                workloads::attentions(device, kernel, tokens, common.repetitions);
            }
        }
        What::Processes { common, means } => processes::exchanges(means, &common),
    }
}

/// All ranks of a process that are threads share this one, and so does what
/// they are compared with.
fn one_device(choice: DeviceChoice) -> tch::Device {
    choice.device(0).unwrap_or_else(|reason| panic!("{reason}"))
}
