//! What the judge says that was done, and cases to see it on.
// Not every test uses all of it.
#![allow(dead_code)]

use fixtures::AttentionCase;
use ulysses_conformance::diagnosis::{Diagnosis, Mistake};
use ulysses_conformance::judge::{Due, Judgement, Verdict};
use ulysses_conformance::oracle::Answer;

use crate::answers::{judged, ok, right, shards};

pub(crate) fn diagnosed(judgement: Judgement) -> Diagnosis {
    assert_eq!(judgement.verdict, Verdict::Fail, "{judgement:?}");
    *judgement.diagnosis.unwrap()
}

#[track_caller]
pub(crate) fn assert_named(diagnosis: &Diagnosis, mistake: Mistake) {
    assert_eq!(diagnosis.mistake, Some(mistake), "{diagnosis:?}");
    assert!(diagnosis.confidence > 0.3, "{diagnosis:?}");
}

/// Sizes over which most mistakes show: replicated and grouped KV heads, one
/// query head for each, all of them the same; two, three and four ranks.
pub(crate) const SIZES: [&str; 6] = [
    "attention/p2-b2-s36-hq4-hkv4-d16-causal-f32-peaked-seed1",
    "attention/p2-b2-s36-hq8-hkv4-d16-causal-bf16-peaked-seed1",
    "attention/p3-b2-s36-hq6-hkv3-d16-causal-f32-gaussian-seed1",
    "attention/p4-b2-s40-hq8-hkv2-d16-causal-bf16-peaked-seed1",
    "attention/p4-b2-s40-hq8-hkv4-d16-causal-f32-peaked-seed1",
    "attention/p4-b1-s40-hq8-hkv1-d16-causal-f64-peaked-seed1",
];

pub(crate) fn judged_as(case: &AttentionCase, mut answer: Answer<Vec<f64>>) -> Diagnosis {
    // What the altered case does not have has no gradient.
    let right = right(case);
    for (name, numbers) in &right.head_state {
        if answer.get(*name).is_none() {
            answer.head_state.push((*name, vec![0.0; numbers.len()]));
        }
    }
    answer
        .head_state
        .retain(|(name, _)| right.get(*name).is_some());
    diagnosed(judged(case, Due::Answer, ok(shards(case, &answer))))
}

/// The plain case of these sizes with something asked beyond.
pub(crate) fn with(size: usize, alter: impl Fn(&mut AttentionCase)) -> AttentionCase {
    let mut case: AttentionCase = SIZES[size].parse().unwrap();
    alter(&mut case);
    case
}
