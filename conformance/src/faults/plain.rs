//! Attention in plain differentiable tensor operations, for what the
//! reference's core attention has no way to get wrong.

use tch::{Kind, Tensor};
use ulysses::Mask;

use super::local::Local;
use super::rank::Staged;

/// Attention with all of `local` but layouts and dropout, to keys and values of
/// which each query head has its own. A query that sees nothing gets
/// zeros.
pub(super) fn attention(local: &Local, [query, key, value]: [&Tensor; 3]) -> Staged<Tensor> {
    Ok(weights(local, query, key)?.f_matmul(value)?)
}

/// The attention weights for keys of which each query head has its own,
/// [B, h, S, S].
pub(super) fn weights(local: &Local, query: &Tensor, key: &Tensor) -> Staged<Tensor> {
    let kind = query.f_kind()?;
    let precise = match kind {
        Kind::Half | Kind::BFloat16 => Kind::Float,
        other => other,
    };
    let usual = 1.0 / (query.size()[3] as f64).sqrt();
    let mut scores = query
        .f_matmul(&key.f_transpose(2, 3)?)?
        .f_mul_scalar(local.score.scale.unwrap_or(usual))?
        .f_to_kind(precise)?;
    if let Some(softcap) = local.score.softcap {
        scores = scores.f_div_scalar(softcap)?.f_tanh()?;
        scores = scores.f_mul_scalar(softcap)?;
    }
    if let Some(slopes) = &local.slopes {
        let distances = match &local.distances {
            Some(distances) => distances.shallow_clone(),
            None => between(&global_numbers(local)?)?.f_abs()?,
        };
        let slopes = slopes.f_to_kind(precise)?.f_view([-1, 1, 1])?;
        scores = scores.f_sub(&slopes.f_mul(&distances.f_to_kind(precise)?)?)?;
    }
    let hidden = match &local.visible {
        Some(visible) => visible.f_logical_not()?,
        None => visible(local)?.f_logical_not()?,
    };
    // A finite number, so that rows without a key have finite gradients.
    let scores = scores.f_masked_fill(&hidden, -1e30)?;
    let weights = match &local.sinks {
        None => scores.f_softmax(-1, None)?,
        Some(sinks) => {
            let mut size = scores.size();
            size[3] = 1;
            let sinks = sinks.f_to_kind(precise)?.f_view([1, -1, 1, 1])?;
            let with_sink = Tensor::f_cat(&[&scores, &sinks.f_expand(size, false)?], 3)?;
            let keys = scores.size()[3];
            with_sink.f_softmax(-1, None)?.f_narrow(3, 0, keys)?
        }
    };
    Ok(weights.f_masked_fill(&hidden, 0.0)?.f_to_kind(kind)?)
}

/// Which keys a query sees, bool [B|1, 1, S, S]: mask, window, documents and
/// padding.
pub(super) fn visible(local: &Local) -> Staged<Tensor> {
    let numbers = global_numbers(local)?;
    let mut visible = by_order(local, &numbers)?;
    if let Some(segments) = local.segments() {
        let tokens = local.tokens.total();
        let mut run_of = vec![-1i64; segments.len() * tokens];
        for (runs, row) in segments.iter().zip(run_of.chunks_mut(tokens)) {
            for (number, run) in runs.iter().enumerate() {
                row[run.clone()].fill(number as i64);
            }
        }
        let size = [segments.len() as i64, 1, tokens as i64];
        let of_key = Tensor::f_from_slice(&run_of)?
            .f_view(size)?
            .f_unsqueeze(2)?;
        let of_query = of_key.f_transpose(2, 3)?;
        let same = of_query.f_eq_tensor(&of_key)?;
        visible = visible
            .f_logical_and(&same)?
            .f_logical_and(&of_query.f_ge(0)?)?;
    }
    Ok(visible)
}

/// What mask and window let tokens of these numbers, [S], see, [S, S].
pub(super) fn by_order(local: &Local, numbers: &Tensor) -> Staged<Tensor> {
    let behind = between(numbers)?;
    let mut visible = match local.score.mask {
        Mask::Full => behind.f_eq_tensor(&behind)?,
        Mask::Causal => behind.f_ge(0)?,
    };
    if let Some(window) = local.score.window {
        let is_near = behind.f_abs()?.f_lt(window as i64)?;
        visible = visible.f_logical_and(&is_near)?;
    }
    Ok(visible)
}

/// By how much the number of a query exceeds that of a key, [S, S].
pub(super) fn between(numbers: &Tensor) -> Staged<Tensor> {
    Ok(numbers.f_unsqueeze(1)?.f_sub(numbers)?)
}

/// The number of each token in the whole sequence, [S].
pub(super) fn global_numbers(local: &Local) -> Staged<Tensor> {
    let tokens = local.tokens.total() as i64;
    Ok(Tensor::f_arange(tokens, (Kind::Int64, tch::Device::Cpu))?)
}

/// The number of each token on its rank, [S] in global order.
pub(super) fn local_numbers(local: &Local) -> Staged<Tensor> {
    let mut numbers = vec![0i64; local.tokens.total()];
    for rank in 0..local.tokens.ranks() {
        for (number, place) in local.tokens.places(rank).enumerate() {
            numbers[place] = number as i64;
        }
    }
    Ok(Tensor::f_from_slice(&numbers)?)
}
