//! The verdict over all ranks' calls: a pure function, the same everywhere.
//!
//! In three steps, so that the first thing found is the plainest: each rank's
//! call by itself, then beside that of rank 0, then all of them together.

use super::{
    Agreed,
    descriptor::{DTYPES, Descriptor, TensorDescriptor},
};
use crate::{
    error::{Error, Refusal, Result},
    head_partition::HeadPartition,
};

const ARGUMENTS: [&str; 3] = ["query", "key", "value"];
const DIMENSIONS: [&str; 4] = ["batch", "tokens", "heads", "head size"];
// Positions in `DIMENSIONS` and in the size of a tensor.
const BATCH: usize = 0;
const TOKENS: usize = 1;
const HEADS: usize = 2;
const HEAD_SIZE: usize = 3;

/// An argument, what is wrong with it and what to do; whose it is, the caller
/// knows.
type Fault = (&'static str, String, String);

/// What all ranks agreed on, from the call of each, in rank order.
///
/// # Errors
/// The first thing that is wrong, in an order that is the same everywhere.
pub(super) fn check(calls: &[Descriptor]) -> Result<Agreed> {
    let refuse = |rank| {
        move |(argument, problem, remedy)| Refusal {
            rank,
            argument,
            problem,
            remedy,
        }
    };
    for (rank, call) in calls.iter().enumerate() {
        alone(call).map_err(refuse(Some(rank)))?;
    }
    for (rank, call) in calls.iter().enumerate().skip(1) {
        beside(call, &calls[0]).map_err(refuse(Some(rank)))?;
    }
    together(calls)
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
    for dimension in [BATCH, TOKENS, HEADS, HEAD_SIZE] {
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
    match call.scale {
        Some(scale) if !scale.is_finite() => fault(
            "options",
            format!("has the scale {scale}"),
            "give a finite scale, or none",
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
    if let Some(dimension) = tensor.size.iter().position(|&length| length == 0) {
        let problem = format!("has {} 0", DIMENSIONS[dimension]);
        return fault(argument, problem, "give every rank at least one of each");
    }
    if tensor.dtype_name().is_none() {
        let known = DTYPES.map(|(_, name)| name).join(", ");
        let problem = "has a dtype that attention is not computed in".to_owned();
        return fault(argument, problem, &format!("give one of {known}"));
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
    if call.mask != first.mask {
        return fault(
            "options",
            format!(
                "has the mask {:?}, but on rank 0 it is {:?}",
                call.mask, first.mask
            ),
            "give every rank the same mask",
        );
    }
    if call.scale.map(f64::to_bits) != first.scale.map(f64::to_bits) {
        return fault(
            "options",
            format!(
                "has the scale {:?}, but on rank 0 it is {:?}",
                call.scale, first.scale
            ),
            "give every rank the same scale",
        );
    }
    if call.uneven_heads != first.uneven_heads {
        let problem = format!(
            "has `uneven_heads` {}, but on rank 0 it is {}",
            call.uneven_heads, first.uneven_heads
        );
        return fault("options", problem, "give every rank the same");
    }
    Ok(())
}

/// What only the number of ranks decides.
fn together(calls: &[Descriptor]) -> Result<Agreed> {
    let length = |tensor: &TensorDescriptor, dimension: usize| {
        usize::try_from(tensor.size[dimension]).unwrap_or(0)
    };
    let (query, key) = (calls[0].query(), calls[0].key());
    let heads = HeadPartition::new(length(query, HEADS), length(key, HEADS), calls.len())?;
    if !heads.is_even() && !calls[0].uneven_heads {
        return Err(Error::from(Refusal {
            rank: None,
            argument: "query",
            problem: format!(
                "has {} heads, which {} ranks cannot share evenly",
                heads.query_heads(),
                heads.ranks()
            ),
            remedy: "use a number of ranks that divides the heads, or set `uneven_heads`"
                .to_owned(),
        }));
    }
    let tokens = calls
        .iter()
        .map(|call| length(call.query(), TOKENS))
        .collect();
    Ok(Agreed { tokens, heads })
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

fn fault(argument: &'static str, problem: String, remedy: &str) -> Result<(), Fault> {
    Err((argument, problem, remedy.to_owned()))
}
