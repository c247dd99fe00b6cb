//! The two differentiable exchanges of Ulysses.
//!
//! [`Exchange::sequence_to_heads`] turns Q, K and V of a few tokens and all
//! heads into all tokens of a few heads; [`Exchange::heads_to_sequence`] takes
//! the output back. Each moves its data in one all-to-all, and so does its
//! backward, which is the opposite exchange: moving elements about is a
//! permutation, and the adjoint of a permutation is its inverse.
//!
//! Replicated KV heads are the exception that makes this a module of its own.
//! Sending a head to several ranks copies it, and the adjoint of a copy is a
//! sum: the cotangents of the copies are added on the rank that owns the
//! tokens, in rank order, so that the result does not depend on who was first.
//!
//! Not here: who holds which head ([`head_partition`](crate::head_partition)),
//! and whether the arguments of all ranks fit together, which
//! [`UlyssesAttention`](crate::UlyssesAttention) finds out before.
//!
//! Source: DeepSpeed Ulysses, arXiv:2309.14509, section 3.1.

mod passes;
mod shapes;

use crate::{
    autograd::apply,
    communicator::Communicator,
    error::{Error, Result, refuse},
    head_partition::HeadPartition,
    token_partition::TokenPartition,
};
use passes::{HeadsToSequence, SequenceToHeads};
use shapes::Counts;
use std::{ops::Range, sync::Arc};
use tch::Tensor;

/// Which tokens and heads each rank holds, and the means to exchange them.
///
/// Shapes below: B batch, `s` the tokens of this rank, S those of all ranks,
/// Hq and Hkv all query and KV heads, hq and hkv those of this rank, D the
/// head size.
#[derive(Clone)]
pub struct Exchange {
    communicator: Arc<dyn Communicator>,
    tokens: TokenPartition,
    heads: HeadPartition,
}

impl Exchange {
    /// An exchange in which each rank owns the tokens that `tokens` gives it,
    /// and the heads that `heads` gives it.
    ///
    /// # Errors
    /// Refused when `tokens`, `heads` and `communicator` differ in the number
    /// of ranks.
    pub fn new(
        communicator: Arc<dyn Communicator>,
        tokens: TokenPartition,
        heads: HeadPartition,
    ) -> Result<Self> {
        let size = communicator.size();
        for (argument, ranks) in [("tokens", tokens.ranks()), ("heads", heads.ranks())] {
            if ranks != size {
                let problem = format!("is for {ranks} ranks, but the communicator has {size}");
                return refuse(argument, problem, "describe every rank once");
            }
        }
        Ok(Self {
            communicator,
            tokens,
            heads,
        })
    }

    /// From [B, s, Hq, D], [B, s, Hkv, D] twice, to [B, hq, S, D],
    /// [B, hkv, S, D] twice.
    ///
    /// The inputs may have any strides. With one rank nothing is sent and the
    /// results are views of the inputs; otherwise they are new and contiguous.
    ///
    /// # Errors
    /// When the shapes are not these, or when the ranks cannot exchange.
    pub fn sequence_to_heads(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let all = [query, key, value];
        if self.tokens.ranks() == 1 {
            let [query, key, value] = all.map(|tensor| tensor.f_transpose(1, 2));
            return Ok((query?, key?, value?));
        }
        let mut outputs = apply(SequenceToHeads::new(self), &all)?.into_iter();
        match (outputs.next(), outputs.next(), outputs.next()) {
            (Some(query), Some(key), Some(value)) => Ok((query, key, value)),
            _ => Err(Error::Libtorch(
                "an exchange of three tensors gave fewer".to_owned(),
            )),
        }
    }

    /// From [B, hq, S, D] to [B, s, Hq, D].
    ///
    /// The input may have any strides. With one rank nothing is sent and the
    /// result is a view of the input; otherwise it is new and contiguous.
    ///
    /// # Errors
    /// As for [`Exchange::sequence_to_heads`].
    pub fn heads_to_sequence(&self, output: &Tensor) -> Result<Tensor> {
        if self.tokens.ranks() == 1 {
            return Ok(output.f_transpose(1, 2)?);
        }
        let outputs = apply(HeadsToSequence::new(self), &[output])?;
        outputs
            .into_iter()
            .next()
            .ok_or_else(|| Error::Libtorch("an exchange of one tensor gave none".to_owned()))
    }

    fn rank(&self) -> usize {
        self.communicator.rank()
    }

    /// How many tokens and how many heads of its kind a tensor has on this
    /// rank, before the exchange and after it.
    fn query_counts(&self) -> Counts {
        let heads = self.heads.query_range(self.rank()).len();
        self.counts(self.heads.query_heads(), heads)
    }

    fn kv_counts(&self) -> Counts {
        let heads = self.heads.kv_range(self.rank()).len();
        self.counts(self.heads.kv_heads(), heads)
    }

    fn counts(&self, all_heads: usize, own_heads: usize) -> Counts {
        Counts {
            own_tokens: self.tokens.tokens(self.rank()) as i64,
            all_tokens: self.tokens.total() as i64,
            own_heads: own_heads as i64,
            all_heads: all_heads as i64,
        }
    }

    /// For each rank, its query heads in a tensor [B, s, Hq, D]: views
    /// [B, t, h, D], one for each run of this rank's tokens.
    fn by_query_heads(&self, tensor: &Tensor) -> Result<Vec<Vec<Tensor>>> {
        self.by_heads(tensor, |rank| self.heads.query_range(rank))
    }

    /// For each rank, its KV heads in a tensor [B, s, Hkv, D]: views
    /// [B, t, h, D], which overlap where a head is replicated.
    fn by_kv_heads(&self, tensor: &Tensor) -> Result<Vec<Vec<Tensor>>> {
        self.by_heads(tensor, |rank| self.heads.kv_range(rank))
    }

    fn by_heads(
        &self,
        tensor: &Tensor,
        range: impl Fn(usize) -> Range<usize>,
    ) -> Result<Vec<Vec<Tensor>>> {
        (0..self.tokens.ranks())
            .map(|rank| {
                let heads = range(rank);
                self.by_own_runs(&tensor.f_narrow(2, heads.start as i64, heads.len() as i64)?)
            })
            .collect()
    }

    /// The runs of this rank's tokens in a tensor [B, s, h, D]: views
    /// [B, t, h, D].
    fn by_own_runs(&self, tensor: &Tensor) -> Result<Vec<Tensor>> {
        let runs = self.tokens.runs(self.rank());
        if runs.len() == 1 {
            return Ok(vec![tensor.shallow_clone()]);
        }
        let mut start = 0;
        runs.iter()
            .map(|run| {
                let view = tensor.f_narrow(1, start, run.tokens as i64)?;
                start += run.tokens as i64;
                Ok(view)
            })
            .collect()
    }

    /// For each rank, its tokens in a tensor [B, h, S, D]: views [B, t, h, D],
    /// one for each run of that rank.
    fn by_tokens(&self, tensor: &Tensor) -> Result<Vec<Vec<Tensor>>> {
        let tensor = tensor.f_transpose(1, 2)?;
        (0..self.tokens.ranks())
            .map(|rank| {
                let runs = self.tokens.runs(rank).iter();
                runs.map(|run| {
                    let (first, step) = (run.first as i64, run.step as i64);
                    let past = first + (run.tokens as i64 - 1) * step + 1;
                    Ok(tensor.f_slice(1, first, past, step)?)
                })
                .collect()
            })
            .collect()
    }

    fn all_to_all(&self, send: &[Vec<Tensor>], receive: &[Vec<Tensor>]) -> Result<()> {
        Ok(self.communicator.all_to_all(send, receive)?)
    }

    /// Passes a result on; of a failure the peers are told, because they are
    /// waiting in the collective that this rank will not reach.
    fn or_abandon<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result {
            self.communicator.abandon(&error.to_string());
        }
        result
    }

    /// Adds up what the ranks `copies` came from say about each KV head.
    ///
    /// `copies[p]` is [B, s, h, D] for the KV heads of rank p; the result is
    /// [B, s, Hkv, D]. torch's sum over a stack accumulates half precision in
    /// float32 and rounds once, which repeated addition would not.
    fn sum_copies(&self, copies: &[Tensor]) -> Result<Tensor> {
        let head_sum = |head: usize| -> Result<Tensor> {
            let held: Vec<Tensor> = self
                .heads
                .kv_holders(head)
                .map(|rank| {
                    let local = head - self.heads.kv_range(rank).start;
                    copies[rank].f_narrow(2, local as i64, 1)
                })
                .collect::<Result<_, _>>()?;
            Ok(Tensor::f_stack(&held, 0)?.f_sum_dim_intlist(0, false, None)?)
        };
        let sums: Vec<Tensor> = (0..self.heads.kv_heads())
            .map(head_sum)
            .collect::<Result<_>>()?;
        Ok(Tensor::f_cat(&sums, 2)?)
    }
}
