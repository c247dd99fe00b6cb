//! How much a GPU holds in training with ZeRO-3, and so the longest sequence.
//! **A fit, not a derivation.**
//!
//! In bytes for t = B S/P tokens of a rank and W ranks in all,
//!
//! ```text
//! 8.8 GiB + 2 N/W + t (2 L h + peak)
//! ```
//!
//! with 2 N/W gone where parameters are offloaded, 18 N/W in its place where
//! the optimizer is not (weights 2, gradients 4, master weights 4, moments 8),
//! and 2 L h gone where checkpoints are offloaded. The peak is that of the
//! largest phase, in bytes per token; with u = 2 Hq D, k = 2 r Hkv D, e = 2 h,
//! f = 2 F, and c = 1 where P > 1, else 0:
//!
//! | phase | bytes | gone where |
//! |---|---|---|
//! | attention, backward of FlashAttention 2 | (8 + 2c) u + 4 k + 6 e | |
//! | fused SwiGLU | (2 + c) u + 2 k + 8 e + 4 f | the MLP is tiled |
//! | logits, bf16 and three copies in float32 | 14 V + 3 e | the loss is tiled |
//!
//! The counts of copies come from reading code, not from a profiler. The 8.8
//! GiB ([`FITTED_BASE_GIB`]), what is usable of a GPU ([`H100_GIB`],
//! [`H200_GIB`]) and the choice among plausible counts (14, 4, 10) were made
//! after seeing the readings of [`published`](super::published): a fit that
//! holds there, not a prediction. It is good for readings to about 12 % and
//! for the longest sequence of Llama-8B to 20 %; elsewhere the longest sequence
//! is an upper bound. It says nothing of training without checkpoints or in
//! other than bfloat16.
//!
//! Source of what is fitted: ALST, arXiv:2506.13996, and its recipes in
//! `snowflakedb/ArcticTraining`.

use super::{Model, not_zero};
use crate::error::{Result, refuse};

/// What a GPU holds beside all that is counted: CUDA, NCCL, buckets, gathered
/// parameters. Fitted.
pub const FITTED_BASE_GIB: f64 = 8.8;
/// What is usable of an H100 of 80 GB.
pub const H100_GIB: f64 = 77.5;
/// What is usable of an H200.
pub const H200_GIB: f64 = 138.0;
/// What a node of the published rows has for its ranks, in bytes.
pub const HOST_BYTES: f64 = 1.9e12;
/// What of that is for none of the terms.
const HOST_BASE_BYTES: f64 = 1e11;
const GIB: f64 = (1u64 << 30) as f64;

/// How a model is trained, and on what.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Training {
    /// B.
    pub batch: u64,
    /// P.
    pub sequence_parallel: u64,
    /// W.
    pub world: u64,
    /// Ranks that share a host.
    pub ranks_per_node: u64,
    /// Checkpoints are kept by the host.
    pub offloads_checkpoints: bool,
    /// Gradients, master weights and moments are kept by the host.
    pub offloads_optimizer: bool,
    /// Parameters are kept by the host.
    pub offloads_parameters: bool,
    /// The MLP runs in tiles.
    pub has_tiled_mlp: bool,
    /// Head and loss run in tiles.
    pub has_tiled_loss: bool,
    /// A kernel counts the elements of [t, h] in 32 bits, as that of the
    /// tiled loss of the published H100 rows did.
    pub has_32_bit_kernel: bool,
    /// What is usable of a GPU, in GiB.
    pub gpu_gib: f64,
    /// What is usable of a host, in bytes.
    pub host_bytes: f64,
}

/// What needs most while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Backward of attention.
    Attention,
    /// The MLP.
    Mlp,
    /// Head and loss.
    Logits,
}

/// What a GPU holds, in GiB.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// [`FITTED_BASE_GIB`].
    pub base: f64,
    /// The rank's part of parameters and of the optimizer's state.
    pub states: f64,
    /// The inputs of all layers.
    pub checkpoints: f64,
    /// What the largest phase needs.
    pub peak: f64,
    /// Which that is.
    pub phase: Phase,
}

impl Estimate {
    /// All of it.
    pub fn total(&self) -> f64 {
        self.base + self.states + self.checkpoints + self.peak
    }
}

/// What ends a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// The GPU, in this phase.
    Gpu(Phase),
    /// The host's memory, for offloaded checkpoints.
    Host,
    /// The 32 bits of a kernel.
    Index,
}

/// What a GPU holds with `sequence` tokens.
///
/// # Errors
/// Refused when a size is zero.
pub fn estimate(model: &Model, training: &Training, sequence: u64) -> Result<Estimate> {
    let tokens = training.tokens(sequence)?;
    let (phase, peak) = training.peak(model)?;
    Ok(Estimate {
        base: FITTED_BASE_GIB,
        states: training.states(model)? / GIB,
        checkpoints: tokens * training.checkpoints(model) / GIB,
        peak: tokens * peak / GIB,
        phase,
    })
}

/// The longest sequence that fits, and what ends it. 0 where the model alone
/// does not.
///
/// # Errors
/// Refused when a size is zero.
pub fn longest_sequence(model: &Model, training: &Training) -> Result<(u64, Limit)> {
    training.check()?;
    let (phase, peak) = training.peak(model)?;
    let room = (training.gpu_gib - FITTED_BASE_GIB) * GIB - training.states(model)?;
    let on_gpu = room / (training.checkpoints(model) + peak);
    let mut limits = vec![(on_gpu, Limit::Gpu(phase))];
    if training.offloads_checkpoints {
        let kept = 2.0 * model.layers as f64 * model.hidden as f64;
        let on_node = training.ranks_per_node.min(training.world) as f64;
        let nodes = training.world as f64 / on_node;
        let states = if training.offloads_optimizer {
            16.0
        } else {
            0.0
        };
        let states = states * model.parameters()? as f64 / nodes;
        let room = training.host_bytes - HOST_BASE_BYTES - states;
        limits.push((room / (kept * on_node), Limit::Host));
    }
    if training.has_32_bit_kernel {
        limits.push((2f64.powi(31) / model.hidden as f64, Limit::Index));
    }
    let least = limits.into_iter().min_by(|a, b| a.0.total_cmp(&b.0));
    let (tokens, limit) = least.unwrap_or((on_gpu, Limit::Gpu(phase)));
    let sequence = tokens / training.batch as f64 * training.sequence_parallel as f64;
    // A cast that saturates: less than nothing is nothing.
    Ok((sequence as u64, limit))
}

impl Training {
    fn check(&self) -> Result<()> {
        let sizes = [
            ("batch", self.batch),
            ("sequence-parallel degree", self.sequence_parallel),
            ("number of ranks", self.world),
            ("number of ranks on a node", self.ranks_per_node),
        ];
        not_zero("training", &sizes)?;
        if !self.world.is_multiple_of(self.sequence_parallel) {
            return refuse(
                "world",
                format!(
                    "is of {} ranks, which groups of {} do not divide",
                    self.world, self.sequence_parallel
                ),
                "give a multiple",
            );
        }
        Ok(())
    }

    /// t, of each rank.
    fn tokens(&self, sequence: u64) -> Result<f64> {
        self.check()?;
        not_zero("sequence", &[("length", sequence)])?;
        Ok(self.batch as f64 * sequence as f64 / self.sequence_parallel as f64)
    }

    fn states(&self, model: &Model) -> Result<f64> {
        let weights = if self.offloads_parameters { 0.0 } else { 2.0 };
        let rest = if self.offloads_optimizer { 0.0 } else { 16.0 };
        Ok((weights + rest) * model.parameters()? as f64 / self.world as f64)
    }

    /// For each token.
    fn checkpoints(&self, model: &Model) -> f64 {
        match self.offloads_checkpoints {
            true => 0.0,
            false => 2.0 * model.layers as f64 * model.hidden as f64,
        }
    }

    /// For each token, of the largest phase.
    fn peak(&self, model: &Model) -> Result<(Phase, f64)> {
        model.check()?;
        let copies = (self.sequence_parallel as f64 / model.kv_heads as f64).max(1.0);
        let u = 2.0 * model.query_heads as f64 * model.head_size as f64;
        let k = 2.0 * copies * model.kv_heads as f64 * model.head_size as f64;
        let (e, f) = (2.0 * model.hidden as f64, 2.0 * model.ffn as f64);
        let c = if self.sequence_parallel > 1 { 1.0 } else { 0.0 };
        let attention = (8.0 + 2.0 * c) * u + 4.0 * k + 6.0 * e;
        let mut peak = (Phase::Attention, attention);
        let mlp = (2.0 + c) * u + 2.0 * k + 8.0 * e + 4.0 * f;
        if !self.has_tiled_mlp && mlp > peak.1 {
            peak = (Phase::Mlp, mlp);
        }
        let logits = 14.0 * model.vocabulary as f64 + 3.0 * e;
        if !self.has_tiled_loss && logits > peak.1 {
            peak = (Phase::Logits, logits);
        }
        Ok(peak)
    }
}
