//! Attention on one device: some heads, the whole sequence.
//!
//! This is what Ulysses leaves untouched. Whatever kernel a single device
//! would use runs here on the heads of one rank, and computes each head as it
//! would have among all heads.
//!
//! [`Kernel::Eager`] is the definition, written down in tensors: all scores at
//! once. [`Kernel::Sdpa`] is the same without ever holding S x S of anything:
//! torch's fused kernel on what is visible, or, where the fused kernel knows
//! no such scores, the definition on a few rows at a time. The other kernels
//! are those among which torch chooses.
//!
//! | module | holds |
//! |---|---|
//! | `arguments` | what is refused |
//! | `layout` | block-sparse layouts |
//! | `visible` | which keys a query sees, in one place |
//! | `formula` | from queries, keys and values to outputs, step by step |
//! | `dropout` | which weights are dropped, as a pure function of where they stand |
//! | `eager` | the formula on everything at once |
//! | `sdpa` | the fused kernel, and when it is used |
//! | `backend` | one of torch's kernels alone |
//! | `plan` | the tiles of the score matrix that have anything visible in them |
//! | `tiled` | attention tile by tile, forward and backward |
//!
//! Not here: ranks, shards, and how to choose a kernel; the caller does.

mod arguments;
mod backend;
mod dropout;
mod eager;
mod formula;
mod layout;
mod plan;
mod sdpa;
mod tiled;
mod visible;

pub(crate) use arguments::check_numbers;
pub use dropout::Dropout;
pub(crate) use formula::precise;
pub use layout::BlockLayout;

use self::backend::Switches;
use crate::{error::Result, head_partition::HeadMap};
use std::ops::Range;
use tch::Tensor;
use visible::Visible;

/// How attention is computed.
///
/// All but [`Kernel::Eager`] are torch's `scaled_dot_product_attention`; where
/// that cannot do what is asked, the separate operations on a few rows of
/// scores at a time. The last four are one of its kernels alone, and torch's
/// own error where the device or the call is not for that kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// Scores, softmax and weighted sum as separate operations, with all
    /// scores in memory at once.
    Eager,
    /// Whichever kernel torch chooses. On a CPU that is its fused one, in memory
    /// linear in the length of the sequence.
    Sdpa,
    /// The separate operations, inside torch.
    Math,
    /// FlashAttention: half types on a GPU; on a CPU its own fused kernel.
    Flash,
    /// The memory-efficient kernel, on a GPU.
    MemoryEfficient,
    /// That of cuDNN: half types on a GPU.
    CuDnn,
}

impl Kernel {
    /// All of them.
    pub const ALL: [Kernel; 6] = [
        Kernel::Eager,
        Kernel::Sdpa,
        Kernel::Math,
        Kernel::Flash,
        Kernel::MemoryEfficient,
        Kernel::CuDnn,
    ];

    /// What it is called on a command line: `memory-efficient`, for instance.
    pub fn name(self) -> &'static str {
        match self {
            Kernel::Eager => "eager",
            Kernel::Sdpa => "sdpa",
            Kernel::Math => "math",
            Kernel::Flash => "flash",
            Kernel::MemoryEfficient => "memory-efficient",
            Kernel::CuDnn => "cudnn",
        }
    }

    /// Does `call` with torch's attention bound to this kernel, for a comparison
    /// with the very same; as it is for [`Kernel::Eager`] and [`Kernel::Sdpa`].
    ///
    /// The switches are the whole process': what other threads do of this crate
    /// waits meanwhile, unless it wants the same kernel. What `call` does is not
    /// to be of this crate.
    pub fn alone<T>(self, call: impl FnOnce() -> T) -> T {
        backend::with(self.switches(), call)
    }

    /// What is switched on of torch's attention.
    fn switches(self) -> Switches {
        match self {
            Kernel::Eager | Kernel::Sdpa => None,
            Kernel::Math => Some(backend::MATH),
            Kernel::Flash => Some(backend::FLASH),
            Kernel::MemoryEfficient => Some(backend::MEMORY_EFFICIENT),
            Kernel::CuDnn => Some(backend::CUDNN),
        }
    }
}

/// Which tokens a token attends to, as far as their order decides it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mask {
    /// To all tokens.
    Full,
    /// To itself and those before it.
    Causal,
}

/// How scores are made and masked; the same on all ranks.
///
/// In this order: `scale * Q K^T`, softcap, ALiBi, mask and window, softmax.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    /// Which tokens a token attends to.
    pub mask: Mask,
    /// Sliding window: token i sees token j only if `|i - j| < window`.
    pub window: Option<usize>,
    /// What the scores are multiplied with, `1/sqrt(head size)` if not given.
    pub scale: Option<f64>,
    /// Scores x become `softcap * tanh(x / softcap)`.
    pub softcap: Option<f64>,
}

impl Default for Score {
    fn default() -> Self {
        Self {
            mask: Mask::Full,
            window: None,
            scale: None,
            softcap: None,
        }
    }
}

/// What one call brings beside query, key and value, for the query heads of
/// this device and the whole sequence. By default nothing.
#[derive(Debug, Default)]
pub struct Structure<'a> {
    /// For each batch row the runs of tokens that attend among themselves,
    /// ascending and disjoint: packed documents, or the real tokens of a
    /// padded row. A token in no run sees nothing, is seen by nobody and gets
    /// zeros. Without it all tokens are one run.
    pub segments: Option<Vec<Vec<Range<usize>>>>,
    /// Which blocks of keys the blocks of queries see, for each query head.
    pub layout: Option<BlockLayout>,
    /// ALiBi slopes, `[h]`: `-slopes[h] * |i - j|` is added to the scores.
    /// Differentiable.
    pub slopes: Option<&'a Tensor>,
    /// Attention sinks, `[h]`: `exp(sinks[h])` is added to the denominator of the
    /// softmax. Differentiable.
    pub sinks: Option<&'a Tensor>,
    /// Which weights are dropped.
    pub dropout: Option<Dropout>,
}

/// Attention of `query` [B, h, S, D] to `key` [B, hk, Sk, D] and `value`
/// [B, hk, Sk, Dv], where `heads` says which KV head each query head attends
/// to; gives [B, h, S, Dv].
///
/// A query that sees no key gives zeros, and its cotangents are zeros.
/// Differentiable in all three tensors, and in the slopes and sinks of
/// `structure`.
///
/// With [`Kernel::Sdpa`] on a CPU no tensor of S x Sk elements is made. A plain call,
/// one that asks for no more than a mask and a scale, is torch's fused kernel
/// and nothing else. Any other goes over the visible tiles of the score matrix
/// one by one, and over them again in backward; second derivatives are then
/// refused.
///
/// # Errors
/// Refused when shapes do not fit together, when a number is out of its range,
/// and when `key` has another length than `query` although mask, window,
/// segments, layout or slopes compare their tokens. Otherwise when libtorch
/// fails.
pub fn core_attention(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    heads: &HeadMap,
    kernel: Kernel,
    score: &Score,
    structure: &Structure,
) -> Result<Tensor> {
    arguments::check(query, key, value, heads, score, structure)?;
    let call = Call {
        query,
        key,
        value,
        heads,
        score,
        structure,
        visible: Visible::new(query.size()[2], key.size()[2], score, structure),
    };
    match kernel {
        Kernel::Eager => eager::attention(&call),
        _ => sdpa::attention(&call, kernel.switches()),
    }
}

/// The arguments of [`core_attention`], which fit together.
struct Call<'a> {
    query: &'a Tensor,
    key: &'a Tensor,
    value: &'a Tensor,
    heads: &'a HeadMap,
    score: &'a Score,
    structure: &'a Structure<'a>,
    visible: Visible<'a>,
}

impl Call<'_> {
    /// What the scores are multiplied with.
    fn scale(&self) -> f64 {
        let head_size = self.query.size()[3];
        let usual = || (head_size as f64).sqrt().recip();
        self.score.scale.unwrap_or_else(usual)
    }

    fn batch(&self) -> usize {
        self.query.size()[0] as usize
    }
}
