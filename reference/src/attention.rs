//! Ulysses attention: agree, exchange, attend, exchange back.
//!
//! Source: DeepSpeed Ulysses, arXiv:2309.14509, section 3.1. Per forward and
//! rank that is one gather of a few words and two exchanges of blocks, and two
//! exchanges per backward, whatever the number of ranks.
//!
//! The gather comes first and moves no data. In it every rank describes its
//! call, and all reach the same verdict over all of the descriptions. So a bad
//! call on one rank is the same error everywhere, and no rank waits in an
//! exchange for one that refused to enter.
//!
//! Not here: projections, positions, dropout. Those act on each token alone
//! and need no other rank.

use crate::{
    agreement::{self, Agreed},
    communicator::Communicator,
    core_attention::core_attention,
    error::Result,
    exchange::Exchange,
    options::Options,
};
use std::sync::Arc;
use tch::Tensor;

/// Attention over a sequence of which each rank holds a contiguous shard.
pub struct UlyssesAttention {
    communicator: Arc<dyn Communicator>,
    options: Options,
}

impl UlyssesAttention {
    /// Attention among the ranks of `communicator`.
    pub fn new(communicator: Arc<dyn Communicator>, options: Options) -> Self {
        Self {
            communicator,
            options,
        }
    }

    /// Attention of this rank's tokens to the whole sequence.
    ///
    /// `query` is [B, s, Hq, D], `key` and `value` are [B, s, Hkv, D] for the
    /// `s` tokens of this rank, with any strides; the result is
    /// [B, s, Hq, D]. The sequence is the shards in rank order, and `s` may
    /// differ between ranks. The dtype is float64, float32, bfloat16 or
    /// float16. All ranks call this together, and all call backward or none.
    ///
    /// With [`Kernel::Sdpa`](crate::Kernel::Sdpa) on a CPU the output and the cotangent of `query`
    /// have the bits of the same attention in one process, and so have those
    /// of `key` and `value` where all query heads of a KV head are on one rank.
    ///
    /// # Errors
    /// A refusal is the same on every rank. When a rank fails later, by lack
    /// of memory for instance, that rank returns the error of libtorch and the
    /// others a [`CommunicatorError`](crate::CommunicatorError). Errors in
    /// backward come out of `backward()` as text; a rank whose core attention
    /// fails there should drop its communicator, or its peers meet their time
    /// limit.
    pub fn forward(&self, query: &Tensor, key: &Tensor, value: &Tensor) -> Result<Tensor> {
        let Agreed { tokens, heads } =
            agreement::reach(&*self.communicator, query, key, value, &self.options)?;
        let exchange = Exchange::new(Arc::clone(&self.communicator), tokens, heads)?;

        let (query, key, value) = exchange.sequence_to_heads(query, key, value)?;
        let output = core_attention(
            &query,
            &key,
            &value,
            &heads.head_map(self.communicator.rank()),
            self.options.kernel,
            self.options.mask,
            self.options.scale,
        );
        // Nobody else can know that this rank got no further.
        let output = output.inspect_err(|error| self.communicator.abandon(&error.to_string()))?;
        exchange.heads_to_sequence(&output)
    }
}
