//! Normalisation of queries and keys, each head by itself.
//!
//! Each head of each token is divided by the root of the mean of its squares
//! and multiplied with a weight for each of its channels. In the order and the
//! precision of Hugging Face's `LlamaRMSNorm`: the half types are normalised
//! in float32, rounded, and then weighted.
//!
//! Source: Zhang and Sennrich, "Root Mean Square Layer Normalization",
//! arXiv:1910.07467; for queries and keys Henry et al., arXiv:2010.04245.

use crate::error::{Result, refuse};
use tch::{Kind, Tensor};

/// `x` [B, S, H, D] with each head divided by `sqrt(mean(x^2) + epsilon)` over
/// its D channels, and multiplied with `weight` [H, D].
///
/// `weight` has the dtype of `x`, and so has the result. Differentiable in
/// both.
///
/// # Errors
/// Refused when `weight` has another shape or dtype than that of the heads of
/// `x`, or `epsilon` is not a number from zero on.
pub fn normalize_heads(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<Tensor> {
    let kind = x.f_kind()?;
    check(x, weight, kind, epsilon)?;
    let precise = match kind {
        Kind::Half | Kind::BFloat16 => Kind::Float,
        other => other,
    };
    let x = x.f_to_kind(precise)?;
    let mean_square = x.f_square()?.f_mean_dim(-1, true, None)?;
    let inverse_root = mean_square.f_add_scalar(epsilon)?.f_rsqrt()?;
    Ok(x.f_mul(&inverse_root)?.f_to_kind(kind)?.f_mul(weight)?)
}

fn check(x: &Tensor, weight: &Tensor, kind: Kind, epsilon: f64) -> Result<()> {
    let size = x.size();
    let &[_, _, heads, head_size] = &size[..] else {
        let problem = format!("has shape {size:?}");
        let remedy = "give [batch, tokens, heads, head size]";
        return refuse("x", problem, remedy);
    };
    if weight.size() != [heads, head_size] || weight.f_kind()? != kind {
        let problem = format!(
            "has shape {:?} and kind {:?}",
            weight.size(),
            weight.f_kind()?
        );
        let remedy = format!("give [{heads}, {head_size}] of kind {kind:?}");
        return refuse("weight", problem, remedy);
    }
    if !(epsilon.is_finite() && epsilon >= 0.0) {
        let problem = format!("is {epsilon}");
        return refuse("epsilon", problem, "give a number from zero on");
    }
    Ok(())
}
