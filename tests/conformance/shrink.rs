//! A failure is made as small as it gets, by asking, whoever it is of.
#![allow(missing_docs, clippy::unwrap_used)]

mod answers;
mod program;
mod spoiled;

use fixtures::{AttentionCase, Case, Content, Dtype, Feature};
use program::{Run, fake, program};
use spoiled::{How, Spoiled, summary};
use ulysses_conformance::implementation::Interrupt;
use ulysses_conformance::known::KnownFailures;
use ulysses_conformance::shrink::{Smallest, distinct, smallest};

const LARGE: &str = "attention/p3-b2-s60-hq12-hkv6-d16-causal-bf16-peaked-seed5";

/// How many tokens the case has.
fn sequence(case: &Case) -> usize {
    case.attention().unwrap().sequence
}

/// The smallest case that fails as this one does, and how many questions that
/// took.
fn shrunk(
    name: &str,
    how: fn(&AttentionCase) -> Option<How>,
    unclaimed: &[Feature],
) -> (Smallest, usize) {
    let mut spoiled = Spoiled::new(how);
    spoiled.unclaimed = unclaimed.to_vec();
    let summary = summary(&mut spoiled, &[name], &mut KnownFailures::default());
    let record = &summary.records[0];
    assert!(record.judgement.verdict.is_failure(), "{record:?}");
    let before = spoiled.asked.len();
    let smallest = smallest(&mut spoiled, record, &Interrupt::default());
    (smallest, spoiled.asked.len() - before)
}

type When = fn(&AttentionCase) -> Option<How>;

const PARTS: &str = "attention/p2-b2-s20-hq4-hkv2-d16-causal-f64-peaked-seed1-window7-rope-again";
const CROSS: &str = "attention/p2-b2-s20-hq4-hkv2-d16-full-f64-peaked-seed1-cross9-sinks";
const BAD: &str = "attention/p2-b2-s20-hq4-hkv2-d16-full-f32-peaked-seed1-window7-sinks-bad:sinks";

/// What fails, when, and what is left of it behind `attention/`.
const SHRUNK: [(&str, When, &str); 11] = [
    (
        LARGE,
        |_| Some(How::Output),
        "p1-b1-s1-hq1-hkv1-d1-full-f32-gaussian-seed0",
    ),
    (
        PARTS,
        |_| Some(How::Output),
        "p1-b1-s1-hq1-hkv1-d1-full-f32-gaussian-seed0",
    ),
    (
        BAD,
        |_| None,
        "p1-b1-s1-hq1-hkv1-d1-full-f32-gaussian-seed0-sinks-bad:sinks",
    ),
    (
        LARGE,
        |c| (c.kv_heads > 1 && c.query_heads > c.kv_heads).then_some(How::Output),
        "p1-b1-s1-hq4-hkv2-d1-full-f32-gaussian-seed0",
    ),
    (
        LARGE,
        |c| (c.world > 1 && c.sequence > 7).then_some(How::Output),
        "p2-b1-s8-hq1-hkv1-d1-full-f32-gaussian-seed0",
    ),
    (
        LARGE,
        |c| (c.dtype == Dtype::Bf16).then_some(How::Output),
        "p1-b1-s1-hq1-hkv1-d1-full-bf16-gaussian-seed0",
    ),
    (
        LARGE,
        |c| (c.content == Content::Peaked).then_some(How::Output),
        "p1-b1-s1-hq1-hkv1-d1-full-f32-peaked-seed0",
    ),
    (
        PARTS,
        |c| c.extras.window.is_some().then_some(How::Output),
        "p1-b1-s1-hq1-hkv1-d1-full-f32-gaussian-seed0-window1",
    ),
    (
        CROSS,
        |c| c.extras.cross.is_some_and(|n| n > 3).then_some(How::Output),
        "p1-b1-s1-hq1-hkv1-d1-full-f32-gaussian-seed0-cross4",
    ),
    (
        LARGE,
        |c| (c.batch > 1).then_some(How::Error),
        "p1-b2-s1-hq1-hkv1-d1-full-f32-gaussian-seed0",
    ),
    (
        LARGE,
        |c| (c.sequence > 1).then_some(How::Crash),
        "p1-b1-s2-hq1-hkv1-d1-full-f32-gaussian-seed0",
    ),
];

#[test]
fn what_a_failure_does_not_need_goes() {
    for (name, how, due) in SHRUNK {
        let (smallest, asks) = shrunk(name, how, &[]);
        assert_eq!(smallest.case.to_string(), format!("attention/{due}"));
        assert!(smallest.is_complete, "{due}");
        assert!(asks <= 60, "{due}: {asks}");
    }
}

#[test]
fn another_failure_is_not_taken_for_it() {
    // On one rank it raises an error, and for one head dq is wrong.
    let how = |case: &AttentionCase| match (case.world, case.query_heads) {
        (1, _) => Some(How::Error),
        (_, 1) => Some(How::QueryGradient),
        _ => Some(How::Output),
    };
    let (smallest, _) = shrunk(LARGE, how, &[]);
    let due = "attention/p2-b1-s1-hq2-hkv1-d1-full-f32-gaussian-seed0";
    assert_eq!(smallest.case.to_string(), due);
}

#[test]
fn what_is_not_claimed_is_not_asked() {
    let unclaimed = [Feature::MaskFull, Feature::FewerQueryHeadsThanRanks];
    let how = |case: &AttentionCase| (case.world > 1).then_some(How::Output);
    let (smallest, _) = shrunk(LARGE, how, &unclaimed);
    let due = "attention/p2-b1-s1-hq2-hkv1-d1-causal-f32-gaussian-seed0";
    assert_eq!(smallest.case.to_string(), due);
}

/// A step over a limit stays one over this limit.
#[test]
fn silence_beyond_a_limit_shrinks_to_silence_beyond_it() {
    let name = "attention/p2-b2-s21-hq4-hkv2-d8-full-f32-gaussian-seed1-sinks";
    let how =
        |case: &AttentionCase| (!case.sequence.is_multiple_of(case.world)).then_some(How::Output);
    let (smallest, _) = shrunk(name, how, &[Feature::UnevenSequence]);
    let due = "attention/p2-b1-s1-hq1-hkv1-d1-full-f32-gaussian-seed0";
    assert_eq!(smallest.case.to_string(), due);
}

#[test]
fn a_search_ends_after_sixty_asks_and_says_so() {
    // Only ever one token fewer, and one head fewer, fails.
    let name = "attention/p1-b1-s200-hq1-hkv1-d2-full-f32-gaussian-seed0";
    let how = |case: &AttentionCase| (case.sequence > 100).then_some(How::Output);
    let (smallest, asks) = shrunk(name, how, &[]);
    assert!(!smallest.is_complete);
    assert_eq!(asks, 60);
    assert!(
        (101..200).contains(&sequence(&smallest.case)),
        "{smallest:?}"
    );
}

#[test]
fn failures_of_one_kind_are_shrunk_once() {
    let names: Vec<String> = (4..10)
        .map(|s| format!("attention/p1-b1-s{s}-hq2-hkv2-d4-full-f32-gaussian-seed0"))
        .collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut spoiled = Spoiled::new(|case| match case.sequence {
        4 => None,
        5 | 7 => Some(How::Output),
        6 => Some(How::QueryGradient),
        _ => Some(How::Crash),
    });
    let summary = summary(&mut spoiled, &names, &mut KnownFailures::default());
    let lengths = |most| -> Vec<usize> {
        let distinct = distinct(&summary.records, most);
        distinct
            .iter()
            .map(|record| sequence(&record.case))
            .collect()
    };
    assert_eq!(lengths(5), [5, 6, 8]);
    assert_eq!(lengths(2), [5, 6]);
}

#[test]
fn somebody_elses_failure_is_shrunk_too() {
    let run: Run = program()
        .args(["run", "--shrink", "--launch", &fake("kv_tiled.py")])
        .args(["--filter", "p2-b3-s84-hq8-hkv4-d80-full-f32"])
        .output()
        .unwrap()
        .into();
    assert_eq!(run.code, 1);
    assert!(
        run.stderr.contains("kv_tiled.py shrinking attention/p2"),
        "{}",
        run.stderr
    );
    let (_, smallest) = run.stdout.split_once("\n  smallest: ").unwrap();
    let (_, name) = smallest
        .lines()
        .next()
        .unwrap()
        .split_once("--case ")
        .unwrap();
    let case: AttentionCase = name.parse().unwrap();
    assert_eq!((case.query_heads, case.kv_heads), (4, 2), "{name}");
    assert_eq!((case.world, case.batch), (1, 1), "{name}");
    assert!(case.sequence <= 3 && case.head_size <= 2, "{name}");
}
