//! Right answers pass, wrong ones do not, and the verdict says whose fault it
//! is.
#![allow(missing_docs, clippy::unwrap_used)]

mod answers;

use answers::{judged, ok, right, said, shards, spoiled};
use fixtures::exchange::AnswerStatus;
use fixtures::{Array, AttentionCase, Feature};
use rstest::rstest;
use ulysses_conformance::implementation::{Collapse, Failure};
use ulysses_conformance::judge::{Cause, Due, Place, Verdict, without_answer};

const F32: &str = "attention/p2-b2-s36-hq4-hkv2-d16-causal-f32-gaussian-seed1";
const BF16: &str = "attention/p4-b1-s52-hq8-hkv2-d64-causal-bf16-peaked-seed1";
const F16: &str = "attention/p3-b1-s51-hq6-hkv1-d16-full-f16-gaussian-seed1";

#[rstest]
fn the_oracles_answer_rounded_once_passes(#[values(F32, BF16, F16)] name: &str) {
    let case: AttentionCase = name.parse().unwrap();
    let judgement = spoiled(&case, |_| {});
    assert_eq!(judgement.verdict, Verdict::Pass, "{judgement:?}");
    assert_eq!(judgement.sentence, "");
}

#[rstest]
fn a_gradient_scaled_by_the_number_of_ranks_fails_and_is_told_by_its_factor(
    #[values(F32, BF16, F16)] name: &str,
    #[values(0.25, 0.5, 2.0)] factor: f64,
) {
    let case: AttentionCase = name.parse().unwrap();
    let judgement = spoiled(&case, |answer| {
        answer.dq.iter_mut().for_each(|x| *x *= factor);
    });
    assert_eq!(judgement.verdict, Verdict::Fail);
    assert_eq!(judgement.sentence, "dq is wrong");
    let expected = format!("it is {factor:.3} times the right one");
    assert!(judgement.details[0].contains(&expected), "{judgement:?}");
}

/// The elements of one row, by batch, token and head.
fn row(
    case: &AttentionCase,
    heads: usize,
    batch: usize,
    token: usize,
    head: usize,
) -> std::ops::Range<usize> {
    let row = (batch * case.sequence + token) * heads + head;
    row * case.head_size..(row + 1) * case.head_size
}

#[rstest]
fn one_zeroed_row_fails_and_is_told_by_its_place(#[values(F32, BF16, F16)] name: &str) {
    let case: AttentionCase = name.parse().unwrap();
    for token in [0, case.sequence / 2, case.sequence - 1] {
        let spoil = row(&case, case.kv_heads, 0, token, case.kv_heads - 1);
        let judgement = spoiled(&case, |answer| answer.dv[spoil.clone()].fill(0.0));
        assert_eq!(judgement.verdict, Verdict::Fail, "token {token}");
        let comparison = judgement.comparison.unwrap();
        let worst = comparison.tensors[3].worst.as_ref().unwrap();
        let (batch, head) = (0, case.kv_heads - 1);
        assert_eq!(worst.place, Place::Token { batch, token, head });
    }
}

#[rstest]
fn two_rows_in_each_others_place_fail(#[values(F32, BF16, F16)] name: &str) {
    let case: AttentionCase = name.parse().unwrap();
    let a = row(&case, case.query_heads, 0, 20, 0);
    let b = row(&case, case.query_heads, 0, 20, 1);
    let judgement = spoiled(&case, |answer| {
        for (a, b) in a.clone().zip(b.clone()) {
            answer.out.swap(a, b);
        }
    });
    assert_eq!(judgement.verdict, Verdict::Fail);
    assert_eq!(judgement.comparison.unwrap().tensors[0].wrong_rows, 2);
}

#[rstest]
fn one_nan_or_infinity_fails(#[values(f64::NAN, f64::INFINITY)] value: f64) {
    let judgement = spoiled(&F32.parse().unwrap(), |answer| answer.out[5] = value);
    assert_eq!(judgement.verdict, Verdict::Fail);
    assert_eq!(judgement.sentence, "out is wrong");
    assert_eq!(judgement.comparison.unwrap().tensors[0].wrong_rows, 1);
}

#[test]
fn float32_computed_in_bfloat16_fails() {
    let case: AttentionCase = F32.parse().unwrap();
    let coarse =
        |values: &[f64]| Array::from_f64(fixtures::Dtype::Bf16, &[values.len()], values).to_f64();
    let judgement = spoiled(&case, |answer| answer.out = coarse(&answer.out));
    assert_eq!(judgement.verdict, Verdict::Fail);
}

#[test]
fn the_worst_row_is_told_with_its_rank_and_local_token() {
    let case: AttentionCase = BF16.parse().unwrap();
    let judgement = spoiled(&case, |answer| {
        answer.dq[row(&case, 8, 0, 30, 5)].fill(9.0);
    });
    let told = &judgement.details[1];
    let expected = "dq: worst at batch 0, head 5, token 30 (rank 2, its token 4), channel ";
    assert!(told.starts_with(expected), "{told}");
}

#[test]
fn an_answer_in_the_wrong_shape_fails_with_both_shapes() {
    let case: AttentionCase = F32.parse().unwrap();
    let mut answers = shards(&case, &right(&case));
    answers[1].get_mut("dk").unwrap().shape = vec![2, 2, 18, 16];
    let judgement = judged(&case, Due::Answer, ok(answers));
    assert_eq!(judgement.verdict, Verdict::Fail);
    assert_eq!(
        judgement.sentence,
        "rank 1: `dk` is f32 [2, 2, 18, 16], due is f32 [2, 18, 2, 16] \
         [batch, tokens, heads, head size]"
    );
}

#[test]
fn an_answer_in_the_wrong_dtype_fails() {
    let case: AttentionCase = BF16.parse().unwrap();
    let wide = AttentionCase {
        dtype: fixtures::Dtype::F32,
        ..case.clone()
    };
    let judgement = judged(&case, Due::Answer, ok(shards(&wide, &right(&case))));
    assert_eq!(judgement.verdict, Verdict::Fail);
    assert!(
        judgement.sentence.starts_with("rank 0: `out` is f32"),
        "{judgement:?}"
    );
}

#[test]
fn a_missing_tensor_fails_by_name() {
    let case: AttentionCase = F32.parse().unwrap();
    let mut answers = shards(&case, &right(&case));
    answers[0].remove("dv");
    let judgement = judged(&case, Due::Answer, ok(answers));
    assert_eq!(judgement.verdict, Verdict::Fail);
    assert_eq!(judgement.sentence, "rank 0: the tensor `dv` is missing");
}

#[rstest]
#[case::error(
    AnswerStatus::Error,
    "boom",
    Due::Answer,
    Verdict::Fail,
    "rank 0: boom"
)]
#[case::unsupported(
    AnswerStatus::Unsupported,
    "no",
    Due::Answer,
    Verdict::NotClaimed,
    "rank 0: no"
)]
#[case::due(
    AnswerStatus::Error,
    "no",
    Due::Refusal(Cause::Unclaimed(Feature::Batch)),
    Verdict::Refused,
    "rank 0: no"
)]
#[case::wordless(
    AnswerStatus::Error,
    " ",
    Due::Refusal(Cause::Unclaimed(Feature::Batch)),
    Verdict::Fail,
    "rank 0 refused without a word"
)]
#[case::traceback(
    AnswerStatus::Error,
    "Traceback (most recent call last):\n  File \"a.py\", line 1\nValueError: 3 heads\n",
    Due::Answer,
    Verdict::Fail,
    "rank 0: ValueError: 3 heads"
)]
fn what_every_rank_says_decides(
    #[case] status: AnswerStatus,
    #[case] message: &str,
    #[case] due: Due,
    #[case] verdict: Verdict,
    #[case] sentence: &str,
) {
    let answers = vec![said(status, message), said(status, message)];
    let judgement = judged(&F32.parse().unwrap(), due, answers);
    let sentence = match due {
        Due::Refusal(_) if verdict == Verdict::Fail => {
            format!("does not claim `batch` and does not refuse it either: {sentence}")
        }
        _ => sentence.to_owned(),
    };
    assert_eq!((judgement.verdict, judgement.sentence), (verdict, sentence));
}

#[test]
fn ranks_that_disagree_whether_to_answer_fail() {
    let case: AttentionCase = F32.parse().unwrap();
    for due in [Due::Answer, Due::Refusal(Cause::Unclaimed(Feature::Batch))] {
        let mut answers = ok(shards(&case, &right(&case)));
        answers[1] = said(AnswerStatus::Error, "boom");
        let judgement = judged(&case, due, answers);
        assert_eq!(judgement.verdict, Verdict::Fail);
        assert_eq!(judgement.details, ["rank 1: boom"]);
    }
}

#[test]
fn a_wrong_answer_beyond_the_claim_fails_and_a_right_one_passes() {
    let case: AttentionCase = F32.parse().unwrap();
    let due = Due::Refusal(Cause::Unclaimed(Feature::GroupedKv));
    let mut answer = right(&case);
    let judgement = judged(&case, due, ok(shards(&case, &answer)));
    assert_eq!(judgement.verdict, Verdict::Pass);
    assert_eq!(
        judgement.sentence,
        "answers rightly although it does not claim `grouped-kv`"
    );
    answer.dk.iter_mut().for_each(|x| *x = -*x);
    let judgement = judged(&case, due, ok(shards(&case, &answer)));
    assert_eq!(judgement.verdict, Verdict::Fail);
    assert_eq!(
        judgement.sentence,
        "does not claim `grouped-kv` and does not refuse it either: dk is wrong"
    );
}

#[test]
fn garbage_crashes_and_hangs_are_told_apart() {
    let case: AttentionCase = F32.parse().unwrap();
    let answers = vec![Err("not a safetensors file".to_owned()), Err(String::new())];
    let judgement = judged(&case, Due::Answer, answers);
    assert_eq!(judgement.verdict, Verdict::Fail);
    assert_eq!(
        judgement.sentence,
        "rank 0 answered garbage: not a safetensors file"
    );
    let collapse = Collapse {
        sentence: "rank 1 ended".to_owned(),
        logs: vec!["rank-1 stderr: ouch".to_owned()],
        is_of_ranks: true,
    };
    let judgement = |failure| without_answer(failure).unwrap();
    let crash = judgement(Failure::Crashed(collapse.clone()));
    assert_eq!(
        (crash.verdict, crash.details),
        (Verdict::Crash, collapse.logs.clone())
    );
    assert_eq!(judgement(Failure::Hung(collapse)).verdict, Verdict::Hang);
    let harness = judgement(Failure::Harness("no disk".to_owned()));
    assert_eq!(harness.verdict, Verdict::Unclear);
    assert!(without_answer(Failure::Interrupted).is_none());
}
