//! Mistakes where the number of tokens is no multiple of that of the ranks.

use fixtures::{Mask, Structure};
use tch::{TchError, Tensor};

use super::masked::visible;
use super::{Hypothesis, Reach};
use crate::diagnosis::evidence::Evidence;
use crate::diagnosis::mistake::Mistake;
use crate::diagnosis::prediction::Prediction;
use crate::diagnosis::words::order_of;
use crate::oracle::AnswerTensor;

pub(super) const HYPOTHESES: &[Hypothesis] = &[
    Hypothesis {
        mistake: Some(Mistake::RemainderTokensLost),
        reach: Reach::Forward,
        applies: |case| !case.sequence.is_multiple_of(case.world) && !case.extras.eval,
        predict: remainder_tokens_lost,
    },
    Hypothesis {
        mistake: Some(Mistake::FillTokensSeen),
        reach: Reach::Forward,
        applies: |case| {
            let extras = &case.extras;
            let is_even = case.sequence.is_multiple_of(case.world);
            !is_even && !extras.eval && !extras.alibi && extras.cross.is_none()
        },
        predict: fill_tokens_seen,
    },
];

fn remainder_tokens_lost(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let case = evidence.case;
    let (tokens, ranks) = (case.sequence, case.world);
    let structure = Structure::of(case);
    let places = evidence.place_of_token();
    let at_the_end: Vec<bool> = (0..tokens).map(|t| t >= tokens - tokens % ranks).collect();
    let of_ranks: Vec<bool> = (0..tokens).map(|t| places[t].1 >= tokens / ranks).collect();
    let mut predictions = Vec::new();
    for is_lost in [at_the_end, of_ranks] {
        let lost: Vec<usize> = (0..tokens).filter(|&t| is_lost[t]).collect();
        let sentence = format!(
            "Of {tokens} tokens on {ranks} ranks {} lost: {}.",
            if lost.len() == 1 {
                "one is"
            } else {
                "some are"
            },
            order_of(&lost)
        );
        let mut problem = evidence.problem()?;
        let is_key = case.extras.cross.is_none();
        let sees = |(batch, head): (usize, usize), query: usize, key: usize| {
            !(is_key && is_lost[key]) && structure.sees(batch, head, query, key)
        };
        problem.visible = Some(visible(case, sees)?);
        let kept: Vec<f64> = is_lost.iter().map(|&is| f64::from(!is)).collect();
        let kept = Tensor::f_from_slice(&kept)?.f_view([1, 1, -1, 1])?;
        problem.dout = problem.dout.f_mul(&kept)?;
        let row = case.query_heads * case.value_size();
        let prediction = evidence.solved(sentence, &problem)?;
        predictions.push(prediction.with(&[AnswerTensor::Out], |_, out| {
            for (i, row) in out.chunks_mut(row).enumerate() {
                if is_lost[i % tokens] {
                    row.fill(0.0);
                }
            }
        }));
    }
    Ok(predictions)
}

/// Tokens of zeros fill every shard up to the longest.
fn fill_tokens_seen(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let case = evidence.case;
    let tokens = case.sequence;
    let structure = Structure::of(case);
    let longest = tokens.div_ceil(case.world);
    let mut full = case.clone();
    full.mask = Mask::Full;
    let without_mask = Structure::of(&full);
    // Each fill token stands behind the last token of a rank.
    let ends: Vec<usize> = evidence
        .shards
        .iter()
        .flat_map(|shard| {
            let end = shard.tokens().iter().max().map_or(0, |&last| last + 1);
            vec![end; longest - shard.len()]
        })
        .collect();
    let count = ends.len();
    let mut predictions = Vec::new();
    for (mask, at) in [(Mask::Full, vec![tokens; count]), (case.mask, ends)] {
        let sees = |(batch, head): (usize, usize), query: usize, key: usize| match key < tokens {
            true => structure.sees(batch, head, query, key),
            false => {
                (mask == Mask::Full || at[key - tokens] <= query)
                    && without_mask.sees(batch, head, query, query)
            }
        };
        let mut wider = case.clone();
        wider.extras.cross = Some(tokens + count);
        let mut problem = evidence.problem()?;
        problem.visible = Some(visible(&wider, sees)?);
        let filled = |tensor: &Tensor| -> Result<Tensor, TchError> {
            let mut shape = tensor.size();
            shape[2] = count as i64;
            let zeros = Tensor::f_zeros(&shape, (tensor.kind(), tensor.device()))?;
            Tensor::f_cat(&[tensor, &zeros], 2)
        };
        problem.k = filled(&problem.k)?;
        problem.v = filled(&problem.v)?;
        if let Some(angles) = &problem.key_angles {
            problem.key_angles = Some(filled(angles)?);
        }
        let s = if count == 1 { "" } else { "s" };
        let sentence =
            format!("{count} token{s} of zeros that fill the shards up are seen as keys.");
        let prediction = evidence.solved(sentence, &problem)?;
        let of_keys = [AnswerTensor::KeyGradient, AnswerTensor::ValueGradient];
        predictions.push(prediction.with(&of_keys, |name, gradient| {
            let row = case.kv_heads
                * match name {
                    AnswerTensor::ValueGradient => case.value_size(),
                    _ => case.head_size,
                };
            let rows = std::mem::take(gradient);
            let kept = rows
                .chunks(row)
                .enumerate()
                .filter(|(i, _)| i % (tokens + count) < tokens);
            gradient.extend(kept.flat_map(|(_, row)| row));
        }));
    }
    Ok(predictions)
}
