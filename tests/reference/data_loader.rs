//! The data loader adapter: which shards it serves, in which order, and how it
//! ends.
#![allow(clippy::unwrap_used, missing_docs)]

mod world;

use proptest::prelude::*;
use rstest::rstest;
use std::{
    panic,
    sync::{Arc, Mutex},
};
use tch::{Device, Kind, Tensor};
use ulysses::{
    Batch, Communicator, CommunicatorError, CountingCommunicator, DataLoaderAdapter, Error,
    Preparation, Shard, Sharding,
};
use world::on_ranks;

const I64: (Kind, Device) = (Kind::Int64, Device::Cpu);

type Source = Result<Batch, String>;

/// A batch [sequences, tokens] whose ids say whose it is and which.
fn batch(rank: usize, index: usize, [sequences, tokens]: [i64; 2]) -> Batch {
    let first = (rank * 100 + index) as i64 * 1000;
    let ids = Tensor::arange_start(first, first + sequences * tokens, I64);
    let ids = ids.view([sequences, tokens]);
    Batch::default()
        .with("labels", ids.copy())
        .with("input_ids", ids)
}

fn words(tensor: &Tensor) -> Vec<i64> {
    Vec::try_from(tensor.to_kind(Kind::Int64).flatten(0, -1)).unwrap()
}

/// Each shard's row 0 of ids.
fn ids(shards: impl Iterator<Item = ulysses::Result<Shard>>) -> Vec<Vec<i64>> {
    let row = |shard: Shard| words(&shard.get("input_ids").unwrap().get(0));
    shards.map(|shard| row(shard.unwrap())).collect()
}

/// The tokens of each step, put together from the shards of all ranks.
fn consumed(served: &[Vec<Vec<i64>>]) -> Vec<Vec<i64>> {
    let steps = served[0].len();
    assert!(served.iter().all(|shards| shards.len() == steps));
    let step = |step: usize| served.iter().flat_map(|rank| rank[step].clone()).collect();
    (0..steps).map(step).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Two epochs, ranks with different numbers of batches, sequences and
    /// lengths: each token is consumed once in each epoch, the batches of a
    /// round in rank order.
    #[test]
    fn every_batch_is_served_once_in_each_epoch(
        counts in prop::collection::vec(0usize..4, 1..5),
        lengths in prop::collection::vec(1i64..9, 4),
    ) {
        let ranks = counts.len();
        let length = |rank: usize, index: usize| lengths[(rank + index) % 4];
        let served = on_ranks(ranks, |communicator| {
            let rank = communicator.rank();
            let own = |_epoch| {
                let of = |index| Source::Ok(batch(rank, index, [1 + rank as i64, length(rank, index)]));
                (0..counts[rank]).map(of).collect::<Vec<_>>()
            };
            let mut adapter = DataLoaderAdapter::new(communicator, Preparation::default(), own);
            [0, 1].map(|_| {
                let mut epoch = adapter.epoch();
                let due = epoch.remaining().unwrap();
                let mut shards = ids(epoch.by_ref().take(1));
                assert_eq!(epoch.remaining().unwrap(), due.saturating_sub(1));
                shards.extend(ids(&mut epoch));
                assert_eq!(shards.len(), due);
                assert_eq!(epoch.remaining().unwrap(), 0);
                assert!(epoch.next().is_none());
                shards
            })
        });
        let due: Vec<Vec<i64>> = (0..4)
            .flat_map(|index| (0..ranks).map(move |rank| (rank, index)))
            .filter(|&(rank, index)| index < counts[rank])
            .map(|(rank, index)| {
                let first = (rank * 100 + index) as i64 * 1000;
                (first..first + length(rank, index)).collect()
            })
            .collect();
        for epoch in 0..2 {
            let served: Vec<_> = served.iter().map(|rank| rank[epoch].clone()).collect();
            prop_assert_eq!(consumed(&served), due.clone());
        }
    }
}

/// Entries of any dtype and shape arrive as one rank alone cuts them.
#[rstest]
fn every_entry_arrives(
    #[values(1, 2, 3, 4)] ranks: usize,
    #[values(Sharding::Contiguous, Sharding::Zigzag, Sharding::Striped)] sharding: Sharding,
) {
    let whole = |rank: usize| {
        let (sequences, tokens) = (1 + rank as i64 % 2, 7 + rank as i64);
        let count = sequences * tokens;
        let values = |kind| {
            Tensor::arange(count, I64)
                .remainder(2)
                .view([sequences, tokens])
                .to_kind(kind)
        };
        let features = Tensor::arange(count * 6, I64).view([sequences, tokens, 3, 2]);
        let mut batch = batch(rank, 0, [sequences, tokens])
            .with("attention_mask", values(Kind::Bool))
            .with("features", features.to_kind(Kind::BFloat16))
            .with(
                "strided",
                features.transpose(2, 3).select(2, 1).to_kind(Kind::Double),
            )
            .with_tokens_at("position_ids", features.select(3, 0).permute([2, 0, 1]), 2)
            .with_whole("scale", Tensor::from(rank as f32 + 0.5))
            .with_whole("table", Tensor::arange(6, I64).view([2, 3]).tr())
            .with_document_ends(vec![vec![3, tokens as usize]; sequences as usize]);
        let kinds = [
            Kind::Half,
            Kind::Float,
            Kind::Int,
            Kind::Int16,
            Kind::Int8,
            Kind::Uint8,
        ];
        for kind in kinds {
            batch = batch.with(&format!("as {kind:?}"), values(kind));
        }
        batch
    };
    let preparation = Preparation {
        sharding,
        pad_to_multiple_of: if ranks == 3 { 3 } else { 1 },
        pad_id: 5,
        ..Preparation::default()
    };
    on_ranks(ranks, |communicator| {
        let own = communicator.rank();
        let open = |_| [Source::Ok(whole(own))];
        let mut adapter = DataLoaderAdapter::new(communicator, preparation, open);
        for (source, shard) in adapter.epoch().enumerate() {
            let (got, batch) = (shard.unwrap(), preparation.prepare(whole(source)).unwrap());
            let due = batch.shard(sharding, own, ranks).unwrap();
            assert!(got.entries.keys().eq(due.entries.keys()));
            for (name, due) in &due.entries {
                let got = got.get(name).unwrap();
                assert_eq!((got.kind(), got.size()), (due.kind(), due.size()), "{name}");
                assert_eq!(got, due, "{name} of rank {source}");
            }
            assert_eq!(got.document_ends, due.document_ends);
            assert_eq!(got.tokens, due.tokens);
        }
    });
}

/// A round hands each rank its shard of one's batch, and no more: int64 ids,
/// positions and targets of 2 x 10 tokens.
#[test]
fn only_shards_travel() {
    on_ranks(4, |communicator| {
        let counting = Arc::new(CountingCommunicator::new(communicator));
        let rank = counting.rank();
        let open = |_| [Source::Ok(batch(rank, 0, [2, 10]))];
        let mut adapter = DataLoaderAdapter::new(counting.clone(), Preparation::default(), open);
        let mut epoch = adapter.epoch();
        assert_eq!(epoch.by_ref().take(4).filter(Result::is_ok).count(), 4);
        let traffic = counting.traffic();
        assert_eq!((traffic.all_to_all_calls, traffic.all_gather_calls), (1, 2));
        assert_eq!(traffic.all_to_all_bytes, 3 * 2 * 10 * 8);
        // Of 10 tokens the first two ranks keep 3.
        let kept = if rank < 2 { 3 } else { 2 };
        assert_eq!(traffic.off_rank_bytes, 3 * 2 * (10 - kept) * 8);
    });
}

/// Rank 1's second batch is `bad`; everybody has been served the first ones.
fn second_batch_of_rank_1(bad: impl Fn() -> Source + Sync) -> Vec<(usize, Error)> {
    on_ranks(3, |communicator| {
        let rank = communicator.rank();
        let open = |_| {
            let of = |index| match (rank, index) {
                (1, 1) => bad(),
                _ => Ok(batch(rank, index, [1, 6])),
            };
            (0..3).map(of).collect::<Vec<_>>()
        };
        let mut adapter = DataLoaderAdapter::new(communicator, Preparation::default(), open);
        let mut epoch = adapter.epoch();
        let good = epoch.by_ref().take_while(Result::is_ok).count();
        assert!(epoch.next().is_none(), "an error ends the epoch");
        assert_eq!(epoch.remaining().unwrap(), 0);
        let mut again = adapter.epoch();
        let error = again.find_map(Result::err).unwrap();
        (good, error)
    })
}

#[rstest]
#[case::stream(
    || Err("the disk is gone".to_owned()),
    "rank 1: `batches` gave an error: the disk is gone; mend the source of this rank's batches, \
     and begin an epoch anew"
)]
#[case::no_labels(
    || Ok(Batch::default().with("input_ids", Tensor::zeros([1, 6], I64))),
    "rank 1: `labels` are missing; give each token's own id as its label, or ask for no targets"
)]
#[case::unknown_entry(
    || Ok(batch(1, 1, [1, 6]).with("weights", Tensor::zeros([1, 5], I64))),
    "rank 1: `batch` has an entry `weights` that has 1 sequences of 5 tokens in shape [1, 5] with \
     tokens at 1, but `input_ids` has 1 of 6; give all entries the same, or pass this one whole"
)]
#[case::dtype(
    || Ok(batch(1, 1, [1, 6]).with("z", Tensor::zeros([1, 6], (Kind::ComplexFloat, Device::Cpu)))),
    "rank 1: `batch` has an entry `z` that is ComplexFloat; give one of float64, float32, \
     bfloat16, float16, int64, int32, int16, int8, uint8, bool"
)]
fn an_error_of_one_rank_is_the_same_on_every_rank(#[case] bad: fn() -> Source, #[case] due: &str) {
    for (good, error) in second_batch_of_rank_1(bad) {
        assert_eq!((good, error.to_string()), (3, due.to_owned()));
        assert_eq!(error.rank(), Some(1));
    }
}

#[test]
fn a_sharding_of_its_own_is_refused() {
    let errors = on_ranks(2, |communicator| {
        let sharding = [Sharding::Contiguous, Sharding::Zigzag][communicator.rank()];
        let preparation = Preparation {
            sharding,
            ..Preparation::default()
        };
        let open = |_| [Source::Ok(batch(0, 0, [1, 8]))];
        let mut adapter = DataLoaderAdapter::new(communicator, preparation, open);
        adapter.epoch().find_map(Result::err).unwrap().to_string()
    });
    let due = "rank 1: `sharding` is Zigzag, but Contiguous on rank 0; give all ranks the same";
    assert_eq!(errors, [due, due]);
}

/// Rank 1 begins a second epoch while rank 0 is in its first, or asks for the
/// length while rank 0 goes on.
#[rstest]
#[case(
    false,
    "is at round 0 of epoch 1 while rank 0 is at round 1 of epoch 0"
)]
#[case(
    true,
    "counts what is left at round 1 of epoch 0 while rank 0 is at round 1 of epoch 0"
)]
fn ranks_out_of_step_are_told(#[case] counts: bool, #[case] problem: &str) {
    let errors = on_ranks(2, |communicator| {
        let rank = communicator.rank();
        let open = |_| {
            (0..2)
                .map(|index| Source::Ok(batch(0, index, [1, 8])))
                .collect::<Vec<_>>()
        };
        let mut adapter = DataLoaderAdapter::new(communicator, Preparation::default(), open);
        let mut epoch = adapter.epoch();
        assert_eq!(epoch.by_ref().take(2).filter(Result::is_ok).count(), 2);
        match (rank, counts) {
            (0, _) => epoch.next().unwrap().err(),
            (_, true) => epoch.remaining().err(),
            (_, false) => adapter.epoch().next().unwrap().err(),
        }
    });
    let due = CommunicatorError::Mismatch {
        operation: "the data loader's gather",
        rank: 1,
        problem: problem.to_owned(),
    };
    assert_eq!(errors, [Some(due.clone().into()), Some(due.into())]);
}

/// Nobody waits for a rank whose stream panics.
#[test]
fn a_stream_that_panics_leaves_nobody_waiting() {
    let told = Mutex::new(None);
    let panicked = panic::catch_unwind(|| {
        on_ranks(2, |communicator| {
            let rank = communicator.rank();
            let open = |_| {
                (0..2).map(move |index| {
                    assert!((rank, index) != (1, 1), "on purpose");
                    Source::Ok(batch(rank, index, [1, 8]))
                })
            };
            let mut adapter = DataLoaderAdapter::new(communicator, Preparation::default(), open);
            *told.lock().unwrap() = adapter.epoch().find_map(Result::err);
        });
    });
    assert!(panicked.is_err());
    let due = CommunicatorError::Left {
        operation: "all_gather",
        rank: 1,
        reason: "its thread panicked".to_owned(),
    };
    assert_eq!(told.into_inner().unwrap(), Some(due.into()));
}
