//! The shapes on both sides of an exchange: [B, s, H, D], sequence-sharded,
//! and [B, h, S, D], head-sharded.

use crate::error::{Result, refuse};
use tch::{Device, Kind, Tensor};

/// One kind of head on one rank, before and after the exchange.
#[derive(Clone, Copy)]
pub(super) struct Counts {
    pub(super) own_tokens: i64,
    pub(super) all_tokens: i64,
    pub(super) own_heads: i64,
    pub(super) all_heads: i64,
}

impl Counts {
    /// Room for [B, s, H, D].
    pub(super) fn sequence_sharded(self, like: &Likeness) -> Result<Tensor> {
        like.empty([like.batch, self.own_tokens, self.all_heads, like.head_size])
    }

    /// Room for [B, h, S, D].
    pub(super) fn head_sharded(self, like: &Likeness) -> Result<Tensor> {
        like.empty([like.batch, self.own_heads, self.all_tokens, like.head_size])
    }

    pub(super) fn expect_sequence_sharded(
        self,
        argument: &'static str,
        given: &Tensor,
    ) -> Result<Likeness> {
        expect(argument, given, [self.own_tokens, self.all_heads])
    }

    pub(super) fn expect_head_sharded(
        self,
        argument: &'static str,
        given: &Tensor,
    ) -> Result<Likeness> {
        expect(argument, given, [self.own_heads, self.all_tokens])
    }
}

/// What an exchange leaves as it is.
pub(super) struct Likeness {
    pub(super) batch: i64,
    pub(super) head_size: i64,
    options: (Kind, Device),
}

impl Likeness {
    pub(super) fn empty(&self, size: [i64; 4]) -> Result<Tensor> {
        Ok(Tensor::f_empty(size, self.options)?)
    }
}

fn expect(argument: &'static str, given: &Tensor, middle: [i64; 2]) -> Result<Likeness> {
    match given.size()[..] {
        [batch, first, second, head_size] if [first, second] == middle => Ok(Likeness {
            batch,
            head_size,
            options: (given.f_kind()?, given.device()),
        }),
        ref size => refuse(
            argument,
            format!("has shape {size:?}"),
            format!("give [batch, {}, {}, head size]", middle[0], middle[1]),
        ),
    }
}
