//! What a case is said to show is what the judge sees, and a case that shows
//! too little is the suite's own fault.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

mod answers;

use answers::spoiled;
use fixtures::AttentionCase;
use fixtures::exchange::Precision;
use rstest::rstest;
use ulysses_conformance::judge::power::{Power, of_case};
use ulysses_conformance::judge::{Judgement, Verdict};
use ulysses_conformance::oracle::{Answer, AnswerTensor};

const F32: &str = "attention/p2-b1-s9-hq4-hkv2-d4-causal-f32-gaussian-seed1";
const BF16: &str = "attention/p2-b1-s8-hq2-hkv1-d4-causal-bf16-peaked-seed1";
/// Rows of less than this are nothing in these cases' element types.
const SMALLEST: f64 = 1e-7;

const POWERLESS: &str = "attention/p2-b1-s2-hq2-hkv1-d4-causal-f16-peaked-seed1";

fn powers(case: &AttentionCase) -> Vec<Power> {
    of_case(case, Precision::default()).unwrap()
}

fn numbers(answer: &mut Answer<Vec<f64>>, tensor: AnswerTensor) -> &mut Vec<f64> {
    match tensor {
        AnswerTensor::Out => &mut answer.out,
        AnswerTensor::QueryGradient => &mut answer.dq,
        AnswerTensor::KeyGradient => &mut answer.dk,
        AnswerTensor::ValueGradient => &mut answer.dv,
        other => panic!("these cases have no {}", other.name()),
    }
}

fn is_seen(judgement: &Judgement) -> bool {
    judgement.verdict == Verdict::Fail
}

#[rstest]
fn a_tensor_wrong_by_more_than_the_smallest_factor_is_seen_and_one_wrong_by_less_is_not(
    #[values(F32, BF16)] name: &str,
) {
    let case: AttentionCase = name.parse().unwrap();
    for power in powers(&case) {
        let by = |factor: f64| {
            spoiled(&case, |answer| {
                numbers(answer, power.tensor)
                    .iter_mut()
                    .for_each(|number| *number *= factor);
            })
        };
        // The last rounding to the element type may take back or add a part.
        let [more, less] = [1.0 + 1.5 * power.scale, 1.0 + 0.25 * power.scale];
        assert!(is_seen(&by(more)), "{} by {more}", power.tensor.name());
        assert!(!is_seen(&by(less)), "{} by {less}", power.tensor.name());
    }
}

#[rstest]
#[case::every_row(F32, AnswerTensor::QueryGradient, 1.0)]
#[case::most_rows(BF16, AnswerTensor::KeyGradient, 0.75)]
fn of_rows_that_are_lost_the_judge_sees_the_share_that_is_said(
    #[case] name: &str,
    #[case] tensor: AnswerTensor,
    #[case] share: f64,
) {
    let case: AttentionCase = name.parse().unwrap();
    let said = powers(&case).into_iter().find(|p| p.tensor == tensor);
    assert_eq!(said.unwrap().rows, share);
    let mut right = answers::right(&case);
    let row = |row: usize| row * case.head_size..(row + 1) * case.head_size;
    let right = numbers(&mut right, tensor);
    // A row that rounds to nothing in the element type cannot be lost.
    let rows: Vec<usize> = (0..right.len() / case.head_size)
        .filter(|&a| right[row(a)].iter().any(|x| x.abs() > SMALLEST))
        .collect();
    let lost = |&&a: &&usize| {
        is_seen(&spoiled(&case, |answer| {
            numbers(answer, tensor)[row(a)].fill(0.0);
        }))
    };
    let seen = rows.iter().filter(lost).count();
    assert_eq!(seen as f64 / rows.len() as f64, share, "of {}", rows.len());
}

#[test]
fn a_case_that_cannot_show_a_mistake_is_unclear_and_not_a_pass() {
    let case: AttentionCase = POWERLESS.parse().unwrap();
    let judgement = spoiled(&case, |_| {});
    assert_eq!(judgement.verdict, Verdict::Unclear, "{judgement:?}");
    assert_eq!(judgement.verdict.fault(), Some("harness"));
    assert!(
        judgement
            .sentence
            .starts_with("the case has no power: two heads in each other's place"),
        "{}",
        judgement.sentence
    );
}

#[test]
fn a_wrong_answer_to_a_case_of_little_power_is_still_a_failure() {
    let case: AttentionCase = POWERLESS.parse().unwrap();
    let judgement = spoiled(&case, |answer| answer.out[0] += 1.0);
    assert_eq!(judgement.verdict, Verdict::Fail, "{judgement:?}");
}
