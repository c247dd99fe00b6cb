//! How far a row of an answer may be off.
//!
//! A row is the vector of one head of one token: `head size` numbers that the
//! same rounding errors made. Its error is the norm of its difference from the
//! float64 oracle. An honest implementation in the case's element type makes
//! about the error there that dense attention in this element type makes, so a
//! row may be off by
//!
//! ```text
//! SLACK * (dense + deviation)
//! ```
//!
//! - `dense`: the larger of what dense SDPA and dense eager attention are off
//!   on this very row; eager alone where scores are not SDPA's own;
//! - `deviation`: the standard deviation of the row's error, derived from the
//!   roundings that attention in this element type makes
//!   (`oracle/roundings.rs`): on one row dense attention may be lucky.
//!
//! Of the gradient of a norm's weight, a row is one head; of slopes and sinks,
//! all heads together are one row. These are sums over all tokens, taken in
//! parts by an order that is an implementation's own, and a few numbers say
//! little of what another order is off. So `dense` is, of the parts of single
//! tokens, the root of the sum of their squared errors, or the error of their
//! sum where that is larger; and the deviation is the unit roundoff of elements
//! and that of sums times the size of the parts, taken in the same way.
//!
//! [`SLACK`] is the one number in it that is chosen, not measured.

use fixtures::{Array, Case, Dtype};

use super::comparison::{Place, TensorComparison, WrongRow};
use crate::oracle::AnswerTensor;

/// How many times as far off as dense attention a row may be. The norms of two
/// independent normal errors of the same size over 16 channels differ by a
/// factor of 4 in one row of a million (the F distribution with 16 and 16
/// degrees of freedom), over 64 channels practically never.
pub const SLACK: f64 = 4.0;

/// What one tensor of an answer is measured by.
pub(super) struct Ruler {
    tensor: AnswerTensor,
    right: Vec<f64>,
    /// Dense SDPA's, where there is one right sequence of roundings.
    sdpa: Option<Array>,
    /// The numbers of a row.
    channels: usize,
    rows: Vec<Row>,
}

struct Row {
    place: Place,
    /// The norm of the right row.
    norm: f64,
    /// What its error may be.
    bound: f64,
}

impl Ruler {
    /// Of a tensor `[batch, tokens, heads, channels]` by what dense attention
    /// makes of it.
    pub(super) fn of_tokens(
        case: &Case,
        tensor: AnswerTensor,
        right: Vec<f64>,
        sdpa: Option<Array>,
        baselines: &[Vec<f64>],
        deviations: &[f64],
    ) -> Ruler {
        let [tokens, heads, channels] = match tensor.shape(case)[..] {
            [_, tokens, heads, channels] => [tokens, heads, channels],
            _ => [1, 1, right.len()],
        };
        let place = |row: usize| Place::Token {
            batch: row / heads / tokens,
            token: row / heads % tokens,
            head: row % heads,
        };
        let norms = right.chunks(channels).map(norm);
        let rows = norms
            .zip(deviations)
            .enumerate()
            .map(|(i, (norm, deviation))| {
                let row = i * channels..(i + 1) * channels;
                let dense = baselines
                    .iter()
                    .map(|baseline| distance(&baseline[row.clone()], &right[row.clone()]))
                    .fold(0.0, f64::max);
                Row {
                    place: place(i),
                    norm,
                    bound: SLACK * (dense + deviation),
                }
            });
        Ruler {
            tensor,
            rows: rows.collect(),
            right,
            sdpa,
            channels,
        }
    }

    /// Of a gradient of head state by the parts of all tokens, `[batch, tokens,
    /// ..]` each.
    pub(super) fn of_parts(
        case: &Case,
        tensor: AnswerTensor,
        right: &[f64],
        baselines: &[Vec<f64>],
    ) -> Ruler {
        let shape = tensor.shape(case);
        let size = shape.iter().product();
        let channels = *shape.last().unwrap_or(&size);
        let errors: Vec<Vec<f64>> = baselines
            .iter()
            .map(|baseline| {
                baseline
                    .iter()
                    .zip(right)
                    .map(|(is, right)| is - right)
                    .collect()
            })
            .collect();
        let (u, w) = roundoffs(case.dtype);
        let sum = sum_of_parts(right, size);
        let rows = (0..size / channels).map(|i| {
            let row = i * channels..(i + 1) * channels;
            let size_of = |parts: &[f64]| {
                let of_parts: f64 = parts
                    .chunks(size)
                    .flat_map(|part| &part[row.clone()])
                    .map(|x| x * x)
                    .sum();
                of_parts
                    .sqrt()
                    .max(norm(&sum_of_parts(parts, size)[row.clone()]))
            };
            let dense = errors
                .iter()
                .map(|parts| size_of(parts))
                .fold(0.0, f64::max);
            let place = match tensor {
                AnswerTensor::QueryNormGradient | AnswerTensor::KeyNormGradient => Place::Head(i),
                _ => Place::AllHeads,
            };
            Row {
                place,
                norm: norm(&sum[row.clone()]),
                bound: SLACK * (dense + (u + w) * size_of(right)),
            }
        });
        Ruler {
            tensor,
            rows: rows.collect(),
            right: sum,
            sdpa: None,
            channels,
        }
    }

    /// How far `answer` is off, row by row.
    pub(super) fn measure(&self, answer: &[f64]) -> TensorComparison {
        let is_exact = self.sdpa.as_ref().is_some_and(|sdpa| {
            Array::from_f64(sdpa.dtype, &sdpa.shape, answer).bytes == sdpa.bytes
        });
        let mut comparison = TensorComparison {
            tensor: self.tensor,
            is_exact,
            rows: self.rows.len(),
            wrong_rows: 0,
            worst: None,
            tightness: 0.0,
            scale: fit_scale(&self.right, answer),
        };
        let pairs = answer
            .chunks(self.channels)
            .zip(self.right.chunks(self.channels));
        for (row, (is, right)) in self.rows.iter().zip(pairs) {
            let error = distance(is, right);
            let ratio = if error == 0.0 { 0.0 } else { error / row.bound };
            // A row that holds a NaN is infinitely far off.
            let ratio = if ratio.is_nan() { f64::INFINITY } else { ratio };
            if ratio > 1.0 {
                comparison.wrong_rows += 1;
                if ratio > comparison.tightness {
                    comparison.worst = Some(WrongRow {
                        place: row.place,
                        error,
                        bound: row.bound,
                        norm: row.norm,
                    });
                }
            }
            comparison.tightness = comparison.tightness.max(ratio);
        }
        comparison
    }
}

/// The unit roundoffs of elements, and of sums.
fn roundoffs(dtype: Dtype) -> (f64, f64) {
    let u = dtype.unit_roundoff();
    (u, u.min(Dtype::F32.unit_roundoff()))
}

/// The sum of parts of `size` numbers each.
fn sum_of_parts(parts: &[f64], size: usize) -> Vec<f64> {
    let mut sum = vec![0.0; size];
    for part in parts.chunks(size) {
        sum.iter_mut()
            .zip(part)
            .for_each(|(sum, part)| *sum += part);
    }
    sum
}

fn norm(row: &[f64]) -> f64 {
    row.iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    let squares = a.iter().zip(b).map(|(a, b)| (a - b) * (a - b));
    squares.sum::<f64>().sqrt()
}

/// The least-squares `alpha` of `answer = alpha * right + rest`, and the norm
/// of the rest relative to the answer's.
fn fit_scale(right: &[f64], answer: &[f64]) -> (f64, f64) {
    let dot: f64 = right.iter().zip(answer).map(|(r, a)| r * a).sum();
    let squares: f64 = right.iter().map(|r| r * r).sum();
    let alpha = if squares > 0.0 { dot / squares } else { 0.0 };
    let scaled: Vec<f64> = right.iter().map(|r| alpha * r).collect();
    (alpha, distance(answer, &scaled) / norm(answer))
}
