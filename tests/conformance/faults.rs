//! The faults of the suite are wrong, each in its own way, and the judge sees
//! it; what they are made of is right.
#![allow(missing_docs, clippy::unwrap_used)]

mod program;

use std::collections::BTreeSet;
use std::fs;

use program::run;
use rstest::rstest;
use ulysses_conformance::diagnosis::Mistake;
use ulysses_conformance::faults::{self, Trials};

#[test]
fn what_faults_are_made_of_is_right() {
    for case in faults::cases() {
        case.check().unwrap();
        let trials = Trials::of(&case);
        let judgement = &trials.of_right;
        assert!(
            trials.is_right_judged_right(),
            "{case}: {}: {}",
            judgement.verdict,
            judgement.sentence
        );
    }
}

#[test]
fn each_fault_is_wrong_somewhere_and_caught_there() {
    let mut left: Vec<_> = faults::all().collect();
    for case in faults::cases() {
        if !left.iter().any(|fault| fault.applies(&case)) {
            continue;
        }
        let trials = Trials::of(&case);
        left.retain(|fault| !fault.applies(&case) || !trials.trial(fault).is_caught());
    }
    assert!(left.is_empty(), "nowhere caught: {left:?}");
}

#[test]
fn what_a_fault_does_not_change_is_judged_right() {
    // One KV head on each rank: tiled or not, each query head attends it.
    let case = "attention/p4-b2-s36-hq8-hkv2-d16-causal-f32-peaked-seed0";
    let fault = faults::all().find(|fault| fault.name == "kv-heads-tiled");
    let trials = Trials::of(&case.parse().unwrap());
    let trial = trials.trial(fault.unwrap());
    assert!(!trial.is_wrong && !trial.is_false_alarm(), "{trial:?}");
}

#[test]
fn every_mistake_has_a_fault_and_every_fault_a_name_of_its_own() {
    let made: BTreeSet<Mistake> = faults::all().map(|fault| fault.mistake).collect();
    let mistakes = Mistake::ALL.iter().copied();
    let missing: Vec<Mistake> = mistakes.filter(|m| !made.contains(m)).collect();
    assert!(missing.is_empty(), "nobody makes {missing:?}");
    let names: BTreeSet<&str> = faults::all().map(|fault| fault.name).collect();
    assert_eq!(names.len(), faults::all().count());
}

#[test]
fn the_page_of_faults_tells_of_each_in_turn() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/FAULTS.md");
    let page = fs::read_to_string(page).unwrap();
    let rows = page
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| fault "));
    let told: Vec<String> = rows
        .map(|row| row.split(" | ").take(3).collect::<Vec<_>>().join(" | "))
        .collect();
    let due: Vec<String> = faults::all()
        .map(|fault| {
            format!(
                "| {} | {} | {}",
                fault.name,
                fault.mistake.name(),
                fault.effect
            )
        })
        .collect();
    assert_eq!(told, due);
}

#[rstest]
// Caught: all is well.
#[case("causal-ignored", "p2-b1-s12-hq4-hkv4-d16-causal-f32-peaked-seed0", 0)]
// Tried, and nowhere wrong: nothing is shown.
#[case("kv-heads-tiled", "p4-b1-s12-hq8-hkv2-d16-causal-f32-peaked-seed0", 1)]
// It cannot show there.
#[case("causal-ignored", "p2-b1-s12-hq4-hkv4-d16-full-f32-peaked-seed0", 3)]
fn the_exit_code_says_whether_faults_are_caught(
    #[case] fault: &str,
    #[case] case: &str,
    #[case] code: i32,
) {
    let run = run(&format!("faults --fault {fault} --case attention/{case}"));
    assert_eq!(run.code, code, "{}{}", run.stdout, run.stderr);
}
