//! The bytes of single tensors.

use super::model;
use crate::{
    cost::{
        Shares,
        activations::{self, Activations, Tiles, deepspeed_mlp_tiles},
        product,
    },
    error::Result,
};

/// A published size of one thing.
#[derive(Debug, Clone, Copy)]
pub struct SizeRow {
    /// What has it.
    pub what: &'static str,
    /// In this unit.
    pub unit: &'static str,
    /// By this module.
    pub predicted: f64,
    /// As printed.
    pub published: f64,
}

const GIB: f64 = (1u64 << 30) as f64;

/// All sizes.
///
/// Left out: 7.64 GB for logits of 18,750 tokens in the release's notes (which
/// are 8.96 GB; 7.64 belongs to 16,000), and position ids of 2 bytes in the
/// paper (they are of 8).
///
/// # Errors
/// None.
pub fn sizes() -> Result<Vec<SizeRow>> {
    let row = |what, unit, predicted, published| SizeRow {
        what,
        unit,
        predicted,
        published,
    };
    let gib = |bytes: u128| bytes as f64 / GIB;
    let (llama, llama_70b, qwen) = (
        model("Llama-3.1-8B")?,
        model("Llama-3.1-70B")?,
        model("Qwen3-32B")?,
    );
    let of = |model, tokens| -> Result<Activations> {
        let shares = Shares::even(1, tokens, (1, 1), 1)?;
        activations::of(model, &shares, 0, 2, Tiles { mlp: 1, loss: 1 })
    };
    let checkpoints = |model, tokens| Ok::<_, crate::Error>(gib(of(model, tokens)?.checkpoints));
    // Of a mask [S, S] in bfloat16.
    let mask = |tokens| Ok::<_, crate::Error>(gib(product([2, tokens, tokens])?));
    // Per parameter: weights 2, moments 8, master weights 4, gradients 4. The
    // paper's unit is GiB, its figure that of GB.
    let states = 18.0 * llama.parameters()? as f64;
    let tiles = deepspeed_mlp_tiles(256_000, llama.hidden) as f64;
    Ok(vec![
        row(
            "Llama-8B logits, float32, 16K",
            "GiB",
            gib(of(&llama, 16_000)?.logits_tile),
            7.65,
        ),
        row(
            "Llama-8B checkpoints, 125K",
            "GiB",
            checkpoints(&llama, 125_000)?,
            30.5,
        ),
        // On 32 GPUs in 4 nodes, of which each has an equal part.
        row(
            "Llama-70B checkpoints, 3M, per node of 4",
            "GiB",
            checkpoints(&llama_70b, 3_000_000)? / 4.0,
            915.0,
        ),
        row(
            "Llama-70B checkpoints, 1M, per node of 4",
            "GiB",
            checkpoints(&llama_70b, 1_000_000)? / 4.0,
            305.0,
        ),
        row(
            "Llama-70B checkpoints, 1M, per node of 8",
            "GiB",
            checkpoints(&llama_70b, 1_000_000)? / 8.0,
            152.0,
        ),
        row(
            "Qwen3-32B checkpoints, 1M, per node of 4",
            "GiB",
            checkpoints(&qwen, 1_000_000)? / 4.0,
            152.0,
        ),
        row(
            "Qwen3-32B checkpoints, 1M, per node of 8",
            "GiB",
            checkpoints(&qwen, 1_000_000)? / 8.0,
            76.0,
        ),
        row("mask [S, S], 125K", "GiB", mask(125_000)?, 29.0),
        row("mask [S, S], 250K", "GiB", mask(250_000)?, 116.0),
        row("Llama-8B states, 18 bytes each", "GB", states / 1e9, 144.0),
        row("TiledMLP tiles, 256K, h = 4096", "tiles", tiles, 63.0),
    ])
}
