//! Block-sparse layouts: which blocks of keys the blocks of queries see.

use crate::error::{Result, refuse};
use std::ops::Range;
use tch::Tensor;

/// For each query head, which blocks of keys each block of queries sees.
///
/// The sequence is cut into `ceil(S / block)` blocks of `block` tokens, the
/// last of which may be shorter. The layout is plain data on the host, because
/// it decides which work is done at all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockLayout {
    block: usize,
    heads: usize,
    blocks: usize,
    /// [heads, blocks, blocks], the last dimension counting blocks of keys.
    visible: Vec<bool>,
}

impl BlockLayout {
    /// The layout that `visible` [h, nb, nb] spells out for blocks of `block`
    /// tokens: whatever is not zero is visible.
    ///
    /// # Errors
    /// Refused when `visible` has another shape, or `block` is zero.
    pub fn new(visible: &Tensor, block: usize) -> Result<Self> {
        if block == 0 {
            let problem = "has blocks of 0 tokens".to_owned();
            return refuse("layout", problem, "give blocks of at least one token");
        }
        match visible.size()[..] {
            [heads, blocks, columns] if blocks == columns => Ok(Self {
                block,
                heads: heads as usize,
                blocks: blocks as usize,
                visible: Vec::try_from(visible.f_ne(0)?.f_flatten(0, -1)?)?,
            }),
            ref size => refuse(
                "layout",
                format!("has shape {size:?}"),
                "give [query heads, blocks, blocks]",
            ),
        }
    }

    /// The layout of a contiguous range of query heads.
    ///
    /// # Errors
    /// Refused when there are no such heads.
    pub fn narrow(&self, heads: Range<usize>) -> Result<Self> {
        let each = self.blocks * self.blocks;
        match self.visible.get(heads.start * each..heads.end * each) {
            Some(visible) => Ok(Self {
                heads: heads.len(),
                visible: visible.to_vec(),
                ..*self
            }),
            None => refuse(
                "layout",
                format!("has {} heads, none of which are {heads:?}", self.heads),
                "give one for each query head",
            ),
        }
    }

    /// The tokens of a block.
    pub fn block(&self) -> usize {
        self.block
    }

    /// How many query heads there are.
    pub fn heads(&self) -> usize {
        self.heads
    }

    /// How many blocks the sequence has.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Which blocks of keys a block of queries sees: one word for each.
    pub(super) fn row(&self, head: usize, query_block: usize) -> &[bool] {
        let start = (head * self.blocks + query_block) * self.blocks;
        &self.visible[start..start + self.blocks]
    }

    /// All rows of a head.
    pub(super) fn head(&self, head: usize) -> &[bool] {
        let each = self.blocks * self.blocks;
        &self.visible[head * each..(head + 1) * each]
    }

    pub(super) fn as_slice(&self) -> &[bool] {
        &self.visible
    }
}
