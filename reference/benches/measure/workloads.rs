//! What is measured, by name: `exchange` of a number of bytes for each rank,
//! `attention` over a number of tokens.

use crate::ranks::{time_alone, time_on_ranks};
use std::{hint::black_box, sync::Arc, time::Duration};
use tch::{Device, Kind, Tensor};
use ulysses::{
    Communicator, Exchange, HeadPartition, Mask, Options, Score, Sharding, TokenPartition,
    UlyssesAttention,
};

/// All measurements are of two ranks; memcpy and dense attention beside them
/// are of two threads.
const RANKS: usize = 2;
const HEADS: i64 = 8;
/// Of the exchange alone: with them Q, K and V of a token are 4 KiB together.
const KV_HEADS: i64 = 4;
const HEAD_SIZE: i64 = 64;
const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

/// A workload of some size, done so many times: how long it took.
pub(crate) type Workload = fn(size: i64, iterations: u64) -> Duration;

/// Name and workload, in the order in which criterion runs them.
pub(crate) const EXCHANGES: [(&str, Workload); 4] = [
    ("ulysses", exchange),
    ("all-to-all", all_to_all),
    ("memcpy", memcpy),
    ("copy-to-new", copy_to_new),
];
pub(crate) const ATTENTIONS: [(&str, Workload); 3] = [
    ("ulysses", attention),
    ("dense-2-threads", |tokens, iterations| {
        dense(2, tokens, iterations)
    }),
    ("dense-1-thread", |tokens, iterations| {
        dense(1, tokens, iterations)
    }),
];

/// Q, K and V of together `bytes` for each rank, from [1, s, H, D] to new
/// tensors [1, h, S, D].
fn exchange(bytes: i64, iterations: u64) -> Duration {
    let tokens = tokens_of(bytes);
    time_on_ranks(RANKS, iterations, |communicator| {
        let heads = HeadPartition::new(HEADS as usize, KV_HEADS as usize, RANKS).unwrap();
        let shards = [tokens as usize; RANKS];
        let shards = TokenPartition::new(Sharding::Contiguous, &shards).unwrap();
        let exchange = Exchange::new(communicator, shards, heads).unwrap();
        let [query, key, value] = [HEADS, KV_HEADS, KV_HEADS]
            .map(|heads| Tensor::rand([1, tokens, heads, HEAD_SIZE], FLOAT));
        move || drop(exchange.sequence_to_heads(&query, &key, &value).unwrap())
    })
}

/// The same by the communicator alone, into tensors that are there.
fn all_to_all(bytes: i64, iterations: u64) -> Duration {
    let tokens = tokens_of(bytes);
    time_on_ranks(RANKS, iterations, |communicator| {
        let mut send = [const { Vec::new() }; RANKS];
        let mut receive = [const { Vec::new() }; RANKS];
        for heads in [HEADS, KV_HEADS, KV_HEADS] {
            let own = heads / RANKS as i64;
            let from = Tensor::rand([1, tokens, heads, HEAD_SIZE], FLOAT);
            let to = Tensor::zeros([1, own, RANKS as i64 * tokens, HEAD_SIZE], FLOAT);
            for rank in 0..RANKS {
                send[rank].push(from.narrow(2, rank as i64 * own, own));
                let place = to.narrow(2, rank as i64 * tokens, tokens);
                receive[rank].push(place.transpose(1, 2));
            }
        }
        move || communicator.all_to_all(&send, &receive).unwrap()
    })
}

/// The tokens of a rank, of which Q, K and V have so many bytes.
fn tokens_of(bytes: i64) -> i64 {
    bytes / (4 * HEAD_SIZE * (HEADS + 2 * KV_HEADS))
}

/// Each of two threads copies `bytes` from one place to another.
fn memcpy(bytes: i64, iterations: u64) -> Duration {
    time_on_ranks(RANKS, iterations, |_| {
        let source = vec![1u8; bytes as usize];
        let mut place = vec![0u8; bytes as usize];
        move || black_box(&mut place).copy_from_slice(black_box(&source))
    })
}

/// Each of two threads copies a tensor of `bytes` to a new one.
fn copy_to_new(bytes: i64, iterations: u64) -> Duration {
    time_on_ranks(RANKS, iterations, |_| {
        let source = Tensor::rand([bytes / 4], FLOAT);
        move || drop(source.copy())
    })
}

/// Forward and backward of [`UlyssesAttention`] over `tokens` in all.
fn attention(tokens: i64, iterations: u64) -> Duration {
    time_on_ranks(RANKS, iterations, |communicator: Arc<dyn Communicator>| {
        let options = Options {
            score: Score {
                mask: Mask::Causal,
                ..Score::default()
            },
            ..Options::default()
        };
        let attention = UlyssesAttention::new(communicator, options);
        forward_and_backward(tokens / RANKS as i64, move |[query, key, value]| {
            attention.forward(query, key, value).unwrap()
        })
    })
}

/// Forward and backward of the same attention in one process.
fn dense(threads: i32, tokens: i64, iterations: u64) -> Duration {
    time_alone(threads, iterations, || {
        forward_and_backward(tokens, |inputs| {
            let [query, key, value] = inputs.each_ref().map(|tensor| tensor.transpose(1, 2));
            let (mask, dropout, causal, scale, grouped) = (None::<&Tensor>, 0.0, true, None, false);
            Tensor::scaled_dot_product_attention(
                &query, &key, &value, mask, dropout, causal, scale, grouped,
            )
            .transpose(1, 2)
        })
    })
}

/// Runs `forward` on three leaves [1, tokens, H, D], and backward.
fn forward_and_backward(tokens: i64, forward: impl Fn(&[Tensor; 3]) -> Tensor) -> impl FnMut() {
    let size = [1, tokens, HEADS, HEAD_SIZE];
    let inputs: [Tensor; 3] =
        std::array::from_fn(|_| Tensor::randn(size, FLOAT).set_requires_grad(true));
    let cotangent = Tensor::randn(size, FLOAT);
    move || {
        let scalar = (forward(&inputs) * &cotangent).sum(Kind::Float);
        black_box(Tensor::run_backward(&[scalar], &inputs, false, false));
    }
}
