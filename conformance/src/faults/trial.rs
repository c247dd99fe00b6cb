//! A fault on a case: whether its answer is wrong there, which is decided
//! without the judge, and what the judge says.

use std::collections::BTreeSet;

use fixtures::exchange::{AnswerStatus, CaseInfo, Declared, Tensors};
use fixtures::{Case, Dtype};

use super::{Assembled, Fault};
use crate::diagnosis::Mistake;
use crate::implementation::{Claims, Failure, Implementation, Interrupt, RankAnswer};
use crate::judge::{Judgement, Verdict};
use crate::known::KnownFailures;
use crate::runner;

/// What became of a fault on a case.
#[derive(Debug)]
pub struct Trial {
    /// Whether the answer is another than that of the right attention.
    pub is_wrong: bool,
    /// What the judge says of it.
    pub judgement: Judgement,
    /// The answers to the case's questions.
    pub(crate) answered: Vec<Answered>,
}

impl Trial {
    /// Whether the judge fails a wrong answer.
    pub fn is_caught(&self) -> bool {
        self.is_wrong && self.judgement.verdict.is_failure()
    }

    /// Whether the judge fails an answer that is not wrong.
    pub fn is_false_alarm(&self) -> bool {
        !self.is_wrong && self.judgement.verdict.is_failure()
    }

    /// The mistake that the diagnosis names.
    pub fn named(&self) -> Option<Mistake> {
        let diagnosis = self.judgement.diagnosis.as_ref();
        diagnosis.and_then(|diagnosis| diagnosis.mistake)
    }
}

/// A case, and how the right attention answers it.
pub struct Trials {
    case: Case,
    right: Vec<Answered>,
    /// What the judge says of the right attention.
    pub of_right: Judgement,
}

pub(crate) type Answered = Result<Vec<RankAnswer>, Failure>;

impl Trials {
    /// Has the right attention answer `case`.
    pub fn of(case: &Case) -> Trials {
        let (right, of_right) = ask(Assembled::right(), case);
        Trials {
            case: case.clone(),
            right,
            of_right,
        }
    }

    /// Whether the judge finds nothing wrong with the right attention.
    pub fn is_right_judged_right(&self) -> bool {
        matches!(
            self.of_right.verdict,
            Verdict::Exact | Verdict::Pass | Verdict::Refused
        )
    }

    /// Tries `fault`.
    pub fn trial(&self, fault: &Fault) -> Trial {
        let assembled = Assembled::with(fault);
        let declared = assembled.declared();
        // Who declares another convention is asked another question.
        let right = match declared == Declared::default() {
            true => None,
            false => Some(ask(Assembled::right_in(declared), &self.case).0),
        };
        let right = right.as_ref().unwrap_or(&self.right);
        let (answered, judgement) = ask(assembled, &self.case);
        let limit = roundoffs(fault, &self.case) * self.case.dtype().unit_roundoff();
        let questions = right.iter().zip(&answered);
        let is_wrong =
            questions
                .zip(self.case.questions())
                .any(|((right, answered), case)| match (right, answered) {
                    (Ok(right), Ok(answered)) => differ(&case, right, answered, limit),
                    _ => true,
                });
        Trial {
            is_wrong,
            judgement,
            answered,
        }
    }
}

/// By how many unit roundoffs two right answers may differ, relative to a
/// tensor's norm: sums of another order in types that are rounded once for each
/// term, and sums that are rounded once in half types.
fn roundoffs(fault: &Fault, case: &Case) -> f64 {
    match (fault.mistake, case.dtype()) {
        // Their answers are off by no more than a few.
        (Mistake::BiasedRounding, _) => 0.5,
        (Mistake::PartialResultsInBf16, _) => 2.0,
        (_, Dtype::Bf16 | Dtype::F16) => 4.0,
        _ => 100.0,
    }
}

/// Every answer that the implementation gave to a case's questions, and what
/// the judge says.
fn ask(assembled: Assembled, case: &Case) -> (Vec<Answered>, Judgement) {
    let mut witnessed = Witnessed {
        inner: assembled,
        answered: Vec::new(),
    };
    let cases = std::slice::from_ref(case);
    let (mut known, interrupt) = (KnownFailures::default(), Interrupt::default());
    let summary = runner::run(&mut witnessed, cases, &mut known, &interrupt, &mut |_| ());
    let judgement = summary.records.into_iter().map(|record| record.judgement);
    let unasked = || Judgement::new(Verdict::Unclear, "the case was not asked");
    let judgement = judgement.reduce(Judgement::gravest).unwrap_or_else(unasked);
    (witnessed.answered, judgement)
}

/// An implementation of which every answer is kept.
struct Witnessed {
    inner: Assembled,
    answered: Vec<Answered>,
}

impl Implementation for Witnessed {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn claims(&mut self, world: usize) -> Result<Claims, Failure> {
        self.inner.claims(world)
    }

    fn ask(&mut self, posed: Vec<(CaseInfo, Tensors)>) -> Answered {
        let answered = self.inner.ask(posed);
        self.answered.push(answered.clone());
        answered
    }
}

/// Whether two answers are not the same but for roundings.
fn differ(case: &Case, right: &[RankAnswer], other: &[RankAnswer], limit: f64) -> bool {
    let pairs = || right.iter().flatten().zip(other.iter().flatten());
    let is_eval = case.attention().is_some_and(|case| case.extras.eval);
    let differ_in_kind = pairs().any(|((right, _), (other, _))| {
        let sends = |bytes: Option<u64>| bytes.is_some_and(|bytes| bytes > 0);
        right.status != other.status
            || right.message.is_empty() != other.message.is_empty()
            || is_eval && sends(right.bytes_sent) != sends(other.bytes_sent)
    });
    let is_answered = pairs().all(|((right, _), _)| right.status == AnswerStatus::Ok);
    differ_in_kind || is_answered && tensors_differ(right, other, limit)
}

/// Whether any tensor, over all ranks, differs by more than `limit` of its norm.
fn tensors_differ(right: &[RankAnswer], other: &[RankAnswer], limit: f64) -> bool {
    let names: BTreeSet<&String> = right
        .iter()
        .chain(other)
        .flatten()
        .flat_map(|(_, tensors)| tensors.keys())
        .collect();
    names.into_iter().any(|name| {
        let (mut error, mut norm) = (0.0, 0.0);
        for (right, other) in right.iter().flatten().zip(other.iter().flatten()) {
            let (Some(right), Some(other)) = (right.1.get(name), other.1.get(name)) else {
                return true;
            };
            if right.shape != other.shape || right.dtype != other.dtype {
                return true;
            }
            for (right, other) in right.to_f64().into_iter().zip(other.to_f64()) {
                error += (right - other) * (right - other);
                norm += right * right;
            }
        }
        let (error, limit) = (error.sqrt(), limit * norm.sqrt());
        error > limit || error.is_nan()
    })
}
