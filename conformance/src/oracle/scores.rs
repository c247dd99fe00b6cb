//! From products of queries and keys to attention weights, for a block of rows.

use fixtures::{Case, Input, Inputs};
use tch::{Kind, TchError, Tensor};

use super::float64;

/// How a case makes scores of products, and weights of scores.
pub(super) struct Scoring {
    scale: f64,
    softcap: Option<f64>,
    /// `[1, query heads, 1, 1]`
    slopes: Option<Tensor>,
    /// `[1, query heads, 1, 1]`
    sinks: Option<Tensor>,
}

/// The weights of a block of rows, and what their derivative needs.
pub(super) struct Weights {
    /// `[batch, query heads, rows, keys]`. All zero for a query that sees no
    /// key.
    pub(super) weights: Tensor,
    /// What the sink takes of each row, `[batch, query heads, rows, 1]`.
    pub(super) of_sink: Option<Tensor>,
    /// `|i - j|`, `[rows, keys]`, where there are slopes.
    distances: Option<Tensor>,
    /// The derivative of the capped scores by the uncapped.
    pub(super) of_cap: Option<Tensor>,
}

impl Scoring {
    pub(super) fn of(case: &Case, inputs: &Inputs) -> Result<Scoring, TchError> {
        let by_head = |input| {
            let array = inputs.get(input);
            array
                .map(|array| float64(array)?.f_view([1, -1, 1, 1]))
                .transpose()
        };
        Ok(Scoring {
            scale: case.score_scale(),
            softcap: case.extras.softcap.map(f64::from),
            slopes: by_head(Input::Slopes)?,
            sinks: by_head(Input::Sinks)?,
        })
    }

    /// The weights of the rows from token `first` on whose products with all
    /// keys these are. `seen` tells which keys they see; all, where there is
    /// none.
    pub(super) fn weights(
        &self,
        products: &Tensor,
        seen: Option<&Tensor>,
        first: i64,
    ) -> Result<Weights, TchError> {
        let mut scores = products.f_mul_scalar(self.scale)?;
        let mut of_cap = None;
        if let Some(cap) = self.softcap {
            let tanh = scores.f_div_scalar(cap)?.f_tanh()?;
            of_cap = Some(tanh.f_square()?.f_neg()?.f_add_scalar(1.0)?);
            scores = tanh.f_mul_scalar(cap)?;
        }
        let mut distances = None;
        if let Some(slopes) = &self.slopes {
            let [.., rows, keys] = scores.size()[..] else {
                return Err(TchError::Shape("scores have rows and keys".to_owned()));
            };
            let from_rows = distances_of(first, rows, keys)?;
            scores = scores.f_sub(&slopes.f_mul(&from_rows)?)?;
            distances = Some(from_rows);
        }
        if let Some(seen) = seen {
            scores = scores.f_masked_fill(&seen.f_logical_not()?, f64::NEG_INFINITY)?;
        }
        let mut largest = scores.f_amax([-1].as_slice(), true)?;
        if let Some(sinks) = &self.sinks {
            largest = largest.f_maximum(sinks)?;
        }
        // Where nothing is seen and no sink is, the largest is no number.
        let largest = largest.f_clamp_min(f64::MIN)?;
        let exponentials = scores.f_sub(&largest)?.f_exp()?;
        let mut total = exponentials.f_sum_dim_intlist([-1].as_slice(), true, Kind::Double)?;
        let sink = match &self.sinks {
            Some(sinks) => Some(sinks.f_sub(&largest)?.f_exp()?),
            None => None,
        };
        if let Some(sink) = &sink {
            total = total.f_add(sink)?;
        }
        // The largest exponential is 1, but where nothing is seen: 0 / 1 there.
        let total = total.f_clamp_min(f64::MIN_POSITIVE)?;
        Ok(Weights {
            weights: exponentials.f_div(&total)?,
            of_sink: sink.map(|sink| sink.f_div(&total)).transpose()?,
            distances,
            of_cap,
        })
    }

    /// From the gradient of a block's scores, those of its products and, for
    /// each row, `[batch, query heads, rows]`, of the slopes.
    pub(super) fn gradients(
        &self,
        weights: &Weights,
        dscores: &Tensor,
    ) -> Result<(Tensor, Option<Tensor>), TchError> {
        let dslopes = match &weights.distances {
            Some(distances) => {
                let parts = dscores.f_mul(distances)?;
                Some(
                    parts
                        .f_sum_dim_intlist([-1].as_slice(), false, Kind::Double)?
                        .f_neg()?,
                )
            }
            None => None,
        };
        let dproducts = match &weights.of_cap {
            Some(of_cap) => dscores.f_mul(of_cap)?,
            None => dscores.shallow_clone(),
        };
        Ok((dproducts.f_mul_scalar(self.scale)?, dslopes))
    }
}

/// `|i - j|` of the queries from token `first` on and all keys.
pub(crate) fn distances_of(first: i64, rows: i64, keys: i64) -> Result<Tensor, TchError> {
    let places = |count| Tensor::f_arange(count, (Kind::Double, tch::Device::Cpu));
    let queries = places(rows)?.f_add_scalar(first)?.f_unsqueeze(1)?;
    queries.f_sub(&places(keys)?)?.f_abs()
}
