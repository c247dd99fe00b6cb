//! The judge of the profiles `batch` and `mesh`: what it holds to be right is
//! what can be written down by hand, and what is wrong it fails and names.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use fixtures::exchange::{self, AnswerInfo, AnswerStatus, Declared, Tensors};
use fixtures::{Array, Case};
use rstest::rstest;
use ulysses_conformance::diagnosis::Mistake;
use ulysses_conformance::implementation::RankAnswer;
use ulysses_conformance::judge::{self, Due, Judgement, Question, Verdict, right_answer};
use ulysses_conformance::runner::Asked;

const IGNORED: i64 = -100;

fn case(name: &str) -> Case {
    name.parse().unwrap()
}

/// What is due from each rank.
fn due(name: &str) -> Vec<Tensors> {
    let case = case(name);
    let asked = Asked {
        question: Question::of(&case, Declared::default()),
        answers: Vec::new(),
    };
    let right = right_answer(&asked, Declared::default()).unwrap();
    let of_rank = |rank: usize| {
        let end = format!(".rank-{rank}");
        let own = right.iter().filter_map(|(name, array)| {
            let numbers = numbers(array);
            Some((
                name.strip_suffix(&end)?.to_owned(),
                Array::from_i64(&array.shape, &numbers),
            ))
        });
        own.collect()
    };
    (0..case.world()).map(of_rank).collect()
}

fn numbers(array: &Array) -> Vec<i64> {
    array.to_f64().iter().map(|&x| x as i64).collect()
}

fn posed(name: &str, rank: usize, tensor: &str) -> Vec<i64> {
    numbers(&exchange::posed(&case(name))[rank].1[tensor])
}

fn judged(name: &str, ranks: Vec<Tensors>) -> Judgement {
    let info = || AnswerInfo {
        status: AnswerStatus::Ok,
        message: String::new(),
        elapsed_s: 0.0,
        peak_memory_bytes: None,
        bytes_sent: None,
    };
    let answers: Vec<RankAnswer> = ranks.into_iter().map(|t| Ok((info(), t))).collect();
    let question = Question::of(&case(name), Declared::default());
    judge::judge(&question, Declared::default(), Due::Answer, &answers)
}

fn named(judgement: &Judgement) -> Option<Mistake> {
    judgement.diagnosis.as_ref()?.mistake
}

#[test]
fn the_target_of_a_shards_last_token_is_the_next_shards_first_label() {
    let name = "batch/p2-b1-s8-seed0";
    let [ids, labels] = ["input_ids", "labels"].map(|tensor| posed(name, 0, tensor));
    let ranks = due(name);
    for (rank, tensors) in ranks.iter().enumerate() {
        let own = rank * 4..rank * 4 + 4;
        assert_eq!(numbers(&tensors["input_ids"]), ids[own.clone()]);
        let places: Vec<i64> = own.clone().map(|place| place as i64).collect();
        assert_eq!(numbers(&tensors["position_ids"]), places);
        let targets = own.map(|place| labels.get(place + 1).copied().unwrap_or(IGNORED));
        assert_eq!(
            numbers(&tensors["shift_labels"]),
            targets.collect::<Vec<_>>()
        );
    }
}

#[test]
fn documents_restart_positions_and_end_targets_and_fill_belongs_to_the_last() {
    let name = "batch/p1-b1-s9-seed1-ends3-pad12";
    let ends = posed(name, 0, "document_ends");
    let labels = posed(name, 0, "labels");
    let (a, b) = (ends[0], ends[1]);
    assert!(0 < a && a < b && b < 9 && ends[2] == 9);
    let positions: Vec<i64> = (0..a).chain(0..b - a).chain(0..12 - b).collect();
    let tensors = due(name).remove(0);
    assert_eq!(numbers(&tensors["position_ids"]), positions);
    let mut targets = labels[1..].to_vec();
    targets.resize(12, IGNORED);
    (targets[a as usize - 1], targets[b as usize - 1]) = (IGNORED, IGNORED);
    assert_eq!(numbers(&tensors["shift_labels"]), targets);
    assert_eq!(numbers(&tensors["input_ids"])[9..], [3, 3, 3]);
    // DeepSpeed's rule by name.
    let across = due("batch/p1-b1-s9-seed1-ends3-across-pad12").remove(0);
    let targets = numbers(&across["shift_labels"]);
    assert_eq!(targets[..8], labels[1..]);
}

#[test]
fn a_stream_is_served_round_by_round_in_the_order_of_ranks() {
    let name = "batch/p2-b1-s4-seed0-stream1-ragged-epochs2";
    // Rank 0 brings two batches and rank 1 one.
    let order = [(0, "input_ids.0"), (1, "input_ids.0"), (0, "input_ids.1")];
    let ranks = due(name);
    for (rank, tensors) in ranks.iter().enumerate() {
        assert_eq!(numbers(&tensors["served"]), [3, 3]);
        for number in 0..6 {
            let (source, tensor) = order[number % 3];
            let whole = posed(name, source, tensor);
            let shard = &tensors[&format!("input_ids.{number}")];
            assert_eq!(numbers(shard), whole[2 * rank..2 * rank + 2]);
        }
    }
}

#[test]
fn a_rank_of_a_mesh_stands_where_it_stands() {
    let name = "mesh/p8-replicate2-shard2-sp2-seed0-mpu-sums";
    let tensors = &due(name)[5];
    let of = |tensor: &str| numbers(&tensors[tensor]);
    assert_eq!(of("coordinates"), [1, 0, 1]);
    assert_eq!(of("sequence_parallel"), [4, 5]);
    assert_eq!(of("data_parallel_shard"), [5, 7]);
    assert_eq!(of("data_parallel_replicate"), [1, 5]);
    assert_eq!(of("data_parallel"), [1, 3, 5, 7]);
    assert_eq!(of("sharding"), [4, 5, 6, 7]);
    assert_eq!(of("mpu"), [1, 2, 5, 8, 1, 2]);
    let value = |rank: usize| posed(name, rank, "value")[0];
    assert_eq!(of("sum.data_parallel_replicate"), [value(1) + value(5)]);
}

#[rstest]
#[case("batch/p3-b2-s23-seed0-striped-docs3-mask")]
#[case("batch/p2-b2-s24-seed0-ends3-stream2-lengths-ragged-epochs2")]
#[case("mesh/p4-replicate2-shard1-sp2-seed0-mpu-sums")]
fn what_is_due_is_exact_and_any_other_number_is_wrong(#[case] name: &str) {
    let right = due(name);
    assert_eq!(judged(name, right.clone()).verdict, Verdict::Exact);
    for tensor in right[1].keys() {
        let mut wrong = right.clone();
        let array = wrong[1].get_mut(tensor).unwrap();
        let mut all = numbers(array);
        *all.last_mut().unwrap() += 1;
        *array = Array::from_i64(&array.shape, &all);
        assert_eq!(judged(name, wrong).verdict, Verdict::Fail, "{tensor}");
    }
}

#[test]
fn a_shard_that_is_not_there_is_missed_and_an_epoch_that_is_not_is_named() {
    let name = "batch/p2-b1-s8-seed0-stream2-epochs2";
    let right = due(name);
    let mut wrong = right.clone();
    wrong[0].remove("input_ids.7");
    let judgement = judged(name, wrong);
    assert_eq!(judgement.verdict, Verdict::Fail);
    assert_eq!(named(&judgement), Some(Mistake::WrongShape));
    let mut empty = right;
    for tensors in &mut empty {
        tensors.retain(|name, _| !["4", "5", "6", "7"].iter().any(|k| name.ends_with(k)));
        tensors.insert("served".to_owned(), Array::from_i64(&[2], &[4, 0]));
    }
    assert_eq!(named(&judged(name, empty)), Some(Mistake::SecondEpochEmpty));
}
