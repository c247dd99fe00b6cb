//! Mistakes in the loss over the tokens of all ranks.

use std::sync::Arc;

use fixtures::exchange::{AskedInfo, Tensors};
use fixtures::loss::{IGNORE_INDEX, Ignored, LossInfo};
use fixtures::{Array, Case, LossCase};
use tch::Device;
use ulysses::{Communicator, ThreadCommunicator};

use super::rank::{Halt, Staged};
use super::{Fault, Made, Told};
use crate::diagnosis::Mistake;
use crate::implementation::answer_of_profile;

pub(super) const FAULTS: &[Fault] = &[
    Fault {
        name: "mean-of-rank-means",
        mistake: Mistake::MeanOfRankMeans,
        effect: "ranks with few labels weigh as much as ranks with many",
        source: Some("verl#2857"),
        made: Made::InProfile {
            applies: |case| is(case, |case| case.ignored != Ignored::All),
            answer: |told| {
                let mut answer = alone(told)?;
                let means = told.communicator.all_gather(&[bits(loss(&answer)?)])?;
                let sum: f64 = means.iter().map(|mean| number(mean)).sum();
                let ranks = told.info.world as f64;
                scale(&mut answer, 1.0 / ranks);
                set_loss(&mut answer, sum / ranks);
                Ok(answer)
            },
        },
    },
    Fault {
        name: "loss-of-own-tokens",
        mistake: Mistake::OwnTokensOnly,
        effect: "each rank reports and follows another loss",
        source: Some("transformers#36607"),
        made: Made::InProfile {
            applies: |case| is(case, |case| case.ignored != Ignored::All),
            answer: alone,
        },
    },
    Fault {
        name: "ignored-labels-counted",
        mistake: Mistake::IgnoredCounted,
        effect: "padding makes the loss smaller",
        source: Some("360-LLaMA-Factory#72"),
        made: Made::InProfile {
            applies: |case| is(case, |case| case.ignored != Ignored::Nothing),
            answer: |told| {
                let counts = told.communicator.all_gather(&counts(told)?.map(bits))?;
                let sum = |place: usize| counts.iter().map(|c| number(&c[place..])).sum::<f64>();
                let share = sum(0) / sum(1);
                let mut answer = told.right()?;
                let loss = loss(&answer)? * share;
                scale(&mut answer, share);
                set_loss(&mut answer, loss);
                Ok(answer)
            },
        },
    },
    Fault {
        name: "gathered-loss-times-ranks",
        mistake: Mistake::GradientsTimesRanks,
        effect: "a gradient norm that grows with the number of ranks, and the right loss",
        source: Some("DeepSpeed#5248"),
        made: Made::InProfile {
            applies: |case| is(case, |case| case.ignored != Ignored::All),
            answer: |told| {
                let mut answer = told.right()?;
                scale(&mut answer, told.info.world as f64);
                Ok(answer)
            },
        },
    },
    Fault {
        name: "sliced-loss-over-ranks",
        mistake: Mistake::GradientsOverRanks,
        effect: "a gradient norm that shrinks with the number of ranks, and the right loss",
        source: Some("DeepSpeed#6841"),
        made: Made::InProfile {
            applies: |case| is(case, |case| case.ignored != Ignored::All),
            answer: |told| {
                let mut answer = told.right()?;
                scale(&mut answer, 1.0 / told.info.world as f64);
                Ok(answer)
            },
        },
    },
    Fault {
        name: "rank-without-labels-is-nan",
        mistake: Mistake::NotANumber,
        effect: "the loss is not a number as soon as one rank has no label",
        source: Some("transformers#47068"),
        made: Made::InProfile {
            applies: |case| {
                is(case, |case| {
                    matches!(case.ignored, Ignored::Rank | Ignored::All)
                })
            },
            answer: |told| {
                let mut answer = told.right()?;
                set_loss(&mut answer, f64::NAN);
                Ok(answer)
            },
        },
    },
    Fault {
        name: "exponentials-overflow",
        mistake: Mistake::NotANumber,
        effect: "the loss is infinite where logits are large",
        source: Some("DeepSpeed 0.19.5, vocab_sequence_parallel_cross_entropy"),
        made: Made::InProfile {
            applies: |case| is(case, |case| case.is_large),
            answer: |told| {
                let mut answer = told.right()?;
                set_loss(&mut answer, f64::INFINITY);
                scale(&mut answer, f64::NAN);
                Ok(answer)
            },
        },
    },
    Fault {
        name: "loss-cotangent-ignored",
        mistake: Mistake::CotangentIgnored,
        effect: "gradient accumulation and loss scaling change nothing",
        source: Some("DeepSpeed, TiledFusedLogitsLoss in tests of 0.17"),
        made: Made::InProfile {
            applies: |case| is(case, |case| case.cotangent.is_some()),
            answer: |told| {
                let mut inputs = told.inputs.clone();
                if let Some(dloss) = inputs.get_mut("dloss") {
                    *dloss = Array::from_f64(dloss.dtype, &[], &[1.0]);
                }
                answer(told.communicator, told, &inputs)
            },
        },
    },
    Fault {
        name: "head-gradient-of-one-rank",
        mistake: Mistake::HeadOfOneRank,
        effect: "each rank's head learns from its own tokens, and they drift apart",
        source: Some("VeOmni#1059"),
        made: Made::InProfile {
            applies: |case| {
                is(case, |case| {
                    case.hidden.is_some() && case.ignored != Ignored::All
                })
            },
            answer: |told| {
                let mut answer = told.right()?;
                if told.info.rank > 0
                    && let Some(head) = answer.get_mut("dhead")
                {
                    *head = times(head, 0.0);
                }
                Ok(answer)
            },
        },
    },
];

/// Whether this is a good question of the profile among several ranks.
fn is(case: &Case, of: fn(&LossCase) -> bool) -> bool {
    matches!(case, Case::Loss(case) if case.world > 1 && case.defect.is_none() && of(case))
}

fn info<'a>(told: &'a Told<'_>) -> Staged<&'a LossInfo> {
    match &told.info.asked {
        AskedInfo::Loss(info) => Ok(info),
        _ => Err(Halt::Said("this is another profile".to_owned())),
    }
}

fn answer(
    communicator: &Arc<dyn Communicator>,
    told: &Told<'_>,
    inputs: &Tensors,
) -> Staged<Tensors> {
    answer_of_profile(communicator, Device::Cpu, told.info, inputs).map_err(Halt::Said)
}

/// What a rank answers that knows nothing of the others.
fn alone(told: &Told<'_>) -> Staged<Tensors> {
    let alone = ThreadCommunicator::world(1).into_iter().next();
    let alone = alone.ok_or_else(|| Halt::Said("there is no rank".to_owned()))?;
    let alone: Arc<dyn Communicator> = Arc::new(alone);
    answer(&alone, told, told.inputs)
}

/// How many labels of this rank count, and how many it has.
fn counts(told: &Told<'_>) -> Staged<[f64; 2]> {
    info(told)?;
    let labels = told.inputs.get("labels").map(Array::to_f64);
    let labels = labels.ok_or_else(|| Halt::Said("there are no labels".to_owned()))?;
    let valid = labels.iter().filter(|&&label| label != IGNORE_INDEX as f64);
    Ok([valid.count() as f64, labels.len() as f64])
}

pub(super) fn bits(number: f64) -> i64 {
    number.to_bits() as i64
}

pub(super) fn number(words: &[i64]) -> f64 {
    words
        .first()
        .map_or(0.0, |&word| f64::from_bits(word as u64))
}

pub(super) fn loss(answer: &Tensors) -> Staged<f64> {
    let loss = answer
        .get("loss")
        .and_then(|loss| loss.to_f64().first().copied());
    loss.ok_or_else(|| Halt::Said("there is no loss".to_owned()))
}

pub(super) fn set_loss(answer: &mut Tensors, value: f64) {
    if let Some(loss) = answer.get_mut("loss") {
        *loss = Array::from_f64(loss.dtype, &[], &[value]);
    }
}

/// Multiplies all gradients.
pub(super) fn scale(answer: &mut Tensors, factor: f64) {
    for (name, array) in answer {
        if name.starts_with('d') {
            *array = times(array, factor);
        }
    }
}

pub(super) fn times(array: &Array, factor: f64) -> Array {
    let numbers: Vec<f64> = array.to_f64().iter().map(|x| x * factor).collect();
    Array::from_f64(array.dtype, &array.shape, &numbers)
}
