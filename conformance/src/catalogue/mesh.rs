//! Where each rank of a world stands, and with whom.

use fixtures::MeshCase;
use fixtures::mesh::MeshDefect;

/// Those of a world size: every way to cut it, and everything that can be wrong.
pub(super) fn cases(world: usize) -> impl Iterator<Item = MeshCase> {
    let defects = [MeshDefect::Product, MeshDefect::Zero, MeshDefect::Unlike];
    let defects = defects
        .into_iter()
        .filter(move |&defect| world > 1 || defect != MeshDefect::Unlike);
    let bad = defects.map(move |defect| MeshCase {
        defect: Some(defect),
        ..plain([1, 1, world])
    });
    cuts(world)
        .flat_map(|sizes| [plain(sizes), full(sizes)])
        .chain(bad)
}

/// More ranks than are otherwise asked.
pub(super) fn many_ranks() -> impl Iterator<Item = MeshCase> {
    let six = [[1, 2, 3], [3, 1, 2], [3, 2, 1]];
    six.into_iter().chain(cuts(8)).map(full)
}

/// Every three sizes that multiply to the world.
fn cuts(world: usize) -> impl Iterator<Item = [usize; 3]> {
    let divisors = move |of: usize| (1..=of).filter(move |size| of.is_multiple_of(*size));
    divisors(world).flat_map(move |replicas| {
        let rest = world / replicas;
        divisors(rest).map(move |shards| [replicas, shards, rest / shards])
    })
}

fn plain([dp_replicate, dp_shard, sp]: [usize; 3]) -> MeshCase {
    MeshCase {
        world: dp_replicate * dp_shard * sp,
        dp_replicate,
        dp_shard,
        sp,
        seed: 0,
        has_mpu: false,
        has_sums: false,
        defect: None,
    }
}

fn full(sizes: [usize; 3]) -> MeshCase {
    MeshCase {
        has_mpu: true,
        has_sums: true,
        ..plain(sizes)
    }
}
