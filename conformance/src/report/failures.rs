//! What went wrong, once more at the end, each with the command that repeats
//! it.

use std::collections::BTreeMap;
use std::fmt::Write;

use fixtures::Case;

use crate::Clause;
use crate::judge::{Judgement, Verdict};
use crate::runner::{Record, Summary};

/// What else there is to say of a case that went wrong, a line each, by the
/// case's name.
pub type Notes = BTreeMap<String, Vec<String>>;

/// Every case that failed, crashed, hung or is unclear. `command` is the
/// command line up to the case, which `--case NAME` then repeats alone.
pub fn failures(summary: &Summary, command: &str, notes: &Notes) -> String {
    let mut text = String::new();
    for record in &summary.records {
        let verdict = record.judgement.verdict;
        if !verdict.is_failure() && verdict != Verdict::Unclear {
            continue;
        }
        text += &failure(&summary.implementation, record, command);
        for note in notes.get(&record.case.to_string()).into_iter().flatten() {
            text += &format!("  {note}\n");
        }
        text += "\n";
    }
    text
}

/// One such case: what it asks, whose fault it is, what was done wrong and
/// where to look, what shows it, and the command that repeats it.
pub fn failure(implementation: &str, record: &Record, command: &str) -> String {
    let Record {
        case, judgement, ..
    } = record;
    let verdict = judgement.verdict;
    let fault = match verdict.fault() {
        Some("harness") => "the harness' own fault",
        // Nobody saw a rank do anything wrong.
        _ if matches!(verdict, Verdict::Crash | Verdict::Hang) && judgement.diagnosis.is_none() => {
            "the implementation's fault, or its environment's"
        }
        _ => "the implementation's fault",
    };
    let mut text = format!("{implementation} {case}\n  asked: {}\n", clauses(case));
    // Writing to a string cannot fail.
    let _ = writeln!(
        text,
        "  {verdict} ({fault}): {}",
        telling_sentence(judgement)
    );
    if let Some(diagnosis) = &judgement.diagnosis {
        if let Some(mistake) = diagnosis.mistake {
            let sure = 100.0 * diagnosis.confidence;
            let (name, look_at) = (mistake.name(), mistake.look_at());
            let _ = writeln!(text, "  {name}, {sure:.0} % sure; look at {look_at}");
        }
        if !diagnosis.others.is_empty() {
            let others: Vec<_> = diagnosis.others.iter().map(|other| other.name()).collect();
            let _ = writeln!(text, "  the same here: {}", others.join(", "));
        }
    }
    if telling_sentence(judgement) != judgement.sentence {
        let _ = writeln!(text, "  | {}", judgement.sentence);
    }
    for detail in &judgement.details {
        for line in abridged(detail) {
            let _ = writeln!(text, "  | {line}");
        }
    }
    for line in judgement.diagnosis.iter().flat_map(|found| &found.strip) {
        let _ = writeln!(text, "  | {line}");
    }
    let _ = writeln!(text, "  again: {command} --case {case}");
    text
}

/// What was done wrong, as far as the diagnosis knows it of this very answer;
/// what the judge says, where it knows no more.
pub(super) fn telling_sentence(judgement: &Judgement) -> &str {
    match &judgement.diagnosis {
        Some(diagnosis) if !diagnosis.is_general() => &diagnosis.sentence,
        _ => &judgement.sentence,
    }
}

/// What the case holds an implementation to: numbers of clauses in SPEC.md.
fn clauses(case: &Case) -> String {
    let ids: Vec<_> = Clause::of_case(case).into_iter().map(Clause::id).collect();
    ids.join(" ")
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
