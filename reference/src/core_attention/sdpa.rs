//! Attention by torch's `scaled_dot_product_attention`.
//!
//! torch chooses the kernel. On a CPU it is the fused one for every shape that
//! gets here, grouped or not, and its result for a head depends neither on how
//! many heads stand beside it nor on the strides. That is what makes the
//! result bit-equal for any number of ranks. Groups are left to the kernel, so
//! that the cotangent of a KV head is summed over its query heads in the same
//! place as in one process: all groups in one call where they are of one size,
//! which is all that the kernel takes, and each in a call of its own where an
//! uneven cut went through a group.
//!
//! What the fused kernel does not take would make torch fall back on the whole
//! score matrix, without a word. Here nothing does on a CPU: heads whose values
//! have another size are filled up with zeros, structure becomes tiles, and
//! scores that are more than a scaled product go by the formula, a few rows at a
//! time. On a GPU torch still does where it has no fused kernel: for float64, and
//! for groups in float32.

use super::{
    Call,
    backend::{self, Switches},
    tiled::{self, Arithmetic},
};
use crate::{error::Result, head_partition::HeadMap};
use tch::{Device, Tensor};

/// The most queries of a tile that is masked or goes by the formula.
const ROWS: usize = 128;
/// How many scores the formula is to have in memory at once: few enough to
/// stay near the processor.
const SCORES: usize = 1 << 18;
/// The fewest queries of a tile, lest there be too many of them.
const FEWEST_ROWS: usize = 8;

pub(super) fn attention(call: &Call, switches: Switches) -> Result<Tensor> {
    let (score, structure) = (call.score, call.structure);
    let (slopes, sinks) = (structure.slopes.is_some(), structure.sinks.is_some());
    let dropout = structure
        .dropout
        .filter(|dropout| dropout.probability > 0.0);
    let visible = &call.visible;
    let has_mask = visible.order.window.is_some() || visible.layout.is_some();
    let no_fused = score.softcap.is_some() || slopes || sinks || dropout.is_some();
    if no_fused || has_mask && !takes_mask(call.query, switches) {
        let formula = Arithmetic::Formula {
            scale: call.scale(),
            softcap: score.softcap,
            slopes,
            sinks,
            dropout,
        };
        let scores_of_row = call.batch() * call.heads.query_heads() * call.visible.keys;
        let rows = (SCORES / scores_of_row.max(1)).clamp(FEWEST_ROWS, ROWS);
        return tiled::attention(call, [call.query, call.key, call.value], formula, rows);
    }

    let (query, scale) = with_positive_scale(call.query, call.scale())?;
    let value_size = call.value.size()[3];
    let room = value_size.max(query.size()[3]);
    let [query, key, value] = [
        fill_up(&query, room)?,
        fill_up(call.key, room)?,
        fill_up(call.value, room)?,
    ];
    let inputs = [&query, &key, &value];
    let fused = Fused { scale, switches };
    let output = if visible.is_plain() {
        fused.attention(inputs, call.heads, None, visible.order.causal)?
    } else {
        // Documents go whole: the kernel needs no mask for them.
        let rows = if has_mask { ROWS } else { usize::MAX };
        tiled::attention(call, inputs, Arithmetic::Fused(fused), rows)?
    };
    Ok(if room == value_size {
        output
    } else {
        output.f_narrow(3, 0, value_size)?
    })
}

/// FlashAttention takes none on a GPU.
fn takes_mask(query: &Tensor, switches: Switches) -> bool {
    switches != Some(backend::FLASH) || query.device() == Device::Cpu
}

/// The same scores by a positive scale. torch's kernel multiplies the minus
/// infinity of a hidden key with the scale too, which makes it visible for a
/// negative one and not a number for zero.
fn with_positive_scale(query: &Tensor, scale: f64) -> Result<(Tensor, f64)> {
    Ok(if scale > 0.0 {
        (query.shallow_clone(), scale)
    } else if scale < 0.0 {
        (query.f_neg()?, -scale)
    } else {
        (query.f_mul_scalar(0.0)?, 1.0)
    })
}

/// Heads of `size` channels, the last of them next to one another in memory,
/// as the fused kernel takes them. Channels of zeros add nothing to a score,
/// and give outputs of zeros.
fn fill_up(tensor: &Tensor, size: i64) -> Result<Tensor> {
    let missing = size - tensor.size()[3];
    if missing > 0 {
        return Ok(tensor.f_constant_pad_nd([0, missing])?);
    }
    Ok(match tensor.stride()[3] {
        1 => tensor.shallow_clone(),
        _ => tensor.f_contiguous()?,
    })
}

/// torch's own attention.
#[derive(Clone, Copy)]
pub(super) struct Fused {
    scale: f64,
    switches: Switches,
}

impl Fused {
    /// `mask` is bool [queries, keys], true where visible.
    pub(super) fn attention(
        &self,
        [query, key, value]: [&Tensor; 3],
        heads: &HeadMap,
        mask: Option<&Tensor>,
        causal: bool,
    ) -> Result<Tensor> {
        let call = |query: &Tensor, key: &Tensor, value: &Tensor, group| {
            let (dropout, scale) = (0.0, Some(self.scale));
            backend::with(self.switches, || {
                Tensor::f_scaled_dot_product_attention(
                    query,
                    key,
                    value,
                    mask,
                    dropout,
                    causal,
                    scale,
                    group > 1,
                )
            })
        };
        if let Some(group) = heads.uniform_group() {
            return Ok(call(query, key, value, group)?);
        }
        // Split, for its backward puts cotangents side by side; that of a narrowed
        // view would add zeros to them, which turns -0 into 0.
        let sizes: Vec<i64> = (0..heads.kv_heads())
            .map(|kv_head| heads.query_range_of(kv_head).len() as i64)
            .collect();
        let (queries, keys, values) = (
            query.f_split_with_sizes(&sizes, 1)?,
            key.f_split(1, 1)?,
            value.f_split(1, 1)?,
        );
        let outputs = queries
            .iter()
            .zip(keys.iter().zip(&values))
            .zip(sizes)
            .map(|((query, (key, value)), group)| call(query, key, value, group as usize))
            .collect::<std::result::Result<Vec<_>, _>>()?;
        Ok(Tensor::f_cat(&outputs, 1)?)
    }
}
