//! Attention as three operations one can read.
//!
//! In the order, and in the precision, of the eager path of Hugging Face's
//! transformers (`eager_attention_forward`):
//!
//! 1. scores = Q K^T in the dtype of the inputs, times `scale`;
//! 2. where a token may not attend, the score is minus infinity (transformers
//!    adds the smallest finite number instead; the weight is zero either way,
//!    since a token always attends to itself);
//! 3. weights = softmax of the scores, in float32 for the half types and in
//!    the dtype of the inputs otherwise, rounded to the dtype of the inputs;
//! 4. output = weights V in the dtype of the inputs.
//!
//! Where transformers would take float64 down to float32 in step 3, this does
//! not: float64 is there to be compared against.

use super::Mask;
use crate::{error::Result, head_partition::HeadMap};
use tch::{Kind, Tensor};

pub(super) fn attention(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    heads: &HeadMap,
    mask: Mask,
    scale: Option<f64>,
) -> Result<Tensor> {
    let (key, value) = (expand(key, heads)?, expand(value, heads)?);
    let head_size = query.size().last().copied().unwrap_or(1);
    let scale = scale.unwrap_or_else(|| (head_size as f64).sqrt().recip());
    let kind = query.f_kind()?;

    let mut scores = query
        .f_matmul(&key.f_transpose(2, 3)?)?
        .f_mul_scalar(scale)?;
    if mask == Mask::Causal {
        let tokens = &query.size()[2..3];
        let later = Tensor::f_ones([tokens[0], tokens[0]], (Kind::Bool, query.device()))?;
        scores = scores.f_masked_fill(&later.f_triu(1)?, f64::NEG_INFINITY)?;
    }
    let precise = match kind {
        Kind::Half | Kind::BFloat16 => Kind::Float,
        other => other,
    };
    let weights = scores.f_softmax(-1, precise)?.f_to_kind(kind)?;
    Ok(weights.f_matmul(&value)?)
}

/// One KV head for each query head: [B, hk, S, D] to [B, h, S, D].
fn expand(kv: &Tensor, heads: &HeadMap) -> Result<Tensor> {
    if heads.uniform_group() == Some(1) {
        return Ok(kv.shallow_clone());
    }
    let map: Vec<i64> = heads
        .kv_of_query()
        .iter()
        .map(|&head| head as i64)
        .collect();
    let map = Tensor::f_from_slice(&map)?.f_to_device(kv.device())?;
    Ok(kv.f_index_select(1, &map)?)
}
