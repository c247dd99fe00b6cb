//! Mistakes in a decoder among ranks.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use fixtures::exchange::{AskedInfo, Tensors};
use fixtures::loss::{IGNORE_INDEX, Ignored};
use fixtures::{Array, Case, ModelCase};
use tch::Device;
use ulysses::{Communicator, Mesh};

use super::decoder::{
    CausalByRank, OtherAgain, OtherInLayer, Run, TiledHeads, alone_communicator, local_positions,
};
use super::loss::{bits, loss, number, scale, set_loss, times};
use super::rank::{Halt, Staged};
use super::{Fault, Made, Told};
use crate::diagnosis::Mistake;
use crate::implementation::answer_of_profile;

pub(super) const FAULTS: &[Fault] = &[
    Fault {
        name: "model-positions-of-each-rank",
        mistake: Mistake::RotaryByLocalPosition,
        effect: "the model sees a text of S/P tokens, again and again",
        source: Some("transformers#36607"),
        made: Made::InProfile {
            // Documents would be read from these positions, too.
            applies: |case| is_shared(case, |case| case.documents.is_none()),
            answer: |told| {
                let mut run = Run::of(told)?;
                run.positions = local_positions(&run.ids)?;
                run.answer()
            },
        },
    },
    Fault {
        name: "model-attention-not-exchanged",
        mistake: Mistake::LocalTokensOnly,
        effect: "each rank trains on its own piece of the text",
        source: Some("DeepSpeed!7887"),
        made: Made::InProfile {
            // A rank by itself refuses to attend with no token.
            applies: |case| is_shared(case, |case| case.sequence >= case.sharing()),
            answer: |told| {
                let mut run = Run::of(told)?;
                let local = run.attention_among(&alone_communicator()?);
                run.set_attention(local);
                run.answer()
            },
        },
    },
    Fault {
        name: "model-causal-by-rank",
        mistake: Mistake::CausalByLocalIndex,
        effect: "tokens see some that come later, on ranks behind theirs",
        source: None,
        made: Made::InProfile {
            applies: |case| is_shared(case, |case| case.documents.is_none()),
            answer: |told| {
                let mut run = Run::of(told)?;
                let group = Arc::clone(run.mesh.sequence_parallel());
                run.set_attention(Arc::new(CausalByRank {
                    lengths: run.info.shard_lengths.clone(),
                    group,
                }));
                run.answer()
            },
        },
    },
    Fault {
        name: "model-documents-lost",
        mistake: Mistake::DocumentsIgnored,
        effect: "packed documents see one another",
        source: Some("LlamaFactory!7338"),
        made: Made::InProfile {
            applies: |case| is_shared(case, |case| case.documents.is_some()),
            answer: |told| {
                let mut run = Run::of(told)?;
                run.are_documents_lost = true;
                run.answer()
            },
        },
    },
    Fault {
        name: "model-last-layer-local",
        mistake: Mistake::LastLayerLocal,
        effect: "one layer of the model does without the other ranks",
        source: Some("DeepSpeed, skip_all_but_last_attention_debug_mode"),
        made: Made::InProfile {
            applies: |case| is_shared(case, |case| case.sequence >= case.sharing()),
            answer: |told| {
                let mut run = Run::of(told)?;
                let right = run.attention_among(run.mesh.sequence_parallel());
                let last = run.model.config().layers() - 1;
                let local = run.attention_among(&alone_communicator()?);
                run.set_attention(Arc::new(OtherInLayer { last, right, local }));
                run.answer()
            },
        },
    },
    Fault {
        name: "model-kv-heads-tiled",
        mistake: Mistake::KvHeadsTiled,
        effect: "query heads attend the KV heads of others",
        source: Some("prime-rl!2681"),
        made: Made::InProfile {
            applies: |case| {
                is(case, |case| {
                    1 < case.kv_heads && case.kv_heads < case.query_heads
                })
            },
            answer: |told| {
                let mut run = Run::of(told)?;
                let right = run.attention_among(run.mesh.sequence_parallel());
                run.set_attention(Arc::new(TiledHeads(right)));
                run.answer()
            },
        },
    },
    Fault {
        name: "recomputed-at-other-positions",
        mistake: Mistake::RecomputedElsewhere,
        effect: "the loss is right, and gradients are those of another model",
        source: None,
        made: Made::InProfile {
            applies: |case| is_shared(case, |case| case.is_checkpointed),
            answer: |told| {
                let mut run = Run::of(told)?;
                let right = run.attention_among(run.mesh.sequence_parallel());
                let theta = run.info.config["rope_theta"].as_f64().unwrap_or(10_000.0);
                run.set_attention(Arc::new(OtherAgain {
                    right,
                    theta,
                    layers: run.model.config().layers(),
                    calls: AtomicUsize::new(0),
                }));
                run.answer()
            },
        },
    },
    Fault {
        name: "tied-head-gradient-lost",
        mistake: Mistake::TiedGradientLost,
        effect: "the embedding learns from what goes in alone",
        source: None,
        made: Made::InProfile {
            applies: |case| is(case, |case| case.is_tied && case.ignored != Ignored::All),
            answer: |told| {
                const EMBEDDING: &str = "model.embed_tokens.weight";
                let mut info = told.info.clone();
                if let AskedInfo::Model(asked) = &mut info.asked {
                    asked.config["tie_word_embeddings"] = false.into();
                }
                let mut inputs = told.inputs.clone();
                let head = inputs.get(EMBEDDING).cloned();
                inputs.extend(head.map(|head| ("lm_head.weight".to_owned(), head)));
                let answer = answer_of_profile(told.communicator, Device::Cpu, &info, &inputs);
                let mut answer = answer.map_err(Halt::Said)?;
                answer.remove("dlm_head.weight");
                Ok(answer)
            },
        },
    },
    Fault {
        name: "norms-and-embedding-of-one-rank",
        mistake: Mistake::ReplicatedOfOneRank,
        effect: "norms and embeddings of the ranks drift apart",
        source: Some("ColossalAI!4927"),
        made: Made::InProfile {
            applies: |case| is(case, |case| case.ignored != Ignored::All),
            answer: |told| {
                let mut answer = told.right()?;
                for (name, array) in &mut answer {
                    let is_whole = name.ends_with("norm.weight") || name.contains("embed_tokens");
                    if is_whole && told.info.rank > 0 {
                        *array = times(array, 0.0);
                    }
                }
                Ok(answer)
            },
        },
    },
    Fault {
        name: "model-shifts-shifted-labels",
        mistake: Mistake::LabelsShiftedAgain,
        effect: "the model learns the token after the next",
        source: Some("open-instruct!1549"),
        made: Made::InProfile {
            applies: |case| is(case, |case| case.ignored != Ignored::All),
            answer: |told| with_labels(told, true),
        },
    },
    Fault {
        name: "end-of-shard-untrained",
        mistake: Mistake::EndOfShardUntrained,
        effect: "the last token of each shard is not learnt from",
        source: Some("transformers!48570"),
        made: Made::InProfile {
            applies: |case| is(case, |case| case.ignored != Ignored::All),
            answer: |told| with_labels(told, false),
        },
    },
    Fault {
        name: "model-mean-of-rank-means",
        mistake: Mistake::MeanOfRankMeans,
        effect: "ranks with few labels weigh as much as ranks with many",
        source: Some("verl#2857"),
        made: Made::InProfile {
            applies: |case| is(case, |case| case.ignored != Ignored::All),
            answer: |told| {
                let alone = alone_communicator()?;
                mean_of_means(told, &|_| Arc::clone(&alone))
            },
        },
    },
    Fault {
        name: "mean-of-replica-means",
        mistake: Mistake::MeanOfReplicaMeans,
        effect: "replicas with few labels weigh as much as replicas with many",
        source: Some("transformers 5.23.0, Trainer"),
        made: Made::InProfile {
            applies: |case| is_shared(case, |case| case.replicas() > 1),
            answer: |told| mean_of_means(told, &|mesh| Arc::clone(mesh.sequence_parallel())),
        },
    },
    Fault {
        name: "model-loss-of-own-tokens",
        mistake: Mistake::OwnTokensOnly,
        effect: "each rank reports and follows another loss",
        source: Some("transformers#36607"),
        made: Made::InProfile {
            applies: |case| is(case, |case| case.ignored != Ignored::All),
            answer: |told| {
                let alone = alone_communicator()?;
                Run::of(told)?.answer_among(&|_| Arc::clone(&alone))
            },
        },
    },
    Fault {
        name: "model-gradients-over-ranks",
        mistake: Mistake::GradientsOverRanks,
        effect: "a gradient norm that shrinks with the number of ranks",
        source: Some("DeepSpeed!4530, DeepSpeed!5555"),
        made: Made::InProfile {
            applies: |case| is(case, |case| case.ignored != Ignored::All),
            answer: |told| scaled(told, 1.0 / told.info.world as f64),
        },
    },
    Fault {
        name: "model-gradients-times-ranks",
        mistake: Mistake::GradientsTimesRanks,
        effect: "a gradient norm that grows with the number of ranks",
        source: Some("DeepSpeed#5248"),
        made: Made::InProfile {
            applies: |case| is(case, |case| case.ignored != Ignored::All),
            answer: |told| scaled(told, told.info.world as f64),
        },
    },
    Fault {
        name: "model-cotangent-ignored",
        mistake: Mistake::CotangentIgnored,
        effect: "gradient accumulation and loss scaling change nothing",
        source: None,
        made: Made::InProfile {
            applies: |case| is(case, |case| case.cotangent.is_some()),
            answer: |told| {
                let mut run = Run::of(told)?;
                run.cotangent = run.cotangent.f_ones_like()?;
                run.answer()
            },
        },
    },
    Fault {
        name: "model-rank-without-labels-is-nan",
        mistake: Mistake::NotANumber,
        effect: "the loss is not a number as soon as one rank has no label",
        source: Some("transformers#47068, axolotl#3026"),
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
];

/// Whether this is a good question of the profile among several ranks.
fn is(case: &Case, of: fn(&ModelCase) -> bool) -> bool {
    matches!(case, Case::Model(case) if case.world > 1 && case.defect.is_none() && of(case))
}

/// The same, and several ranks share a sequence.
fn is_shared(case: &Case, of: fn(&ModelCase) -> bool) -> bool {
    is(case, |case| case.sharing() > 1) && matches!(case, Case::Model(case) if of(case))
}

/// Each rank's part is the mean over some ranks, and the loss the mean of these.
fn mean_of_means(told: &Told<'_>, of: &dyn Fn(&Mesh) -> Arc<dyn Communicator>) -> Staged<Tensors> {
    let run = Run::of(told)?;
    let means = run.mesh.world().size() / of(&run.mesh).size();
    let mut answer = run.answer_among(of)?;
    let said = told.communicator.all_gather(&[bits(loss(&answer)?)])?;
    let sum: f64 = said.iter().map(|mean| number(mean)).sum();
    scale(&mut answer, 1.0 / means as f64);
    set_loss(&mut answer, sum / said.len() as f64);
    Ok(answer)
}

fn scaled(told: &Told<'_>, factor: f64) -> Staged<Tensors> {
    let mut answer = told.right()?;
    scale(&mut answer, factor);
    Ok(answer)
}

/// With labels of which the last of each shard is lost, moved on by one or not.
fn with_labels(told: &Told<'_>, are_shifted: bool) -> Staged<Tensors> {
    let mut inputs = told.inputs.clone();
    if let Some(labels) = inputs.get_mut("labels")
        && let [_, tokens] = labels.shape[..]
        && tokens > 0
    {
        let rows = labels.to_f64();
        let rows = rows.chunks(tokens).flat_map(|row| {
            let kept = match are_shifted {
                true => &row[1..],
                false => &row[..tokens - 1],
            };
            let kept = kept.iter().map(|&label| label as i64);
            kept.chain([IGNORE_INDEX]).collect::<Vec<_>>()
        });
        *labels = Array::from_i64(&labels.shape, &rows.collect::<Vec<_>>());
    }
    answer_of_profile(told.communicator, Device::Cpu, told.info, &inputs).map_err(Halt::Said)
}
