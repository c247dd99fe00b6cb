//! Mistakes that put tokens and heads in another place.
//!
//! Attention between two exchanges is `out = O f(Q q, K k, V v)`, where the
//! capitals are permutations, and so is its derivative: `dq = Q^T df(O^T dout)`.

use fixtures::AttentionCase;
use tch::{TchError, Tensor};

use super::layout::with_positions;
use super::permutation::{Permutation, heads_in, tokens_in, usual_orders};
use super::{Hypothesis, Reach};
use crate::diagnosis::evidence::{Evidence, Sizes, elements};
use crate::diagnosis::mistake::Mistake;
use crate::diagnosis::prediction::Prediction;
use crate::diagnosis::screening::{Places, is_plausible};
use crate::diagnosis::words::{of_ranks, order_of};
use crate::oracle::{AnswerTensor, Problem};

pub(super) const HYPOTHESES: &[Hypothesis] = &[
    Hypothesis {
        mistake: Some(Mistake::OutputHeadsInterleaved),
        reach: Reach::Forward,
        applies: is_split,
        predict: output_heads_interleaved,
    },
    Hypothesis {
        mistake: Some(Mistake::OutputToWrongRank),
        reach: Reach::Forward,
        applies: is_split,
        predict: output_to_wrong_rank,
    },
    Hypothesis {
        mistake: Some(Mistake::OutputHeadsReordered),
        reach: Reach::Forward,
        applies: is_split,
        predict: output_heads_reordered,
    },
    Hypothesis {
        mistake: Some(Mistake::RanksReordered),
        reach: Reach::Forward,
        applies: |case| is_split(case) && case.extras.cross.is_none(),
        predict: ranks_reordered,
    },
    Hypothesis {
        mistake: Some(Mistake::KeysReordered),
        reach: Reach::Forward,
        applies: |case| is_split(case) && case.extras.cross.is_none(),
        predict: keys_reordered,
    },
];

/// Whether several ranks share the work.
pub(super) fn is_split(case: &AttentionCase) -> bool {
    case.world > 1 && !case.extras.eval
}

/// Where the rows of q, k, v and out are taken from.
#[derive(Clone, Default)]
pub(super) struct Moves {
    pub(super) q: Option<Permutation>,
    pub(super) k: Option<Permutation>,
    pub(super) v: Option<Permutation>,
    pub(super) out: Option<Permutation>,
}

impl Moves {
    /// What attention answers with rows so moved.
    pub(super) fn predict(
        &self,
        evidence: &Evidence<'_>,
        mut problem: Problem,
        sentence: &str,
    ) -> Result<Prediction, TchError> {
        let moved = |tensor: &Tensor, permutation: &Option<Permutation>| match permutation {
            Some(permutation) => permutation.of_tensor(tensor),
            None => Ok(tensor.shallow_clone()),
        };
        let back = |permutation: &Option<Permutation>| {
            let inverse = permutation.as_ref();
            inverse.map(Permutation::inverse)
        };
        problem.q = moved(&problem.q, &self.q)?;
        problem.k = moved(&problem.k, &self.k)?;
        problem.v = moved(&problem.v, &self.v)?;
        problem.dout = moved(&problem.dout, &back(&self.out))?;
        let mut prediction = Prediction::new(sentence);
        let out_place = back(&self.out);
        let places = Places {
            out: &|row| out_place.as_ref().map_or(row, |moved| moved.from(row)),
            dq: &|row| self.q.as_ref().map_or(row, |moved| moved.from(row)),
        };
        if !is_plausible(evidence, &problem, &places)? {
            return Ok(prediction);
        }
        for (name, tensor) in problem.solve()?.iter() {
            let permutation = match name {
                AnswerTensor::Out => self.out.clone(),
                AnswerTensor::QueryGradient => back(&self.q),
                AnswerTensor::KeyGradient => back(&self.k),
                AnswerTensor::ValueGradient => back(&self.v),
                _ => None,
            };
            let answered = elements(name, tensor)?;
            let answered = match permutation {
                Some(permutation) => permutation.of_elements(&answered),
                None => answered,
            };
            prediction.set(name, answered);
        }
        Ok(prediction)
    }
}

/// Out alone in other places; gradients of what backward makes of that, if the
/// output is so.
fn out_moved(
    evidence: &Evidence<'_>,
    variants: Vec<(String, Permutation)>,
) -> Result<Vec<Prediction>, TchError> {
    let Some(out) = evidence.tensor(AnswerTensor::Out) else {
        return Ok(Vec::new());
    };
    let mut predictions = Vec::new();
    for (sentence, permutation) in variants {
        let mut of_out = Prediction::new(sentence.clone());
        of_out.set(AnswerTensor::Out, permutation.of_elements(out.right));
        let is_worth_solving = of_out.agreement(evidence).is_whole;
        predictions.push(match is_worth_solving {
            true => {
                let moves = Moves {
                    out: Some(permutation),
                    ..Moves::default()
                };
                moves.predict(evidence, evidence.problem()?, &sentence)?
            }
            false => of_out,
        });
    }
    Ok(predictions)
}

fn output_to_wrong_rank(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let sizes = Sizes::of(evidence.case, AnswerTensor::Out);
    let ranks = evidence.ranks();
    let orders = usual_orders(ranks).into_iter();
    let variants = orders.filter_map(|order| {
        let permutation = Permutation::of_tokens(sizes, &tokens_in(evidence, &order))?;
        let sentence = format!(
            "{} get the output of the tokens of {}: the second exchange sends blocks to the wrong rank.",
            of_ranks(0..ranks),
            order_of(&order)
        );
        Some((sentence, permutation))
    });
    out_moved(evidence, variants.collect())
}

fn output_heads_reordered(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let sizes = Sizes::of(evidence.case, AnswerTensor::Out);
    let ranks = evidence.ranks();
    let orders = usual_orders(ranks).into_iter();
    let variants = orders.filter_map(|order| {
        let heads = heads_in(evidence, sizes.heads, &order);
        let permutation = Permutation::of_heads(sizes, &heads)?;
        let sentence = format!(
            "The second exchange puts the heads of the ranks together in the order {}.",
            order_of(&order)
        );
        Some((sentence, permutation))
    });
    out_moved(evidence, variants.collect())
}

fn output_heads_interleaved(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let sizes = Sizes::of(evidence.case, AnswerTensor::Out);
    let (heads, ranks) = (sizes.heads, evidence.ranks());
    if !heads.is_multiple_of(ranks) {
        return Ok(Vec::new());
    }
    let each = heads / ranks;
    // Place h holds the head of the h mod P-th rank, and the other way round.
    let orders: [Vec<usize>; 2] = [
        (0..heads).map(|h| h % ranks * each + h / ranks).collect(),
        (0..heads).map(|h| h % each * ranks + h / each).collect(),
    ];
    let variants = orders.into_iter().filter_map(|order| {
        let permutation = Permutation::of_heads(sizes, &order)?;
        let sentence = format!(
            "The output's heads stand in the order {}: the second exchange interleaves the ranks' heads.",
            order_of(&order)
        );
        Some((sentence, permutation))
    });
    out_moved(evidence, variants.collect())
}

/// Permutations of q and out, and of k and v.
pub(super) fn both(
    evidence: &Evidence<'_>,
    of: impl Fn(Sizes) -> Option<Permutation>,
) -> Option<(Permutation, Permutation)> {
    let sizes = |name| Sizes::of(evidence.case, name);
    Some((
        of(sizes(AnswerTensor::QueryGradient))?,
        of(sizes(AnswerTensor::KeyGradient))?,
    ))
}

/// All tokens attend in this order; with the way back, and without it.
pub(super) fn reordered(
    evidence: &Evidence<'_>,
    order: &[usize],
    sentence: &str,
) -> Result<Vec<Prediction>, TchError> {
    let Some((q, kv)) = both(evidence, |sizes| Permutation::of_tokens(sizes, order)) else {
        return Ok(Vec::new());
    };
    let mut predictions = Vec::new();
    for problem in with_positions(evidence, order)? {
        for out in [Some(q.inverse()), None] {
            let moves = Moves {
                q: Some(q.clone()),
                k: Some(kv.clone()),
                v: Some(kv.clone()),
                out,
            };
            predictions.push(moves.predict(evidence, problem.shallow_clone(), sentence)?);
        }
    }
    Ok(predictions)
}

fn ranks_reordered(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let mut predictions = Vec::new();
    for order in usual_orders(evidence.ranks()) {
        let sentence = format!(
            "The ranks' tokens are put together in the order {}.",
            order_of(&order)
        );
        predictions.extend(reordered(
            evidence,
            &tokens_in(evidence, &order),
            &sentence,
        )?);
    }
    Ok(predictions)
}

fn keys_reordered(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let mut predictions = Vec::new();
    for order in usual_orders(evidence.ranks()) {
        let tokens = tokens_in(evidence, &order);
        let Some((_, kv)) = both(evidence, |sizes| Permutation::of_tokens(sizes, &tokens)) else {
            continue;
        };
        let ways: [(&str, bool, bool); 3] = [
            ("K has", true, false),
            ("V has", false, true),
            ("K and V have", true, true),
        ];
        for (who, moves_k, moves_v) in ways {
            let moves = Moves {
                k: moves_k.then(|| kv.clone()),
                v: moves_v.then(|| kv.clone()),
                ..Moves::default()
            };
            let sentence = format!(
                "{who} the ranks' tokens in the order {}, and Q has them in their own.",
                order_of(&order)
            );
            predictions.push(moves.predict(evidence, evidence.problem()?, &sentence)?);
        }
    }
    Ok(predictions)
}
