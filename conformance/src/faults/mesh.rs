//! Mistakes in where ranks stand, and with whom.

use fixtures::exchange::{AskedInfo, Tensors};
use fixtures::mesh::{GROUPS, MeshDefect, MeshInfo};
use fixtures::{Array, Case, MeshCase};
use tch::Device;
use ulysses::MeshShape;
use ulysses::mesh::Group;

use super::rank::{Halt, Staged};
use super::{Fault, Made, Told};
use crate::diagnosis::Mistake;
use crate::implementation::answer_of_profile;

pub(super) const FAULTS: &[Fault] = &[
    Fault {
        name: "sequence-is-slowest",
        mistake: Mistake::GroupsStrided,
        effect: "the ranks of a sequence stand on other hosts, and other ranks than DeepSpeed's share it",
        source: None,
        made: Made::InProfile {
            applies: |case| is(case, |case| case.sp > 1),
            answer: |told| {
                // (k * replicas + i) * shards + j of the world.
                renumbered(told, |info, rank| {
                    let (j, rest) = (rank % info.dp_shard, rank / info.dp_shard);
                    [rest % info.dp_replicate, j, rest / info.dp_replicate]
                })
            },
        },
    },
    Fault {
        name: "replicas-and-shards-swapped",
        mistake: Mistake::AxesSwapped,
        effect: "copies are made where state is to be sharded",
        source: None,
        made: Made::InProfile {
            applies: |case| is(case, |case| case.dp_replicate > 1 && case.dp_shard > 1),
            answer: |told| {
                // (j * replicas + i) * sp + k of the world.
                renumbered(told, |info, rank| {
                    let (k, rest) = (rank % info.sp, rank / info.sp);
                    [rest % info.dp_replicate, rest / info.dp_replicate, k]
                })
            },
        },
    },
    Fault {
        name: "state-not-over-sequence",
        mistake: Mistake::StateNotOverSequence,
        effect: "each rank of a sequence keeps its own gradient, and parameters drift apart",
        source: Some("VeOmni#1059"),
        made: Made::InProfile {
            applies: |case| is(case, |case| case.sp > 1),
            answer: |told| {
                let mut answer = told.right()?;
                for [from, to] in [
                    ["data_parallel_shard", "sharding"],
                    ["sum.data_parallel_shard", "sum.sharding"],
                ] {
                    if let Some(array) = answer.get(from).cloned() {
                        answer.insert(to.to_owned(), array);
                    }
                }
                Ok(answer)
            },
        },
    },
    Fault {
        name: "sum-over-world",
        mistake: Mistake::SumOverWorld,
        effect: "gradients of other sequences are added up where one sequence's are due",
        source: Some("Megatron-LM#673"),
        made: Made::InProfile {
            applies: |case| is(case, |case| case.has_sums),
            answer: |told| {
                let all = values(told)?.iter().sum();
                let mut answer = told.right()?;
                for (name, array) in &mut answer {
                    if name.starts_with("sum.") {
                        *array = Array::from_i64(&[1], &[all]);
                    }
                }
                Ok(answer)
            },
        },
    },
    Fault {
        name: "world-rank-in-group",
        mistake: Mistake::WorldRankInGroup,
        effect: "an index out of range, or another rank's shard, as soon as there are several groups",
        source: Some("PyTorch#120213"),
        made: Made::InProfile {
            applies: |case| is(case, |case| case.has_mpu),
            answer: |told| {
                let mut answer = told.right()?;
                if let Some(mpu) = answer.get_mut("mpu") {
                    let mut numbers: Vec<i64> = mpu.to_f64().iter().map(|&x| x as i64).collect();
                    for place in [0, 4] {
                        numbers[place] = told.info.rank as i64;
                    }
                    *mpu = Array::from_i64(&mpu.shape, &numbers);
                }
                Ok(answer)
            },
        },
    },
    Fault {
        name: "mesh-sizes-unchecked",
        mistake: Mistake::BadInputTaken,
        effect: "a mesh of other sizes than were asked for",
        source: None,
        made: Made::InProfile {
            applies: |case| matches!(case, Case::Mesh(case) if case.defect == Some(MeshDefect::Product)),
            answer: |told| {
                let mut info = told.info.clone();
                if let AskedInfo::Mesh(asked) = &mut info.asked {
                    asked.sp = info.world / asked.dp_replicate / asked.dp_shard;
                }
                answer_of_profile(told.communicator, Device::Cpu, &info, told.inputs)
                    .map_err(Halt::Said)
            },
        },
    },
];

/// Whether this is a good question of the profile to several ranks.
fn is(case: &Case, of: fn(&MeshCase) -> bool) -> bool {
    matches!(case, Case::Mesh(case) if case.world > 1 && case.defect.is_none() && of(case))
}

fn info<'a>(told: &'a Told<'_>) -> Staged<&'a MeshInfo> {
    match &told.info.asked {
        AskedInfo::Mesh(info) => Ok(info),
        _ => Err(Halt::Said("this is another profile".to_owned())),
    }
}

/// The numbers of all ranks, where there are some.
fn values(told: &Told<'_>) -> Staged<Vec<i64>> {
    let own = told.inputs.get("value").map(Array::to_f64);
    let own = own.and_then(|own| own.first().copied()).unwrap_or(0.0);
    Ok(told.communicator.all_gather(&[own as i64])?.concat())
}

/// What a rank answers that takes the ranks of the world in another order:
/// `places` has their coordinates.
fn renumbered(told: &Told<'_>, places: fn(&MeshInfo, usize) -> [usize; 3]) -> Staged<Tensors> {
    let info = info(told)?;
    let values = values(told)?;
    let shape = MeshShape {
        dp_replicate: info.dp_replicate,
        dp_shard: info.dp_shard,
        sp: info.sp,
    };
    let number = |rank: usize| {
        let [i, j, k] = places(info, rank);
        (i * info.dp_shard + j) * info.sp + k
    };
    let (rank, world) = (told.info.rank, told.info.world);
    let mut answer = Tensors::new();
    let mut insert = |name: String, numbers: &[usize]| {
        let numbers: Vec<i64> = numbers.iter().map(|&number| number as i64).collect();
        answer.insert(name, Array::from_i64(&[numbers.len()], &numbers));
    };
    insert("coordinates".to_owned(), &places(info, rank));
    for (name, group) in GROUPS.into_iter().zip(Group::ALL) {
        let groups = shape.groups(group)?;
        let own = groups.iter().find(|group| group.contains(&number(rank)));
        let members: Vec<usize> = (0..world)
            .filter(|&other| own.is_some_and(|own| own.contains(&number(other))))
            .collect();
        if info.sums {
            let sum: i64 = members.iter().map(|&member| values[member]).sum();
            insert(format!("sum.{name}"), &[sum as usize]);
        }
        if info.mpu && group == Group::SequenceParallel {
            let place = members.iter().position(|&member| member == rank);
            let place = place.unwrap_or_default();
            let size = members.len();
            insert("mpu".to_owned(), &[place, size, rank, world, place, size]);
        }
        insert(name.to_owned(), &members);
    }
    Ok(answer)
}
