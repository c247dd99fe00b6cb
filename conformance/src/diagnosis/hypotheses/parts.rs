//! Mistakes that lose a part of a gradient.
//!
//! Gradients are linear in the cotangent: a part that is lost is told by leaving
//! out some query heads, or some queries.

use fixtures::AttentionCase;
use tch::{TchError, Tensor};

use super::gradients::{OF_KV, has_head_state};
use super::moved::is_split;
use super::{Hypothesis, Reach};
use crate::diagnosis::evidence::{Evidence, Sizes, elements};
use crate::diagnosis::mistake::Mistake;
use crate::diagnosis::prediction::Prediction;
use crate::diagnosis::words::{of_heads, of_ranks};
use crate::oracle::AnswerTensor::{
    KeyGradient, KeyNormGradient, QueryNormGradient, SinksGradient, SlopesGradient, ValueGradient,
};

pub(super) const HYPOTHESES: &[Hypothesis] = &[
    Hypothesis {
        mistake: Some(Mistake::ReplicasNotSummed),
        reach: Reach::Backward,
        applies: is_replicated,
        predict: replicas_not_summed,
    },
    Hypothesis {
        mistake: Some(Mistake::ReplicasAveraged),
        reach: Reach::Backward,
        applies: is_replicated,
        predict: replicas_averaged,
    },
    Hypothesis {
        mistake: Some(Mistake::GroupNotSummed),
        reach: Reach::Backward,
        applies: |case| case.query_heads > case.kv_heads,
        predict: group_not_summed,
    },
    Hypothesis {
        mistake: Some(Mistake::HeadStateOfOneRank),
        reach: Reach::Backward,
        applies: |case| has_head_state(case) && is_split(case),
        predict: head_state_of_one_rank,
    },
    Hypothesis {
        mistake: Some(Mistake::OtherRanksGradientLost),
        reach: Reach::Backward,
        applies: |case| is_split(case) && case.extras.cross.is_none(),
        predict: other_ranks_gradient_lost,
    },
];

/// Whether a KV head is attended by query heads of several ranks.
fn is_replicated(case: &AttentionCase) -> bool {
    is_split(case)
        && (case.kv_heads < case.world
            || !case.query_heads.is_multiple_of(case.world)
            || !case.kv_heads.is_multiple_of(case.world))
}

/// Gradients of K and V to which each query head contributes this many times.
pub(super) fn weighted_heads(
    evidence: &Evidence<'_>,
    sentence: &str,
    weight: impl Fn(usize) -> f64,
) -> Result<Prediction, TchError> {
    let case = evidence.case;
    let mut prediction = evidence.right(sentence);
    for (name, parts) in evidence.by_query_head()?.iter() {
        if !matches!(name, KeyGradient | ValueGradient | KeyNormGradient) {
            continue;
        }
        let parts = elements(name, parts)?;
        let sizes = Sizes::of(case, name);
        let mut sums = vec![0.0; sizes.rows() * sizes.channels];
        for (i, part) in parts.chunks(sizes.channels).enumerate() {
            let (token, head) = (i / case.query_heads, i % case.query_heads);
            let row = token * sizes.heads + case.kv_head_of(head);
            let times = weight(head);
            let sum = &mut sums[row * sizes.channels..(row + 1) * sizes.channels];
            for (sum, part) in sum.iter_mut().zip(part) {
                *sum += times * part;
            }
        }
        prediction.set(name, sums);
    }
    Ok(prediction)
}

/// The same, but of what belongs to heads everything is right.
fn weighted_heads_of_tokens(
    evidence: &Evidence<'_>,
    sentence: &str,
    weight: impl Fn(usize) -> f64,
) -> Result<Vec<Prediction>, TchError> {
    let all = weighted_heads(evidence, sentence, weight)?;
    let mut predictions = vec![all];
    if let (Some(norm), Some(first)) = (evidence.tensor(KeyNormGradient), predictions.first()) {
        let mut tokens_only = first.clone();
        tokens_only.set(KeyNormGradient, norm.right.to_vec());
        predictions.push(tokens_only);
    }
    Ok(predictions)
}

fn replicas_not_summed(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let case = evidence.case;
    let replicas: Vec<_> = (0..case.kv_heads)
        .map(|kv_head| evidence.heads_of_replicas(kv_head))
        .collect();
    let most = replicas.iter().map(Vec::len).max().unwrap_or(0);
    let shared: Vec<usize> = (0..case.kv_heads)
        .filter(|&kv_head| replicas[kv_head].len() > 1)
        .collect();
    let rank_of_head = evidence.rank_of_head();
    let mut predictions = Vec::new();
    // The n-th from the front, and the last, which is not everywhere the n-th.
    for kept in (0..most).map(Some).chain([None]) {
        let kept_of = |kv_head: usize| {
            let ranks = &replicas[kv_head];
            match kept {
                Some(nth) => ranks.get(nth.min(ranks.len() - 1)),
                None => ranks.last(),
            }
        };
        let weight = |head: usize| {
            let is_kept = kept_of(case.kv_head_of(head)).is_some_and(|kept| kept.contains(&head));
            f64::from(is_kept)
        };
        let ranks = shared
            .iter()
            .filter_map(|&kv_head| kept_of(kv_head)?.first())
            .map(|&head| rank_of_head[head]);
        let sentence = format!(
            "dk and dv of KV {}, which several ranks hold, are those of {} alone: they are not summed over ranks.",
            of_heads(shared.iter().copied()),
            of_ranks(distinct(ranks))
        );
        predictions.extend(weighted_heads_of_tokens(evidence, &sentence, weight)?);
    }
    Ok(predictions)
}

fn distinct(numbers: impl Iterator<Item = usize>) -> impl Iterator<Item = usize> {
    let set: std::collections::BTreeSet<usize> = numbers.collect();
    set.into_iter()
}

fn replicas_averaged(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let case = evidence.case;
    let counts: Vec<usize> = (0..case.kv_heads)
        .map(|kv_head| evidence.heads_of_replicas(kv_head).len())
        .collect();
    let shared = (0..case.kv_heads).filter(|&kv_head| counts[kv_head] > 1);
    let sentence = format!(
        "dk and dv of KV {}, which several ranks hold, are divided by the number of these ranks: they are averaged, not summed.",
        of_heads(shared)
    );
    let weight = |head: usize| 1.0 / counts[case.kv_head_of(head)] as f64;
    weighted_heads_of_tokens(evidence, &sentence, weight)
}

fn group_not_summed(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let case = evidence.case;
    let group = case.query_heads / case.kv_heads;
    let mut predictions = Vec::new();
    for nth in 0..group {
        let sentence = format!(
            "Of the {group} query heads that attend a KV head, the one numbered {nth} alone contributes to dk and dv."
        );
        let weight = |head: usize| f64::from(head % group == nth);
        predictions.extend(weighted_heads_of_tokens(evidence, &sentence, weight)?);
    }
    // On each rank by itself: one of those that it holds.
    let kept_of_ranks = |last: bool| -> Vec<usize> {
        (0..case.kv_heads)
            .flat_map(|kv_head| evidence.heads_of_replicas(kv_head))
            .filter_map(|heads| if last { heads.last() } else { heads.first() }.copied())
            .collect()
    };
    for (which, last) in [("first", false), ("last", true)] {
        let kept = kept_of_ranks(last);
        let sentence = format!(
            "Of the query heads of a rank that attend a KV head, the {which} alone contributes to dk and dv."
        );
        let weight = |head: usize| f64::from(kept.contains(&head));
        predictions.extend(weighted_heads_of_tokens(evidence, &sentence, weight)?);
    }
    Ok(predictions)
}

fn head_state_of_one_rank(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let rank_of_head = evidence.rank_of_head();
    let mut predictions = Vec::new();
    for rank in 0..evidence.ranks() {
        let sentence = format!(
            "Of the gradients of what belongs to heads, the part of rank {rank} alone is kept."
        );
        let of_rank = |head: usize| f64::from(rank_of_head[head] == rank);
        let mut prediction = weighted_heads(evidence, &sentence, of_rank)?;
        for tensor in &evidence.tensors {
            let channels = tensor.sizes.channels;
            match tensor.name {
                KeyNormGradient => {}
                SlopesGradient | SinksGradient | QueryNormGradient => {
                    let parts = tensor.right.iter().enumerate();
                    let kept = parts.map(|(i, x)| x * of_rank(i / channels));
                    prediction.set(tensor.name, kept.collect());
                }
                name => prediction.set(name, tensor.right.to_vec()),
            }
        }
        predictions.push(prediction);
    }
    Ok(predictions)
}

/// dk and dv of each rank's tokens, from the queries of that rank alone.
fn other_ranks_gradient_lost(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let case = evidence.case;
    let places = evidence.place_of_token();
    let sentence = "dk and dv of a rank's tokens come from the queries of that rank alone.";
    let mut prediction = evidence.right(sentence);
    for rank in 0..evidence.ranks() {
        let mut problem = evidence.problem()?;
        let own: Vec<f64> = places.iter().map(|p| f64::from(p.0 == rank)).collect();
        let own = Tensor::f_from_slice(&own)?.f_view([1, 1, -1, 1])?;
        problem.dout = problem.dout.f_mul(&own)?;
        let mut of_rank = Prediction::new("");
        evidence.solve(&problem, &mut of_rank)?;
        prediction = prediction.with(&OF_KV, |name, elements| {
            let sizes = Sizes::of(case, name);
            let Some(of_rank) = of_rank.get(name) else {
                return;
            };
            for row in 0..sizes.rows() {
                let (_, token, _) = sizes.place(row);
                if places[token].0 == rank {
                    let row = row * sizes.channels..(row + 1) * sizes.channels;
                    elements[row.clone()].copy_from_slice(&of_rank[row]);
                }
            }
        });
    }
    Ok(vec![prediction])
}
