//! Ranks that die, hang, answer garbage or talk cost the one case in which they
//! do so, and are named; nothing of them stays behind.
#![allow(missing_docs, clippy::unwrap_used)]

mod program;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use program::{Run, fake, program};
use rstest::rstest;
use tempfile::TempDir;

/// A case by its tokens. The fakes misbehave where a sequence has 22 tokens.
fn case(tokens: usize) -> String {
    format!("attention/p2-b1-s{tokens}-hq4-hkv4-d8-causal-f32-gaussian-seed0")
}

/// Three cases, the fake's own in the middle.
fn three() -> [String; 3] {
    [20, 22, 24].map(case)
}

/// Judges what `command` starts on `cases`, and sees to it that neither a
/// process nor a folder stays behind.
fn judged(command: &str, cases: &[String], more: &[&str]) -> Run {
    let exchange = TempDir::new().unwrap();
    let run: Run = program()
        .args(["run", "--launch", command, "--exchange"])
        .arg(exchange.path())
        .args(cases.iter().flat_map(|case| ["--case", case]))
        .args(more)
        .env("ULYSSES_FAKE_SEQUENCE", "22")
        .output()
        .unwrap()
        .into();
    assert_nothing_stays_behind(exchange.path());
    run
}

fn assert_nothing_stays_behind(exchange: &Path) {
    let folders: Vec<_> = fs::read_dir(exchange).unwrap().collect();
    assert!(folders.is_empty(), "{folders:?}");
    assert_eq!(processes_of(exchange), Vec::<i32>::new());
}

/// The processes that have a session in this folder in their environment.
fn processes_of(exchange: &Path) -> Vec<i32> {
    let variable = format!("ULYSSES_EXCHANGE={}/", exchange.display());
    let belongs = |pid: &i32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        String::from_utf8_lossy(&environment).contains(&variable)
    };
    fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok())
        .filter(belongs)
        .collect()
}

/// The verdicts on the three cases.
fn verdicts(run: &Run) -> Vec<String> {
    run.verdicts()
        .into_iter()
        .map(|(verdict, ..)| verdict)
        .collect()
}

#[rstest]
#[case::crash("crash.py", "crash", "rank 1 ended (SIGKILL) in forward\n")]
#[case::dies_in_backward(
    "dies_in_backward.py",
    "crash",
    "rank 1 ended (SIGSEGV) in backward, after all_to_all_single #2\n"
)]
#[case::garbage("garbage.py", "fail", "rank 1 answered garbage: ")]
#[case::raises("raises.py", "fail", "rank 0: RuntimeError: boom")]
fn misbehaviour_costs_one_case_and_is_named(
    #[case] adapter: &str,
    #[case] verdict: &str,
    #[case] why: &str,
) {
    let run = judged(&fake(adapter), &three(), &[]);
    assert_eq!(run.code, 1);
    assert_eq!(
        verdicts(&run),
        ["exact", verdict, "exact"],
        "{}",
        run.stderr
    );
    assert!(run.stdout.contains(why), "{}", run.stdout);
    let again = format!("--case {}", case(22));
    assert_eq!(run.stdout.matches(&again).count(), 1, "{}", run.stdout);
}

#[test]
fn a_hang_costs_one_case_and_names_who_did_not_come() {
    let run = judged(&fake("hang.py"), &three(), &["--time-limit", "4"]);
    assert_eq!(run.code, 1);
    assert_eq!(verdicts(&run), ["exact", "hang", "exact"], "{}", run.stderr);
    let why = "no answer within 4 s: rank 1 (case 1: forward)\n";
    assert!(run.stdout.contains(why), "{}", run.stdout);
}

#[rstest]
#[case::skips(
    "skips_exchange.py",
    "rank 0 waits in all_to_all_single #2 of forward; rank 1 never came: it has answered\n"
)]
#[case::enters_another(
    "other_collective.py",
    "rank 0 waits in all_to_all_single #1 of forward; rank 1 waits in recv #1 of forward\n"
)]
fn a_hang_in_a_collective_names_who_waits_in_which(#[case] adapter: &str, #[case] why: &str) {
    let run = judged(&fake(adapter), &three(), &["--time-limit", "4"]);
    assert_eq!(run.code, 1);
    assert_eq!(verdicts(&run), ["exact", "hang", "exact"], "{}", run.stderr);
    let why = format!("no answer within 4 s: {why}");
    assert!(run.stdout.contains(&why), "{}", run.stdout);
}

#[test]
fn an_error_on_one_rank_that_leaves_the_others_waiting_is_told() {
    let start = Instant::now();
    let run = judged(&fake("one_raises.py"), &three(), &["--time-limit", "90"]);
    assert_eq!(run.code, 1);
    assert_eq!(verdicts(&run), ["exact", "hang", "exact"], "{}", run.stderr);
    let why = "rank 0: RuntimeError: boom, and \
               rank 1 waits in all_to_all_single #1 of forward\n";
    assert!(run.stdout.contains(why), "{}", run.stdout);
    assert!(
        run.stdout.contains("raise RuntimeError(\"boom\")"),
        "{}",
        run.stdout
    );
    assert!(
        start.elapsed() < Duration::from_secs(80),
        "the whole limit was waited for"
    );
}

#[test]
fn a_crash_is_shown_with_what_the_rank_and_its_launcher_said() {
    let run = judged(&fake("crash.py"), &three(), &[]);
    let said = "| launcher stderr: ulysses_kit: rank 1 (pid ";
    assert!(run.stdout.contains(said), "{}", run.stdout);
    assert!(run.stdout.contains("died of SIGKILL"), "{}", run.stdout);
}

#[rstest]
#[case::leaves("missing_rank.py", "crash", "rank-1 stderr: rank 1 finds no device")]
#[case::silent(
    "silent_rank.py",
    "hang",
    "no hello within 60 s: rank 0 (setup), rank 1"
)]
fn a_rank_that_never_comes_is_named_and_not_waited_for_again(
    #[case] adapter: &str,
    #[case] verdict: &str,
    #[case] why: &str,
) {
    let start = Instant::now();
    let run = judged(&fake(adapter), &three(), &["--start-limit", "60"]);
    assert_eq!(run.code, 1);
    assert_eq!(verdicts(&run), [verdict; 3], "{}", run.stderr);
    assert!(run.stdout.contains(why), "{}", run.stdout);
    assert!(
        start.elapsed() < Duration::from_secs(150),
        "each case waited"
    );
}

#[test]
fn a_wrong_shape_is_named_with_the_right_one() {
    let run = judged(&fake("wrong_shape.py"), &three()[..1], &[]);
    assert_eq!(run.code, 1);
    let why = "rank 0: `out` is f32 [1, 4, 10, 8], due is f32 [1, 10, 4, 8]";
    assert!(run.stdout.contains(why), "{}", run.stdout);
}

#[test]
fn one_nan_is_found() {
    let run = judged(&fake("nan.py"), &three()[..1], &[]);
    assert_eq!(run.code, 1);
    assert!(run.stdout.contains("out is wrong"), "{}", run.stdout);
    assert!(run.stdout.contains("1 of 80 rows"), "{}", run.stdout);
}

#[test]
fn noise_on_the_streams_disturbs_nobody() {
    let run = judged(&fake("noise.py"), &three(), &[]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert_eq!(verdicts(&run), ["exact"; 3]);
    assert!(!run.stdout.contains("nobody asked for"), "{}", run.stdout);
}

#[test]
fn silence_beyond_the_claim_fails() {
    let run = judged(&fake("ignores_mask.py"), &three()[..2], &[]);
    assert_eq!(run.code, 1);
    assert_eq!(verdicts(&run), ["fail", "not claimed"]);
    let why = "does not claim `mask-causal` and does not refuse it either: out, dq, dk and dv";
    assert!(run.stdout.contains(why), "{}", run.stdout);
}

#[test]
fn what_is_no_adapter_crashes_and_is_shown() {
    let run = judged("sh -c 'echo what? >&2; exit 7'", &three(), &[]);
    assert_eq!(run.code, 1);
    assert_eq!(verdicts(&run), ["crash"; 3]);
    let why = "the launcher ended before a hello of rank 0, rank 1\n";
    assert!(run.stdout.contains(why), "{}", run.stdout);
    assert!(
        run.stdout.contains("| launcher stderr: what?"),
        "{}",
        run.stdout
    );
}

/// Tiled KV heads are wrong where a KV head is neither the only one nor one of
/// as many as there are query heads, whatever the number of ranks.
#[test]
fn tiled_kv_heads_fail_exactly_the_gqa_cases() {
    let run = run_fake("kv_tiled.py", "f32");
    for (verdict, name, _) in run.verdicts() {
        let grouped = ["hq8-hkv4", "hq8-hkv2", "hq6-hkv3", "hq12-hkv3"];
        let due = grouped.iter().any(|heads| name.contains(heads));
        match verdict.as_str() {
            "fail" => assert!(due, "{name}"),
            "exact" | "pass" => assert!(!due, "{name}"),
            _ => {}
        }
    }
    assert!(run.named("fail").len() > 10, "{}", run.stdout);
    assert!(
        run.named("exact").len() + run.named("pass").len() > 10,
        "{}",
        run.stdout
    );
}

#[test]
fn gradients_over_the_number_of_ranks_fail_at_more_than_one() {
    let run = run_fake("gradient_over_world.py", "f32");
    let mut failures = 0;
    for (verdict, name, why) in run.verdicts() {
        let alone = name.contains("/p1-");
        match verdict.as_str() {
            "fail" => {
                assert!(!alone, "{name}");
                // Of a case that is asked in turn with others, the first time.
                assert!(why.ends_with("dq, dk and dv are wrong"), "{name}: {why}");
                failures += 1;
            }
            "exact" | "pass" => assert!(alone, "{name}"),
            _ => {}
        }
    }
    assert!(failures > 10, "{}", run.stdout);
    assert!(
        run.stdout.contains("it is 0.333 times the right one"),
        "{}",
        run.stdout
    );
}

/// Who looks at memory and not at strides is right where they say the same, and
/// who does more the second time is right where forward runs once.
#[rstest]
#[case::strides("reads_contiguous.py", &["transposed", "packed", "expanded"])]
#[case::calls("counts_calls.py", &["recompute"])]
fn what_plain_inputs_hide_fails_where_it_shows(#[case] adapter: &str, #[case] parts: &[&str]) {
    let plain = "attention/p2-b2-s20-hq4-hkv4-d8-causal-f32-gaussian-seed0";
    let mut cases = vec![plain.to_owned()];
    cases.extend(parts.iter().map(|part| format!("{plain}-{part}")));
    let run = judged(&fake(adapter), &cases, &[]);
    assert_eq!(run.named("exact"), [plain], "{}", run.stdout);
    assert_eq!(run.named("fail"), cases[1..], "{}", run.stdout);
}

fn run_fake(adapter: &str, filter: &str) -> Run {
    program()
        .args(["run", "--launch", &fake(adapter), "--filter", filter])
        .output()
        .unwrap()
        .into()
}

/// A rank of the reference under mpirun, killed from outside in the middle of a
/// run: its case says crash and the others are judged.
#[test]
fn a_rank_killed_in_the_middle_of_a_run_costs_its_case_alone() {
    let exchange = TempDir::new().unwrap();
    let judge = program()
        .args(["run", "--implementation", "reference-mpi", "--world", "2"])
        .args(["--filter", "f32", "--exchange"])
        .arg(exchange.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    signal("-KILL", victim(exchange.path()));
    let run: Run = judge.wait_with_output().unwrap().into();
    assert_eq!(run.code, 1);
    assert_eq!(run.named("crash").len(), 1, "{}", run.stderr);
    let right = ["exact", "pass", "refused"].map(|verdict| run.named(verdict).len());
    assert_eq!(
        right.iter().sum::<usize>(),
        run.verdicts().len() - 1,
        "{}",
        run.stderr
    );
    assert!(run.stdout.contains("rank 1 ended"), "{}", run.stdout);
    assert_nothing_stays_behind(exchange.path());
}

/// The process of rank 1, once it has been asked its third case.
fn victim(exchange: &Path) -> i32 {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        assert!(Instant::now() < deadline, "no rank came to its third case");
        let session = fs::read_dir(exchange).unwrap().next();
        let pid = session.and_then(|session| {
            let session = session.unwrap().path();
            let progress = fs::read_to_string(session.join("progress/rank-1")).ok()?;
            let hello = fs::read_to_string(session.join("hello/rank-1.json")).ok()?;
            let hello: serde_json::Value = serde_json::from_str(&hello).ok()?;
            progress
                .starts_with("case 2")
                .then_some(hello["pid"].as_i64()? as i32)
        });
        match pid {
            Some(pid) => return pid,
            None => thread::sleep(Duration::from_millis(1)),
        }
    }
}

fn signal(signal: &str, pid: i32) {
    let kill = Command::new("kill")
        .args([signal, &pid.to_string()])
        .status();
    assert!(kill.unwrap().success());
}

#[test]
fn an_interrupt_ends_the_run_and_its_ranks() {
    let exchange = TempDir::new().unwrap();
    let judge = program()
        .args([
            "run",
            "--implementation",
            "reference-mpi",
            "--world",
            "2",
            "--exchange",
        ])
        .arg(exchange.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    victim(exchange.path());
    signal("-INT", judge.id() as i32);
    let run: Run = judge.wait_with_output().unwrap().into();
    assert_eq!(run.code, 130, "{}", run.stderr);
    assert!(
        run.stdout
            .contains("Interrupted: not every case was judged."),
        "{}",
        run.stdout
    );
    assert_nothing_stays_behind(exchange.path());
}

#[test]
fn a_case_on_one_rank_has_no_one_else_to_blame() {
    let name = "attention/p1-b1-s22-hq4-hkv4-d8-causal-f32-gaussian-seed0".to_owned();
    let run = judged(&fake("crash.py"), &[name], &[]);
    assert_eq!(verdicts(&run), ["crash"]);
    assert!(
        run.stdout.contains("rank 0 ended (SIGKILL)"),
        "{}",
        run.stdout
    );
}
