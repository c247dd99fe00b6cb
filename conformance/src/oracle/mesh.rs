//! Where ranks stand in a mesh, and with whom.
//!
//! Rank r of the world has the coordinates (i, j, k) with
//! `r = (i dp_shard + j) sp + k`. A group is the ranks whose coordinates are the
//! same along the axes that are not the group's.

use std::collections::BTreeMap;

use fixtures::MeshCase;
use fixtures::mesh::GROUPS;

use super::due::{DueAnswer, DueTensor};
use crate::diagnosis::Mistake;

/// The mistakes that are told by what they make of the answer.
pub(super) const MISTAKES: [Mistake; 5] = [
    Mistake::GroupsStrided,
    Mistake::AxesSwapped,
    Mistake::StateNotOverSequence,
    Mistake::SumOverWorld,
    Mistake::WorldRankInGroup,
];

/// Along which of the axes replicate, shard and sequence the members of each
/// group differ.
const ALONG: [[bool; 3]; 5] = [
    [false, false, true],
    [false, true, false],
    [true, false, false],
    [true, true, false],
    [false, true, true],
];

/// What is due; or what would come by a mistake.
pub(super) fn due(case: &MeshCase, mistake: Option<Mistake>) -> DueAnswer {
    let coordinates: Vec<[usize; 3]> = (0..case.world)
        .map(|rank| coordinates(case, rank, mistake))
        .collect();
    let ranks = (0..case.world).map(|rank| of_rank(case, &coordinates, rank, mistake));
    DueAnswer {
        ranks: ranks.collect(),
        ..DueAnswer::default()
    }
}

fn coordinates(case: &MeshCase, rank: usize, mistake: Option<Mistake>) -> [usize; 3] {
    let MeshCase {
        dp_replicate: replicas,
        dp_shard: shards,
        sp,
        ..
    } = *case;
    match mistake {
        // The sequence is the slowest axis.
        Some(Mistake::GroupsStrided) => [
            rank / shards % replicas,
            rank % shards,
            rank / shards / replicas,
        ],
        Some(Mistake::AxesSwapped) => [rank / sp % replicas, rank / sp / replicas, rank % sp],
        _ => [rank / sp / shards, rank / sp % shards, rank % sp],
    }
}

fn of_rank(
    case: &MeshCase,
    coordinates: &[[usize; 3]],
    rank: usize,
    mistake: Option<Mistake>,
) -> BTreeMap<String, DueTensor> {
    let own = coordinates[rank];
    let members = |along: [bool; 3]| -> Vec<usize> {
        let is_member = |&other: &usize| {
            (0..3).all(|axis| along[axis] || coordinates[other][axis] == own[axis])
        };
        (0..case.world).filter(is_member).collect()
    };
    let mut tensors = BTreeMap::new();
    let mut insert = |name: String, numbers: &[usize]| {
        let numbers: Vec<i64> = numbers.iter().map(|&number| number as i64).collect();
        tensors.insert(name, DueTensor::exactly(&[numbers.len()], &numbers));
    };
    insert("coordinates".to_owned(), &own);
    for (name, along) in GROUPS.into_iter().zip(ALONG) {
        let members = match (mistake, name) {
            (Some(Mistake::StateNotOverSequence), "sharding") => members([false, true, false]),
            _ => members(along),
        };
        if case.has_sums {
            let values = case.values();
            let added: i64 = match mistake {
                Some(Mistake::SumOverWorld) => values.iter().sum(),
                _ => members.iter().map(|&member| values[member]).sum(),
            };
            insert(format!("sum.{name}"), &[added as usize]);
        }
        insert(name.to_owned(), &members);
    }
    if case.has_mpu {
        let sequence = members(ALONG[0]);
        let place = match mistake {
            Some(Mistake::WorldRankInGroup) => rank,
            _ => sequence.iter().position(|&r| r == rank).unwrap_or_default(),
        };
        let size = sequence.len();
        let mpu = [place, size, rank, case.world, place, size];
        insert("mpu".to_owned(), &mpu);
    }
    tensors
}
