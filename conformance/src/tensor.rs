//! Between [`fixtures::Array`], a tensor at rest, and a tensor of libtorch.

use fixtures::{Array, Dtype};
use tch::{Device, Kind, TchError, Tensor};

/// The element type, as libtorch calls it.
pub(crate) fn kind(dtype: Dtype) -> Kind {
    match dtype {
        Dtype::F64 => Kind::Double,
        Dtype::F32 => Kind::Float,
        Dtype::Bf16 => Kind::BFloat16,
        Dtype::F16 => Kind::Half,
        Dtype::I64 => Kind::Int64,
    }
}

/// A tensor with the array's elements.
pub(crate) fn from_array(array: &Array) -> Result<Tensor, TchError> {
    let shape: Vec<i64> = array.shape.iter().map(|&size| size as i64).collect();
    Tensor::f_from_data_size(&array.bytes, &shape, kind(array.dtype))
}

/// The same on a device.
pub(crate) fn from_array_on(device: Device, array: &Array) -> Result<Tensor, TchError> {
    from_array(array)?.f_to_device(device)
}

/// The tensor's elements, put in row-major order, in `dtype`, which is the
/// tensor's own element type.
pub(crate) fn to_array(tensor: &Tensor, dtype: Dtype) -> Result<Array, TchError> {
    let shape: Vec<usize> = tensor.size().iter().map(|&size| size as usize).collect();
    if tensor.kind() != kind(dtype) {
        return Err(TchError::Kind(format!(
            "the answer's element type is {:?}, the case's {dtype}",
            tensor.kind()
        )));
    }
    let mut bytes = vec![0; tensor.numel() * dtype.size()];
    tensor
        .f_contiguous()?
        .f_copy_data_u8(&mut bytes, tensor.numel())?;
    Ok(Array {
        dtype,
        shape,
        bytes,
    })
}
