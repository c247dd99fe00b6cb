//! Worlds of processes. Each test starts `mpirun` on itself: the copies run the
//! body, and the one outside looks at what they printed and how they ended.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod copies;
mod training;
mod trials;
mod world;

use std::{
    process::ExitStatus,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};
use tch::{Device, Kind, Tensor};
use ulysses::{
    Batch, Communicator, CommunicatorError, DataLoaderAdapter, MpiCommunicator, MpiWorld, Options,
    Preparation, Reduction, UlyssesAttention, cross_entropy, optimizer::Stage,
};
use world::{leaf, noise, shard, uneven_shards};

/// For one world. They take a second or two, the one that moves gibibytes ten.
const TIME_LIMIT: Duration = Duration::from_secs(120);

/// Runs the test called `name` in worlds of these sizes.
fn worlds(name: &str, sizes: &[usize], body: fn(MpiCommunicator)) {
    if copies::is_under_mpirun() {
        tch::set_num_threads(1);
        let world = MpiWorld::initialize().unwrap();
        let communicator = world.communicator().with_time_limit(TIME_LIMIT / 2);
        let rank = communicator.rank();
        body(communicator);
        println!("rank {rank} is done");
        return;
    }
    for &size in sizes {
        let (status, output) = launch(name, size);
        assert!(status.success(), "{size} ranks: {status}\n{output}");
        for rank in 0..size {
            let line = format!("rank {rank} is done");
            assert!(
                output.contains(&line),
                "{size} ranks, no \"{line}\":\n{output}"
            );
        }
    }
}

/// A test of this program in a world of `size` processes: how it ended and
/// what it printed.
fn launch(name: &str, size: usize) -> (ExitStatus, String) {
    copies::finish(&mut copies::under_mpirun(name, size), TIME_LIMIT)
}

#[test]
fn all_to_all_delivers_equal_counts() {
    worlds(
        "all_to_all_delivers_equal_counts",
        &[1, 2, 3, 4],
        |communicator| {
            trials::exchange(&communicator, |_, _| 5);
        },
    );
}

#[test]
fn all_to_all_delivers_unequal_and_empty_counts() {
    worlds(
        "all_to_all_delivers_unequal_and_empty_counts",
        &[1, 2, 3, 4],
        |communicator| {
            trials::exchange(&communicator, |from, to| 2 * from + to);
            let nothing: Vec<Vec<Tensor>> = (0..communicator.size()).map(|_| vec![]).collect();
            communicator.all_to_all(&nothing, &nothing).unwrap();
        },
    );
}

#[test]
fn all_gather_gives_all_words_in_rank_order() {
    worlds(
        "all_gather_gives_all_words_in_rank_order",
        &[1, 2, 3, 4],
        |communicator| {
            let rank = communicator.rank() as i64;
            trials::gather(&communicator);
            // More than are gathered at once.
            let long = |rank: i64| (0..(1 << 21) + 5).map(move |i| (rank << 32) + i);
            let own: Vec<_> = long(rank).collect();
            let gathered = communicator.all_gather(&own).unwrap();
            assert_eq!(gathered.len(), communicator.size());
            for (rank, words) in gathered.into_iter().enumerate() {
                assert!(long(rank as i64).eq(words), "the words of rank {rank}");
            }
        },
    );
}

#[test]
fn attention_has_the_bits_of_one_process() {
    worlds(
        "attention_has_the_bits_of_one_process",
        &[1, 2, 3, 4],
        |communicator| {
            trials::attention(&(Arc::new(communicator) as Arc<dyn Communicator>));
        },
    );
}

/// Rank r has r batches of r + 3 tokens, and the last one's last is an error.
#[test]
fn the_batches_of_every_rank_are_served_to_all() {
    worlds(
        "the_batches_of_every_rank_are_served_to_all",
        &[1, 2, 4],
        |communicator| {
            let (own, size) = (communicator.rank(), communicator.size());
            let batch = |rank: usize, index: usize| {
                let first = (100 * rank + 10 * index) as i64;
                let options = (Kind::Int64, Device::Cpu);
                let ids = Tensor::arange_start(first, first + rank as i64 + 3, options);
                Batch::default()
                    .with("labels", ids.unsqueeze(0))
                    .with("weights", ids.to_kind(Kind::BFloat16).unsqueeze(0))
                    .with_whole("first", Tensor::from(first))
                    .with("input_ids", ids.unsqueeze(0))
            };
            let open = |epoch| {
                let error = (epoch == 1 && own + 1 == size).then(|| Err("no more"));
                (0..own)
                    .map(move |index| Ok(batch(own, index)))
                    .chain(error)
            };
            let preparation = Preparation::default();
            let mut adapter = DataLoaderAdapter::new(Arc::new(communicator), preparation, open);
            let rounds = (0..size).flat_map(|index| (index + 1..size).map(move |r| (r, index)));
            let mut epoch = adapter.epoch();
            for (rank, index) in rounds {
                let got = epoch.next().unwrap().unwrap();
                let whole = preparation.prepare(batch(rank, index)).unwrap();
                let due = whole.shard(preparation.sharding, own, size).unwrap();
                assert_eq!(got.entries, due.entries, "batch {index} of rank {rank}");
            }
            assert!(epoch.next().is_none());
            let error = adapter.epoch().find_map(Result::err).unwrap();
            assert_eq!(error.rank(), Some(size - 1));
            assert_eq!(error.argument(), Some("batches"));
        },
    );
}

/// As `loss.rs` shows on threads; here rank 0 has no label.
#[test]
fn the_loss_is_that_of_one_process() {
    worlds(
        "the_loss_is_that_of_one_process",
        &[1, 2, 3, 4],
        |communicator| {
            let (rank, size) = (communicator.rank(), communicator.size());
            let shards = uneven_shards(13, size);
            let communicator: Arc<dyn Communicator> = Arc::new(communicator);
            let logits = noise(1, [1, 13, 1, 5], Kind::Double);
            let labels = Tensor::arange(13, (Kind::Int64, Device::Cpu)).remainder(5);
            let _ = labels.narrow(0, 0, shards[0] as i64).fill_(-100);
            let whole = leaf(&logits);
            let due = whole.view([13, 5]).cross_entropy_loss(
                &labels,
                None::<&Tensor>,
                tch::Reduction::Sum,
                -100,
                0.0,
            ) / labels.ne(-100).sum(Kind::Int64).clamp_min(1);
            (&due * 0.25).backward();
            let own = leaf(&shard(&logits, &shards, rank));
            let loss = cross_entropy(
                &communicator,
                &own.squeeze_dim(2),
                &shard(&labels.unsqueeze(0), &shards, rank),
                -100,
                Reduction::Mean,
            )
            .unwrap();
            assert!(loss.allclose(&due, 1e-14, 0.0, false), "{loss} {due}");
            (loss * 0.25).backward();
            let due = shard(&whole.grad(), &shards, rank);
            assert!(own.grad().allclose(&due, 1e-14, 1e-15, false));
        },
    );
}

#[test]
fn a_refusal_is_the_same_on_every_rank() {
    worlds(
        "a_refusal_is_the_same_on_every_rank",
        &[2, 3, 4],
        |communicator| {
            let head_size = if communicator.rank() == 1 { 6 } else { 8 };
            let good = Tensor::zeros([1, 3, 12, 8], (Kind::Float, Device::Cpu));
            let key = Tensor::zeros([1, 3, 12, head_size], (Kind::Float, Device::Cpu));
            let attention = UlyssesAttention::new(Arc::new(communicator), Options::default());
            let error = attention.forward(&good, &key, &good).unwrap_err();
            assert_eq!(
                error.to_string(),
                "rank 1: `key` has head size 6, but `query` has 8; give both the same head size"
            );
            // Nobody has lost step.
            assert!(attention.forward(&good, &good, &good).is_ok());
        },
    );
}

#[test]
fn ranks_of_one_color_form_a_group_in_rank_order() {
    let name = "ranks_of_one_color_form_a_group_in_rank_order";
    worlds(name, &[1, 3, 4], |communicator| {
        trials::groups(&communicator);
    });
}

/// Rank 1 never comes to a group's collective: rank 0 waits as long as it would
/// for the world.
#[test]
fn a_wait_in_a_group_ends() {
    let name = "a_wait_in_a_group_ends";
    if !copies::is_under_mpirun() {
        let (status, output) = launch(name, 2);
        assert!(output.contains("rank 0 is done"), "{status}\n{output}");
        assert!(!status.success(), "{output}");
        return;
    }
    let world = MpiWorld::initialize().unwrap();
    let limit = Duration::from_millis(300);
    let group = world
        .communicator()
        .with_time_limit(limit)
        .split(0)
        .unwrap();
    if group.rank() == 1 {
        thread::sleep(TIME_LIMIT);
        return;
    }
    let due = CommunicatorError::TimedOut {
        operation: "all_gather",
        missing: vec![],
        limit,
    };
    assert_eq!(group.all_gather(&[1]).unwrap_err(), due);
    println!("rank 0 is done");
}

#[test]
fn training_on_a_mesh_has_the_bits_of_ranks_as_threads() {
    let name = "training_on_a_mesh_has_the_bits_of_ranks_as_threads";
    worlds(name, &[2, 4], |communicator| {
        let communicator: Arc<dyn Communicator> = Arc::new(communicator);
        let shapes: &[[usize; 3]] = match communicator.size() {
            2 => &[[1, 1, 2], [2, 1, 1]],
            _ => &[[2, 1, 2], [1, 2, 2], [2, 2, 1]],
        };
        for shape in shapes.iter().map(|&shape| training::shape(shape)) {
            for stage in [Stage::One, Stage::Two] {
                let options = training::options(stage, training::ADAMW);
                let got = training::on_mesh(Arc::clone(&communicator), shape, options);
                let due = world::on_ranks(communicator.size(), |threads| {
                    training::on_mesh(threads, shape, options)
                });
                assert_eq!(got, due[0], "{shape} {stage:?}");
                let (whole, _) = training::by_libtorch(shape.data_parallel(), options);
                assert!(training::difference(&got.0, &whole) < 8.0 * f64::EPSILON);
            }
        }
    });
}

/// A count of MPI is a 32-bit integer, and so is a displacement. The block is
/// sent from a view of one row and received in place, so that the two ranks
/// hold about 2 GiB each.
#[test]
fn an_exchange_of_more_than_two_gibibytes_arrives_whole() {
    let name = "an_exchange_of_more_than_two_gibibytes_arrives_whole";
    worlds(name, &[2], |communicator| {
        // A prime: no power of two at which a block could be cut is a multiple.
        const ROW: i64 = 251;
        const ROWS: i64 = (1 << 31) / ROW + 4000;
        let bytes = (Kind::Uint8, Device::Cpu);
        let row = Tensor::arange(ROW, bytes);
        let last = Tensor::arange_start(100, 107, bytes);
        let nothing = || Tensor::empty([0], bytes);
        let pairs = Tensor::zeros([7, 2], bytes);
        let begun = Instant::now();
        if communicator.rank() == 0 {
            let send = [vec![], vec![row.expand([ROWS, ROW], false), last]];
            let receive = [vec![], vec![nothing()]];
            communicator.all_to_all(&send, &receive).unwrap();
            println!("sent {} bytes in {:?}", ROWS * ROW, begun.elapsed());
            return;
        }
        let got = Tensor::empty([ROWS, ROW], bytes);
        let send = [vec![nothing()], vec![]];
        let receive = [vec![got.shallow_clone(), pairs.select(1, 1)], vec![]];
        communicator.all_to_all(&send, &receive).unwrap();
        println!("received {} bytes in {:?}", got.numel(), begun.elapsed());
        // All of it, and without another 2 GiB.
        for part in got.split(1 << 18, 0) {
            assert!(part.eq_tensor(&row.expand_as(&part)).all().int64_value(&[]) == 1);
        }
        assert_eq!(pairs.select(1, 1), last);
        assert_eq!(pairs.select(1, 0), last.zeros_like());
    });
}

#[test]
fn a_communicator_that_outlives_mpi_refuses() {
    if !copies::is_under_mpirun() {
        return worlds("a_communicator_that_outlives_mpi_refuses", &[2], |_| ());
    }
    let world = MpiWorld::initialize().unwrap();
    let communicator = world.communicator();
    let again = MpiWorld::initialize().err().unwrap();
    assert_eq!(
        again.to_string(),
        "MPI_Init_thread: the communicator cannot be used: \
         MPI was started before in this process; start it once"
    );
    drop(world);
    assert_eq!(
        communicator.all_gather(&[1]).unwrap_err().to_string(),
        "all_gather: the communicator cannot be used: MPI has ended; keep the MpiWorld"
    );
    println!("rank {} is done", communicator.rank());
}

/// Rank 1 of two never comes to the collective; rank 0 must not wait for ever,
/// and the world must come to an end.
#[test]
fn a_wait_for_a_rank_that_never_comes_ends() {
    let name = "a_wait_for_a_rank_that_never_comes_ends";
    if !copies::is_under_mpirun() {
        let begun = Instant::now();
        let (status, output) = launch(name, 2);
        assert!(output.contains("rank 0 is done"), "{status}\n{output}");
        // Without MPI_Finalize on rank 0, mpirun reports the world as failed.
        assert!(!status.success(), "{output}");
        assert!(
            begun.elapsed() < TIME_LIMIT / 2,
            "the world did not end by itself"
        );
        return;
    }
    let world = MpiWorld::initialize().unwrap();
    let limit = Duration::from_millis(300);
    let communicator = world.communicator().with_time_limit(limit);
    if communicator.rank() == 1 {
        thread::sleep(TIME_LIMIT);
        return;
    }
    let error = communicator.all_gather(&[1]).unwrap_err();
    let due = CommunicatorError::TimedOut {
        operation: "all_gather",
        missing: vec![],
        limit,
    };
    assert_eq!(error, due);
    let blocks = [vec![], vec![]];
    assert_eq!(
        communicator
            .all_to_all(&blocks, &blocks)
            .unwrap_err()
            .to_string(),
        "all_to_all: the communicator cannot be used: \
         all_gather was not done within 300ms: some rank did not come"
    );
    println!("rank 0 is done");
}

/// As above, in an exchange, where ranks know who has not sent.
#[test]
fn a_rank_that_never_comes_to_an_exchange_is_named() {
    let name = "a_rank_that_never_comes_to_an_exchange_is_named";
    if !copies::is_under_mpirun() {
        let (status, output) = launch(name, 3);
        assert!(output.contains("rank 0 is done"), "{status}\n{output}");
        return;
    }
    let world = MpiWorld::initialize().unwrap();
    let limit = Duration::from_millis(500);
    let communicator = world.communicator().with_time_limit(limit);
    // Rank 0 alone looks: with its end mpirun ends the others.
    if communicator.rank() == 2 {
        thread::sleep(TIME_LIMIT);
        return;
    }
    let blocks: Vec<_> = (0..3)
        .map(|_| vec![Tensor::zeros([9], (Kind::Float, Device::Cpu))])
        .collect();
    let error = communicator.all_to_all(&blocks, &blocks).unwrap_err();
    if communicator.rank() == 1 {
        thread::sleep(TIME_LIMIT);
        return;
    }
    let due = CommunicatorError::TimedOut {
        operation: "all_to_all",
        missing: vec![2],
        limit,
    };
    assert_eq!(error, due);
    println!("rank 0 is done");
}

/// Rank 0 sends five numbers where rank 1 has room for two, and the other way
/// round. Each is told of what came from the other.
#[test]
fn blocks_that_do_not_fit_are_refused() {
    let name = "blocks_that_do_not_fit_are_refused";
    if !copies::is_under_mpirun() {
        let (status, output) = launch(name, 2);
        for line in ["rank 0 is done", "rank 1 is done"] {
            assert!(output.contains(line), "{status}\n{output}");
        }
        return;
    }
    let world = MpiWorld::initialize().unwrap();
    let communicator = world.communicator();
    let rank = communicator.rank();
    let length = [5, 2][rank];
    let blocks: Vec<_> = (0..2)
        .map(|peer| match peer == rank {
            true => vec![],
            false => vec![Tensor::zeros([length], (Kind::Float, Device::Cpu))],
        })
        .collect();
    let due = [
        "rank 1 sent rank 0 8 bytes where 20 were due in all_to_all; make every rank do the same",
        "rank 0 sent rank 1 more bytes where 8 were due in all_to_all; make every rank do the same",
    ];
    let error = communicator.all_to_all(&blocks, &blocks).unwrap_err();
    assert_eq!(error.to_string(), due[rank]);
    println!("rank {rank} is done");
    // mpirun ends the other rank when this one ends without MPI_Finalize.
    thread::sleep(Duration::from_millis(500));
}

#[test]
fn what_a_rank_has_for_itself_must_fit_too() {
    let name = "what_a_rank_has_for_itself_must_fit_too";
    if !copies::is_under_mpirun() {
        let (status, output) = launch(name, 1);
        assert!(output.contains("rank 0 is done"), "{status}\n{output}");
        return;
    }
    let world = MpiWorld::initialize().unwrap();
    let blocks = |length: i64| [vec![Tensor::zeros([length], (Kind::Float, Device::Cpu))]];
    let error = world
        .communicator()
        .all_to_all(&blocks(1), &blocks(5))
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "rank 0 sent rank 0 a block of [1] where [5] was due in all_to_all; \
         make every rank do the same"
    );
    println!("rank 0 is done");
}

/// Rank 0 would wait for half a minute; rank 1 panics at once.
#[test]
fn a_rank_that_panics_ends_the_world() {
    let name = "a_rank_that_panics_ends_the_world";
    if !copies::is_under_mpirun() {
        let begun = Instant::now();
        let (status, output) = launch(name, 2);
        assert!(output.contains("on purpose"), "{status}\n{output}");
        assert!(!status.success(), "{output}");
        assert!(begun.elapsed() < TIME_LIMIT / 3, "rank 0 waited");
        return;
    }
    let world = MpiWorld::initialize().unwrap();
    let communicator = world.communicator().with_time_limit(TIME_LIMIT / 2);
    assert_eq!(communicator.rank(), 0, "on purpose");
    let _ = communicator.all_gather(&[1]);
}
