//! A decoder of the Llama family on a batch, densely: its loss, its logits and
//! the gradient of every weight.
//!
//! All sequences of all replicas are computed at once. That ranks share them shows
//! in nothing but the order in which the gradient of a weight is summed: first
//! over the tokens of a rank, in its element type, and then over the ranks.

mod decoder;
mod layout;

use std::collections::BTreeMap;

use fixtures::ModelCase;
use fixtures::exchange::Declared;
use fixtures::loss::IGNORE_INDEX;
use fixtures::model::ModelInputs;
use tch::{Device, Kind, TchError, Tensor};

use self::decoder::Decoder;
use self::layout::Layout;
use super::due::{DueAnswer, DueTensor, upstream};
use super::loss::losses;
use super::rounding::{Computed, Rounding, rounded_at_once, unrounded};
use crate::diagnosis::Mistake;
use crate::tensor::from_array;

/// The mistakes that are told by what they make of the answer.
pub(super) const MISTAKES: [Mistake; 18] = [
    // The simplest first: two may say the same of a case.
    Mistake::GradientsOverRanks,
    Mistake::GradientsTimesRanks,
    Mistake::RotaryByLocalPosition,
    Mistake::CausalByLocalIndex,
    Mistake::DocumentsIgnored,
    Mistake::LocalTokensOnly,
    Mistake::LastLayerLocal,
    Mistake::KvHeadsTiled,
    Mistake::RecomputedElsewhere,
    Mistake::TiedGradientLost,
    Mistake::ReplicatedOfOneRank,
    Mistake::LabelsShiftedAgain,
    Mistake::EndOfShardUntrained,
    Mistake::MeanOfRankMeans,
    Mistake::MeanOfReplicaMeans,
    Mistake::OwnTokensOnly,
    Mistake::IgnoredCounted,
    Mistake::CotangentIgnored,
];

/// What is due; or what would come by a mistake, without the roots.
pub(super) fn due(
    case: &ModelCase,
    declared: Declared,
    mistake: Option<Mistake>,
) -> Result<DueAnswer, String> {
    let inputs = case.inputs();
    let failed = |error: TchError| format!("the oracle failed: {error}");
    let upstream = upstream(declared, case.world);
    let layout = Layout::of(case, &inputs).map_err(failed)?;
    let compute = |rounding: &Rounding, runs: i64| {
        compute(case, &inputs, &layout, upstream, mistake, rounding, runs)
    };
    let numbers = match mistake {
        None => rounded_at_once(case.dtype, case.seed, compute),
        Some(_) => unrounded(|rounding| compute(rounding, 1)),
    };
    let mut numbers = numbers.map_err(failed)?;
    let mut take = |name: &str, dtype, shape| DueTensor::take(&mut numbers, name, dtype, shape);
    let mut answer = DueAnswer::default();
    let shards = case.shards();
    for rank in 0..case.world {
        let tokens = shards[rank % shards.len()].len();
        let shape = vec![case.batch, tokens, case.vocabulary];
        let loss = take(&format!("loss {rank}"), case.loss_dtype(), Vec::new())?;
        let logits = take(&format!("logits {rank}"), case.dtype, shape)?;
        let of_rank = [("loss".to_owned(), loss), ("logits".to_owned(), logits)];
        answer.ranks.push(of_rank.into());
    }
    for (name, shape) in case.weights() {
        let gradient = format!("d{name}");
        let due = take(&gradient, case.dtype, shape)?;
        answer.sums.insert(gradient, due);
    }
    Ok(answer)
}

/// Loss, logits and gradients of several runs, those of each rank by its number.
fn compute(
    case: &ModelCase,
    inputs: &ModelInputs,
    layout: &Layout,
    upstream: f64,
    mistake: Option<Mistake>,
    rounding: &Rounding,
    runs: i64,
) -> Result<Computed, TchError> {
    let weights = inputs.weights.iter().map(|(name, array)| {
        let mut shape = vec![runs];
        shape.extend(array.shape.iter().map(|&size| size as i64));
        let weight = from_array(array)?.f_to_kind(Kind::Double)?;
        let weight = weight.f_expand(&shape, false)?.f_contiguous()?;
        Ok((name.clone(), weight.f_set_requires_grad(true)))
    });
    let weights = weights
        .map(|found: Result<_, TchError>| found.and_then(|(name, weight)| Ok((name, weight?))))
        .collect::<Result<BTreeMap<_, _>, _>>()?;
    let on_rank = |rank: usize| {
        let held = weights.iter().map(|(name, weight)| {
            let is_whole = name.ends_with("norm.weight") || name.contains("embed_tokens");
            let is_lost = mistake == Some(Mistake::ReplicatedOfOneRank) && is_whole && rank > 0;
            let weight = match is_lost {
                true => weight.f_detach()?,
                // The gradient of all uses by a rank is one number of its own.
                false => rounding.leaf(weight)?,
            };
            Ok((name.clone(), weight))
        });
        held.collect::<Result<BTreeMap<_, _>, TchError>>()
    };
    let decoder = Decoder {
        case,
        layout,
        rounding,
        runs,
        mistake,
        weights: (0..case.world).map(on_rank).collect::<Result<_, _>>()?,
    };
    let logits = decoder.logits(&decoder.hidden_states()?)?;
    let said = said(case, layout, mistake, rounding, &logits)?;
    let ranks = case.world as f64;
    let factor = match mistake {
        Some(Mistake::GradientsOverRanks) => 1.0 / ranks,
        Some(Mistake::GradientsTimesRanks) => ranks,
        _ => 1.0,
    };
    let cotangent = match mistake {
        Some(Mistake::CotangentIgnored) => 1.0,
        _ => inputs.cotangent,
    };
    // Of one loss that all ranks share each takes the gradient for its own.
    let mut objective = said[0].shallow_clone();
    if mistake == Some(Mistake::OwnTokensOnly) {
        for one in &said[1..] {
            objective = objective.f_add(one)?;
        }
    }
    objective
        .f_mul_scalar(cotangent * upstream * factor)?
        .f_sum(Kind::Double)?
        .f_backward()?;
    let mut computed = Computed::new();
    for (rank, (said, logits)) in said.iter().zip(&logits).enumerate() {
        computed.insert(format!("loss {rank}"), said.f_detach()?);
        computed.insert(format!("logits {rank}"), logits.f_detach()?);
    }
    for (name, weight) in weights {
        computed.insert(format!("d{name}"), weight.f_grad()?);
    }
    Ok(computed)
}

/// What each rank says the loss is, `[runs]`.
fn said(
    case: &ModelCase,
    layout: &Layout,
    mistake: Option<Mistake>,
    rounding: &Rounding,
    logits: &[Tensor],
) -> Result<Vec<Tensor>, TchError> {
    let labels = Tensor::f_from_slice(&layout.labels(mistake))?;
    let (mut sums, mut counts) = (Vec::new(), Vec::new());
    for (logits, &(first, count)) in logits.iter().zip(&layout.ranks) {
        let labels = labels.f_narrow(0, first, count)?;
        counts.push(match mistake {
            Some(Mistake::IgnoredCounted) => count as f64,
            _ => labels
                .f_not_equal(IGNORE_INDEX)?
                .f_sum(Kind::Double)?
                .f_double_value(&[])?,
        });
        let labels = labels
            .f_unsqueeze(0)?
            .f_expand([logits.size()[0], count], false)?;
        sums.push(rounding.sum(&losses(rounding, logits, &labels)?)?);
    }
    let ranks = || sums.iter().zip(&counts).collect::<Vec<_>>();
    let mean = |of: &[(&Tensor, &f64)]| {
        let mut total = Tensor::f_zeros([1], (Kind::Double, Device::Cpu))?;
        for (sum, _) in of {
            total = rounding.wide(&total.f_add(sum)?)?;
        }
        let valid: f64 = of.iter().map(|(_, count)| **count).sum();
        match valid > 0.0 {
            true => rounding.wide(&total.f_div_scalar(valid)?),
            false => total.f_mul_scalar(0.0),
        }
    };
    let mean_of_means = |each: usize| {
        let mut means = Tensor::f_zeros([1], (Kind::Double, Device::Cpu))?;
        for of in ranks().chunks(each) {
            means = means.f_add(&mean(of)?)?;
        }
        means.f_div_scalar((case.world / each) as f64)
    };
    let one = match mistake {
        Some(Mistake::OwnTokensOnly) => {
            return ranks().iter().map(|rank| mean(&[*rank])).collect();
        }
        Some(Mistake::MeanOfRankMeans) => mean_of_means(1)?,
        Some(Mistake::MeanOfReplicaMeans) => mean_of_means(case.sharing())?,
        _ => mean(&ranks())?,
    };
    Ok((0..case.world).map(|_| one.shallow_clone()).collect())
}
