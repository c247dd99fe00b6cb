//! What comes with the harness, judged: the reference both ways, the example
//! for implementers, and DeepSpeed's own.
#![allow(missing_docs, clippy::unwrap_used)]

mod program;

use program::run;
use rstest::rstest;

#[rstest]
#[case::threads("reference")]
#[case::mpi("reference-mpi")]
fn the_reference_is_bit_equal_to_dense_on_the_whole_catalogue(#[case] name: &str) {
    let run = run(&format!("run --implementation {name}"));
    assert_eq!(run.code, 0, "{}", run.stdout);
    let verdicts = run.verdicts();
    assert_eq!(
        verdicts.len(),
        ulysses_conformance::catalogue::cases().len()
    );
    assert_eq!(run.named("exact").len(), verdicts.len(), "{}", run.stdout);
}

#[test]
fn torch_plain_is_right_where_it_claims_and_refuses_elsewhere() {
    let run = run("run --implementation torch-plain");
    assert_eq!(run.code, 0, "{}", run.stdout);
    assert!(run.named("exact").len() > 100, "{}", run.stdout);
    // One for each limit: uneven query heads, KV heads and sequence.
    assert_eq!(run.named("refused").len(), 3, "{}", run.stdout);
}
