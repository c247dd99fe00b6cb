//! How far an answer is off, row by row, and how far an honest one may be.
//!
//! A row is the vector of one head of one token: `head size` numbers that the
//! same rounding errors made. Its error is the norm of its difference from the
//! float64 oracle. An honest implementation in the case's element type makes
//! about the error there that dense attention in this element type makes, so a
//! row may be off by
//!
//! ```text
//! SLACK * (dense + u * norm + w * typical)
//! ```
//!
//! - `dense`: the larger of what dense SDPA and dense eager attention are off
//!   on this very row;
//! - `u`: the unit roundoff of the element type;
//! - `norm`: the norm of the right row: its elements are rounded at least once;
//! - `w`: the unit roundoff in which sums are taken, float32's for half types;
//! - `typical`: the root mean square of the norms of this head's rows: a row
//!   that is zero or small by cancellation, as the first row of dQ under a
//!   causal mask, carries the rounding of what cancelled.
//!
//! [`SLACK`] is the one number in it that is chosen, not measured.

use fixtures::{Array, Case, Dtype, Input, Inputs, sharding};

use super::Verdict;
use super::dense::{self, DenseKernel};
use crate::oracle::Answer;

/// How many times as far off as dense attention a row may be. The norms of two
/// independent normal errors of the same size over 16 channels differ by a
/// factor of 4 in one row of a million (the F distribution with 16 and 16
/// degrees of freedom), over 64 channels practically never.
pub const SLACK: f64 = 4.0;

/// How the four tensors of an answer compare with the right ones.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// In the order of [`Answer::NAMES`].
    pub tensors: [TensorComparison; 4],
}

/// How one tensor compares with the right one.
#[derive(Clone, Debug)]
pub struct TensorComparison {
    /// `out`, `dq`, `dk` or `dv`.
    pub name: &'static str,
    /// Whether it is bit-equal to dense SDPA.
    pub is_exact: bool,
    /// Its rows.
    pub rows: usize,
    /// How many rows are further off than they may be.
    pub wrong_rows: usize,
    /// The row that is furthest beyond what it may be off, if any is.
    pub worst: Option<WrongRow>,
    /// The largest ratio of a row's error to what it may be.
    pub tightness: f64,
    /// The `alpha` for which `alpha * right` is nearest to the answer, and what
    /// remains then, relative to the answer.
    pub scale: (f64, f64),
}

/// A row that is further off than it may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WrongRow {
    /// Which sequence of the batch.
    pub batch: usize,
    /// The token's position in the whole sequence.
    pub token: usize,
    /// The query head, or for dk and dv the KV head.
    pub head: usize,
    /// The norm of its error.
    pub error: f64,
    /// What that may be.
    pub bound: f64,
    /// The norm of the right row.
    pub norm: f64,
}

/// Compares `answer` with `right`, the oracle's. An error means that there is
/// nothing to measure by.
pub(super) fn compare(
    case: &Case,
    inputs: &Inputs,
    right: &Answer<Vec<f64>>,
    answer: &Answer<Array>,
) -> Result<Comparison, String> {
    let [sdpa, eager] = [DenseKernel::Sdpa, DenseKernel::Eager].map(|kernel| {
        dense::attention(case, inputs, kernel)
            .map_err(|error| format!("dense {kernel:?} attention failed: {error}"))
    });
    let (sdpa, eager) = (sdpa?, eager?);
    let likes = [Input::Query, Input::Query, Input::Key, Input::Value];
    let compare_tensor = |i: usize| {
        let rows = Rows {
            tokens: case.sequence,
            heads: likes[i].heads(case),
            channels: case.head_size,
            dtype: case.dtype,
        };
        let name = Answer::<Array>::NAMES[i];
        let (answer, sdpa) = (answer.tensors()[i], sdpa.tensors()[i]);
        let baselines = [sdpa.to_f64(), eager.tensors()[i].to_f64()];
        if !baselines.iter().flatten().all(|x| x.is_finite()) {
            return Err(format!(
                "`{name}` of dense attention in {} is not finite here",
                case.dtype
            ));
        }
        let mut comparison = rows.compare(name, right.tensors()[i], &baselines, &answer.to_f64());
        comparison.is_exact = answer.bytes == sdpa.bytes;
        Ok(comparison)
    };
    Ok(Comparison {
        tensors: [
            compare_tensor(0)?,
            compare_tensor(1)?,
            compare_tensor(2)?,
            compare_tensor(3)?,
        ],
    })
}

/// How the numbers of a tensor `[batch, tokens, heads, channels]` lie in rows.
struct Rows {
    tokens: usize,
    heads: usize,
    channels: usize,
    dtype: Dtype,
}

impl Rows {
    fn compare(
        &self,
        name: &'static str,
        right: &[f64],
        baselines: &[Vec<f64>; 2],
        answer: &[f64],
    ) -> TensorComparison {
        let u = self.dtype.unit_roundoff();
        let w = u.min(Dtype::F32.unit_roundoff());
        let norms: Vec<f64> = right.chunks(self.channels).map(norm).collect();
        let typical = self.typical_norms(&norms);
        let mut comparison = TensorComparison {
            name,
            is_exact: false,
            rows: norms.len(),
            wrong_rows: 0,
            worst: None,
            tightness: 0.0,
            scale: fit_scale(right, answer),
        };
        for (i, &norm) in norms.iter().enumerate() {
            let row = i * self.channels..(i + 1) * self.channels;
            let off = |other: &[f64]| distance(&other[row.clone()], &right[row.clone()]);
            let dense = off(&baselines[0]).max(off(&baselines[1]));
            let (batch, token, head) = self.place(i);
            let bound = SLACK * (dense + u * norm + w * typical[batch * self.heads + head]);
            let error = off(answer);
            let ratio = if error == 0.0 { 0.0 } else { error / bound };
            // A row that holds a NaN is infinitely far off.
            let ratio = if ratio.is_nan() { f64::INFINITY } else { ratio };
            if ratio > 1.0 {
                comparison.wrong_rows += 1;
                if ratio > comparison.tightness {
                    comparison.worst = Some(WrongRow {
                        batch,
                        token,
                        head,
                        error,
                        bound,
                        norm,
                    });
                }
            }
            comparison.tightness = comparison.tightness.max(ratio);
        }
        comparison
    }

    /// (batch, token, head) of the i-th row.
    fn place(&self, i: usize) -> (usize, usize, usize) {
        let (token, head) = (i / self.heads, i % self.heads);
        (token / self.tokens, token % self.tokens, head)
    }

    /// The root mean square of the rows' norms, for each batch and head.
    fn typical_norms(&self, norms: &[f64]) -> Vec<f64> {
        let batches = norms.len() / (self.tokens * self.heads);
        let mut squares = vec![0.0; batches * self.heads];
        for (i, norm) in norms.iter().enumerate() {
            let (batch, _, head) = self.place(i);
            squares[batch * self.heads + head] += norm * norm;
        }
        let mean = |sum: f64| (sum / self.tokens as f64).sqrt();
        squares.into_iter().map(mean).collect()
    }
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

impl Comparison {
    /// Exact, pass or fail; the first that holds.
    pub(super) fn verdict(&self) -> Verdict {
        let all = |f: fn(&TensorComparison) -> bool| self.tensors.iter().all(f);
        if all(|tensor| tensor.is_exact) {
            Verdict::Exact
        } else if all(|tensor| tensor.wrong_rows == 0) {
            Verdict::Pass
        } else {
            Verdict::Fail
        }
    }

    fn wrong(&self) -> impl Iterator<Item = &TensorComparison> {
        self.tensors.iter().filter(|tensor| tensor.wrong_rows > 0)
    }

    /// What is wrong, in a sentence; empty where nothing is.
    pub(super) fn sentence(&self) -> String {
        let names: Vec<_> = self.wrong().map(|tensor| tensor.name).collect();
        match names.as_slice() {
            [] => String::new(),
            [one] => format!("{one} is wrong"),
            [more @ .., last] => format!("{} and {last} are wrong", more.join(", ")),
        }
    }

    /// A line for each wrong tensor, and one for its worst row.
    pub(super) fn details(&self, case: &Case) -> Vec<String> {
        self.wrong()
            .flat_map(|tensor| [tensor.describe(), tensor.describe_worst(case)])
            .collect()
    }
}

impl TensorComparison {
    fn describe(&self) -> String {
        let (alpha, rest) = self.scale;
        let scale = if rest < 0.05 {
            format!("; it is {alpha:.3} times the right one")
        } else {
            String::new()
        };
        let (wrong, rows, name) = (self.wrong_rows, self.rows, self.name);
        format!("{name}: {wrong} of {rows} rows are off by more than they may{scale}")
    }

    fn describe_worst(&self, case: &Case) -> String {
        let Some(worst) = self.worst else {
            return String::new();
        };
        let shards = sharding::contiguous(case.sequence, case.world);
        let rank = shards
            .iter()
            .position(|shard| shard.contains(&worst.token))
            .unwrap_or_default();
        format!(
            "{}: worst at batch {}, head {}, token {} (rank {rank}, its token {}): off by {:.2e}, \
             may be {:.2e}, the right row's norm is {:.2e}",
            self.name,
            worst.batch,
            worst.head,
            worst.token,
            worst.token - shards[rank].start,
            worst.error,
            worst.bound,
            worst.norm,
        )
    }
}
