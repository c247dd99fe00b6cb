//! Rotary position embedding: channels of queries and keys, rotated by the
//! position of their token.
//!
//! Channel c is paired with channel c + D/2 and the pair turned by the angle
//! position * base^(-2c/D), as in Hugging Face's `apply_rotary_pos_emb`. With
//! `sections` the position has three components, of time, height and width for
//! instance, and each pair follows one of them (`apply_multimodal_rotary_pos_emb`).
//!
//! Each token is rotated alone, so that this needs no other rank: but by its
//! position in the whole sequence, which the caller has to know.
//!
//! Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position
//! Embedding", arXiv:2104.09864; for sections Wang et al., "Qwen2-VL",
//! arXiv:2409.12191, section 2.1.

use crate::error::{Result, refuse};
use tch::{Kind, Tensor};

/// How positions become angles.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rotary {
    /// The channel pair c of heads of size D has the frequency
    /// `base^(-2c/D)`, in radians per position.
    pub base: f64,
    /// How many channel pairs follow the first, second and third component of
    /// a position, D/2 in all; without it a position has one component.
    pub sections: Option<[usize; 3]>,
}

/// `x` [B, S, H, D], of any strides, rotated by `position_ids`: int64 [B, S],
/// or [3, B, S] where the positions have three components.
///
/// Angles are computed in float64, the rotation in float32 for the half types,
/// and rounded once. Differentiable in `x`.
///
/// # Errors
/// Refused when shapes or dtypes are not these, D is odd, the sections are not
/// D/2 pairs in all, or the base is not a positive number.
pub fn rotate(x: &Tensor, position_ids: &Tensor, rotary: &Rotary) -> Result<Tensor> {
    let half = check(x, position_ids, rotary)?;
    turn(x, &angles(position_ids, rotary, half)?)
}

/// `x` [B, S, H, D] with its channel pairs turned by `angles`, float64
/// [B, S, 1, D/2].
pub(crate) fn turn(x: &Tensor, angles: &Tensor) -> Result<Tensor> {
    let (half, kind) = (angles.size().last().copied().unwrap_or(0), x.f_kind()?);
    let precise = match kind {
        Kind::Half | Kind::BFloat16 => Kind::Float,
        other => other,
    };
    let to_factor = |factor: Tensor| factor.f_to_kind(precise)?.f_to_device(x.device());
    let (cos, sin) = (to_factor(angles.f_cos()?)?, to_factor(angles.f_sin()?)?);

    let x = x.f_to_kind(precise)?;
    let (first, second) = (x.f_narrow(3, 0, half)?, x.f_narrow(3, half, half)?);
    let rotated = [
        first.f_mul(&cos)?.f_sub(&second.f_mul(&sin)?)?,
        second.f_mul(&cos)?.f_add(&first.f_mul(&sin)?)?,
    ];
    Ok(Tensor::f_cat(&rotated, 3)?.f_to_kind(kind)?)
}

/// The frequencies of `half` channel pairs, in radians per position.
pub(crate) fn frequencies(base: f64, half: i64) -> Vec<f64> {
    // By powers of two: an exact one then comes out exactly.
    let octaves = base.log2();
    (0..half)
        .map(|pair| (-(octaves * pair as f64) / half as f64).exp2())
        .collect()
}

/// The angle of each token and channel pair: float64 [B, S, 1, D/2].
fn angles(position_ids: &Tensor, rotary: &Rotary, half: i64) -> Result<Tensor> {
    let frequencies = Tensor::f_from_slice(&frequencies(rotary.base, half))?
        .f_to_device(position_ids.device())?;
    // [B, S, 1, 1], or [3, B, S, 1, 1].
    let positions = position_ids
        .f_to_kind(Kind::Double)?
        .f_unsqueeze(-1)?
        .f_unsqueeze(-1)?;
    let Some(sections) = rotary.sections else {
        return Ok(positions.f_mul(&frequencies)?);
    };
    let sizes = sections.map(|pairs| pairs as i64);
    let parts = positions
        .f_unbind(0)?
        .iter()
        .zip(frequencies.f_split_with_sizes(sizes, 0)?)
        .map(|(component, frequencies)| component.f_mul(&frequencies))
        .collect::<std::result::Result<Vec<_>, _>>()?;
    Ok(Tensor::f_cat(&parts, 3)?)
}

/// Half the head size.
fn check(x: &Tensor, position_ids: &Tensor, rotary: &Rotary) -> Result<i64> {
    let &[batch, tokens, _, head_size] = &x.size()[..] else {
        let problem = format!("has shape {:?}", x.size());
        return refuse("x", problem, "give [batch, tokens, heads, head size]");
    };
    rotary.check(head_size)?;
    let due = match rotary.sections {
        None => vec![batch, tokens],
        Some(_) => vec![3, batch, tokens],
    };
    if position_ids.size() != due || position_ids.f_kind()? != Kind::Int64 {
        let (size, kind) = (position_ids.size(), position_ids.f_kind()?);
        let problem = format!("has shape {size:?} and kind {kind:?}");
        return refuse("position_ids", problem, format!("give {due:?} of int64"));
    }
    Ok(head_size / 2)
}

impl Rotary {
    /// # Errors
    /// Refused when heads of this size cannot be rotated so.
    pub(crate) fn check(&self, head_size: i64) -> Result<()> {
        if head_size % 2 != 0 {
            let problem = format!("turns pairs of channels, but a head has {head_size}");
            return refuse("rotary", problem, "give an even head size");
        }
        if !(self.base.is_finite() && self.base > 0.0) {
            let problem = format!("has the base {}", self.base);
            return refuse("rotary", problem, "give a positive number");
        }
        let half = head_size / 2;
        match self.sections {
            Some(sections) if sections.iter().sum::<usize>() as i64 != half => refuse(
                "rotary",
                format!("has the sections {sections:?}"),
                format!("give three that are {half} channel pairs in all"),
            ),
            _ => Ok(()),
        }
    }
}
