//! What is done to queries and keys before they meet: norm, then rotation, and
//! the derivative of both.

use tch::{Kind, TchError, Tensor};

use super::rotary;

/// Added to the mean square, so that a zero head has a norm.
pub(crate) const NORM_EPSILON: f64 = 1e-6;

/// Queries or keys, `[batch, heads, tokens, head size]` in float64, ready to
/// meet, and what their derivative needs.
pub(super) struct Prepared {
    pub(super) heads: Tensor,
    norm: Option<Norm>,
    turn: Option<(Tensor, Tensor)>,
}

/// `y = x r w` with `r = 1 / rms(x)`.
struct Norm {
    /// `x r`
    unit: Tensor,
    r: Tensor,
    /// `[heads, 1, head size]`
    weight: Tensor,
}

impl Prepared {
    /// Prepares `heads` by a norm of this weight, `[heads, head size]`, and a
    /// rotation by these angles, where there are any.
    pub(super) fn new(
        mut heads: Tensor,
        norm_weight: Option<Tensor>,
        angles: Option<&Tensor>,
    ) -> Result<Prepared, TchError> {
        let mut norm = None;
        if let Some(weight) = norm_weight {
            let mean_square = heads
                .f_square()?
                .f_mean_dim([-1].as_slice(), true, Kind::Double)?;
            let r = mean_square.f_add_scalar(NORM_EPSILON)?.f_rsqrt()?;
            let weight = weight.f_unsqueeze(1)?;
            let unit = heads.f_mul(&r)?;
            heads = unit.f_mul(&weight)?;
            norm = Some(Norm { unit, r, weight });
        }
        let mut turn = None;
        if let Some(angles) = angles {
            let (cos, sin) = rotary::cos_sin(angles, Kind::Double, Kind::Double)?;
            heads = rotary::rotate(&heads, &cos, &sin)?;
            turn = Some((cos, sin));
        }
        Ok(Prepared { heads, norm, turn })
    }

    /// From the gradient of the prepared heads to that of the heads as they
    /// were, and each token's part of that of the norm's weight, both
    /// `[batch, heads, tokens, head size]`.
    ///
    /// With `u = x r` and `g = dy w`: `dw = sum dy u`, `dx = r (g - u mean(g u))`.
    pub(super) fn gradients(&self, mut dy: Tensor) -> Result<(Tensor, Option<Tensor>), TchError> {
        if let Some((cos, sin)) = &self.turn {
            dy = rotary::rotate(&dy, cos, &sin.f_neg()?)?;
        }
        let Some(Norm { unit, r, weight }) = &self.norm else {
            return Ok((dy, None));
        };
        let dweight = dy.f_mul(unit)?;
        let g = dy.f_mul(weight)?;
        let along = g
            .f_mul(unit)?
            .f_mean_dim([-1].as_slice(), true, Kind::Double)?;
        let dx = g.f_sub(&unit.f_mul(&along)?)?.f_mul(r)?;
        Ok((dx, Some(dweight)))
    }

    /// How far rows of the gradient, `[batch, heads, tokens]`, are off if those
    /// of the prepared heads' gradient are off by this much: a norm divides by
    /// the root mean square and multiplies by its weight, a turn leaves lengths
    /// as they are.
    pub(super) fn stretch(&self, off: &Tensor) -> Result<Tensor, TchError> {
        let Some(Norm { r, weight, .. }) = &self.norm else {
            return Ok(off.shallow_clone());
        };
        let largest = weight.f_abs()?.f_amax([-1].as_slice(), false)?;
        off.f_mul(&r.f_squeeze_dim(-1)?)?.f_mul(&largest)
    }
}
