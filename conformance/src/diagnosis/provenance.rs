//! Where rows of the output come from that stand in the wrong place.

use std::collections::{BTreeMap, BTreeSet};

use super::Diagnosis;
use super::evidence::{Evidence, Measured, Sizes};
use super::mistake::Mistake;
use super::words::order_of;
use crate::oracle::AnswerTensor;

/// How many wrong rows are looked for.
const SAMPLE: usize = 48;

/// How near a row is to the one that it is said to be, relative to its size.
const NEAR: f64 = 0.1;

/// By how much more two rows are off that are alike.
const ALIKE: f64 = 1e-6;

/// Of the rows that are looked for, those that must be found elsewhere.
const MOST: f64 = 0.8;

/// A place: batch, token and head.
type Place = (usize, usize, usize);

/// Where the rows of the first wrong tensor come from, if they are right rows
/// of another place.
pub(super) fn recognise(evidence: &Evidence<'_>, contrast: &str) -> Option<Diagnosis> {
    let tensor = evidence
        .tensors
        .iter()
        .find(|tensor| !tensor.name.is_head_state() && tensor.is_wrong())?;
    let wrong: Vec<usize> = (0..tensor.sizes.rows())
        .filter(|&row| tensor.row(row).any(|i| tensor.is_off(i)))
        .collect();
    let step = wrong.len().div_ceil(SAMPLE).max(1);
    let looked_for: Vec<usize> = wrong.into_iter().step_by(step).collect();
    let found: Vec<(Place, Place)> = looked_for
        .iter()
        .filter_map(|&row| Some((row, nearest(tensor, row)?)))
        .filter(|(row, from)| row != from)
        .map(|(row, from)| (tensor.sizes.place(row), tensor.sizes.place(from)))
        .collect();
    if found.len() < 2 || (found.len() as f64) < MOST * looked_for.len() as f64 {
        return None;
    }
    let (at, from) = *found.first()?;
    let (mistake, order) = pattern(evidence, tensor.name, &found);
    Some(Diagnosis {
        mistake,
        others: Vec::new(),
        strip: Vec::new(),
        confidence: if mistake.is_some() { 0.8 } else { 0.4 },
        sentence: format!(
            "{contrast} Rows of {} stand in another place: at batch {}, token {}, head {} is that \
             of batch {}, token {}, head {}{order}.",
            tensor.name.name(),
            at.0,
            at.1,
            at.2,
            from.0,
            from.1,
            from.2
        ),
    })
}

/// The right row that is nearest to a row of the answer, if one is near. Of
/// several that are alike, one of the same head and sequence.
fn nearest(tensor: &Measured<'_>, row: usize) -> Option<usize> {
    let is = &tensor.answer[tensor.row(row)];
    let size: f64 = is.iter().map(|x| x * x).sum();
    let distances: Vec<f64> = (0..tensor.sizes.rows())
        .map(|other| {
            let right = &tensor.right[tensor.row(other)];
            is.iter().zip(right).map(|(a, b)| (a - b) * (a - b)).sum()
        })
        .collect();
    let least = distances.iter().copied().reduce(f64::min)?;
    if size == 0.0 || least.is_nan() || least > NEAR * NEAR * size {
        return None;
    }
    let (batch, _, head) = tensor.sizes.place(row);
    let is_alike = |&other: &usize| distances[other] <= least + ALIKE * size;
    (0..distances.len()).filter(is_alike).min_by_key(|&other| {
        let (of_batch, _, of_head) = tensor.sizes.place(other);
        (of_head != head, of_batch != batch)
    })
}

/// The mistake of which these moves are, and the order of ranks that they show.
fn pattern(
    evidence: &Evidence<'_>,
    name: AnswerTensor,
    moves: &[(Place, Place)],
) -> (Option<Mistake>, String) {
    let all = |same: fn(&Place, &Place) -> bool| moves.iter().all(|(at, from)| same(at, from));
    let (same_batch, same_token) = (all(|a, b| a.0 == b.0), all(|a, b| a.1 == b.1));
    let same_head = all(|a, b| a.2 == b.2);
    let sizes = Sizes::of(evidence.case, name);
    let tokens = evidence.place_of_token();
    let heads: Vec<usize> = evidence
        .heads_of_ranks(sizes.heads)
        .into_iter()
        .enumerate()
        .flat_map(|(rank, heads)| heads.map(move |_| rank))
        .collect();
    let is_out = name == AnswerTensor::Out;
    if same_batch && same_head {
        let order = order(
            moves
                .iter()
                .map(|(at, from)| (tokens[at.1].0, tokens[from.1].0)),
        );
        let mistake = match is_out {
            true => Mistake::OutputToWrongRank,
            false => Mistake::BackwardToWrongRank,
        };
        if let Some(told) = order {
            return (
                Some(mistake),
                format!(", and ranks have the tokens of ranks {told}"),
            );
        }
    }
    if same_batch && same_token && is_out {
        let order = order(moves.iter().map(|(at, from)| (heads[at.2], heads[from.2])));
        if let Some(told) = order {
            let told = format!(", and the ranks' heads stand in the order {told}");
            return (Some(Mistake::OutputHeadsReordered), told);
        }
    }
    if !same_batch && same_head {
        return (Some(Mistake::BatchMixedIntoSequence), String::new());
    }
    (None, String::new())
}

/// The rank from which each rank's come, if that is one other rank each.
fn order(moves: impl Iterator<Item = (usize, usize)>) -> Option<String> {
    let mut from: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
    for (rank, of) in moves {
        from.entry(rank).or_default().insert(of);
    }
    let is_one_other = |(rank, of): (&usize, &BTreeSet<usize>)| of.len() == 1 && !of.contains(rank);
    let is_order = !from.is_empty() && from.iter().all(is_one_other);
    is_order.then(|| {
        let order: Vec<usize> = from.into_values().flatten().collect();
        order_of(&order)
    })
}
