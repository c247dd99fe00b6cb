//! Attention by torch's `scaled_dot_product_attention`.
//!
//! torch chooses the kernel. On a CPU it is the fused one for every shape that
//! this crate lets through, grouped or not, and its result for a head depends
//! neither on how many heads stand beside it nor on the strides. That is what
//! makes the result bit-equal for any number of ranks. Groups are left to the
//! kernel, so that the cotangent of a KV head is summed over its query heads in
//! the same place as in one process: all groups in one call where they are of
//! one size, which is all that the kernel takes, and each in a call of its own
//! where an uneven cut went through a group.

use super::Mask;
use crate::{error::Result, head_partition::HeadMap};
use tch::Tensor;

pub(super) fn attention(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    heads: &HeadMap,
    mask: Mask,
    scale: Option<f64>,
) -> Result<Tensor> {
    let fused = |query: &Tensor, key: &Tensor, value: &Tensor, group| {
        let (mask, dropout, causal) = (None::<&Tensor>, 0.0, mask == Mask::Causal);
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
    };
    if let Some(group) = heads.uniform_group() {
        return Ok(fused(query, key, value, group)?);
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
        .map(|((query, (key, value)), group)| fused(query, key, value, group as usize))
        .collect::<std::result::Result<Vec<_>, _>>()?;
    Ok(Tensor::f_cat(&outputs, 1)?)
}
