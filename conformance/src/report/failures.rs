//! What went wrong, once more at the end, each with the command that repeats
//! it.

use std::fmt::Write;

use crate::judge::Verdict;
use crate::runner::Summary;

/// Every case that failed, crashed, hung or is unclear. `command` is the
/// command line up to the case, which `--case NAME` then repeats alone.
pub fn failures(summary: &Summary, command: &str) -> String {
    let mut text = String::new();
    for record in &summary.records {
        let judgement = &record.judgement;
        let fault = match judgement.verdict {
            Verdict::Unclear => "the harness' own fault",
            verdict if verdict.is_failure() => "the implementation's fault",
            _ => continue,
        };
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{} {}\n  {} ({fault}): {}",
            summary.implementation, record.case, judgement.verdict, judgement.sentence
        );
        for detail in &judgement.details {
            for line in abridged(detail) {
                let _ = writeln!(text, "  | {line}");
            }
        }
        let _ = writeln!(text, "  again: {command} --case {}\n", record.case);
    }
    text
}

/// The first line of a long text and its last ones: of a traceback, where the
/// error was raised.
fn abridged(detail: &str) -> Vec<String> {
    const LAST: usize = 16;
    let lines: Vec<&str> = detail.lines().collect();
    let more = lines.len().saturating_sub(LAST + 1);
    let mut kept: Vec<String> = lines.iter().map(|&line| line.to_owned()).collect();
    if more > 1 {
        kept.splice(1..=more, [format!("... {more} lines ...")]);
    }
    kept
}
