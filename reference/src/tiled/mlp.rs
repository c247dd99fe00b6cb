//! The MLP of Llama in tiles.

use super::{Reduction, TiledCompute, sequence_tiled_compute};
use crate::error::{Result, refuse};
use tch::Tensor;

/// The weights of a gated MLP without biases: down(silu(gate x) * up x).
///
/// Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202.
#[derive(Debug, Clone, Copy)]
pub struct SwiGlu<'a> {
    /// [F, h].
    pub gate: &'a Tensor,
    /// [F, h].
    pub up: &'a Tensor,
    /// [o, F]; in a model o = h.
    pub down: &'a Tensor,
}

/// The MLP of `hidden` [B, s, h] in tiles of its tokens: [B, s, o].
///
/// # Errors
/// Refused when shapes or element types do not fit, and as for
/// [`sequence_tiled_compute`].
pub fn tiled_mlp(hidden: &Tensor, weights: &SwiGlu<'_>, tiles: usize) -> Result<Tensor> {
    check(hidden, weights)?;
    sequence_tiled_compute(
        move |tile| {
            let hidden = tile.tensor("hidden")?;
            let [gate, up, down] = tile.parameters() else {
                return refuse(
                    "parameters",
                    "is not three weights",
                    "give gate, up and down",
                );
            };
            let gate = hidden.f_linear(gate, None::<&Tensor>)?.f_silu()?;
            let product = gate.f_mul(&hidden.f_linear(up, None::<&Tensor>)?)?;
            Ok(product.f_linear(down, None::<&Tensor>)?)
        },
        &TiledCompute {
            sequence_length: hidden.size()[1] as usize,
            tiles,
            shard: &[("hidden", hidden)],
            parameters: &[weights.gate, weights.up, weights.down],
            reduction: Reduction::None,
            ..TiledCompute::default()
        },
    )
}

fn check(hidden: &Tensor, weights: &SwiGlu<'_>) -> Result<()> {
    let SwiGlu { gate, up, down } = weights;
    let all = [
        ("hidden", hidden),
        ("gate", gate),
        ("up", up),
        ("down", down),
    ];
    for (name, tensor) in all {
        if !tensor.defined() {
            return refuse(name, "is undefined", "give a tensor that holds data");
        }
        if tensor.f_kind()? != hidden.f_kind()? {
            return refuse(
                name,
                format!(
                    "has element type {:?}, but `hidden` has {:?}",
                    tensor.f_kind()?,
                    hidden.f_kind()?
                ),
                "give all the same",
            );
        }
    }
    let &[_, _, features] = &hidden.size()[..] else {
        return refuse(
            "hidden",
            format!("is {:?}", hidden.size()),
            "give [batch, tokens, features]",
        );
    };
    match (&gate.size()[..], &up.size()[..], &down.size()[..]) {
        ([wide, h], up, [_, f]) if up == [*wide, *h] && *h == features && f == wide => Ok(()),
        (gate, up, down) => refuse(
            "gate",
            format!(
                "is {gate:?}, `up` {up:?} and `down` {down:?}, with {features} features in `hidden`"
            ),
            "give [F, h], [F, h] and [o, F]",
        ),
    }
}
