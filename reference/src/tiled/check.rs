//! What a [`TiledCompute`] may not be.

use super::{Reduction, TiledCompute};
use crate::error::{Result, refuse};
use tch::{Kind, Tensor};

/// Refuses what contradicts itself, before anything is computed.
pub(super) fn check(compute: &TiledCompute<'_>) -> Result<()> {
    if compute.tiles == 0 {
        return refuse("tiles", "is 0", "give at least 1");
    }
    if compute.shard.is_empty() {
        return refuse(
            "shard",
            "has no tensor",
            "give at least one tensor of which each tile sees its tokens",
        );
    }
    for &(name, tensor) in compute.shard {
        if !tensor.defined() {
            return undefined("shard", name);
        }
        sharded("shard", &format!("\"{name}\" "), tensor, compute)?;
    }
    if let Some((name, _)) = compute.pass.iter().find(|(_, tensor)| !tensor.defined()) {
        return undefined("pass", name);
    }
    if let Some(position) = compute
        .parameters
        .iter()
        .position(|tensor| !tensor.defined())
    {
        return undefined("parameters", &format!("at position {position}"));
    }
    names(compute)?;
    counted(compute)
}

fn names(compute: &TiledCompute<'_>) -> Result<()> {
    let names: Vec<&str> = compute
        .shard
        .iter()
        .chain(compute.pass)
        .map(|&(name, _)| name)
        .collect();
    let again = (1..names.len()).find(|&i| names[..i].contains(&names[i]));
    if let Some(again) = again {
        let argument = if again < compute.shard.len() {
            "shard"
        } else {
            "pass"
        };
        return refuse(
            argument,
            format!("names another tensor \"{}\"", names[again]),
            "give each tensor a name of its own",
        );
    }
    let wanted = compute.gradient.unwrap_or_default();
    match wanted.iter().find(|name| !names.contains(name)) {
        None => Ok(()),
        Some(name) => refuse(
            "gradient",
            format!("names a tensor \"{name}\""),
            format!("name some of {names:?}"),
        ),
    }
}

fn counted(compute: &TiledCompute<'_>) -> Result<()> {
    let Some(counted) = compute.counted else {
        return Ok(());
    };
    if compute.reduction != Reduction::Mean {
        return refuse(
            "counted",
            format!("is given, but the reduction is {:?}", compute.reduction),
            "leave it out, or take the mean over tokens",
        );
    }
    if !counted.defined() {
        return undefined("counted", "");
    }
    if counted.f_kind()? != Kind::Bool {
        return refuse(
            "counted",
            format!("has element type {:?}", counted.f_kind()?),
            "give Bool: whether a token counts",
        );
    }
    sharded("counted", "", counted, compute)
}

/// Refuses a tensor that has other than the tokens of the sequence.
fn sharded(
    argument: &'static str,
    of: &str,
    tensor: &Tensor,
    compute: &TiledCompute<'_>,
) -> Result<()> {
    let (dimension, length) = (compute.shard_dimension, compute.sequence_length);
    let size = tensor.size();
    match size.get(dimension) {
        None => refuse(
            argument,
            format!("has {of}{size:?}, without dimension {dimension}"),
            "give the dimension of the tokens as `shard_dimension`",
        ),
        Some(&tokens) if tokens as usize != length => refuse(
            argument,
            format!(
                "has {of}{size:?}, of {tokens} tokens in dimension {dimension}, but `sequence_length` is {length}"
            ),
            "give every tensor to shard as many tokens",
        ),
        Some(_) => Ok(()),
    }
}

fn undefined(argument: &'static str, name: &str) -> Result<()> {
    let name = if name.is_empty() {
        String::new()
    } else {
        format!(" {name}")
    };
    refuse(
        argument,
        format!("has an undefined tensor{name}"),
        "give a tensor that holds data",
    )
}
