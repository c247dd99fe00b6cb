//! Longest sequences, and readings of a GPU's memory.

use super::model;
use crate::{
    cost::memory::{H100_GIB, H200_GIB, HOST_BYTES, Limit, Training, estimate, longest_sequence},
    error::Result,
};

/// The longest sequence that was published for a training.
#[derive(Debug, Clone, Copy)]
pub struct LengthRow {
    /// What is trained, with what.
    pub what: &'static str,
    /// By name.
    pub model: &'static str,
    /// How.
    pub training: Training,
    /// The longest sequence.
    pub published: u64,
}

impl LengthRow {
    /// What the fit says, and what ends the sequence.
    ///
    /// # Errors
    /// None for the rows of [`lengths`].
    pub fn predicted(&self) -> Result<(u64, Limit)> {
        longest_sequence(&model(self.model)?, &self.training)
    }
}

/// What nvml said of a GPU in a training.
#[derive(Debug, Clone, Copy)]
pub struct ReadingRow {
    /// What is trained, with what.
    pub what: &'static str,
    /// By name.
    pub model: &'static str,
    /// How.
    pub training: Training,
    /// S.
    pub sequence: u64,
    /// GiB.
    pub published: f64,
}

impl ReadingRow {
    /// What the fit says, in GiB.
    ///
    /// # Errors
    /// None for the rows of [`readings`].
    pub fn predicted(&self) -> Result<f64> {
        Ok(estimate(&model(self.model)?, &self.training, self.sequence)?.total())
    }
}

/// What the authors call the baseline on `world` GPUs: checkpoints on the GPU,
/// optimizer on the host, parameters too where there is one GPU alone.
fn baseline(world: u64) -> Training {
    Training {
        batch: 1,
        sequence_parallel: 1,
        world,
        ranks_per_node: 8,
        offloads_checkpoints: false,
        offloads_optimizer: true,
        offloads_parameters: world == 1,
        has_tiled_mlp: false,
        has_tiled_loss: false,
        has_32_bit_kernel: false,
        gpu_gib: H100_GIB,
        host_bytes: HOST_BYTES,
    }
}

fn tiled_loss(world: u64) -> Training {
    Training {
        has_tiled_loss: true,
        has_32_bit_kernel: true,
        ..baseline(world)
    }
}

/// All that there is: Ulysses, tiles, offloaded checkpoints.
fn all(world: u64) -> Training {
    Training {
        sequence_parallel: world,
        offloads_checkpoints: true,
        has_tiled_mlp: true,
        ..tiled_loss(world)
    }
}

/// One H200, where no row stopped at 32 bits.
fn h200(training: Training) -> Training {
    Training {
        has_32_bit_kernel: false,
        gpu_gib: H200_GIB,
        ..training
    }
}

const LLAMA_8B: &str = "Llama-3.1-8B";
const LLAMA_70B: &str = "Llama-3.1-70B";
const QWEN: &str = "Qwen3-32B";

/// All longest sequences.
pub fn lengths() -> Vec<LengthRow> {
    let row = |model, what, training, published| LengthRow {
        what,
        model,
        training,
        published,
    };
    let ulysses = Training {
        sequence_parallel: 8,
        ..tiled_loss(8)
    };
    let without_tiled_mlp = Training {
        has_tiled_mlp: false,
        ..all(8)
    };
    let on_gpu = |training| Training {
        offloads_checkpoints: false,
        ..training
    };
    let h200_offload = Training {
        offloads_checkpoints: true,
        ..h200(tiled_loss(1))
    };
    vec![
        row(LLAMA_8B, "baseline, 1 GPU", baseline(1), 36_000),
        row(LLAMA_8B, "baseline, 8 GPUs", baseline(8), 32_000),
        row(LLAMA_8B, "+ tiled loss", tiled_loss(8), 160_000),
        row(LLAMA_8B, "+ Ulysses SP 8", ulysses, 1_100_000),
        row(LLAMA_8B, "+ TiledMLP", on_gpu(all(8)), 1_200_000),
        row(LLAMA_8B, "SP 8 + offload", without_tiled_mlp, 2_400_000),
        row(LLAMA_8B, "all, 1 GPU", all(1), 500_000),
        row(LLAMA_8B, "all, 8 GPUs", all(8), 3_700_000),
        row(LLAMA_8B, "all, 16 GPUs", all(16), 8_000_000),
        row(LLAMA_8B, "all, 32 GPUs", all(32), 15_000_000),
        row(LLAMA_8B, "baseline, H200", h200(baseline(1)), 65_000),
        row(LLAMA_8B, "+ tiled loss, H200", h200(tiled_loss(1)), 300_000),
        row(LLAMA_8B, "+ offload, H200", h200_offload, 650_000),
        row(LLAMA_8B, "all, H200", h200(all(1)), 1_200_000),
        row(LLAMA_70B, "8 GPUs, no offload", on_gpu(all(8)), 200_000),
        row(LLAMA_70B, "all, 16 GPUs", all(16), 1_200_000),
        row(LLAMA_70B, "all, 32 GPUs", all(32), 4_000_000),
        row(LLAMA_70B, "all, 64 GPUs", all(64), 10_000_000),
        row(QWEN, "all, 1 GPU", all(1), 230_000),
        row(QWEN, "all, 8 GPUs", all(8), 1_550_000),
        row(QWEN, "all, 16 GPUs", all(16), 4_000_000),
        row(QWEN, "all, 32 GPUs", all(32), 7_000_000),
        row(QWEN, "all, 64 GPUs", all(64), 15_000_000),
    ]
}

/// All readings.
pub fn readings() -> Vec<ReadingRow> {
    let row = |model, what, training, sequence, published| ReadingRow {
        what,
        model,
        training,
        sequence,
        published,
    };
    let h200_offload = Training {
        offloads_checkpoints: true,
        ..h200(tiled_loss(1))
    };
    vec![
        row(LLAMA_8B, "baseline", baseline(1), 32_000, 71.91),
        row(
            LLAMA_8B,
            "baseline, H200",
            h200(baseline(1)),
            65_000,
            137.36,
        ),
        row(
            LLAMA_8B,
            "+ tiled loss, H200",
            h200(tiled_loss(1)),
            300_000,
            134.96,
        ),
        row(LLAMA_8B, "+ offload, H200", h200_offload, 650_000, 126.81),
        row(LLAMA_8B, "all, H200", h200(all(1)), 1_200_000, 136.15),
        row(LLAMA_70B, "all, 32 GPUs", all(32), 4_000_000, 47.70),
        row(LLAMA_70B, "all, 64 GPUs", all(64), 10_000_000, 53.83),
        row(QWEN, "all, 32 GPUs", all(32), 7_000_000, 71.55),
        row(QWEN, "all, 64 GPUs", all(64), 15_000_000, 71.00),
    ]
}
