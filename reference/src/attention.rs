//! Ulysses attention: agree, exchange, attend, exchange back.
//!
//! Source: DeepSpeed Ulysses, arXiv:2309.14509, section 3.1. Per forward and
//! rank that is one gather of a few words and two exchanges of blocks, and two
//! exchanges per backward, whatever the number of ranks. A call that speaks of
//! single tokens (positions, padding) gathers those too.
//!
//! The gather comes first and moves no data. In it every rank describes its
//! call, and all reach the same verdict over all of the descriptions. So a bad
//! call on one rank is the same error everywhere, and no rank waits in an
//! exchange for one that refused to enter.
//!
//! Not here: projections, and what acts on each token alone.

use crate::{
    agreement::{self, Agreed},
    call::Call,
    communicator::{Communicator, threads::ThreadCommunicator},
    error::{Error, Result},
    exchange::Exchange,
    local_attention::attend,
    options::{Options, SequenceLength},
    sequence,
    token_partition::Sharding,
};
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};
use tch::Tensor;

/// Attention over a sequence of which each rank holds a shard.
///
/// It keeps nothing from call to call: heads, lengths and batch may change,
/// and a forward that is run again, in backward for instance, gives the same.
pub struct UlyssesAttention {
    communicator: Arc<dyn Communicator>,
    options: Options,
    training: AtomicBool,
}

impl UlyssesAttention {
    /// Attention among the ranks of `communicator`, in training.
    pub fn new(communicator: Arc<dyn Communicator>, options: Options) -> Self {
        Self {
            communicator,
            options,
            training: AtomicBool::new(true),
        }
    }

    /// Goes into training or out of it, on all ranks alike. Outside, with
    /// [`Options::disable_in_eval`], a call takes the whole sequence on each
    /// rank and communicates nothing; without it nothing changes.
    pub fn set_training(&self, training: bool) {
        self.training.store(training, Ordering::Relaxed);
    }

    /// Attention of this rank's tokens to the whole sequence.
    ///
    /// `query` is [B, s, Hq, D], `key` [B, s, Hkv, D] and `value`
    /// [B, s, Hkv, Dv] for the `s` tokens of this rank, with any strides; the
    /// result is [B, s, Hq, Dv]. `s` may be another on each rank, and 0. The
    /// dtype is float64, float32, bfloat16 or float16. All ranks call this
    /// together, and all call backward or none.
    ///
    /// With [`Kernel::Sdpa`](crate::Kernel::Sdpa) on a CPU and a full or causal mask the output and
    /// the cotangent of `query` have the bits of the same attention in one
    /// process, and so have those of `key` and `value` where all query heads of
    /// a KV head are on one rank.
    ///
    /// # Errors
    /// A refusal is the same on every rank. When a rank fails later, by lack
    /// of memory for instance, that rank returns the error of libtorch and the
    /// others a [`CommunicatorError`](crate::CommunicatorError). Errors in
    /// backward come out of `backward()` as text; a rank whose core attention
    /// fails there should drop its communicator, or its peers meet their time
    /// limit.
    pub fn forward(&self, query: &Tensor, key: &Tensor, value: &Tensor) -> Result<Tensor> {
        self.forward_with(query, key, value, &Call::default())
    }

    /// [`forward`](Self::forward), of which more is said in `call`.
    ///
    /// # Errors
    /// As for [`forward`](Self::forward).
    pub fn forward_with(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        call: &Call<'_>,
    ) -> Result<Tensor> {
        if self.training.load(Ordering::Relaxed) || !self.options.disable_in_eval {
            return self.forward_among(
                &self.communicator,
                &self.options,
                [query, key, value],
                call,
            );
        }
        // The same way for a rank that has everything and is alone.
        let alone = ThreadCommunicator::world(1).pop();
        let alone =
            alone.ok_or_else(|| Error::Libtorch("a world of one has no rank".to_owned()))?;
        let options = Options {
            sharding: Sharding::Contiguous,
            sequence_length: SequenceLength::Variable,
            ..self.options
        };
        let alone: Arc<dyn Communicator> = Arc::new(alone);
        self.forward_among(&alone, &options, [query, key, value], call)
    }

    fn forward_among(
        &self,
        communicator: &Arc<dyn Communicator>,
        options: &Options,
        tensors: [&Tensor; 3],
        call: &Call<'_>,
    ) -> Result<Tensor> {
        let Agreed {
            batch,
            tokens,
            heads,
        } = agreement::reach(&**communicator, tensors, call, options)?;
        let sequence = sequence::gather(&**communicator, &tokens, batch, call, options)?;
        let exchange = Exchange::new(Arc::clone(communicator), tokens, heads)?;

        let [query, key, value] = tensors;
        let (query, key, value) = exchange.sequence_to_heads(query, key, value)?;
        let skipped = options
            .skip_all_but_last
            .is_some_and(|layers| call.layer + 1 < layers);
        let output = if skipped {
            Ok(query)
        } else {
            let rank = communicator.rank();
            attend([query, key, value], &heads, rank, &sequence, call, options)
        };
        // Nobody else can know that this rank got no further.
        let output = output.inspect_err(|error| communicator.abandon(&error.to_string()))?;
        exchange.heads_to_sequence(&output)
    }
}
