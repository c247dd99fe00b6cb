//! An implementation is judged by the convention of gradient scale that it
//! declares, and by no other.
#![allow(missing_docs, clippy::unwrap_used)]

mod program;

use fixtures::exchange::{Declared, Parameters, Upstream};
use fixtures::{AttentionCase, Case, Inputs};
use program::{Run, fake, program};
use rstest::rstest;
use ulysses_conformance::judge::Question;

/// A case with gradients of tokens alone, and one with those of parameters.
const CASES: [&str; 2] = [
    "attention/p3-b2-s12-hq6-hkv3-d8-causal-f32-gaussian-seed0",
    "attention/p3-b2-s12-hq6-hkv3-d8-causal-f32-gaussian-seed0-norms",
];

fn judged(adapter: &str) -> Run {
    program()
        .args(["run", "--launch", &fake(adapter)])
        .args(CASES.iter().flat_map(|case| ["--case", case]))
        .output()
        .unwrap()
        .into()
}

const BOTH: &str = "dq, dk, dv, dq_norm and dk_norm are wrong";
const TOKENS: &str = "dq, dk and dv are wrong";
const PARTS: &str = "dq_norm and dk_norm are wrong";

#[rstest]
#[case::summed("share sum 1 1", ["", ""])]
#[case::averaged("times-ranks average 1 1", ["", ""])]
#[case::share_averaged("share average 1 P", ["", ""])]
#[case::times_ranks_summed("times-ranks sum 1 1/P", ["", ""])]
#[case::averages_and_says_nothing("share sum P P", [TOKENS, BOTH])]
#[case::says_averaged_and_sums("times-ranks average 1/P 1/P", [TOKENS, BOTH])]
#[case::parts_too_small("share average 1 1", ["", PARTS])]
#[case::parts_too_large("times-ranks sum 1 1", ["", PARTS])]
fn gradients_are_due_by_the_declared_convention(#[case] says: &str, #[case] wrong: [&str; 2]) {
    let run = judged(&format!("convention.py {says}"));
    for ((verdict, name, why), wrong) in run.verdicts().iter().zip(wrong) {
        assert_eq!(why, wrong, "{name}");
        let is_right = ["exact", "pass"].contains(&verdict.as_str());
        assert_eq!(is_right, wrong.is_empty(), "{name}: {verdict}");
    }
    assert_eq!(run.verdicts().len(), 2, "{}", run.stderr);
    let words: Vec<&str> = says.split(' ').collect();
    let declared = format!(
        "declares precision fused, upstream {}, parameters {}",
        words[0], words[1]
    );
    assert_eq!(
        run.stdout.contains(&declared),
        words[..2] != ["share", "sum"],
        "what is not the default, and that alone, is told:\n{}",
        run.stdout
    );
}

#[test]
fn ranks_that_declare_different_things_are_named() {
    let run = judged("other_convention.py");
    assert_eq!(run.named("crash"), CASES, "{}", run.stderr);
    let why = "rank 1 declares precision fused, upstream share, parameters average, \
               rank 0 precision fused, upstream share, parameters sum";
    assert!(run.stdout.contains(why), "{}", run.stdout);
}

#[test]
fn a_convention_that_nobody_knows_is_refused_by_the_kit() {
    let run = judged("convention.py mine sum 1 1");
    assert_eq!(run.named("crash"), CASES, "{}", run.stderr);
    let why = "ValueError: upstream is 'mine'; it is one of ('share', 'times-ranks')";
    assert!(run.stdout.contains(why), "{}", run.stdout);
}

fn inputs_for(case: &AttentionCase, declared: Declared) -> Inputs {
    let question = Question::of(&Case::from(case.clone()), declared);
    question.attention().unwrap().1.clone()
}

#[test]
fn the_cotangent_alone_is_multiplied_and_outside_training_nothing() {
    let averaged = Declared {
        upstream: Upstream::TimesRanks,
        parameters: Parameters::Average,
        ..Declared::default()
    };
    let case: AttentionCase = "attention/p2-b1-s5-hq2-hkv2-d4-full-bf16-gaussian-seed0-sinks"
        .parse()
        .unwrap();
    let (plain, mut times) = (Inputs::of(&case), inputs_for(&case, averaged));
    let doubled: Vec<f64> = plain.dout.to_f64().iter().map(|x| 2.0 * x).collect();
    assert_eq!(times.dout.to_f64(), doubled);
    times.dout = plain.dout.clone();
    assert_eq!(times, plain);

    let mut eval = case;
    eval.extras.eval = true;
    assert_eq!(inputs_for(&eval, averaged), Inputs::of(&eval));
}
