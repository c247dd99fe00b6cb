//! The right answer: dense attention and its gradients, in float64, on one
//! device.
//!
//! Row block by row block, so that a bounded number of rows of the score
//! matrix exists at a time. The gradients are written out, not left to
//! autograd: with P = softmax(S), a dropout multiplier M, 1 where there is
//! none, and O = (P * M) V,
//!
//! ```text
//! dV = (P * M)^T dO     dP = M * dO V^T     dS = P * (dP - rowsum(dO * O))
//! ```
//!
//! and with scores S = scale Q K^T
//!
//! ```text
//! dQ = scale dS K       dK = scale dS^T Q
//! ```
//!
//! (Dao et al., "FlashAttention", 2022, appendix B.2). A sink that takes the
//! part p of a row has the gradient -p rowsum(dO * O). What happens to scores
//! before the softmax is in `scores.rs`, what happens to queries and keys
//! before they meet in `preparation.rs`, which keys a query sees in
//! `visibility.rs`. A test holds each gradient against finite differences of
//! the forward.
//!
//! Deliberately not here: anything of the reference's. How a case is sharded,
//! laid out in memory, recomputed or asked outside training does not change the
//! dense answer, nor do layers that skip attention.

mod answer;
mod batch;
pub(crate) mod due;
mod loss;
mod mesh;
mod model;
mod precision;
mod preparation;
mod problem;
pub(crate) mod rotary;
mod rounding;
mod scores;
mod sensitivity;
mod tiled;
pub(crate) mod visibility;

use fixtures::exchange::Precision;
use fixtures::{AttentionCase, Inputs};
use tch::{Device, Kind, TchError, Tensor};

use self::precision::Roundoffs;
use self::sensitivity::Roundings;

pub use self::answer::{Answer, AnswerTensor};
pub(crate) use self::preparation::NORM_EPSILON;
pub(crate) use self::problem::Problem;

/// The right answer to `case` for `inputs`, in float64, without dropout. Each
/// tensor is in row-major order of [`AnswerTensor::shape`].
///
/// # Errors
///
/// If libtorch says so.
pub fn attention(case: &AttentionCase, inputs: &Inputs) -> Result<Answer<Vec<f64>>, TchError> {
    attention_dropped(case, inputs, None)
}

/// The right answer where attention weights are multiplied by `dropout`,
/// `[batch, query heads, tokens, KV tokens]` in row-major order: 0 for one that
/// is dropped, `1 / (1 - probability)` for one that is kept.
///
/// # Errors
///
/// If `dropout` has not that many elements, or libtorch says so.
pub fn attention_dropped(
    case: &AttentionCase,
    inputs: &Inputs,
    dropout: Option<&[f64]>,
) -> Result<Answer<Vec<f64>>, TchError> {
    let problem = Problem::of(case, inputs)?.with_dropout(dropout)?;
    numbers(problem.solve()?)
}

/// The right answer, and how far roundings move it.
pub struct Rounded {
    /// The right answer.
    pub right: Answer<Vec<f64>>,
    /// For each number of it: by how much each rounding that attention makes may
    /// move it, squared, summed over all of them; and the root of that.
    pub roots: Answer<Vec<f64>>,
}

/// The right answer, computed on this device, and how far it is moved by the
/// roundings that attention makes in the case's element type and by this
/// precision profile.
///
/// # Errors
///
/// As for [`attention_dropped`].
pub fn attention_rounded(
    case: &AttentionCase,
    inputs: &Inputs,
    (precision, device): (Precision, Device),
    dropout: Option<&[f64]>,
) -> Result<Rounded, TchError> {
    let problem = Problem::of(case, inputs)?.with_dropout(dropout)?;
    let problem = problem.on(device)?;
    rounded(&problem, Roundoffs::of(case.dtype, precision))
}

/// The same with one kind of rounding alone: for each kind what it is, the unit
/// roundoff, and how far it moves the answer.
///
/// # Errors
///
/// As for [`attention_dropped`].
pub(crate) fn attention_rounded_in_parts(
    case: &AttentionCase,
    inputs: &Inputs,
    precision: Precision,
) -> Result<Vec<(&'static str, f64, Rounded)>, TchError> {
    let problem = Problem::of(case, inputs)?;
    let parts = Roundoffs::of(case.dtype, precision).parts().into_iter();
    parts
        .filter(|(_, roundoff, _)| *roundoff > 0.0)
        .map(|(words, roundoff, part)| Ok((words, roundoff, rounded(&problem, part)?)))
        .collect()
}

fn rounded(problem: &Problem, roundoffs: Roundoffs) -> Result<Rounded, TchError> {
    let (answer, squares) = problem.solve_with(Some(Roundings::new(roundoffs)))?;
    let squares = squares.ok_or_else(|| TchError::Shape("roundings were asked for".to_owned()))?;
    Ok(Rounded {
        right: numbers(answer)?,
        roots: squares.try_map(|_, squares| elements(&squares.f_sqrt()?))?,
    })
}

/// The numbers of an answer, gradients of head state summed over tokens.
pub(crate) fn numbers(answer: Answer<Tensor>) -> Result<Answer<Vec<f64>>, TchError> {
    answer.try_map(|name, tensor| {
        let tensor = match name.is_head_state() {
            true => tensor.f_sum_dim_intlist([0, 1].as_slice(), false, Kind::Double)?,
            false => tensor,
        };
        elements(&tensor)
    })
}

/// The elements of a tensor in row-major order.
pub(crate) fn elements(tensor: &Tensor) -> Result<Vec<f64>, TchError> {
    Vec::try_from(tensor.f_contiguous()?.f_view([-1])?)
}
