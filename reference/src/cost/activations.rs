//! The bytes of single tensors that a step keeps or makes, exactly as they
//! are allocated; nothing about how many of them are alive at once, which
//! [`memory`](super::memory) estimates.

use super::{Model, Shares, product};
use crate::error::{Result, refuse};

/// The bytes of tensors on one rank. B batch, s tokens of the rank, S of all,
/// h heads of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Activations {
    /// The inputs [B, s, hidden] of all layers, which checkpointing keeps.
    pub checkpoints: u128,
    /// The queries or the output before the exchange, [B, s, Hq, D].
    pub query_in_sequence: u128,
    /// The same after it, [B, h, S, D].
    pub query_in_heads: u128,
    /// The keys or the values after the exchange, with the rank's copies.
    pub kv_in_heads: u128,
    /// One [B, s, F] inside the MLP, of the largest tile.
    pub mlp_tile: u128,
    /// One float32 copy of the logits [B, s, V], of the largest tile.
    pub logits_tile: u128,
    /// The position ids [B, S], 64-bit, that a forward gathers.
    pub positions: u128,
}

/// Of how many tiles something is made; 1 is untiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tiles {
    /// The MLP.
    pub mlp: u64,
    /// Head and loss.
    pub loss: u64,
}

/// The tensors of `rank`, with elements of `element_bytes`.
///
/// # Errors
/// Refused when there is no such rank, when there are no tiles, or bytes
/// beyond all reason.
pub fn of(
    model: &Model,
    shares: &Shares,
    rank: usize,
    element_bytes: u64,
    tiles: Tiles,
) -> Result<Activations> {
    model.check()?;
    let (share, batch) = (shares.of(rank)?, shares.batch());
    let (all, own) = (shares.sequence(), share.tokens);
    let elements = |factors: [u64; 3]| product([element_bytes, batch].into_iter().chain(factors));
    let largest = |tiles: u64| match tiles {
        0 => refuse("tiles", "are 0", "give 1 for no tiling"),
        tiles => Ok(own.div_ceil(tiles)),
    };
    Ok(Activations {
        checkpoints: elements([model.layers, own, model.hidden])?,
        query_in_sequence: elements([own, model.query_heads, model.head_size])?,
        query_in_heads: elements([all, share.query_heads, model.head_size])?,
        kv_in_heads: elements([all, share.kv_heads, model.head_size])?,
        mlp_tile: elements([1, largest(tiles.mlp)?, model.ffn])?,
        logits_tile: product([
            size_of::<f32>() as u64,
            batch,
            largest(tiles.loss)?,
            model.vocabulary,
        ])?,
        positions: product([size_of::<i64>() as u64, batch, all])?,
    })
}

/// Into how many tiles DeepSpeed's TiledMLP cuts `tokens` tokens of a rank:
/// about as many tokens in each as the stream is wide. The largest count of all
/// ranks is used on each.
pub fn deepspeed_mlp_tiles(tokens: u64, hidden: u64) -> u64 {
    tokens.div_ceil(hidden.max(1)).max(1)
}
