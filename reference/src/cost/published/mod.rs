//! What others published of cost, beside what this module makes of it.
//!
//! | rows | how near |
//! |---|---|
//! | [`throughputs`] | counted by the papers' own rules: within 1.5 % where the iteration is longer than a minute; below, seconds are rounded too coarsely |
//! | [`lengths`] | the fit of [`memory`](super::memory): within 20 % for Llama-8B; elsewhere too high, where the authors stopped earlier for the host's memory or did not push |
//! | [`readings`] | the same fit: about 12 %; these are what it was made from |
//! | [`sizes`] | arithmetic on one tensor: exact, as far as digits are printed |
//!
//! The longest lengths were read off the release's recipes, since the paper
//! rounds them in its text and draws them in its figures. Nothing here can be
//! measured on a CPU.
//!
//! Source: "DeepSpeed Ulysses", arXiv:2309.14509, tables 2 and 3; "Arctic Long
//! Sequence Training", arXiv:2506.13996, tables 1 to 4 and section 3, with its
//! recipes in `snowflakedb/ArcticTraining`.

mod memory;
mod size;
mod throughput;

pub use memory::{LengthRow, ReadingRow, lengths, readings};
pub use size::{SizeRow, sizes};
pub use throughput::{ThroughputRow, throughputs};

use super::Model;
use crate::error::{Result, refuse};

/// A model of [`Model::NAMED`].
fn model(name: &str) -> Result<Model> {
    match Model::named(name) {
        Some(model) => Ok(model),
        None => refuse(
            "name",
            format!("{name} is unknown"),
            "use one of Model::NAMED",
        ),
    }
}
