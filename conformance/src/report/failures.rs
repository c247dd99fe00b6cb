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
        for line in judgement.details.iter().flat_map(|detail| detail.lines()) {
            let _ = writeln!(text, "  | {line}");
        }
        let _ = writeln!(text, "  again: {command} --case {}\n", record.case);
    }
    text
}
