//! Faults of gradients behind a right output.

use fixtures::AttentionCase;
use fixtures::exchange::Upstream;
use tch::Tensor;

use super::rank::{At, Staged, tokens_of_ranks};
use super::{Fault, Made, detour, is_even, is_split};
use crate::diagnosis::Mistake;

pub(super) const FAULTS: &[Fault] = &[
    Fault {
        name: "gradients-over-ranks",
        mistake: Mistake::GradientsOverRanks,
        effect: "The gradient norm is P times too small, which Adam hides.",
        source: Some("DeepSpeed PR #5555, PR #4530; VeOmni PR #1120"),
        made: Made::InAttention {
            applies: is_split,
            make: |stages| {
                stages.returned = |at, output| detour::scaled(&output, 1.0 / at.factor());
            },
        },
    },
    Fault {
        name: "gradients-times-ranks",
        mistake: Mistake::GradientsTimesRanks,
        effect: "The gradient norm is P times too large, which Adam hides.",
        source: Some("DeepSpeed #5248; VeOmni PR #681"),
        made: Made::InAttention {
            applies: is_split,
            make: |stages| {
                stages.returned = |at, output| detour::scaled(&output, at.factor());
            },
        },
    },
    Fault {
        name: "kv-gradients-over-ranks",
        mistake: Mistake::KvGradientsOverRanks,
        effect: "Keys and values learn P times more slowly than queries.",
        source: None,
        // Of one KV head, which every rank holds, that is the mean of its copies.
        made: Made::InAttention {
            applies: |case| is_split(case) && case.kv_heads > 1,
            make: |stages| {
                stages.received = |at, [query, key, value]| {
                    let factor = 1.0 / at.factor();
                    Ok([
                        query,
                        detour::scaled(&key, factor)?,
                        detour::scaled(&value, factor)?,
                    ])
                };
            },
        },
    },
    Fault {
        name: "other-ranks-gradient-lost",
        mistake: Mistake::OtherRanksGradientLost,
        effect: "A token's key and value learn from the queries of their own rank alone.",
        source: Some("VeOmni PR #681, PR #1120"),
        made: Made::InAttention {
            applies: is_split,
            make: |stages| {
                stages.core = |at, local| {
                    let owners = owners(at)?;
                    let mut sum: Option<Tensor> = None;
                    for rank in 0..at.world() as i64 {
                        let own = owners.f_eq(rank)?.f_unsqueeze(1)?;
                        let key = detour::weighted(&local.key, &own)?;
                        let value = detour::weighted(&local.value, &own)?;
                        let own = own.f_to_kind(local.query.f_kind()?)?;
                        let output = local
                            .attend_with([&local.query, &key, &value])?
                            .f_mul(&own)?;
                        sum = Some(match sum {
                            Some(sum) => sum.f_add(&output)?,
                            None => output,
                        });
                    }
                    sum.map_or_else(|| local.attend(), Ok)
                };
            },
        },
    },
    Fault {
        name: "key-and-value-gradient-swapped",
        mistake: Mistake::KeyAndValueGradientSwapped,
        effect: "The output is right, and dK and dV stand in each other's place.",
        source: None,
        made: Made::InAttention {
            applies: |case| is_split(case) && case.value_size() == case.head_size,
            make: |stages| {
                stages.received = |_, [query, key, value]| {
                    let mut swapped = detour::backward([&key, &value], |cotangents| {
                        Ok(cotangents.iter().rev().map(Tensor::shallow_clone).collect())
                    })?;
                    let value = swapped.swap_remove(1);
                    Ok([query, swapped.swap_remove(0), value])
                };
            },
        },
    },
    Fault {
        name: "key-gradient-zero",
        mistake: Mistake::GradientZero,
        effect: "The key projection does not learn.",
        source: Some(
            "DeepSpeed before 0.19.7 under torch.compile: the backward of the all-to-all vanished",
        ),
        made: Made::InAttention {
            applies: is_split,
            make: |stages| {
                stages.asked = |_, asked| {
                    asked.key = detour::scaled(&asked.key, 0.0)?;
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "head-state-gradient-zero",
        mistake: Mistake::GradientZero,
        effect: "Slopes, sinks and norms do not learn.",
        source: None,
        made: Made::InAttention {
            applies: |case| is_split(case) && has_head_state(case),
            make: |stages| {
                stages.asked = |_, asked| asked.each_of_heads(|tensor| detour::scaled(tensor, 0.0));
            },
        },
    },
    Fault {
        name: "backward-to-wrong-rank",
        mistake: Mistake::BackwardToWrongRank,
        effect: "Every rank gets the gradients of another rank's tokens.",
        source: Some("diffusers PR #14274"),
        made: Made::InAttention {
            applies: is_even,
            make: |stages| {
                stages.received = |at, [query, key, value]| {
                    let order = tokens_of_ranks(&at.tokens()?, |rank, ranks| (rank + 1) % ranks);
                    let order = Tensor::f_from_slice(&order)?;
                    let moved = |tensor: &Tensor| {
                        let order = order.shallow_clone();
                        detour::backward_of(tensor, move |cotangent| {
                            Ok(cotangent.f_index_select(2, &order)?)
                        })
                    };
                    Ok([moved(&query)?, moved(&key)?, moved(&value)?])
                };
            },
        },
    },
    Fault {
        name: "cotangent-strides-ignored",
        mistake: Mistake::CotangentStridesIgnored,
        effect: "The output is right, and gradients are garbage behind a transpose.",
        source: Some("PyTorch #120386, #120582"),
        made: Made::InAttention {
            applies: is_split,
            make: |stages| {
                stages.returned = |_, output| {
                    // [B, H, s, D] in memory, as behind a transpose, read as
                    // [B, s, H, D].
                    detour::backward_of(&output, |cotangent| {
                        let memory = cotangent.f_transpose(1, 2)?;
                        Ok(memory.f_reshape(cotangent.size())?)
                    })
                };
            },
        },
    },
    Fault {
        name: "head-state-averaged",
        mistake: Mistake::HeadStateAveraged,
        effect: "Slopes, sinks and norms learn P times more slowly than they should.",
        source: Some("DeepSpeed #6841"),
        made: Made::InAttention {
            applies: |case| is_split(case) && has_head_state(case),
            make: |stages| {
                stages.asked = |at, asked| {
                    let factor = 1.0 / at.factor();
                    asked.each_of_heads(|tensor| detour::scaled(tensor, factor))
                };
            },
        },
    },
    Fault {
        name: "head-state-of-one-rank",
        mistake: Mistake::HeadStateOfOneRank,
        effect: "Slopes, sinks and norms of most heads do not learn.",
        source: Some("ColossalAI PR #4927; VeOmni #1059"),
        made: Made::InAttention {
            applies: |case| is_split(case) && has_head_state(case),
            make: |stages| {
                stages.asked = |at, asked| {
                    let factor = f64::from(u8::from(at.rank() == 0));
                    asked.each_of_heads(|tensor| detour::scaled(tensor, factor))
                };
            },
        },
    },
    Fault {
        name: "other-convention",
        mistake: Mistake::OtherConvention,
        effect: "Gradients are P times too small for the loss that is declared, and right for \
                 another.",
        source: Some("DeepSpeed #5248, #6841; VeOmni PR #681"),
        made: Made::InAttention {
            applies: is_split,
            make: |stages| {
                stages.declared.upstream = Upstream::TimesRanks;
                stages.returned = |at, output| detour::scaled(&output, 1.0 / at.factor());
            },
        },
    },
];

fn has_head_state(case: &AttentionCase) -> bool {
    case.extras.alibi || case.extras.sinks || case.extras.norms
}

/// The rank of each token, [S] in global order.
fn owners(at: &At<'_>) -> Staged<Tensor> {
    let tokens = at.tokens()?;
    let mut owners = vec![0i64; tokens.total()];
    for rank in 0..tokens.ranks() {
        for place in tokens.places(rank) {
            owners[place] = rank as i64;
        }
    }
    Ok(Tensor::f_from_slice(&owners)?)
}
