//! What dense SDPA makes of a case in its own element type, on one device,
//! forward and backward by libtorch.
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
use tch::{TchError, Tensor};

use self::preparation::{Prepared, leaf};
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
pub(super) fn attention(case: &AttentionCase, inputs: &Inputs) -> Result<Answer<Array>, TchError> {
    let by_heads = |array: &Array| tensor::from_array(array)?.f_transpose(1, 2);
    let angles = rotary::angles(case)?;
    let prepared = |array, norm| {
        let weight = inputs.get(norm).map(tensor::from_array).transpose()?;
        Prepared::new(by_heads(array)?, weight.as_ref(), angles.as_ref())
    };
    let queries = prepared(&inputs.q, Input::QueryNorm)?;
    let keys = prepared(&inputs.k, Input::KeyNorm)?;
    let (v, dout) = (by_heads(&inputs.v)?, by_heads(&inputs.dout)?);
    let sight = Sight::of(case)?;

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
            let answer = sdpa(case, sight.as_ref(), &q, &k, &v)?;
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
    fn of(case: &AttentionCase) -> Result<Option<Sight>, TchError> {
        if visibility::is_plain(case) {
            return Ok(None);
        }
        let seen = Visibility::of(case).of_rows(0, case.sequence)?;
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

fn sdpa(
    case: &AttentionCase,
    sight: Option<&Sight>,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
) -> Result<Tensor, TchError> {
    let grouped = q.size()[1] > 1;
    let scale = case.extras.scale.map(|_| case.score_scale());
    let attend = |mask: Option<&Tensor>, causal| {
        Tensor::f_scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale, grouped)
    };
    match sight {
        Some(sight) => attend(Some(&sight.open), false)?.f_masked_fill(&sight.blind, 0.0),
        None => attend(None, case.mask == Mask::Causal),
    }
}
