//! What the tests of the reference share: a world of ranks as threads, tensors
//! made from a seed, and dense attention to compare with.
//!
//! Every rank makes the global tensors for itself: tensors are not shared
//! between threads, and nothing depends on a global generator.
// Each test program uses its own part of this.
#![allow(dead_code)]

use std::{sync::Arc, thread, time::Duration};
use tch::{Kind, Tensor};
use ulysses::{Communicator, Mask, ThreadCommunicator};

/// Far longer than any test needs, and short enough to see a hang.
pub(crate) const TIME_LIMIT: Duration = Duration::from_secs(20);

/// Runs `body` on each of `size` ranks; gives what each returned.
pub(crate) fn on_ranks<T: Send>(
    size: usize,
    body: impl Fn(Arc<dyn Communicator>) -> T + Sync,
) -> Vec<T> {
    tch::set_num_threads(1);
    let body = &body;
    thread::scope(|scope| {
        let ranks: Vec<_> = ThreadCommunicator::world(size)
            .into_iter()
            .map(|end| scope.spawn(move || body(Arc::new(end.with_time_limit(TIME_LIMIT)))))
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// `ranks` shards of `tokens` tokens in all, no two neighbours equally long
/// where that is possible.
pub(crate) fn uneven_shards(tokens: usize, ranks: usize) -> Vec<usize> {
    let mut shards = vec![tokens / ranks; ranks];
    shards[ranks - 1] += tokens % ranks;
    for pair in shards.chunks_exact_mut(2) {
        if pair[0] > 1 {
            pair[0] -= 1;
            pair[1] += 1;
        }
    }
    shards
}

/// The shard of `rank` of a tensor [B, S, H, D].
pub(crate) fn shard(tensor: &Tensor, shards: &[usize], rank: usize) -> Tensor {
    let start: usize = shards[..rank].iter().sum();
    tensor.narrow(1, start as i64, shards[rank] as i64)
}

/// The tokens at `places` of a tensor [B, S, H, D].
pub(crate) fn pick(tensor: &Tensor, places: &[i64]) -> Tensor {
    tensor.index_select(1, &Tensor::from_slice(places))
}

/// Numbers in (-1, 1) that depend on `seed` and the position alone.
pub(crate) fn noise(seed: u64, size: [i64; 4], kind: Kind) -> Tensor {
    let count = size.iter().product::<i64>() as u64;
    let values: Vec<f64> = (0..count).map(|i| unit(seed, i)).collect();
    Tensor::from_slice(&values).view(size).to_kind(kind)
}

/// Whole numbers from -8 to 8: sums of their products are exact in float64.
pub(crate) fn integers(seed: u64, size: [i64; 4]) -> Tensor {
    (noise(seed, size, Kind::Double) * 8.0).round()
}

/// splitmix64, scaled.
fn unit(seed: u64, i: u64) -> f64 {
    let mut z = (seed << 32)
        .wrapping_add(i + 1)
        .wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
}

/// The global query, key, value and cotangent of the output.
pub(crate) struct Inputs {
    pub(crate) query: Tensor,
    pub(crate) key: Tensor,
    pub(crate) value: Tensor,
    pub(crate) cotangent: Tensor,
}

impl Inputs {
    pub(crate) fn new(
        batch: i64,
        tokens: i64,
        heads: (i64, i64),
        head_size: i64,
        kind: Kind,
    ) -> Self {
        let (query, kv) = (
            [batch, tokens, heads.0, head_size],
            [batch, tokens, heads.1, head_size],
        );
        Self {
            query: noise(1, query, kind),
            key: noise(2, kv, kind),
            value: noise(3, kv, kind),
            cotangent: noise(4, query, kind),
        }
    }

    /// Output, and cotangents of query, key and value, of dense attention.
    pub(crate) fn dense(&self, mask: Mask) -> [Tensor; 4] {
        let [query, key, value] = [&self.query, &self.key, &self.value].map(leaf);
        let [q, k, v] = [&query, &key, &value].map(|tensor| tensor.transpose(1, 2));
        let output = Tensor::scaled_dot_product_attention(
            &q,
            &k,
            &v,
            None::<&Tensor>,
            0.0,
            mask == Mask::Causal,
            None,
            query.size()[2] != key.size()[2],
        )
        .transpose(1, 2);
        gradients(&output, &self.cotangent, [query, key, value])
    }
}

/// The output, detached, and the cotangents of the inputs.
pub(crate) fn gradients(output: &Tensor, cotangent: &Tensor, inputs: [Tensor; 3]) -> [Tensor; 4] {
    let scalar = (output * cotangent).sum(Kind::Double);
    let found = Tensor::run_backward(&[scalar], &inputs, false, false);
    let [query, key, value] = <[Tensor; 3]>::try_from(found).unwrap();
    [output.detach(), query, key, value]
}

/// A leaf of its own with the values of `tensor`.
pub(crate) fn leaf(tensor: &Tensor) -> Tensor {
    tensor.copy().set_requires_grad(true)
}
