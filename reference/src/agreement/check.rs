//! The verdict over all ranks' calls: a pure function, the same everywhere.
//!
//! In three steps, so that the first thing found is the plainest: each rank's
//! call by itself, then beside that of rank 0, then all of them together.

use super::{
    Agreed,
    descriptor::{Descriptor, FLOATS, TensorDescriptor},
    side,
};
use crate::{
    call::Call,
    core_attention,
    error::{Refusal, Result, refuse},
    head_partition::HeadPartition,
    options::{Options, SequenceLength},
    token_partition::TokenPartition,
};

const ARGUMENTS: [&str; 3] = ["query", "key", "value"];
const DIMENSIONS: [&str; 4] = ["batch", "tokens", "heads", "head size"];
// Positions in `DIMENSIONS` and in the size of a tensor.
pub(super) const BATCH: usize = 0;
pub(super) const TOKENS: usize = 1;
pub(super) const HEADS: usize = 2;
pub(super) const HEAD_SIZE: usize = 3;

/// An argument, what is wrong with it and what to do; whose it is, the caller
/// knows.
pub(super) type Fault = (&'static str, String, String);

/// What all ranks agreed on, from the call of each, in rank order.
///
/// # Errors
/// The first thing that is wrong, in an order that is the same everywhere.
pub(super) fn check(
    descriptors: &[Descriptor],
    options: &Options,
    call: &Call<'_>,
) -> Result<Agreed> {
    let of_rank = |rank| {
        move |(argument, problem, remedy)| Refusal {
            rank: Some(rank),
            argument,
            problem,
            remedy,
        }
    };
    for (rank, one) in descriptors.iter().enumerate() {
        alone(one).map_err(of_rank(rank))?;
    }
    for (rank, one) in descriptors.iter().enumerate().skip(1) {
        beside(one, &descriptors[0]).map_err(of_rank(rank))?;
    }
    // From here on `options` and `call` are those of every rank, but for what
    // no setting holds.
    settings(&descriptors[0], options, call)?;
    for (rank, one) in descriptors.iter().enumerate() {
        side::alone(one, options, call).map_err(of_rank(rank))?;
    }
    let agreed = together(descriptors, options)?;
    for (rank, one) in descriptors.iter().enumerate() {
        side::together(one, agreed.tokens.total(), call).map_err(of_rank(rank))?;
    }
    Ok(agreed)
}

/// What one rank's call shows by itself.
fn alone(call: &Descriptor) -> Result<(), Fault> {
    for (argument, tensor) in ARGUMENTS.into_iter().zip(&call.tensors) {
        tensor_alone(argument, tensor)?;
    }
    let [query, key, value] = &call.tensors;
    for (argument, tensor) in [("key", key), ("value", value)] {
        if tensor.dtype != query.dtype {
            return fault(
                argument,
                format!("is {}, but `query` is {}", name(tensor), name(query)),
                "give all three the same dtype",
            );
        }
        if (tensor.device, tensor.device_name()) != (query.device, query.device_name()) {
            return fault(
                argument,
                format!(
                    "is on {}, but `query` is on {}",
                    tensor.device_name(),
                    query.device_name()
                ),
                "put all three on the same device",
            );
        }
    }
    for dimension in [BATCH, TOKENS, HEAD_SIZE] {
        same(
            ("key", key),
            "`query`",
            query,
            dimension,
            "give both the same",
        )?;
    }
    for dimension in [BATCH, TOKENS, HEADS] {
        same(
            ("value", value),
            "`key`",
            key,
            dimension,
            "give both the same",
        )?;
    }
    if query.size[HEADS] % key.size[HEADS] != 0 {
        return fault(
            "query",
            format!(
                "has {} heads, but `key` has {}",
                query.size[HEADS], key.size[HEADS]
            ),
            "give `query` a multiple of the heads of `key`",
        );
    }
    match call.fixed_local {
        Some(local) if local != query.size[TOKENS] => fault(
            "query",
            format!(
                "has {} tokens, but the length is fixed at {local}",
                query.size[TOKENS]
            ),
            "give as many, or let the length vary",
        ),
        _ => Ok(()),
    }
}

fn tensor_alone(argument: &'static str, tensor: &TensorDescriptor) -> Result<(), Fault> {
    match tensor.dimensions {
        None => {
            return fault(
                argument,
                "is undefined".to_owned(),
                "give a tensor that holds data",
            );
        }
        Some(4) => {}
        Some(count) => {
            let problem = format!("has {count} dimensions, but attention takes 4");
            return fault(argument, problem, "give [batch, tokens, heads, head size]");
        }
    }
    // A rank may be without tokens.
    let empty = |&dimension: &usize| tensor.size[dimension] == 0;
    if let Some(dimension) = [BATCH, HEADS, HEAD_SIZE].into_iter().find(empty) {
        let problem = format!("has {} 0", DIMENSIONS[dimension]);
        return fault(argument, problem, "give every rank at least one of each");
    }
    if !tensor
        .dtype_name()
        .is_some_and(|name| FLOATS.contains(&name))
    {
        let problem = "has a dtype that attention is not computed in".to_owned();
        return fault(
            argument,
            problem,
            &format!("give one of {}", FLOATS.join(", ")),
        );
    }
    Ok(())
}

/// What one rank's call shows beside that of rank 0. The number of tokens may
/// differ: a sequence need not be cut evenly.
fn beside(call: &Descriptor, first: &Descriptor) -> Result<(), Fault> {
    let (query, of_first) = (call.query(), first.query());
    let remedy = "give every rank the same";
    for dimension in [BATCH, HEADS, HEAD_SIZE] {
        same(("query", query), "rank 0", of_first, dimension, remedy)?;
    }
    same(("key", call.key()), "rank 0", first.key(), HEADS, remedy)?;
    let (value, value_of_first) = (call.value(), first.value());
    same(
        ("value", value),
        "rank 0",
        value_of_first,
        HEAD_SIZE,
        remedy,
    )?;
    if query.dtype != of_first.dtype {
        return fault(
            "query",
            format!("is {}, but on rank 0 it is {}", name(query), name(of_first)),
            "give every rank the same dtype",
        );
    }
    if query.device != of_first.device {
        return fault(
            "query",
            format!(
                "is on {}, but on rank 0 it is on {}",
                query.device_name(),
                of_first.device_name()
            ),
            "give every rank the same kind of device",
        );
    }
    if call.differentiable != first.differentiable {
        let will = |call: &Descriptor| {
            if call.differentiable {
                "needs"
            } else {
                "needs no"
            }
        };
        return fault(
            "query",
            format!(
                "{} gradient here, but {} gradient on rank 0",
                will(call),
                will(first)
            ),
            "record gradients on every rank or on none",
        );
    }
    side::beside(&call.side, &first.side)?;
    let mut pairs = call.settings.iter().zip(&first.settings);
    match pairs.find(|(setting, of_first)| setting.word != of_first.word) {
        None => Ok(()),
        Some((setting, of_first)) => fault(
            setting.argument,
            format!(
                "has the {} {}, but on rank 0 it is {}",
                setting.name,
                setting.shown(),
                of_first.shown()
            ),
            "give every rank the same",
        ),
    }
}

/// Whether the settings that all ranks share make sense.
fn settings(descriptor: &Descriptor, options: &Options, call: &Call<'_>) -> Result<()> {
    let (head_size, value_size) = (
        descriptor.query().size[HEAD_SIZE],
        descriptor.value().size[HEAD_SIZE],
    );
    core_attention::check_numbers(
        &options.score,
        call.dropout.map(|dropout| dropout.of_heads(0)),
    )?;
    if let Some(rotary) = options.rotary {
        rotary.check(head_size)?;
    }
    let Some(layers) = options.skip_all_but_last else {
        return Ok(());
    };
    if call.layer >= layers {
        let problem = format!(
            "is {}, but `skip_all_but_last` tells of {layers} layers",
            call.layer
        );
        return refuse("layer", problem, "count the layers from 0");
    }
    if value_size != head_size {
        let problem = format!(
            "has head size {value_size}, but `query`, which skipped layers give back, has \
             {head_size}"
        );
        return refuse("value", problem, "give both the same head size");
    }
    Ok(())
}

/// What only the number of ranks decides.
fn together(calls: &[Descriptor], options: &Options) -> Result<Agreed> {
    let length = |tensor: &TensorDescriptor, dimension: usize| {
        usize::try_from(tensor.size[dimension]).unwrap_or(0)
    };
    let (query, key) = (calls[0].query(), calls[0].key());
    let heads = HeadPartition::new(length(query, HEADS), length(key, HEADS), calls.len())?;
    if !heads.is_even() && !options.uneven_heads {
        return refuse(
            "query",
            format!(
                "has {} heads, which {} ranks cannot share evenly",
                heads.query_heads(),
                heads.ranks()
            ),
            "use a number of ranks that divides the heads, or set `uneven_heads`",
        );
    }
    let tokens: Vec<usize> = calls
        .iter()
        .map(|call| length(call.query(), TOKENS))
        .collect();
    let tokens = TokenPartition::new(options.sharding, &tokens)?;
    match options.sequence_length {
        SequenceLength::Fixed { global, .. } if global != tokens.total() => {
            return refuse(
                "query",
                format!(
                    "has {} tokens on all ranks, but the length is fixed at {global}",
                    tokens.total()
                ),
                "give as many, or let the length vary",
            );
        }
        _ => {}
    }
    Ok(Agreed {
        batch: length(query, BATCH),
        tokens,
        heads,
    })
}

/// That one dimension of a tensor is as long as that of another.
fn same(
    (argument, tensor): (&'static str, &TensorDescriptor),
    whose: &str,
    other: &TensorDescriptor,
    dimension: usize,
    remedy: &str,
) -> Result<(), Fault> {
    let (given, due) = (tensor.size[dimension], other.size[dimension]);
    if given == due {
        return Ok(());
    }
    let what = DIMENSIONS[dimension];
    fault(
        argument,
        format!("has {what} {given}, but {whose} has {due}"),
        &format!("{remedy} {what}"),
    )
}

fn name(tensor: &TensorDescriptor) -> &'static str {
    tensor.dtype_name().unwrap_or("of another dtype")
}

pub(super) fn fault(argument: &'static str, problem: String, remedy: &str) -> Result<(), Fault> {
    Err((argument, problem, remedy.to_owned()))
}
