//! What all ranks know of a call before any of its data moves.
//!
//! Each rank describes its call in a fixed number of words, all ranks gather
//! all descriptions, and every rank runs the same pure function over them
//! ([`check`]). Equal inputs give equal verdicts: what is wrong on any rank is
//! the same error on every rank.
//!
//! Not here: anything that only the data can tell.

mod check;
mod descriptor;
mod refusal;
mod settings;
mod side;

use crate::{
    call::Call,
    communicator::{Communicator, CommunicatorError},
    error::Result,
    head_partition::HeadPartition,
    options::Options,
    token_partition::TokenPartition,
};
use descriptor::Descriptor;
pub(crate) use refusal::gather;
use tch::Tensor;

/// What the ranks agreed on.
#[derive(Debug, PartialEq)]
pub(crate) struct Agreed {
    /// The sequences of a batch.
    pub(crate) batch: usize,
    /// The tokens of each rank.
    pub(crate) tokens: TokenPartition,
    /// The heads of each rank.
    pub(crate) heads: HeadPartition,
}

/// Gathers the description of every rank's call and checks them together.
pub(crate) fn reach(
    communicator: &dyn Communicator,
    tensors: [&Tensor; 3],
    call: &Call<'_>,
    options: &Options,
) -> Result<Agreed> {
    let own = Descriptor::of(tensors, call, options);
    let gathered = communicator.all_gather(&own.to_words())?;
    let descriptors = gathered
        .iter()
        .enumerate()
        .map(|(rank, words)| {
            own.like(words).ok_or_else(|| CommunicatorError::Mismatch {
                operation: "all_gather",
                rank,
                problem: format!("gave {} words that describe no call", words.len()),
            })
        })
        .collect::<Result<Vec<_>, _>>()?;
    check::check(&descriptors, options, call)
}
