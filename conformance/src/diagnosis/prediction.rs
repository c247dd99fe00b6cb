//! What a mistake would have answered, and how well that agrees with what came.

use std::collections::BTreeMap;

use super::evidence::{Evidence, Measured};
use crate::oracle::AnswerTensor;

/// The whole answer that a mistake would give. A tensor that it says nothing of
/// is not compared.
#[derive(Clone, Debug)]
pub(crate) struct Prediction {
    /// What was done, with the ranks, heads and factors of this very answer.
    pub(crate) sentence: String,
    tensors: BTreeMap<AnswerTensor, Vec<f64>>,
}

/// How well a prediction agrees with an answer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Agreement {
    /// Of what is wrong, the part that the prediction explains, 1 at most. What
    /// it makes wrong that is right counts against it.
    pub(super) explained: f64,
    /// Whether it explains every tensor that it speaks of, and one at least.
    pub(super) is_whole: bool,
    /// How far the answer is off from it, in what it may be off.
    pub(super) rest: f64,
}

/// What an answer may be off from a prediction, in unit roundoffs of its
/// element type: it was never asked to be near.
const ROUNDOFFS: f64 = 24.0;

/// Of the elements, those that must agree.
const NEARLY_ALL: f64 = 0.985;

/// A deviation of more says no more.
const FAR: f64 = 100.0;

impl Prediction {
    pub(super) fn new(sentence: impl Into<String>) -> Prediction {
        Prediction {
            sentence: sentence.into(),
            tensors: BTreeMap::new(),
        }
    }

    pub(super) fn set(&mut self, name: AnswerTensor, elements: Vec<f64>) {
        self.tensors.insert(name, elements);
    }

    pub(super) fn set_default(&mut self, name: AnswerTensor, elements: impl Fn() -> Vec<f64>) {
        self.tensors.entry(name).or_insert_with(elements);
    }

    pub(super) fn get(&self, name: AnswerTensor) -> Option<&Vec<f64>> {
        self.tensors.get(&name)
    }

    /// The same, but nothing is said of others than these tensors.
    pub(super) fn only(mut self, is_kept: impl Fn(AnswerTensor) -> bool) -> Prediction {
        self.tensors.retain(|name, _| is_kept(*name));
        self
    }

    /// The same with these tensors altered.
    pub(super) fn with(
        mut self,
        names: &[AnswerTensor],
        mut alter: impl FnMut(AnswerTensor, &mut Vec<f64>),
    ) -> Prediction {
        for (name, elements) in &mut self.tensors {
            if names.contains(name) {
                alter(*name, elements);
            }
        }
        self
    }

    /// How each tensor agrees that can be compared.
    fn parts(&self, evidence: &Evidence<'_>, u: f64, rows: usize) -> Vec<Part> {
        let part = |tensor: &Measured<'_>| {
            let predicted = self.tensors.get(&tensor.name)?;
            Part::of(evidence, tensor, predicted, u, rows)
        };
        evidence.tensors.iter().filter_map(part).collect()
    }

    /// How well it agrees with an answer.
    pub(super) fn agreement(&self, evidence: &Evidence<'_>) -> Agreement {
        let u = evidence.case.dtype.unit_roundoff();
        // A few rows say enough of most predictions.
        let few = self.parts(evidence, u, FEW);
        let is_hopeless = |part: &Part| part.is_wrong && part.agrees < 0.5;
        let parts = match few.iter().any(is_hopeless) {
            true => few,
            false => self.parts(evidence, u, usize::MAX),
        };
        let wrong: Vec<&Part> = parts.iter().filter(|part| part.is_wrong).collect();
        let explained: f64 = wrong.iter().map(|part| part.explained()).sum();
        let spoiled: f64 = parts
            .iter()
            .filter(|part| !part.is_wrong)
            .map(|part| 1.0 - part.agrees)
            .sum();
        let count = wrong.len().max(1) as f64;
        Agreement {
            explained: (explained - spoiled) / count,
            is_whole: !wrong.is_empty() && parts.iter().all(Part::is_whole),
            rest: parts.iter().map(|part| part.rest).fold(0.0, f64::max),
        }
    }
}

/// How many rows of a tensor are looked at first.
const FEW: usize = 32;

/// How one tensor agrees.
struct Part {
    is_wrong: bool,
    /// Of the elements, those that agree with the prediction.
    agrees: f64,
    /// The distance to the prediction, relative to that to what is right.
    residual: f64,
    rest: f64,
}

impl Part {
    /// By the rows of which about so many are taken; none where there is too
    /// little that can be compared.
    fn of(
        evidence: &Evidence<'_>,
        tensor: &Measured<'_>,
        predicted: &[f64],
        u: f64,
        rows: usize,
    ) -> Option<Part> {
        let sizes = tensor.sizes;
        let size = rms(predicted.iter().copied());
        let (mut all, mut count, mut agrees, mut rest) = (0usize, 0usize, 0usize, 0.0);
        let (mut from_predicted, mut from_right) = (0.0, 0.0);
        // Prime to the number of heads, so that every head is met.
        let step = match sizes.rows() / rows {
            0 => 1,
            step => (step | 1..)
                .step_by(2)
                .find(|&n| is_prime_to(n, sizes.heads))?,
        };
        for row in (0..sizes.rows()).step_by(step) {
            let (batch, token, _) = sizes.place(row);
            if tensor.name == AnswerTensor::Out && evidence.is_padding(batch, token) {
                continue;
            }
            let places = tensor.row(row);
            let of_row = rms(predicted[places.clone()].iter().copied());
            for i in places {
                let (is, right, due) = (tensor.answer[i], tensor.right[i], predicted[i]);
                all += 1;
                if !is.is_finite() || !due.is_finite() {
                    continue;
                }
                let may_be = 2.0 * tensor.tolerance[i]
                    + ROUNDOFFS * u * (due.abs() + of_row + 0.1 * size)
                    + f64::MIN_POSITIVE;
                let off = (is - due).abs() / may_be;
                count += 1;
                agrees += usize::from(off <= 1.0);
                rest += off.min(FAR).powi(2);
                from_predicted += (is - due).powi(2);
                from_right += (is - right).powi(2);
            }
        }
        let residual = match from_right > 0.0 {
            true => (from_predicted / from_right).sqrt(),
            false => 0.0,
        };
        (4 * count > all).then(|| Part {
            is_wrong: tensor.is_wrong(),
            agrees: agrees as f64 / count as f64,
            residual,
            rest: (rest / count as f64).sqrt(),
        })
    }

    fn explained(&self) -> f64 {
        // What is far off in one element tells as much as what agrees in many.
        ((1.0 - self.residual) * self.agrees).max(-1.0)
    }

    fn is_whole(&self) -> bool {
        self.agrees >= NEARLY_ALL && (!self.is_wrong || self.residual < 0.5)
    }
}

/// What a number may be off from predicted ones, by their size.
pub(super) fn may_be_off(predicted: &[f64], u: f64) -> f64 {
    2.0 * ROUNDOFFS * u * rms(predicted.iter().copied())
}

fn is_prime_to(n: usize, other: usize) -> bool {
    (2..=other).all(|d| !other.is_multiple_of(d) || !n.is_multiple_of(d))
}

/// The root of the mean square.
pub(super) fn rms(numbers: impl Iterator<Item = f64>) -> f64 {
    let (count, sum) = numbers
        .filter(|x| x.is_finite())
        .fold((0usize, 0.0), |(n, sum), x| (n + 1, sum + x * x));
    (sum / count.max(1) as f64).sqrt()
}
