//! The check of what needs a GPU, rehearsed without one, from a folder as it is
//! taken to a machine.
#![allow(missing_docs, clippy::unwrap_used)]

mod program;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use program::{Run, python};
use tempfile::TempDir;

/// The scripts, and of the programs the one that judges.
fn folder() -> TempDir {
    let folder = TempDir::new().unwrap();
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("gpu_check");
    for script in fs::read_dir(scripts).unwrap() {
        let script = script.unwrap().path();
        if script.extension().is_some_and(|ending| ending == "py") {
            fs::copy(&script, folder.path().join(script.file_name().unwrap())).unwrap();
        }
    }
    let about = r#"{"commit": "of a test", "rustc": "", "glibc": "2.2", "torch": "2.11.0"}"#;
    fs::write(folder.path().join("programs.json"), about).unwrap();
    fs::create_dir(folder.path().join("bin")).unwrap();
    let program = env!("CARGO_BIN_EXE_ulysses-conformance");
    symlink(program, folder.path().join("bin/ulysses-conformance")).unwrap();
    folder
}

fn check(folder: &TempDir, out: &Path, arguments: &[&str]) -> Run {
    Command::new(python())
        .arg(folder.path().join("check.py"))
        .arg("--out")
        .arg(out)
        .args(arguments)
        .env("CUDA_VISIBLE_DEVICES", "")
        .output()
        .unwrap()
        .into()
}

/// What was written, by its ending.
fn written(out: &Path, ending: &str) -> PathBuf {
    let files = fs::read_dir(out).unwrap().map(|file| file.unwrap().path());
    files
        .filter(|path| path.to_string_lossy().ends_with(ending))
        .max()
        .unwrap()
}

#[test]
fn a_rehearsal_runs_what_a_cpu_can_do_and_says_what_it_is() {
    let folder = folder();
    let out = folder.path().join("out");
    let run = check(
        &folder,
        &out,
        &["--device", "cpu", "--only", "kernels,tests"],
    );
    assert_eq!(run.code, 0, "{}\n{}", run.stdout, run.stderr);
    let table = written(&out, ".md");
    let name = table.file_name().unwrap().to_string_lossy().into_owned();
    assert!(name.starts_with("rehearsal-"), "{name}");
    let table = fs::read_to_string(table).unwrap();
    for said in [
        "**A rehearsal on the CPU of a machine, not a result",
        "| kernels | kernels | 0 |",
        "| tests | CUDA test suites |  |  | not run: they are for a GPU |",
        "| flash            |",
        "commit of a test",
    ] {
        assert!(table.contains(said), "no {said:?} in\n{table}");
    }
    let result = fs::read_to_string(written(&out, ".json")).unwrap();
    let result: serde_json::Value = serde_json::from_str(&result).unwrap();
    assert_eq!(result["rehearsal"], true);
    assert_eq!(result["steps"][0]["exit_code"], 0);
    assert!(written(&out, "-logs.tar.xz").exists());
}

#[test]
fn a_step_that_fails_does_not_end_the_check() {
    let folder = folder();
    let out = folder.path().join("out");
    // Nothing else of the programs is in the folder.
    let run = check(
        &folder,
        &out,
        &[
            "--device",
            "cpu",
            "--only",
            "kernels,benchmark,tests",
            "--minutes",
            "1",
        ],
    );
    assert_eq!(run.code, 1, "{}\n{}", run.stdout, run.stderr);
    let table = fs::read_to_string(written(&out, ".md")).unwrap();
    assert!(table.contains("| benchmark | benchmark | 2 |"), "{table}");
    assert!(table.contains("No such file"), "{table}");
}

#[test]
fn without_a_gpu_it_says_so_and_writes_nothing() {
    let folder = folder();
    let out = folder.path().join("out");
    let run = check(&folder, &out, &[]);
    assert_eq!(run.code, 5, "{}\n{}", run.stdout, run.stderr);
    assert!(run.stderr.contains("no CUDA device"), "{}", run.stderr);
    assert!(!out.exists());
}

#[test]
fn a_rehearsal_is_kept_out_of_the_docs() {
    let folder = folder();
    let out = folder.path().join("docs/gpu-results");
    let run = check(&folder, &out, &["--device", "cpu"]);
    assert_eq!(run.code, 2);
    assert!(
        run.stderr.contains("a rehearsal is no result"),
        "{}",
        run.stderr
    );
    assert!(!out.exists());
}
