//! Dropout is judged by what chance may do, and the gradients by the mask that
//! the output shows.
#![allow(missing_docs, clippy::unwrap_used)]

mod answers;

use answers::{judged, ok, shards};
use fixtures::{AttentionCase, Inputs};
use rstest::rstest;
use ulysses_conformance::judge::{Due, Judgement, Verdict};
use ulysses_conformance::oracle::{Answer, attention_dropped};

fn case(dtype: &str, dropout: u32) -> AttentionCase {
    format!("attention/p2-b2-s36-hq4-hkv2-d36-causal-{dtype}-onehot-seed1-dropout{dropout}")
        .parse()
        .unwrap()
}

/// 64 random bits for each index of a stream: a step of SplitMix64.
fn random(stream: u64, index: u64) -> u64 {
    let z = (stream << 32 | index)
        .wrapping_add(1)
        .wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// What weights are multiplied by: `kept` with this probability of a 0, in a
/// mask for each (batch, head), from the stream that `stream_of` gives it.
fn multiplier(
    case: &AttentionCase,
    probability: f64,
    kept: f64,
    stream_of: impl Fn(usize, usize) -> u64,
) -> Vec<f64> {
    let mut multiplier = Vec::new();
    for batch in 0..case.batch {
        for head in 0..case.query_heads {
            let stream = stream_of(batch, head);
            multiplier.extend((0..case.sequence * case.sequence).map(|i| {
                let uniform = random(stream, i as u64) as f64 / 2f64.powi(64);
                if uniform < probability { 0.0 } else { kept }
            }));
        }
    }
    multiplier
}

fn answer(case: &AttentionCase, multiplier: &[f64]) -> Answer<Vec<f64>> {
    attention_dropped(case, &Inputs::of(case), Some(multiplier)).unwrap()
}

fn judge(case: &AttentionCase, answer: &Answer<Vec<f64>>) -> Judgement {
    judged(case, Due::Answer, ok(shards(case, answer)))
}

/// A stream for each (batch, head).
fn own(batch: usize, head: usize) -> u64 {
    (batch * 4 + head) as u64
}

#[rstest]
fn what_dropout_does_passes(
    #[values("f64", "f32", "bf16", "f16")] dtype: &str,
    #[values(10, 30, 60)] dropout: u32,
) {
    let case = case(dtype, dropout);
    let p = f64::from(dropout) / 100.0;
    let judgement = judge(
        &case,
        &answer(&case, &multiplier(&case, p, 1.0 / (1.0 - p), own)),
    );
    assert_eq!(
        (judgement.verdict, &*judgement.sentence),
        (Verdict::Pass, ""),
        "{judgement:?}"
    );
}

#[rstest]
fn a_wrong_rate_fails_with_the_rate_of_false_alarms(#[values("f32", "bf16")] dtype: &str) {
    let case = case(dtype, 30);
    for rate in [0.2, 0.4, 0.0] {
        let judgement = judge(
            &case,
            &answer(&case, &multiplier(&case, rate, 1.0 / 0.7, own)),
        );
        assert_eq!(judgement.verdict, Verdict::Fail);
        let told = judgement.sentence;
        assert!(
            told.contains(
                "weights are dropped, each with probability 0.3 \
                 (an honest implementation is blamed in one of 1e9 answers at most)"
            ),
            "{told}"
        );
    }
}

#[rstest]
fn kept_weights_that_are_not_divided_fail(
    #[values("f32", "bf16")] dtype: &str,
    #[values(5, 30, 60)] dropout: u32,
) {
    let case = case(dtype, dropout);
    let p = f64::from(dropout) / 100.0;
    let judgement = judge(&case, &answer(&case, &multiplier(&case, p, 1.0, own)));
    assert_eq!(judgement.verdict, Verdict::Fail);
    let told = judgement.sentence;
    let expected = match dropout {
        5 => "out, dq, dk and dv are wrong",
        _ => "a weight is neither dropped nor kept and divided by 1 - 0.",
    };
    assert!(told.starts_with(expected), "{told}");
}

/// Rank 0 holds heads 0 and 1, rank 1 heads 2 and 3, and both draw alike.
#[rstest]
fn the_same_mask_on_two_ranks_fails(
    #[values("f32", "bf16")] dtype: &str,
    #[values(10, 30)] dropout: u32,
) {
    let case = case(dtype, dropout);
    let p = f64::from(dropout) / 100.0;
    let alike = |batch: usize, head: usize| own(batch, head % 2);
    let judgement = judge(
        &case,
        &answer(&case, &multiplier(&case, p, 1.0 / (1.0 - p), alike)),
    );
    assert_eq!(judgement.verdict, Verdict::Fail);
    let told = judgement.sentence;
    let expected = "the masks of batch 0, head 0 and batch 0, head 2 differ in 0 of 666 weights";
    assert!(told.starts_with(expected), "{told}");
}

#[rstest]
fn a_backward_with_another_mask_fails(#[values("f32", "bf16")] dtype: &str) {
    let case = case(dtype, 10);
    let with = |offset: u64| {
        let mask = multiplier(&case, 0.1, 1.0 / 0.9, |b, h| own(b, h) + offset);
        answer(&case, &mask)
    };
    let mixed = Answer {
        out: with(0).out,
        ..with(100)
    };
    let judgement = judge(&case, &mixed);
    assert_eq!(judgement.verdict, Verdict::Fail);
    assert_eq!(judgement.sentence, "dq, dk and dv are wrong");
}

#[test]
fn where_chance_cannot_be_told_from_fault_nothing_is_said_of_it() {
    let case: AttentionCase = "attention/p1-b1-s6-hq2-hkv2-d6-causal-f32-onehot-seed1-dropout10"
        .parse()
        .unwrap();
    let judgement = judge(
        &case,
        &answer(&case, &multiplier(&case, 0.1, 1.0 / 0.9, own)),
    );
    assert_eq!(judgement.verdict, Verdict::Unclear);
    let expected = "of 42 weights are dropped, each with probability 0.1: too few to tell";
    assert!(judgement.sentence.contains(expected), "{judgement:?}");
}
