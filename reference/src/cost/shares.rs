//! How many tokens and heads each rank has.

use super::not_zero;
use crate::{
    error::{Result, refuse},
    head_partition::HeadPartition,
};

/// A batch of sequences, shared out over the ranks of one sequence-parallel
/// group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shares {
    batch: u64,
    tokens: Vec<u64>,
    heads: HeadPartition,
}

impl Shares {
    /// `batch` sequences of which rank r holds `tokens[r]` tokens.
    ///
    /// # Errors
    /// Refused when there is no sequence or no token, and when `heads` is for
    /// another number of ranks.
    pub fn new(batch: u64, tokens: Vec<u64>, heads: HeadPartition) -> Result<Self> {
        if tokens.len() != heads.ranks() {
            return refuse(
                "tokens",
                format!(
                    "is for {} ranks, but the heads are for {}",
                    tokens.len(),
                    heads.ranks()
                ),
                "describe every rank once",
            );
        }
        // Products of two counts of heads are made below.
        if heads.query_heads() > u32::MAX as usize {
            return refuse("heads", "are more than 2^32", "give fewer");
        }
        let Some(all) = tokens.iter().try_fold(0u64, |all, t| all.checked_add(*t)) else {
            return refuse("tokens", "are more than 2^64", "give fewer");
        };
        not_zero("tokens", &[("batch", batch), ("length", all)])?;
        Ok(Self {
            batch,
            tokens,
            heads,
        })
    }

    /// `batch` sequences of `sequence` tokens, as even as can be: the first
    /// `sequence mod ranks` ranks have one token more.
    ///
    /// # Errors
    /// Refused as for [`new`](Self::new), and where the heads cannot be shared
    /// out ([`HeadPartition::new`]).
    pub fn even(batch: u64, sequence: u64, heads: (u64, u64), ranks: u64) -> Result<Self> {
        // Too many heads for a usize are too many for every number of ranks.
        let count = |count: u64| usize::try_from(count).unwrap_or(usize::MAX);
        let heads = HeadPartition::new(count(heads.0), count(heads.1), count(ranks))?;
        let (each, over) = (sequence / ranks, sequence % ranks);
        let tokens = (0..ranks).map(|rank| each + u64::from(rank < over));
        Self::new(batch, tokens.collect(), heads)
    }

    /// B, how many sequences there are.
    pub fn batch(&self) -> u64 {
        self.batch
    }

    /// P.
    pub fn ranks(&self) -> usize {
        self.tokens.len()
    }

    /// S.
    pub fn sequence(&self) -> u64 {
        self.tokens.iter().sum()
    }

    /// The tokens of each rank.
    pub fn tokens(&self) -> &[u64] {
        &self.tokens
    }

    /// The heads of each rank.
    pub fn heads(&self) -> &HeadPartition {
        &self.heads
    }

    /// The tokens, query heads and KV heads of `rank`.
    pub(super) fn of(&self, rank: usize) -> Result<Share> {
        match self.tokens.get(rank) {
            None => refuse(
                "rank",
                format!("is {rank} of {}", self.ranks()),
                "count ranks from 0",
            ),
            Some(&tokens) => Ok(Share {
                tokens,
                query_heads: self.heads.query_range(rank).len() as u64,
                kv_heads: self.heads.kv_range(rank).len() as u64,
            }),
        }
    }

    /// KV heads with every copy that a rank needs of one.
    pub(super) fn kv_copies(&self) -> u64 {
        let copies = (0..self.ranks()).map(|rank| self.heads.kv_range(rank).len() as u64);
        copies.sum()
    }
}

/// What one rank has.
pub(super) struct Share {
    pub(super) tokens: u64,
    pub(super) query_heads: u64,
    pub(super) kv_heads: u64,
}
