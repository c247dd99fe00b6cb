//! The operations of a step's matrix products: two for each multiplication
//! and addition. Everything else (norms, softmax, rotation) is left out, as
//! is usual.
//!
//! Attention of h query heads over S tokens is 2 B S^2 h (D + Dv) forward
//! where all is visible, and B S (S + 1) h (D + Dv) where a token sees itself
//! and those before it; KV heads that are shared or copied change nothing. A
//! weight is 2 operations for each token. Backward is twice forward; a fused
//! attention computes its scores anew there, which makes it 2.5 times.
//!
//! Papers count otherwise. Both rules below take attention as not causal, and
//! what is checkpointed as four times forward; they are given under the names
//! of their papers, to compare with what those print.

use super::{Model, Shares, not_zero, product, times};
use crate::{core_attention::Mask, error::Result};

/// What is done in a step, as far as its operations depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    /// What a token attends to.
    pub mask: Mask,
    /// Layers keep their inputs alone, and run again in backward.
    pub is_checkpointed: bool,
    /// The MLP runs in tiles that keep their inputs alone: once more.
    pub has_tiled_mlp: bool,
    /// Head and loss run in tiles that keep their inputs alone: once more.
    pub has_tiled_loss: bool,
    /// Backward of attention computes the scores anew.
    pub is_attention_fused: bool,
}

/// Operations of one rank.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Flops {
    /// Scores, and what they weigh.
    pub attention: u128,
    /// The projections of query, key, value and output.
    pub projections: u128,
    /// The matrices of the MLP.
    pub mlp: u128,
    /// The head over the vocabulary.
    pub logits: u128,
}

impl Flops {
    /// All of them.
    pub fn total(&self) -> u128 {
        self.attention + self.projections + self.mlp + self.logits
    }
}

/// The operations of one rank in a step of one batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepFlops {
    /// Of forward.
    pub forward: Flops,
    /// Of what runs again in backward.
    pub recompute: Flops,
    /// Of backward without that.
    pub backward: Flops,
}

impl StepFlops {
    /// All of them.
    pub fn total(&self) -> u128 {
        self.forward.total() + self.recompute.total() + self.backward.total()
    }
}

/// Attention of `rank` in one layer, forward.
///
/// # Errors
/// Refused when there is no such rank, or the count is absurd.
pub fn attention(shares: &Shares, rank: usize, head_sizes: (u64, u64), mask: Mask) -> Result<u128> {
    let (sequence, heads) = (shares.sequence(), shares.of(rank)?.query_heads);
    let each = product([shares.batch(), sequence, heads, head_sizes.0])?
        + product([shares.batch(), sequence, heads, head_sizes.1])?;
    match mask {
        Mask::Full => times(each, sequence.saturating_mul(2)),
        Mask::Causal => times(each, sequence.saturating_add(1)),
    }
}

/// The operations of `rank` in a step.
///
/// # Errors
/// Refused when there is no such rank, when a size is zero, or the count is
/// absurd.
pub fn step(model: &Model, shares: &Shares, rank: usize, work: &Work) -> Result<StepFlops> {
    model.check()?;
    let tokens = product([2, shares.batch(), shares.of(rank)?.tokens])?;
    let of_weights = |weights: u128| times(tokens, weights);
    let sizes = (model.head_size, model.head_size);
    let layers = |of_one: u128| times(of_one, model.layers);
    let forward = Flops {
        attention: layers(attention(shares, rank, sizes, work.mask)?)?,
        projections: layers(of_weights(model.projections()?)?)?,
        mlp: layers(of_weights(model.mlp()?)?)?,
        logits: of_weights(product([model.vocabulary, model.hidden])?)?,
    };
    let layer_again = u128::from(work.is_checkpointed);
    let (half_scores, tiled_mlp, tiled_loss) = (
        u128::from(work.is_attention_fused),
        u128::from(work.has_tiled_mlp),
        u128::from(work.has_tiled_loss),
    );
    Ok(StepFlops {
        forward,
        recompute: Flops {
            // Scores are half of what attention computes, where D = Dv.
            attention: forward.attention * layer_again + forward.attention / 2 * half_scores,
            projections: forward.projections * layer_again,
            mlp: forward.mlp * (layer_again + tiled_mlp),
            logits: forward.logits * tiled_loss,
        },
        backward: Flops {
            attention: forward.attention * 2,
            projections: forward.projections * 2,
            mlp: forward.mlp * 2,
            logits: forward.logits * 2,
        },
    })
}

/// A paper's own way to count the operations of a checkpointed step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// 96 B S L h^2 (1 + S/(6h) + V/(16 L h)), of a model whose MLP is four
    /// times as wide as its stream (DeepSpeed Ulysses, arXiv:2309.14509).
    Ulysses,
    /// 16 L Hq D S^2 + 8 N S, with N parameters; without checkpointing three
    /// quarters of that (ALST, arXiv:2506.13996).
    Alst,
}

impl Rule {
    /// The operations of `sequences` sequences of `tokens` tokens, on all
    /// ranks together.
    ///
    /// # Errors
    /// Refused when a size is zero, or the count is absurd.
    pub fn of_all(self, model: &Model, sequences: u64, tokens: u64) -> Result<u128> {
        model.check()?;
        not_zero("tokens", &[("batch", sequences), ("length", tokens)])?;
        let layers = |factors: &[u64]| {
            let all = [sequences, tokens, model.layers];
            product(all.into_iter().chain(factors.iter().copied()))
        };
        let hidden = model.hidden;
        match self {
            Rule::Ulysses => Ok(layers(&[96, hidden, hidden])?
                + layers(&[16, tokens, hidden])?
                + product([6, sequences, tokens, hidden, model.vocabulary])?),
            Rule::Alst => {
                let attention = layers(&[16, model.query_heads, model.head_size, tokens])?;
                let tokens = product([8, sequences, tokens])?;
                Ok(attention + times(tokens, model.parameters()?)?)
            }
        }
    }
}

/// Tera-operations per second of each of `ranks` ranks that share `flops`.
pub fn tera_per_second(flops: u128, ranks: u64, seconds: f64) -> f64 {
    flops as f64 / (ranks as f64 * seconds) / 1e12
}
