//! What one call of [`UlyssesAttention`](crate::UlyssesAttention) may bring
//! beside query, key and value.
//!
//! What belongs to tokens is given for the tokens of this rank, as query, key
//! and value are. What belongs to heads is a parameter of the model, which
//! every rank has whole: each rank uses the part for its own heads, so that
//! the gradients of all ranks add up to that of one process.

use crate::core_attention::{BlockLayout, Dropout};
use tch::Tensor;

/// Beside query, key and value. Nothing of it by default.
#[derive(Debug, Clone, Copy, Default)]
pub struct Call<'a> {
    /// The positions of this rank's tokens, int64: [B, s], or [3, B, s] for a
    /// rotary embedding of three components. Rotary embedding and
    /// [`Documents::FromPositions`] read them.
    pub position_ids: Option<&'a Tensor>,
    /// Several documents in one sequence: no token sees another document.
    pub documents: Option<Documents<'a>>,
    /// [B, s], bool or int64: which of this rank's tokens are real and not
    /// padding. The real tokens of a row are side by side. Padding is seen by
    /// nobody, and gets zeros.
    pub attention_mask: Option<&'a Tensor>,
    /// Which blocks of keys the blocks of queries see, for all query heads.
    pub layout: Option<&'a BlockLayout>,
    /// ALiBi: `[Hq]`, minus which times the distance is added to the score.
    /// Press et al., arXiv:2108.12409, section 3.
    pub slopes: Option<&'a Tensor>,
    /// Attention sinks: `[Hq]`, the score of one more key that has no value.
    pub sinks: Option<&'a Tensor>,
    /// Queries and keys are normalised, head by head.
    pub head_norm: Option<HeadNorm<'a>>,
    /// Drops attention weights.
    pub dropout: Option<CallDropout>,
    /// Which layer of the model calls, from 0:
    /// [`skip_all_but_last`](crate::Options::skip_all_but_last) reads it.
    pub layer: usize,
}

/// Where the documents of a packed sequence end.
#[derive(Debug, Clone, Copy)]
pub enum Documents<'a> {
    /// One begins wherever a position is not that of the token before plus one.
    FromPositions,
    /// For each batch row the cumulative lengths, the last of which is S; the
    /// same on all ranks.
    Ends(&'a [Vec<usize>]),
}

/// The weights of a root-mean-square norm over the channels of each head.
#[derive(Debug, Clone, Copy)]
pub struct HeadNorm<'a> {
    /// [Hq, D].
    pub query: &'a Tensor,
    /// [Hkv, D].
    pub key: &'a Tensor,
    /// Added to the mean square.
    pub epsilon: f64,
}

/// Dropout of attention weights. Which weights are dropped follows from the
/// seed alone, whatever the number of ranks, and again when a forward is
/// recomputed in backward: give each call a seed of its own.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CallDropout {
    /// How likely a weight is dropped, in [0, 1).
    pub probability: f64,
    /// Chooses the weights; the same on all ranks.
    pub seed: u64,
}

impl CallDropout {
    /// For the heads from `first_head` on.
    pub(crate) fn of_heads(self, first_head: usize) -> Dropout {
        Dropout {
            probability: self.probability,
            seed: self.seed,
            first_head,
        }
    }
}
