//! The exit codes of the program, which are part of its interface: a script
//! may rely on them.

use std::process::{ExitCode as ProcessExitCode, Termination};

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// Every case that was asked was answered rightly, or refused where a
    /// refusal was due.
    Success = 0,
    /// At least one case failed, crashed or hung: the implementation's fault.
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

impl Termination for ExitCode {
    fn report(self) -> ProcessExitCode {
        ProcessExitCode::from(self as u8)
    }
}
