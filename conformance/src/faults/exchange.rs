//! Faults of where tokens and heads are put when they are exchanged.

use fixtures::{AttentionCase, Dtype, Mask, Sharding, Strides};
use tch::Tensor;

use super::rank::{At, Staged, tokens_of_ranks};
use super::{Fault, Made, is_even, is_split};
use crate::diagnosis::Mistake;

pub(super) const FAULTS: &[Fault] = &[
    Fault {
        name: "ranks-rotated",
        mistake: Mistake::RanksReordered,
        effect: "Every rank attends to a sequence that begins with the second rank's tokens, and \
                 gets the outputs of the next rank's tokens.",
        source: None,
        made: Made::InAttention {
            applies: |case| is_even(case) && knows_order(case),
            make: |stages| {
                stages.received = |at, tensors| {
                    let order = order_of_ranks(at, |rank, ranks| (rank + 1) % ranks)?;
                    each(tensors, |tensor| Ok(tensor.f_index_select(2, &order)?))
                };
            },
        },
    },
    Fault {
        name: "ranks-reversed-there-and-back",
        mistake: Mistake::RanksReordered,
        effect: "Every token gets its own output, under a mask that takes the last rank for the \
                 first.",
        source: None,
        made: Made::InAttention {
            applies: |case| {
                // Other places draw other weights to drop, rightly so.
                let is_drawn = case.extras.dropout.is_some();
                is_even(case) && case.extras.sharding == Sharding::Contiguous && !is_drawn
            },
            make: |stages| {
                stages.received = |at, tensors| {
                    let order = order_of_ranks(at, |rank, ranks| ranks - 1 - rank)?;
                    each(tensors, |tensor| Ok(tensor.f_index_select(2, &order)?))
                };
                stages.attended = |at, output| {
                    let order = order_of_ranks(at, |rank, ranks| ranks - 1 - rank)?;
                    Ok(output.f_index_select(2, &order)?)
                };
            },
        },
    },
    Fault {
        name: "values-reordered",
        mistake: Mistake::KeysReordered,
        effect: "A query weighs the right keys and reads other tokens' values.",
        source: None,
        made: Made::InAttention {
            applies: is_even,
            make: |stages| {
                stages.received = |at, [query, key, value]| {
                    let order = order_of_ranks(at, |rank, ranks| (rank + 1) % ranks)?;
                    Ok([query, key, value.f_index_select(2, &order)?])
                };
            },
        },
    },
    Fault {
        name: "output-to-wrong-rank",
        mistake: Mistake::OutputToWrongRank,
        effect: "Every rank gets the right outputs of another rank's tokens.",
        source: None,
        made: Made::InAttention {
            applies: is_even,
            make: |stages| {
                stages.attended = |at, output| {
                    let order = order_of_ranks(at, |rank, ranks| (rank + 1) % ranks)?;
                    Ok(output.f_index_select(2, &order)?)
                };
            },
        },
    },
    Fault {
        name: "output-heads-reordered",
        mistake: Mistake::OutputHeadsReordered,
        effect: "Every token gets its outputs with the heads of the last rank in front.",
        source: None,
        made: Made::InAttention {
            applies: |case| is_split(case) && case.query_heads.is_multiple_of(case.world),
            make: |stages| {
                stages.returned = |at, output| {
                    let heads = at.heads()?;
                    let order = (0..at.world()).rev().flat_map(|r| heads.query_range(r));
                    let order: Vec<i64> = order.map(|head| head as i64).collect();
                    Ok(output.f_index_select(2, &Tensor::f_from_slice(&order)?)?)
                };
            },
        },
    },
    Fault {
        name: "output-heads-interleaved",
        mistake: Mistake::OutputHeadsInterleaved,
        effect: "The model does not converge, and nothing is said.",
        source: Some("DeepSpeed PR #5664"),
        made: Made::InAttention {
            applies: |case| {
                // With one head on each rank, or one rank, there is one order.
                is_split(case)
                    && case.query_heads.is_multiple_of(case.world)
                    && case.query_heads > case.world
            },
            make: |stages| {
                stages.returned = |at, output| {
                    let ranks = at.world() as i64;
                    let by_rank = output.f_unflatten(2, [ranks, -1])?;
                    Ok(by_rank.f_transpose(2, 3)?.f_flatten(2, 3)?)
                };
            },
        },
    },
    Fault {
        name: "output-batch-mixed",
        mistake: Mistake::BatchMixedIntoSequence,
        effect: "Garbage as soon as there is more than one sequence in the batch.",
        source: Some("DeepSpeed #5808, PR #5823"),
        made: Made::InAttention {
            applies: |case| is_split(case) && case.batch > 1,
            make: |stages| {
                stages.returned = |_, output| {
                    // [s, B] in memory, read as [B, s].
                    let size = output.size();
                    Ok(output.f_transpose(0, 1)?.f_reshape(size)?)
                };
            },
        },
    },
    Fault {
        name: "input-batch-mixed",
        mistake: Mistake::BatchMixedIntoSequence,
        effect: "Garbage as soon as there is more than one sequence in the batch.",
        source: Some("DeepSpeed #5808, #5366"),
        made: Made::InAttention {
            applies: |case| is_even(case) && case.batch > 1,
            make: |stages| {
                stages.received = |at, tensors| {
                    let ranks = at.world() as i64;
                    // Blocks [P, B, s] in memory, read as [B, P s].
                    each(tensors, |tensor| {
                        let by_rank = tensor.f_transpose(1, 2)?.f_unflatten(1, [ranks, -1])?;
                        let mixed = by_rank.f_transpose(0, 1)?.f_reshape([
                            tensor.size()[0],
                            tensor.size()[2],
                            tensor.size()[1],
                            tensor.size()[3],
                        ])?;
                        Ok(mixed.f_transpose(1, 2)?)
                    })
                };
            },
        },
    },
    Fault {
        name: "strides-ignored",
        mistake: Mistake::StridesIgnored,
        effect: "Garbage where queries, keys and values are views, as after a transpose or from \
                 one packed projection.",
        source: None,
        made: Made::InAttention {
            applies: |case| {
                // An expanded tensor has less memory than elements.
                let strides = case.extras.strides;
                is_split(case) && matches!(strides, Strides::Transposed | Strides::Packed)
            },
            make: |stages| {
                stages.asked = |_, asked| {
                    asked.each(|tensor| {
                        let size = tensor.size();
                        let step = |axis: usize| size[axis + 1..].iter().product();
                        let strides: Vec<i64> = (0..size.len()).map(step).collect();
                        Ok(tensor.f_as_strided(&size, &strides, None)?)
                    })
                };
            },
        },
    },
    Fault {
        name: "sharding-ignored",
        mistake: Mistake::ShardingIgnored,
        effect: "Masks and positions are those of other tokens where shards are balanced.",
        source: None,
        made: Made::InAttention {
            applies: |case| is_split(case) && case.extras.sharding != Sharding::Contiguous,
            make: |stages| {
                stages.asked = |_, asked| {
                    asked.options.sharding = ulysses::Sharding::Contiguous;
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "output-not-viewed",
        mistake: Mistake::WrongShape,
        effect: "The output has all heads in one dimension.",
        source: Some("DeepSpeed PR #6750"),
        made: Made::InAttention {
            applies: is_split,
            make: |stages| {
                stages.answered = |_, answer| {
                    if let Some(out) = answer.get_mut("out") {
                        let last = out.shape.pop().unwrap_or(1);
                        out.shape
                            .iter_mut()
                            .skip(2)
                            .for_each(|heads| *heads *= last);
                    }
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "output-left-in-float32",
        mistake: Mistake::WrongShape,
        effect: "The output has another element type than the inputs.",
        source: None,
        made: Made::InAttention {
            applies: |case| is_split(case) && case.dtype != Dtype::F32,
            make: |stages| {
                stages.answered = |_, answer| {
                    if let Some(out) = answer.get_mut("out") {
                        *out = fixtures::Array::from_f64(Dtype::F32, &out.shape, &out.to_f64());
                    }
                    Ok(())
                };
            },
        },
    },
];

/// Whether attention depends on the order of tokens: else nothing shows but that
/// outputs come to the wrong rank.
fn knows_order(case: &AttentionCase) -> bool {
    let extras = &case.extras;
    case.mask == Mask::Causal
        || extras.window.is_some()
        || extras.documents.is_some()
        || extras.padding.is_some()
        || extras.block.is_some()
        || extras.rotary.is_some()
        || extras.alibi
}

/// The whole sequence with the ranks' tokens in another order.
fn order_of_ranks(at: &At<'_>, order: fn(usize, usize) -> usize) -> Staged<Tensor> {
    Ok(Tensor::f_from_slice(&tokens_of_ranks(
        &at.tokens()?,
        order,
    ))?)
}

fn each(tensors: [Tensor; 3], change: impl Fn(&Tensor) -> Staged<Tensor>) -> Staged<[Tensor; 3]> {
    let [query, key, value] = &tensors;
    Ok([change(query)?, change(key)?, change(value)?])
}
