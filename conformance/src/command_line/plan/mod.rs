//! `plan`: what training a model costs, before it is tried.
//!
//! All arithmetic is that of [`ulysses::cost`]; here are the arguments and the
//! tables.

mod model;
mod published;
mod quantities;

use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::{Args, ValueEnum};
use fixtures::Dtype;
use ulysses::cost::Model;
use ulysses::cost::memory::{H100_GIB, HOST_BYTES};

use super::print;
use crate::{ExitCode, report};
use quantities::{Quantity, quantities};

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Arguments {
    /// A model of the published rows
    #[arg(long, value_name = "NAME", value_parser = names(), ignore_case = true,
          required_unless_present_any = ["config", "published"])]
    model: Option<String>,

    /// The config.json of a Hugging Face model instead
    #[arg(long, value_name = "FILE", conflicts_with = "model")]
    config: Option<PathBuf>,

    /// Tokens of a sequence; several lengths separated by commas. 500K is
    /// 500,000 and 1.5M is 1,500,000
    #[arg(long, value_name = "TOKENS", value_parser = length, value_delimiter = ',',
          required_unless_present = "published")]
    sequence: Vec<u64>,

    /// Sequences of a batch
    #[arg(long, value_name = "B", default_value_t = 1)]
    batch: u64,

    /// Ranks that share a sequence
    #[arg(long, value_name = "P", default_value_t = 1)]
    sp: u64,

    /// Ranks in all, a multiple of P; P if not given
    #[arg(long, value_name = "W")]
    world: Option<u64>,

    /// Whose bytes and operations; with uneven shares the first ranks have most
    #[arg(long, value_name = "RANK", default_value_t = 0)]
    rank: usize,

    /// The element type of activations
    #[arg(long, value_name = "DTYPE", default_value = "bf16", value_parser = dtype)]
    dtype: Dtype,

    /// Tokens see all tokens, not only those before them
    #[arg(long)]
    full: bool,

    /// Layers keep all that backward needs
    #[arg(long)]
    no_checkpoints: bool,

    /// What the host keeps instead of the GPU
    #[arg(long, value_name = "WHAT", value_delimiter = ',')]
    offload: Vec<Offload>,

    /// The MLP runs in that many tiles; auto is as many as DeepSpeed takes,
    /// s/h rounded up
    #[arg(long, value_name = "TILES", value_parser = tiles)]
    tiled_mlp: Option<Tiling>,

    /// Head and loss run in that many tiles; auto makes tiles of about
    /// 1 GiB of float32 logits
    #[arg(long, value_name = "TILES", value_parser = tiles)]
    tiled_loss: Option<Tiling>,

    /// What an iteration takes, to tell operations per second
    #[arg(long, value_name = "S", value_parser = seconds)]
    seconds: Option<f64>,

    /// What is usable of a GPU; 77.5 is what an H100 has, 138 an H200
    #[arg(long, value_name = "GIB", default_value_t = H100_GIB)]
    gpu_memory: f64,

    /// What is usable of a host, in bytes
    #[arg(long, value_name = "BYTES", default_value_t = HOST_BYTES)]
    host_memory: f64,

    /// GPUs of a host
    #[arg(long, value_name = "N", default_value_t = 8)]
    gpus_per_host: u64,

    /// A kernel counts elements in 32 bits, as the tiled loss of the published
    /// rows did: no more than 2^31 / h tokens on a rank
    #[arg(long)]
    int32_kernel: bool,

    /// Tell the same as lines of JSON, one for each length
    #[arg(long)]
    json: bool,

    /// What others published, beside what is said of it here
    #[arg(long, exclusive = true)]
    published: bool,
}

const AFTER_HELP: &str = "\
Bytes of exchanges, operations and bytes of tensors are exact. The memory of a
GPU and the longest sequence are a fit to published readings: good to 12 % for
readings and to 20 % for the longest sequence of Llama-3.1-8B, elsewhere an
upper bound.";

/// What the host may keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Offload {
    /// The inputs of checkpointed layers
    Checkpoints,
    /// Gradients, master weights and moments
    Optimizer,
    /// Weights
    Parameters,
}

/// Into how many tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tiling {
    Auto,
    Tiles(u64),
}

fn names() -> PossibleValuesParser {
    Model::NAMED.map(|(name, _)| name).into()
}

fn length(text: &str) -> Result<u64, String> {
    let (number, unit) = match text.strip_suffix('K') {
        Some(number) => (number, 1e3),
        None => match text.strip_suffix('M') {
            Some(number) => (number, 1e6),
            None => (text, 1.0),
        },
    };
    let tokens = number.parse::<f64>().map_or(f64::NAN, |number| {
        let tokens = number * unit;
        // 15.5 thousand is a decimal fraction that binary has not.
        if (tokens - tokens.round()).abs() < 1e-6 {
            tokens.round()
        } else {
            f64::NAN
        }
    });
    match tokens {
        1.0..=9e15 => Ok(tokens as u64),
        _ => Err("is no number of tokens, such as 131072, 500K or 1.5M".to_owned()),
    }
}

fn dtype(text: &str) -> Result<Dtype, String> {
    let of_name = |dtype: &Dtype| dtype.to_string() == text;
    let found = Dtype::FLOATS.into_iter().find(of_name);
    found.ok_or_else(|| "is none of f64, f32, bf16, f16".to_owned())
}

fn tiles(text: &str) -> Result<Tiling, String> {
    match text.parse() {
        Ok(tiles) if tiles > 0 => Ok(Tiling::Tiles(tiles)),
        _ if text == "auto" => Ok(Tiling::Auto),
        _ => Err("is neither auto nor a number above 0".to_owned()),
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if seconds > 0.0 && f64::is_finite(seconds) => Ok(seconds),
        _ => Err("is no number of seconds above 0".to_owned()),
    }
}

/// Tells what is asked for.
pub(super) fn execute(arguments: &Arguments) -> ExitCode {
    let told = match arguments.published {
        true => published::tables().map_err(|error| error.to_string()),
        false => plan(arguments),
    };
    match told {
        Ok(text) => {
            print(&text);
            ExitCode::Success
        }
        Err(reason) => {
            eprintln!("error: {reason}");
            ExitCode::Usage
        }
    }
}

fn plan(arguments: &Arguments) -> Result<String, String> {
    let model = model::of(arguments)?;
    let of_length = |&sequence: &u64| {
        let quantities = quantities(arguments, &model, sequence);
        Ok((sequence, quantities.map_err(|error| error.to_string())?))
    };
    let planned: Vec<_> = arguments
        .sequence
        .iter()
        .map(of_length)
        .collect::<Result<_, String>>()?;
    match arguments.json {
        true => lines(&planned),
        false => Ok(tables(&planned)),
    }
}

fn lines(planned: &[(u64, Vec<Quantity>)]) -> Result<String, String> {
    let line = |(sequence, quantities): &(u64, Vec<Quantity>)| {
        let quantities = serde_json::to_string(quantities).map_err(|error| error.to_string())?;
        Ok(format!(
            "{{\"sequence\":{sequence},\"quantities\":{quantities}}}\n"
        ))
    };
    planned.iter().map(line).collect()
}

/// A table for each section, with a column for each length.
fn tables(planned: &[(u64, Vec<Quantity>)]) -> String {
    let mut text = String::new();
    let Some((_, first)) = planned.first() else {
        return text;
    };
    for of_section in first.chunk_by(|a, b| a.section == b.section) {
        let header = of_section
            .first()
            .map(|quantity| quantity.section.to_owned());
        let lengths = planned
            .iter()
            .map(|(sequence, _)| format!("S = {}", grouped(u128::from(*sequence))));
        let header = header.into_iter().chain(lengths);
        let row = |like: &Quantity| {
            let values = planned.iter().map(|(_, quantities)| {
                let same = |quantity: &&Quantity| quantity.is_like(like);
                quantities
                    .iter()
                    .find(same)
                    .map(Quantity::shown)
                    .unwrap_or_default()
            });
            [like.named()].into_iter().chain(values).collect()
        };
        let rows = of_section.iter().map(row).collect();
        text += &report::table(header, rows, 1..);
        text.push('\n');
    }
    text
}

/// 1234567 as 1,234,567.
fn grouped(count: u128) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
