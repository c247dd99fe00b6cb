//! Cross-entropy over the tokens of all ranks, and its gradients, densely.
//!
//! With logits z of a token and its label y the token's loss is
//! `ln(sum_c exp(z_c)) - z_y`. The loss is the sum over the tokens whose label is
//! not ignored, divided by their number, over all ranks; where there is none it
//! is 0.

use fixtures::Array;
use fixtures::exchange::Declared;
use fixtures::loss::{IGNORE_INDEX, LossCase, LossInputs};
use tch::{Device, Kind, TchError, Tensor};

use super::due::{DueAnswer, DueTensor, upstream};
use super::rounding::{Computed, Rounding, rounded, unrounded};
use crate::diagnosis::Mistake;
use crate::tensor::from_array;

/// The mistakes that are told by what they make of the answer.
pub(super) const MISTAKES: [Mistake; 7] = [
    Mistake::MeanOfRankMeans,
    Mistake::OwnTokensOnly,
    Mistake::IgnoredCounted,
    Mistake::CotangentIgnored,
    Mistake::HeadOfOneRank,
    Mistake::GradientsOverRanks,
    Mistake::GradientsTimesRanks,
];

/// What is due; or what would come by a mistake, without the roots.
pub(super) fn due(
    case: &LossCase,
    declared: Declared,
    mistake: Option<Mistake>,
) -> Result<DueAnswer, String> {
    let inputs = case.inputs();
    let failed = |error: TchError| format!("the oracle failed: {error}");
    let upstream = upstream(declared, case.world);
    let compute = |rounding: &Rounding| compute(case, &inputs, upstream, mistake, rounding);
    let numbers = match mistake {
        None => rounded(case.dtype, case.seed, compute),
        Some(_) => unrounded(compute),
    };
    let mut numbers = numbers.map_err(failed)?;
    let mut take = |name: &str, dtype, shape| DueTensor::take(&mut numbers, name, dtype, shape);
    let mut answer = DueAnswer::default();
    let gradient = format!("d{}", case.states_name());
    for (rank, shard) in case.shards().iter().enumerate() {
        let shape = vec![case.batch, shard.len(), inputs.states.shape[2]];
        let loss = take(&format!("loss {rank}"), case.loss_dtype(), Vec::new())?;
        let states = take(&format!("{gradient} {rank}"), case.dtype, shape)?;
        answer
            .ranks
            .push([("loss".to_owned(), loss), (gradient.clone(), states)].into());
    }
    if let Some(head) = &inputs.head {
        let gradient = take("dhead", case.dtype, head.shape.clone())?;
        answer.sums.insert("dhead".to_owned(), gradient);
    }
    Ok(answer)
}

/// Loss and gradients, those of each rank by its number.
fn compute(
    case: &LossCase,
    inputs: &LossInputs,
    upstream: f64,
    mistake: Option<Mistake>,
    rounding: &Rounding,
) -> Result<Computed, TchError> {
    let wide = |array: &Array| from_array(array)?.f_to_kind(Kind::Double);
    let leaf = |x: Tensor| x.f_set_requires_grad(true);
    let all = wide(&inputs.states)?;
    let head = inputs.head.as_ref().map(wide).transpose()?;
    let head = head.map(leaf).transpose()?;
    let labels =
        Tensor::f_from_slice(&inputs.labels)?.f_view([case.batch as i64, case.sequence as i64])?;
    let (mut states, mut sums, mut counts) = (Vec::new(), Vec::new(), Vec::new());
    for shard in case.shards() {
        let first = shard.tokens().first().copied().unwrap_or(0) as i64;
        let tokens = shard.len() as i64;
        let own = leaf(all.f_narrow(1, first, tokens)?.f_contiguous()?)?;
        let labels = labels.f_narrow(1, first, tokens)?;
        let logits = match &head {
            Some(head) => {
                let head = match mistake {
                    Some(Mistake::HeadOfOneRank) if !states.is_empty() => head.f_detach()?,
                    _ => rounding.leaf(head)?,
                };
                let head = head.f_transpose(0, 1)?;
                rounding.stored(&rounding.matmul(&rounding.leaf(&own)?, &head)?)?
            }
            None => rounding.leaf(&own)?,
        };
        let valid = match mistake {
            // An ignored label counts, with a loss of 0.
            Some(Mistake::IgnoredCounted) => labels.f_ones_like()?.f_to_kind(Kind::Double)?,
            _ => labels.f_not_equal(IGNORE_INDEX)?.f_to_kind(Kind::Double)?,
        };
        let losses = losses(rounding, &logits, &labels)?;
        sums.push(
            rounding
                .sum(&losses.f_reshape([1, losses.numel() as i64])?)?
                .f_squeeze()?,
        );
        counts.push(valid.f_sum(Kind::Double)?.f_double_value(&[])?);
        states.push(own);
    }
    let valid = counts.iter().sum::<f64>();
    let ranks = case.world as f64;
    let zero = || Tensor::f_zeros([], (Kind::Double, Device::Cpu));
    let mean = |sum: &Tensor, count: f64| match count > 0.0 {
        true => sum.f_div_scalar(count),
        false => sum.f_mul_scalar(0.0),
    };
    // What each rank says the loss is, and of what it takes gradients.
    let mut total = zero()?;
    for sum in &sums {
        total = total.f_add(sum)?;
    }
    let of_all = rounding.wide(&mean(&total, valid)?)?;
    let said: Vec<Tensor> = match mistake {
        Some(Mistake::MeanOfRankMeans) => {
            let mut means = zero()?;
            for (sum, &count) in sums.iter().zip(&counts) {
                means = means.f_add(&mean(sum, count)?.f_div_scalar(ranks)?)?;
            }
            (0..case.world).map(|_| means.shallow_clone()).collect()
        }
        Some(Mistake::OwnTokensOnly) => sums
            .iter()
            .zip(&counts)
            .map(|(sum, &count)| mean(sum, count))
            .collect::<Result<_, _>>()?,
        _ => (0..case.world).map(|_| of_all.shallow_clone()).collect(),
    };
    let factor = match mistake {
        Some(Mistake::GradientsOverRanks) => 1.0 / ranks,
        Some(Mistake::GradientsTimesRanks) => ranks,
        _ => 1.0,
    };
    // Of one loss that all ranks share each takes the gradient for its own.
    let mut objective = said[0].shallow_clone();
    if mistake == Some(Mistake::OwnTokensOnly) {
        for one in &said[1..] {
            objective = objective.f_add(one)?;
        }
    }
    let cotangent = match mistake {
        Some(Mistake::CotangentIgnored) => 1.0,
        _ => inputs.cotangent,
    };
    objective
        .f_mul_scalar(cotangent * upstream * factor)?
        .f_backward()?;
    let mut computed = Computed::new();
    for (rank, (own, said)) in states.iter().zip(&said).enumerate() {
        computed.insert(format!("d{} {rank}", case.states_name()), own.f_grad()?);
        computed.insert(format!("loss {rank}"), said.f_detach()?);
    }
    if let Some(head) = head {
        computed.insert("dhead".to_owned(), head.f_grad()?);
    }
    Ok(computed)
}

/// The loss of each token, 0 where the label is ignored.
pub(super) fn losses(
    rounding: &Rounding,
    logits: &Tensor,
    labels: &Tensor,
) -> Result<Tensor, TchError> {
    let largest = logits.f_detach()?.f_amax([-1], true)?;
    let shifted = rounding.wide(&logits.f_sub(&largest)?)?;
    let total = rounding.sum(&rounding.wide(&shifted.f_exp()?)?)?;
    let is_valid = labels.f_not_equal(IGNORE_INDEX)?;
    let label = labels.f_clamp_min(0)?.f_unsqueeze(-1)?;
    let of_label = shifted.f_gather(-1, &label, false)?.f_squeeze_dim(-1)?;
    let loss = rounding.wide(&rounding.wide(&total.f_log()?)?.f_sub(&of_label)?)?;
    loss.f_mul(&is_valid.f_to_kind(Kind::Double)?)
}
