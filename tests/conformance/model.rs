//! The oracle of the profile `model`: the reference is near it, whatever the
//! values are, and what is wrong by little more than that is told.
#![allow(missing_docs, clippy::unwrap_used)]

use fixtures::exchange::{Declared, posed};
use fixtures::{Case, Feature};
use rstest::rstest;
use ulysses_conformance::catalogue;
use ulysses_conformance::faults::Assembled;
use ulysses_conformance::implementation::{Implementation, Interrupt, Means, claims};
use ulysses_conformance::judge::Verdict;
use ulysses_conformance::known::KnownFailures;
use ulysses_conformance::runner::{self, Summary};

fn run(cases: &[Case]) -> Summary {
    let (mut known, interrupt) = (KnownFailures::default(), Interrupt::default());
    let mut right = Assembled::right();
    runner::run(&mut right, cases, &mut known, &interrupt, &mut |_| ())
}

/// How far the worst number is off, relative to what it may be.
fn worst(summary: &Summary) -> f64 {
    let compared = summary
        .records
        .iter()
        .filter_map(|r| r.judgement.comparison.as_ref());
    compared
        .flat_map(|comparison| &comparison.tensors)
        .map(|tensor| tensor.tightness)
        .fold(0.0, f64::max)
}

#[rstest]
#[case::f32("model/p2-b1-s6-l2-h8-hq4-hkv2-m12-v11-f32-seed0")]
#[case::f64("model/p3-b1-s7-l1-h12-hq3-hkv1-m12-v11-f64-seed0-tied-docs2-checkpoint-ignoresome")]
#[case::replicas("model/p4-b1-s5-l1-h8-hq2-hkv2-m12-v11-f32-seed0-dp2-ignorerank-dloss25")]
fn the_reference_is_near_with_any_values(#[case] name: &str) {
    let case: Case = name.parse().unwrap();
    let cases: Vec<Case> = (0..8).map(|seed| case.clone().with_seed(seed)).collect();
    let summary = run(&cases);
    for record in &summary.records {
        assert_eq!(record.judgement.verdict, Verdict::Pass, "{}", record.case);
    }
    let worst = worst(&summary);
    assert!((0.001..0.5).contains(&worst), "{worst}");
}

#[test]
fn every_bad_question_is_refused_on_every_rank() {
    let cases: Vec<Case> = catalogue::cases()
        .into_iter()
        .filter(|case| matches!(case, Case::Model(_)) && case.defect().is_some())
        .collect();
    assert_eq!(cases.len(), 20);
    for case in &cases {
        let mut right = Assembled::right();
        let answers = right.ask(posed(case)).unwrap();
        for answer in answers {
            assert!(!answer.unwrap().0.message.is_empty(), "{case}");
        }
    }
    assert_eq!(run(&cases).count(Verdict::Refused), 20);
}

#[test]
fn no_case_asks_for_more_ranks_than_heads() {
    let claims = claims(Means::default()).unwrap();
    assert_eq!(claims.declared, Declared::default());
    for case in catalogue::cases() {
        let needed = case.features();
        if needed.contains(&Feature::Model) {
            let unclaimed = needed.iter().find(|f| !claims.features.contains(f.name()));
            assert_eq!(unclaimed, None, "{case}");
        }
    }
}
