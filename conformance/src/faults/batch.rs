//! Mistakes in each rank's shard of whole rows of tokens.

use std::sync::Arc;

use fixtures::batch::{BatchDefect, BatchInfo};
use fixtures::exchange::{AskedInfo, Tensors};
use fixtures::{Array, BatchCase, Case, Documents, Shard, Sharding, sharding};
use tch::Device;
use ulysses::{Communicator, ThreadCommunicator};

use super::rank::{Halt, Staged};
use super::{Fault, Made, Told};
use crate::diagnosis::Mistake;
use crate::implementation::answer_of_profile;

pub(super) const FAULTS: &[Fault] = &[
    Fault {
        name: "labels-shifted-after-cut",
        mistake: Mistake::LabelsShiftedAfterCut,
        effect: "the last token of each shard is not trained, and losses differ a little",
        source: Some("transformers!36607"),
        made: Made::InProfile {
            applies: |case| {
                is(case, |case| {
                    case.sharding == Sharding::Contiguous || case.documents.is_none()
                })
            },
            answer: |told| {
                let has_ends = {
                    let info = info(told)?;
                    info.documents.is_some() && !info.targets_across_documents
                };
                let labels = labels_cut(told)?;
                let mut answer = told.right()?;
                for end in ends(&answer) {
                    let labels = &labels[&format!("input_ids{end}")];
                    let positions = numbers(&answer[&format!("position_ids{end}")]);
                    let tokens = labels.shape[1];
                    let labels = numbers(labels);
                    let target = |place: usize| {
                        let is_last = (place + 1).is_multiple_of(tokens);
                        match is_last || has_ends && positions[place + 1] == 0 {
                            true => IGNORED,
                            false => labels[place + 1],
                        }
                    };
                    let targets: Vec<i64> = (0..labels.len()).map(target).collect();
                    set(&mut answer, &format!("shift_labels{end}"), &targets);
                }
                Ok(answer)
            },
        },
    },
    Fault {
        name: "labels-shifted-twice",
        mistake: Mistake::LabelsShiftedTwice,
        effect: "each token learns the one after the next",
        source: Some("open-instruct!1549"),
        made: Made::InProfile {
            applies: |case| is(case, |_| true),
            answer: |told| {
                let shifted = alone(told, |info| info.padding = None, told.inputs)?;
                let mut inputs = told.inputs.clone();
                for end in ends(&shifted) {
                    let array = shifted[&format!("shift_labels{end}")].clone();
                    inputs.insert(format!("labels{end}"), array);
                }
                asked(told, |_| (), &inputs)
            },
        },
    },
    Fault {
        name: "labels-not-shifted",
        mistake: Mistake::LabelsNotShifted,
        effect: "each token learns itself, and the loss falls to nothing",
        source: None,
        made: Made::InProfile {
            applies: |case| is(case, |_| true),
            answer: |told| {
                let labels = labels_cut(told)?;
                let mut answer = told.right()?;
                for end in ends(&answer) {
                    let array = labels[&format!("input_ids{end}")].clone();
                    answer.insert(format!("shift_labels{end}"), array);
                }
                Ok(answer)
            },
        },
    },
    Fault {
        name: "positions-made-on-each-rank",
        mistake: Mistake::PositionsOfShards,
        effect: "gathered positions look packed, and attention ends where shards end",
        source: Some("DeepSpeed!7887"),
        made: Made::InProfile {
            applies: |case| is(case, |_| true),
            answer: |told| {
                let mut answer = told.right()?;
                for end in ends(&answer) {
                    let name = format!("position_ids{end}");
                    let [rows, tokens] = [0, 1].map(|axis| answer[&name].shape[axis]);
                    let local = (0..rows).flat_map(|_| 0..tokens as i64);
                    set(&mut answer, &name, &local.collect::<Vec<_>>());
                }
                Ok(answer)
            },
        },
    },
    Fault {
        name: "positions-run-through-documents",
        mistake: Mistake::PositionsRunOn,
        effect: "documents see one another, for whoever finds them by positions",
        source: Some("LLaMA-Factory#7338"),
        made: Made::InProfile {
            applies: |case| {
                is(case, |case| {
                    matches!(case.documents, Some(Documents::ByEnds(_)))
                })
            },
            answer: |told| {
                let plain = asked(told, |info| info.documents = None, told.inputs)?;
                let mut answer = told.right()?;
                for end in ends(&answer) {
                    let name = format!("position_ids{end}");
                    let array = plain[&name].clone();
                    answer.insert(name, array);
                }
                Ok(answer)
            },
        },
    },
    Fault {
        name: "targets-across-documents",
        mistake: Mistake::TargetsAcrossDocuments,
        effect: "the last token of each document learns the first of another text",
        source: Some("DeepSpeed, UlyssesSPDataLoaderAdapter of 0.19"),
        made: Made::InProfile {
            applies: |case| is(case, |case| case.documents.is_some() && !case.is_across),
            answer: |told| {
                asked(
                    told,
                    |info| info.targets_across_documents = true,
                    told.inputs,
                )
            },
        },
    },
    Fault {
        name: "fill-is-learnt",
        mistake: Mistake::FillIsTarget,
        effect: "the model learns to write padding",
        source: None,
        made: Made::InProfile {
            applies: |case| is(case, |case| case.pad.is_some()),
            answer: |told| {
                let pad_id = info(told)?.padding.as_ref().map_or(0, |fill| fill.pad_id);
                in_fill(told, "shift_labels", pad_id)
            },
        },
    },
    Fault {
        name: "fill-positions-zero",
        mistake: Mistake::FillPositionsZero,
        effect: "each token that fills a row up is a document of its own",
        source: None,
        made: Made::InProfile {
            applies: |case| is(case, |case| case.pad.is_some()),
            answer: |told| in_fill(told, "position_ids", 0),
        },
    },
    Fault {
        name: "mask-not-cut",
        mistake: Mistake::MaskNotCut,
        effect: "an error of shapes, or another rank's padding",
        source: Some("ms-swift!10185"),
        made: Made::InProfile {
            applies: |case| is(case, |case| case.has_mask && case.stream.is_none()),
            answer: |told| {
                let whole = alone(told, |_| (), told.inputs)?;
                let mut answer = told.right()?;
                let name = "attention_mask".to_owned();
                answer.insert(name.clone(), whole[&name].clone());
                Ok(answer)
            },
        },
    },
    Fault {
        name: "batch-sharding-ignored",
        mistake: Mistake::ShardingIgnored,
        effect: "rows are cut into runs where zigzag or stripes were asked for",
        source: None,
        made: Made::InProfile {
            applies: |case| is(case, |case| case.sharding != Sharding::Contiguous),
            answer: |told| {
                let contiguous = |info: &mut BatchInfo| "contiguous".clone_into(&mut info.sharding);
                asked(told, contiguous, told.inputs)
            },
        },
    },
    Fault {
        name: "batch-remainder-lost",
        mistake: Mistake::RemainderTokensLost,
        effect: "the last tokens of each row are on no rank",
        source: Some("DeepSpeed#7384"),
        made: Made::InProfile {
            applies: |case| is(case, is_whole_and_contiguous),
            answer: |told| {
                cut_otherwise(told, |info, rank| {
                    let each = info.iter().sum::<usize>() / info.len();
                    (rank * each..(rank + 1) * each).collect()
                })
            },
        },
    },
    Fault {
        name: "shard-of-first-rank",
        mistake: Mistake::ShardOfFirstRank,
        effect: "all ranks work on the same tokens, and the others are lost",
        source: Some("DeepSpeed#7484"),
        made: Made::InProfile {
            applies: |case| is(case, is_whole_and_contiguous),
            answer: |told| cut_otherwise(told, |lengths, _| (0..lengths[0]).collect()),
        },
    },
    Fault {
        name: "same-batch-served",
        mistake: Mistake::SameBatchServed,
        effect: "one batch is trained P times, and the others never",
        source: Some("DeepSpeed#7484"),
        made: Made::InProfile {
            applies: |case| is(case, |case| case.stream.is_some()),
            answer: |told| {
                reserved(told, |served| {
                    let first = |round| served.iter().position(|&(_, other)| other == round);
                    let firsts = served.iter().map(|&(_, round)| first(round));
                    firsts.flatten().collect()
                })
            },
        },
    },
    Fault {
        name: "last-batches-dropped",
        mistake: Mistake::LastBatchesDropped,
        effect: "batches of ranks that have more of them are never trained",
        source: None,
        made: Made::InProfile {
            applies: |case| is(case, |case| case.stream.is_some_and(|s| s.is_ragged)),
            answer: |told| {
                reserved(told, |served| {
                    let ranks = served.iter().filter(|&&(_, round)| round == 0).count();
                    let is_full = |round| {
                        served.iter().filter(|&&(_, other)| other == round).count() == ranks
                    };
                    let all = 0..served.len();
                    all.filter(|&place| is_full(served[place].1)).collect()
                })
            },
        },
    },
    Fault {
        name: "second-epoch-empty",
        mistake: Mistake::SecondEpochEmpty,
        effect: "training ends after one epoch without an error",
        source: Some("DeepSpeed!7472"),
        made: Made::InProfile {
            applies: |case| is(case, |case| case.stream.is_some_and(|s| s.epochs > 1)),
            answer: |told| {
                let mut answer = told.right()?;
                let mut lengths = numbers(&answer["served"]);
                let first = lengths[0];
                let number = |name: &str| name.rsplit_once('.')?.1.parse::<i64>().ok();
                answer.retain(|name, _| number(name).is_none_or(|number| number < first));
                lengths[1..].fill(0);
                set(&mut answer, "served", &lengths);
                Ok(answer)
            },
        },
    },
    Fault {
        name: "each-rank-cuts-its-own-batch",
        mistake: Mistake::OwnBatchesOnly,
        effect: "the ranks of a sequence attend to parts of different ones",
        source: Some("360-LLaMA-Factory!82"),
        made: Made::InProfile {
            applies: |case| is(case, |case| case.stream.is_some_and(|s| !s.is_ragged)),
            answer: |told| {
                let right = told.right()?;
                let served = served(told)?;
                let mut answer = Tensors::from([("served".to_owned(), right["served"].clone())]);
                for end in ends(&right) {
                    let number: usize = end.trim_start_matches('.').parse().unwrap_or_default();
                    let (_, round) = served[number % served.len()];
                    let of_round = |(name, array): (&String, &Array)| {
                        let name = name.strip_suffix(&format!(".{round}"))?;
                        Some((name.to_owned(), array.clone()))
                    };
                    let inputs = told.inputs.iter().filter_map(of_round).collect();
                    let shard = asked(told, |info| info.stream = None, &inputs)?;
                    let named = |(name, array)| (format!("{name}{end}"), array);
                    answer.extend(shard.into_iter().map(named));
                }
                Ok(answer)
            },
        },
    },
    Fault {
        name: "labels-of-any-length",
        mistake: Mistake::BadInputTaken,
        effect: "targets of other tokens, where labels lack some",
        source: None,
        made: Made::InProfile {
            applies: |case| {
                matches!(case, Case::Batch(case) if case.world > 1
                    && case.defect == Some(BatchDefect::Labels))
            },
            answer: |told| {
                let mut inputs = told.inputs.clone();
                for end in ends(told.inputs) {
                    let shape = told.inputs[&format!("input_ids{end}")].shape.clone();
                    let labels = inputs.get_mut(&format!("labels{end}"));
                    if let Some(labels) = labels {
                        let mut longer = numbers(labels);
                        longer.resize(shape.iter().product(), IGNORED);
                        *labels = Array::from_i64(&shape, &longer);
                    }
                }
                asked(told, |_| (), &inputs)
            },
        },
    },
];

/// The target of a token that has none.
const IGNORED: i64 = -100;

/// Whether this is a good question of the profile among several ranks.
fn is(case: &Case, of: fn(&BatchCase) -> bool) -> bool {
    matches!(case, Case::Batch(case) if case.world > 1 && case.defect.is_none() && of(case))
}

fn is_whole_and_contiguous(case: &BatchCase) -> bool {
    case.stream.is_none() && case.sharding == Sharding::Contiguous
}

fn info<'a>(told: &'a Told<'_>) -> Staged<&'a BatchInfo> {
    match &told.info.asked {
        AskedInfo::Batch(info) => Ok(info),
        _ => Err(Halt::Said("this is another profile".to_owned())),
    }
}

/// What the reference answers to another question, on this rank.
fn asked(
    told: &Told<'_>,
    change: impl FnOnce(&mut BatchInfo),
    inputs: &Tensors,
) -> Staged<Tensors> {
    answer(told.communicator, told, change, inputs)
}

/// The same to a rank that knows of no other: so of whole rows.
fn alone(
    told: &Told<'_>,
    change: impl FnOnce(&mut BatchInfo),
    inputs: &Tensors,
) -> Staged<Tensors> {
    let alone = ThreadCommunicator::world(1).into_iter().next();
    let alone = alone.ok_or_else(|| Halt::Said("there is no rank".to_owned()))?;
    let alone: Arc<dyn Communicator> = Arc::new(alone);
    answer(&alone, told, change, inputs)
}

fn answer(
    communicator: &Arc<dyn Communicator>,
    told: &Told<'_>,
    change: impl FnOnce(&mut BatchInfo),
    inputs: &Tensors,
) -> Staged<Tensors> {
    let mut info = told.info.clone();
    if let AskedInfo::Batch(asked) = &mut info.asked {
        change(asked);
    }
    answer_of_profile(communicator, Device::Cpu, &info, inputs).map_err(Halt::Said)
}

/// The labels as they are, cut and filled up as ids are.
fn labels_cut(told: &Told<'_>) -> Staged<Tensors> {
    let mut inputs = told.inputs.clone();
    for end in ends(told.inputs) {
        let labels = told.inputs[&format!("labels{end}")].clone();
        inputs.insert(format!("input_ids{end}"), labels);
    }
    let filled = |info: &mut BatchInfo| {
        if let Some(fill) = &mut info.padding {
            fill.pad_id = IGNORED;
        }
    };
    asked(told, filled, &inputs)
}

/// The right answer, but for a number in one of its tensors wherever a row was
/// filled up.
fn in_fill(told: &Told<'_>, name: &str, number: i64) -> Staged<Tensors> {
    let mut inputs = told.inputs.clone();
    for end in ends(told.inputs) {
        if let Some(ids) = inputs.get_mut(&format!("input_ids{end}")) {
            *ids = Array::from_i64(&ids.shape, &vec![1; ids.shape.iter().product()]);
        }
    }
    let with_zeros = |info: &mut BatchInfo| {
        if let Some(fill) = &mut info.padding {
            fill.pad_id = 0;
        }
    };
    let is_token = asked(told, with_zeros, &inputs)?;
    let mut answer = told.right()?;
    for end in ends(&answer) {
        let name = format!("{name}{end}");
        let is_token = numbers(&is_token[&format!("input_ids{end}")]);
        let pairs = numbers(&answer[&name]).into_iter().zip(is_token);
        let changed = pairs.map(|(right, is_token)| match is_token {
            0 => number,
            _ => right,
        });
        set(&mut answer, &name, &changed.collect::<Vec<_>>());
    }
    Ok(answer)
}

/// Whole rows, cut by another rule: which tokens a rank has, by the lengths of
/// all shards.
fn cut_otherwise(told: &Told<'_>, tokens: fn(&[usize], usize) -> Shard) -> Staged<Tensors> {
    let lengths = info(told)?.shard_lengths.clone().unwrap_or_default();
    let tokens = tokens(&lengths, told.info.rank);
    let whole = alone(told, |_| (), told.inputs)?;
    let shards = std::slice::from_ref(&tokens);
    let cut = |(name, array)| (name, sharding::cut(&array, shards).remove(0));
    Ok(whole.into_iter().map(cut).collect())
}

/// Whose batch is served, by rank and round, in one epoch.
fn served(told: &Told<'_>) -> Staged<Vec<(usize, usize)>> {
    let own = info(told)?
        .stream
        .as_ref()
        .map_or(0, |stream| stream.batches);
    let counts = told.communicator.all_gather(&[own as i64])?.concat();
    let rounds = counts.iter().copied().max().unwrap_or(0);
    let all = (0..rounds as usize).flat_map(|round| (0..counts.len()).map(move |r| (r, round)));
    Ok(all
        .filter(|&(rank, round)| (round as i64) < counts[rank])
        .collect())
}

/// The right answer with other shards, by their numbers in the epoch, in each.
fn reserved(told: &Told<'_>, shards: fn(&[(usize, usize)]) -> Vec<usize>) -> Staged<Tensors> {
    let right = told.right()?;
    let served = served(told)?;
    let chosen = shards(&served);
    let mut answer = Tensors::new();
    let epochs = right["served"].shape[0];
    for epoch in 0..epochs {
        for (place, shard) in chosen.iter().enumerate() {
            let from = format!(".{}", epoch * served.len() + shard);
            let to = epoch * chosen.len() + place;
            for (name, array) in &right {
                if let Some(name) = name.strip_suffix(&from) {
                    answer.insert(format!("{name}.{to}"), array.clone());
                }
            }
        }
    }
    let lengths = vec![chosen.len() as i64; epochs];
    answer.insert("served".to_owned(), Array::from_i64(&[epochs], &lengths));
    Ok(answer)
}

/// With what the names of each batch or shard end: nothing where there is one.
fn ends(tensors: &Tensors) -> Vec<String> {
    let ends = tensors
        .keys()
        .filter_map(|name| name.strip_prefix("input_ids"));
    ends.map(str::to_owned).collect()
}

fn numbers(array: &Array) -> Vec<i64> {
    array.to_f64().into_iter().map(|x| x as i64).collect()
}

fn set(answer: &mut Tensors, name: &str, numbers: &[i64]) {
    if let Some(array) = answer.get_mut(name) {
        *array = Array::from_i64(&array.shape, numbers);
    }
}
