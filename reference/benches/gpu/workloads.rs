//! What is measured, of bfloat16, batch 1, 32 heads of 128, and causal.

use crate::{Measurement, ranks::seconds_of_threads};
use std::{hint::black_box, sync::Arc};
use tch::{Device, Kind, Tensor};
use ulysses::{
    Communicator, Exchange, HeadPartition, Kernel, Mask, Options, Score, Sharding, Structure,
    TokenPartition, UlyssesAttention, core_attention,
};

const HEADS: i64 = 32;
const HEAD_SIZE: i64 = 128;
const KIND: Kind = Kind::BFloat16;
/// Q, K and V.
const TENSORS: i64 = 3;
const BYTES_OF_NUMBER: i64 = 2;

const SCORE: Score = Score {
    mask: Mask::Causal,
    scale: None,
    window: None,
    softcap: None,
};

/// Of Q, K and V of so many tokens together.
pub(crate) fn bytes_of(tokens: i64) -> i64 {
    TENSORS * tokens * HEADS * HEAD_SIZE * BYTES_OF_NUMBER
}

/// The exchange of 2 and 4 ranks, and a copy of as many bytes within the GPU.
pub(crate) fn exchanges(device: Device, tokens: i64, repetitions: usize) {
    let measurement = |by: &str, ranks, seconds| Measurement {
        what: "exchange",
        by: by.to_owned(),
        ranks,
        tokens,
        bytes: bytes_of(tokens),
        seconds,
    };
    let copied = seconds_of_threads(1, device, repetitions, |_| {
        let from = Tensor::rand([bytes_of(tokens) / BYTES_OF_NUMBER], (KIND, device));
        let mut to = from.copy();
        move || to.copy_(&from)
    });
    measurement("copy", 1, copied).print();
    for ranks in [2, 4] {
        let exchanged = seconds_of_threads(ranks, device, repetitions, |communicator| {
            exchange(communicator, device, tokens)
        });
        measurement("threads", ranks, exchanged).print();
    }
}

/// One rank's part of the exchange of Q, K and V [1, s, H, D] to new tensors
/// [1, h, S, D].
pub(crate) fn exchange(
    communicator: Arc<dyn Communicator>,
    device: Device,
    tokens: i64,
) -> impl FnMut() {
    let ranks = communicator.size();
    let heads = HeadPartition::new(HEADS as usize, HEADS as usize, ranks).unwrap();
    let own = tokens / ranks as i64;
    let shards = TokenPartition::new(Sharding::Contiguous, &vec![own as usize; ranks]).unwrap();
    let exchange = Exchange::new(communicator, shards, heads).unwrap();
    let [query, key, value] =
        [(); 3].map(|()| Tensor::rand([1, own, HEADS, HEAD_SIZE], (KIND, device)));
    move || drop(exchange.sequence_to_heads(&query, &key, &value).unwrap())
}

/// Attention of 1, 2 and 4 ranks, and dense attention of as many tokens by the
/// same kernel: the same products in all.
pub(crate) fn attentions(device: Device, kernel: Kernel, tokens: i64, repetitions: usize) {
    let measurement = |by: &str, ranks, seconds| Measurement {
        what: "attention",
        by: by.to_owned(),
        ranks,
        tokens,
        bytes: bytes_of(tokens),
        seconds,
    };
    let alone = seconds_of_threads(1, device, repetitions, |_| dense(device, kernel, tokens));
    measurement(&format!("dense, {}", kernel.name()), 1, alone).print();
    for ranks in [1, 2, 4] {
        let seconds = seconds_of_threads(ranks, device, repetitions, |communicator| {
            let options = Options {
                kernel,
                score: SCORE,
                ..Options::default()
            };
            let attention = UlyssesAttention::new(communicator, options);
            let size = [1, tokens / ranks as i64, HEADS, HEAD_SIZE];
            forward_and_backward(device, size, move |[query, key, value]| {
                attention.forward(query, key, value).unwrap()
            })
        });
        measurement("threads", ranks, seconds).print();
    }
}

fn dense(device: Device, kernel: Kernel, tokens: i64) -> impl FnMut() {
    let heads = HeadPartition::new(HEADS as usize, HEADS as usize, 1).unwrap();
    let heads = heads.head_map(0);
    let size = [1, tokens, HEADS, HEAD_SIZE];
    forward_and_backward(device, size, move |inputs| {
        let [query, key, value] = inputs.each_ref().map(|tensor| tensor.transpose(1, 2));
        let structure = Structure::default();
        core_attention(&query, &key, &value, &heads, kernel, &SCORE, &structure)
            .unwrap()
            .transpose(1, 2)
    })
}

/// Runs `forward` on three leaves of this size, and backward.
fn forward_and_backward(
    device: Device,
    size: [i64; 4],
    forward: impl Fn(&[Tensor; 3]) -> Tensor,
) -> impl FnMut() {
    let inputs: [Tensor; 3] =
        std::array::from_fn(|_| Tensor::randn(size, (KIND, device)).set_requires_grad(true));
    let cotangent = Tensor::randn(size, (KIND, device));
    move || {
        let scalar = (forward(&inputs) * &cotangent).sum(Kind::Float);
        black_box(Tensor::run_backward(&[scalar], &inputs, false, false));
    }
}
