//! The squares of the gradients, block of rows by block of rows.

use tch::{TchError, Tensor};

use super::sums::{over_keys, product, total};
use super::{Block, KEYS_OF_PARTIAL_SUM, OfBlock, Roundings};
use crate::oracle::precision::Roundoffs;

/// What the gradients of a block have in common.
struct Shared {
    softmax2: Tensor,
    dscores2: Tensor,
    /// The squares of a row's D, and of D itself.
    of_dout_dot_out: Tensor,
    d2: Tensor,
    /// The squares of dS, each on its own.
    own: Tensor,
    /// Sums over a row's keys of the squares of its scores, times dS dS, dS P and
    /// P P.
    s: [Tensor; 3],
}

/// What stands between scores and products of queries and keys.
struct Cap {
    /// dS through the cap's own bend.
    local: Tensor,
    /// The squares of dS behind it.
    own: Tensor,
    /// The cap's derivative, if there is one.
    passed: Option<Tensor>,
}

impl Cap {
    fn through(&self, tensor: &Tensor) -> Result<Tensor, TchError> {
        match &self.passed {
            Some(of_cap) => tensor.f_mul(of_cap),
            None => Ok(tensor.shallow_clone()),
        }
    }
}

impl Roundings {
    pub(super) fn backward(&mut self, block: &Block<'_>, of: &OfBlock) -> Result<(), TchError> {
        let shared = self.shared(block, of)?;
        self.slopes_and_sinks(block, of, &shared)?;
        let cap = self.cap(block, &shared)?;
        self.queries(block, of, &shared, &cap)?;
        self.keys(block, of, &shared, &cap)
    }

    fn shared(&self, block: &Block<'_>, of: &OfBlock) -> Result<Shared, TchError> {
        let Roundoffs {
            element,
            stored,
            sum,
            factors,
            tiny,
            ..
        } = self.roundoffs;
        let (softmax, dscores) = (&block.scored.weights, block.dscores);
        let (softmax2, dscores2) = (softmax.f_square()?, dscores.f_square()?);
        let value_channels = block.v.size()[3] as f64;
        let (dout2, v2_transposed) = (
            block.dout.f_square()?,
            block.v.f_square()?.f_transpose(2, 3)?,
        );

        // dP, where a row meets a key, and D, of a row.
        let v_sizes = block.v.f_abs()?;
        let sizes = block.dout.f_abs()?.f_matmul(&v_sizes.f_transpose(2, 3)?)?;
        let mut of_dweights = total(&[
            &sizes.f_square()?.f_mul_scalar(sum * value_channels)?,
            &dout2.f_matmul(&v2_transposed)?.f_mul_scalar(factors)?,
        ])?;
        if let Some(dropout) = block.dropout {
            of_dweights = of_dweights.f_mul(&dropout.f_square()?)?;
        }
        let dweights2 = block.dweights.f_square()?;
        let of_dweights = of_dweights.f_add(&dweights2.f_mul_scalar(stored)?)?;
        let of_dout_dot_out = {
            let terms = block.dout.f_mul(block.out)?;
            let weighed = softmax.f_mul(&block.dweights.f_abs()?)?;
            let accumulated = block.weights.f_matmul(&v_sizes)?.f_square()?;
            total(&[
                &over_keys(&terms.f_square()?)?.f_mul_scalar(element)?,
                &over_keys(&terms.f_abs()?)?
                    .f_square()?
                    .f_mul_scalar(sum * value_channels)?,
                &over_keys(&dout2.f_mul(&accumulated)?)?
                    .f_mul(&of.keys)?
                    .f_mul_scalar(sum)?,
                &over_keys(&softmax2.f_mul(&dweights2)?)?
                    .f_mul_scalar(element + stored + factors)?,
                &over_keys(&weighed)?
                    .f_square()?
                    .f_mul(&of.keys)?
                    .f_mul_scalar(sum)?,
                &over_keys(&softmax2.f_mul(&of_dweights)?)?,
            ])?
        };

        // dS = P (dP - D), each on its own.
        let own = total(&[
            &dscores2.f_mul_scalar(element + 2.0 * stored + 2.0 * sum)?,
            &softmax2.f_mul(&of_dweights)?,
            &of.seen.f_mul_scalar(tiny)?,
        ])?;
        let d2 = block.dout_dot_out.f_square()?;

        let s1 = over_keys(&of.scores.f_mul(&dscores2)?)?;
        let s2 = over_keys(&product(&[&of.scores, dscores, softmax])?)?;
        let s3 = over_keys(&of.scores.f_mul(&softmax2)?)?;
        Ok(Shared {
            softmax2,
            dscores2,
            of_dout_dot_out,
            d2,
            own,
            s: [s1, s2, s3],
        })
    }

    fn slopes_and_sinks(
        &mut self,
        block: &Block<'_>,
        of: &OfBlock,
        shared: &Shared,
    ) -> Result<(), TchError> {
        let Roundoffs { element, sum, .. } = self.roundoffs;
        let (softmax, dscores) = (&block.scored.weights, block.dscores);
        let Shared {
            of_dout_dot_out,
            d2,
            own,
            ..
        } = shared;
        if let Some(distances) = &block.scoring.distances {
            let part = over_keys(&dscores.f_mul(distances)?)?;
            let mean = over_keys(&softmax.f_mul(distances)?)?;
            let moved = dscores
                .f_mul(&distances.f_sub(&mean)?)?
                .f_sub(&softmax.f_mul(&part)?)?;
            let sizes = over_keys(&dscores.f_abs()?.f_mul(distances)?)?;
            let squares = total(&[
                &over_keys(&of.scores.f_mul(&moved.f_square()?)?)?,
                &over_keys(&own.f_mul(&distances.f_square()?)?)?,
                &of_dout_dot_out.f_mul(&mean.f_square()?)?,
                &of.row
                    .f_mul(&part.f_square()?.f_add(&d2.f_mul(&mean.f_square()?)?)?)?,
                &sizes.f_square()?.f_mul(&of.keys)?.f_mul_scalar(sum)?,
            ])?;
            self.dslopes.add(squares, part);
        }
        if let Some((of_sink, sinks)) = block.scored.of_sink.as_ref().zip(block.scoring.sinks) {
            let part = of_sink.f_mul(block.dout_dot_out)?;
            let moved = dscores.f_sub(&softmax.f_mul(block.dout_dot_out)?)?;
            let away = sinks.f_sub(&block.scored.largest)?.f_square()?;
            let own = total(&[&of.row, &away.f_add_scalar(6.0)?.f_mul_scalar(sum)?])?
                .f_add_scalar(2.0 * element)?;
            let squares = total(&[
                &of_sink
                    .f_square()?
                    .f_mul(&over_keys(&of.scores.f_mul(&moved.f_square()?)?)?)?,
                &of_sink.f_square()?.f_mul(of_dout_dot_out)?,
                &part.f_square()?.f_mul(&own)?,
            ])?;
            self.dsinks.add(squares, part);
        }
        Ok(())
    }

    fn cap(&self, block: &Block<'_>, shared: &Shared) -> Result<Cap, TchError> {
        let mut cap = Cap {
            local: block.dscores.shallow_clone(),
            own: shared.own.shallow_clone(),
            passed: None,
        };
        if let Some((tanh, of_cap)) = block.scored.tanh.as_ref().zip(block.scored.of_cap()?) {
            let softcap = block.scoring.softcap.unwrap_or(1.0);
            let bent = of_cap.f_sub(&tanh.f_mul_scalar(2.0 / softcap)?)?;
            cap.local = block.dscores.f_mul(&bent)?;
            // The derivative of a tanh is off by four units of 1.
            let of_bend = shared.dscores2.f_mul_scalar(16.0 * self.roundoffs.stored)?;
            cap.own = cap.own.f_mul(&of_cap.f_square()?)?.f_add(&of_bend)?;
            cap.passed = Some(of_cap);
        }
        Ok(cap)
    }

    /// dQ = scale c dS K.
    fn queries(
        &mut self,
        block: &Block<'_>,
        of: &OfBlock,
        shared: &Shared,
        cap: &Cap,
    ) -> Result<(), TchError> {
        let Roundoffs {
            element,
            stored,
            sum,
            factors,
            tiny,
            ..
        } = self.roundoffs;
        let Shared {
            of_dout_dot_out,
            d2,
            s: [s1, s2, s3],
            ..
        } = shared;
        let Cap { local, own, .. } = cap;
        let scale2 = block.scoring.scale * block.scoring.scale;
        let k2 = block.k.f_square()?;
        let (softmax_k, dscores_k) = (
            cap.through(&block.scored.weights)?.f_matmul(block.k)?,
            cap.through(block.dscores)?.f_matmul(block.k)?,
        );
        let dproducts2 = block.dproducts.f_square()?;
        let moved = total(&[
            &product(&[&of.scores, local, local])?.f_matmul(&k2)?,
            &softmax_k.f_square()?.f_mul(s1)?,
            &dscores_k.f_square()?.f_mul(s3)?,
            &product(&[&softmax_k, &dscores_k, s2])?.f_mul_scalar(2.0)?,
        ])?
        .f_clamp_min(0.0)?;
        let of_row = total(&[&dscores_k.f_square()?, &d2.f_mul(&softmax_k.f_square()?)?])?;
        let sizes = block.dproducts.f_abs()?.f_matmul(&block.k.f_abs()?)?;
        let mut squares = total(&[
            &total(&[
                &moved,
                &own.f_matmul(&k2)?,
                &of_dout_dot_out.f_mul(&softmax_k.f_square()?)?,
                &of.row.f_mul(&of_row)?,
            ])?
            .f_mul_scalar(scale2)?,
            &dproducts2.f_matmul(&k2)?.f_mul_scalar(factors)?,
            &sizes.f_square()?.f_mul(&of.keys)?.f_mul_scalar(sum)?,
            &squared_partial_sums(block.dproducts, block.k)?.f_mul_scalar(element)?,
            &block.dq.f_square()?.f_mul_scalar(stored)?,
        ])?
        .f_add_scalar(tiny)?;
        if let Some(of_k) = &self.of_k {
            squares = squares.f_add(&dproducts2.f_matmul(of_k)?)?;
        }
        self.dq.push(squares);
        Ok(())
    }

    /// dK = scale (c dS)^T Q.
    fn keys(
        &mut self,
        block: &Block<'_>,
        of: &OfBlock,
        shared: &Shared,
        cap: &Cap,
    ) -> Result<(), TchError> {
        let Shared {
            softmax2,
            dscores2,
            of_dout_dot_out,
            d2,
            s: [s1, s2, s3],
            ..
        } = shared;
        let Cap { local, own, .. } = cap;
        let (softmax, dscores) = (&block.scored.weights, block.dscores);
        let scale2 = block.scoring.scale * block.scoring.scale;
        let q2 = block.q.f_square()?;
        let dproducts2 = block.dproducts.f_square()?;
        let weighed = softmax.f_mul(dscores)?;
        let row = total(&[
            &dscores2.f_mul(s3)?,
            &weighed.f_mul(s2)?.f_mul_scalar(2.0)?,
            &softmax2.f_mul(s1)?,
            &softmax2.f_mul(of_dout_dot_out)?,
            &dscores2.f_add(&softmax2.f_mul(d2)?)?.f_mul(&of.row)?,
        ])?;
        let of_products = total(&[
            &product(&[&of.scores, local, local])?,
            &cap.through(&cap.through(&row)?)?,
        ])?
        .f_clamp_min(0.0)?
        .f_add(own)?
        .f_mul_scalar(scale2)?
        .f_add(&dproducts2.f_mul_scalar(self.roundoffs.factors)?)?;
        let mut squares = of_products.f_transpose(2, 3)?.f_matmul(&q2)?;
        if let Some(of_q) = &self.of_q {
            let of_q = of_q.f_narrow(2, block.first, block.q.size()[2])?;
            squares = squares.f_add(&dproducts2.f_transpose(2, 3)?.f_matmul(&of_q)?)?;
        }
        self.dk
            .add(squares, block.dproducts, block.q, self.rows_of_partial_sum)
    }
}

/// The sum of the squares of what `numbers` times `k` is after each block of
/// keys.
fn squared_partial_sums(numbers: &Tensor, k: &Tensor) -> Result<Tensor, TchError> {
    let numbers = numbers.f_split(KEYS_OF_PARTIAL_SUM, 3)?;
    let keys = k.f_split(KEYS_OF_PARTIAL_SUM, 2)?;
    let mut partial = numbers[0].f_matmul(&keys[0])?;
    let mut squares = partial.f_square()?;
    for (numbers, keys) in numbers.iter().zip(&keys).skip(1) {
        partial = partial.f_add(&numbers.f_matmul(keys)?)?;
        squares = squares.f_add(&partial.f_square()?)?;
    }
    Ok(squares)
}
