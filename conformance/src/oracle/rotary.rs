//! Rotary position embedding: rotate-half.

use fixtures::{AttentionCase, Rotary, values};
use tch::{Kind, TchError, Tensor};

/// The angles by which a case rotates, one for each token and channel pair.
///
/// The frequency of pair c is `base^(-2c/D)` with `base = 2^(D/2)`, which is
/// `2^-c`: every angle is an exact product.
pub(crate) fn angles(case: &AttentionCase) -> Result<Option<Tensor>, TchError> {
    let Some(rotary) = case.extras.rotary else {
        return Ok(None);
    };
    let pairs = case.head_size / 2;
    // [components, batch, tokens]
    let shape = [-1, case.batch as i64, case.sequence as i64];
    let ids = Tensor::f_from_slice(&values::position_ids(case).to_f64())?.f_view(shape)?;
    let component_of_pair: Vec<i64> = match rotary {
        Rotary::Plain => vec![0; pairs],
        Rotary::Multimodal => {
            let [temporal, height, _] = sections(case.head_size);
            (0..pairs)
                .map(|pair| i64::from(pair >= temporal) + i64::from(pair >= temporal + height))
                .collect()
        }
    };
    let frequencies: Vec<f64> = (0..pairs).map(|pair| (-(pair as f64)).exp2()).collect();
    // [pairs, batch, tokens] -> [batch, 1, tokens, pairs]
    let positions = ids.f_index_select(0, &Tensor::f_from_slice(&component_of_pair)?)?;
    let positions = positions.f_permute([1, 2, 0])?.f_unsqueeze(1)?;
    positions
        .f_mul(&Tensor::f_from_slice(&frequencies)?)
        .map(Some)
}

/// How many channel pairs turn with each component of a multimodal position.
fn sections(head_size: usize) -> [usize; 3] {
    let spatial = 3 * head_size / 16;
    [head_size / 2 - 2 * spatial, spatial, spatial]
}

/// `x`, `[batch, heads, tokens, head size]`, turned by angles of these cosines
/// and sines, `[batch, 1, tokens, head size / 2]`. The transpose of a rotation
/// is the one by the opposite sine.
pub(crate) fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor, TchError> {
    let halves = x.f_chunk(2, -1)?;
    let (a, b) = (&halves[0], &halves[1]);
    Tensor::f_cat(
        &[
            a.f_mul(cos)?.f_sub(&b.f_mul(sin)?)?,
            b.f_mul(cos)?.f_add(&a.f_mul(sin)?)?,
        ],
        -1,
    )
}

/// Cosine and sine of `angles`, computed in `compute` and rounded to `dtype`.
pub(crate) fn cos_sin(
    angles: &Tensor,
    compute: Kind,
    dtype: Kind,
) -> Result<(Tensor, Tensor), TchError> {
    let angles = angles.f_to_kind(compute)?;
    Ok((
        angles.f_cos()?.f_to_kind(dtype)?,
        angles.f_sin()?.f_to_kind(dtype)?,
    ))
}
