//! Groups of ranks: how a communicator is split, and what a mesh makes of it.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod world;

use rstest::rstest;
use std::{sync::Arc, thread, time::Duration};
use tch::{Device, Kind, Tensor};
use ulysses::{
    Communicator, CommunicatorError, CountingCommunicator, Mesh, MeshShape, ThreadCommunicator,
    mesh::{Coordinates, Group},
};
use world::on_ranks;

/// The ranks of `whole` that are in `group`, in its order.
fn members(whole: &dyn Communicator, group: &dyn Communicator) -> Vec<usize> {
    let gathered = group.all_gather(&[whole.rank() as i64]).unwrap();
    assert_eq!(gathered[group.rank()], [whole.rank() as i64]);
    gathered
        .concat()
        .into_iter()
        .map(|rank| rank as usize)
        .collect()
}

#[test]
fn ranks_of_one_color_form_a_group_in_rank_order() {
    let groups = on_ranks(5, |world| {
        let rank = world.rank();
        let group = world
            .split([usize::MAX, 0, usize::MAX, 7, 0][rank])
            .unwrap();
        // Each group does as much as it likes.
        for _ in 0..rank % 2 {
            group.all_gather(&[1]).unwrap();
        }
        for _ in 0..1 - rank % 2 {
            group.all_gather(&[1]).unwrap();
        }
        let inner = group.split(group.rank() % 2).unwrap();
        (members(&*world, &*group), members(&*world, &*inner))
    });
    assert_eq!(
        groups,
        [
            (vec![0, 2], vec![0]),
            (vec![1, 4], vec![1]),
            (vec![0, 2], vec![2]),
            (vec![3], vec![3]),
            (vec![1, 4], vec![4]),
        ]
    );
}

#[test]
fn blocks_travel_within_a_group() {
    on_ranks(4, |world| {
        let group = world.split(world.rank() / 2).unwrap();
        let number = |n: usize| Tensor::from_slice(&[n as i64]);
        let send: Vec<_> = (0..2)
            .map(|to| vec![number(10 * world.rank() + to)])
            .collect();
        let receive: Vec<_> = (0..2).map(|_| vec![number(0)]).collect();
        group.all_to_all(&send, &receive).unwrap();
        for (from, got) in receive.iter().enumerate() {
            let sender = world.rank() / 2 * 2 + from;
            assert_eq!(got[0], number(10 * sender + group.rank()));
        }
    });
}

/// A group without its parent.
#[test]
fn a_group_outlives_the_communicator_it_was_split_from() {
    on_ranks(2, |world| {
        let group = world.split(0).unwrap();
        drop(world);
        assert_eq!(group.all_gather(&[]).unwrap().len(), 2);
    });
}

#[rstest]
#[case::the_group(false)]
#[case::the_world(true)]
fn who_abandons_is_named_in_the_groups(#[case] world_too: bool) {
    let results = on_ranks(4, |world| {
        let group = world.split(world.rank() / 2).unwrap();
        if world.rank() == 1 {
            let whole = if world_too { &world } else { &group };
            whole.abandon("it has had enough");
            return Ok(Vec::new());
        }
        group.all_gather(&[7])
    });
    let due = CommunicatorError::Left {
        operation: "all_gather",
        rank: 1,
        reason: "it has had enough".to_owned(),
    };
    assert_eq!(results[0], Err(due));
    // The other group does not notice.
    assert_eq!(results[2], Ok(vec![vec![7], vec![7]]));
    assert_eq!(results[3], results[2]);
}

#[test]
fn a_group_waits_as_long_as_its_parent_did() {
    let limit = Duration::from_millis(50);
    let ranks: Vec<_> = ThreadCommunicator::world(2)
        .into_iter()
        .map(|end| {
            thread::spawn(move || {
                let end = end.with_time_limit(limit);
                let group = end.split(0).unwrap();
                if end.rank() == 1 {
                    return (Some(group), None);
                }
                (None, group.all_gather(&[]).err())
            })
        })
        .collect();
    // What rank 1 returns keeps its end alive.
    let results: Vec<_> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
    let due = CommunicatorError::TimedOut {
        operation: "all_gather",
        missing: vec![1],
        limit,
    };
    assert_eq!(results[0].1, Some(due));
    assert!(results[1].0.is_some());
}

#[test]
fn to_split_while_another_gathers_is_an_error_on_every_rank() {
    let errors = on_ranks(2, |world| match world.rank() {
        0 => world.split(0).err().unwrap().to_string(),
        _ => world.all_gather(&[0]).unwrap_err().to_string(),
    });
    let due = "rank 1 entered all_gather while rank 0 was in split; make every rank do the same";
    assert_eq!(errors, [due, due]);
}

#[test]
fn the_traffic_of_groups_is_counted_with_their_parents() {
    on_ranks(4, |world| {
        let counting = Arc::new(CountingCommunicator::new(world));
        let group = counting.split(counting.rank() % 2).unwrap();
        assert_eq!(counting.traffic(), ulysses::Traffic::default());
        group.all_gather(&[1, 2]).unwrap();
        let block = || vec![Tensor::zeros([3], (Kind::Float, Device::Cpu))];
        group
            .all_to_all(&[block(), block()], &[block(), block()])
            .unwrap();
        let traffic = counting.traffic();
        assert_eq!(
            (traffic.all_gather_calls, traffic.all_gather_bytes),
            (1, 16)
        );
        assert_eq!((traffic.all_to_all_calls, traffic.off_rank_bytes), (1, 12));
    });
}

const SHAPE: MeshShape = MeshShape {
    dp_replicate: 2,
    dp_shard: 3,
    sp: 2,
};

#[test]
fn the_ranks_that_share_a_sequence_stand_side_by_side() {
    let groups = |kind| SHAPE.groups(kind).unwrap();
    let pairs: Vec<_> = (0..6).map(|i| vec![2 * i, 2 * i + 1]).collect();
    assert_eq!(groups(Group::SequenceParallel), pairs);
    assert_eq!(
        groups(Group::DataParallelShard),
        [[0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9, 11]]
    );
    assert_eq!(
        groups(Group::DataParallelReplicate),
        [[0, 6], [1, 7], [2, 8], [3, 9], [4, 10], [5, 11]]
    );
    assert_eq!(
        groups(Group::DataParallel),
        [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]
    );
    assert_eq!(
        groups(Group::Sharding),
        [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    );
}

#[test]
fn coordinates_and_ranks_are_each_others_inverse() {
    for rank in 0..12 {
        assert_eq!(SHAPE.rank(SHAPE.coordinates(rank).unwrap()), Some(rank));
    }
    let last = Coordinates {
        dp_replicate: 1,
        dp_shard: 2,
        sp: 1,
    };
    assert_eq!(SHAPE.coordinates(11), Ok(last));
    assert_eq!(SHAPE.rank(Coordinates { sp: 2, ..last }), None);
    assert_eq!(
        SHAPE.coordinates(12).unwrap_err().to_string(),
        "`rank` is 12, which 2 (dp_replicate) x 3 (dp_shard) x 2 (sp) does not have; \
         ask for a rank of the mesh"
    );
    let none = MeshShape { sp: 0, ..SHAPE };
    assert!(none.coordinates(0).is_err() && none.groups(Group::Sharding).is_err());
}

#[rstest]
#[case(1, 1, 1)]
#[case(1, 1, 4)]
#[case(4, 1, 1)]
#[case(2, 1, 2)]
#[case(1, 2, 2)]
#[case(2, 2, 1)]
#[case(2, 2, 2)]
fn a_mesh_has_the_groups_of_its_shape(
    #[case] dp_replicate: usize,
    #[case] dp_shard: usize,
    #[case] sp: usize,
) {
    let shape = MeshShape {
        dp_replicate,
        dp_shard,
        sp,
    };
    on_ranks(shape.ranks().unwrap(), |world| {
        let mesh = Mesh::new(Arc::clone(&world), shape).unwrap();
        assert_eq!(mesh.shape(), shape);
        assert_eq!(mesh.coordinates(), shape.coordinates(world.rank()).unwrap());
        for (kind, group) in [
            (Group::SequenceParallel, mesh.sequence_parallel()),
            (Group::DataParallelShard, mesh.data_parallel_shard()),
            (Group::DataParallelReplicate, mesh.data_parallel_replicate()),
            (Group::DataParallel, mesh.data_parallel()),
            (Group::Sharding, mesh.sharding()),
            (Group::SequenceParallel, mesh.sequence_parallel_group()),
            (Group::SequenceParallel, mesh.model_parallel_group()),
        ] {
            let groups = shape.groups(kind).unwrap();
            let due = groups
                .into_iter()
                .find(|group| group.contains(&world.rank()));
            assert_eq!(Some(members(&*world, &**group)), due, "{kind:?}");
        }
        let all = members(&*world, &**mesh.sequence_data_parallel_group());
        assert!(all.into_iter().eq(0..world.size()));
        assert_eq!(mesh.sequence_parallel_rank(), world.rank() % sp);
        assert_eq!(mesh.sequence_parallel_world_size(), sp);
        assert_eq!(mesh.model_parallel_rank(), world.rank() % sp);
        assert_eq!(mesh.model_parallel_world_size(), sp);
        assert_eq!(mesh.sequence_data_parallel_rank(), world.rank());
        assert_eq!(mesh.sequence_data_parallel_world_size(), world.size());
    });
}

/// Each of three ranks asks for a shape; all get the same refusal.
#[rstest]
#[case::zero(
    [[1, 1, 3], [1, 0, 3], [1, 1, 3]],
    "rank 1: `shape` is 1 (dp_replicate) x 0 (dp_shard) x 3 (sp); \
     give at least one rank along each axis"
)]
#[case::too_many(
    [[1, 2, 2]; 3],
    "rank 0: `shape` is 1 (dp_replicate) x 2 (dp_shard) x 2 (sp) in a world of 3; \
     give axes that multiply to 3"
)]
#[case::too_few(
    [[1, 1, 1]; 3],
    "rank 0: `shape` is 1 (dp_replicate) x 1 (dp_shard) x 1 (sp) in a world of 3; \
     give axes that multiply to 3"
)]
#[case::overflow(
    [[1, 1, 3], [1, 1, 3], [1 << 40, 1 << 40, 3]],
    "rank 2: `shape` is 1099511627776 (dp_replicate) x 1099511627776 (dp_shard) x 3 (sp) \
     in a world of 3; give axes that multiply to 3"
)]
#[case::different(
    [[1, 1, 3], [1, 1, 3], [1, 3, 1]],
    "rank 2: `shape` is 1 (dp_replicate) x 3 (dp_shard) x 1 (sp), but that of rank 0 is \
     1 (dp_replicate) x 1 (dp_shard) x 3 (sp); give every rank the same shape"
)]
fn an_inconsistent_size_is_the_same_refusal_on_every_rank(
    #[case] shapes: [[usize; 3]; 3],
    #[case] due: &str,
) {
    let errors = on_ranks(3, |world| {
        let [dp_replicate, dp_shard, sp] = shapes[world.rank()];
        let shape = MeshShape {
            dp_replicate,
            dp_shard,
            sp,
        };
        let error = Mesh::new(Arc::clone(&world), shape).err().unwrap();
        assert!(world.all_gather(&[]).is_ok());
        error.to_string()
    });
    assert_eq!(errors, [due; 3]);
}
