//! What [`core_attention`](super::core_attention) refuses.

use super::{Dropout, Mask, Score, Structure};
use crate::{
    error::{Result, refuse},
    head_partition::HeadMap,
};
use std::ops::Range;
use tch::Tensor;

/// # Errors
/// A refusal of the first argument that does not fit.
pub(super) fn check(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    heads: &HeadMap,
    score: &Score,
    structure: &Structure,
) -> Result<()> {
    let query_heads = heads.query_heads() as i64;
    let [batch, _, tokens, head_size] = dimensions("query", query)?;
    let [_, _, key_tokens, _] = dimensions("key", key)?;
    let [_, _, _, value_size] = dimensions("value", value)?;
    let kv_heads = heads.kv_heads() as i64;
    expect("query", query, &[batch, query_heads, tokens, head_size])?;
    expect("key", key, &[batch, kv_heads, key_tokens, head_size])?;
    expect("value", value, &[batch, kv_heads, key_tokens, value_size])?;

    check_numbers(score, structure.dropout)?;
    if tokens != key_tokens {
        same_tokens(score, structure, tokens, key_tokens)?;
    }
    if let Some(segments) = &structure.segments {
        runs(segments, batch as usize, tokens as usize)?;
    }
    if let Some(layout) = &structure.layout {
        let (given, due) = (
            [layout.heads(), layout.blocks()],
            [
                heads.query_heads(),
                (tokens as usize).div_ceil(layout.block()),
            ],
        );
        if given != due {
            return refuse(
                "layout",
                format!("is for {} heads and {} blocks", given[0], given[1]),
                format!("give one for {} heads and {} blocks", due[0], due[1]),
            );
        }
    }
    for (argument, tensor) in [("slopes", structure.slopes), ("sinks", structure.sinks)] {
        if let Some(tensor) = tensor {
            expect(argument, tensor, &[query_heads])?;
        }
    }
    Ok(())
}

/// # Errors
/// A refusal of what is out of its range by itself.
pub(crate) fn check_numbers(score: &Score, dropout: Option<Dropout>) -> Result<()> {
    if let Some(scale) = score.scale.filter(|scale| !scale.is_finite()) {
        let problem = format!("is {scale}");
        return refuse("scale", problem, "give a finite scale, or none");
    }
    if score.window == Some(0) {
        let problem = "is 0, so that no token would see even itself";
        return refuse("window", problem, "give at least 1, or none");
    }
    if let Some(softcap) = score.softcap.filter(|&cap| !(cap.is_finite() && cap > 0.0)) {
        let problem = format!("is {softcap}");
        return refuse("softcap", problem, "give a positive number, or none");
    }
    if let Some(dropout) = dropout
        && !(0.0..1.0).contains(&dropout.probability)
    {
        let problem = format!("has the probability {}", dropout.probability);
        return refuse("dropout", problem, "give one from 0 to below 1");
    }
    Ok(())
}

/// What compares the places of a query and a key, and so needs both to be of
/// one sequence.
fn same_tokens(score: &Score, structure: &Structure, tokens: i64, key_tokens: i64) -> Result<()> {
    let asked = [
        ("mask", score.mask == Mask::Causal),
        ("window", score.window.is_some()),
        ("segments", structure.segments.is_some()),
        ("layout", structure.layout.is_some()),
        ("slopes", structure.slopes.is_some()),
    ];
    match asked.into_iter().find(|(_, asked)| *asked) {
        None => Ok(()),
        Some((argument, _)) => refuse(
            argument,
            format!(
                "compares tokens, but `query` has {tokens} of them and `key` another {key_tokens}"
            ),
            "leave it out for attention to another sequence",
        ),
    }
}

fn runs(segments: &[Vec<Range<usize>>], batch: usize, tokens: usize) -> Result<()> {
    if segments.len() != batch {
        return refuse(
            "segments",
            format!("has {} rows", segments.len()),
            format!("give one for each of the {batch} batch rows"),
        );
    }
    for (row, runs) in segments.iter().enumerate() {
        let mut end = 0;
        for run in runs {
            if run.start < end || run.end < run.start || run.end > tokens {
                return refuse(
                    "segments",
                    format!("has the run {run:?} in row {row}, after token {end} of {tokens}"),
                    "give ascending and disjoint runs of tokens that there are",
                );
            }
            end = run.end;
        }
    }
    Ok(())
}

fn dimensions(argument: &'static str, tensor: &Tensor) -> Result<[i64; 4]> {
    let size = tensor.size();
    <[i64; 4]>::try_from(size.as_slice()).or_else(|_| {
        refuse(
            argument,
            format!("has shape {size:?}"),
            "give [batch, heads, tokens, head size]",
        )
    })
}

fn expect(argument: &'static str, tensor: &Tensor, due: &[i64]) -> Result<()> {
    let size = tensor.size();
    if size == due {
        return Ok(());
    }
    let problem = format!("has shape {size:?}");
    refuse(argument, problem, format!("give {due:?}"))
}
