//! How Q, K and V lie in memory.

use tch::{TchError, Tensor};

/// Q, K and V with the same elements in another order of memory.
pub(super) fn lay_out(strides: &str, tensors: [Tensor; 3]) -> Result<[Tensor; 3], String> {
    let laid_out = match strides {
        "contiguous" => Ok(tensors),
        "transposed" => transposed(&tensors),
        "packed" => packed(&tensors),
        "expanded" => expanded(tensors),
        other => return Err(format!("`strides` is `{other}`, which nobody knows")),
    };
    laid_out.map_err(|error| error.to_string())
}

/// In memory [B, H, s, D].
fn transposed(tensors: &[Tensor; 3]) -> Result<[Tensor; 3], TchError> {
    let transposed = |tensor: &Tensor| tensor.f_transpose(1, 2)?.f_contiguous()?.f_transpose(1, 2);
    let [q, k, v] = tensors.each_ref().map(transposed);
    Ok([q?, k?, v?])
}

/// Of K and V the first row of the batch, which all others are equal to.
fn expanded([q, k, v]: [Tensor; 3]) -> Result<[Tensor; 3], TchError> {
    let expanded = |tensor: Tensor| {
        let first = tensor.f_narrow(0, 0, 1)?;
        first.f_expand(tensor.size(), false)
    };
    Ok([q, expanded(k)?, expanded(v)?])
}

/// Parts of one tensor [B, s, 3, H, D].
fn packed(tensors: &[Tensor; 3]) -> Result<[Tensor; 3], TchError> {
    let stacked = Tensor::f_stack(tensors, 2)?;
    Ok([
        stacked.f_select(2, 0)?,
        stacked.f_select(2, 1)?,
        stacked.f_select(2, 2)?,
    ])
}
