//! From products of queries and keys to attention weights, for a block of rows.

use tch::{Kind, TchError, Tensor};

/// How scores are made of a block of rows' products, and weights of scores.
pub(super) struct Scoring<'a> {
    pub(super) scale: f64,
    pub(super) softcap: Option<f64>,
    /// `[1, query heads, 1, 1]`
    pub(super) slopes: Option<&'a Tensor>,
    /// `[1, query heads, 1, 1]`
    pub(super) sinks: Option<&'a Tensor>,
    /// `|i - j|`, `[rows, keys]`, where there are slopes.
    pub(super) distances: Option<Tensor>,
}

/// The weights of a block of rows, and what their derivative needs.
pub(super) struct Weights {
    /// `[batch, query heads, rows, keys]`. All zero for a query that sees no
    /// key.
    pub(super) weights: Tensor,
    /// What weights are the softmax of, hidden keys' included.
    pub(super) scores: Tensor,
    /// The largest score of each row that is seen, or the sink, `[batch, query
    /// heads, rows, 1]`.
    pub(super) largest: Tensor,
    /// The logarithm of the sum of exponentials of scores minus the largest.
    pub(super) log_total: Tensor,
    /// What the sink takes of each row, `[batch, query heads, rows, 1]`.
    pub(super) of_sink: Option<Tensor>,
    /// The tanh of the scores over the cap.
    pub(super) tanh: Option<Tensor>,
}

impl Scoring<'_> {
    /// The weights of the rows whose products with all keys these are. `seen`
    /// tells which keys they see; all, where there is none.
    pub(super) fn weights(
        &self,
        products: &Tensor,
        seen: Option<&Tensor>,
    ) -> Result<Weights, TchError> {
        let mut scores = products.f_mul_scalar(self.scale)?;
        let mut tanh = None;
        if let Some(cap) = self.softcap {
            let bent = scores.f_div_scalar(cap)?.f_tanh()?;
            scores = bent.f_mul_scalar(cap)?;
            tanh = Some(bent);
        }
        if let Some((slopes, distances)) = self.slopes.zip(self.distances.as_ref()) {
            scores = scores.f_sub(&slopes.f_mul(distances)?)?;
        }
        let masked = match seen {
            Some(seen) => scores.f_masked_fill(&seen.f_logical_not()?, f64::NEG_INFINITY)?,
            None => scores.shallow_clone(),
        };
        let mut largest = masked.f_amax([-1].as_slice(), true)?;
        if let Some(sinks) = self.sinks {
            largest = largest.f_maximum(sinks)?;
        }
        // Where nothing is seen and no sink is, the largest is no number.
        let largest = largest.f_clamp_min(f64::MIN)?;
        let exponentials = masked.f_sub(&largest)?.f_exp()?;
        let mut total = exponentials.f_sum_dim_intlist([-1].as_slice(), true, Kind::Double)?;
        let sink = match self.sinks {
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
            log_total: total.f_log()?,
            scores,
            largest,
            tanh,
        })
    }

    /// From the gradient of a block's scores, those of its products and, for
    /// each row, `[batch, query heads, rows]`, of the slopes.
    pub(super) fn gradients(
        &self,
        weights: &Weights,
        dscores: &Tensor,
    ) -> Result<(Tensor, Option<Tensor>), TchError> {
        let dslopes = match &self.distances {
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
        let dproducts = match weights.of_cap()? {
            Some(of_cap) => dscores.f_mul(&of_cap)?,
            None => dscores.shallow_clone(),
        };
        Ok((dproducts.f_mul_scalar(self.scale)?, dslopes))
    }
}

impl Weights {
    /// The derivative of the capped scores by the uncapped.
    pub(super) fn of_cap(&self) -> Result<Option<Tensor>, TchError> {
        let derivative = |tanh: &Tensor| tanh.f_square()?.f_neg()?.f_add_scalar(1.0);
        self.tanh.as_ref().map(derivative).transpose()
    }
}

/// `|i - j|` of all queries and all keys.
pub(super) fn distances(queries: i64, keys: i64) -> Result<Tensor, TchError> {
    let places = |count| Tensor::f_arange(count, (Kind::Double, tch::Device::Cpu));
    places(queries)?
        .f_unsqueeze(1)?
        .f_sub(&places(keys)?)?
        .f_abs()
}
