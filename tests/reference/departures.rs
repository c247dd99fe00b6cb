//! A rank that is gone, stuck or out of step frees its peers, which learn
//! which rank it was.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod world;

use rstest::rstest;
use std::{
    sync::{Arc, Barrier},
    thread,
    time::{Duration, Instant},
};
use tch::{Device, Kind, Tensor};
use ulysses::{
    Communicator, CommunicatorError, Error, Exchange, HeadPartition, Options, Sharding,
    ThreadCommunicator, TokenPartition, UlyssesAttention,
};
use world::{TIME_LIMIT, leaf, noise};

/// Runs rank 2 of three with `deserter`, the others with `body`; gives what
/// the others got.
fn others<T: Send>(
    deserter: impl FnOnce(ThreadCommunicator) + Send,
    body: impl Fn(ThreadCommunicator) -> T + Sync,
) -> Vec<T> {
    tch::set_num_threads(1);
    let begun = Instant::now();
    let mut ranks = ThreadCommunicator::world(3);
    let last = ranks.pop().unwrap().with_time_limit(TIME_LIMIT);
    let body = &body;
    let results = thread::scope(|scope| {
        let gone = scope.spawn(move || deserter(last));
        let others: Vec<_> = ranks
            .into_iter()
            .map(|end| scope.spawn(move || body(end.with_time_limit(TIME_LIMIT))))
            .collect();
        let results = others
            .into_iter()
            .map(|rank| rank.join().unwrap())
            .collect();
        let _ = gone.join();
        results
    });
    assert!(
        begun.elapsed() < TIME_LIMIT / 2,
        "a rank waited for the one that is gone"
    );
    results
}

fn attend(communicator: Arc<dyn Communicator>) -> ulysses::Result<Tensor> {
    let x = noise(1, [1, 2, 3, 4], Kind::Float);
    UlyssesAttention::new(communicator, Options::default()).forward(&x, &x, &x)
}

#[rstest]
#[case::returns(|_| (), "rank 2 left before all_gather: its communicator was dropped")]
#[case::panics(|_gone| panic!("on purpose"), "rank 2 left before all_gather: its thread panicked")]
#[case::abandons(
    |end: ThreadCommunicator| { end.abandon("out of memory"); thread::sleep(Duration::from_millis(200)) },
    "rank 2 left before all_gather: out of memory"
)]
fn a_rank_that_leaves_before_the_agreement_is_named(
    #[case] deserter: fn(ThreadCommunicator),
    #[case] text: &str,
) {
    for result in others(deserter, |end| attend(Arc::new(end))) {
        let error = result.unwrap_err();
        assert_eq!(error.to_string(), text);
        assert_eq!(error.rank(), Some(2));
    }
}

#[test]
fn a_rank_that_leaves_between_the_agreement_and_the_exchange_is_named() {
    // The gather of an agreement, and then nothing.
    let deserter = |end: ThreadCommunicator| {
        let words = end.all_gather(&[0; 3]).unwrap();
        drop((words, end));
    };
    let results = others(deserter, |end| {
        let words = end.all_gather(&[0; 3]);
        words.and_then(|_| end.all_to_all(&[vec![], vec![], vec![]], &[vec![], vec![], vec![]]))
    });
    for result in results {
        let text = result.unwrap_err().to_string();
        assert_eq!(
            text,
            "rank 2 left before all_to_all: its communicator was dropped"
        );
    }
}

#[test]
fn a_rank_that_leaves_before_backward_is_named_in_the_error_of_backward() {
    let run = |end: ThreadCommunicator, backward: bool| {
        let x = leaf(&noise(1, [1, 2, 3, 4], Kind::Float));
        let attention = UlyssesAttention::new(Arc::new(end), Options::default());
        let output = attention.forward(&x, &x, &x).unwrap();
        if backward {
            output.sum(Kind::Float).f_backward()
        } else {
            Ok(())
        }
    };
    let results = others(|end| run(end, false).unwrap(), |end| run(end, true));
    for result in results {
        let text = result.unwrap_err().to_string();
        let due = "rank 2 left before all_to_all: its communicator was dropped";
        assert!(text.contains(due), "{text}");
    }
}

#[test]
fn a_rank_that_fails_on_its_own_tells_the_others_why() {
    let exchange = |end: ThreadCommunicator, head_size: i64, tokens: i64| {
        let heads = HeadPartition::new(3, 3, 3).unwrap();
        let shards = TokenPartition::new(Sharding::Contiguous, &[2; 3]).unwrap();
        let exchange = Exchange::new(Arc::new(end), shards, heads).unwrap();
        let x = noise(1, [1, tokens, 3, head_size], Kind::Float);
        exchange.sequence_to_heads(&x, &x, &x).map(|_| ())
    };
    let results = others(
        |end| {
            let error = exchange(end, 4, 5).unwrap_err();
            let due = "`query` has shape [1, 5, 3, 4]; give [batch, 2, 3, head size]";
            assert_eq!(error.to_string(), due);
        },
        |end| exchange(end, 4, 2),
    );
    for result in results {
        let due = "rank 2 left before all_to_all: \
                   `query` has shape [1, 5, 3, 4]; give [batch, 2, 3, head size]";
        assert_eq!(result.unwrap_err().to_string(), due);
    }
}

#[test]
fn blocks_that_do_not_fit_are_the_same_error_on_every_rank() {
    let exchange = |end: ThreadCommunicator, length: i64, kind: Kind| {
        let blocks = |length: i64, kind| -> Vec<Vec<Tensor>> {
            (0..3)
                .map(|_| vec![Tensor::zeros([length], (kind, Device::Cpu))])
                .collect()
        };
        end.all_to_all(&blocks(length, kind), &blocks(2, Kind::Float))
    };
    for (length, kind, due) in [
        (
            5,
            Kind::Float,
            "rank 2 sent rank 0 a block of [5] where [2] was due in all_to_all; \
                          make every rank do the same",
        ),
        (
            2,
            Kind::Half,
            "rank 2 sent rank 0 Half where Float was due in all_to_all; \
                         make every rank do the same",
        ),
    ] {
        let deserter = |end| {
            assert_eq!(exchange(end, length, kind).unwrap_err().to_string(), due);
        };
        for result in others(deserter, |end| exchange(end, 2, Kind::Float)) {
            assert_eq!(result.unwrap_err().to_string(), due);
        }
    }
}

#[test]
fn ranks_in_different_collectives_learn_so() {
    let results = others(
        |end| {
            let _ = end.all_gather(&[1]);
        },
        |end| end.all_to_all(&[vec![], vec![], vec![]], &[vec![], vec![], vec![]]),
    );
    for result in results {
        let due = "rank 2 entered all_gather while rank 0 was in all_to_all; \
                   make every rank do the same";
        assert_eq!(result.unwrap_err().to_string(), due);
    }
}

#[test]
fn unequal_numbers_of_words_are_the_same_error_on_every_rank() {
    let due = "rank 2 gave 1 words while rank 0 gave 2 in all_gather; make every rank do the same";
    let results = others(
        |end| assert_eq!(end.all_gather(&[1]).unwrap_err().to_string(), due),
        |end| end.all_gather(&[1, 2]),
    );
    for result in results {
        assert_eq!(result.unwrap_err().to_string(), due);
    }
}

#[test]
fn a_rank_that_is_stuck_is_named_when_time_is_up() {
    let limit = Duration::from_millis(300);
    let released = Barrier::new(3);
    let results = others(
        |end| {
            released.wait();
            let late = end.all_gather(&[1]).unwrap_err();
            assert!(matches!(late, CommunicatorError::TimedOut { .. }), "{late}");
        },
        |end| {
            let result = end.with_time_limit(limit).all_gather(&[1]);
            released.wait();
            result
        },
    );
    for result in results {
        let error = result.unwrap_err();
        let due = CommunicatorError::TimedOut {
            operation: "all_gather",
            missing: vec![2],
            limit,
        };
        assert_eq!(error, due);
        assert_eq!(
            Error::from(error).to_string(),
            "all_gather was not done within 300ms: rank 2 did not come"
        );
    }
}

#[test]
fn a_rank_that_leaves_after_its_last_collective_harms_nobody() {
    for result in others(
        |end| drop(end.all_gather(&[7])),
        |end| {
            thread::sleep(Duration::from_millis(50));
            end.all_gather(&[7])
        },
    ) {
        assert_eq!(result.unwrap(), [[7], [7], [7]]);
    }
}
