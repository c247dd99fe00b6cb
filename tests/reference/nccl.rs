//! Ranks over NCCL's C interface, which a stand-in for the library answers here:
//! `nccl_double.c`, compiled for each test. It moves memory of the host, so the
//! communicators are for the CPU.
//!
//! The stand-in is named in the environment, so each test starts this program
//! again, alone or under mpirun: the copies run the body.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod copies;
mod double;
mod trials;
mod world;

use rstest::rstest;
use std::{
    env, fs, mem,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    process::Command,
    sync::{Arc, Barrier},
    thread,
    time::Duration,
};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;
use ulysses::{
    Communicator, CommunicatorError, FolderRendezvous, HostRendezvous, MpiWorld, NcclCommunicator,
    Rendezvous, ThreadCommunicator, nccl_serves,
};

/// For one copy. They take a second or two.
const COPY_LIMIT: Duration = Duration::from_secs(120);
/// Where all ranks come: longer than a copy has.
const PATIENT: Duration = Duration::from_secs(300);
/// Where a rank does not come.
const SHORT: Duration = Duration::from_millis(500);

/// Set in the copies.
const COPY: &str = "ULYSSES_TEST_COPY";

fn is_copy() -> bool {
    env::var_os(COPY).is_some()
}

/// Runs `command`, a copy of this program, with the stand-in and `variables`;
/// gives what it printed, and whether every id was cleared up.
#[track_caller]
fn with_double(mut command: Command, variables: &[(&str, &str)]) -> bool {
    let folder = TempDir::new().unwrap();
    // In memory where there is such a folder: gibibytes go through it.
    let memory = Path::new("/dev/shm");
    let ids = match memory.is_dir() {
        true => TempDir::new_in(memory),
        false => TempDir::new(),
    };
    let ids = ids.unwrap();
    command
        .env("ULYSSES_NCCL", double::compile(folder.path(), &[]))
        .env("TMPDIR", ids.path())
        .env(COPY, "1")
        .envs(variables.iter().copied());
    let (status, output) = copies::finish(&mut command, COPY_LIMIT);
    assert!(status.success(), "{status}\n{output}");
    assert!(output.contains("1 passed"), "{output}");
    fs::read_dir(ids.path()).unwrap().next().is_none()
}

/// Runs `body` in a copy with the stand-in; it leaves nothing behind.
#[track_caller]
fn alone(name: &str, variables: &[(&str, &str)], body: impl FnOnce()) {
    match is_copy() {
        true => body(),
        false => assert!(with_double(copies::alone(name), variables), "ids are left"),
    }
}

/// How ranks that are threads find each other.
#[derive(Clone, Copy, Debug)]
enum Meeting {
    Threads,
    Folder,
}

/// Runs `body` on each of `size` ranks; gives what each returned.
fn on_ranks<T: Send>(
    size: usize,
    meeting: Meeting,
    limit: Duration,
    body: impl Fn(NcclCommunicator) -> T + Sync,
) -> Vec<T> {
    meet(size, meeting, limit, |rendezvous| {
        body(NcclCommunicator::new(rendezvous, Device::Cpu, limit).unwrap())
    })
}

fn meet<T: Send>(
    size: usize,
    meeting: Meeting,
    limit: Duration,
    body: impl Fn(Arc<dyn Rendezvous>) -> T + Sync,
) -> Vec<T> {
    tch::set_num_threads(1);
    let (folder, body) = (TempDir::new().unwrap(), &body);
    let results = thread::scope(|scope| {
        let folder = folder.path();
        let ends = ThreadCommunicator::world(size).into_iter().enumerate();
        let ranks: Vec<_> = ends
            .map(|(rank, end)| {
                scope.spawn(move || {
                    body(match meeting {
                        Meeting::Threads => {
                            Arc::new(HostRendezvous::new(Arc::new(end.with_time_limit(limit))))
                        }
                        Meeting::Folder => {
                            Arc::new(FolderRendezvous::new(folder, (rank, size), PATIENT).unwrap())
                        }
                    })
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    let left = fs::read_dir(folder.path()).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.is_empty(), "{left:?}");
    results
}

fn floats(length: i64) -> Tensor {
    Tensor::zeros([length], (Kind::Float, Device::Cpu))
}

/// A list of one block of `length` numbers for each peer, and none for itself.
fn lists(communicator: &dyn Communicator, length: i64) -> Vec<Vec<Tensor>> {
    (0..communicator.size())
        .map(|peer| match peer == communicator.rank() {
            true => vec![],
            false => vec![floats(length)],
        })
        .collect()
}

fn all_to_all(communicator: &dyn Communicator, length: i64) -> Result<(), CommunicatorError> {
    let [send, receive] = [(), ()].map(|()| lists(communicator, length));
    communicator.all_to_all(&send, &receive)
}

#[test]
fn blocks_and_words_arrive() {
    alone("blocks_and_words_arrive", &[], || {
        for size in 1..=4 {
            on_ranks(size, Meeting::Threads, PATIENT, |world| {
                trials::exchange(&world, |_, _| 5);
                trials::exchange(&world, |from, to| 2 * from + to);
                let nothing: Vec<Vec<Tensor>> = (0..size).map(|_| vec![]).collect();
                world.all_to_all(&nothing, &nothing).unwrap();
                trials::gather(&world);
            });
        }
    });
}

/// The last two are not what their memory holds.
#[test]
fn every_dtype_arrives() {
    alone("every_dtype_arrives", &[], || {
        on_ranks(3, Meeting::Threads, PATIENT, |world| {
            let rank = world.rank() as i64;
            let kinds = [
                Kind::Int64,
                Kind::Int,
                Kind::Int16,
                Kind::Int8,
                Kind::Uint8,
                Kind::Bool,
                Kind::ComplexFloat,
                Kind::ComplexDouble,
            ];
            let brought = |rank: i64| -> Vec<Tensor> {
                let numbers = Tensor::arange_start(rank, rank + 6, (Kind::Int64, Device::Cpu));
                let plain = kinds.iter().map(|&kind| numbers.to_kind(kind));
                let pairs = numbers.to_kind(Kind::Double).view([3, 2]);
                let conjugate = pairs.view_as_complex().conj();
                let negative = conjugate.view_as_real_copy().internal_neg_view();
                plain.chain([conjugate, negative]).collect()
            };
            let send: Vec<_> = (0..3).map(|_| brought(rank)).collect();
            let receive: Vec<_> = (0..3)
                .map(|_| brought(9).iter().map(Tensor::zeros_like).collect())
                .collect();
            let receive: Vec<Vec<Tensor>> = receive;
            world.all_to_all(&send, &receive).unwrap();
            for (peer, got) in receive.iter().enumerate() {
                for (got, due) in got.iter().zip(brought(peer as i64)) {
                    assert!(got.equal(&due), "{:?} of rank {peer}", due.kind());
                }
            }
        });
    });
}

#[test]
fn attention_has_the_bits_of_one_process() {
    alone("attention_has_the_bits_of_one_process", &[], || {
        for size in 1..=4 {
            on_ranks(size, Meeting::Folder, PATIENT, |world| {
                trials::attention(&(Arc::new(world) as Arc<dyn Communicator>));
            });
        }
    });
}

#[rstest]
#[case::threads(Meeting::Threads)]
#[case::folder(Meeting::Folder)]
fn ranks_of_one_color_form_a_group_in_rank_order(#[case] meeting: Meeting) {
    let case = match meeting {
        Meeting::Threads => "case_1_threads",
        Meeting::Folder => "case_2_folder",
    };
    let name = format!("ranks_of_one_color_form_a_group_in_rank_order::{case}");
    alone(&name, &[], || {
        for size in [1, 3, 4] {
            on_ranks(size, meeting, PATIENT, |world| trials::groups(&world));
        }
    });
}

/// As in production: the id goes over MPI, each rank is a process.
fn over_mpi(name: &str, sizes: &[usize], body: fn(&NcclCommunicator)) {
    if copies::is_under_mpirun() {
        tch::set_num_threads(1);
        let world = MpiWorld::initialize().unwrap();
        let rendezvous =
            HostRendezvous::new(Arc::new(world.communicator().with_time_limit(SHORT * 4)));
        let communicator =
            NcclCommunicator::new(Arc::new(rendezvous), Device::Cpu, SHORT * 4).unwrap();
        body(&communicator);
        return;
    }
    for &size in sizes {
        with_double(copies::under_mpirun(name, size), &[]);
    }
}

#[test]
fn ranks_may_be_processes() {
    over_mpi("ranks_may_be_processes", &[2, 3], |world| {
        trials::exchange(world, |from, to| 2 * from + to);
        trials::gather(world);
        trials::groups(world);
    });
}

#[test]
fn attention_over_processes_has_the_bits_of_one_process() {
    let name = "attention_over_processes_has_the_bits_of_one_process";
    if !copies::is_under_mpirun() {
        with_double(copies::under_mpirun(name, 2), &[]);
        return;
    }
    tch::set_num_threads(1);
    let mpi = MpiWorld::initialize().unwrap();
    let rendezvous = Arc::new(HostRendezvous::new(Arc::new(mpi.communicator())));
    let world = NcclCommunicator::new(rendezvous, Device::Cpu, PATIENT).unwrap();
    trials::attention(&(Arc::new(world) as Arc<dyn Communicator>));
}

/// Rank 2 stays away, and leaves in the end without a word.
#[track_caller]
fn names_rank_2(world: &NcclCommunicator, limit: Duration) {
    let due = CommunicatorError::TimedOut {
        operation: "all_to_all",
        missing: vec![2],
        limit,
    };
    assert_eq!(all_to_all(world, 9).unwrap_err(), due);
    assert_eq!(
        world.all_gather(&[1]).unwrap_err().to_string(),
        format!(
            "all_gather: the communicator cannot be used: \
             all_to_all was not done within {limit:?}: rank 2 did not come"
        )
    );
}

#[rstest]
#[case::threads(Meeting::Threads)]
#[case::folder(Meeting::Folder)]
fn a_rank_that_does_not_come_is_named_by_all_others(#[case] meeting: Meeting) {
    let case = match meeting {
        Meeting::Threads => "case_1_threads",
        Meeting::Folder => "case_2_folder",
    };
    let name = format!("a_rank_that_does_not_come_is_named_by_all_others::{case}");
    alone(&name, &[], || {
        let over = Barrier::new(3);
        on_ranks(3, meeting, SHORT, |world| {
            all_to_all(&world, 5).unwrap();
            if world.rank() != 2 {
                names_rank_2(&world, SHORT);
            }
            over.wait();
        });
    });
}

/// Among processes. The time is up for those that came, and mpirun ends all with
/// the first that ends without MPI's end.
#[test]
fn a_process_that_does_not_come_is_named_by_all_others() {
    let name = "a_process_that_does_not_come_is_named_by_all_others";
    let limit = SHORT * 4;
    if copies::is_under_mpirun() {
        let mpi = MpiWorld::initialize().unwrap();
        let host = Arc::new(mpi.communicator().with_time_limit(limit));
        let rendezvous = Arc::new(HostRendezvous::new(host));
        let world = NcclCommunicator::new(rendezvous, Device::Cpu, limit).unwrap();
        if world.rank() != 2 {
            names_rank_2(&world, limit);
            println!("rank {} named it", world.rank());
        }
        thread::sleep(limit * 4);
        return;
    }
    let folder = TempDir::new().unwrap();
    let mut command = copies::under_mpirun(name, 3);
    command.env("ULYSSES_NCCL", double::compile(folder.path(), &[]));
    let (status, output) = copies::finish(&mut command, COPY_LIMIT);
    for rank in [0, 1] {
        let line = format!("rank {rank} named it");
        assert!(output.contains(&line), "{status}\n{output}");
    }
}

#[test]
fn a_rank_that_does_not_come_to_the_beginning_is_named() {
    let name = "a_rank_that_does_not_come_to_the_beginning_is_named";
    let body = || {
        let over = Barrier::new(3);
        meet(3, Meeting::Folder, SHORT, |rendezvous| {
            let rank = rendezvous.rank();
            if rank != 1 {
                let error = NcclCommunicator::new(rendezvous.clone(), Device::Cpu, SHORT).err();
                let due = CommunicatorError::TimedOut {
                    operation: "ncclCommInitRankConfig",
                    missing: vec![1],
                    limit: SHORT,
                };
                assert_eq!(error, Some(due), "rank {rank}");
            }
            over.wait();
        });
    };
    match is_copy() {
        true => body(),
        // An id that nobody took is left.
        false => assert!(!with_double(copies::alone(name), &[])),
    }
}

/// Rank 1's second group fails: it gives NCCL's words, which the others learn
/// where ranks can be told, long before their time is up.
#[test]
fn an_error_of_nccl_is_named_and_told() {
    let name = "an_error_of_nccl_is_named_and_told";
    alone(name, &[("NCCL_DOUBLE_FAIL", "1:2")], || {
        let words = "all_to_all: NCCL: remote process exited or there was a network error: \
                     the double was told to fail here";
        let errors = on_ranks(3, Meeting::Folder, PATIENT, |world| {
            all_to_all(&world, 5).unwrap();
            let error = all_to_all(&world, 5).unwrap_err();
            let unusable = format!("all_to_all: the communicator cannot be used: {error}");
            let again = all_to_all(&world, 5).unwrap_err();
            assert_eq!(again.to_string(), unusable);
            error
        });
        assert_eq!(errors[1].to_string(), words);
        for rank in [0, 2] {
            let due = CommunicatorError::Left {
                operation: "all_to_all",
                rank: 1,
                reason: words.to_owned(),
            };
            assert_eq!(errors[rank], due);
        }
    });
}

/// NCCL would wait for ever: the roll call finds out. Rank 0 gets all that it
/// waits for, and meets the others in the next exchange.
#[test]
fn blocks_that_do_not_fit_are_named() {
    alone("blocks_that_do_not_fit_are_named", &[], || {
        let errors = on_ranks(3, Meeting::Threads, SHORT, |world| {
            all_to_all(&world, 5).unwrap();
            // Rank 1 sends rank 2 two numbers where five are due.
            let (send, receive) = (lists(&world, 5), lists(&world, 5));
            let mut send = send;
            if world.rank() == 1 {
                send[2] = vec![floats(2)];
            }
            let done = world.all_to_all(&send, &receive);
            assert_eq!(done.is_ok(), world.rank() == 0);
            let error = done.and_then(|()| all_to_all(&world, 5)).unwrap_err();
            error.to_string()
        });
        let due = "rank 1 sent rank 2 8 bytes where 20 were due in all_to_all; \
                   make every rank do the same";
        assert_eq!(errors, [due; 3].map(str::to_owned));
    });
}

#[test]
fn ranks_that_have_lost_step_are_named() {
    alone("ranks_that_have_lost_step_are_named", &[], || {
        let errors = on_ranks(2, Meeting::Threads, SHORT, |world| {
            let error = match world.rank() {
                0 => all_to_all(&world, 5).unwrap_err(),
                _ => world.all_gather(&[1]).unwrap_err(),
            };
            error.to_string()
        });
        assert_eq!(
            errors[0],
            "rank 1 is in its collective #1 (all_gather), and rank 0 in #1 (all_to_all) in \
             all_to_all; make every rank do the same"
        );
        assert!(errors[1].starts_with("rank 0 is in its collective #1 (all_to_all)"));
    });
}

#[test]
fn what_a_rank_has_for_itself_must_fit_too() {
    alone("what_a_rank_has_for_itself_must_fit_too", &[], || {
        on_ranks(1, Meeting::Threads, SHORT, |world| {
            let error = world.all_to_all(&[vec![floats(1)]], &[vec![floats(5)]]);
            assert_eq!(
                error.unwrap_err().to_string(),
                "rank 0 sent rank 0 a block of [1] where [5] was due in all_to_all; \
                 make every rank do the same"
            );
        });
    });
}

/// Counts of NCCL are as wide as memory: this one is a block in one piece.
#[test]
fn an_exchange_of_more_than_two_gibibytes_arrives_whole() {
    const BYTES: i64 = (1 << 31) + 8;
    let name = "an_exchange_of_more_than_two_gibibytes_arrives_whole";
    if !is_copy() {
        let log = tempfile::NamedTempFile::new().unwrap();
        let path = log.path().to_str().unwrap().to_owned();
        assert!(with_double(
            copies::alone(name),
            &[("NCCL_DOUBLE_LOG", &path)]
        ));
        assert_eq!(fs::read_to_string(path).unwrap(), format!("{BYTES}\n"));
        return;
    }
    on_ranks(2, Meeting::Threads, PATIENT, |world| {
        let block = Tensor::empty([BYTES], (Kind::Uint8, Device::Cpu));
        let ends = [0, (1 << 31) - 1, 1 << 31, BYTES - 1];
        let mark = |place: i64, value: i64| block.get(place).fill_(value);
        let lists = |block| [vec![block], vec![]];
        for (place, value) in ends.into_iter().zip(1..) {
            let _ = mark(place, if world.rank() == 0 { value } else { 77 });
        }
        if world.rank() == 0 {
            let [block, nothing] = lists(block.shallow_clone());
            let send = [nothing, block];
            world.all_to_all(&send, &[vec![], vec![]]).unwrap();
            return;
        }
        let receive = lists(block.shallow_clone());
        world.all_to_all(&[vec![], vec![]], &receive).unwrap();
        let got = ends.map(|place| block.get(place).int64_value(&[]));
        assert_eq!(got, [1, 2, 3, 4]);
    });
}

/// NCCL's orderly end waits for all, and rank 1 never comes to its own.
#[test]
fn a_drop_ends_where_the_others_are_gone() {
    let name = "a_drop_ends_where_the_others_are_gone";
    let body = || {
        meet(2, Meeting::Threads, PATIENT, |rendezvous| {
            let rank = rendezvous.rank();
            let world = NcclCommunicator::new(rendezvous, Device::Cpu, PATIENT).unwrap();
            trials::gather(&world);
            match rank {
                0 => drop(world),
                _ => mem::forget(world),
            }
        });
    };
    match is_copy() {
        true => body(),
        false => {
            let all = [("NCCL_DOUBLE_FINALIZE", "all")];
            assert!(!with_double(copies::alone(name), &all));
        }
    }
}

/// Where all come to the end, it is an orderly one.
#[test]
fn ranks_end_together() {
    let all = [("NCCL_DOUBLE_FINALIZE", "all")];
    alone("ranks_end_together", &all, || {
        on_ranks(3, Meeting::Folder, PATIENT, |world| trials::gather(&world));
    });
}

/// Long before the time is up: nobody waits for a rank that said that it goes.
#[test]
fn a_rank_that_panics_or_abandons_is_not_waited_for() {
    let name = "a_rank_that_panics_or_abandons_is_not_waited_for";
    alone(name, &[], || {
        let left = |reason: &str| CommunicatorError::Left {
            operation: "all_gather",
            rank: 1,
            reason: reason.to_owned(),
        };
        on_ranks(2, Meeting::Folder, PATIENT, |world| {
            if world.rank() == 1 {
                let panics = AssertUnwindSafe(|| {
                    let _world = world;
                    panic!("on purpose");
                });
                assert!(catch_unwind(panics).is_err());
                return;
            }
            let error = world.all_gather(&[1]).unwrap_err();
            assert_eq!(error, left("its thread panicked"));
        });
        // The groups learn it too.
        let over = Barrier::new(2);
        on_ranks(2, Meeting::Folder, PATIENT, |world| {
            let group = world.split(0).unwrap();
            match world.rank() {
                1 => world.abandon("no more work"),
                _ => assert_eq!(group.all_gather(&[1]).unwrap_err(), left("no more work")),
            }
            over.wait();
        });
    });
}

/// What a copy with this library prints.
#[track_caller]
fn sentence(name: &str, library: Option<&str>) -> String {
    let mut command = copies::alone(name);
    match library {
        Some(library) => command.env("ULYSSES_NCCL", library),
        None => command.env_remove("ULYSSES_NCCL"),
    };
    let (status, output) = copies::finish(command.env(COPY, "1"), COPY_LIMIT);
    assert!(status.success(), "{status}\n{output}");
    output
}

#[track_caller]
fn refusal(name: &str, library: &str, due: &[&str]) {
    let output = sentence(name, Some(library));
    for due in due {
        assert!(output.contains(due), "{output}");
    }
}

#[test]
fn a_library_that_is_not_there_is_refused_with_a_remedy() {
    let name = "a_library_that_is_not_there_is_refused_with_a_remedy";
    if is_copy() {
        println!("{:?}", nccl_serves(Device::Cpu));
        return;
    }
    let folder = TempDir::new().unwrap();
    refusal(
        name,
        "/nowhere/libnccl.so.2",
        &[
            "NCCL is not there: ULYSSES_NCCL is /nowhere/libnccl.so.2",
            "cannot open shared object file",
            "give the path of a libnccl.so.2",
        ],
    );
    refusal(
        name,
        "libm.so.6",
        &["no function ncclGetUniqueId", "2.18 or later"],
    );
    let old = double::compile(folder.path(), &["-DVERSION=21700"]);
    refusal(name, &old, &["is of version 21700", "update it"]);
    // A machine may have one where the loader looks.
    let found = "Ok(())";
    let why = "neither libnccl.so.2 nor libnccl.so loads (libnccl.so.2: cannot open shared";
    let output = sentence(name, None);
    assert!(
        [found, why].iter().any(|due| output.contains(due)),
        "{output}"
    );
    if !output.contains(found) {
        assert!(output.contains("use the communicator over MPI"), "{output}");
    }
}

/// As NCCL itself: it does not say that it takes memory of the host.
#[test]
fn nccl_itself_gets_no_memory_of_the_host() {
    let name = "nccl_itself_gets_no_memory_of_the_host";
    if is_copy() {
        let meeting = ThreadCommunicator::world(1).remove(0);
        let rendezvous = Arc::new(HostRendezvous::new(Arc::new(meeting)));
        let error = NcclCommunicator::new(rendezvous, Device::Cpu, SHORT).err();
        println!("{}", error.unwrap());
        return;
    }
    let folder = TempDir::new().unwrap();
    let silent = double::compile(folder.path(), &["-Dulysses_nccl_takes_host_memory=silent"]);
    refusal(
        name,
        &silent,
        &["NCCL moves memory of GPUs: choose the device `cuda`"],
    );
}
