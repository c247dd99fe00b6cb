//! What a caller of [`UlyssesAttention`](crate::UlyssesAttention) may choose
//! once, for all calls.

use crate::{
    core_attention::{Kernel, Score},
    rotary::Rotary,
    token_partition::Sharding,
};

/// What attention is computed, and how. Everything but the kernel is the same
/// on all ranks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    /// How each rank computes attention. Each rank may choose for itself.
    pub kernel: Kernel,
    /// How scores are made and masked.
    pub score: Score,
    /// Queries and keys are rotated by their global positions, which the call
    /// then brings. Not given, positions are left alone.
    pub rotary: Option<Rotary>,
    /// Whether some ranks may hold one query head more than others. Off by
    /// default, for then all ranks wait for those.
    pub uneven_heads: bool,
    /// How the sequence is cut into shards.
    pub sharding: Sharding,
    /// Whether the length may change from call to call.
    pub sequence_length: SequenceLength,
    /// Outside training
    /// ([`set_training`](crate::UlyssesAttention::set_training)), take the
    /// whole sequence on every rank and communicate nothing, as DeepSpeed's
    /// `disable_in_eval`.
    pub disable_in_eval: bool,
    /// For debugging, in a model of this many layers: all but the last skip
    /// core attention and give their queries back, as DeepSpeed's
    /// `skip_all_but_last_attention_debug_mode`. Data travels all the same.
    pub skip_all_but_last: Option<usize>,
}

/// Which lengths a call may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SequenceLength {
    /// Any, and another on each call.
    #[default]
    Variable,
    /// These, or the call is refused.
    Fixed {
        /// The tokens of this rank.
        local: usize,
        /// The tokens of all ranks.
        global: usize,
    },
}

impl Default for Options {
    fn default() -> Self {
        Self {
            kernel: Kernel::Sdpa,
            score: Score::default(),
            rotary: None,
            uneven_heads: false,
            sharding: Sharding::default(),
            sequence_length: SequenceLength::default(),
            disable_in_eval: false,
            skip_all_but_last: None,
        }
    }
}
