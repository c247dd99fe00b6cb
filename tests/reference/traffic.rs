//! Two exchanges forward, two backward, and not a byte more than the heads and
//! tokens that have to move.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod world;

use rstest::rstest;
use std::sync::Arc;
use tch::{Kind, Tensor};
use ulysses::{CountingCommunicator, Options, Traffic, UlyssesAttention};
use world::{leaf, noise, on_ranks};

const BATCH: i64 = 2;
const SHARD: i64 = 3;
const HEAD_SIZE: i64 = 8;

#[rstest]
#[case::multi_head(1, 4, 4, Kind::Float)]
#[case::multi_head(2, 4, 4, Kind::Float)]
#[case::multi_head(4, 8, 8, Kind::Double)]
#[case::grouped(2, 8, 4, Kind::BFloat16)]
#[case::grouped_replicated(4, 8, 2, Kind::Half)]
#[case::multi_query(3, 6, 1, Kind::Float)]
fn forward_and_backward_move_what_they_must(
    #[case] ranks: usize,
    #[case] query_heads: i64,
    #[case] kv_heads: i64,
    #[case] kind: Kind,
) {
    // Each KV head goes to this many ranks.
    let replication = (ranks as i64 / kv_heads).max(1);
    let heads = 2 * query_heads + 2 * replication * kv_heads;
    let buffer = kind.elt_size_in_bytes() as u64 * (BATCH * SHARD * HEAD_SIZE * heads) as u64;
    let due = match ranks {
        1 => Traffic::default(),
        _ => Traffic {
            all_to_all_calls: 2,
            all_to_all_bytes: buffer,
            off_rank_bytes: buffer / ranks as u64 * (ranks as u64 - 1),
            ..Traffic::default()
        },
    };
    on_ranks(ranks, |communicator| {
        let counter = Arc::new(CountingCommunicator::new(communicator));
        let attention = UlyssesAttention::new(counter.clone(), Options::default());
        let query = leaf(&noise(1, [BATCH, SHARD, query_heads, HEAD_SIZE], kind));
        let kv = leaf(&noise(2, [BATCH, SHARD, kv_heads, HEAD_SIZE], kind));
        let output = attention.forward(&query, &kv, &kv).unwrap();
        let forward = counter.traffic();
        let agreement = (forward.all_gather_calls, forward.all_gather_bytes);
        assert_eq!(agreement, (1, 29 * 8), "one description of the call");
        assert_eq!(
            Traffic {
                all_gather_calls: 0,
                all_gather_bytes: 0,
                ..forward
            },
            due
        );

        counter.reset();
        let _ = Tensor::run_backward(&[output.sum(kind)], &[&query, &kv], false, false);
        assert_eq!(counter.traffic(), due, "backward");
    });
}

#[test]
fn a_refused_call_moves_no_data() {
    on_ranks(2, |communicator| {
        let counter = Arc::new(CountingCommunicator::new(communicator));
        let attention = UlyssesAttention::new(counter.clone(), Options::default());
        let x = noise(1, [1, 2, 3, 4], Kind::Float);
        assert!(attention.forward(&x, &x, &x).is_err());
        assert_eq!(
            (
                counter.traffic().all_gather_calls,
                counter.traffic().all_to_all_calls
            ),
            (1, 0)
        );
    });
}
