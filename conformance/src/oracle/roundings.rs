//! How far off an honest answer may be, to first order: what the rounding of
//! each intermediate number does to each row.
//!
//! Attention that keeps its intermediates in an element type of unit roundoff u
//! and takes its sums in one of unit roundoff w (float32's for half types, else
//! the same) makes these errors, independent of one another and of either sign:
//!
//! | what | is off by |
//! |---|---|
//! | a score s of a query q and a key k | `u abs(s)` and `w(D) scale norm(q) norm(k)` |
//! | a weight P of it | `u P`, and by what the scores of its row are off |
//! | dP = dO V^T | `u abs(dP)` and `w(Dv) norm(dO) norm(v)` |
//! | D = rowsum(dO * O) | u times its terms, whichever way it is summed |
//! | dS = P * (dP - D) | `u abs(dS)`, and by what its factors are off |
//! | an answer | u times itself, and w(n) times the sum of the n sizes that are summed |
//!
//! `w(n) = w sqrt(n / 3)`: of n terms of one size, the i-th sum is i of them and
//! is rounded by w times that.
//!
//! Each times what it does to a row of an answer, squared and added up, is the
//! variance of that row. The first terms matter where dP and D cancel: the
//! gradient of a query that sees one key is zero, and what an implementation
//! has there is rounding alone.
//!
//! Source: Higham and Mary, "A new approach to probabilistic rounding error
//! analysis", SIAM J. Sci. Comput. 41(5), 2019, for roundings as independent
//! errors of mean zero.

use fixtures::Dtype;
use tch::{Kind, TchError, Tensor};

use super::preparation::Prepared;
use super::{AnswerTensor, elements};

/// A block of rows of the score matrix on its way through forward and backward;
/// `[batch, query heads, rows, ..]` each, keys and values whole.
pub(super) struct Block<'a> {
    pub(super) q: &'a Tensor,
    pub(super) k: &'a Tensor,
    pub(super) v: &'a Tensor,
    pub(super) dout: &'a Tensor,
    /// `scale q k^T`
    pub(super) scores: &'a Tensor,
    /// The derivative of capped scores, where there is a cap.
    pub(super) of_cap: Option<&'a Tensor>,
    /// The softmax.
    pub(super) softmax: &'a Tensor,
    /// The softmax, after dropout.
    pub(super) weights: &'a Tensor,
    pub(super) out: &'a Tensor,
    /// dP, after dropout.
    pub(super) dweights: &'a Tensor,
    /// D, a number for each row.
    pub(super) dout_dot_out: &'a Tensor,
    pub(super) dscores: &'a Tensor,
    /// The gradient of q k^T.
    pub(super) dproducts: &'a Tensor,
    pub(super) dq: &'a Tensor,
}

/// Standard deviations of the rows of out, dq, dk and dv, `[batch, heads,
/// tokens]`.
pub(crate) struct Deviations {
    out: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
}

impl Deviations {
    /// Those of one tensor, in the order of `[batch, tokens, heads]`; none for
    /// gradients of head state.
    pub(crate) fn of(&self, tensor: AnswerTensor) -> Result<Vec<f64>, TchError> {
        let deviations = match tensor {
            AnswerTensor::Out => &self.out,
            AnswerTensor::QueryGradient => &self.dq,
            AnswerTensor::KeyGradient => &self.dk,
            AnswerTensor::ValueGradient => &self.dv,
            _ => return Ok(Vec::new()),
        };
        elements(&deviations.f_transpose(1, 2)?)
    }
}

/// Variances, as far as blocks have been seen.
pub(super) struct Roundings {
    /// Squared unit roundoff of elements.
    u2: f64,
    /// Squared unit roundoff of sums.
    w2: f64,
    /// Squared half of the smallest number of the element type.
    tiny2: f64,
    /// Whether queries and keys are rounded before they meet.
    is_prepared: bool,
    scale2: f64,
    out: Vec<Tensor>,
    dq: Vec<Tensor>,
    dk: KeySums,
    dv: KeySums,
}

/// Of each key `[batch, query heads, keys]`: a variance, and the sum of the
/// norms that are summed.
#[derive(Default)]
struct KeySums {
    variance: Option<Tensor>,
    norms: Option<Tensor>,
}

impl Roundings {
    pub(super) fn new(dtype: Dtype, scale: f64, is_prepared: bool) -> Roundings {
        let u = dtype.unit_roundoff();
        let w = u.min(Dtype::F32.unit_roundoff());
        // Weights and gradients are seldom as small as bfloat16 can be.
        let tiny = if dtype == Dtype::F16 {
            2f64.powi(-25)
        } else {
            0.0
        };
        Roundings {
            u2: u * u,
            w2: w * w,
            tiny2: tiny * tiny,
            is_prepared,
            scale2: scale * scale,
            out: Vec::new(),
            dq: Vec::new(),
            dk: KeySums::default(),
            dv: KeySums::default(),
        }
    }

    /// The square of what a sum of so many terms is off, relative to the sum of
    /// their sizes.
    fn of_sum(&self, terms: i64) -> f64 {
        self.w2 * (terms as f64 / 3.0).max(1.0)
    }

    /// Adds a block of rows.
    pub(super) fn add(&mut self, block: &Block<'_>) -> Result<(), TchError> {
        let u2 = self.u2;
        let [over_channels, over_value_channels, over_all_keys] = [
            self.of_sum(block.q.size()[3]),
            self.of_sum(block.v.size()[3]),
            self.of_sum(block.k.size()[2]),
        ];
        let [q2, k2, v2] = [norms2(block.q)?, norms2(block.k)?, norms2(block.v)?];
        let (k2, v2) = (k2.f_transpose(2, 3)?, v2.f_transpose(2, 3)?);
        let [dout2, out2] = [norms2(block.dout)?, norms2(block.out)?];
        let (softmax2, weights2) = (block.softmax.f_square()?, block.weights.f_square()?);

        // What scores are off by, and what that makes of weights.
        let met2 = q2.f_mul(&k2)?.f_mul_scalar(self.scale2)?;
        let of_prepared = if self.is_prepared { 4.0 * u2 } else { 0.0 };
        let of_products = over_channels + of_prepared;
        let mut scores = block.scores.f_square()?.f_mul_scalar(u2)?;
        scores = scores.f_add(&met2.f_mul_scalar(of_products)?)?;
        if let Some(of_cap) = block.of_cap {
            scores = scores.f_mul(&of_cap.f_square()?)?.f_add_scalar(u2)?;
        }
        let of_row = over_keys(&softmax2.f_mul(&scores)?)?;
        let relative = scores.f_add(&of_row)?.f_add_scalar(u2)?;
        let stored = |numbers2: &Tensor| numbers2.f_mul_scalar(u2)?.f_add_scalar(self.tiny2);

        // out = W V, where a score moves a row away from what it is.
        let along = block.out.f_matmul(&block.v.f_transpose(2, 3)?)?;
        let away2 = weights2
            .f_mul(&v2)?
            .f_sub(
                &block
                    .softmax
                    .f_mul(block.weights)?
                    .f_mul(&along)?
                    .f_mul_scalar(2.0)?,
            )?
            .f_add(&softmax2.f_mul(&out2)?)?
            .f_clamp_min(0.0)?;
        let out = over_keys(&scores.f_mul(&away2)?)?
            .f_add(&over_keys(&stored(&weights2)?.f_mul(&v2)?)?)?
            .f_add(&out2.f_mul_scalar(u2)?)?
            .f_add(
                &over_keys(&block.weights.f_mul(&v2.f_sqrt()?)?)?
                    .f_square()?
                    .f_mul_scalar(over_all_keys)?,
            )?;
        self.out.push(out.f_squeeze_dim(-1)?);

        // dV = W^T dO.
        let of_weights = weights2.f_mul(&relative)?.f_add_scalar(self.tiny2)?;
        let summed = block.weights.f_mul(&dout2.f_sqrt()?)?;
        self.dv.add(&of_weights.f_mul(&dout2)?, &summed)?;

        // dS = P (dP - D).
        let difference2 = block.dweights.f_sub(block.dout_dot_out)?.f_square()?;
        let dweights2 = softmax2.f_mul(&block.dweights.f_square()?)?;
        let summed2 = weights2
            .f_mul(&dout2.f_mul(&v2)?)?
            .f_mul_scalar(over_value_channels)?;
        let dscores = softmax2
            .f_mul(&relative)?
            .f_mul(&difference2)?
            .f_add(&dweights2.f_mul_scalar(u2)?)?
            .f_add(&summed2)?
            .f_add(&stored(&block.dscores.f_square()?)?)?;
        let of_terms = block.dout.f_mul(block.out)?;
        let of_d = norms2(&of_terms)?
            .f_mul_scalar(u2)?
            .f_add(&dout2.f_mul(&out2)?.f_mul_scalar(over_value_channels)?)?
            .f_add(&over_keys(&softmax2.f_mul(&scores)?.f_mul(&difference2)?)?)?
            .f_add(&over_keys(&dweights2)?.f_mul_scalar(2.0 * u2)?)?;

        // dQ = dS K scale, and dK = dS^T Q scale, through a cap.
        let through = match block.of_cap {
            Some(of_cap) => of_cap.f_square()?.f_mul_scalar(self.scale2)?,
            None => Tensor::f_full([1], self.scale2, (Kind::Double, block.q.device()))?,
        };
        let dproducts2 = block.dproducts.f_square()?;
        let own = dscores
            .f_mul(&through)?
            .f_add(&dproducts2.f_mul_scalar(of_prepared)?)?;
        let passed = block.softmax.f_mul(&through.f_sqrt()?)?;
        let sizes = block.dproducts.f_abs()?;
        let dq = over_keys(&own.f_mul(&k2)?)?
            .f_add(&of_d.f_mul(&norms2(&passed.f_matmul(block.k)?)?)?)?
            .f_add(&norms2(block.dq)?.f_mul_scalar(u2)?)?
            .f_add(
                &over_keys(&sizes.f_mul(&k2.f_sqrt()?)?)?
                    .f_square()?
                    .f_mul_scalar(over_all_keys)?,
            )?;
        self.dq.push(dq.f_squeeze_dim(-1)?);
        let own = own.f_add(&passed.f_square()?.f_mul(&of_d)?)?;
        self.dk.add(&own.f_mul(&q2)?, &sizes.f_mul(&q2.f_sqrt()?)?)
    }

    /// The deviations of all rows, given dk and dv of each query head, and how
    /// queries and keys were prepared.
    pub(super) fn finish(
        self,
        [dk, dv]: [&Tensor; 2],
        sum_groups: impl Fn(&Tensor) -> Result<Tensor, TchError>,
        [queries, keys]: [&Prepared; 2],
    ) -> Result<Deviations, TchError> {
        let dq = Tensor::f_cat(&self.dq, 2)?;
        let (u2, over_rows) = (self.u2, self.of_sum(dq.size()[2]));
        let of_keys = |sums: KeySums, gradient: &Tensor| {
            let rounded = norms2(gradient)?.f_squeeze_dim(-1)?.f_mul_scalar(u2)?;
            sum_groups(&sums.variance(over_rows)?.f_add(&rounded)?)
        };
        let (dk, dv) = (of_keys(self.dk, dk)?, of_keys(self.dv, dv)?);
        Ok(Deviations {
            out: Tensor::f_cat(&self.out, 2)?.f_sqrt()?,
            dq: queries.stretch(&dq.f_sqrt()?)?,
            dk: keys.stretch(&dk.f_sqrt()?)?,
            dv: dv.f_sqrt()?,
        })
    }
}

impl KeySums {
    fn add(&mut self, variances: &Tensor, norms: &Tensor) -> Result<(), TchError> {
        let over_rows =
            |tensor: &Tensor| tensor.f_sum_dim_intlist([2].as_slice(), false, Kind::Double);
        let plus = |sum: &Option<Tensor>, more: Tensor| match sum {
            Some(sum) => sum.f_add(&more).map(Some),
            None => Ok(Some(more)),
        };
        self.variance = plus(&self.variance, over_rows(variances)?)?;
        self.norms = plus(&self.norms, over_rows(norms)?)?;
        Ok(())
    }

    fn variance(self, of_sum: f64) -> Result<Tensor, TchError> {
        match (self.variance, self.norms) {
            (Some(variance), Some(norms)) => {
                variance.f_add(&norms.f_square()?.f_mul_scalar(of_sum)?)
            }
            _ => Err(TchError::Shape(
                "a case has at least one block of rows".to_owned(),
            )),
        }
    }
}

/// The squared norms of the last dimension, which stays.
fn norms2(tensor: &Tensor) -> Result<Tensor, TchError> {
    over_keys(&tensor.f_square()?)
}

/// The sum over the last dimension, which stays.
fn over_keys(tensor: &Tensor) -> Result<Tensor, TchError> {
    tensor.f_sum_dim_intlist([-1].as_slice(), true, Kind::Double)
}
