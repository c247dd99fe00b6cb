//! Ulysses around any core attention, in any layout.
//!
//! Source: DeepSpeed's `DistributedAttention`, which wraps a model's own
//! attention and is told by two indices which dimension holds the heads and
//! which the sequence. Here the exchange reads and writes through strides, so
//! that a layout costs nothing.

use crate::{
    agreement::{self, Agreed},
    call::Call,
    communicator::Communicator,
    error::{Error, Refusal, Result, refuse},
    exchange::Exchange,
    head_partition::HeadMap,
    options::Options,
};
use std::sync::Arc;
use tch::Tensor;

/// Gives any attention on one device the whole sequence of some heads.
///
/// `core` is given query, key and value of this rank's heads and all tokens,
/// in the layout of the caller, and which KV head each query head attends to;
/// it returns the output in the same layout, its head size that of the value.
pub struct DistributedAttention<F> {
    communicator: Arc<dyn Communicator>,
    core: F,
    layout: Layout,
    options: Options,
}

/// Where the dimensions stand.
#[derive(Debug, Clone, Copy)]
struct Layout {
    batch: usize,
    sequence: usize,
    heads: usize,
    head_size: usize,
}

impl<F> DistributedAttention<F>
where
    F: Fn(&Tensor, &Tensor, &Tensor, &HeadMap) -> Result<Tensor>,
{
    /// Wraps `core`. Dimension `scatter` holds the heads, which are scattered
    /// over the ranks, and dimension `gather` the sequence, which is gathered:
    /// 2 and 0 for [s, B, H, D], 2 and 1 for [B, s, H, D]. Of the other two
    /// the first is the batch and the second the head size.
    ///
    /// # Errors
    /// Refused when the indices are not two different ones of 0 to 3.
    pub fn new(
        communicator: Arc<dyn Communicator>,
        core: F,
        scatter: usize,
        gather: usize,
    ) -> Result<Self> {
        let mut others = (0..4).filter(|&dimension| dimension != scatter && dimension != gather);
        let (batch, head_size) = (others.next(), others.next());
        let (Some(batch), Some(head_size), None) = (batch, head_size, others.next()) else {
            return refuse(
                "scatter",
                format!("is {scatter} and `gather` is {gather}"),
                "give two different dimensions of 0, 1, 2 and 3",
            );
        };
        Ok(Self {
            communicator,
            core,
            layout: Layout {
                batch,
                sequence: gather,
                heads: scatter,
                head_size,
            },
            // Any head counts: whether that is fast is for the caller to say.
            options: Options {
                uneven_heads: true,
                ..Options::default()
            },
        })
    }

    /// The output for this rank's tokens, in the layout of `query`.
    ///
    /// # Errors
    /// As for [`UlyssesAttention::forward`](crate::UlyssesAttention::forward);
    /// an error of `core` on one rank is a
    /// [`CommunicatorError`](crate::CommunicatorError) on the others.
    pub fn forward(&self, query: &Tensor, key: &Tensor, value: &Tensor) -> Result<Tensor> {
        let [query, key, value] = [query, key, value].map(|tensor| self.layout.by_tokens(tensor));
        let tensors = [&query?, &key?, &value?];
        let call = Call::default();
        let Agreed { tokens, heads, .. } =
            agreement::reach(&*self.communicator, tensors, &call, &self.options)?;
        let exchange = Exchange::new(Arc::clone(&self.communicator), tokens, heads)?;
        let (query, key, value) = exchange.sequence_to_heads(tensors[0], tensors[1], tensors[2])?;
        let output = self
            .attend(
                &query,
                &key,
                &value,
                &heads.head_map(self.communicator.rank()),
            )
            .inspect_err(|error| self.communicator.abandon(&error.to_string()))?;
        self.layout.of_caller(&exchange.heads_to_sequence(&output)?)
    }

    /// From and to [B, h, S, D] by way of the caller's layout.
    fn attend(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        heads: &HeadMap,
    ) -> Result<Tensor> {
        let theirs = |tensor: &Tensor| self.layout.of_caller(&tensor.f_transpose(1, 2)?);
        let output = (self.core)(&theirs(query)?, &theirs(key)?, &theirs(value)?, heads)?;
        let output = self.layout.by_tokens(&output)?.f_transpose(1, 2)?;
        let (given, due) = (
            output.size(),
            [&query.size()[..3], &value.size()[3..]].concat(),
        );
        if given == due {
            return Ok(output);
        }
        Err(Error::from(Refusal {
            rank: Some(self.communicator.rank()),
            argument: "core",
            problem: format!("returned [batch, heads, tokens, head size] {given:?}"),
            remedy: format!("return {due:?}, in the layout of its arguments"),
        }))
    }
}

impl Layout {
    /// A view [B, s, H, D]. Anything but four dimensions is passed on, to be
    /// refused with the rest of the call.
    fn by_tokens(self, tensor: &Tensor) -> Result<Tensor> {
        if !tensor.defined() || tensor.dim() != 4 {
            return Ok(tensor.shallow_clone());
        }
        let order = [self.batch, self.sequence, self.heads, self.head_size];
        Ok(tensor.f_permute(order.map(|dimension| dimension as i64))?)
    }

    /// The way back.
    fn of_caller(self, tensor: &Tensor) -> Result<Tensor> {
        let mut order = [0; 4];
        let dimensions = [self.batch, self.sequence, self.heads, self.head_size];
        for (place, dimension) in dimensions.into_iter().enumerate() {
            order[dimension] = place as i64;
        }
        Ok(tensor.f_permute(order)?)
    }
}
