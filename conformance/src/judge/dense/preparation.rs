//! Norm and rotation of queries and keys in the case's element type, by
//! libtorch's autograd.

use tch::{Kind, TchError, Tensor};

use crate::oracle::{NORM_EPSILON, rotary};

/// Queries or keys, `[batch, heads, tokens, head size]`, ready to meet, outside
/// of any graph.
pub(super) struct Prepared {
    pub(super) heads: Tensor,
    graph: Option<Graph>,
}

/// How they became so.
struct Graph {
    heads: Tensor,
    prepared: Tensor,
}

impl Prepared {
    /// Prepares `heads` by a norm of this weight, `[heads, head size]`, and a
    /// rotation by these angles. Where there is neither they stay as they are.
    pub(super) fn new(
        heads: Tensor,
        norm_weight: Option<&Tensor>,
        angles: Option<&Tensor>,
    ) -> Result<Prepared, TchError> {
        if norm_weight.is_none() && angles.is_none() {
            return Ok(Prepared { heads, graph: None });
        }
        let (dtype, heads) = (heads.kind(), leaf(heads)?);
        let compute = match dtype {
            Kind::Double => Kind::Double,
            _ => Kind::Float,
        };
        let mut prepared = heads.shallow_clone();
        if let Some(weight) = norm_weight {
            let unit = unit_heads(&prepared, compute)?.f_to_kind(dtype)?;
            prepared = weight.f_unsqueeze(1)?.f_mul(&unit)?;
        }
        if let Some(angles) = angles {
            let (cos, sin) = rotary::cos_sin(angles, compute, dtype)?;
            prepared = rotary::rotate(&prepared, &cos, &sin)?;
        }
        Ok(Prepared {
            heads: prepared.f_detach()?,
            graph: Some(Graph { heads, prepared }),
        })
    }

    /// From the gradient of the prepared heads to that of the heads as they
    /// were.
    pub(super) fn gradient(&self, dy: Tensor) -> Result<Tensor, TchError> {
        let Some(graph) = &self.graph else {
            return Ok(dy);
        };
        let products = graph.prepared.f_mul(&dy)?;
        products.f_sum(products.kind())?.f_backward()?;
        graph.heads.f_grad()
    }
}

/// Heads of root mean square 1, in `compute`.
fn unit_heads(heads: &Tensor, compute: Kind) -> Result<Tensor, TchError> {
    let heads = heads.f_to_kind(compute)?;
    let mean_square = heads
        .f_square()?
        .f_mean_dim([-1].as_slice(), true, compute)?;
    heads.f_mul(&mean_square.f_add_scalar(NORM_EPSILON)?.f_rsqrt()?)
}

/// A contiguous tensor that gathers a gradient.
pub(super) fn leaf(tensor: Tensor) -> Result<Tensor, TchError> {
    tensor.f_contiguous()?.f_detach()?.f_set_requires_grad(true)
}
