//! What dense attention makes of a case in its own element type, by the kernel
//! and on the device of who is judged, forward and backward by libtorch.
//!
//! The judge calls an answer exact that is bit-equal to it. Attention is
//! independent from head to head, so that there is one right sequence of
//! roundings for the output and dQ. The gradient of a KV head is a sum over the
//! query heads that attend it, and a floating-point sum depends on its order:
//! here it is taken by the kernel within the query heads that one rank holds,
//! and then over the ranks, as in any implementation that adds up the copies
//! that it sent out. Gradients of head state are sums over ranks in no order of
//! their own, and are not here.

mod preparation;

use std::ops::Range;

use fixtures::{Array, AttentionCase, Input, Inputs, Mask, sharding};
use tch::{Device, Kind, TchError, Tensor};
use ulysses::Kernel;

use self::preparation::{Prepared, leaf};
use crate::implementation::Means;
use crate::oracle::Answer;
use crate::oracle::rotary;
use crate::oracle::visibility::{self, Visibility};
use crate::tensor;

/// Whether SDPA answers `case`: it takes no scores but its own.
pub(super) fn is_dense_sdpa(case: &AttentionCase) -> bool {
    let extras = &case.extras;
    !extras.alibi && !extras.sinks && extras.softcap.is_none() && extras.dropout.is_none()
}

/// Output and gradients, `[batch, tokens, heads, channels]` each, in the case's
/// element type.
pub(super) fn attention(
    case: &AttentionCase,
    inputs: &Inputs,
    means: Means,
) -> Result<Answer<Array>, TchError> {
    let on_device = |array: &Array| tensor::from_array_on(means.device, array);
    let by_heads = |array: &Array| on_device(array)?.f_transpose(1, 2);
    let angles = rotary::angles(case)?;
    let angles = angles.map(|angles| angles.f_to_device(means.device));
    let angles = angles.transpose()?;
    let prepared = |array, norm| {
        let weight = inputs.get(norm).map(on_device).transpose()?;
        Prepared::new(by_heads(array)?, weight.as_ref(), angles.as_ref())
    };
    let queries = prepared(&inputs.q, Input::QueryNorm)?;
    let keys = prepared(&inputs.k, Input::KeyNorm)?;
    let (v, dout) = (by_heads(&inputs.v)?, by_heads(&inputs.dout)?);
    let sight = Sight::of(case, means.device)?;

    let (mut out, mut dq, mut dk, mut dv) = (vec![], vec![], vec![], vec![]);
    for kv_head in 0..case.kv_heads {
        let (mut dk_copies, mut dv_copies) = (vec![], vec![]);
        for heads in by_rank(case, kv_head) {
            let query_heads = |tensor: &Tensor| narrow(tensor, &heads);
            let kv = |tensor: &Tensor| leaf(narrow(tensor, &(kv_head..kv_head + 1))?);
            let q = leaf(query_heads(&queries.heads)?)?;
            let (k, v) = (kv(&keys.heads)?, kv(&v)?);
            let sight = sight
                .as_ref()
                .map(|sight| sight.of_heads(&heads))
                .transpose()?;
            let answer = dense(case, means.kernel, sight.as_ref(), [&q, &k, &v])?;
            // The cotangent of the answer is exactly dO: backward of the sum
            // gives ones, and of the product dO times one.
            let products = answer.f_mul(&query_heads(&dout)?)?;
            products.f_sum(products.kind())?.f_backward()?;
            out.push(answer.f_detach()?);
            dq.push(q.f_grad()?);
            dk_copies.push(k.f_grad()?);
            dv_copies.push(v.f_grad()?);
        }
        let sum = |copies: &[Tensor]| {
            Tensor::f_stack(copies, 0)?.f_sum_dim_intlist(0, false, copies[0].kind())
        };
        dk.push(sum(&dk_copies)?);
        dv.push(sum(&dv_copies)?);
    }

    let dq = queries.gradient(Tensor::f_cat(&dq, 1)?)?;
    let dk = keys.gradient(Tensor::f_cat(&dk, 1)?)?;
    let (out, dv) = (Tensor::f_cat(&out, 1)?, Tensor::f_cat(&dv, 1)?);
    let answer = Answer::new([out, dq, dk, dv], [const { None }; 4]);
    answer.try_map(|_, tensor| tensor::to_array(&tensor.f_transpose(1, 2)?, case.dtype))
}

/// Which keys are seen. A softmax over nothing is not a number, and neither is
/// its derivative: a query that sees nothing is let see everything, and its
/// answer is made zero thereafter.
struct Sight {
    /// Whether a query is let see a key.
    open: Tensor,
    /// Whether a query sees nothing.
    blind: Tensor,
}

impl Sight {
    /// That of a case whose mask is not all that hides a key.
    fn of(case: &AttentionCase, device: Device) -> Result<Option<Sight>, TchError> {
        if visibility::is_plain(case) {
            return Ok(None);
        }
        let seen = Visibility::of(case).of_rows(0, case.sequence)?;
        let seen = seen.f_to_device(device)?;
        let blind = seen.f_any_dim(-1, true)?.f_logical_not()?;
        let open = seen.f_logical_or(&blind)?;
        Ok(Some(Sight { open, blind }))
    }

    fn of_heads(&self, heads: &Range<usize>) -> Result<Sight, TchError> {
        let of_heads = |tensor: &Tensor| match tensor.size()[1] {
            1 => Ok(tensor.shallow_clone()),
            _ => narrow(tensor, heads),
        };
        Ok(Sight {
            open: of_heads(&self.open)?,
            blind: of_heads(&self.blind)?,
        })
    }
}

/// The query heads that attend `kv_head`, one range for each rank that holds
/// some of them. Ranks hold contiguous query heads, the first of them one more
/// where there is a remainder. Outside training each rank holds all of them.
fn by_rank(case: &AttentionCase, kv_head: usize) -> impl Iterator<Item = Range<usize>> {
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

fn dense(
    case: &AttentionCase,
    kernel: Kernel,
    sight: Option<&Sight>,
    inputs: [&Tensor; 3],
) -> Result<Tensor, TchError> {
    let attend = |mask: Option<&Tensor>, causal| match kernel {
        Kernel::Eager => eager(case, inputs, mask, causal),
        _ => kernel.alone(|| sdpa(case, inputs, mask, causal)),
    };
    match sight {
        Some(sight) => attend(Some(&sight.open), false)?.f_masked_fill(&sight.blind, 0.0),
        None => attend(None, case.mask == Mask::Causal),
    }
}

fn sdpa(
    case: &AttentionCase,
    [q, k, v]: [&Tensor; 3],
    mask: Option<&Tensor>,
    causal: bool,
) -> Result<Tensor, TchError> {
    let grouped = q.size()[1] > 1;
    let scale = case.extras.scale.map(|_| case.score_scale());
    Tensor::f_scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale, grouped)
}

/// Operation by operation, as transformers' `eager_attention_forward`: each in
/// the element type, but for the softmax of half types, which is in float32.
fn eager(
    case: &AttentionCase,
    [q, k, v]: [&Tensor; 3],
    mask: Option<&Tensor>,
    causal: bool,
) -> Result<Tensor, TchError> {
    let kind = q.f_kind()?;
    let compute = match kind {
        Kind::Double => Kind::Double,
        _ => Kind::Float,
    };
    let group = |kv: &Tensor| kv.f_expand([-1, q.size()[1], -1, -1], false);
    let (k, v) = (group(k)?, group(v)?);
    let scores = q.f_matmul(&k.f_transpose(2, 3)?)?;
    let mut scores = scores
        .f_mul_scalar(case.score_scale())?
        .f_to_kind(compute)?;
    let sizes = [q.size()[2], k.size()[2]];
    let past = || Tensor::f_ones(sizes, (Kind::Bool, q.device()))?.f_tril(0);
    let seen = match mask {
        Some(mask) => Some(mask.shallow_clone()),
        None => causal.then(past).transpose()?,
    };
    if let Some(seen) = seen {
        scores = scores.f_masked_fill(&seen.f_logical_not()?, f64::NEG_INFINITY)?;
    }
    scores.f_softmax(-1, None)?.f_to_kind(kind)?.f_matmul(&v)
}
