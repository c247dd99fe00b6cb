//! Attention on one device: some heads, the whole sequence.
//!
//! This is what Ulysses leaves untouched. Whatever kernel a single device
//! would use runs here on the heads of one rank, and computes each head as it
//! would have among all heads.
//!
//! Not here: ranks, shards, and how to choose a kernel; the caller does.

mod eager;
mod sdpa;

use crate::{
    error::{Error, Refusal, Result},
    head_partition::HeadMap,
};
use tch::Tensor;

/// How attention is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// Scores, softmax and weighted sum as separate operations, with all
    /// scores in memory at once.
    Eager,
    /// torch's fused `scaled_dot_product_attention`.
    Sdpa,
}

/// Which tokens a token attends to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mask {
    /// To all tokens.
    Full,
    /// To itself and those before it.
    Causal,
}

/// Attention of `query` [B, h, S, D] to `key` and `value` [B, hk, S, D], where
/// `heads` says which KV head each query head attends to; gives [B, h, S, D].
///
/// `scale` multiplies the scores, `1/sqrt(D)` if not given. Differentiable in
/// all three tensors.
///
/// # Errors
/// When the tensors do not have the heads that `heads` speaks of, or when
/// libtorch fails.
pub fn core_attention(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    heads: &HeadMap,
    kernel: Kernel,
    mask: Mask,
    scale: Option<f64>,
) -> Result<Tensor> {
    expect_heads("query", query, heads.query_heads())?;
    expect_heads("key", key, heads.kv_heads())?;
    expect_heads("value", value, heads.kv_heads())?;
    match kernel {
        Kernel::Eager => eager::attention(query, key, value, heads, mask, scale),
        Kernel::Sdpa => sdpa::attention(query, key, value, heads, mask, scale),
    }
}

fn expect_heads(argument: &'static str, tensor: &Tensor, heads: usize) -> Result<()> {
    match tensor.size()[..] {
        [_, given, _, _] if given == heads as i64 => Ok(()),
        ref size => Err(Error::from(Refusal {
            rank: None,
            argument,
            problem: format!("has shape {size:?}"),
            remedy: format!("give [batch, {heads}, tokens, head size]"),
        })),
    }
}
