//! How far the loss of a mesh may be from that of one process.
//!
//! Both compute the same sums, and add in another order. So each step's loss is
//! off for two reasons. With `u` for half the distance of 1 to the next number:
//!
//! 1. Forward rounds. A sum of n terms, in any order, is off by at most 6 sqrt(n) u
//!    of the sum of their magnitudes, but for once in 30000 sums of 1000 (Higham
//!    and Mary, "A New Approach to Probabilistic Rounding Error Analysis", SIAM J.
//!    Sci. Comput. 41(5), 2019, theorem 3.1: with probability 1 - 2 n exp(-6^2 / 2)).
//!    One that is made of others is off by theirs as well: a loss L by
//!    6 sqrt(k) u L, for the k additions of the longest way from a weight to it
//!    ([`additions`]). It takes magnitudes for what they sum to: norms hold them
//!    together, and what cancels is not counted.
//! 2. The weights differ, by what all steps before have rounded: to first order
//!    the loss by no more than the norm of its gradient times the distance of the
//!    weights (Cauchy and Schwarz). How far roundings of u move weights is
//!    measured and not guessed: one process trains in float32 beside float64, from
//!    the same weights. Their distance is what roundings of 2^-24 do, with all the
//!    ways of AdamW to make them larger, and those of u do u / 2^-24 of it.
//!
//! Each of two runs may be so far from exact arithmetic, and so twice the sum is
//! the tolerance. No run on a mesh has a part in it.

use super::{
    Result,
    arguments::{Dtype, Training},
    curve::Step,
    tokenizer::VOCABULARY,
    trainer::Trainer,
};
use std::sync::Arc;
use tch::{Kind, Tensor};
use ulysses::{Communicator, ThreadCommunicator};

/// What one process has in a step, and how far from it others may be.
pub(crate) struct Due {
    pub(crate) step: Step,
    pub(crate) tolerance: f64,
}

/// Trains on one process, in both dtypes.
pub(crate) fn one_process(training: &Training) -> Result<Vec<Due>> {
    let alone = |dtype| Trainer::new(world_of_one()?, &training.alone(dtype));
    let (mut single, mut double) = (alone(Dtype::F32)?, alone(Dtype::F64)?);
    let unit = match training.dtype {
        Dtype::F32 => UNIT_32,
        Dtype::F64 => f64::EPSILON / 2.0,
    };
    let forward = ROUNDINGS * unit * (additions(training)? as f64).sqrt();
    let step = |_| -> Result<Due> {
        let apart = unit / UNIT_32 * distance(&single, &double)?;
        let (single, double) = (single.step()?, double.step()?);
        let step = match training.dtype {
            Dtype::F32 => single,
            Dtype::F64 => double,
        };
        let tolerance = 2.0 * (forward * step.loss + step.gradient_norm * apart);
        Ok(Due { step, tolerance })
    };
    (0..training.steps).map(step).collect()
}

/// Of independent roundings, by how many deviations a sum of them is off at most.
const ROUNDINGS: f64 = 6.0;

const UNIT_32: f64 = f32::EPSILON as f64 / 2.0;

pub(crate) fn world_of_one() -> Result<Arc<dyn Communicator>> {
    let only = ThreadCommunicator::world(1).pop();
    Ok(Arc::new(only.ok_or("a world of one has no rank")?))
}

/// The additions on the longest way from a weight of the embedding to the loss.
pub(crate) fn additions(training: &Training) -> Result<usize> {
    let config = training.config()?;
    let (hidden, head) = (config.hidden_size, config.head_dim);
    let projection = hidden;
    let norm = hidden;
    // Scores, the divisor of softmax, and the mean of values.
    let attention = head + 2 * training.sequence;
    let output = training.heads * head;
    let layer = 2 * norm + projection + attention + output + projection + config.intermediate_size;
    let logits = norm + hidden;
    Ok(training.layers * layer + logits + VOCABULARY + training.targets())
}

/// Of all weights of two models, taken as two points.
fn distance(single: &Trainer, double: &Trainer) -> Result<f64> {
    let squares = single.weights().zip(double.weights());
    let squares = squares.map(|(single, double): (&Tensor, &Tensor)| {
        let apart = single.f_to_kind(Kind::Double)?.f_sub(double)?;
        apart
            .f_mul(&apart)?
            .f_sum(Kind::Double)?
            .f_double_value(&[])
    });
    let sum: f64 = squares.sum::<Result<f64, tch::TchError>>()?;
    Ok(sum.sqrt())
}
