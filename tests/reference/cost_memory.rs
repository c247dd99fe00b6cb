//! The bytes that tensors are said to have are what the process holds of them.
//! A program of its own, because what a process holds is that of all its tests.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod world;

use approx::assert_relative_eq;
use std::fs;
use tch::{Device, Kind, Tensor};
use ulysses::cost::{
    Model, Shares,
    activations::{self, Activations, Tiles},
};
use ulysses::{Exchange, Sharding, TokenPartition, checkpoint};

const RANKS: u64 = 2;
/// Tensors of 64 MiB, which the allocator gives back as soon as they are free.
const TOKENS: u64 = 32768;
const MODEL: Model = Model {
    layers: 2,
    hidden: 1024,
    query_heads: 16,
    kv_heads: 8,
    head_size: 64,
    ffn: 2048,
    mlp_matrices: 3,
    vocabulary: 4096,
    is_tied: true,
    small_parameters: 2048,
};
const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

/// What this process holds now, in bytes.
fn held() -> f64 {
    let status = fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = status.lines().find(|line| line.starts_with("Rss:"));
    let kibibytes = line.unwrap().split_whitespace().nth(1).unwrap();
    kibibytes.parse::<f64>().unwrap() * 1024.0
}

/// What is held more while the result of `make` is.
fn grown<T>(make: impl FnOnce() -> T) -> f64 {
    let before = held();
    let made = make();
    let grown = held() - before;
    drop(made);
    grown
}

fn due() -> Activations {
    let shares = Shares::even(1, TOKENS, (16, 8), RANKS).unwrap();
    activations::of(&MODEL, &shares, 0, 4, Tiles { mlp: 2, loss: 4 }).unwrap()
}

/// The stream through all layers, with its graph.
fn stream(is_checkpointed: bool) -> Tensor {
    let size = [1, (TOKENS / RANKS) as i64, MODEL.hidden as i64];
    let mut stream = Tensor::ones(size, F32).set_requires_grad(true);
    for _ in 0..MODEL.layers {
        let layer = |inputs: &[Tensor]| Ok(vec![inputs[0].sin().cos()]);
        stream = match is_checkpointed {
            true => checkpoint(layer, &[&stream]).unwrap().remove(0),
            false => layer(&[stream]).unwrap().remove(0),
        };
    }
    stream
}

/// Query, key and value of each rank after an exchange.
fn exchanged() -> Vec<(Tensor, Tensor, Tensor)> {
    let shares = Shares::even(1, TOKENS, (16, 8), RANKS).unwrap();
    let own = (TOKENS / RANKS) as i64;
    world::on_ranks(RANKS as usize, |communicator| {
        let tokens = [own as usize; RANKS as usize];
        let tokens = TokenPartition::new(Sharding::Contiguous, &tokens).unwrap();
        let exchange = Exchange::new(communicator, tokens, *shares.heads()).unwrap();
        let of = |heads| Tensor::ones([1, own, heads, 64], F32);
        exchange.sequence_to_heads(&of(16), &of(8), &of(8)).unwrap()
    })
}

#[test]
fn what_is_held_is_what_is_counted() {
    // What libtorch takes for itself.
    drop((stream(false), stream(true), exchanged()));
    let due = due();
    let of = |bytes: u128| bytes as f64;

    // Beside the inputs of all layers, the last one's output is there.
    let output = of(due.checkpoints) / MODEL.layers as f64;
    let checkpointed = grown(|| stream(true));
    assert_relative_eq!(
        checkpointed,
        of(due.checkpoints) + output,
        max_relative = 0.01
    );
    // Without checkpoints, what lies between is too.
    let plain = grown(|| stream(false));
    assert_relative_eq!(
        plain,
        2.0 * of(due.checkpoints) + output,
        max_relative = 0.01
    );

    let on_all = RANKS as f64 * of(due.query_in_heads + 2 * due.kv_in_heads);
    assert_relative_eq!(grown(exchanged), on_all, max_relative = 0.01);

    // Of the first tile of the loss, and of the MLP.
    for (tiles, width, bytes) in [
        (4, MODEL.vocabulary, due.logits_tile),
        (2, MODEL.ffn, due.mlp_tile),
    ] {
        let tile = Tensor::ones([(TOKENS / RANKS / tiles) as i64, 1024], F32);
        let weights = Tensor::ones([1024, width as i64], F32);
        drop(tile.matmul(&weights));
        let product = grown(|| tile.matmul(&weights));
        assert_relative_eq!(product, of(bytes), max_relative = 0.01);
    }
}
