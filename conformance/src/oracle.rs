//! The right answer: dense attention and its gradients, in float64, on one
//! device.
//!
//! Row block by row block, so that a bounded number of rows of the score
//! matrix exists at a time. The gradients are written out, not left to
//! autograd: with P = softmax(scale Q K^T) and O = P V,
//!
//! ```text
//! dV = P^T dO        dP = dO V^T        dS = P * (dP - rowsum(dO * O))
//! dQ = scale dS K    dK = scale dS^T Q
//! ```
//!
//! (Dao et al., "FlashAttention", 2022, appendix B.2). A test holds them
//! against finite differences of the forward.
//!
//! Deliberately not here: anything of the reference's. Which keys a query sees
//! and which KV head a query head attends are derived here once more.

use fixtures::{Array, Case, Inputs, Mask};
use tch::{Kind, TchError, Tensor};

use crate::tensor;

/// Rows of the score matrix that exist at a time.
const ROW_BLOCK: i64 = 128;

/// What attention answers, over the whole sequence: the output and the
/// gradients, each shaped like the input it belongs to.
#[derive(Debug)]
pub struct Answer<T> {
    /// O, shaped like Q.
    pub out: T,
    /// The gradient of Q.
    pub dq: T,
    /// The gradient of K.
    pub dk: T,
    /// The gradient of V.
    pub dv: T,
}

impl<T> Answer<T> {
    /// The names of the four tensors, as in the exchange.
    pub const NAMES: [&str; 4] = ["out", "dq", "dk", "dv"];

    /// The four tensors, in the order of [`Answer::NAMES`].
    pub fn tensors(&self) -> [&T; 4] {
        [&self.out, &self.dq, &self.dk, &self.dv]
    }

    /// Turns each tensor into another.
    pub(crate) fn try_map<U, E>(
        self,
        mut f: impl FnMut(T) -> Result<U, E>,
    ) -> Result<Answer<U>, E> {
        Ok(Answer {
            out: f(self.out)?,
            dq: f(self.dq)?,
            dk: f(self.dk)?,
            dv: f(self.dv)?,
        })
    }
}

/// The right answer to `case` for `inputs`, in float64.
pub fn attention(case: &Case, inputs: &Inputs) -> Result<Answer<Vec<f64>>, TchError> {
    // [batch, tokens, heads, head size] -> [batch, heads, tokens, head size]
    let float64 = |array: &Array| {
        tensor::from_array(array)?
            .f_to_kind(Kind::Double)?
            .f_transpose(1, 2)
    };
    let (q, k, v, dout) = (
        float64(&inputs.q)?,
        float64(&inputs.k)?,
        float64(&inputs.v)?,
        float64(&inputs.dout)?,
    );
    let kv_heads = kv_head_of_each_query_head(case);
    let (k, v) = (
        k.f_index_select(1, &kv_heads)?,
        v.f_index_select(1, &kv_heads)?,
    );
    let (k_transposed, v_transposed) = (k.f_transpose(2, 3)?, v.f_transpose(2, 3)?);
    let scale = 1.0 / (case.head_size as f64).sqrt();

    let (mut out, mut dq) = (Vec::new(), Vec::new());
    let (mut dk, mut dv) = (k.f_zeros_like()?, v.f_zeros_like()?);
    let tokens = case.sequence as i64;
    for first in (0..tokens).step_by(ROW_BLOCK as usize) {
        let rows = ROW_BLOCK.min(tokens - first);
        let block = |tensor: &Tensor| tensor.f_narrow(2, first, rows);
        let (q, dout) = (block(&q)?, block(&dout)?);
        let scores = q.f_matmul(&k_transposed)?.f_mul_scalar(scale)?;
        let scores = match case.mask {
            Mask::Full => scores,
            Mask::Causal => {
                let positions = Tensor::f_arange(tokens, (Kind::Int64, q.device()))?;
                let row_positions = positions.f_narrow(0, first, rows)?.f_unsqueeze(1)?;
                let unseen = positions.f_unsqueeze(0)?.f_gt_tensor(&row_positions)?;
                scores.f_masked_fill(&unseen, f64::NEG_INFINITY)?
            }
        };
        let weights = scores.f_softmax(-1, Kind::Double)?;
        let out_block = weights.f_matmul(&v)?;
        let dout_dot_out = dout
            .f_mul(&out_block)?
            .f_sum_dim_intlist(-1, true, Kind::Double)?;
        let dweights = dout.f_matmul(&v_transposed)?;
        let dscores = weights
            .f_mul(&dweights.f_sub(&dout_dot_out)?)?
            .f_mul_scalar(scale)?;
        dq.push(dscores.f_matmul(&k)?);
        dk = dk.f_add(&dscores.f_transpose(2, 3)?.f_matmul(&q)?)?;
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
    let answer = Answer {
        out: Tensor::f_cat(&out, 2)?,
        dq: Tensor::f_cat(&dq, 2)?,
        dk: sum_groups(&dk)?,
        dv: sum_groups(&dv)?,
    };
    answer.try_map(|tensor| {
        let rows = tensor.f_transpose(1, 2)?.f_contiguous()?.f_view([-1])?;
        Vec::try_from(rows)
    })
}

/// For query heads 0, 1, 2, ..: the KV head that each attends.
fn kv_head_of_each_query_head(case: &Case) -> Tensor {
    let heads: Vec<i64> = (0..case.query_heads)
        .map(|head| case.kv_head_of(head) as i64)
        .collect();
    Tensor::from_slice(&heads)
}
