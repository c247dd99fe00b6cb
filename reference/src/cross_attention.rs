//! Attention to keys and values that every rank already holds whole, as those
//! of an encoder.
//!
//! Each query needs all keys and values, and finds them on its own rank. So
//! nothing has to travel, and nothing does: there is no communicator here.
//!
//! Not here: masks, positions and documents, which have no meaning between two
//! sequences.

use crate::{
    call::Call,
    core_attention::Mask,
    error::{Result, refuse},
    head_partition::HeadPartition,
    local_attention::attend,
    options::Options,
    sequence::Sequence,
};
use tch::Tensor;

/// Attention of this rank's tokens to a whole other sequence.
///
/// `query` is [B, s, Hq, D], `key` [B, S', Hkv, D] and `value`
/// [B, S', Hkv, Dv]; the result is [B, s, Hq, Dv]. The gradients of `key` and
/// `value` are this rank's part: those of all ranks add up to that of one
/// process, as do those of any parameter. Of `options` the kernel, scale and
/// soft cap are read, of `call` the sinks and the head norm.
///
/// # Errors
/// Refused on this rank alone, when shapes do not fit, or when something is
/// asked for that has no meaning here.
pub fn cross_attention(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    call: &Call<'_>,
    options: &Options,
) -> Result<Tensor> {
    check_shapes(query, key, value)?;
    check_meaning(call, options)?;
    let heads = |tensor: &Tensor| tensor.size()[2] as usize;
    let heads = HeadPartition::new(heads(query), heads(key), 1)?;
    let by_heads = |tensor: &Tensor| tensor.f_transpose(1, 2);
    let tensors = [by_heads(query)?, by_heads(key)?, by_heads(value)?];
    let output = attend(tensors, &heads, 0, &Sequence::default(), call, options)?;
    Ok(output.f_transpose(1, 2)?)
}

fn check_shapes(query: &Tensor, key: &Tensor, value: &Tensor) -> Result<()> {
    let shapes = [query.size(), key.size(), value.size()];
    let names = ["query", "key", "value"];
    for (argument, shape) in names.into_iter().zip(&shapes) {
        if shape.len() != 4 {
            let problem = format!("has shape {shape:?}");
            return refuse(argument, problem, "give [batch, tokens, heads, head size]");
        }
    }
    let [query, key, value] = &shapes;
    if [key[0], key[3]] != [query[0], query[3]] {
        let problem = format!("has shape {key:?}, but `query` has {query:?}");
        return refuse("key", problem, "give both the same batch and head size");
    }
    if value[..3] != key[..3] {
        let problem = format!("has shape {value:?}, but `key` has {key:?}");
        return refuse(
            "value",
            problem,
            "give both the same batch, tokens and heads",
        );
    }
    Ok(())
}

fn check_meaning(call: &Call<'_>, options: &Options) -> Result<()> {
    let of_one_sequence = [
        ("mask", options.score.mask == Mask::Causal),
        ("window", options.score.window.is_some()),
        ("rotary", options.rotary.is_some()),
        ("documents", call.documents.is_some()),
        ("attention_mask", call.attention_mask.is_some()),
        ("layout", call.layout.is_some()),
        ("slopes", call.slopes.is_some()),
        ("dropout", call.dropout.is_some()),
    ];
    match of_one_sequence.into_iter().find(|&(_, given)| given) {
        None => Ok(()),
        Some((argument, _)) => {
            let problem = "has no meaning in attention to another sequence";
            refuse(argument, problem, "leave it out")
        }
    }
}
