//! The bytes that the reference hands to its communicator, exactly as
//! [`CountingCommunicator`](crate::CountingCommunicator) counts them.
//!
//! A rank with s of S tokens and h of Hq query heads, of size D, and k KV heads
//! of the K that there are with all copies, hands over in elements
//!
//! | exchange | in all | to others |
//! |---|---|---|
//! | Q, K, V forward | B s (Hq D + K (D + Dv)) | without its own h and k |
//! | output forward | B S h Dv | without its own s |
//! | output's cotangent | B s Hq Dv | without its own h |
//! | those of Q, K, V | B S (h D + k (D + Dv)) | without its own s |
//!
//! For even shares and Dv = D that is B s D (2 Hq + 2 K) each way, of which
//! (P - 1)/P leave the rank: DeepSpeed's formula ([`deepspeed`](super::deepspeed)).
//! It departs from DeepSpeed in what is not bytes of the exchange: a KV head
//! that several ranks need is sent to each, but never repeated in memory
//! before; Q, K and V are one collective; a gather of a few words agrees on
//! the call; and positions are gathered only where somebody reads them.
//!
//! Source of the formula: DeepSpeed Ulysses, arXiv:2309.14509, section 3.2.

use super::{Shares, not_zero, product, shares::Share, times};
use crate::{
    communicator::counting::Traffic,
    error::{Result, refuse},
};

/// The words by which ranks agree on one forward.
pub const AGREEMENT_WORDS: u64 = 99;

const WORD_BYTES: u64 = size_of::<i64>() as u64;

/// The attention of one layer, as far as its traffic depends on it.
#[derive(Debug, Clone, Copy)]
pub struct AttentionTraffic<'a> {
    shares: &'a Shares,
    head_size: u64,
    value_size: u64,
    element_bytes: u64,
}

impl<'a> AttentionTraffic<'a> {
    /// Attention with queries and keys of `head_size` and values of
    /// `value_size`, of elements of `element_bytes`.
    ///
    /// # Errors
    /// Refused when one of these is 0.
    pub fn new(
        shares: &'a Shares,
        head_size: u64,
        value_size: u64,
        element_bytes: u64,
    ) -> Result<Self> {
        let sizes = [
            ("head size", head_size),
            ("value size", value_size),
            ("size of elements", element_bytes),
        ];
        not_zero("attention", &sizes)?;
        Ok(Self {
            shares,
            head_size,
            value_size,
            element_bytes,
        })
    }

    /// What `rank` hands over in one forward, the agreement included.
    ///
    /// # Errors
    /// Refused when there is no such rank, or more bytes than 2^64; likewise
    /// below.
    pub fn forward(&self, rank: usize) -> Result<Traffic> {
        let (own, all) = (self.shares.of(rank)?, self.whole());
        let inward = Moved {
            in_all: times(self.elements(&all)?, own.tokens)?,
            to_itself: times(self.elements(&own)?, own.tokens)?,
        };
        let outward = self.output(all.tokens, own.tokens, own.query_heads)?;
        let agreement = Traffic {
            all_gather_calls: 1,
            all_gather_bytes: AGREEMENT_WORDS * WORD_BYTES,
            ..Traffic::default()
        };
        Ok(sum([self.exchanged(inward, outward)?, agreement]))
    }

    /// What `rank` hands over in one backward.
    ///
    /// # Errors
    /// As for [`forward`](Self::forward).
    pub fn backward(&self, rank: usize) -> Result<Traffic> {
        let (own, all) = (self.shares.of(rank)?, self.whole());
        let inward = self.output(all.query_heads, own.query_heads, own.tokens)?;
        let of_one = self.elements(&own)?;
        let outward = Moved {
            in_all: times(of_one, all.tokens)?,
            to_itself: times(of_one, own.tokens)?,
        };
        self.exchanged(inward, outward)
    }

    /// What each rank hands over to gather `components` position ids of each
    /// token, in a call that reads them. Others hand over as much, so (P - 1)
    /// times that arrives.
    ///
    /// # Errors
    /// As for [`forward`](Self::forward).
    pub fn positions(&self, components: u64) -> Result<Traffic> {
        // Every rank gives as many words as the one with most tokens.
        let most = self.shares.tokens().iter().copied().max().unwrap_or(0);
        let bytes = product([WORD_BYTES, components, self.shares.batch(), most])?;
        Ok(Traffic {
            all_gather_calls: 1,
            all_gather_bytes: narrow(bytes)?,
            ..Traffic::default()
        })
    }

    /// What `rank` hands over in a step of `layers` layers: forward and
    /// backward, and forward again where layers are checkpointed. Position ids
    /// are not among it.
    ///
    /// # Errors
    /// As for [`forward`](Self::forward).
    pub fn step(&self, rank: usize, layers: u64, is_checkpointed: bool) -> Result<Traffic> {
        let forward = self.forward(rank)?;
        let again = if is_checkpointed {
            forward
        } else {
            Traffic::default()
        };
        let layer = sum([forward, self.backward(rank)?, again]);
        let times = |count: u64| narrow(product([count, layers])?);
        Ok(Traffic {
            all_to_all_calls: times(layer.all_to_all_calls)?,
            all_to_all_bytes: times(layer.all_to_all_bytes)?,
            off_rank_bytes: times(layer.off_rank_bytes)?,
            all_gather_calls: times(layer.all_gather_calls)?,
            all_gather_bytes: times(layer.all_gather_bytes)?,
        })
    }

    fn whole(&self) -> Share {
        Share {
            tokens: self.shares.sequence(),
            query_heads: self.shares.heads().query_heads() as u64,
            kv_heads: self.shares.kv_copies(),
        }
    }

    /// The elements of query, key and value that one token has for the heads
    /// of `share`.
    fn elements(&self, share: &Share) -> Result<u128> {
        Ok(product([share.query_heads, self.head_size])?
            + product([share.kv_heads, self.head_size])?
            + product([share.kv_heads, self.value_size])?)
    }

    /// An output: `each` for each of `all`, of which `own` stay.
    fn output(&self, all: u64, own: u64, each: u64) -> Result<Moved> {
        Ok(Moved {
            in_all: product([all, each, self.value_size])?,
            to_itself: product([own, each, self.value_size])?,
        })
    }

    fn exchanged(&self, first: Moved, second: Moved) -> Result<Traffic> {
        if self.shares.ranks() == 1 {
            return Ok(Traffic::default());
        }
        let bytes = |elements: u128| {
            narrow(times(
                times(elements, self.shares.batch())?,
                self.element_bytes,
            )?)
        };
        let in_all = first.in_all + second.in_all;
        let to_itself = first.to_itself + second.to_itself;
        Ok(Traffic {
            all_to_all_calls: 2,
            all_to_all_bytes: bytes(in_all)?,
            off_rank_bytes: bytes(in_all - to_itself)?,
            ..Traffic::default()
        })
    }
}

/// Elements of one batch row.
struct Moved {
    in_all: u128,
    to_itself: u128,
}

fn sum<const N: usize>(parts: [Traffic; N]) -> Traffic {
    parts
        .into_iter()
        .fold(Traffic::default(), |sum, part| Traffic {
            all_to_all_calls: sum.all_to_all_calls + part.all_to_all_calls,
            all_to_all_bytes: sum.all_to_all_bytes + part.all_to_all_bytes,
            off_rank_bytes: sum.off_rank_bytes + part.off_rank_bytes,
            all_gather_calls: sum.all_gather_calls + part.all_gather_calls,
            all_gather_bytes: sum.all_gather_bytes + part.all_gather_bytes,
        })
}

fn narrow(count: u128) -> Result<u64> {
    // Half of what fits, so that three of them can be added up.
    match u64::try_from(count) {
        Ok(count) if count <= u64::MAX / 4 => Ok(count),
        _ => refuse(
            "sizes",
            "make more than 2^62 bytes of traffic",
            "give the sizes of a model that a machine can hold",
        ),
    }
}
