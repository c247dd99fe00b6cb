//! From an implementation's outcome to a verdict that says whose fault it is.

mod assembly;
mod comparison;
mod convention;
mod dense;
mod dropout;
mod padding;
pub mod power;
mod repetition;
mod right;
mod ruler;
mod tolerance;
mod verdict;

use fixtures::exchange::{AnswerStatus, Declared, Tensors};
use fixtures::{Case, Defect, Feature, Inputs};

use self::assembly::Whole;
pub(crate) use self::comparison::Yardstick;
use crate::diagnosis::{self, Evidence, Mistake};
use crate::implementation::{self, Collapse, Failure, RankAnswer};
use crate::oracle;

pub use self::comparison::{Comparison, Place, TensorComparison, WrongNumber};
pub use self::convention::inputs_for;
pub use self::dropout::FALSE_ALARM;
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
    BadInput(Defect),
}

/// The verdict where there is no answer; none where that is nobody's fault.
pub fn without_answer(failure: Failure) -> Option<Judgement> {
    let collapsed = |verdict, collapse: Collapse, mistake| {
        let judgement = Judgement::new(verdict, collapse.sentence).with_details(collapse.logs);
        Some(judgement.named(mistake))
    };
    match failure {
        Failure::Crashed(collapse) => collapsed(Verdict::Crash, collapse, Mistake::RankDies),
        Failure::Hung(collapse) => collapsed(Verdict::Hang, collapse, Mistake::RankStaysAway),
        Failure::Harness(reason) => Some(Judgement::new(Verdict::Unclear, reason)),
        Failure::Interrupted => None,
    }
}

/// Judges what the ranks of an implementation that declares this answered to
/// `case`, asked with `inputs`.
pub fn judge(
    case: &Case,
    inputs: &Inputs,
    declared: Declared,
    due: Due,
    answers: &[RankAnswer],
) -> Judgement {
    let judgement = match statuses(answers) {
        Statuses::Unreadable(sentence) => Judgement::new(Verdict::Fail, sentence),
        Statuses::AllOk(ranks) => match due {
            Due::Refusal(Cause::BadInput(defect)) => {
                let sentence = format!("takes bad {} without a word", defect.name());
                Judgement::new(Verdict::Fail, sentence).named(Mistake::BadInputTaken)
            }
            _ => compare(case, inputs, declared, answers, &ranks)
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

/// Puts the ranks' tensors together and compares them with the oracle: the
/// answer of every rank where each gives a whole one. The first that is wrong
/// counts. An error is a judgement before there is anything to compare.
fn compare(
    case: &Case,
    inputs: &Inputs,
    declared: Declared,
    answers: &[RankAnswer],
    ranks: &[&Tensors],
) -> Result<Judgement, Judgement> {
    let unclear = |reason| Judgement::new(Verdict::Unclear, reason);
    let fail =
        |mistake| move |sentence: String| Judgement::new(Verdict::Fail, sentence).named(mistake);
    silent_outside_training(case, answers).map_err(fail(Mistake::SendsInEval))?;
    let mut wholes = assembly::whole_answers(case, ranks).map_err(fail(Mistake::WrongShape))?;
    for whole in &mut wholes {
        convention::reduce(case, declared, &mut whole.answer);
    }
    let dropout = recover_dropout(case, inputs, &wholes)?;
    let yardstick =
        Yardstick::of(case, inputs, declared.precision, dropout.as_deref()).map_err(unclear)?;
    let judged = |whole: &Whole| {
        let comparison = yardstick.compare(&whole.answer);
        let sentence = match (comparison.sentence(), whole.rank) {
            (sentence, Some(rank)) if !sentence.is_empty() => format!("rank {rank}: {sentence}"),
            (sentence, _) => sentence,
        };
        Judgement {
            verdict: comparison.verdict(),
            sentence,
            details: comparison.details(case),
            comparison: Some(comparison),
            diagnosis: None,
        }
    };
    let graver = |a: (Judgement, _), b: (Judgement, _)| match b.0.verdict > a.0.verdict {
        true => b,
        false => a,
    };
    let (mut judgement, gravest) = wholes
        .iter()
        .map(|whole| (judged(whole), whole))
        .reduce(graver)
        .ok_or_else(|| unclear("there is no rank".to_owned()))?;
    if judgement.verdict == Verdict::Fail {
        let measured = yardstick.measured(case, &gravest.answer).collect();
        let evidence = Evidence::new(case, inputs, dropout.as_deref(), measured);
        let diagnosis = diagnosis::diagnose(&evidence);
        judgement.diagnosis = diagnosis
            .map(|diagnosis| convention::name(declared, diagnosis))
            .map(Box::new);
    } else if let Some(lack) = power::lack(&yardstick) {
        // What is seen to be wrong is wrong, and what is right may be luck.
        judgement.verdict = Verdict::Unclear;
        judgement.sentence = format!("the case has no power: {lack}");
    }
    Ok(judgement)
}

/// Which weights are dropped in an answer; none where none are to be.
fn recover_dropout(
    case: &Case,
    inputs: &Inputs,
    wholes: &[Whole],
) -> Result<Option<Vec<f64>>, Judgement> {
    // Nothing is dropped outside training: where something is, one answer is.
    let (Some(hundredths), Some(whole)) = (case.extras.dropout, wholes.first()) else {
        return Ok(None);
    };
    let undropped = oracle::attention(case, inputs)
        .map_err(|error| Judgement::new(Verdict::Unclear, format!("the oracle failed: {error}")))?;
    let (probability, out) = (f64::from(hundredths) / 100.0, &whole.answer.out);
    let recovered = dropout::recover(case, probability, &undropped.out, out);
    recovered.map(Some).map_err(|mut judgement| {
        if judgement.verdict == Verdict::Fail && judgement.diagnosis.is_none() {
            judgement.diagnosis =
                diagnosis::of_kept_weights(case, inputs, probability, &undropped.out, out)
                    .map(Box::new);
        }
        judgement
    })
}

/// Outside training each rank computes by itself.
fn silent_outside_training(case: &Case, answers: &[RankAnswer]) -> Result<(), String> {
    let sent = answers.iter().enumerate().find_map(|(rank, answer)| {
        let bytes = answer.as_ref().ok()?.0.bytes_sent?;
        (case.extras.eval && bytes > 0).then_some((rank, bytes))
    });
    match sent {
        Some((rank, bytes)) => Err(format!("outside training rank {rank} sent {bytes} bytes")),
        None => Ok(()),
    }
}
