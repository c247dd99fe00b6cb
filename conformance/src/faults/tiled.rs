//! Mistakes in functions that are computed in tiles.

use std::ops::Range;

use fixtures::exchange::{AskedInfo, Tensors, tensor};
use fixtures::sharding::{Shard, cut};
use fixtures::tiled::{Frozen, Function, Ignored, Reduction, TiledInfo, tiles};
use fixtures::{Array, Case, TiledCase};

use super::rank::{Halt, Staged};
use super::{Fault, Made, Told};
use crate::diagnosis::Mistake;
use crate::implementation::answer_of_profile;
use tch::Device;

pub(super) const FAULTS: &[Fault] = &[
    Fault {
        name: "mean-of-tile-means",
        mistake: Mistake::MeanOfTiles,
        effect: "labels in a short tile weigh more than those in a long one",
        source: Some("DeepSpeed 0.19.8, sequence_tiled_compute"),
        made: Made::InProfile {
            applies: |case| is(case, is_mean_of_some),
            answer: |told| ask(told, |info, _| reduce(info, Reduction::MeanOfTiles)),
        },
    },
    Fault {
        name: "tile-means-not-asked",
        mistake: Mistake::MeanOfTokens,
        effect: "a run that was begun with the mean of tiles does not go on as it was",
        source: None,
        made: Made::InProfile {
            applies: |case| is(case, |case| case.reduction == Reduction::MeanOfTiles),
            answer: |told| ask(told, |info, _| reduce(info, Reduction::Mean)),
        },
    },
    Fault {
        name: "tile-means-in-backward",
        mistake: Mistake::TileMeansInBackward,
        effect: "a gradient that is not that of the loss, which is right",
        source: Some("DeepSpeed PR #8587"),
        made: Made::InProfile {
            applies: |case| is(case, is_mean_of_some),
            answer: |told| {
                let mut answer = ask(told, |info, _| reduce(info, Reduction::MeanOfTiles))?;
                answer.extend(told.right()?.remove_entry("out"));
                Ok(answer)
            },
        },
    },
    Fault {
        name: "tiled-mean-of-all-labels",
        mistake: Mistake::IgnoredCounted,
        effect: "padding makes the loss smaller",
        source: None,
        made: Made::InProfile {
            applies: |case| {
                is(case, |case| {
                    case.reduction == Reduction::Mean
                        && matches!(case.ignored, Ignored::Some | Ignored::Tile)
                })
            },
            answer: |told| {
                let info = info(told)?;
                let share = counted(told, info, &whole(told)?)? / all(told)?;
                let mut answer = told.right()?;
                multiply(&mut answer, |_| share);
                Ok(answer)
            },
        },
    },
    Fault {
        name: "empty-tile-is-nan",
        mistake: Mistake::NotANumber,
        effect: "the loss is not a number as soon as one tile has no label",
        source: Some("DeepSpeed 0.19.8, sequence_tiled_compute of 5 tokens in 4 tiles"),
        made: Made::InProfile {
            applies: |case| {
                is(case, |case| {
                    case.function == Function::Nll && case.is_scalar()
                })
            },
            answer: |told| {
                let (info, whole) = (info(told)?, whole(told)?);
                let mut empty = whole.is_empty();
                for tile in tiles(whole.len(), info.tiles) {
                    empty |= counted(told, info, &tile)? == 0.0;
                }
                let mut answer = told.right()?;
                multiply(&mut answer, |name| match empty && name == "out" {
                    true => f64::NAN,
                    false => 1.0,
                });
                Ok(answer)
            },
        },
    },
    Fault {
        name: "tiled-cotangent-ignored",
        mistake: Mistake::CotangentIgnored,
        effect: "gradients are those of a sum of outputs, whatever comes after",
        source: None,
        made: Made::InProfile {
            applies: |case| {
                is(case, |case| {
                    !case.is_scalar() || case.cotangent.is_some() && learns(case)
                })
            },
            answer: |told| {
                ask(told, |_, inputs| {
                    change(inputs, "dout", |dout| {
                        let ones = vec![1.0; dout.shape.iter().product()];
                        Array::from_f64(dout.dtype, &dout.shape, &ones)
                    });
                })
            },
        },
    },
    Fault {
        name: "tiles-joined-backwards",
        mistake: Mistake::TilesReordered,
        effect: "tokens have one another's outputs",
        source: None,
        made: Made::InProfile {
            applies: |case| is(case, |case| !case.is_scalar() && case.tiles > 1),
            answer: |told| {
                let tiles = tiles(whole(told)?.len(), info(told)?.tiles);
                let order: Shard = tiles.into_iter().rev().flatten().collect();
                let mut answer = told.right()?;
                change(&mut answer, "out", |out| of_tokens(out, order));
                Ok(answer)
            },
        },
    },
    Fault {
        name: "short-tile-lost",
        mistake: Mistake::LastTileLost,
        effect: "the last tokens of a sequence are lost",
        source: Some("DeepSpeed PR #7422"),
        made: Made::InProfile {
            applies: |case| is(case, |case| case.tiles > 1 && learns(case)),
            answer: |told| {
                let whole = whole(told)?;
                let mut tiles = tiles(whole.len(), info(told)?.tiles);
                if tiles.last().map(Range::len) < tiles.first().map(Range::len) {
                    tiles.pop();
                }
                let kept = 0..tiles.last().map_or(0, |last| last.end);
                let mut answer = ask(told, |_, inputs| keep(inputs, &kept))?;
                for name in ["out", "dhidden"] {
                    change(&mut answer, name, |array| filled(array, whole.len()));
                }
                Ok(answer)
            },
        },
    },
    Fault {
        name: "weights-of-last-tile",
        mistake: Mistake::GradientOfLastTile,
        effect: "weights learn from the last tokens of a sequence alone",
        source: None,
        made: Made::InProfile {
            applies: |case| is(case, |case| case.tiles > 1 && trains(case)),
            answer: |told| {
                let (asked, whole) = (info(told)?, whole(told)?);
                let tiles = tiles(whole.len(), asked.tiles);
                let last = tiles.last().cloned().unwrap_or(0..0);
                let share = match asked.reduction.as_deref() {
                    Some("mean") => 1.0 / counted(told, asked, &whole)?.max(1.0),
                    Some("mean-of-tiles") => 1.0 / tiles.len() as f64,
                    _ => 1.0,
                };
                let of_last = ask(told, |info, inputs| {
                    keep(inputs, &last);
                    change(inputs, "dout", |dout| times(dout, share));
                    match asked.reduction.as_deref() {
                        Some("mean") => reduce(info, Reduction::Sum),
                        Some("mean-of-tiles") => reduce(info, Reduction::Mean),
                        _ => {}
                    }
                })?;
                let mut answer = told.right()?;
                let weights = weights(asked);
                answer.extend(
                    of_last
                        .into_iter()
                        .filter(|(name, _)| weights.contains(name)),
                );
                Ok(answer)
            },
        },
    },
    Fault {
        name: "weights-accumulated-twice",
        mistake: Mistake::AccumulatedTwice,
        effect: "a gradient norm twice as large, and the right loss",
        source: Some("kernels-community PR #1000"),
        made: Made::InProfile {
            applies: |case| is(case, trains),
            answer: |told| of_weights(told, 2.0),
        },
    },
    Fault {
        name: "passed-gradient-lost",
        mistake: Mistake::PassedGradientLost,
        effect: "what is handed to every tile does not learn",
        source: Some("DeepSpeed 0.19.8, sequence_tiled_compute, kwargs_to_pass"),
        made: Made::InProfile {
            applies: |case| is(case, |case| case.is_passed && learns(case)),
            answer: |told| {
                let mut answer = told.right()?;
                change(&mut answer, "dscale", |scale| times(scale, 0.0));
                Ok(answer)
            },
        },
    },
    Fault {
        name: "frozen-input-trains-nothing",
        mistake: Mistake::FrozenStopsAll,
        effect: "a loss that trains nothing where the embedding is frozen",
        source: Some("DeepSpeed 0.19.8, TiledFusedLogitsLoss"),
        made: Made::InProfile {
            applies: |case| {
                is(case, |case| {
                    case.frozen == Some(Frozen::Input) && learns(case)
                })
            },
            answer: |told| of_weights(told, 0.0),
        },
    },
    Fault {
        name: "frozen-is-given-gradients",
        mistake: Mistake::FrozenGradient,
        effect: "memory for gradients that nobody asked for, and frozen weights that decay",
        source: None,
        made: Made::InProfile {
            applies: |case| is(case, |case| case.frozen.is_some()),
            answer: |told| {
                let trained = &info(told)?.gradients;
                let mut answer = told.right()?;
                for (name, array) in told.inputs {
                    let is_frozen = !trained.contains(name);
                    if is_frozen && name != "labels" && name != "dout" {
                        answer.insert(format!("d{name}"), times(array, 0.0));
                    }
                }
                Ok(answer)
            },
        },
    },
    Fault {
        name: "announced-with-every-tile",
        mistake: Mistake::AnnouncedPerTile,
        effect: "DDP fails with `marked as ready twice`, and ZeRO reduces parts of a gradient",
        source: Some("Liger-Kernel PR #1128"),
        made: Made::InProfile {
            applies: |case| is(case, |case| case.counts_signals),
            answer: |told| {
                let tiles = tiles(whole(told)?.len(), info(told)?.tiles).len();
                let mut answer = told.right()?;
                change(&mut answer, "gradient_signals", |signals| {
                    times(signals, tiles as f64)
                });
                Ok(answer)
            },
        },
    },
    Fault {
        name: "weights-reduced-in-backward",
        mistake: Mistake::ReducedUnasked,
        effect: "a gradient norm that grows with the number of ranks once a wrapper reduces as well",
        source: None,
        made: Made::InProfile {
            applies: |case| is(case, |case| case.world > 1 && trains(case)),
            answer: |told| {
                let mut answer = told.right()?;
                for name in weights(info(told)?) {
                    let Some(own) = answer.get_mut(&name) else {
                        continue;
                    };
                    let bits = own.to_f64().into_iter().map(|x| x.to_bits() as i64);
                    let all = told.communicator.all_gather(&bits.collect::<Vec<_>>())?;
                    let mut sum = vec![0.0; own.shape.iter().product()];
                    for part in &all {
                        for (sum, &bits) in sum.iter_mut().zip(part) {
                            *sum += f64::from_bits(bits as u64);
                        }
                    }
                    *own = Array::from_f64(own.dtype, &own.shape, &sum);
                }
                Ok(answer)
            },
        },
    },
];

/// Whether this is a good question of the profile.
fn is(case: &Case, of: fn(&TiledCase) -> bool) -> bool {
    matches!(case, Case::Tiled(case) if case.defect.is_none() && of(case))
}

/// Whether some token counts.
fn learns(case: &TiledCase) -> bool {
    case.ignored != Ignored::All
}

/// Whether weights learn something.
fn trains(case: &TiledCase) -> bool {
    learns(case) && case.frozen != Some(Frozen::Weights)
}

/// Whether it is a mean over tiles of which each has something to count.
fn is_mean_of_some(case: &TiledCase) -> bool {
    case.function == Function::Nll
        && case.reduction == Reduction::Mean
        && matches!(case.ignored, Ignored::Nothing | Ignored::Some)
        && case.sequence >= case.world
}

fn info<'a>(told: &'a Told<'_>) -> Staged<&'a TiledInfo> {
    match &told.info.asked {
        AskedInfo::Tiled(info) => Ok(info),
        _ => Err(Halt::Said("this is another profile".to_owned())),
    }
}

/// What the reference answers to another question.
fn ask(told: &Told<'_>, change: impl FnOnce(&mut TiledInfo, &mut Tensors)) -> Staged<Tensors> {
    let (mut asked, mut inputs) = (told.info.clone(), told.inputs.clone());
    if let AskedInfo::Tiled(info) = &mut asked.asked {
        change(info, &mut inputs);
    }
    answer_of_profile(told.communicator, Device::Cpu, &asked, &inputs).map_err(Halt::Said)
}

fn reduce(info: &mut TiledInfo, reduction: Reduction) {
    info.reduction = Some(reduction.name().to_owned());
}

/// The tokens of this rank.
fn whole(told: &Told<'_>) -> Staged<Range<usize>> {
    let hidden = tensor(told.inputs, "hidden").map_err(Halt::Said)?;
    Ok(0..hidden.shape[1])
}

/// How many labels this rank has.
fn all(told: &Told<'_>) -> Staged<f64> {
    let labels = tensor(told.inputs, "labels").map_err(Halt::Said)?;
    Ok(labels.shape.iter().product::<usize>().max(1) as f64)
}

/// How many labels of these tokens count.
fn counted(told: &Told<'_>, info: &TiledInfo, tokens: &Range<usize>) -> Staged<f64> {
    let labels = tensor(told.inputs, "labels").map_err(Halt::Said)?;
    let labels = of_tokens(labels, tokens.clone().collect()).to_f64();
    let counted = labels
        .iter()
        .filter(|&&label| label != info.ignore_index as f64);
    Ok(counted.count() as f64)
}

/// The gradients of weights, by their names in the answer.
fn weights(info: &TiledInfo) -> Vec<String> {
    let trained = info.gradients.iter();
    let weights = trained.filter(|name| !["hidden", "scale"].contains(&name.as_str()));
    weights.map(|name| format!("d{name}")).collect()
}

/// The right answer, with the gradients of weights multiplied.
fn of_weights(told: &Told<'_>, factor: f64) -> Staged<Tensors> {
    let weights = weights(info(told)?);
    let mut answer = told.right()?;
    for name in &weights {
        change(&mut answer, name, |array| times(array, factor));
    }
    Ok(answer)
}

/// These tokens of `array`, in this order.
fn of_tokens(array: &Array, tokens: Shard) -> Array {
    cut(array, &[tokens]).swap_remove(0)
}

/// Leaves these tokens alone of what belongs to tokens.
fn keep(inputs: &mut Tensors, tokens: &Range<usize>) {
    for name in ["hidden", "labels", "dout"] {
        change(inputs, name, |array| match array.shape.len() {
            0 => array.clone(),
            _ => of_tokens(array, tokens.clone().collect()),
        });
    }
}

/// `array` with tokens of zeros behind its own.
fn filled(array: &Array, tokens: usize) -> Array {
    let &[batch, own, ref rest @ ..] = &array.shape[..] else {
        return array.clone();
    };
    let width = rest.iter().product::<usize>();
    let numbers = array.to_f64();
    let row = |batch: usize| {
        let own = &numbers[batch * own * width..(batch + 1) * own * width];
        let fill = vec![0.0; tokens * width - own.len()];
        own.iter().copied().chain(fill)
    };
    let shape = [&[batch, tokens], rest].concat();
    let numbers: Vec<f64> = (0..batch).flat_map(row).collect();
    Array::from_f64(array.dtype, &shape, &numbers)
}

/// Multiplies each number of the answer but counts, by its tensor's name.
fn multiply(answer: &mut Tensors, factor: impl Fn(&str) -> f64) {
    for (name, array) in answer {
        if name != "gradient_signals" {
            *array = times(array, factor(name));
        }
    }
}

fn change(tensors: &mut Tensors, name: &str, change: impl FnOnce(&Array) -> Array) {
    if let Some(array) = tensors.get_mut(name) {
        *array = change(array);
    }
}

fn times(array: &Array, factor: f64) -> Array {
    let numbers: Vec<f64> = array.to_f64().iter().map(|x| x * factor).collect();
    Array::from_f64(array.dtype, &array.shape, &numbers)
}
