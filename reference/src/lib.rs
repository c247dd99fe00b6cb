//! Ulysses sequence parallelism on libtorch.
//!
//! A sequence too long for one device is cut into shards, one for each of P
//! ranks. Attention needs every token, but each head needs no other head: so
//! the ranks exchange, each giving up most heads of its own tokens and getting
//! all tokens of a few heads, run ordinary attention on those, and exchange
//! back. Nothing about attention itself is approximated.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::{sync::Arc, thread};
//! use tch::{Device, Kind, Tensor};
//! use ulysses::{Options, ThreadCommunicator, UlyssesAttention};
//!
//! let ranks = ThreadCommunicator::world(2).into_iter().map(|communicator| {
//!     thread::spawn(move || {
//!         let attention = UlyssesAttention::new(Arc::new(communicator), Options::default());
//!         // Batch 1, 8 tokens of the 16, 4 heads of size 32.
//!         let shard = Tensor::randn([1, 8, 4, 32], (Kind::Float, Device::Cpu));
//!         attention.forward(&shard, &shard, &shard).map(|output| output.size())
//!     })
//! });
//! for rank in ranks.collect::<Vec<_>>() {
//!     assert_eq!(rank.join().map_err(|_| "a rank panicked")??, [1, 8, 4, 32]);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`attention`] | [`UlyssesAttention`]: agree, exchange, attend, exchange back |
//! | [`options`] | what a caller may choose once |
//! | [`call`] | what a call may bring beside query, key and value |
//! | [`distributed_attention`] | the same around any core attention, in any layout |
//! | [`cross_attention`](mod@cross_attention) | to keys and values that every rank holds whole |
//! | [`exchange`] | the two differentiable exchanges |
//! | [`head_partition`], [`token_partition`] | which heads and tokens a rank holds; pure arithmetic |
//! | [`core_attention`](mod@core_attention) | attention on one device |
//! | [`rotary`], [`head_norm`] | what becomes of queries and keys before |
//! | [`batch`] | a batch before the cut, each rank's shard of it, and the data loader adapter |
//! | [`model`] | a decoder of the Llama family, from Hugging Face files |
//! | [`tiled`] | functions of long sequences in tiles: the MLP, logits and their loss |
//! | [`loss`] | cross-entropy over the tokens of all ranks |
//! | [`communicator`] | how ranks talk: threads, MPI, NCCL, a counter around any; sums and gathers of tensors |
//! | [`mesh`] | data and sequence parallelism together |
//! | [`device`] | on which device a rank computes |
//! | [`autograd`] | custom autograd functions, and word that a gradient is complete, which tch lacks |
//! | [`optimizer`] | AdamW and SGD with their state sharded over a mesh |
//! | [`cost`] | bytes, operations and memory of a model, by arithmetic |
//! | [`error`] | the one error type |
//!
//! Deliberately not here: any switch that would make a result wrong on purpose.
//!
//! Source: Jacobs et al., "DeepSpeed Ulysses: System Optimizations for
//! Enabling Training of Extreme Long Sequence Transformer Models",
//! arXiv:2309.14509, section 3.1.

mod agreement;
pub mod attention;
pub mod autograd;
pub mod batch;
pub mod call;
pub mod communicator;
pub mod core_attention;
pub mod cost;
pub mod cross_attention;
pub mod device;
pub mod distributed_attention;
pub mod error;
mod exception;
pub mod exchange;
pub mod head_norm;
pub mod head_partition;
mod local_attention;
pub mod loss;
pub mod mesh;
pub mod model;
pub mod optimizer;
pub mod options;
pub mod rotary;
mod sequence;
pub mod tiled;
pub mod token_partition;

pub use attention::UlyssesAttention;
pub use autograd::checkpoint;
pub use batch::{
    Batch,
    data_loader::{DataLoaderAdapter, Epoch, Preparation},
    labels::{IGNORE_INDEX, Shift, shift_labels},
    positions::{document_ends, position_ids},
    shard::Shard,
};
pub use call::{Call, CallDropout, Documents, HeadNorm};
#[cfg(feature = "nccl")]
pub use communicator::nccl::{
    FolderRendezvous, HostRendezvous, NcclCommunicator, Rendezvous, nccl_serves,
};
pub use communicator::{
    Communicator, CommunicatorError,
    counting::{CountingCommunicator, Traffic},
    mpi::{MpiCommunicator, MpiWorld},
    threads::ThreadCommunicator,
};
pub use core_attention::{BlockLayout, Dropout, Kernel, Mask, Score, Structure, core_attention};
pub use cross_attention::cross_attention;
pub use device::{DeviceChoice, NoCuda, cuda_devices};
pub use distributed_attention::DistributedAttention;
pub use error::{Error, Refusal, Result};
pub use exchange::Exchange;
pub use head_norm::normalize_heads;
pub use head_partition::{HeadMap, HeadPartition};
pub use loss::cross_entropy;
pub use mesh::{Mesh, MeshShape};
pub use model::{
    AttentionCall, AttentionFunction, AttentionFunctions, Llama, LlamaConfig, ModelInput,
    UlyssesFunction,
    register::{Registration, register_in_group, register_with_model},
};
pub use options::{Options, SequenceLength};
pub use rotary::{Rotary, rotate};
pub use tiled::{
    Reduction, SwiGlu, Tile, TiledCompute, sequence_tiled_compute, tiled_logits_loss, tiled_mlp,
};
pub use token_partition::{Run, Sharding, TokenPartition};
