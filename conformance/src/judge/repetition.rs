//! The same question has the same answer each time, to the last bit.

use fixtures::Case;

use super::padding::PaddingTokens;
use super::{Judgement, Verdict};
use crate::implementation::RankAnswer;
use crate::oracle::AnswerTensor;

/// The failure, if what the ranks answered to `case` the first time and the
/// last, both rightly, is not bit-equal on every rank.
pub fn repeated(case: &Case, first: &[RankAnswer], last: &[RankAnswer]) -> Option<Judgement> {
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
        Judgement::new(Verdict::Fail, "not the same result each time").with_details(details)
    })
}
