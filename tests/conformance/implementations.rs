//! What comes with the harness, judged: the reference both ways, the example
//! for implementers, and DeepSpeed's own.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

mod program;

use program::{Run, run};
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
    // All but the one with fewer query heads than ranks, which it refuses.
    assert_eq!(
        run.named("exact").len(),
        verdicts.len() - 1,
        "{}",
        run.stdout
    );
    assert_eq!(
        run.named("refused"),
        ["attention/p4-b1-s36-hq2-hkv2-d16-causal-f32-gaussian-seed0"]
    );
}

#[test]
fn torch_plain_is_right_where_it_claims_and_refuses_elsewhere() {
    let run = run("run --implementation torch-plain");
    assert_eq!(run.code, 0, "{}", run.stdout);
    assert!(run.named("exact").len() > 100, "{}", run.stdout);
    // One for each limit: uneven query heads, KV heads and sequence, and fewer
    // query heads than ranks.
    assert_eq!(run.named("refused").len(), 4, "{}", run.stdout);
}

/// The names of the cases that failed in any way, with how and why.
fn failures(run: &Run) -> Vec<(String, String, String)> {
    run.verdicts()
        .into_iter()
        .filter(|(verdict, ..)| ["fail", "crash", "hang", "unclear"].contains(&verdict.as_str()))
        .collect()
}

/// In 0.19.8 neither class notices that ranks hold unequal numbers of tokens:
/// gloo finds sizes that do not match and aborts the process. The first
/// communication is the all_gather of position ids here
/// (`runtime/sequence_parallel/ulysses_sp.py`, line 295).
#[test]
fn deepspeed_ulysses_hf_is_right_but_for_uneven_sequences() {
    let run = run("run --implementation deepspeed-ulysses-hf");
    assert_eq!(run.code, 1, "{}", run.stdout);
    assert!(run.named("exact").len() > 100, "{}", run.stdout);
    // Query heads and KV heads that the ranks do not divide, and fewer query
    // heads than ranks.
    assert_eq!(run.named("refused").len(), 3, "{}", run.stdout);
    let failures = failures(&run);
    let [(verdict, name, _)] = failures.as_slice() else {
        panic!("{failures:?}")
    };
    assert_eq!(verdict, "crash");
    assert_eq!(
        name,
        "attention/p2-b1-s85-hq8-hkv8-d16-full-f32-peaked-seed0"
    );
    assert!(run.stdout.contains("gloo::EnforceNotMet"), "{}", run.stdout);
    assert!(
        run.stdout.contains("ulysses_sp.py\", line 295"),
        "{}",
        run.stdout
    );
}

/// Besides uneven sequences: where heads do not divide over the ranks, 0.19.8
/// computes the sizes of its exchange as `int(ratio * size)` with a ratio of
/// head counts in floating point (`sequence/layer.py`, lines 211 to 215), which
/// comes out one too small for some sizes. The ranks with that many heads raise
/// an error, and the others wait for them forever.
#[test]
fn deepspeed_distributed_attention_is_right_but_for_uneven_sequences_and_some_uneven_heads() {
    let run = run("run --implementation deepspeed-distributed-attention");
    assert_eq!(run.code, 1, "{}", run.stdout);
    assert!(run.named("exact").len() > 100, "{}", run.stdout);
    // Fewer KV heads than ranks.
    assert_eq!(run.named("refused").len(), 1, "{}", run.stdout);
    let failures: Vec<_> = failures(&run)
        .into_iter()
        .map(|(verdict, name, _)| format!("{verdict} {name}"))
        .collect();
    assert_eq!(
        failures,
        [
            "crash attention/p2-b1-s85-hq8-hkv8-d16-full-f32-peaked-seed0",
            "hang attention/p2-b1-s18-hq13-hkv13-d16-causal-f32-gaussian-seed0",
            "hang attention/p2-b1-s18-hq39-hkv13-d16-causal-f32-gaussian-seed0",
            "hang attention/p3-b1-s27-hq14-hkv14-d64-causal-f32-gaussian-seed0",
            "hang attention/p4-b1-s28-hq13-hkv13-d80-causal-f32-gaussian-seed0",
        ]
    );
    assert!(
        run.stdout.contains("layer.py\", line 217"),
        "{}",
        run.stdout
    );
}
