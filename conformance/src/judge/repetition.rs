//! The same question has the same answer each time, to the last bit.

use fixtures::{AttentionCase, State};

use super::padding::PaddingTokens;
use super::{Judgement, Verdict};
use crate::diagnosis::{Diagnosis, Mistake};
use crate::implementation::RankAnswer;
use crate::oracle::AnswerTensor;

/// The failure, if what the ranks answered to `case` the first time and the
/// last, both rightly, is not bit-equal on every rank.
pub fn repeated(
    case: &AttentionCase,
    first: &[RankAnswer],
    last: &[RankAnswer],
) -> Option<Judgement> {
    let padding = PaddingTokens::of(case);
    let shards = case.shards();
    let ranks = first.iter().zip(last).zip(&shards).enumerate();
    let details: Vec<String> = ranks
        .flat_map(|(rank, ((first, last), shard))| {
            let bits = |answer: &RankAnswer, name: AnswerTensor| {
                let (_, tensors) = answer.as_ref().ok()?;
                let elements = tensors.get(name.name())?.to_f64();
                let elements = padding.blanked_shard(name, shard.tokens(), elements);
                Some(elements.into_iter().map(f64::to_bits).collect::<Vec<_>>())
            };
            AnswerTensor::ALL
                .into_iter()
                .filter(move |&name| bits(first, name) != bits(last, name))
                .map(move |name| {
                    let name = name.name();
                    format!("rank {rank}: `{name}` has other bits the last time than the first")
                })
                .collect::<Vec<_>>()
        })
        .collect();
    (!details.is_empty()).then(|| {
        Judgement::new(Verdict::Fail, "not the same result each time")
            .with_details(details)
            .named(Mistake::StateKept)
    })
}

/// Names a mistake of state: `judgement` is that of the question of this number
/// of a case of state, and those before it were answered rightly.
pub(crate) fn of_state(state: State, number: usize, mut judgement: Judgement) -> Judgement {
    let is_asked_anew = state == State::Again || number == 3;
    let named = judgement.diagnosis.as_ref().and_then(|d| d.mistake);
    let is_of_eval = matches!(
        named,
        Some(Mistake::SendsInEval | Mistake::MaskDroppedInEval)
    );
    if number == 1 || judgement.verdict != Verdict::Fail || is_of_eval && !is_asked_anew {
        return judgement;
    }
    let mistake = match state {
        State::OtherLength => Mistake::StaleLength,
        _ => Mistake::StateKept,
    };
    let seen = judgement.diagnosis.take();
    judgement.diagnosis = Some(Box::new(Diagnosis {
        mistake: Some(mistake),
        others: Vec::new(),
        confidence: if is_asked_anew { 1.0 } else { 0.8 },
        sentence: match &seen {
            Some(seen) => format!("{} It is now so: {}", mistake.sentence(), seen.sentence),
            None => mistake.sentence().to_owned(),
        },
        strip: seen.map_or_else(Vec::new, |seen| seen.strip),
    }));
    judgement
}
