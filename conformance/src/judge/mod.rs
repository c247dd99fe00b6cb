//! From an implementation's outcome to a verdict that says whose fault it is.

mod comparison;
mod dense;

use fixtures::exchange::{AnswerStatus, Tensors, tensor};
use fixtures::{Array, Case, Feature, Input, Inputs, sharding};

use crate::implementation::{self, Collapse, Failure, RankAnswer};
use crate::oracle::{self, Answer};

pub use comparison::{Comparison, SLACK, TensorComparison, WrongRow};

/// What became of a case.
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
    pub const ALL: [Verdict; 8] = [
        Verdict::Exact,
        Verdict::Pass,
        Verdict::Refused,
        Verdict::NotClaimed,
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
            Verdict::Fail => "fail",
            Verdict::Crash => "crash",
            Verdict::Hang => "hang",
            Verdict::Unclear => "unclear",
        }
    }

    /// Whether the implementation is at fault.
    pub fn is_failure(self) -> bool {
        matches!(self, Verdict::Fail | Verdict::Crash | Verdict::Hang)
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
}

impl Judgement {
    /// A verdict for a reason.
    pub fn new(verdict: Verdict, sentence: impl Into<String>) -> Judgement {
        Judgement {
            verdict,
            sentence: sentence.into(),
            details: Vec::new(),
            comparison: None,
        }
    }

    fn with_details(mut self, details: impl IntoIterator<Item = String>) -> Judgement {
        self.details.extend(details);
        self
    }
}

/// What is due from an implementation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// The right answer.
    Answer,
    /// A clear refusal, because it does not claim this feature.
    Refusal(Feature),
}

/// The verdict where there is no answer; none where that is nobody's fault.
pub fn without_answer(failure: Failure) -> Option<Judgement> {
    let collapsed = |verdict, collapse: Collapse| {
        Some(Judgement::new(verdict, collapse.sentence).with_details(collapse.logs))
    };
    match failure {
        Failure::Crashed(collapse) => collapsed(Verdict::Crash, collapse),
        Failure::Hung(collapse) => collapsed(Verdict::Hang, collapse),
        Failure::Harness(reason) => Some(Judgement::new(Verdict::Unclear, reason)),
        Failure::Interrupted => None,
    }
}

/// Judges what the ranks answered to `case`, asked with `inputs`.
pub fn judge(case: &Case, inputs: &Inputs, due: Due, answers: &[RankAnswer]) -> Judgement {
    let judgement = match statuses(answers) {
        Statuses::Unreadable(sentence) => Judgement::new(Verdict::Fail, sentence),
        Statuses::AllOk(shards) => compare(case, inputs, &shards),
        Statuses::AllRefused(refusals) => refused(due, &refusals),
        Statuses::Mixed(refusals) => Judgement::new(
            Verdict::Fail,
            "some ranks answered and others raised an error",
        )
        .with_details(told(&refusals)),
    };
    match due {
        Due::Answer => judgement,
        Due::Refusal(feature) => beyond_the_claim(feature, judgement),
    }
}

/// Adds that the case is beyond what the implementation claims.
fn beyond_the_claim(feature: Feature, mut judgement: Judgement) -> Judgement {
    let feature = feature.name();
    let said = match judgement.verdict {
        Verdict::Fail => format!("does not claim `{feature}` and does not refuse it either: "),
        Verdict::Exact | Verdict::Pass => {
            format!("answers rightly although it does not claim `{feature}`")
        }
        _ => return judgement,
    };
    judgement.sentence = said + &judgement.sentence;
    judgement
}

/// Judges what ranks said that all refused.
fn refused(due: Due, refusals: &[Refusal<'_>]) -> Judgement {
    let all_unsupported = refusals
        .iter()
        .all(|refusal| refusal.status == AnswerStatus::Unsupported);
    let verdict = match due {
        Due::Refusal(_) => match refusals.iter().find(|r| r.message.is_empty()) {
            None => Verdict::Refused,
            Some(wordless) => {
                let sentence = format!("rank {} refused without a word", wordless.rank);
                return Judgement::new(Verdict::Fail, sentence);
            }
        },
        // It claims the features of the case, and says at run time that it does
        // not do this one.
        Due::Answer if all_unsupported => Verdict::NotClaimed,
        Due::Answer => Verdict::Fail,
    };
    let first = &refusals[0];
    let sentence = format!(
        "rank {}: {}",
        first.rank,
        implementation::telling_line(first.message)
    );
    Judgement::new(verdict, sentence).with_details(told(refusals))
}

/// A rank that did not answer, and what it said instead.
struct Refusal<'a> {
    rank: usize,
    status: AnswerStatus,
    message: &'a str,
}

fn told(refusals: &[Refusal<'_>]) -> Vec<String> {
    implementation::told(refusals.iter().map(|r| (r.rank, r.message)))
}

enum Statuses<'a> {
    Unreadable(String),
    AllOk(Vec<&'a Tensors>),
    AllRefused(Vec<Refusal<'a>>),
    Mixed(Vec<Refusal<'a>>),
}

fn statuses(answers: &[RankAnswer]) -> Statuses<'_> {
    let mut ok = Vec::new();
    let mut refusals = Vec::new();
    for (rank, answer) in answers.iter().enumerate() {
        match answer {
            Err(reason) => {
                return Statuses::Unreadable(format!("rank {rank} answered garbage: {reason}"));
            }
            Ok((info, tensors)) if info.status == AnswerStatus::Ok => ok.push(tensors),
            Ok((info, _)) => refusals.push(Refusal {
                rank,
                status: info.status,
                message: info.message.trim(),
            }),
        }
    }
    match (ok.is_empty(), refusals.is_empty()) {
        (_, true) => Statuses::AllOk(ok),
        (true, false) => Statuses::AllRefused(refusals),
        (false, false) => Statuses::Mixed(refusals),
    }
}

/// Puts the shards together and compares them with the oracle.
fn compare(case: &Case, inputs: &Inputs, shards: &[&Tensors]) -> Judgement {
    let answer = match joined(case, shards) {
        Ok(answer) => answer,
        Err(sentence) => return Judgement::new(Verdict::Fail, sentence),
    };
    let comparison = oracle::attention(case, inputs)
        .map_err(|error| format!("the oracle failed: {error}"))
        .and_then(|right| comparison::compare(case, inputs, &right, &answer));
    match comparison {
        Err(reason) => Judgement::new(Verdict::Unclear, reason),
        Ok(comparison) => {
            let verdict = comparison.verdict();
            Judgement {
                verdict,
                sentence: comparison.sentence(),
                details: comparison.details(case),
                comparison: Some(comparison),
            }
        }
    }
}

/// The answer over the whole sequence, if every rank gave every tensor in the
/// shape and element type that is due.
fn joined(case: &Case, shards: &[&Tensors]) -> Result<Answer<Array>, String> {
    let runs = sharding::contiguous(case.sequence, case.world);
    let join = |name: &str, like: Input| {
        let arrays = shards
            .iter()
            .zip(&runs)
            .enumerate()
            .map(|(rank, (tensors, run))| {
                let array = tensor(tensors, name).map_err(|e| format!("rank {rank}: {e}"))?;
                let due = [case.batch, run.len(), like.heads(case), case.head_size];
                if array.shape != due || array.dtype != case.dtype {
                    return Err(format!(
                        "rank {rank}: `{name}` is {} {:?}, due is {} {due:?} \
                         [batch, tokens, heads, head size]",
                        array.dtype, array.shape, case.dtype
                    ));
                }
                Ok(array.clone())
            })
            .collect::<Result<Vec<_>, String>>()?;
        Ok::<_, String>(sharding::join(&arrays))
    };
    Ok(Answer {
        out: join("out", Input::Query)?,
        dq: join("dq", Input::Query)?,
        dk: join("dk", Input::Key)?,
        dv: join("dv", Input::Value)?,
    })
}
