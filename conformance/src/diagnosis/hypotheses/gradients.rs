//! Mistakes that leave the output right: factors of gradients, and gradients in
//! another place.

use fixtures::AttentionCase;
use tch::TchError;

use super::layout::transposed_memory;
use super::moved::is_split;
use super::permutation::{Permutation, heads_in, tokens_in, usual_orders};
use super::{Hypothesis, Reach};
use crate::diagnosis::evidence::{Evidence, Sizes};
use crate::diagnosis::mistake::Mistake;
use crate::diagnosis::prediction::Prediction;
use crate::diagnosis::words::{listed, of_ranks, order_of};
use crate::oracle::AnswerTensor::{
    self, KeyGradient, KeyNormGradient, Out, QueryGradient, QueryNormGradient, SinksGradient,
    SlopesGradient, ValueGradient,
};

pub(super) const OF_KV: [AnswerTensor; 2] = [KeyGradient, ValueGradient];
const OF_INPUTS: [AnswerTensor; 3] = [QueryGradient, KeyGradient, ValueGradient];
const OF_HEADS: [AnswerTensor; 4] = [
    SlopesGradient,
    SinksGradient,
    QueryNormGradient,
    KeyNormGradient,
];

pub(super) const HYPOTHESES: &[Hypothesis] = &[
    Hypothesis {
        mistake: Some(Mistake::GradientZero),
        reach: Reach::Backward,
        applies: |_| true,
        predict: gradient_zero,
    },
    Hypothesis {
        mistake: Some(Mistake::HeadStateAveraged),
        reach: Reach::Backward,
        applies: |case| has_head_state(case) && is_split(case),
        predict: |evidence| {
            let ranks = evidence.ranks() as f64;
            let sentence = format!(
                "The gradients of what belongs to heads are divided by {ranks}, the number of ranks."
            );
            Ok(vec![scaled(evidence, sentence, &OF_HEADS, 1.0 / ranks)])
        },
    },
    Hypothesis {
        mistake: Some(Mistake::GradientsOverRanks),
        reach: Reach::Backward,
        applies: is_split,
        predict: |evidence| {
            let ranks = evidence.ranks() as f64;
            let sentence = format!("dq, dk and dv are divided by {ranks}, the number of ranks.");
            Ok(with_and_without_heads(evidence, &sentence, 1.0 / ranks))
        },
    },
    Hypothesis {
        mistake: Some(Mistake::GradientsTimesRanks),
        reach: Reach::Backward,
        applies: is_split,
        predict: |evidence| {
            let ranks = evidence.ranks() as f64;
            let sentence = format!("dq, dk and dv are multiplied by {ranks}, the number of ranks.");
            Ok(with_and_without_heads(evidence, &sentence, ranks))
        },
    },
    Hypothesis {
        mistake: Some(Mistake::KvGradientsOverRanks),
        reach: Reach::Backward,
        applies: is_split,
        predict: |evidence| {
            let ranks = evidence.ranks() as f64;
            let sentence =
                format!("dk and dv are divided by {ranks}, the number of ranks, and dq is not.");
            Ok(vec![scaled(evidence, sentence, &OF_KV, 1.0 / ranks)])
        },
    },
    Hypothesis {
        mistake: Some(Mistake::KeyAndValueGradientSwapped),
        reach: Reach::Backward,
        applies: |case| case.value_size() == case.head_size,
        predict: key_and_value_gradient_swapped,
    },
    Hypothesis {
        mistake: Some(Mistake::BackwardToWrongRank),
        reach: Reach::Backward,
        applies: is_split,
        predict: backward_to_wrong_rank,
    },
    Hypothesis {
        mistake: Some(Mistake::CotangentStridesIgnored),
        reach: Reach::Backward,
        applies: |_| true,
        predict: cotangent_strides_ignored,
    },
];

pub(super) fn has_head_state(case: &AttentionCase) -> bool {
    OF_HEADS.iter().any(|name| name.like().is_present(case))
}

/// These tensors times a factor, and all others right.
fn scaled(
    evidence: &Evidence<'_>,
    sentence: impl Into<String>,
    names: &[AnswerTensor],
    factor: f64,
) -> Prediction {
    let right = evidence.right(sentence);
    right.with(names, |_, elements| {
        elements.iter_mut().for_each(|x| *x *= factor);
    })
}

/// The gradients of all inputs times a factor; and those of what belongs to
/// heads too.
fn with_and_without_heads(evidence: &Evidence<'_>, sentence: &str, factor: f64) -> Vec<Prediction> {
    let all = [&OF_INPUTS[..], &OF_HEADS[..]].concat();
    let mut predictions = vec![scaled(evidence, sentence, &all, factor)];
    if has_head_state(evidence.case) {
        predictions.push(scaled(evidence, sentence, &OF_INPUTS, factor));
    }
    predictions
}

fn gradient_zero(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let zero: Vec<AnswerTensor> = evidence
        .tensors
        .iter()
        .filter(|tensor| tensor.name != Out && tensor.answer.iter().all(|&x| x == 0.0))
        .filter(|tensor| tensor.is_wrong())
        .map(|tensor| tensor.name)
        .collect();
    if zero.is_empty() {
        return Ok(Vec::new());
    }
    let names: Vec<String> = zero.iter().map(|name| name.name().to_owned()).collect();
    let is = if names.len() == 1 { "is" } else { "are" };
    let sentence = format!("{} {is} zero throughout.", listed(&names));
    Ok(vec![scaled(evidence, sentence, &zero, 0.0)])
}

fn key_and_value_gradient_swapped(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let mut prediction = evidence.right("dk stands where dv is due, and dv where dk is.");
    if let (Some(dk), Some(dv)) = (evidence.tensor(KeyGradient), evidence.tensor(ValueGradient)) {
        prediction.set(KeyGradient, dv.right.to_vec());
        prediction.set(ValueGradient, dk.right.to_vec());
    }
    Ok(vec![prediction])
}

/// Gradients that stand at another rank's tokens; and cotangents that do.
fn backward_to_wrong_rank(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let case = evidence.case;
    let ranks = evidence.ranks();
    let mut predictions = Vec::new();
    for order in usual_orders(ranks) {
        let tokens = tokens_in(evidence, &order);
        let sentence = format!(
            "In backward, {} get the gradients of {}.",
            of_ranks(0..ranks),
            order_of(&order)
        );
        let moved = |name: AnswerTensor, elements: &mut Vec<f64>| {
            if let Some(permutation) = Permutation::of_tokens(Sizes::of(case, name), &tokens) {
                *elements = permutation.of_elements(elements);
            }
        };
        let answered = evidence.right(sentence.clone());
        predictions.push(answered.with(&OF_INPUTS, moved));
        predictions.push(evidence.right(sentence).with(&OF_KV, moved));
        let sentence = format!(
            "In backward, the ranks' heads are put together in the order {}.",
            order_of(&order)
        );
        let moved = |name: AnswerTensor, elements: &mut Vec<f64>| {
            let sizes = Sizes::of(case, name);
            let heads = heads_in(evidence, sizes.heads, &order);
            if let Some(permutation) = Permutation::of_heads(sizes, &heads) {
                *elements = permutation.of_elements(elements);
            }
        };
        predictions.push(evidence.right(sentence).with(&OF_INPUTS, moved));
    }
    for order in usual_orders(ranks) {
        let tokens = tokens_in(evidence, &order);
        let sizes = Sizes::of(case, Out);
        let heads = heads_in(evidence, sizes.heads, &order);
        let by = [
            Permutation::of_tokens(sizes, &tokens),
            Permutation::of_heads(sizes, &heads),
        ];
        let told = ["tokens", "heads"];
        for (permutation, what) in by.into_iter().zip(told) {
            let sentence = format!(
                "Backward puts the ranks' {what} of the cotangent together in the order {}.",
                order_of(&order)
            );
            predictions.extend(of_cotangent(evidence, &sentence, permutation)?);
        }
    }
    Ok(predictions)
}

/// The right output, and gradients of a cotangent whose rows stand elsewhere.
fn of_cotangent(
    evidence: &Evidence<'_>,
    sentence: &str,
    permutation: Option<Permutation>,
) -> Result<Option<Prediction>, TchError> {
    let Some(permutation) = permutation else {
        return Ok(None);
    };
    let mut problem = evidence.problem()?;
    problem.dout = permutation.of_tensor(&problem.dout)?;
    evidence.solved(sentence, &problem).map(Some)
}

fn cotangent_strides_ignored(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let sentence = "The cotangent, which lies in memory as [batch, heads, tokens], is read as [batch, tokens, heads].";
    let sizes = Sizes::of(evidence.case, Out);
    let permutation = transposed_memory(evidence, sizes);
    Ok(of_cotangent(evidence, sentence, permutation)?
        .into_iter()
        .collect())
}
