//! Ranks that are out of the judge's reach: on another host, where it can end
//! nobody, or not to be started for a while. `make hosts-check` has two hosts.
#![allow(missing_docs, clippy::unwrap_used)]

mod program;

use std::fs;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use fixtures::exchange::{Judge, PROTOCOL, Session, SessionInfo};
use program::{Run, fake, program};
use rstest::rstest;
use tempfile::TempDir;

/// Ranks that idle, and a judge on another host that removes the session.
#[rstest]
#[case::of_the_kit(&fake("raises.py"))]
#[case::of_the_reference(&format!(
    "mpirun --oversubscribe --bind-to none -n 2 {}",
    env!("CARGO_BIN_EXE_reference-adapter")
))]
fn ranks_of_a_judge_on_another_host_leave_with_the_session(#[case] command: &str) {
    let folder = TempDir::new().unwrap();
    let info = SessionInfo {
        protocol: PROTOCOL,
        world: 2,
        device: "cpu".to_owned(),
        time_limit_s: 30.0,
        judge: Judge {
            pid: 1,
            host: "elsewhere".to_owned(),
        },
    };
    let session = Session::create(folder.path(), &info).unwrap();
    let mut launcher = Command::new("sh")
        .args(["-c", &format!("exec {command}")])
        .env("ULYSSES_EXCHANGE", folder.path())
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        .env("OMP_NUM_THREADS", "1")
        .env(
            "PYTHONPATH",
            concat!(env!("CARGO_MANIFEST_DIR"), "/adapters"),
        )
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(120);
    while (0..2).any(|rank| session.hello(rank).is_err()) {
        assert!(Instant::now() < deadline, "no hello");
        thread::sleep(Duration::from_millis(5));
    }
    assert!(launcher.try_wait().unwrap().is_none());
    folder.close().unwrap();
    let deadline = Instant::now() + Duration::from_secs(120);
    let mut have_left = false;
    while !have_left && Instant::now() < deadline {
        have_left = launcher.try_wait().unwrap().is_some();
        thread::sleep(Duration::from_millis(5));
    }
    if !have_left {
        launcher.kill().unwrap();
    }
    assert!(have_left, "the ranks stay");
}

/// A launcher whose starts 2 and 3 fail, and ranks that are started anew after
/// each case of 22 tokens.
#[test]
fn ranks_that_were_started_once_are_tried_again_after_some_cases() {
    let folder = TempDir::new().unwrap();
    let starts = folder.path().join("starts");
    let starts = starts.display();
    let launch = format!(
        "sh -c 'echo . >> {starts}; case $(wc -l < {starts}) in 2|3) echo no host >&2; exit 7;; esac; \
         exec {}'",
        fake("raises.py")
    );
    let tokens = [20, 22, 24, 26, 28, 30, 32, 34];
    let cases = tokens.map(|tokens| {
        format!("--case=attention/p2-b1-s{tokens}-hq4-hkv4-d8-causal-f32-gaussian-seed0")
    });
    let run: Run = program()
        .args(["run", "--launch", &launch])
        .args(cases)
        .env("ULYSSES_FAKE_SEQUENCE", "22")
        .output()
        .unwrap()
        .into();
    assert_eq!(run.code, 1, "{}", run.stderr);
    let no_hello = "the launcher ended before a hello of rank 0, rank 1";
    let again = format!("as before: {no_hello}");
    let told: Vec<_> = run
        .verdicts()
        .into_iter()
        .map(|(verdict, _, why)| (verdict, why))
        .collect();
    let due = [
        ("exact", ""),
        ("fail", "rank 0: RuntimeError: boom"),
        ("crash", no_hello),
        ("crash", &again),
        ("crash", no_hello),
        ("crash", &again),
        ("crash", &again),
        ("exact", ""),
    ];
    let due = due.map(|(verdict, why)| (verdict.to_owned(), why.to_owned()));
    assert_eq!(told, due, "{}", run.stderr);
    // What a start wrote is told once for each, and nobody is accused.
    assert_eq!(run.stdout.matches("| launcher stderr: no host").count(), 2);
    let fault = "crash (the implementation's fault, or its environment's)";
    assert_eq!(run.stdout.matches(fault).count(), 5, "{}", run.stdout);
    assert!(!run.stdout.contains("rank-dies"), "{}", run.stdout);
    assert_eq!(
        fs::read_to_string(folder.path().join("starts"))
            .unwrap()
            .lines()
            .count(),
        4
    );
}
