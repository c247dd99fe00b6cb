//! The questions that DeepSpeed puts to its model-parallel unit, `mpu`.
//!
//! | DeepSpeed | is here |
//! |---|---|
//! | sequence parallel | [`Mesh::sequence_parallel`]: contiguous ranks of the world |
//! | sequence data parallel | the whole world: over it DeepSpeed's ZeRO shards and reduces |
//! | model parallel | another name for sequence parallel |
//! | data parallel | none: `mpu` has no such group. [`Mesh::data_parallel`] is that of the mesh |
//!
//! Sharding over the sequence-data group is [`Mesh::sharding`] for a mesh whose
//! `dp_replicate` is 1.
//!
//! Source: deepspeed/runtime/sequence_parallel/parallel_state_sp.py, 0.19.8.

use super::Mesh;
use crate::communicator::Communicator;
use std::sync::Arc;

impl Mesh {
    /// `get_sequence_parallel_group`.
    pub fn sequence_parallel_group(&self) -> &Arc<dyn Communicator> {
        self.sequence_parallel()
    }

    /// `get_sequence_parallel_world_size`.
    pub fn sequence_parallel_world_size(&self) -> usize {
        self.sequence_parallel().size()
    }

    /// `get_sequence_parallel_rank`.
    pub fn sequence_parallel_rank(&self) -> usize {
        self.sequence_parallel().rank()
    }

    /// `get_sequence_data_parallel_group`.
    pub fn sequence_data_parallel_group(&self) -> &Arc<dyn Communicator> {
        self.world()
    }

    /// `get_sequence_data_parallel_world_size`.
    pub fn sequence_data_parallel_world_size(&self) -> usize {
        self.world().size()
    }

    /// `get_sequence_data_parallel_rank`.
    pub fn sequence_data_parallel_rank(&self) -> usize {
        self.world().rank()
    }

    /// `get_model_parallel_group`.
    pub fn model_parallel_group(&self) -> &Arc<dyn Communicator> {
        self.sequence_parallel()
    }

    /// `get_model_parallel_world_size`.
    pub fn model_parallel_world_size(&self) -> usize {
        self.sequence_parallel().size()
    }

    /// `get_model_parallel_rank`.
    pub fn model_parallel_rank(&self) -> usize {
        self.sequence_parallel().rank()
    }
}
