//! Faults of which head attends which, and of what becomes of copies of KV
//! heads.

use fixtures::AttentionCase;
use tch::Tensor;

use super::local::Local;
use super::rank::Staged;
use super::{Fault, Made, detour, is_split};
use crate::diagnosis::Mistake;

pub(super) const FAULTS: &[Fault] = &[
    Fault {
        name: "kv-heads-tiled",
        mistake: Mistake::KvHeadsTiled,
        effect: "Query heads of a rank attend KV heads of other groups.",
        source: None,
        made: Made::InAttention {
            applies: |case| is_split(case) && is_grouped(case),
            make: |stages| {
                stages.local = |_, _, local| {
                    let kv_heads = local.key.size()[1];
                    let query_heads = local.kv_of_query.len() as i64;
                    local.kv_of_query = (0..query_heads).map(|head| head % kv_heads).collect();
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "kv-heads-tiled-before-exchange",
        mistake: Mistake::KvHeadsTiled,
        effect: "KV heads that are repeated for each query head arrive on other ranks than theirs.",
        source: None,
        made: Made::InAttention {
            applies: |case| is_split(case) && is_grouped(case),
            make: |stages| {
                stages.asked = |_, asked| {
                    let groups = asked.query.size()[2] / asked.key.size()[2];
                    asked.key = asked.key.f_repeat([1, 1, groups, 1])?;
                    asked.value = asked.value.f_repeat([1, 1, groups, 1])?;
                    if let Some([_, of_keys]) = &mut asked.norms {
                        *of_keys = of_keys.f_repeat([groups, 1])?;
                    }
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "kv-heads-of-other-rank",
        mistake: Mistake::KvHeadsOfOtherRank,
        effect: "With fewer KV heads than ranks, neighbouring ranks attend different KV heads.",
        source: Some("verl PR #850"),
        made: Made::InAttention {
            applies: |case| {
                let is_shared = case.world.is_multiple_of(case.kv_heads);
                is_split(case) && case.kv_heads > 1 && case.world > case.kv_heads && is_shared
            },
            make: |stages| {
                stages.asked = |at, asked| {
                    let copies = at.world() as i64 / asked.key.size()[2];
                    asked.key = asked.key.f_repeat([1, 1, copies, 1])?;
                    asked.value = asked.value.f_repeat([1, 1, copies, 1])?;
                    if let Some([_, of_keys]) = &mut asked.norms {
                        *of_keys = of_keys.f_repeat([copies, 1])?;
                    }
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "replicas-not-summed",
        mistake: Mistake::ReplicasNotSummed,
        effect: "With fewer KV heads than ranks, the output is right, and dK and dV are those of \
                 some query heads.",
        source: None,
        made: Made::InAttention {
            applies: |case| is_split(case) && is_replicated(case),
            make: |stages| stages.local = |_, _, local| of_holders(local, |is_first, _| is_first),
        },
    },
    Fault {
        name: "replicas-averaged",
        mistake: Mistake::ReplicasAveraged,
        effect: "With fewer KV heads than ranks, the output is right, and dK and dV are too small.",
        source: None,
        made: Made::InAttention {
            applies: |case| is_split(case) && is_replicated(case),
            make: |stages| {
                stages.local = |_, _, local| of_holders(local, |_, holders| 1.0 / holders)
            },
        },
    },
    Fault {
        name: "group-not-summed",
        mistake: Mistake::GroupNotSummed,
        effect: "With grouped KV heads, the output is right, and dK and dV are those of one query \
                 head of each group.",
        source: None,
        made: Made::InAttention {
            applies: |case| is_split(case) && is_grouped(case),
            make: |stages| {
                stages.core = |_, local| {
                    let heads = &local.heads;
                    let is_first = |head: usize| {
                        head == 0 || heads.kv_head_of(head) != heads.kv_head_of(head - 1)
                    };
                    let kept = heads
                        .query_range(local.rank)
                        .map(|head| is_first(head).into());
                    let kept = per_head(&kept.collect::<Vec<f64>>())?;
                    let own = |tensor| detour::weighted(&local.expanded(tensor)?, &kept);
                    local.attend_expanded([&local.query, &own(&local.key)?, &own(&local.value)?])
                };
            },
        },
    },
    Fault {
        name: "remainder-heads-lost",
        mistake: Mistake::RemainderHeadsLost,
        effect: "The last heads have no output and no gradient.",
        source: None,
        made: Made::InAttention {
            applies: |case| is_split(case) && !case.query_heads.is_multiple_of(case.world),
            make: |stages| {
                stages.returned = |at, output| {
                    let heads = output.size()[2];
                    let kept = heads - heads % at.world() as i64;
                    let lost = output.f_narrow(2, kept, heads - kept)?.f_zeros_like()?;
                    Ok(Tensor::f_cat(&[output.f_narrow(2, 0, kept)?, lost], 2)?)
                };
            },
        },
    },
    Fault {
        name: "slopes-of-local-heads",
        mistake: Mistake::SlopesOfLocalHeads,
        effect: "Every rank's heads have the slopes of the first rank's.",
        source: None,
        made: Made::InAttention {
            applies: |case| is_split(case) && case.extras.alibi,
            make: |stages| {
                stages.local = |_, asked, local| {
                    local.slopes = first(&asked.slopes, &local.slopes)?;
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "sinks-of-local-heads",
        mistake: Mistake::SinksOfLocalHeads,
        effect: "Every rank's heads have the sinks of the first rank's.",
        source: None,
        made: Made::InAttention {
            applies: |case| is_split(case) && case.extras.sinks,
            make: |stages| {
                stages.local = |_, asked, local| {
                    local.sinks = first(&asked.sinks, &local.sinks)?;
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "norms-of-local-heads",
        mistake: Mistake::NormsOfLocalHeads,
        effect: "Every rank's heads are weighted as the first rank's.",
        source: None,
        made: Made::InAttention {
            applies: |case| is_split(case) && case.extras.norms,
            make: |stages| {
                stages.local = |_, asked, local| {
                    if let (Some(all), Some(own)) = (&asked.norms, &mut local.norms) {
                        for (all, own) in all.iter().zip(own) {
                            *own = all.f_narrow(0, 0, own.size()[0])?;
                        }
                    }
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "layout-of-local-heads",
        mistake: Mistake::LayoutOfLocalHeads,
        effect: "Every rank's heads see the blocks that the first rank's see.",
        source: None,
        made: Made::InAttention {
            applies: |case| is_split(case) && case.extras.block.is_some(),
            make: |stages| {
                stages.local = |_, asked, local| {
                    if let Some(layout) = &asked.layout {
                        local.layout = Some(layout.narrow(0..local.kv_of_query.len())?);
                    }
                    Ok(())
                };
            },
        },
    },
];

fn is_grouped(case: &AttentionCase) -> bool {
    case.kv_heads > 1 && case.query_heads > case.kv_heads
}

fn is_replicated(case: &AttentionCase) -> bool {
    ulysses::HeadPartition::new(case.query_heads, case.kv_heads, case.world)
        .is_ok_and(|heads| heads.is_replicated())
}

/// Multiplies the cotangent of each KV head here by what follows from whether
/// this rank is the first that holds it, as a factor, and how many do.
fn of_holders(local: &mut Local, factor: fn(f64, f64) -> f64) -> Staged<()> {
    let of_head = |head| {
        let holders = local.heads.kv_holders(head);
        let is_first = f64::from(u8::from(holders.start == local.rank));
        factor(is_first, holders.len() as f64)
    };
    let factors: Vec<f64> = local.heads.kv_range(local.rank).map(of_head).collect();
    let factors = per_head(&factors)?;
    local.key = detour::weighted(&local.key, &factors)?;
    local.value = detour::weighted(&local.value, &factors)?;
    Ok(())
}

/// Broadcasts to [B, h, S, D].
fn per_head(factors: &[f64]) -> Staged<Tensor> {
    Ok(Tensor::f_from_slice(factors)?.f_view([-1, 1, 1])?)
}

/// Of all heads the first, as many as a rank has.
fn first(all: &Option<Tensor>, own: &Option<Tensor>) -> Staged<Option<Tensor>> {
    Ok(match (all, own) {
        (Some(all), Some(own)) => Some(all.f_narrow(0, 0, own.size()[0])?),
        _ => None,
    })
}
