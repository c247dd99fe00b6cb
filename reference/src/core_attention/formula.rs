//! Attention as operations one can read, on any rectangle of the score matrix.
//!
//! In the order, and in the precision, of the eager path of Hugging Face's
//! transformers (`eager_attention_forward`, and those of Gemma 2 for softcap
//! and of GPT-OSS for sinks):
//!
//! 1. scores = Q K^T in the dtype of the inputs, times `scale`; then, in
//!    float32 for the half types and in the dtype of the inputs otherwise,
//! 2. softcap: x becomes `softcap * tanh(x / softcap)`;
//! 3. ALiBi: minus the slope of the head times the distance of the tokens
//!    (Press et al., arXiv:2108.12409);
//! 4. where a token may not attend, the score is minus infinity (transformers
//!    adds the smallest finite number instead);
//! 5. weights = softmax of the scores, with the sink of the head as one more
//!    score whose weight nobody gets, rounded to the dtype of the inputs;
//! 6. dropout: some weights become zero, the others grow;
//! 7. output = weights V in the dtype of the inputs.
//!
//! Where transformers would take float64 down to float32 in step 5, this does
//! not: float64 is there to be compared against.

use super::{Dropout, tiled::Place, visible::without_blind};
use crate::{error::Result, head_partition::HeadMap};
use tch::{Kind, Tensor};

/// What makes weights of scores.
pub(super) struct Formula<'a> {
    pub(super) scale: f64,
    pub(super) softcap: Option<f64>,
    /// [h], as are the sinks.
    pub(super) slopes: Option<&'a Tensor>,
    pub(super) sinks: Option<&'a Tensor>,
    pub(super) dropout: Option<Dropout>,
    /// Bool, broadcasts to [B, h, queries, keys]; everything if not given.
    pub(super) visible: Option<Tensor>,
}

/// The kind in which scores become weights.
pub(crate) fn precise(kind: Kind) -> Kind {
    match kind {
        Kind::Half | Kind::BFloat16 => Kind::Float,
        other => other,
    }
}

/// [B, h, queries, D], [B, hk, keys, D] and [B, hk, keys, Dv], which stand at
/// `place`, to [B, h, queries, Dv].
pub(super) fn attention(
    [query, key, value]: [&Tensor; 3],
    heads: &HeadMap,
    formula: &Formula,
    place: &Place,
) -> Result<Tensor> {
    let (key, value) = (expand(key, heads)?, expand(value, heads)?);
    let kind = query.f_kind()?;
    let mut scores = query
        .f_matmul(&key.f_transpose(2, 3)?)?
        .f_mul_scalar(formula.scale)?
        .f_to_kind(precise(kind))?;
    if let Some(softcap) = formula.softcap {
        let capped = scores.f_div_scalar(softcap)?.f_tanh()?;
        scores = capped.f_mul_scalar(softcap)?;
    }
    if let Some(slopes) = formula.slopes {
        let slopes = per_head(slopes, precise(kind))?;
        let distance = place
            .queries
            .f_unsqueeze(1)?
            .f_sub(&place.keys)?
            .f_abs()?
            .f_to_kind(precise(kind))?;
        scores = scores.f_sub(&slopes.f_mul(&distance)?)?;
    }
    let weights = softmax(&scores, formula)?.f_to_kind(kind)?;
    let weights = match formula.dropout {
        None => weights,
        Some(dropout) => weights
            .f_masked_fill(&dropout.dropped(place)?, 0.0)?
            .f_div_scalar(1.0 - dropout.probability)?,
    };
    Ok(weights.f_matmul(&value)?)
}

fn softmax(scores: &Tensor, formula: &Formula) -> Result<Tensor> {
    let Some(visible) = &formula.visible else {
        return with_sink(scores, formula.sinks);
    };
    let (visible, blind) = without_blind(visible)?;
    let scores = scores.f_masked_fill(&visible.f_logical_not()?, f64::NEG_INFINITY)?;
    Ok(with_sink(&scores, formula.sinks)?.f_masked_fill(&blind, 0.0)?)
}

fn with_sink(scores: &Tensor, sinks: Option<&Tensor>) -> Result<Tensor> {
    let Some(sinks) = sinks else {
        return Ok(scores.f_softmax(-1, None)?);
    };
    let mut size = scores.size();
    let keys = size[3];
    size[3] = 1;
    let sinks = per_head(sinks, scores.f_kind()?)?.f_expand(size, false)?;
    let all = Tensor::f_cat(&[scores, &sinks], -1)?;
    Ok(all.f_softmax(-1, None)?.f_narrow(-1, 0, keys)?)
}

/// [h] to [1, h, 1, 1].
fn per_head(numbers: &Tensor, kind: Kind) -> Result<Tensor> {
    Ok(numbers.f_to_kind(kind)?.f_view([1, -1, 1, 1])?)
}

/// One KV head for each query head: [B, hk, keys, D] to [B, h, keys, D].
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
