//! Data parallelism and sequence parallelism together.
//!
//! A world of ranks is cut along three axes: `dp_replicate` x `dp_shard` x `sp`.
//! The `sp` ranks of a sequence-parallel group share each sequence; data-parallel
//! replicas have sequences of their own. Of state that is sharded
//! ([`optimizer`](crate::optimizer)) each of `dp_shard` x `sp` ranks has a part, and
//! there are `dp_replicate` copies: parameters are the same whatever part of a
//! sequence a rank has, so that the ranks of a sequence share state too.
//!
//! [`MeshShape`] answers for any rank of any world, without one; [`Mesh`] has the
//! communicators. `mpu` puts DeepSpeed's questions to it.
//!
//! Not here: tensor, pipeline and expert parallelism.

mod mpu;
mod shape;

pub use shape::{Coordinates, Group, MeshShape};

use crate::{
    communicator::Communicator,
    error::{Refusal, Result},
};
use std::sync::Arc;

/// One rank's place in a mesh, with the groups that it is in.
pub struct Mesh {
    shape: MeshShape,
    coordinates: Coordinates,
    world: Arc<dyn Communicator>,
    sequence_parallel: Arc<dyn Communicator>,
    data_parallel_shard: Arc<dyn Communicator>,
    data_parallel_replicate: Arc<dyn Communicator>,
    data_parallel: Arc<dyn Communicator>,
    sharding: Arc<dyn Communicator>,
}

impl Mesh {
    /// Cuts `world` into the groups of a mesh. All ranks call it together.
    ///
    /// # Errors
    /// The same refusal on every rank when an axis has no rank, when the axes
    /// do not multiply to the world, or shapes differ between ranks; those of
    /// the communicator.
    pub fn new(world: Arc<dyn Communicator>, shape: MeshShape) -> Result<Mesh> {
        agree(&*world, shape)?;
        let rank = world.rank();
        let group =
            |kind| -> Result<Arc<dyn Communicator>> { Ok(world.split(shape.first(kind, rank)?)?) };
        Ok(Mesh {
            shape,
            coordinates: shape.coordinates(rank)?,
            sequence_parallel: group(Group::SequenceParallel)?,
            data_parallel_shard: group(Group::DataParallelShard)?,
            data_parallel_replicate: group(Group::DataParallelReplicate)?,
            data_parallel: group(Group::DataParallel)?,
            sharding: group(Group::Sharding)?,
            world,
        })
    }

    /// How many ranks there are along each axis.
    pub fn shape(&self) -> MeshShape {
        self.shape
    }

    /// Where this rank stands.
    pub fn coordinates(&self) -> Coordinates {
        self.coordinates
    }

    /// All ranks.
    pub fn world(&self) -> &Arc<dyn Communicator> {
        &self.world
    }

    /// The ranks that share this rank's sequences, one for each part of them.
    pub fn sequence_parallel(&self) -> &Arc<dyn Communicator> {
        &self.sequence_parallel
    }

    /// The ranks with the same part of other sequences that share state.
    pub fn data_parallel_shard(&self) -> &Arc<dyn Communicator> {
        &self.data_parallel_shard
    }

    /// The ranks with the same part of other sequences that hold the same part
    /// of the state.
    pub fn data_parallel_replicate(&self) -> &Arc<dyn Communicator> {
        &self.data_parallel_replicate
    }

    /// The ranks with the same part of other sequences.
    pub fn data_parallel(&self) -> &Arc<dyn Communicator> {
        &self.data_parallel
    }

    /// The ranks over which one copy of the state is sharded: `dp_shard` x `sp`.
    pub fn sharding(&self) -> &Arc<dyn Communicator> {
        &self.sharding
    }
}

/// Gathers every rank's shape and judges them, the same way on every rank.
fn agree(world: &dyn Communicator, shape: MeshShape) -> Result<()> {
    let words = |shape: MeshShape| {
        [shape.dp_replicate, shape.dp_shard, shape.sp].map(|ranks| ranks.cast_signed() as i64)
    };
    let gathered = world.all_gather(&words(shape))?;
    let refused = |rank, problem, remedy: String| {
        Err(Refusal {
            rank: Some(rank),
            argument: "shape",
            problem,
            remedy,
        }
        .into())
    };
    let size = world.size();
    let shapes = gathered.iter().map(|words| {
        let ranks = |i: usize| {
            words
                .get(i)
                .map_or(0, |&ranks| ranks.cast_unsigned() as usize)
        };
        MeshShape {
            dp_replicate: ranks(0),
            dp_shard: ranks(1),
            sp: ranks(2),
        }
    });
    let shapes: Vec<_> = shapes.collect();
    for (rank, shape) in shapes.iter().enumerate() {
        if [shape.dp_replicate, shape.dp_shard, shape.sp].contains(&0) {
            let remedy = "give at least one rank along each axis".to_owned();
            return refused(rank, format!("is {shape}"), remedy);
        }
        if shape.ranks() != Some(size) {
            let problem = format!("is {shape} in a world of {size}");
            let remedy = format!("give axes that multiply to {size}");
            return refused(rank, problem, remedy);
        }
    }
    match shapes.iter().position(|shape| shape != &shapes[0]) {
        None => Ok(()),
        Some(rank) => refused(
            rank,
            format!("is {}, but that of rank 0 is {}", shapes[rank], shapes[0]),
            "give every rank the same shape".to_owned(),
        ),
    }
}
