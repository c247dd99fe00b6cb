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

use std::ops::Range;

use fixtures::{Array, Case, Inputs, Mask, sharding};
use tch::{Kind, TchError, Tensor};

use crate::oracle::Answer;
use crate::tensor;

/// How attention is computed.
#[derive(Clone, Copy, Debug)]
pub(super) enum DenseKernel {
    /// libtorch's `scaled_dot_product_attention`.
    Sdpa,
    /// Products and a softmax, the softmax in float32 for half types.
    Eager,
}

/// Output and gradients, `[batch, tokens, heads, head size]` each, in the
/// case's element type.
pub(super) fn attention(
    case: &Case,
    inputs: &Inputs,
    kernel: DenseKernel,
) -> Result<Answer<Array>, TchError> {
    let by_heads = |array: &Array| tensor::from_array(array)?.f_transpose(1, 2);
    let (q, k, v, dout) = (
        by_heads(&inputs.q)?,
        by_heads(&inputs.k)?,
        by_heads(&inputs.v)?,
        by_heads(&inputs.dout)?,
    );
    let (mut out, mut dq, mut dk, mut dv) = (vec![], vec![], vec![], vec![]);
    for kv_head in 0..case.kv_heads {
        let (mut dk_copies, mut dv_copies) = (vec![], vec![]);
        for heads in by_rank(case, kv_head) {
            let query_heads = |tensor: &Tensor| narrow(tensor, &heads);
            let kv = |tensor: &Tensor| leaf(narrow(tensor, &(kv_head..kv_head + 1))?);
            let (q, k, v) = (leaf(query_heads(&q)?)?, kv(&k)?, kv(&v)?);
            let answer = match kernel {
                DenseKernel::Sdpa => sdpa(case, &q, &k, &v)?,
                DenseKernel::Eager => eager(case, &q, &k, &v)?,
            };
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
    let answer = Answer { out, dq, dk, dv };
    answer.try_map(|heads| {
        let tensor = Tensor::f_cat(&heads, 1)?;
        tensor::to_array(&tensor.f_transpose(1, 2)?, case.dtype)
    })
}

/// The query heads that attend `kv_head`, one range for each rank that holds
/// some of them. Ranks hold contiguous query heads, the first of them one more
/// where there is a remainder.
fn by_rank(case: &Case, kv_head: usize) -> impl Iterator<Item = Range<usize>> {
    let group = case.query_heads / case.kv_heads;
    let attending = kv_head * group..(kv_head + 1) * group;
    sharding::contiguous(case.query_heads, case.world)
        .into_iter()
        .map(move |rank| rank.start.max(attending.start)..rank.end.min(attending.end))
        .filter(|heads| !heads.is_empty())
}

fn narrow(tensor: &Tensor, heads: &Range<usize>) -> Result<Tensor, TchError> {
    tensor.f_narrow(1, heads.start as i64, heads.len() as i64)
}

fn leaf(tensor: Tensor) -> Result<Tensor, TchError> {
    tensor.f_contiguous()?.f_detach()?.f_set_requires_grad(true)
}

fn sdpa(case: &Case, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, TchError> {
    let causal = case.mask == Mask::Causal;
    let grouped = q.size()[1] > 1;
    Tensor::f_scaled_dot_product_attention::<Tensor>(q, k, v, None, 0.0, causal, None, grouped)
}

fn eager(case: &Case, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, TchError> {
    let scale = 1.0 / (case.head_size as f64).sqrt();
    let scores = q.f_matmul(&k.f_transpose(2, 3)?)?.f_mul_scalar(scale)?;
    let scores = match case.mask {
        Mask::Full => scores,
        Mask::Causal => {
            let tokens = case.sequence as i64;
            let unseen = Tensor::f_ones([tokens, tokens], (Kind::Bool, q.device()))?.f_triu(1)?;
            scores.f_masked_fill(&unseen, f64::NEG_INFINITY)?
        }
    };
    let softmax_kind = match q.kind() {
        Kind::Double => Kind::Double,
        _ => Kind::Float,
    };
    let weights = scores.f_softmax(-1, softmax_kind)?.f_to_kind(q.kind())?;
    weights.f_matmul(v)
}
