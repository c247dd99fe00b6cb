//! What is done to queries and keys before they meet: norm, then rotation, and
//! the derivative of both.

use tch::{Kind, TchError, Tensor};

use super::precision::Roundoffs;
use super::rotary;

/// Added to the mean square, so that a zero head has a norm.
pub(crate) const NORM_EPSILON: f64 = 1e-6;

/// Queries or keys, `[batch, heads, tokens, head size]` in float64, ready to
/// meet, and what their derivative needs.
pub(super) struct Prepared {
    pub(super) heads: Tensor,
    norm: Option<Norm>,
    turn: Option<Turn>,
}

/// A rotation, and what was rotated.
struct Turn {
    cos: Tensor,
    sin: Tensor,
    before: Tensor,
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
        norm_weight: Option<&Tensor>,
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
            let before = heads;
            heads = rotary::rotate(&before, &cos, &sin)?;
            turn = Some(Turn { cos, sin, before });
        }
        Ok(Prepared { heads, norm, turn })
    }

    /// From the gradient of the prepared heads to that of the heads as they
    /// were, and each token's part of that of the norm's weight, both
    /// `[batch, heads, tokens, head size]`.
    ///
    /// With `u = x r` and `g = dy w`: `dw = sum dy u`, `dx = r (g - u mean(g u))`.
    pub(super) fn gradients(&self, mut dy: Tensor) -> Result<(Tensor, Option<Tensor>), TchError> {
        if let Some(turn) = &self.turn {
            dy = turn.back(&dy)?;
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

    /// How far roundings move each number of the prepared heads, squared; none
    /// where they are as they came.
    pub(super) fn squares(&self, roundoffs: &Roundoffs) -> Result<Option<Tensor>, TchError> {
        let u2 = roundoffs.element;
        let mut squares = None;
        if self.norm.is_some() {
            let normed = self.turn.as_ref().map_or(&self.heads, |turn| &turn.before);
            // A product with r, and one with the weight.
            let relative = 2.0 * u2 + self.of_root(roundoffs);
            squares = Some(normed.f_square()?.f_mul_scalar(relative)?);
        }
        if let Some(turn) = &self.turn {
            // Products, and cosines and sines in the element type.
            let terms = turn
                .squares(&turn.before.f_square()?)?
                .f_mul_scalar(2.0 * u2)?;
            let own = terms.f_add(&self.heads.f_square()?.f_mul_scalar(u2)?)?;
            squares = Some(match squares {
                Some(squares) => turn.squares(&squares)?.f_add(&own)?,
                None => own,
            });
        }
        Ok(squares)
    }

    /// From the gradient `dy` of the prepared heads, and how far roundings move
    /// it, squared: how far they move that of the heads as they were, squared;
    /// and the same of each token's part of that of the norm's weight, with the
    /// part itself.
    pub(super) fn gradient_squares(
        &self,
        dy: &Tensor,
        mut squares: Tensor,
        roundoffs: &Roundoffs,
    ) -> Result<(Tensor, Option<(Tensor, Tensor)>), TchError> {
        let u2 = roundoffs.element;
        let mut dy = dy.shallow_clone();
        if let Some(turn) = &self.turn {
            let terms = turn.squares(&dy.f_square()?)?.f_mul_scalar(2.0 * u2)?;
            dy = turn.back(&dy)?;
            squares = turn
                .squares(&squares)?
                .f_add(&terms)?
                .f_add(&dy.f_square()?.f_mul_scalar(u2)?)?;
        }
        let Some(Norm { unit, r, weight }) = &self.norm else {
            return Ok((squares, None));
        };
        let channels = unit.size()[3] as f64;
        let mean = |tensor: &Tensor| tensor.f_mean_dim([-1].as_slice(), true, Kind::Double);
        let (unit2, of_root) = (unit.f_square()?, self.of_root(roundoffs));
        let part = dy.f_mul(unit)?;
        let of_part = squares
            .f_mul(&unit2)?
            .f_add(&part.f_square()?.f_mul_scalar(3.0 * u2 + of_root)?)?;
        let g = dy.f_mul(weight)?;
        let of_g = squares
            .f_mul(&weight.f_square()?)?
            .f_add(&g.f_square()?.f_mul_scalar(u2)?)?;
        let terms = g.f_mul(unit)?;
        let along = unit.f_mul(&mean(&terms)?)?;
        // dx = r (g - unit mean(g unit)): of g a number's own, and all through
        // the mean.
        let own = of_g.f_mul(&unit2.f_mul_scalar(-2.0 / channels)?.f_add_scalar(1.0)?)?;
        let of_mean = mean(&of_g.f_mul(&unit2)?)?.f_mul_scalar(1.0 / channels)?;
        let of_sum = mean(&terms.f_abs()?)?
            .f_square()?
            .f_mul_scalar(roundoffs.sum * channels)?;
        let stored = along
            .f_square()?
            .f_mul_scalar(2.0)?
            .f_add(&g.f_square()?)?
            .f_mul_scalar(2.0 * u2 + 4.0 * of_root)?;
        let squares = own
            .f_add(&unit2.f_mul(&of_mean.f_add(&of_sum)?)?)?
            .f_clamp_min(0.0)?
            .f_add(&stored)?
            .f_mul(&r.f_square()?)?;
        Ok((squares, Some((of_part, part))))
    }

    /// What `1 / rms(x)` is off, relative, squared: half of a sum of as many
    /// squares as there are channels, and a root.
    fn of_root(&self, roundoffs: &Roundoffs) -> f64 {
        roundoffs.sum * (self.heads.size()[3] as f64 / 4.0 + 4.0)
    }
}

impl Turn {
    /// Turns back.
    fn back(&self, heads: &Tensor) -> Result<Tensor, TchError> {
        rotary::rotate(heads, &self.cos, &self.sin.f_neg()?)
    }

    /// What a turn, either way, makes of squares.
    fn squares(&self, squares: &Tensor) -> Result<Tensor, TchError> {
        let (cos2, sin2) = (self.cos.f_square()?, self.sin.f_square()?);
        let halves = squares.f_chunk(2, -1)?;
        let (a, b) = (&halves[0], &halves[1]);
        let turned = [
            a.f_mul(&cos2)?.f_add(&b.f_mul(&sin2)?)?,
            b.f_mul(&cos2)?.f_add(&a.f_mul(&sin2)?)?,
        ];
        Tensor::f_cat(&turned, -1)
    }
}
