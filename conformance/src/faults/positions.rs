//! Faults of positions, and of the masks that follow from them.

use fixtures::{AttentionCase, Mask, Rotary};

use super::sequence::meet;
use super::{Fault, Made, is_split, plain};
use crate::diagnosis::Mistake;

pub(super) const FAULTS: &[Fault] = &[
    Fault {
        name: "causal-by-local-index",
        mistake: Mistake::CausalByLocalIndex,
        effect: "Tokens see later tokens of other ranks, and not all of the earlier ones.",
        source: None,
        made: Made::InAttention {
            applies: |case| is_masked_plainly(case) && case.mask == Mask::Causal,
            make: |stages| {
                stages.local = |_, _, local| {
                    let numbers = plain::local_numbers(local)?;
                    local.visible = Some(plain::by_order(local, &numbers)?);
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "causal-without-query-offset",
        mistake: Mistake::CausalByLocalIndex,
        effect: "Every rank's queries see as many keys as those of the first rank.",
        source: None,
        made: Made::InAttention {
            applies: |case| {
                let is_windowed = case.extras.window.is_some();
                is_masked_plainly(case) && case.mask == Mask::Causal && !is_windowed
            },
            make: |stages| {
                stages.local = |_, _, local| {
                    let queries = plain::local_numbers(local)?.f_unsqueeze(1)?;
                    let keys = plain::global_numbers(local)?;
                    local.visible = Some(queries.f_ge_tensor(&keys)?);
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "rotary-by-local-position",
        mistake: Mistake::RotaryByLocalPosition,
        effect: "Positions begin anew on every rank, so that distances across ranks are wrong.",
        source: Some("LlamaFactory PR #7318; transformers PR #36607"),
        made: Made::InAttention {
            applies: |case| is_split(case) && case.extras.rotary.is_some(),
            make: |stages| {
                stages.local = |_, _, local| {
                    let numbers = plain::local_numbers(local)?;
                    local.each_position(|positions| Ok(numbers.f_expand_as(positions)?))
                };
            },
        },
    },
    Fault {
        name: "rotary-of-keys-only",
        mistake: Mistake::RotaryOfKeysOnly,
        effect: "Attention depends on where a key stands, and not on how far away.",
        source: None,
        made: Made::InAttention {
            applies: |case| is_split(case) && case.extras.rotary.is_some(),
            make: |stages| {
                stages.local = |_, _, local| {
                    local.query_positions = None;
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "rotary-ignored",
        mistake: Mistake::RotaryIgnored,
        effect: "The model knows no positions.",
        source: None,
        made: Made::InAttention {
            applies: |case| is_split(case) && case.extras.rotary.is_some(),
            make: |stages| {
                stages.local = |_, _, local| {
                    (local.query_positions, local.key_positions) = (None, None);
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "first-component-only",
        mistake: Mistake::FirstComponentOnly,
        effect: "Images are seen as if they had neither height nor width.",
        source: Some("verl PR #7137, #6284; ms-swift #8468"),
        made: Made::InAttention {
            applies: |case| is_split(case) && case.extras.rotary == Some(Rotary::Multimodal),
            make: |stages| {
                stages.local = |_, _, local| {
                    local.each_position(|positions| {
                        let first = positions.f_narrow(0, 0, 1)?;
                        Ok(first.f_expand_as(positions)?)
                    })
                };
            },
        },
    },
    Fault {
        name: "slopes-by-local-distance",
        mistake: Mistake::SlopesByLocalDistance,
        effect: "Tokens of different ranks seem nearer to each other than they are.",
        source: None,
        made: Made::InAttention {
            applies: |case| is_masked_plainly(case) && case.extras.alibi,
            make: |stages| {
                stages.local = |_, _, local| {
                    let numbers = plain::local_numbers(local)?;
                    local.distances = Some(plain::between(&numbers)?.f_abs()?);
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "documents-cut-at-shards",
        mistake: Mistake::DocumentsCutAtShards,
        effect: "A document that goes on on the next rank is two documents.",
        source: Some("DeepSpeed PR #7887; axolotl PR #2495"),
        made: Made::InAttention {
            applies: |case| is_split(case) && case.extras.documents.is_some(),
            make: |stages| {
                stages.local = |_, _, local| {
                    let mut starts: Vec<usize> = (0..local.tokens.ranks())
                        .flat_map(|rank| local.tokens.runs(rank))
                        .map(|run| run.first)
                        .collect();
                    starts.sort_unstable();
                    starts.push(local.tokens.total());
                    let shards = starts.windows(2).map(|pair| pair[0]..pair[1]).collect();
                    if let Some(documents) = &mut local.documents {
                        *documents = meet(documents, &vec![shards; documents.len()]);
                    }
                    Ok(())
                };
            },
        },
    },
];

/// Whether masks are given by the order of tokens alone, and ranks share them.
fn is_masked_plainly(case: &AttentionCase) -> bool {
    let extras = &case.extras;
    let has_structure =
        extras.documents.is_some() || extras.padding.is_some() || extras.block.is_some();
    is_split(case) && !has_structure && extras.dropout.is_none()
}
