//! What became of a case, and why.

use super::Comparison;
use crate::diagnosis::{Diagnosis, Mistake};

/// What became of a case. A later one is graver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    /// Right, and bit-equal to dense attention in the same kernel.
    Exact,
    /// Right.
    Pass,
    /// A clear error where one was due.
    Refused,
    /// Not asked, because the implementation does not claim it.
    NotClaimed,
    /// Failed, crashed or hung as a file of known failures says.
    Known,
    /// Wrong: the implementation's fault.
    Fail,
    /// A rank ended before it answered: the implementation's fault.
    Crash,
    /// A rank did not answer within the time limit: the implementation's fault.
    Hang,
    /// The harness could not judge: its own fault.
    Unclear,
}

impl Verdict {
    /// Every verdict, in the order of a report.
    pub const ALL: [Verdict; 9] = [
        Verdict::Exact,
        Verdict::Pass,
        Verdict::Refused,
        Verdict::NotClaimed,
        Verdict::Known,
        Verdict::Fail,
        Verdict::Crash,
        Verdict::Hang,
        Verdict::Unclear,
    ];

    /// The name, as in a report: `not claimed`.
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Exact => "exact",
            Verdict::Pass => "pass",
            Verdict::Refused => "refused",
            Verdict::NotClaimed => "not claimed",
            Verdict::Known => "known",
            Verdict::Fail => "fail",
            Verdict::Crash => "crash",
            Verdict::Hang => "hang",
            Verdict::Unclear => "unclear",
        }
    }

    /// Whether there is an answer and it is right.
    pub fn is_right(self) -> bool {
        matches!(self, Verdict::Exact | Verdict::Pass)
    }

    /// Whether the implementation is at fault, and nobody knew.
    pub fn is_failure(self) -> bool {
        matches!(self, Verdict::Fail | Verdict::Crash | Verdict::Hang)
    }

    /// Whose fault it is, if anything went wrong: `implementation` or
    /// `harness`.
    pub fn fault(self) -> Option<&'static str> {
        match self {
            Verdict::Known | Verdict::Fail | Verdict::Crash | Verdict::Hang => {
                Some("implementation")
            }
            Verdict::Unclear => Some("harness"),
            Verdict::Exact | Verdict::Pass | Verdict::Refused | Verdict::NotClaimed => None,
        }
    }

    /// Whether the case says anything of the implementation at all.
    pub fn is_judged(self) -> bool {
        !matches!(self, Verdict::NotClaimed | Verdict::Unclear)
    }
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// A verdict and its reasons.
#[derive(Clone, Debug)]
pub struct Judgement {
    /// What became of the case.
    pub verdict: Verdict,
    /// Why, in a sentence. Empty where the verdict says it all.
    pub sentence: String,
    /// What else a person who mends it wants to see, a line each.
    pub details: Vec<String>,
    /// How the answer compares, where there is one to compare.
    pub comparison: Option<Comparison>,
    /// What was done wrong, where that shows.
    pub diagnosis: Option<Box<Diagnosis>>,
}

impl Judgement {
    /// A verdict for a reason.
    pub fn new(verdict: Verdict, sentence: impl Into<String>) -> Judgement {
        Judgement {
            verdict,
            sentence: sentence.into(),
            details: Vec::new(),
            comparison: None,
            diagnosis: None,
        }
    }

    pub(super) fn with_details(mut self, details: impl IntoIterator<Item = String>) -> Judgement {
        self.details.extend(details);
        self
    }

    /// Says what was done wrong, where that shows without any numbers.
    pub(crate) fn named(mut self, mistake: Mistake) -> Judgement {
        self.diagnosis = Some(Box::new(Diagnosis::certain(mistake)));
        self
    }

    /// The graver of two judgements of parts of one answer; the first where
    /// they are alike.
    pub(crate) fn gravest(self, other: Judgement) -> Judgement {
        if other.verdict > self.verdict {
            other
        } else {
            self
        }
    }
}
