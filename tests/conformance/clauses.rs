//! The specification, the cases and the mistakes know of one another.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};

use fixtures::Case;
use rstest::rstest;
use ulysses_conformance::diagnosis::Mistake;
use ulysses_conformance::faults;
use ulysses_conformance::{Clause, catalogue};

const SPEC: &str = include_str!("../../conformance/SPEC.md");

#[test]
fn the_specification_says_each_clause_under_its_group_in_order() {
    let mut due = Vec::new();
    for &clause in Clause::ALL {
        let heading = format!("## {}", clause.group());
        if !due.contains(&heading) {
            due.push(heading);
        }
        due.push(format!("- **{}** {}", clause.id(), clause.sentence()));
    }
    let groups: BTreeSet<_> = Clause::ALL.iter().map(|clause| clause.group()).collect();
    let is_of_the_list = |line: &&str| {
        line.starts_with("- **") || line.strip_prefix("## ").is_some_and(|h| groups.contains(h))
    };
    let said: Vec<&str> = SPEC.lines().filter(is_of_the_list).collect();
    assert_eq!(said, due);
}

#[test]
fn a_clause_is_one_sentence_with_the_next_number_of_its_group() {
    let mut numbers = BTreeMap::new();
    for &clause in Clause::ALL {
        let number = numbers.entry(clause.group()).or_insert(0);
        *number += 1;
        let letter = match clause.group() {
            // L is taken by the lengths.
            "Loss" => "X",
            group => &group[..1],
        };
        assert_eq!(clause.id(), format!("{letter}{number}"));
        let sentence = clause.sentence();
        assert!(
            sentence.ends_with('.') && !sentence.contains(". "),
            "{sentence}"
        );
        let said: Vec<_> = Clause::ALL
            .iter()
            .filter(|c| c.sentence() == sentence)
            .collect();
        assert_eq!(said, [&clause]);
    }
}

#[test]
fn every_clause_has_a_case_and_every_case_a_clause() {
    let cases = catalogue::cases();
    let mut tested = BTreeSet::new();
    for case in &cases {
        let clauses = Clause::of_case(case);
        assert!(
            clauses.is_sorted_by(|a, b| a < b) && !clauses.is_empty(),
            "{case}"
        );
        tested.extend(clauses);
    }
    let untested: Vec<_> = Clause::ALL
        .iter()
        .filter(|clause| !tested.contains(clause))
        .collect();
    assert!(untested.is_empty(), "no case tests {untested:?}");
}

#[test]
fn every_clause_has_a_mistake_and_every_mistake_a_clause() {
    let mut broken: BTreeSet<Clause> = BTreeSet::new();
    for &mistake in Mistake::ALL {
        let clauses = Clause::of_mistake(mistake);
        assert!(!clauses.is_empty(), "{mistake:?} breaks nothing");
        let distinct: BTreeSet<Clause> = clauses.iter().copied().collect();
        assert_eq!(distinct.len(), clauses.len(), "{mistake:?}");
        broken.extend(clauses);
    }
    let unbroken: Vec<_> = Clause::ALL
        .iter()
        .filter(|clause| !broken.contains(clause))
        .collect();
    assert!(unbroken.is_empty(), "no mistake breaks {unbroken:?}");
}

#[test]
fn every_clause_is_broken_by_a_fault() {
    let broken: BTreeSet<Clause> = faults::all()
        .flat_map(|fault| Clause::of_mistake(fault.mistake))
        .copied()
        .collect();
    assert_eq!(broken, Clause::ALL.iter().copied().collect());
}

/// Every world on which something can go wrong tests the clause, unless more
/// ranks than these are needed.
#[test]
fn every_clause_is_tested_on_two_three_and_four_ranks() {
    let cases = catalogue::cases();
    for world in 2..=4 {
        let these = cases.iter().filter(|case| case.world() == world);
        let tested: BTreeSet<_> = these.flat_map(Clause::of_case).collect();
        let missing: Vec<_> = Clause::ALL
            .iter()
            .filter(|clause| !tested.contains(clause))
            .collect();
        // Two query heads and four ranks make that one case.
        let due: &[&Clause] = if world == 4 {
            &[]
        } else {
            &[&Clause::FewerHeadsThanRanks]
        };
        assert_eq!(missing, due, "on {world} ranks");
    }
}

#[rstest]
#[case::alone("p1-b1-s8-hq4-hkv4-d8-full-f32-gaussian-seed0", "E7 A1 A2 A4 G1 R4")]
#[case::causal(
    "p2-b1-s8-hq4-hkv4-d8-causal-f32-gaussian-seed0",
    "E7 A1 A2 A3 A4 G1 G2 P1 R4"
)]
#[case::copies(
    "p4-b1-s8-hq8-hkv2-d16-full-f32-peaked-seed0",
    "E7 H1 H2 H3 H4 A1 A2 A4 G1 G2 R4 R5"
)]
#[case::coded(
    "p2-b1-s8-hq4-hkv4-d16-causal-bf16-coded-seed0",
    "E1 E2 E3 E7 A1 A2 A3 A4 G1 G2 P1 R4"
)]
#[case::one_rank(
    "p2-b1-s8-hq4-hkv4-d16-full-f32-peaked-seed0-dorank1",
    "E7 A1 A2 A4 G1 G2 G3 G4 R4"
)]
#[case::one_head(
    "p2-b1-s8-hq4-hkv4-d16-full-f32-peaked-seed0-dohead1",
    "E7 A1 A2 A4 G1 G2 G5 R4"
)]
#[case::fill(
    "p2-b1-s7-hq4-hkv4-d16-full-f32-peaked-seed0",
    "E7 A1 A2 A4 G1 G2 L1 L3 C1 R4 R5"
)]
#[case::beyond(
    "p2-b2-s8-hq4-hkv2-d16-causal-f32-peaked-seed0-docs2-rope",
    "A1 A7 G1 P2 P5"
)]
#[case::padding("p2-b2-s8-hq4-hkv2-d16-causal-f32-peaked-seed0-padleft", "A1 A8 G1")]
#[case::unseen_padding("p2-b2-s8-hq4-hkv2-d16-causal-f32-peaked-seed0-padright", "A1 G1")]
#[case::parameters(
    "p2-b2-s8-hq4-hkv2-d16-causal-f32-peaked-seed0-alibi-sinks",
    "H7 A1 A10 A11 G1 G6 P4"
)]
#[case::outside_training(
    "p2-b1-s8-hq4-hkv4-d16-full-f32-peaked-seed0-eval-docs2",
    "A1 A7 A16 G1 C2"
)]
#[case::between(
    "p2-b1-s8-hq4-hkv4-d16-full-f32-peaked-seed0-evalbetween",
    "A1 A16 A17 G1 C2"
)]
#[case::changed(
    "p2-b1-s8-hq4-hkv4-d16-full-f32-peaked-seed0-otherlength",
    "A1 A17 G1 L4"
)]
#[case::refused(
    "p2-b1-s8-hq4-hkv4-d16-full-f32-peaked-seed0-window3-bad:window",
    "R1 R2 R3"
)]
#[case::other_length(
    "p1-b1-s8-hq4-hkv4-d16-full-f32-peaked-seed0-fixed-bad:length",
    "L5 R1 R2"
)]
fn a_case_names_what_it_is_there_for(#[case] name: &str, #[case] due: &str) {
    let case: Case = format!("attention/{name}").parse().unwrap();
    let ids: Vec<_> = Clause::of_case(&case).into_iter().map(Clause::id).collect();
    assert_eq!(ids.join(" "), due);
}
