//! Where ranks stand in a mesh; pure arithmetic.

use crate::error::{Result, refuse};

/// How many ranks a mesh has along each of its three axes.
///
/// Sequence parallelism is the fastest: rank (i, j, k) of the mesh is rank
/// (i * `dp_shard` + j) * `sp` + k of the world, so that the ranks that share a
/// sequence stand side by side, as DeepSpeed's do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MeshShape {
    /// Replicas that hold whole copies of what is sharded.
    pub dp_replicate: usize,
    /// Replicas of the model that share its state.
    pub dp_shard: usize,
    /// Ranks that share one sequence.
    pub sp: usize,
}

/// Where one rank stands, counted from zero along each axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Coordinates {
    /// Along [`MeshShape::dp_replicate`].
    pub dp_replicate: usize,
    /// Along [`MeshShape::dp_shard`].
    pub dp_shard: usize,
    /// Along [`MeshShape::sp`].
    pub sp: usize,
}

/// The axes along which the ranks of a group differ; along the others they are
/// the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Group {
    /// The ranks that share a sequence.
    SequenceParallel,
    /// One part of the sequence, in replicas that share state.
    DataParallelShard,
    /// One part of the sequence, in replicas with copies of the same state.
    DataParallelReplicate,
    /// One part of the sequence, in all replicas.
    DataParallel,
    /// All ranks that share one copy of what is sharded.
    Sharding,
}

impl Group {
    /// Every kind of group.
    pub const ALL: [Group; 5] = [
        Group::SequenceParallel,
        Group::DataParallelShard,
        Group::DataParallelReplicate,
        Group::DataParallel,
        Group::Sharding,
    ];

    /// The coordinates, with zeros along the axes of the group: the same for
    /// all its members.
    fn origin(self, coordinates: Coordinates) -> Coordinates {
        let mut origin = coordinates;
        if matches!(self, Group::DataParallelReplicate | Group::DataParallel) {
            origin.dp_replicate = 0;
        }
        if matches!(
            self,
            Group::DataParallelShard | Group::DataParallel | Group::Sharding
        ) {
            origin.dp_shard = 0;
        }
        if matches!(self, Group::SequenceParallel | Group::Sharding) {
            origin.sp = 0;
        }
        origin
    }
}

impl MeshShape {
    /// How many ranks there are; `None` when that is no number of 64 bits.
    pub fn ranks(&self) -> Option<usize> {
        self.dp_replicate
            .checked_mul(self.dp_shard)?
            .checked_mul(self.sp)
    }

    /// Replicas of the model that each have their own part of a batch.
    pub fn data_parallel(&self) -> usize {
        self.dp_replicate.saturating_mul(self.dp_shard)
    }

    /// Where a rank of the world stands.
    ///
    /// # Errors
    /// When the mesh has no such rank.
    pub fn coordinates(&self, rank: usize) -> Result<Coordinates> {
        match self.ranks() {
            Some(ranks) if rank < ranks => Ok(Coordinates {
                dp_replicate: rank / self.sp / self.dp_shard,
                dp_shard: rank / self.sp % self.dp_shard,
                sp: rank % self.sp,
            }),
            _ => refuse(
                "rank",
                format!("is {rank}, which {self} does not have"),
                "ask for a rank of the mesh",
            ),
        }
    }

    /// The rank of the world that stands there, if one does.
    pub fn rank(&self, at: Coordinates) -> Option<usize> {
        self.ranks()?;
        let inside =
            at.dp_replicate < self.dp_replicate && at.dp_shard < self.dp_shard && at.sp < self.sp;
        inside.then(|| (at.dp_replicate * self.dp_shard + at.dp_shard) * self.sp + at.sp)
    }

    /// All groups of a kind: of each the ranks of the world, in ascending
    /// order. Every rank is in one of them.
    ///
    /// # Errors
    /// When the mesh has no ranks, or more than can be counted.
    pub fn groups(&self, kind: Group) -> Result<Vec<Vec<usize>>> {
        let ranks = match self.ranks() {
            Some(ranks) if ranks > 0 => ranks,
            _ => {
                return refuse(
                    "shape",
                    format!("is {self}"),
                    "give at least one rank along each axis",
                );
            }
        };
        // In ascending order of first members, which are the origins.
        let mut groups: Vec<Vec<usize>> = Vec::new();
        let mut place = vec![None; ranks];
        for rank in 0..ranks {
            let first = self.first(kind, rank)?;
            let group = *place[first].get_or_insert_with(|| {
                groups.push(Vec::new());
                groups.len() - 1
            });
            groups[group].push(rank);
        }
        Ok(groups)
    }

    /// The first member of the group of a rank, which names it among its kind.
    pub(super) fn first(&self, kind: Group, rank: usize) -> Result<usize> {
        let origin = kind.origin(self.coordinates(rank)?);
        Ok(self.rank(origin).unwrap_or(rank))
    }
}

impl std::fmt::Display for MeshShape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            dp_replicate,
            dp_shard,
            sp,
        } = self;
        write!(
            f,
            "{dp_replicate} (dp_replicate) x {dp_shard} (dp_shard) x {sp} (sp)"
        )
    }
}
