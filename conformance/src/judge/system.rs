//! The judge of all profiles but attention: what each rank answered, held
//! against what is due from it, number by number.

use std::collections::BTreeMap;

use fixtures::exchange::{Declared, Tensors, tensor};
use fixtures::{Array, Case, Dtype};

use super::comparison::{Comparison, Place, TensorComparison, WrongNumber};
use super::power::SCALE;
use super::ruler::fit_scale;
use super::tolerance::lambda;
use super::{Judgement, Verdict, convention};
use crate::diagnosis::{Diagnosis, Mistake};
use crate::oracle::due::{self, DueAnswer, DueTensor};

/// How sure a diagnosis is: nobody knows all mistakes.
const SURE: f64 = 0.95;

/// Of the distance between what is due and what was answered, what a mistake
/// leaves unexplained at most to be named: half types round away some of the
/// rest.
const REST: f64 = 0.1;

/// Compares what the ranks answered. An error is a judgement before there is
/// anything to compare.
pub(super) fn compare(
    case: &Case,
    declared: Declared,
    ranks: &[&Tensors],
) -> Result<Judgement, Judgement> {
    let unclear = |reason| Judgement::new(Verdict::Unclear, reason);
    let wrong_shape = |sentence| Judgement::new(Verdict::Fail, sentence).named(Mistake::WrongShape);
    let due = due::due(case, declared).map_err(unclear)?;
    if let Some(sentence) = undue(&due, ranks) {
        return Err(Judgement::new(Verdict::Fail, sentence).named(Mistake::FrozenGradient));
    }
    let answer = match read(case, declared, &due, ranks) {
        Ok(answer) => answer,
        Err(sentence) => {
            let mistaken = due::mistaken(case, declared).map_err(unclear)?;
            let mut judgement = wrong_shape(sentence);
            if let Some(mistake) = of_another_shape(case, declared, &mistaken, ranks) {
                judgement = judgement.named(mistake);
            }
            return Err(judgement);
        }
    };
    let comparison = compared(&due, &answer);
    let mut judgement = Judgement {
        verdict: comparison.verdict(),
        sentence: comparison.sentence(),
        details: comparison.details(None),
        comparison: Some(comparison),
        diagnosis: None,
    };
    if judgement.verdict == Verdict::Fail {
        let mistaken = due::mistaken(case, declared).map_err(unclear)?;
        judgement.diagnosis = match answer.is_finite() {
            true => diagnosed(&due, &mistaken, &answer).map(Box::new),
            false => Some(Box::new(Diagnosis::certain(Mistake::NotANumber))),
        };
    } else if let Some(name) = powerless(&due) {
        judgement.verdict = Verdict::Unclear;
        judgement.sentence = format!(
            "the case has no power: a factor of {} in {name} would not be seen",
            1.0 + SCALE
        );
    }
    Ok(judgement)
}

/// The right answer, one tensor of each rank by `NAME.rank-R`, and how far it may
/// be off.
pub(super) fn right_answer(case: &Case, declared: Declared) -> Option<Tensors> {
    if case.defect().is_some() {
        return None;
    }
    let due = due::due(case, declared).ok()?;
    let of_ranks = due.ranks.iter().enumerate().flat_map(|(rank, tensors)| {
        let named = move |(name, tensor)| (format!("{name}.rank-{rank}"), tensor);
        tensors.iter().map(named)
    });
    let sums = due.sums.iter().map(|(name, tensor)| (name.clone(), tensor));
    let arrays = of_ranks.chain(sums).flat_map(|(name, tensor)| {
        let tolerances: Vec<f64> = tensor.roots.iter().map(|root| lambda() * root).collect();
        let array = |numbers: &[f64]| Array::from_f64(Dtype::F64, &tensor.shape, numbers);
        let (right, may_be_off) = (array(&tensor.right), array(&tolerances));
        [(format!("{name}.may_be_off"), may_be_off), (name, right)]
    });
    Some(arrays.collect())
}

/// The mistake by which just this would have come, in the shape in which it came.
fn of_another_shape(
    case: &Case,
    declared: Declared,
    mistaken: &[(Mistake, DueAnswer)],
    ranks: &[&Tensors],
) -> Option<Mistake> {
    let is_it = |due: &DueAnswer| {
        read(case, declared, due, ranks).is_ok_and(|answer| distance(due, &answer) == 0.0)
    };
    let found = mistaken.iter().find(|(_, due)| is_it(due));
    found.map(|&(mistake, _)| mistake)
}

/// The numbers of each rank, and of the sums over ranks.
struct Answered {
    ranks: Vec<BTreeMap<String, Vec<f64>>>,
    sums: BTreeMap<String, Vec<f64>>,
}

impl Answered {
    fn is_finite(&self) -> bool {
        let tensors = self.ranks.iter().chain([&self.sums]).flatten();
        tensors
            .flat_map(|(_, numbers)| numbers)
            .all(|x| x.is_finite())
    }
}

/// Who answers what it may not, if anybody does.
fn undue(due: &DueAnswer, ranks: &[&Tensors]) -> Option<String> {
    let mut answered = due.undue.iter().flat_map(|name| {
        let ranks = ranks.iter().enumerate();
        ranks.filter_map(move |(rank, tensors)| tensors.contains_key(name).then_some((rank, name)))
    });
    let (rank, name) = answered.next()?;
    Some(format!(
        "rank {rank}: gives `{name}`, the gradient of what is frozen"
    ))
}

/// Every tensor that is due, if each rank gave it as it is due.
///
/// # Errors
///
/// Which rank's tensor is missing, or is not what is due.
fn read(
    case: &Case,
    declared: Declared,
    due: &DueAnswer,
    ranks: &[&Tensors],
) -> Result<Answered, String> {
    let part = |rank: usize, name: &str, due: &DueTensor| {
        let array = tensor(ranks[rank], name).map_err(|e| format!("rank {rank}: {e}"))?;
        if array.shape != due.shape || array.dtype != due.dtype {
            return Err(format!(
                "rank {rank}: `{name}` is {} {:?}, due is {} {:?}",
                array.dtype, array.shape, due.dtype, due.shape
            ));
        }
        Ok(array.to_f64())
    };
    let mut answered = Answered {
        ranks: Vec::new(),
        sums: BTreeMap::new(),
    };
    for (rank, tensors) in due.ranks.iter().enumerate() {
        let numbers = tensors
            .iter()
            .map(|(name, due)| Ok((name.clone(), part(rank, name, due)?)));
        answered.ranks.push(numbers.collect::<Result<_, String>>()?);
    }
    let averaged_over = convention::averaged_over(declared, case.world() as f64);
    for (name, due) in &due.sums {
        let mut sum = vec![0.0; due.right.len()];
        for rank in 0..ranks.len() {
            for (sum, part) in sum.iter_mut().zip(part(rank, name, due)?) {
                *sum += part / averaged_over;
            }
        }
        answered.sums.insert(name.clone(), sum);
    }
    Ok(answered)
}

fn compared(due: &DueAnswer, answer: &Answered) -> Comparison {
    let mut tensors: BTreeMap<&str, TensorComparison> = BTreeMap::new();
    let of_ranks = due.ranks.iter().zip(&answer.ranks).enumerate();
    let of_ranks = of_ranks.flat_map(|(rank, (due, answer))| {
        due.iter()
            .zip(answer.values())
            .map(move |((name, due), is)| (Some(rank), name, due, is))
    });
    let sums = due.sums.iter().zip(answer.sums.values());
    let sums = sums.map(|((name, due), is)| (None, name, due, is));
    for (rank, name, due, is) in of_ranks.chain(sums) {
        let one = measure(rank, name, due, is);
        match tensors.get_mut(name.as_str()) {
            Some(all) => add(all, one),
            None => drop(tensors.insert(name, one)),
        }
    }
    Comparison {
        tensors: tensors.into_values().collect(),
    }
}

/// How far one tensor of one rank is off.
fn measure(rank: Option<usize>, name: &str, due: &DueTensor, is: &[f64]) -> TensorComparison {
    let channels = due.shape.last().copied().unwrap_or(1).max(1);
    let rounded = Array::from_f64(due.dtype, &due.shape, &due.right).to_f64();
    let mut comparison = TensorComparison {
        name: name.to_owned(),
        is_sum: rank.is_none(),
        is_exact: rounded == is,
        numbers: is.len(),
        rows: is.len() / channels,
        wrong_numbers: 0,
        wrong_rows: 0,
        worst: None,
        tightness: 0.0,
        lean: 0.0,
        scale: fit_scale(&due.right, is),
    };
    let mut last_wrong_row = None;
    for (place, &is) in is.iter().enumerate() {
        let (right, tolerance) = (due.right[place], lambda() * due.roots[place]);
        let error = (is - right).abs();
        let ratio = match error {
            0.0 => 0.0,
            error if error.is_nan() => f64::INFINITY,
            error => error / tolerance,
        };
        if ratio > 1.0 {
            comparison.wrong_numbers += 1;
            let row = place / channels;
            if last_wrong_row.replace(row) != Some(row) {
                comparison.wrong_rows += 1;
            }
            if ratio > comparison.tightness {
                comparison.worst = Some(WrongNumber {
                    place: Place::Row(rank, indices(&due.shape, row)),
                    channel: place % channels,
                    is,
                    right,
                    tolerance,
                });
            }
        }
        comparison.tightness = comparison.tightness.max(ratio);
    }
    comparison
}

/// Adds what another rank's tensor of this name shows. The factor stays that of
/// the first.
fn add(all: &mut TensorComparison, one: TensorComparison) {
    all.is_exact &= one.is_exact;
    all.numbers += one.numbers;
    all.rows += one.rows;
    all.wrong_numbers += one.wrong_numbers;
    all.wrong_rows += one.wrong_rows;
    if one.worst.is_some() && one.tightness > all.tightness {
        all.worst = one.worst;
    }
    all.tightness = all.tightness.max(one.tightness);
}

/// The indices of a row in all dimensions but the last.
fn indices(shape: &[usize], row: usize) -> Vec<usize> {
    let Some((_, outer)) = shape.split_last() else {
        return Vec::new();
    };
    let mut rest = row;
    let mut indices: Vec<usize> = outer
        .iter()
        .rev()
        .map(|&size| {
            let index = rest % size.max(1);
            rest /= size.max(1);
            index
        })
        .collect();
    indices.reverse();
    indices
}

/// The mistake that explains most of what is wrong, if one leaves but a small
/// rest.
fn diagnosed(
    due: &DueAnswer,
    mistaken: &[(Mistake, DueAnswer)],
    answer: &Answered,
) -> Option<Diagnosis> {
    let wrong = distance(due, answer);
    let mut explaining: Vec<(f64, Mistake)> = mistaken
        .iter()
        .map(|(mistake, mistaken)| (distance(mistaken, answer), *mistake))
        .filter(|(rest, _)| *rest < REST * wrong)
        .collect();
    explaining.sort_by(|(a, _), (b, _)| a.total_cmp(b));
    let mut explaining = explaining.into_iter().map(|(_, mistake)| mistake);
    let mistake = explaining.next()?;
    Some(Diagnosis {
        others: explaining.collect(),
        confidence: SURE,
        ..Diagnosis::certain(mistake)
    })
}

/// The square root of the sum over tensors of their distances, each relative to
/// the size of both.
fn distance(due: &DueAnswer, answer: &Answered) -> f64 {
    let ranks = due.ranks.iter().zip(&answer.ranks);
    let all = ranks.chain([(&due.sums, &answer.sums)]);
    let mut tensors: BTreeMap<&String, (f64, f64)> = BTreeMap::new();
    for ((name, due), is) in all.flat_map(|(due, is)| due.iter().zip(is.values())) {
        let (apart, size) = tensors.entry(name).or_default();
        for (due, is) in due.right.iter().zip(is) {
            *apart += (is - due) * (is - due);
            *size += is * is + due * due;
        }
    }
    let relative = tensors
        .values()
        .map(|(apart, size)| apart / size.max(f64::MIN_POSITIVE));
    relative.sum::<f64>().sqrt()
}

/// A tensor of which all numbers could be wrong by a factor and none would be
/// seen, if there is one.
fn powerless(due: &DueAnswer) -> Option<&String> {
    let tensors = due.ranks.iter().chain([&due.sums]).flatten();
    let mut shown: BTreeMap<&String, (bool, bool)> = BTreeMap::new();
    for (name, tensor) in tensors {
        let (is_something, is_seen) = shown.entry(name).or_default();
        for (right, root) in tensor.right.iter().zip(&tensor.roots) {
            *is_something |= right.abs() > *root;
            *is_seen |= right.abs() * SCALE > lambda() * root;
        }
    }
    let mut shown = shown.into_iter();
    shown.find_map(|(name, (is_something, is_seen))| (is_something && !is_seen).then_some(name))
}
