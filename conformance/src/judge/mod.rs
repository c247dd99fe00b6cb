//! From an implementation's outcome to a verdict that says whose fault it is.

mod assembly;
mod attention;
mod comparison;
mod convention;
mod dense;
mod dropout;
mod padding;
pub mod power;
mod question;
mod repetition;
mod right;
mod ruler;
mod system;
mod tolerance;
mod verdict;

use fixtures::Feature;
use fixtures::exchange::{AnswerStatus, Declared, Tensors};

pub(crate) use self::comparison::Yardstick;
use crate::diagnosis::Mistake;
use crate::implementation::{self, Collapse, Failure, RankAnswer};

pub use self::comparison::{Comparison, Place, TensorComparison, WrongNumber};
pub use self::dropout::FALSE_ALARM;
pub use self::question::Question;
pub(crate) use self::repetition::of_state;
pub use self::repetition::repeated;
pub use self::right::right_answer;
pub(crate) use self::right::{blanked, dense_answer, whole_answer};
pub use self::tolerance::{FALSE_ALARM_OF_RUN, NUMBERS, false_alarm, lambda};
pub use self::verdict::{Judgement, Verdict};

/// What is due from an implementation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// The right answer.
    Answer,
    /// A clear refusal by every rank.
    Refusal(Cause),
}

/// Why a refusal is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The implementation does not claim this feature.
    Unclaimed(Feature),
    /// The input is bad in this way.
    BadInput(&'static str),
}

/// The verdict where there is no answer; none where that is nobody's fault.
pub fn without_answer(failure: Failure) -> Option<Judgement> {
    let collapsed = |verdict, collapse: Collapse, mistake| {
        let judgement = Judgement::new(verdict, collapse.sentence).with_details(collapse.logs);
        Some(match collapse.is_of_ranks {
            true => judgement.named(mistake),
            false => judgement,
        })
    };
    match failure {
        Failure::Crashed(collapse) => collapsed(Verdict::Crash, collapse, Mistake::RankDies),
        Failure::Hung(collapse) => collapsed(Verdict::Hang, collapse, Mistake::RankStaysAway),
        Failure::Harness(reason) => Some(Judgement::new(Verdict::Unclear, reason)),
        Failure::Interrupted => None,
    }
}

/// Judges what the ranks of an implementation that declares this answered to
/// `question`.
pub fn judge(
    question: &Question,
    declared: Declared,
    due: Due,
    answers: &[RankAnswer],
) -> Judgement {
    let judgement = match statuses(answers) {
        Statuses::Unreadable(sentence) => Judgement::new(Verdict::Fail, sentence),
        Statuses::AllOk(ranks) => match due {
            Due::Refusal(Cause::BadInput(defect)) => {
                let sentence = format!("takes bad {defect} without a word");
                Judgement::new(Verdict::Fail, sentence).named(Mistake::BadInputTaken)
            }
            _ => match question.attention() {
                Some((case, inputs)) => {
                    let means = question.means();
                    attention::compare(case, inputs, (declared, means), answers, &ranks)
                }
                None => system::compare(question.case(), declared, &ranks),
            }
            .unwrap_or_else(|judgement| judgement),
        },
        Statuses::AllRefused(refusals) => refused(due, &refusals),
        Statuses::Mixed(refusals) => Judgement::new(
            Verdict::Fail,
            "some ranks answered and others raised an error",
        )
        .with_details(told(&refusals))
        .named(Mistake::OneRankRefuses),
    };
    match due {
        Due::Refusal(Cause::Unclaimed(feature)) => beyond_the_claim(feature, judgement),
        _ => judgement,
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
                return Judgement::new(Verdict::Fail, sentence).named(Mistake::RefusedWithoutWords);
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
    let judgement = Judgement::new(verdict, sentence).with_details(told(refusals));
    match verdict {
        Verdict::Fail => judgement.named(Mistake::GoodInputRefused),
        _ => judgement,
    }
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
