//! What a caller of [`UlyssesAttention`](crate::UlyssesAttention) may choose.

use crate::core_attention::{Kernel, Mask};

/// What attention is computed, and how.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    /// How each rank computes attention. Each rank may choose for itself.
    pub kernel: Kernel,
    /// Which tokens a token attends to; the same on all ranks.
    pub mask: Mask,
    /// What the scores are multiplied with, `1/sqrt(head size)` if not given;
    /// the same on all ranks.
    pub scale: Option<f64>,
    /// Whether some ranks may hold one query head more than others. Off by
    /// default, for then all ranks wait for those; the same on all ranks.
    pub uneven_heads: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            kernel: Kernel::Sdpa,
            mask: Mask::Full,
            scale: None,
            uneven_heads: false,
        }
    }
}
