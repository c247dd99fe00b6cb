//! A known failure has to be seen, has to fail, and for the reason that is
//! given; else the list of them is at fault.
#![allow(missing_docs, clippy::unwrap_used)]

mod answers;
mod program;
mod spoiled;

use std::fs;
use std::path::PathBuf;

use fixtures::{AttentionCase, Case, Feature};
use program::{Run, fake, program};
use rstest::rstest;
use spoiled::{How, Spoiled, summary};
use tempfile::TempDir;
use ulysses_conformance::ExitCode;
use ulysses_conformance::judge::Verdict;
use ulysses_conformance::known::{KnownFailures, Rewriting};
use ulysses_conformance::runner::Summary;

const SHORT: &str = "attention/p2-b1-s8-hq2-hkv2-d4-full-f32-gaussian-seed7";
const LONG: &str = "attention/p2-b1-s12-hq2-hkv2-d4-full-f32-gaussian-seed7";
/// In the catalogue, and not among those asked.
const OTHER: &str = "attention/p2-b1-s60-hq8-hkv2-d16-causal-f32-gaussian-seed0";

/// The long case is wrong.
fn long(case: &AttentionCase) -> Option<How> {
    (case.sequence == 12).then_some(How::Output)
}

fn both(_: &AttentionCase) -> Option<How> {
    Some(How::Crash)
}

fn entry(case: &str, reason: &str, more: &str) -> String {
    format!("[[known]]\ncase = \"{case}\"\nreason = \"{reason}\"\nlink = \"bug 7\"\n{more}\n")
}

/// A file with this text.
fn file(text: &str) -> (TempDir, PathBuf) {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("known.toml");
    fs::write(&file, text).unwrap();
    (folder, file)
}

fn cases() -> Vec<Case> {
    [SHORT, LONG].map(|name| name.parse().unwrap()).to_vec()
}

/// Judges both cases; gives what became of them, and what is wrong with the
/// file.
fn judged(text: &str, how: fn(&AttentionCase) -> Option<How>) -> (Summary, Vec<String>) {
    let (_folder, file) = file(text);
    let mut known = KnownFailures::load(&file).unwrap();
    let summary = summary(&mut Spoiled::new(how), &[SHORT, LONG], &mut known);
    let errors = known.errors(&cases());
    let prefix = format!("{}: ", file.display());
    let errors = errors
        .iter()
        .map(|error| error.strip_prefix(&prefix).unwrap().to_owned())
        .collect();
    (summary, errors)
}

fn verdicts(summary: &Summary) -> Vec<Verdict> {
    let records = summary.records.iter();
    records.map(|record| record.judgement.verdict).collect()
}

#[rstest]
#[case::name(LONG, "")]
#[case::pattern("attention/*-s12-*-f32-*", "")]
#[case::verdict(LONG, "verdict = \"fail\"")]
#[case::implementation(LONG, "implementation = \"spoiled\"")]
fn what_fails_as_is_known_does_not_fail_the_run(#[case] case: &str, #[case] more: &str) {
    let (summary, errors) = judged(&entry(case, "out is wrong", more), long);
    assert_eq!(errors, [""; 0]);
    assert_eq!(verdicts(&summary), [Verdict::Pass, Verdict::Known]);
    let judgement = &summary.records[1].judgement;
    assert_eq!(judgement.sentence, "fail as known: out is wrong");
    assert_eq!(judgement.details.last().unwrap(), "known: bug 7");
    assert_eq!(ExitCode::of(&[summary]), ExitCode::Success);
}

#[test]
fn a_reason_may_stand_in_the_details() {
    let (summary, errors) = judged(&entry("attention/*", "stderr: killed", ""), both);
    assert_eq!(errors, [""; 0]);
    assert_eq!(verdicts(&summary), [Verdict::Known; 2]);
}

#[rstest]
#[case::reason("dq is wrong", "", "a failure with `dq is wrong`")]
#[case::verdict("out is wrong", "verdict = \"hang\"", "a hang with `out is wrong`")]
fn another_failure_than_is_known_stays_one(
    #[case] reason: &str,
    #[case] more: &str,
    #[case] known: &str,
) {
    let (summary, errors) = judged(&entry(LONG, reason, more), long);
    assert_eq!(errors, [""; 0]);
    assert_eq!(verdicts(&summary), [Verdict::Pass, Verdict::Fail]);
    let judgement = &summary.records[1].judgement;
    assert_eq!(judgement.sentence, "out is wrong");
    assert_eq!(
        judgement.details.last().unwrap(),
        &format!("known is another failure of this case, {known}: bug 7")
    );
    assert_eq!(ExitCode::of(&[summary]), ExitCode::Failed);
}

#[rstest]
#[case::passes(
    SHORT,
    "out is wrong",
    "",
    "is expected to fail, and passes with spoiled: remove it"
)]
#[case::passes_in_part(
    "attention/*-seed7",
    "out is wrong",
    "",
    "is expected to fail, and passes with spoiled \
     (attention/p2-b1-s8-hq2-hkv2-d4-full-f32-gaussian-seed7): remove it"
)]
#[case::nowhere(
    "attention/p2-b1-s8-*-seed8",
    "out is wrong",
    "",
    "matches no case, neither of the catalogue nor of those asked: remove it"
)]
#[case::explained(
    LONG,
    "dq is wrong",
    "\n[[known]]\ncase = \"*-s12-*\"\nreason = \"out\"\nlink = \"bug 8\"",
    "fails for a reason that another entry gives: remove it"
)]
fn an_entry_that_does_not_hold_is_an_error(
    #[case] case: &str,
    #[case] reason: &str,
    #[case] more: &str,
    #[case] error: &str,
) {
    let (_, errors) = judged(&entry(case, reason, more), long);
    assert_eq!(errors, [format!("`{case}` {error}")]);
}

#[rstest]
#[case::not_selected(OTHER, "")]
#[case::not_judged(SHORT, "implementation = \"another\"")]
fn what_a_run_says_nothing_of_is_no_error(#[case] case: &str, #[case] more: &str) {
    let (_, errors) = judged(&entry(case, "out is wrong", more), long);
    assert_eq!(errors, [""; 0]);
}

#[test]
fn what_is_not_claimed_is_no_known_failure() {
    let (_folder, file) = file(&entry(LONG, "out", ""));
    let mut known = KnownFailures::load(&file).unwrap();
    let mut spoiled = Spoiled::new(long);
    spoiled.unclaimed = vec![Feature::MaskFull, Feature::DtypeF32];
    let summary = summary(&mut spoiled, &[LONG], &mut known);
    assert_eq!(verdicts(&summary), [Verdict::NotClaimed]);
    let error = &known.errors(&cases())[0];
    assert!(
        error.ends_with("is expected to fail, and is not claimed: remove it"),
        "{error}"
    );
}

#[rstest]
#[case::link(
    "case = \"a\"\nreason = \"b\"\nlink = \" \"",
    "the entry for `a` has no `link`"
)]
#[case::no_link("case = \"a\"\nreason = \"b\"", "missing field `link`")]
#[case::reason(
    "case = \"a\"\nreason = \"\"\nlink = \"c\"",
    "the entry for `a` has no `reason`"
)]
#[case::verdict(
    "case = \"a\"\nreason = \"b\"\nlink = \"c\"\nverdict = \"pass\"",
    "`pass` is none of fail, crash, hang"
)]
#[case::key(
    "case = \"a\"\nreason = \"b\"\nlink = \"c\"\nwhy = \"d\"",
    "unknown field `why`"
)]
fn a_file_that_says_too_little_is_refused(#[case] text: &str, #[case] reason: &str) {
    let (_folder, file) = file(&format!("[[known]]\n{text}\n"));
    let error = KnownFailures::load(&file).unwrap_err();
    assert!(error.contains(reason), "{error}");
    assert!(error.starts_with(&file.display().to_string()), "{error}");
}

#[rstest]
#[case("attention/*", true)]
#[case("*-seed7", true)]
#[case("attention/p2-*-hq2-*-f32-gaussian-seed7", true)]
#[case("attention/*hq2-hkv2*hkv2-d4*", false)]
#[case("attention/p2-b1-s12", false)]
#[case("*-f64-*", false)]
#[case("*seed7*seed7", false)]
fn a_star_stands_for_any_text(#[case] pattern: &str, #[case] matches: bool) {
    let (summary, _) = judged(&entry(pattern, "out", ""), long);
    assert_eq!(verdicts(&summary)[1] == Verdict::Known, matches);
}

#[test]
fn a_rewritten_file_keeps_what_holds_and_wants_links_for_the_rest() {
    let kept = format!("# Why.\n{}", entry(OTHER, "out", ""));
    let (_folder, file) = file(&format!("{kept}\n{}", entry(SHORT, "gone", "")));
    let mut known = KnownFailures::load_to_rewrite(&file).unwrap();
    summary(&mut Spoiled::new(long), &[SHORT, LONG], &mut known);
    let rewriting = known.rewrite(&cases()).unwrap();
    let due = Rewriting {
        kept: 1,
        dropped: 1,
        added: 1,
        without_link: 1,
    };
    assert_eq!(rewriting, due);
    let text = fs::read_to_string(&file).unwrap();
    let added = format!(
        "\n[[known]]\ncase = \"{LONG}\"\nimplementation = \"spoiled\"\nverdict = \"fail\"\n\
         reason = \"out is wrong\"\nlink = \"\"\n"
    );
    let lines = |text: &str| -> Vec<String> {
        let lines = text.lines().filter(|line| !line.is_empty());
        lines.map(str::to_owned).collect()
    };
    assert_eq!(lines(&text), lines(&format!("{kept}{added}")));
    let error = KnownFailures::load(&file).unwrap_err();
    assert!(
        error.contains(&format!("the entry for `{LONG}` has no `link`")),
        "{error}"
    );

    fs::write(&file, text.replace("link = \"\"", "link = \"bug 9\"")).unwrap();
    let (summary, errors) = judged(&fs::read_to_string(&file).unwrap(), long);
    assert_eq!(errors, [""; 0]);
    assert_eq!(verdicts(&summary), [Verdict::Pass, Verdict::Known]);
}

#[test]
fn of_a_pattern_that_holds_in_part_the_cases_that_fail_stay_with_its_link() {
    let (_folder, file) = file(&entry("attention/*-seed7", "out", ""));
    let mut known = KnownFailures::load_to_rewrite(&file).unwrap();
    summary(&mut Spoiled::new(long), &[SHORT, LONG], &mut known);
    known.rewrite(&cases()).unwrap();
    let text = fs::read_to_string(&file).unwrap();
    assert!(text.contains(&format!("case = \"{LONG}\"")), "{text}");
    assert!(text.contains("link = \"bug 7\""), "{text}");
    assert!(!text.contains('*') && !text.contains(SHORT), "{text}");
}

#[test]
fn a_file_that_is_not_there_can_be_written() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("new.toml");
    assert!(KnownFailures::load(&file).is_err());
    let mut known = KnownFailures::load_to_rewrite(&file).unwrap();
    summary(&mut Spoiled::new(both), &[SHORT, LONG], &mut known);
    assert_eq!(known.rewrite(&cases()).unwrap().added, 2);
    // How many cases the ranks had seen before is left out.
    let text = fs::read_to_string(&file).unwrap();
    let reason = "reason = \"a process ended: rank 0\"\n";
    assert_eq!(text.matches(reason).count(), 2, "{text}");
}

const GROUPED: &str = "attention/p1-b1-s6-hq4-hkv2-d4-full-f32-gaussian-seed3";
const PLAIN: &str = "attention/p1-b1-s6-hq4-hkv4-d4-full-f32-gaussian-seed3";

fn run_with(file: &std::path::Path, more: &[&str]) -> Run {
    program()
        .args(["run", "--launch", &fake("kv_tiled.py")])
        .args(["--case", GROUPED, "--case", PLAIN, "--known"])
        .arg(file)
        .args(more)
        .output()
        .unwrap()
        .into()
}

#[test]
fn the_program_counts_known_failures_and_fails_for_those_that_pass() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("known.toml");
    assert_eq!(run_with(&file, &[]).code, 5);
    let run = run_with(&file, &["--rewrite-known"]);
    assert_eq!(run.code, 1, "{}", run.stderr);
    let words = "0 entries kept, 0 dropped, 1 added; 1 without a link, which is due.";
    assert!(run.stdout.contains(words), "{}", run.stdout);
    let run = run_with(&file, &[]);
    assert_eq!(run.code, 5, "{}", run.stdout);
    assert!(run.stderr.contains("has no `link`"), "{}", run.stderr);

    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, text.replace("link = \"\"", "link = \"bug 1\"")).unwrap();
    let run = run_with(&file, &[]);
    assert_eq!(run.code, 0, "{}", run.stdout);
    assert_eq!(run.named("known"), [GROUPED]);

    fs::write(&file, entry(PLAIN, "out", "")).unwrap();
    let run = run_with(&file, &[]);
    assert_eq!(run.code, 1, "{}", run.stdout);
    let words = format!("`{PLAIN}` is expected to fail, and passes with kv_tiled.py: remove it");
    assert!(run.stdout.contains(&words), "{}", run.stdout);
}
