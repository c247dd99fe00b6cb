//! Logits and their loss in tiles: the whole logits never exist.

use super::{Reduction, TiledCompute, sequence_tiled_compute};
use crate::{
    communicator::Communicator,
    error::{Result, refuse},
    loss::Rule,
};
use std::sync::Arc;
use tch::Tensor;

/// [`cross_entropy`](crate::cross_entropy) of the logits `hidden` x `head`^T,
/// for `hidden` [B, s, h] and `head` [V, h], in tiles of this rank's tokens.
///
/// Logits have the element type of `hidden` and `head`; the gradient of `head`
/// is summed over tiles in float32 for the half types. Ranks may choose
/// different numbers of tiles.
///
/// # Errors
/// As for [`cross_entropy`](crate::cross_entropy), and refused on all ranks
/// alike when `hidden`, `head` or `tiles` of one of them does not fit.
pub fn tiled_logits_loss(
    communicator: &Arc<dyn Communicator>,
    hidden: &Tensor,
    head: &Tensor,
    labels: &Tensor,
    ignore_index: i64,
    reduction: Reduction,
    tiles: usize,
) -> Result<Tensor> {
    let rule = Rule {
        ignore_index,
        reduction,
    };
    let own = check(hidden, head, tiles)
        .and_then(|[batch, tokens, classes]| rule.facts(hidden, labels, [batch, tokens], classes));
    let valid = rule.agree(&**communicator, own)?;
    let logits_and_losses = move |tile: &super::Tile<'_>| {
        let [head] = tile.parameters() else {
            return refuse("parameters", "is not one weight", "give the head");
        };
        let logits = tile.tensor("hidden")?.f_linear(head, None::<&Tensor>)?;
        // A tile's logits are its own, and computed anew for each backward.
        rule.losses(&logits, tile.tensor("labels")?, true)
    };
    rule.over_ranks(communicator, valid, || {
        sequence_tiled_compute(
            logits_and_losses,
            &TiledCompute {
                sequence_length: hidden.size()[1] as usize,
                tiles,
                shard: &[("hidden", hidden), ("labels", labels)],
                parameters: &[head],
                reduction: match reduction {
                    Reduction::None => Reduction::None,
                    _ => Reduction::Sum,
                },
                ..TiledCompute::default()
            },
        )
    })
}

/// Batch, tokens and classes.
fn check(hidden: &Tensor, head: &Tensor, tiles: usize) -> Result<[i64; 3]> {
    for (name, tensor) in [("hidden", hidden), ("head", head)] {
        if !tensor.defined() {
            return refuse(name, "is undefined", "give a tensor that holds data");
        }
    }
    if tiles == 0 {
        return refuse("tiles", "is 0", "give at least 1");
    }
    let (kind, hidden_kind) = (head.f_kind()?, hidden.f_kind()?);
    if kind != hidden_kind || head.device() != hidden.device() {
        return refuse(
            "head",
            format!(
                "is {kind:?} on {:?}, but `hidden` is {hidden_kind:?} on {:?}",
                head.device(),
                hidden.device()
            ),
            "give both the same",
        );
    }
    match (&hidden.size()[..], &head.size()[..]) {
        (&[batch, tokens, features], &[classes, width]) if features == width => {
            Ok([batch, tokens, classes])
        }
        (hidden, head) => refuse(
            "head",
            format!("is {head:?}, but `hidden` is {hidden:?}"),
            "give [classes, features] and [batch, tokens, features]",
        ),
    }
}
