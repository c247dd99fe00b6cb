//! From text to token ids: a token is a byte.

use tch::{Kind, Tensor};

pub(crate) const VOCABULARY: usize = 256;

/// [1, S], int64.
pub(crate) fn ids(text: &[u8]) -> Result<Tensor, tch::TchError> {
    Tensor::f_from_slice(text)?
        .f_to_kind(Kind::Int64)?
        .f_unsqueeze(0)
}
