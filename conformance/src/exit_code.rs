//! The exit codes of the program, which are part of its interface: a script
//! may rely on them.

use std::process::{ExitCode as ProcessExitCode, Termination};

use crate::judge::Verdict;
use crate::runner::Summary;

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// Every case that was asked was answered rightly, or refused where a
    /// refusal was due, or failed as is known.
    Success = 0,
    /// At least one case failed, crashed or hung: the implementation's fault.
    /// Or the file of known failures tells of one that is none.
    Failed = 1,
    /// The command line makes no sense. Nothing was run.
    Usage = 2,
    /// No case was judged: none was selected, or the implementation claims
    /// none of those selected. A run that tests nothing does not pass.
    NothingJudged = 3,
    /// At least one case is unclear, and none failed: the harness' own fault.
    Unclear = 4,
    /// What the run needs is missing or cannot be started: a program, a
    /// folder. The environment's fault.
    Environment = 5,
    /// Interrupted before all cases were judged.
    Interrupted = 130,
}

impl ExitCode {
    /// How a run over these implementations ended.
    pub fn of(summaries: &[Summary]) -> ExitCode {
        let any = |verdict: fn(Verdict) -> bool| {
            summaries
                .iter()
                .flat_map(|summary| &summary.records)
                .any(|record| verdict(record.judgement.verdict))
        };
        let judged_nothing = |summary: &Summary| {
            !summary
                .records
                .iter()
                .any(|record| record.judgement.verdict.is_judged())
        };
        if summaries.iter().any(|summary| summary.is_interrupted) {
            ExitCode::Interrupted
        } else if any(Verdict::is_failure) {
            ExitCode::Failed
        } else if any(|verdict| verdict == Verdict::Unclear) {
            ExitCode::Unclear
        } else if summaries.iter().any(judged_nothing) {
            ExitCode::NothingJudged
        } else {
            ExitCode::Success
        }
    }
}

impl Termination for ExitCode {
    fn report(self) -> ProcessExitCode {
        ProcessExitCode::from(self as u8)
    }
}
