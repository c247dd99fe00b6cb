//! How far one tensor of an answer is off, number by number and as a whole.

use fixtures::{Array, AttentionCase};

use super::comparison::{Place, TensorComparison, WrongNumber};
use super::tolerance::lambda;
use crate::oracle::AnswerTensor;

/// What one tensor of an answer is measured by.
pub(crate) struct Ruler {
    tensor: AnswerTensor,
    shape: Vec<usize>,
    /// The right numbers, in row-major order.
    pub(crate) right: Vec<f64>,
    /// By how much roundings move each of them.
    pub(crate) roots: Vec<f64>,
    /// Dense SDPA's, where there is one right sequence of roundings.
    sdpa: Option<Array>,
}

impl Ruler {
    pub(super) fn new(
        case: &AttentionCase,
        tensor: AnswerTensor,
        right: Vec<f64>,
        roots: Vec<f64>,
        sdpa: Option<Array>,
    ) -> Ruler {
        Ruler {
            tensor,
            shape: tensor.shape(case),
            right,
            roots,
            sdpa,
        }
    }

    /// How far this number may be off.
    pub(crate) fn tolerance(&self, number: usize) -> f64 {
        lambda() * self.roots[number]
    }

    /// How many numbers a row has: those of one head of one token, or of one
    /// head.
    pub(crate) fn channels(&self) -> usize {
        match self.shape[..] {
            [_] => 1,
            [.., channels] => channels,
            [] => 1,
        }
    }

    /// Where a row stands.
    pub(crate) fn place(&self, row: usize) -> Place {
        match self.shape[..] {
            [_, tokens, heads, _] => Place::Token {
                batch: row / heads / tokens,
                token: row / heads % tokens,
                head: row % heads,
            },
            _ => Place::Head(row),
        }
    }

    /// Of these rows, those that have a row of the next head of the same token
    /// behind them, each with that row.
    pub(super) fn neighbouring_heads(&self, rows: &[usize]) -> Vec<(usize, usize)> {
        let heads = match self.shape[..] {
            [_, _, heads, _] | [heads, ..] => heads,
            [] => 1,
        };
        let has_next = |row: &&usize| **row % heads + 1 < heads;
        rows.iter()
            .filter(has_next)
            .map(|&row| (row, row + 1))
            .collect()
    }

    /// Of these rows, those that have a row of the same head of the next token
    /// behind them, each with that row.
    pub(super) fn next_tokens(&self, rows: &[usize]) -> Vec<(usize, usize)> {
        let [_, tokens, heads, _] = self.shape[..] else {
            return Vec::new();
        };
        let has_next = |row: &&usize| **row / heads % tokens + 1 < tokens;
        rows.iter()
            .filter(has_next)
            .map(|&row| (row, row + heads))
            .collect()
    }

    /// How far `answer` is off.
    pub(super) fn measure(&self, answer: &[f64]) -> TensorComparison {
        let is_exact = self.sdpa.as_ref().is_some_and(|sdpa| {
            Array::from_f64(sdpa.dtype, &sdpa.shape, answer).bytes == sdpa.bytes
        });
        let (channels, lambda) = (self.channels(), lambda());
        let mut comparison = TensorComparison {
            name: self.tensor.name().to_owned(),
            is_sum: self.tensor.is_head_state(),
            is_exact,
            numbers: self.right.len(),
            rows: self.right.len() / channels,
            wrong_numbers: 0,
            wrong_rows: 0,
            worst: None,
            tightness: 0.0,
            lean: 0.0,
            scale: fit_scale(&self.right, answer),
        };
        let (mut lean, mut leaning_rows) = (0.0, 0.0);
        for row in 0..comparison.rows {
            let (mut wrong, mut errors, mut roots) = (0, 0.0, 0.0);
            for channel in 0..channels {
                let number = row * channels + channel;
                let (is, right, root) = (answer[number], self.right[number], self.roots[number]);
                let error = is - right;
                let ratio = if error == 0.0 {
                    0.0
                } else {
                    error.abs() / (lambda * root)
                };
                // A NaN is infinitely far off.
                let ratio = if ratio.is_nan() { f64::INFINITY } else { ratio };
                if ratio > 1.0 {
                    wrong += 1;
                    if ratio > comparison.tightness {
                        comparison.worst = Some(WrongNumber {
                            place: self.place(row),
                            channel,
                            is,
                            right,
                            tolerance: lambda * root,
                        });
                    }
                }
                comparison.tightness = comparison.tightness.max(ratio);
                errors += error * right.signum();
                roots += root;
            }
            comparison.wrong_numbers += wrong;
            comparison.wrong_rows += usize::from(wrong > 0);
            if roots > 0.0 && errors.is_finite() {
                lean += errors / roots;
                leaning_rows += 1.0;
            }
        }
        if leaning_rows > 0.0 {
            comparison.lean = lean / f64::sqrt(leaning_rows) / lambda;
        }
        comparison
    }
}

/// The least-squares `alpha` of `answer = alpha * right + rest`, and the norm
/// of the rest relative to the answer's.
pub(super) fn fit_scale(right: &[f64], answer: &[f64]) -> (f64, f64) {
    let dot: f64 = right.iter().zip(answer).map(|(r, a)| r * a).sum();
    let squares: f64 = right.iter().map(|r| r * r).sum();
    let alpha = if squares > 0.0 { dot / squares } else { 0.0 };
    let rest: f64 = right
        .iter()
        .zip(answer)
        .map(|(r, a)| (a - alpha * r) * (a - alpha * r))
        .sum();
    let size: f64 = answer.iter().map(|a| a * a).sum();
    (alpha, (rest / size).sqrt())
}
