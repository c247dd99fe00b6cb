//! Whether what is wrong is but rounding: numbers that are near the right ones
//! and were once in a coarser element type, or lean towards zero.

use fixtures::{Array, Dtype};

use super::evidence::{Evidence, Measured};
use super::prediction::rms;
use super::words::listed;
use super::{Diagnosis, Mistake};
use crate::oracle::AnswerTensor;

/// How far off, relative to its size, a tensor is at most that is but rounded;
/// and any of its numbers, relative to the largest.
const ROUNDED: f64 = 0.03;

/// Of the numbers that are not just right, those that lean towards zero where
/// roundings do.
const LEANING: f64 = 0.6;

/// How improbable that may be, in standard deviations.
const DEVIATIONS: f64 = 8.0;

/// The mistake, if wrong tensors are near the right ones and have no more digits
/// than bfloat16 has.
pub(super) fn of_coarse(evidence: &Evidence<'_>) -> Option<Diagnosis> {
    let wrong = near(evidence)?;
    if evidence.case.dtype == Dtype::Bf16 || !wrong.iter().any(|tensor| is_coarse(tensor)) {
        return None;
    }
    let is_out_wrong = wrong.iter().any(|tensor| tensor.name == AnswerTensor::Out);
    let mistake = match is_out_wrong {
        true => Mistake::ExchangeInBf16,
        false => Mistake::GradientsInBf16,
    };
    let why = "of no more digits than bfloat16 has";
    Some(told(&wrong, mistake, 0.9, why))
}

/// The mistake, if every wrong tensor is near the right one.
pub(super) fn of_near(evidence: &Evidence<'_>) -> Option<Diagnosis> {
    let wrong = near(evidence)?;
    if wrong.iter().all(|tensor| leans(tensor)) {
        let why = "the numbers are too small far more often than too large";
        return Some(told(&wrong, Mistake::BiasedRounding, 0.8, why));
    }
    if !is_off_by_bfloat16(&wrong) {
        return None;
    }
    let is_out_right = wrong.iter().all(|tensor| tensor.name != AnswerTensor::Out);
    let mistake = match is_out_right && matches!(evidence.case.dtype, Dtype::F64 | Dtype::F32) {
        true => Mistake::GradientsInBf16,
        false => Mistake::PartialResultsInBf16,
    };
    Some(told(
        &wrong,
        mistake,
        0.5,
        "off by about what bfloat16 rounds",
    ))
}

/// The wrong tensors, if all of them are near the right ones.
fn near<'e>(evidence: &'e Evidence<'_>) -> Option<Vec<&'e Measured<'e>>> {
    let is_near = |tensor: &&Measured<'_>| {
        relative_error(tensor) < ROUNDED && largest_error(tensor) < ROUNDED
    };
    let wrong: Vec<&Measured<'_>> = evidence
        .tensors
        .iter()
        .filter(|tensor| tensor.is_wrong() || leans(tensor))
        .collect();
    (!wrong.is_empty() && wrong.iter().all(is_near)).then_some(wrong)
}

fn told(wrong: &[&Measured<'_>], mistake: Mistake, confidence: f64, why: &str) -> Diagnosis {
    let names: Vec<String> = wrong.iter().map(|t| t.name.name().to_owned()).collect();
    let is = if names.len() == 1 { "is" } else { "are" };
    Diagnosis {
        mistake: Some(mistake),
        others: Vec::new(),
        confidence,
        sentence: format!("{} {is} near what is right, but {why}.", listed(&names)),
        strip: Vec::new(),
    }
}

/// The size of the error relative to that of what is right.
fn relative_error(tensor: &Measured<'_>) -> f64 {
    let pairs = || tensor.answer.iter().zip(tensor.right);
    if pairs().any(|(is, _)| !is.is_finite()) {
        return f64::INFINITY;
    }
    let error = rms(pairs().map(|(is, right)| is - right));
    error / rms(tensor.right.iter().copied()).max(f64::MIN_POSITIVE)
}

/// The largest error relative to the largest number that is right: of many
/// numbers one alone that is wrong makes a small error, and is not rounded.
fn largest_error(tensor: &Measured<'_>) -> f64 {
    let largest =
        |numbers: &mut dyn Iterator<Item = f64>| numbers.map(f64::abs).fold(0.0, f64::max);
    let pairs = tensor.answer.iter().zip(tensor.right);
    let error = largest(&mut pairs.map(|(is, right)| is - right));
    error / largest(&mut tensor.right.iter().copied()).max(f64::MIN_POSITIVE)
}

/// Whether errors are those of a unit roundoff of 2^-9, more or less.
fn is_off_by_bfloat16(wrong: &[&Measured<'_>]) -> bool {
    wrong
        .iter()
        .any(|tensor| (2e-4..ROUNDED).contains(&relative_error(tensor)))
}

/// Whether all numbers are ones of bfloat16.
fn is_coarse(tensor: &Measured<'_>) -> bool {
    let numbers = &tensor.answer;
    Array::from_f64(Dtype::Bf16, &[numbers.len()], numbers).to_f64() == *numbers
}

/// Whether numbers are too small far more often than too large.
fn leans(tensor: &Measured<'_>) -> bool {
    let (mut count, mut small) = (0.0, 0.0);
    for (is, right) in tensor.answer.iter().zip(tensor.right) {
        if is != right {
            count += 1.0;
            small += f64::from((is - right) * right < 0.0);
        }
    }
    let share = small / f64::max(count, 1.0);
    share > LEANING && (share - 0.5) * 2.0 * count.sqrt() > DEVIATIONS
}
