//! The fused way of core attention never holds S x S of anything. A program
//! of its own, because the peak of a process is that of all its tests.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod naive;
mod world;

use naive::{Blocks, Case, heads};
use std::fs;
use tch::Kind;
use ulysses::{Dropout, Kernel, Mask};

/// A byte for each score of 8192 tokens, a quarter of one for each of 16384.
const LIMIT: usize = 8192 * 8192;

/// What makes a call of a plain one.
type Change = fn(&mut Case);

/// The most memory that this process ever held, in bytes.
fn peak() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let of_peak = |line: &&str| line.starts_with("VmHWM:");
    let line = status.lines().find(of_peak).unwrap();
    let kibibytes = line.split_whitespace().nth(1).unwrap();
    kibibytes.parse::<usize>().unwrap() * 1024
}

fn causal(tokens: usize) -> Case {
    let mut case = Case::plain(tokens);
    case.heads = heads(1, 1, 1, 0);
    (case.head_size, case.value_size) = (8, 8);
    case.score.mask = Mask::Causal;
    case
}

#[test]
fn memory_is_linear_in_the_length_of_the_sequence() {
    // The formula is slow, and gets fewer tokens.
    let changes: [(&str, usize, Change); 9] = [
        ("slopes", 8192, |c| c.slopes = true),
        ("sinks and softcap", 8192, |c| {
            (c.sinks, c.score.softcap) = (true, Some(2.0));
        }),
        ("dropout", 8192, |c| {
            c.dropout = Some(Dropout {
                probability: 0.1,
                seed: 1,
                first_head: 0,
            });
        }),
        ("plain", 16384, |_| {}),
        ("value size", 16384, |c| c.value_size = 4),
        ("documents", 16384, |c| {
            c.segments = Some(vec![vec![0..5000, 5000..12001, 12001..16384]]);
        }),
        ("padding", 16384, |c| {
            c.segments = Some(vec![vec![0..0, 300..16384]]);
        }),
        ("window", 16384, |c| c.score.window = Some(200)),
        ("blocks", 16384, |c| {
            c.blocks = Some(Blocks {
                block: 512,
                seed: 1,
                sharing: 1,
            });
        }),
    ];
    tch::set_num_threads(1);
    // What libtorch takes for itself.
    drop(causal(8).output_and_cotangents(Kernel::Sdpa, Kind::Float));
    let before = peak();
    for (name, tokens, change) in changes {
        let mut case = causal(tokens);
        change(&mut case);
        drop(case.output_and_cotangents(Kernel::Sdpa, Kind::Float));
        let grown = peak() - before;
        assert!(grown < LIMIT, "{name}: {grown} bytes");
    }
    // Channels that do not lie next to one another, which torch's fused kernel
    // does not take.
    let case = causal(16384);
    let strided = case.inputs(Kind::Float).map(|tensor| match tensor.dim() {
        4 => tensor.transpose(2, 3).contiguous().transpose(2, 3),
        _ => tensor,
    });
    drop(case.run(Kernel::Sdpa, &strided).unwrap());
    let grown = peak() - before;
    assert!(grown < LIMIT, "strided: {grown} bytes");
    // The witness sees what it is there for.
    let case = causal(8192);
    drop(case.run(Kernel::Eager, &case.inputs(Kind::Float)).unwrap());
    let grown = peak() - before;
    assert!(grown > 4 * LIMIT, "eager: {grown} bytes");
}
