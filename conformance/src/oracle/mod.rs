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
mod preparation;
pub(crate) mod rotary;
mod roundings;
pub(crate) mod scores;
pub(crate) mod visibility;

use fixtures::{Array, Case, Input, Inputs};
use tch::{Kind, TchError, Tensor};

use self::preparation::Prepared;
use self::roundings::{Block, Roundings};
use self::scores::Scoring;
use self::visibility::Visibility;
use crate::tensor;

pub use self::answer::{Answer, AnswerTensor};
pub(crate) use self::preparation::NORM_EPSILON;
pub(crate) use self::roundings::Deviations;

/// Rows of the score matrix that exist at a time.
const ROW_BLOCK: usize = 128;

/// The right answer to `case` for `inputs`, in float64, without dropout. Each
/// tensor is in row-major order of [`AnswerTensor::shape`].
///
/// # Errors
///
/// If libtorch says so.
pub fn attention(case: &Case, inputs: &Inputs) -> Result<Answer<Vec<f64>>, TchError> {
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
    case: &Case,
    inputs: &Inputs,
    dropout: Option<&[f64]>,
) -> Result<Answer<Vec<f64>>, TchError> {
    let (answer, _) = solve(case, inputs, dropout, None)?;
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

/// The right answer, but of each gradient of head state the parts of every
/// token: `[batch, tokens, ..]`, of which the sum is the gradient; and how far
/// rounding in the case's element type moves the other tensors' rows.
pub(crate) fn by_token(
    case: &Case,
    inputs: &Inputs,
    dropout: Option<&[f64]>,
) -> Result<(Answer<Tensor>, Deviations), TchError> {
    let is_prepared = case.extras.norms || case.extras.rotary.is_some();
    let roundings = Roundings::new(case.dtype, case.score_scale(), is_prepared);
    match solve(case, inputs, dropout, Some(roundings))? {
        (answer, Some(deviations)) => Ok((answer, deviations)),
        (_, None) => Err(TchError::Shape("roundings were asked for".to_owned())),
    }
}

fn solve(
    case: &Case,
    inputs: &Inputs,
    dropout: Option<&[f64]>,
    mut roundings: Option<Roundings>,
) -> Result<(Answer<Tensor>, Option<Deviations>), TchError> {
    let norm_weight = |input| inputs.get(input).map(float64).transpose();
    let angles = rotary::angles(case)?;
    let prepared =
        |array, weight| Prepared::new(by_heads(array)?, norm_weight(weight)?, angles.as_ref());
    let queries = prepared(&inputs.q, Input::QueryNorm)?;
    let keys = prepared(&inputs.k, Input::KeyNorm)?;
    let dout = by_heads(&inputs.dout)?;
    let kv_heads = kv_head_of_each_query_head(case)?;
    let k = keys.heads.f_index_select(1, &kv_heads)?;
    let v = by_heads(&inputs.v)?.f_index_select(1, &kv_heads)?;
    let (k_transposed, v_transposed) = (k.f_transpose(2, 3)?, v.f_transpose(2, 3)?);
    let scoring = Scoring::of(case, inputs)?;
    let visibility = Visibility::of(case);
    let dropout = dropout
        .map(|multiplier| multiplier_of(case, multiplier))
        .transpose()?;

    let (mut out, mut dq) = (Vec::new(), Vec::new());
    let (mut dslopes, mut dsinks) = (Vec::new(), Vec::new());
    let (mut dk, mut dv) = (k.f_zeros_like()?, v.f_zeros_like()?);
    for first in (0..case.sequence).step_by(ROW_BLOCK) {
        let rows = ROW_BLOCK.min(case.sequence - first);
        let block = |tensor: &Tensor| tensor.f_narrow(2, first as i64, rows as i64);
        let (q, dout) = (block(&queries.heads)?, block(&dout)?);
        let dropped = |weights: &Tensor| match &dropout {
            Some(multiplier) => weights.f_mul(&block(multiplier)?),
            None => Ok(weights.shallow_clone()),
        };
        let seen = match visibility.is_full() {
            true => None,
            false => Some(visibility.of_rows(first, rows)?),
        };
        let products = q.f_matmul(&k_transposed)?;
        let scored = scoring.weights(&products, seen.as_ref(), first as i64)?;
        let weights = dropped(&scored.weights)?;
        let out_block = weights.f_matmul(&v)?;
        let dout_dot_out =
            dout.f_mul(&out_block)?
                .f_sum_dim_intlist([-1].as_slice(), true, Kind::Double)?;
        let dweights = dropped(&dout.f_matmul(&v_transposed)?)?;
        let dscores = scored.weights.f_mul(&dweights.f_sub(&dout_dot_out)?)?;
        let (dproducts, dslopes_block) = scoring.gradients(&scored, &dscores)?;
        if let Some(of_sink) = &scored.of_sink {
            dsinks.push(of_sink.f_mul(&dout_dot_out)?.f_neg()?.f_squeeze_dim(-1)?);
        }
        dslopes.extend(dslopes_block);
        let dq_block = dproducts.f_matmul(&k)?;
        if let Some(roundings) = &mut roundings {
            roundings.add(&Block {
                q: &q,
                k: &k,
                v: &v,
                dout: &dout,
                scores: &products.f_mul_scalar(case.score_scale())?,
                of_cap: scored.of_cap.as_ref(),
                softmax: &scored.weights,
                weights: &weights,
                out: &out_block,
                dweights: &dweights,
                dout_dot_out: &dout_dot_out,
                dscores: &dscores,
                dproducts: &dproducts,
                dq: &dq_block,
            })?;
        }
        dq.push(dq_block);
        dk = dk.f_add(&dproducts.f_transpose(2, 3)?.f_matmul(&q)?)?;
        dv = dv.f_add(&weights.f_transpose(2, 3)?.f_matmul(&dout)?)?;
        out.push(out_block);
    }

    // A KV head's gradient is the sum over the query heads that attend it.
    let sum_groups = |expanded: &Tensor| -> Result<Tensor, TchError> {
        let mut shape = expanded.size();
        shape[1] = case.kv_heads as i64;
        Tensor::f_zeros(&shape, (Kind::Double, expanded.device()))?
            .f_index_add(1, &kv_heads, expanded)
    };
    let deviations = roundings
        .map(|roundings| roundings.finish([&dk, &dv], sum_groups, [&queries, &keys]))
        .transpose()?;
    let (dq, dq_norm) = queries.gradients(Tensor::f_cat(&dq, 2)?)?;
    let (dk, dk_norm) = keys.gradients(sum_groups(&dk)?)?;
    let whole = |blocks: &[Tensor]| match blocks.is_empty() {
        true => Ok(None),
        false => Tensor::f_cat(blocks, 2).map(Some),
    };
    let (out, dv) = (Tensor::f_cat(&out, 2)?, sum_groups(&dv)?);
    let head_state = [whole(&dslopes)?, whole(&dsinks)?, dq_norm, dk_norm];
    let answer = Answer::new([out, dq, dk, dv], head_state);
    // [batch, heads, tokens, ..] -> [batch, tokens, heads, ..]
    let answer = answer.try_map(|_, tensor| tensor.f_transpose(1, 2))?;
    Ok((answer, deviations))
}

fn float64(array: &Array) -> Result<Tensor, TchError> {
    tensor::from_array(array)?.f_to_kind(Kind::Double)
}

/// `[batch, tokens, heads, head size]` to `[batch, heads, tokens, head size]`.
fn by_heads(array: &Array) -> Result<Tensor, TchError> {
    float64(array)?.f_transpose(1, 2)
}

fn multiplier_of(case: &Case, multiplier: &[f64]) -> Result<Tensor, TchError> {
    let shape = [
        case.batch,
        case.query_heads,
        case.sequence,
        case.kv_sequence(),
    ];
    Tensor::f_from_slice(multiplier)?.f_view(shape.map(|size| size as i64))
}

/// For query heads 0, 1, 2, ..: the KV head that each attends.
fn kv_head_of_each_query_head(case: &Case) -> Result<Tensor, TchError> {
    let heads: Vec<i64> = (0..case.query_heads)
        .map(|head| case.kv_head_of(head) as i64)
        .collect();
    Tensor::f_from_slice(&heads)
}
