//! The judge of attention: the ranks' answers put together, and held against
//! dense attention number by number.

use fixtures::exchange::{Declared, Tensors};
use fixtures::{AttentionCase, Inputs};

use super::assembly::{self, Whole};
use super::comparison::Yardstick;
use super::{Judgement, Verdict, convention, dropout, power};
use crate::diagnosis::{self, Evidence, Mistake};
use crate::implementation::{Means, RankAnswer};
use crate::oracle;

/// Puts the ranks' tensors together and compares them with the oracle: the
/// answer of every rank where each gives a whole one. The first that is wrong
/// counts. An error is a judgement before there is anything to compare.
pub(super) fn compare(
    case: &AttentionCase,
    inputs: &Inputs,
    (declared, means): (Declared, Means),
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
    let yardstick = Yardstick::of(
        case,
        inputs,
        (declared.precision, means),
        dropout.as_deref(),
    )
    .map_err(unclear)?;
    let judged = |whole: &Whole| {
        let comparison = yardstick.compare(&whole.answer);
        let sentence = match (comparison.sentence(), whole.rank) {
            (sentence, Some(rank)) if !sentence.is_empty() => format!("rank {rank}: {sentence}"),
            (sentence, _) => sentence,
        };
        Judgement {
            verdict: comparison.verdict(),
            sentence,
            details: comparison.details(Some(case)),
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
pub(super) fn recover_dropout(
    case: &AttentionCase,
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
fn silent_outside_training(case: &AttentionCase, answers: &[RankAnswer]) -> Result<(), String> {
    let sent = answers.iter().enumerate().find_map(|(rank, answer)| {
        let bytes = answer.as_ref().ok()?.0.bytes_sent?;
        (case.extras.eval && bytes > 0).then_some((rank, bytes))
    });
    match sent {
        Some((rank, bytes)) => Err(format!("outside training rank {rank} sent {bytes} bytes")),
        None => Ok(()),
    }
}
