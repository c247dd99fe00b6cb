//! Faults of element types.

use fixtures::{AttentionCase, Dtype};
use tch::{Kind, Tensor};

use super::local::Local;
use super::rank::Staged;
use super::{Fault, Made, detour, is_split, plain};
use crate::diagnosis::Mistake;

pub(super) const FAULTS: &[Fault] = &[
    Fault {
        name: "exchange-in-bf16",
        mistake: Mistake::ExchangeInBf16,
        effect: "Training in float32 has the noise of bfloat16.",
        source: Some("DeepSpeed PR #7175"),
        made: Made::InAttention {
            applies: |case| is_split(case) && is_precise(case),
            make: |stages| {
                // A cast rounds on the way back too.
                stages.asked = |_, asked| asked.each(through_bf16);
                stages.attended = |_, output| through_bf16(&output);
            },
        },
    },
    Fault {
        name: "gradients-in-bf16",
        mistake: Mistake::GradientsInBf16,
        effect: "The loss is right, and gradients have the noise of bfloat16.",
        source: Some("DeepSpeed PR #4530"),
        made: Made::InAttention {
            applies: |case| is_split(case) && is_precise(case),
            make: |stages| {
                stages.asked = |_, asked| {
                    let rounded = |tensor: &Tensor| {
                        let kind = tensor.f_kind()?;
                        detour::backward_of(tensor, move |cotangent| {
                            Ok(cotangent.f_to_kind(Kind::BFloat16)?.f_to_kind(kind)?)
                        })
                    };
                    asked.each(rounded)?;
                    asked.each_of_heads(rounded)
                };
            },
        },
    },
    Fault {
        name: "partial-results-in-bf16",
        mistake: Mistake::PartialResultsInBf16,
        effect: "Errors grow with the number of blocks that are added up.",
        source: Some("ring-flash-attention #42, #67"),
        made: Made::InAttention {
            applies: |case| is_split(case) && !is_precise(case) && is_plain(case),
            make: |stages| {
                stages.core = |_, local| {
                    let weights =
                        plain::weights(local, &local.query, &local.expanded(&local.key)?)?;
                    added_up_block_by_block(local, &weights)
                };
            },
        },
    },
    Fault {
        name: "rounded-towards-zero",
        mistake: Mistake::BiasedRounding,
        effect: "Outputs are a little too small, all of them.",
        source: None,
        // Where sums are rounded too, honest errors are larger than these.
        made: Made::InAttention {
            applies: |case| is_split(case) && !is_precise(case) && is_plain(case),
            make: |stages| {
                stages.core = |_, local| {
                    let kind = local.query.f_kind()?;
                    let [query, key, value] = [&local.query, &local.key, &local.value]
                        .map(|tensor| tensor.f_to_kind(Kind::Double));
                    let precise = local.attend_with([&query?, &key?, &value?])?;
                    truncated(&precise, kind)
                };
            },
        },
    },
];

/// Whether bfloat16 would be seen in it.
fn is_precise(case: &AttentionCase) -> bool {
    matches!(case.dtype, Dtype::F64 | Dtype::F32)
}

/// Whether the plain formula does it.
fn is_plain(case: &AttentionCase) -> bool {
    case.extras.block.is_none() && case.extras.dropout.is_none()
}

fn through_bf16(tensor: &Tensor) -> Staged<Tensor> {
    Ok(tensor
        .f_to_kind(Kind::BFloat16)?
        .f_to_kind(tensor.f_kind()?)?)
}

/// Weights times values, a block of one key after the other, the sum so far in
/// the element type.
fn added_up_block_by_block(local: &Local, weights: &Tensor) -> Staged<Tensor> {
    let value = local.expanded(&local.value)?;
    let mut sum: Option<Tensor> = None;
    for key in 0..value.size()[2] {
        let part = weights
            .f_narrow(3, key, 1)?
            .f_matmul(&value.f_narrow(2, key, 1)?)?;
        sum = Some(match sum {
            Some(sum) => sum.f_add(&part)?,
            None => part,
        });
    }
    sum.map_or_else(|| local.attend(), Ok)
}

/// The tensor in a half type, rounded towards zero.
fn truncated(tensor: &Tensor, kind: Kind) -> Staged<Tensor> {
    detour::forward_of(tensor, move |tensor| {
        let nearest = tensor.f_to_kind(kind)?;
        let is_beyond = nearest
            .f_to_kind(tensor.f_kind()?)?
            .f_abs()?
            .f_gt_tensor(&tensor.f_abs()?)?;
        // Numbers of either sign are nearer to zero by one bit less.
        let bits = nearest.f_view_dtype(Kind::Int16)?;
        let towards_zero = bits.f_sub(&is_beyond.f_to_kind(bits.f_kind()?)?)?;
        Ok(towards_zero.f_view_dtype(kind)?)
    })
}
