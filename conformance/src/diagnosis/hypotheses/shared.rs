//! Mistakes about which head is which: KV heads that query heads share, and
//! what belongs to heads.

use fixtures::AttentionCase;
use tch::{TchError, Tensor};

use super::moved::is_split;
use super::permutation::usual_orders;
use super::{Hypothesis, Reach};
use crate::diagnosis::evidence::{Evidence, Sizes, expanded};
use crate::diagnosis::mistake::Mistake;
use crate::diagnosis::prediction::Prediction;
use crate::diagnosis::words::{of_heads, order_of};
use crate::oracle::AnswerTensor;

pub(super) const HYPOTHESES: &[Hypothesis] = &[
    Hypothesis {
        mistake: Some(Mistake::SlopesOfLocalHeads),
        reach: Reach::Forward,
        applies: |case| case.extras.alibi && is_split(case),
        predict: slopes_of_local_heads,
    },
    Hypothesis {
        mistake: Some(Mistake::SinksOfLocalHeads),
        reach: Reach::Forward,
        applies: |case| case.extras.sinks && is_split(case),
        predict: sinks_of_local_heads,
    },
    Hypothesis {
        mistake: Some(Mistake::NormsOfLocalHeads),
        reach: Reach::Forward,
        applies: |case| case.extras.norms && is_split(case),
        predict: norms_of_local_heads,
    },
    Hypothesis {
        mistake: Some(Mistake::KvHeadsTiled),
        reach: Reach::Forward,
        applies: is_grouped,
        predict: kv_heads_tiled,
    },
    Hypothesis {
        mistake: Some(Mistake::KvHeadsOfOtherRank),
        reach: Reach::Forward,
        applies: |case| case.kv_heads > 1 && is_split(case),
        predict: kv_heads_of_other_rank,
    },
    Hypothesis {
        mistake: Some(Mistake::RemainderHeadsLost),
        reach: Reach::Forward,
        applies: |case| is_split(case) && !case.query_heads.is_multiple_of(case.world),
        predict: remainder_heads_lost,
    },
];

fn is_grouped(case: &AttentionCase) -> bool {
    case.kv_heads > 1 && case.query_heads > case.kv_heads
}

/// For each query head its number on its rank.
pub(super) fn local_heads(evidence: &Evidence<'_>) -> Vec<usize> {
    let ranges = evidence.heads_of_ranks(evidence.case.query_heads);
    ranges
        .into_iter()
        .flat_map(|heads| 0..heads.len())
        .collect()
}

/// For each query head the number on its rank of the KV head that it attends.
fn local_kv_heads(evidence: &Evidence<'_>) -> Vec<usize> {
    let case = evidence.case;
    evidence
        .heads_of_ranks(case.query_heads)
        .into_iter()
        .flat_map(|heads| {
            let first = case.kv_head_of(heads.start);
            heads.map(move |head| case.kv_head_of(head) - first)
        })
        .collect()
}

/// Of what belongs to heads, which stand along dimension `axis`, those of these
/// heads.
fn picked(tensor: &Option<Tensor>, axis: i64, heads: &[usize]) -> Result<Option<Tensor>, TchError> {
    let heads: Vec<i64> = heads.iter().map(|&head| head as i64).collect();
    let heads = Tensor::f_from_slice(&heads)?;
    tensor
        .as_ref()
        .map(|tensor| tensor.f_index_select(axis, &heads))
        .transpose()
}

/// Each head's part goes to the place that the head has been given.
fn scattered(elements: &mut Vec<f64>, heads: usize, places: &[usize]) {
    let channels = elements.len() / places.len().max(1);
    let mut sums = vec![0.0; heads * channels];
    for (part, &place) in elements.chunks(channels.max(1)).zip(places) {
        for (sum, part) in sums[place * channels..].iter_mut().zip(part) {
            *sum += part;
        }
    }
    *elements = sums;
}

fn slopes_of_local_heads(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let (local, heads) = (local_heads(evidence), evidence.case.query_heads);
    let mut problem = evidence.problem()?;
    problem.slopes = picked(&problem.slopes, 1, &local)?;
    let sentence = "Each rank uses the slopes of the first heads of all.";
    let prediction = evidence.solved(sentence, &problem)?;
    Ok(vec![prediction.with(
        &[AnswerTensor::SlopesGradient],
        |_, d| {
            scattered(d, heads, &local);
        },
    )])
}

fn sinks_of_local_heads(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let (local, heads) = (local_heads(evidence), evidence.case.query_heads);
    let mut problem = evidence.problem()?;
    problem.sinks = picked(&problem.sinks, 1, &local)?;
    let sentence = "Each rank uses the sinks of the first heads of all.";
    let prediction = evidence.solved(sentence, &problem)?;
    Ok(vec![prediction.with(
        &[AnswerTensor::SinksGradient],
        |_, d| {
            scattered(d, heads, &local);
        },
    )])
}

/// Both norms, the queries' alone, and the keys' alone.
fn norms_of_local_heads(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let case = evidence.case;
    let (local, local_kv) = (local_heads(evidence), local_kv_heads(evidence));
    let own: Vec<usize> = (0..case.query_heads).collect();
    let own_kv: Vec<usize> = own.iter().map(|&head| case.kv_head_of(head)).collect();
    let right = evidence.problem()?;
    let ways = [
        ("the norm weights", &local, &local_kv),
        ("Q's norm weights", &local, &own_kv),
        ("K's norm weights", &own, &local_kv),
    ];
    let mut predictions = Vec::new();
    for (which, of_queries, of_keys) in ways {
        let mut problem = expanded(right.shallow_clone())?;
        problem.query_norm = picked(&right.query_norm, 0, of_queries)?;
        problem.key_norm = picked(&right.key_norm, 0, of_keys)?;
        let sentence = format!("Each rank uses {which} of the first heads of all.");
        let prediction = summed_groups(evidence, evidence.solved(sentence, &problem)?);
        let names = [
            AnswerTensor::QueryNormGradient,
            AnswerTensor::KeyNormGradient,
        ];
        predictions.push(prediction.with(&names, |name, d| match name {
            AnswerTensor::QueryNormGradient => scattered(d, case.query_heads, of_queries),
            _ => scattered(d, case.kv_heads, of_keys),
        }));
    }
    Ok(predictions)
}

/// dk and dv of query heads summed to those of the KV heads that they attend.
fn summed_groups(evidence: &Evidence<'_>, prediction: Prediction) -> Prediction {
    let of_kv = [AnswerTensor::KeyGradient, AnswerTensor::ValueGradient];
    prediction.with(&of_kv, |name, gradient| {
        let case = evidence.case;
        let sizes = Sizes::of(case, name);
        let mut sums = vec![0.0; sizes.rows() * sizes.channels];
        for (i, part) in gradient.chunks(sizes.channels).enumerate() {
            let (token, head) = (i / case.query_heads, i % case.query_heads);
            let row = token * sizes.heads + case.kv_head_of(head);
            let sum = &mut sums[row * sizes.channels..(row + 1) * sizes.channels];
            sum.iter_mut()
                .zip(part)
                .for_each(|(sum, part)| *sum += part);
        }
        *gradient = sums;
    })
}

/// Query heads attend these KV heads.
fn attending(
    evidence: &Evidence<'_>,
    kv_of_query: Vec<usize>,
    why: &str,
) -> Result<Option<Prediction>, TchError> {
    let case = evidence.case;
    let other: Vec<usize> = (0..case.query_heads)
        .filter(|&head| kv_of_query[head] != case.kv_head_of(head))
        .collect();
    if other.is_empty() {
        return Ok(None);
    }
    let due: Vec<usize> = (0..case.query_heads).map(|h| case.kv_head_of(h)).collect();
    let sentence = format!(
        "Query {} attend another KV head: {}, where {} is due: {why}.",
        of_heads(other),
        order_of(&kv_of_query),
        order_of(&due)
    );
    let mut problem = evidence.problem()?;
    problem.kv_of_query = kv_of_query.into_iter().map(|head| head as i64).collect();
    evidence.solved(sentence, &problem).map(Some)
}

fn kv_heads_tiled(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let case = evidence.case;
    let why = "KV heads are repeated as 0 1 0 1, not as 0 0 1 1";
    let tiled = (0..case.query_heads)
        .map(|head| head % case.kv_heads)
        .collect();
    // On each rank by itself.
    let local = evidence
        .heads_of_ranks(case.query_heads)
        .into_iter()
        .flat_map(|heads| {
            let first = case.kv_head_of(heads.start);
            let count = case.kv_head_of(heads.end.saturating_sub(1).max(heads.start)) + 1 - first;
            (0..heads.len()).map(move |at| first + at % count)
        })
        .collect();
    let predictions = [
        attending(evidence, tiled, why)?,
        attending(evidence, local, why)?,
    ];
    Ok(predictions.into_iter().flatten().collect())
}

fn kv_heads_of_other_rank(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let case = evidence.case;
    let rank_of_head = evidence.rank_of_head();
    let why = "ranks get the KV heads that belong to another rank";
    let mut maps: Vec<Vec<usize>> = Vec::new();
    if case.kv_heads < case.world {
        let by_remainder = |head: usize| rank_of_head[head] % case.kv_heads;
        maps.push((0..case.query_heads).map(by_remainder).collect());
    }
    // The first KV head of another rank in place of the own.
    let ranges = evidence.heads_of_ranks(case.query_heads);
    for order in usual_orders(evidence.ranks()) {
        let of_head = |head: usize| {
            let (own, other) = (
                &ranges[rank_of_head[head]],
                &ranges[order[rank_of_head[head]]],
            );
            let first = case.kv_head_of(other.start.min(case.query_heads - 1));
            let at = case.kv_head_of(head) - case.kv_head_of(own.start);
            (first + at).min(case.kv_heads - 1)
        };
        maps.push((0..case.query_heads).map(of_head).collect());
    }
    let mut predictions = Vec::new();
    for map in maps {
        predictions.extend(attending(evidence, map, why)?);
    }
    Ok(predictions)
}

/// The last heads are nobody's: no output, and no gradient.
fn remainder_heads_lost(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let case = evidence.case;
    let kept = case.query_heads - case.query_heads % case.world;
    let is_kept = |head: usize| f64::from(head < kept);
    let sentence = format!(
        "Query {} of {} on {} ranks are lost.",
        of_heads(kept..case.query_heads),
        case.query_heads,
        case.world
    );
    let mut prediction = super::parts::weighted_heads(evidence, &sentence, is_kept)?;
    for name in [
        AnswerTensor::Out,
        AnswerTensor::QueryGradient,
        AnswerTensor::SlopesGradient,
        AnswerTensor::SinksGradient,
        AnswerTensor::QueryNormGradient,
    ] {
        if let Some(tensor) = evidence.tensor(name) {
            let sizes = tensor.sizes;
            let weight = |i: usize| is_kept(i / sizes.channels % sizes.heads);
            let elements = tensor.right.iter().enumerate();
            prediction.set(name, elements.map(|(i, x)| x * weight(i)).collect());
        }
    }
    Ok(vec![prediction])
}
