//! The reference over NCCL, behind the exchange: a stand-in for NCCL's library
//! answers here, and moves memory of the host.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

#[path = "../reference/double.rs"]
mod double;
mod program;

use program::{Run, program};

fn judged(library: &str, arguments: &str) -> Run {
    // What the stand-in keeps in files; ranks that are killed leave it behind.
    let files = tempfile::tempdir().unwrap();
    let output = program()
        .args(["run", "--implementation", "reference-nccl"])
        .args(arguments.split_whitespace())
        .env("ULYSSES_NCCL", library)
        .env("TMPDIR", files.path())
        // A GPU would be chosen, where there is one.
        .env("CUDA_VISIBLE_DEVICES", "")
        .output();
    output.unwrap().into()
}

#[test]
fn the_reference_over_nccl_is_right() {
    let folder = tempfile::tempdir().unwrap();
    let double = double::compile(folder.path(), &[]);
    let some = [
        "--world 3 --filter attention/ --filter docs",
        "--world 4 --filter mesh/",
        "--world 2 --filter loss/",
    ];
    for these in some {
        let run = judged(&double, these);
        assert_eq!(run.code, 0, "{}{}", run.stdout, run.stderr);
        let right = run.named("exact").len() + run.named("pass").len();
        assert!(right >= 6, "{}", run.stderr);
    }
}

/// One sentence, and nothing is started.
#[test]
fn without_nccl_it_is_the_environments_fault() {
    let run = judged("/nowhere/libnccl.so.2", "--world 2");
    assert_eq!(run.code, 5);
    assert_eq!((run.stdout.as_str(), run.stderr.lines().count()), ("", 1));
    let due = "error: NCCL is not there: ULYSSES_NCCL is /nowhere/libnccl.so.2";
    assert!(run.stderr.starts_with(due), "{}", run.stderr);
}

/// An NCCL and no GPU: it would not do what it is asked.
#[test]
fn without_a_gpu_it_is_the_environments_fault() {
    let folder = tempfile::tempdir().unwrap();
    let real = double::compile(folder.path(), &["-Dulysses_nccl_takes_host_memory=silent"]);
    let run = judged(&real, "--world 2");
    assert_eq!(run.code, 5);
    let due = "error: NCCL moves memory of GPUs: choose the device `cuda`";
    assert!(run.stderr.starts_with(due), "{}", run.stderr);
}
