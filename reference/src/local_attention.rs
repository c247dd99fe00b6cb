//! Attention of one rank's heads, the whole sequence at hand: normalise, rotate,
//! attend.
//!
//! What belongs to heads is given for all of them and cut here to those of the
//! rank, so that the gradient of what was given lies at those heads and is
//! zero elsewhere.

use crate::{
    call::Call,
    core_attention::{Structure, core_attention},
    error::Result,
    head_norm::normalize_heads,
    head_partition::HeadPartition,
    options::Options,
    rotary::rotate,
    sequence::Sequence,
};
use std::ops::Range;
use tch::Tensor;

/// Attention of the heads of `rank`, [B, hq, S, D], [B, hkv, S, D] and
/// [B, hkv, S, Dv], to [B, hq, S, Dv].
pub(crate) fn attend(
    [mut query, mut key, value]: [Tensor; 3],
    heads: &HeadPartition,
    rank: usize,
    sequence: &Sequence,
    call: &Call<'_>,
    options: &Options,
) -> Result<Tensor> {
    let (query_heads, kv_heads) = (heads.query_range(rank), heads.kv_range(rank));
    if let Some(norm) = call.head_norm {
        let normal = |tensor: &Tensor, weight: &Tensor, heads: &Range<usize>| {
            let weight = of_heads(weight, heads)?;
            by_tokens(tensor, |tensor| {
                normalize_heads(tensor, &weight, norm.epsilon)
            })
        };
        query = normal(&query, norm.query, &query_heads)?;
        key = normal(&key, norm.key, &kv_heads)?;
    }
    if let (Some(rotary), Some(positions)) = (&options.rotary, &sequence.positions) {
        query = by_tokens(&query, |tensor| rotate(tensor, positions, rotary))?;
        key = by_tokens(&key, |tensor| rotate(tensor, positions, rotary))?;
    }
    let slice = |tensor: Option<&Tensor>| {
        tensor
            .map(|tensor| of_heads(tensor, &query_heads))
            .transpose()
    };
    let (slopes, sinks) = (slice(call.slopes)?, slice(call.sinks)?);
    let structure = Structure {
        segments: sequence.segments.clone(),
        layout: call
            .layout
            .map(|layout| layout.narrow(query_heads.clone()))
            .transpose()?,
        slopes: slopes.as_ref(),
        sinks: sinks.as_ref(),
        dropout: call
            .dropout
            .map(|dropout| dropout.of_heads(query_heads.start)),
    };
    core_attention(
        &query,
        &key,
        &value,
        &heads.head_map(rank),
        options.kernel,
        &options.score,
        &structure,
    )
}

/// The part for some heads of what belongs to all, [H, ..].
fn of_heads(tensor: &Tensor, heads: &Range<usize>) -> Result<Tensor> {
    Ok(tensor.f_narrow(0, heads.start as i64, heads.len() as i64)?)
}

/// Does to [B, h, S, D] what `change` does to [B, S, h, D].
fn by_tokens(tensor: &Tensor, change: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    Ok(change(&tensor.f_transpose(1, 2)?)?.f_transpose(1, 2)?)
}
