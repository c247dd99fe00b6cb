//! Faults of sequence lengths, and of how ranks share them.

use fixtures::{AttentionCase, Mask, Sharding, State};
use tch::Tensor;

use super::rank::{Asked, Staged};
use super::{Fault, Made, is_split};
use crate::diagnosis::Mistake;

pub(super) const FAULTS: &[Fault] = &[
    Fault {
        name: "remainder-tokens-lost",
        mistake: Mistake::RemainderTokensLost,
        effect: "The last tokens of longer shards have no output and are seen by nobody.",
        source: Some("DeepSpeed #7384, #7842, #5177"),
        made: Made::InAttention {
            applies: |case| {
                is_uneven(case) && has_tokens_alone(case) && case.sequence >= case.world
            },
            make: |stages| {
                stages.asked = |at, asked| keep(asked, at.info.sequence / at.world());
                stages.returned = |at, output| fill(&output, at.info.shard_lengths[at.rank()]);
            },
        },
    },
    Fault {
        name: "fill-tokens-seen",
        mistake: Mistake::FillTokensSeen,
        effect: "Outputs are smaller where the length is no multiple of the ranks.",
        source: Some("diffusers #13277; vllm-omni #492, PR #672"),
        made: Made::InAttention {
            applies: |case| {
                let has_positions = case.extras.rotary.is_some();
                is_uneven(case)
                    && has_tokens_alone(case)
                    && case.mask == Mask::Full
                    && !has_positions
            },
            make: |stages| {
                stages.asked = |at, asked| {
                    let longest = at.info.sequence.div_ceil(at.world());
                    asked.each(|tensor| fill(tensor, longest))?;
                    let tokens = at.info.shard_lengths[at.rank()];
                    let missing = (longest - tokens) as i64;
                    asked.positions = asked.positions.f_constant_pad_nd([0, missing])?;
                    Ok(())
                };
                stages.returned = |at, output| {
                    let tokens = at.info.shard_lengths[at.rank()] as i64;
                    Ok(output.f_narrow(1, 0, tokens)?)
                };
            },
        },
    },
    Fault {
        name: "stale-length",
        mistake: Mistake::StaleLength,
        effect: "After a longer sequence came, tokens beyond the length of the first are lost.",
        source: Some("TensorRT-LLM PR #13486"),
        made: Made::InAttention {
            applies: |case| case.world > 1 && case.extras.state == Some(State::OtherLength),
            make: |stages| {
                stages.asked = |at, asked| {
                    let now = at.info.shard_lengths[at.rank()];
                    let first = *at.memory.borrow_mut().first.get_or_insert(now);
                    keep(asked, first.min(now))
                };
                stages.returned = |at, output| fill(&output, at.info.shard_lengths[at.rank()]);
            },
        },
    },
];

fn is_uneven(case: &AttentionCase) -> bool {
    let is_contiguous = case.extras.sharding == Sharding::Contiguous;
    is_split(case) && is_contiguous && !case.sequence.is_multiple_of(case.world)
}

/// Whether tokens can be taken away or added and the rest still makes sense.
fn has_tokens_alone(case: &AttentionCase) -> bool {
    let extras = &case.extras;
    extras.documents.is_none()
        && extras.padding.is_none()
        && extras.block.is_none()
        && extras.dropout.is_none()
}

/// Keeps the first tokens of this rank.
fn keep(asked: &mut Asked, tokens: usize) -> Staged<()> {
    let tokens = tokens as i64;
    asked.each(|tensor| Ok(tensor.f_narrow(1, 0, tokens)?))?;
    asked.positions = asked.positions.f_narrow(-1, 0, tokens)?;
    Ok(())
}

/// [B, s, H, D] with zeros behind it, to this many tokens.
fn fill(tensor: &Tensor, tokens: usize) -> Staged<Tensor> {
    let missing = tokens as i64 - tensor.size()[1];
    Ok(tensor.f_constant_pad_nd([0, 0, 0, 0, 0, missing])?)
}
