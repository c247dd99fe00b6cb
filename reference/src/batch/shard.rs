//! One rank's tokens of a batch.

use super::{Batch, Entry};
use crate::{
    error::{Result, refuse},
    token_partition::{Sharding, TokenPartition},
};
use std::collections::BTreeMap;
use tch::Tensor;

/// One rank's shard of a batch: what a model is given.
#[derive(Debug)]
pub struct Shard {
    /// Each entry with this rank's tokens, [B, s, ..], or whole.
    pub entries: BTreeMap<String, Tensor>,
    /// Where the documents of the whole rows end, if the batch says so.
    pub document_ends: Option<Vec<Vec<usize>>>,
    /// Which tokens this and every other rank has.
    pub tokens: TokenPartition,
}

impl Shard {
    /// The entry of this name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.entries.get(name)
    }
}

impl Batch {
    /// The shard of `rank`, one of `ranks`. What is cut shares no memory with
    /// the batch. Lengths that `ranks` does not divide are cut as
    /// [`TokenPartition::even`] says.
    ///
    /// # Errors
    /// Refused when there is no such rank, when the batch has no
    /// `position_ids`, or `labels` that were not shifted, and as
    /// [`extent`](Batch::extent) is.
    pub fn shard(&self, sharding: Sharding, rank: usize, ranks: usize) -> Result<Shard> {
        let (_, tokens) = self.extent()?;
        let tokens = TokenPartition::even(sharding, tokens, ranks)?;
        if rank >= ranks {
            let problem = format!("is {rank}, in a group of {ranks}");
            return refuse("rank", problem, "count ranks from 0");
        }
        if self.get("labels").is_some() {
            return refuse(
                "labels",
                "are to be cut before they are shifted, and the last token of each shard would \
                 lose its target",
                "call `shift_labels` first",
            );
        }
        if self.get("position_ids").is_none() {
            return refuse(
                "position_ids",
                "are missing, and made from a shard they would begin again on every rank",
                "call `with_position_ids` first",
            );
        }
        let entries = self
            .entries
            .iter()
            .map(|(name, entry)| Ok((name.clone(), entry.of_rank(&tokens, rank)?)));
        Ok(Shard {
            entries: entries.collect::<Result<_>>()?,
            document_ends: self.document_ends.clone(),
            tokens,
        })
    }
}

impl Entry {
    fn of_rank(&self, tokens: &TokenPartition, rank: usize) -> Result<Tensor> {
        let Some(dimension) = self.tokens else {
            return Ok(self.tensor.shallow_clone());
        };
        let dimension = dimension as i64;
        // A rank may have no run at all.
        let mut runs = vec![self.tensor.f_narrow(dimension, 0, 0)?];
        for run in tokens.runs(rank) {
            let (first, step) = (run.first as i64, run.step as i64);
            let past = first + (run.tokens as i64 - 1) * step + 1;
            runs.push(self.tensor.f_slice(dimension, first, past, step)?);
        }
        Ok(Tensor::f_cat(&runs, dimension)?)
    }
}
