//! The command line: what is trained, on which mesh.

use super::Result;
use clap::{Args, Parser, Subcommand, ValueEnum, builder::RangedU64ValueParser};
use serde_json::json;
use std::path::PathBuf;
use tch::Kind;
use ulysses::{
    LlamaConfig, MeshShape,
    optimizer::{self, GradientScale, StateKind, Update},
};

/// Trains a small Llama on a text, on a mesh of data and sequence parallelism
///
/// One process, or the ranks of `mpirun`. The mesh decides who computes what, and
/// nothing else: every mesh trains the same model on the same samples.
#[derive(Debug, Parser)]
#[command(name = "train", args_conflicts_with_subcommands = true)]
pub(crate) struct CommandLine {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    #[command(flatten)]
    pub(crate) training: Training,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Train on a mesh under mpirun and on one process, and hold one curve
    /// against the other
    Compare {
        /// Draw both curves and their difference, as SVG
        #[arg(long)]
        plot: Option<PathBuf>,
        /// Options of the training, those of the mesh among them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        training: Vec<String>,
    },
}

/// `Training` alone, for the words behind `compare`.
#[derive(Debug, Parser)]
#[command(name = "train compare")]
pub(crate) struct TrainingLine {
    #[command(flatten)]
    pub(crate) training: Training,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Training {
    /// Steps of the optimizer
    #[arg(long, default_value_t = 80, value_parser = positive())]
    pub(crate) steps: usize,
    /// Replicas that hold copies of the optimizer's state
    #[arg(long, default_value_t = 1, value_parser = positive())]
    pub(crate) dp_replicate: usize,
    /// Replicas that share the optimizer's state
    #[arg(long, default_value_t = 1, value_parser = positive())]
    pub(crate) dp_shard: usize,
    /// Ranks that share each sequence
    #[arg(long, default_value_t = 1, value_parser = positive())]
    pub(crate) sp: usize,
    /// Sequences of a step, those of all replicas together
    #[arg(long, default_value_t = 4, value_parser = positive())]
    pub(crate) sequences: usize,
    /// Tokens of a sequence
    #[arg(long, default_value_t = 256, value_parser = RangedU64ValueParser::<usize>::new().range(2..))]
    pub(crate) sequence: usize,
    /// Layers of the model
    #[arg(long, default_value_t = 2, value_parser = positive())]
    pub(crate) layers: usize,
    /// Channels between layers
    #[arg(long, default_value_t = 64, value_parser = positive())]
    pub(crate) hidden: usize,
    /// Query heads of a layer
    #[arg(long, default_value_t = 4, value_parser = positive())]
    pub(crate) heads: usize,
    /// KV heads of a layer
    #[arg(long, default_value_t = 2, value_parser = positive())]
    pub(crate) kv_heads: usize,
    /// How far a step goes, from the tenth on
    #[arg(long, default_value_t = 4e-3)]
    pub(crate) learning_rate: f64,
    /// What the weights are made of
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// What is sharded: 1 the optimizer's state, 2 gradients too
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2))]
    pub(crate) stage: u8,
    /// What is computed in
    #[arg(long, default_value = "f64")]
    pub(crate) dtype: Dtype,
    /// Keep only the inputs of layers, and run them again in backward
    #[arg(long)]
    pub(crate) checkpointing: bool,
    /// Tiles of each MLP
    #[arg(long, default_value_t = 1, value_parser = positive())]
    pub(crate) mlp_tiles: usize,
    /// Tiles of the logits and their loss
    #[arg(long, default_value_t = 4, value_parser = positive())]
    pub(crate) loss_tiles: usize,
    /// Write step, loss and the norm of the gradient to this file, as CSV
    #[arg(long)]
    pub(crate) out: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Dtype {
    F64,
    F32,
}

fn positive() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..)
}

impl Training {
    pub(crate) fn mesh(&self) -> MeshShape {
        MeshShape {
            dp_replicate: self.dp_replicate,
            dp_shard: self.dp_shard,
            sp: self.sp,
        }
    }

    /// The same on one process.
    pub(crate) fn alone(&self, dtype: Dtype) -> Self {
        Self {
            dp_replicate: 1,
            dp_shard: 1,
            sp: 1,
            dtype,
            ..self.clone()
        }
    }

    pub(crate) fn kind(&self) -> Kind {
        match self.dtype {
            Dtype::F64 => Kind::Double,
            Dtype::F32 => Kind::Float,
        }
    }

    /// Channels inside an MLP.
    pub(crate) fn intermediate(&self) -> usize {
        3 * self.hidden
    }

    /// Tokens of a step that have a next one: all sequences have equally many.
    pub(crate) fn targets(&self) -> usize {
        self.sequences * (self.sequence - 1)
    }

    pub(crate) fn config(&self) -> Result<LlamaConfig> {
        let json = json!({
            "model_type": "llama",
            "vocab_size": super::tokenizer::VOCABULARY,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate(),
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
        });
        Ok(LlamaConfig::from_json(&json.to_string())?)
    }

    /// AdamW on the mean over all tokens of a step, of which each backward
    /// gives a part of the sum.
    pub(crate) fn optimizer(&self) -> optimizer::Options {
        optimizer::Options {
            stage: match self.stage {
                1 => optimizer::Stage::One,
                _ => optimizer::Stage::Two,
            },
            update: Update::AdamW {
                learning_rate: self.learning_rate,
                betas: (0.9, 0.95),
                epsilon: 1e-8,
                weight_decay: 0.1,
            },
            scale: GradientScale::Divide(self.targets() as f64),
            clip: Some(1.0),
            state: StateKind::Parameter,
        }
    }

    /// Of a step, counted from 0: rising over the first ten.
    pub(crate) fn learning_rate(&self, step: usize) -> f64 {
        self.learning_rate * ((step + 1) as f64 / 10.0).min(1.0)
    }
}
