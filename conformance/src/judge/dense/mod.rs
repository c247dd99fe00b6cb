//! What honest attention makes of a case in its own element type: dense, on one
//! device, forward and backward by libtorch.
//!
//! The judge measures an implementation's errors by these, and calls an answer
//! exact that is bit-equal to the SDPA one. Attention is independent from head
//! to head, so that there is one right sequence of roundings for the output
//! and dQ. The gradient of a KV head is a sum over the query heads that attend
//! it, and a floating-point sum depends on its order: here it is taken by the
//! kernel within the query heads that one rank holds, and then over the ranks,
//! as in any implementation that adds up the copies that it sent out.
//!
//! Gradients of head state are given by token, `[batch, tokens, ..]`: what they
//! are off in sum is estimated from what their parts are off.

mod modifiers;
mod preparation;

use std::ops::Range;

use fixtures::{Array, Case, Input, Inputs, Mask, sharding};
use tch::{Kind, TchError, Tensor};

use self::modifiers::Modifiers;
use self::preparation::{Prepared, leaf};
use crate::oracle::Answer;
use crate::oracle::rotary;
use crate::oracle::scores::distances_of;
use crate::oracle::visibility;
use crate::tensor;

/// How attention is computed.
#[derive(Clone, Copy, Debug)]
pub(super) enum DenseKernel {
    /// libtorch's `scaled_dot_product_attention`.
    Sdpa,
    /// Products and a softmax, the softmax in float32 for half types.
    Eager,
}

impl DenseKernel {
    /// Whether this kernel can answer `case`: SDPA takes no scores but its own.
    pub(super) fn answers(self, case: &Case) -> bool {
        let extras = &case.extras;
        match self {
            DenseKernel::Sdpa => {
                !extras.alibi
                    && !extras.sinks
                    && extras.softcap.is_none()
                    && extras.dropout.is_none()
            }
            DenseKernel::Eager => true,
        }
    }
}

/// Output and gradients, `[batch, tokens, heads, channels]` each, in the case's
/// element type; of gradients of head state the part of every token.
pub(super) fn attention(
    case: &Case,
    inputs: &Inputs,
    kernel: DenseKernel,
    dropout: Option<&[f64]>,
) -> Result<Answer<Array>, TchError> {
    let by_heads = |array: &Array| tensor::from_array(array)?.f_transpose(1, 2);
    let angles = rotary::angles(case)?;
    let prepared = |array, norm| {
        let weight = inputs.get(norm).map(tensor::from_array).transpose()?;
        Prepared::new(by_heads(array)?, weight, angles.as_ref())
    };
    let queries = prepared(&inputs.q, Input::QueryNorm)?;
    let keys = prepared(&inputs.k, Input::KeyNorm)?;
    let (v, dout) = (by_heads(&inputs.v)?, by_heads(&inputs.dout)?);
    let modifiers = Modifiers::of(case, inputs, dropout)?;

    let (mut out, mut dq, mut dk, mut dv) = (vec![], vec![], vec![], vec![]);
    let (mut dslopes, mut dsinks) = (vec![], vec![]);
    for kv_head in 0..case.kv_heads {
        let (mut dk_copies, mut dv_copies) = (vec![], vec![]);
        for heads in by_rank(case, kv_head) {
            let query_heads = |tensor: &Tensor| narrow(tensor, &heads);
            let kv = |tensor: &Tensor| leaf(narrow(tensor, &(kv_head..kv_head + 1))?);
            let q = leaf(query_heads(&queries.heads)?)?;
            let (k, v) = (kv(&keys.heads)?, kv(&v)?);
            let modifiers = modifiers.of_heads(&heads)?;
            let answer = match kernel {
                DenseKernel::Sdpa => sdpa(case, &modifiers, &q, &k, &v)?,
                DenseKernel::Eager => eager(case, &modifiers, &q, &k, &v)?,
            };
            // The cotangent of the answer is exactly dO: backward of the sum
            // gives ones, and of the product dO times one.
            let products = answer.f_mul(&query_heads(&dout)?)?;
            products.f_sum(products.kind())?.f_backward()?;
            out.push(answer.f_detach()?);
            dq.push(q.f_grad()?);
            dk_copies.push(k.f_grad()?);
            dv_copies.push(v.f_grad()?);
            let of_rows = |leaf: &Tensor| leaf.f_grad()?.f_squeeze_dim(-1);
            dslopes.extend(modifiers.slopes.as_ref().map(of_rows).transpose()?);
            dsinks.extend(modifiers.sinks.as_ref().map(of_rows).transpose()?);
        }
        let sum = |copies: &[Tensor]| {
            Tensor::f_stack(copies, 0)?.f_sum_dim_intlist(0, false, copies[0].kind())
        };
        dk.push(sum(&dk_copies)?);
        dv.push(sum(&dv_copies)?);
    }

    let (dq, dq_norm) = queries.gradients(Tensor::f_cat(&dq, 1)?)?;
    let (dk, dk_norm) = keys.gradients(Tensor::f_cat(&dk, 1)?)?;
    let all_heads = |heads: &[Tensor]| match heads.is_empty() {
        true => Ok(None),
        false => Tensor::f_cat(heads, 1).map(Some),
    };
    let (out, dv) = (Tensor::f_cat(&out, 1)?, Tensor::f_cat(&dv, 1)?);
    let head_state = [all_heads(&dslopes)?, all_heads(&dsinks)?, dq_norm, dk_norm];
    let answer = Answer::new([out, dq, dk, dv], head_state);
    answer.try_map(|_, tensor| tensor::to_array(&tensor.f_transpose(1, 2)?, case.dtype))
}

/// The query heads that attend `kv_head`, one range for each rank that holds
/// some of them. Ranks hold contiguous query heads, the first of them one more
/// where there is a remainder. Outside training each rank holds all of them.
fn by_rank(case: &Case, kv_head: usize) -> impl Iterator<Item = Range<usize>> {
    let group = case.query_heads / case.kv_heads;
    let attending = kv_head * group..(kv_head + 1) * group;
    let world = if case.extras.eval { 1 } else { case.world };
    sharding::contiguous(case.query_heads, world)
        .into_iter()
        .map(move |rank| rank.start.max(attending.start)..rank.end.min(attending.end))
        .filter(|heads| !heads.is_empty())
}

fn narrow(tensor: &Tensor, heads: &Range<usize>) -> Result<Tensor, TchError> {
    tensor.f_narrow(1, heads.start as i64, heads.len() as i64)
}

fn sdpa(
    case: &Case,
    modifiers: &Modifiers,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
) -> Result<Tensor, TchError> {
    let grouped = q.size()[1] > 1;
    let scale = case.extras.scale.map(|_| case.score_scale());
    let attend = |mask: Option<&Tensor>, causal| {
        Tensor::f_scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale, grouped)
    };
    match &modifiers.sight {
        Some(sight) if !visibility::is_plain(case) => {
            attend(Some(&sight.open), false)?.f_masked_fill(&sight.blind, 0.0)
        }
        _ => attend(None, case.mask == Mask::Causal),
    }
}

fn eager(
    case: &Case,
    modifiers: &Modifiers,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
) -> Result<Tensor, TchError> {
    let mut scores = q
        .f_matmul(&k.f_transpose(2, 3)?)?
        .f_mul_scalar(case.score_scale())?;
    if let Some(cap) = case.extras.softcap.map(f64::from) {
        scores = scores.f_div_scalar(cap)?.f_tanh()?.f_mul_scalar(cap)?;
    }
    let (rows, keys) = (case.sequence as i64, case.kv_sequence() as i64);
    if let Some(slopes) = &modifiers.slopes {
        let distances = distances_of(0, rows, keys)?.f_to_kind(q.kind())?;
        scores = scores.f_sub(&slopes.f_mul(&distances)?)?;
    }
    if let Some(sight) = &modifiers.sight {
        scores = scores.f_masked_fill(&sight.open.f_logical_not()?, f64::NEG_INFINITY)?;
    }
    if let Some(sinks) = &modifiers.sinks {
        scores = Tensor::f_cat(&[&scores, sinks], -1)?;
    }
    let softmax_kind = match q.kind() {
        Kind::Double => Kind::Double,
        _ => Kind::Float,
    };
    let weights = scores.f_softmax(-1, softmax_kind)?.f_to_kind(q.kind())?;
    // Without what the sink takes.
    let mut weights = weights.f_narrow(-1, 0, keys)?;
    if let Some(sight) = &modifiers.sight {
        weights = weights.f_masked_fill(&sight.blind, 0.0)?;
    }
    if let Some(multiplier) = &modifiers.dropout {
        weights = weights.f_mul(multiplier)?;
    }
    weights.f_matmul(v)
}
