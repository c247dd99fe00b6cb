//! Faked answers: the oracle's own, cut into the ranks' parts.
// Not every test uses all of it.
#![allow(dead_code)]

use fixtures::exchange::{AnswerInfo, AnswerStatus, CaseInfo, Declared, Tensors};
use fixtures::{Array, AttentionCase, Case, Inputs, sharding};
use ulysses_conformance::implementation::RankAnswer;
use ulysses_conformance::judge::{Due, Judgement, Question, judge};
use ulysses_conformance::oracle::{self, Answer, AnswerTensor};

/// The oracle's own answer, before it is rounded, for a test to spoil.
pub(crate) fn right(case: &AttentionCase) -> Answer<Vec<f64>> {
    oracle::attention(case, &Inputs::of(case)).unwrap()
}

/// The case of which every rank is asked.
pub(crate) fn attention(posed: &[(CaseInfo, Tensors)]) -> AttentionCase {
    posed[0].0.name.parse().unwrap()
}

/// What each rank gives, rounded. Of what is summed over ranks, the first and
/// the last rank give a half each, without rounding more.
pub(crate) fn shards(case: &AttentionCase, answer: &Answer<Vec<f64>>) -> Vec<Tensors> {
    let mut shards = vec![Tensors::new(); case.world];
    for (name, values) in answer.iter() {
        let whole = Array::from_f64(case.dtype, &name.shape(case), values);
        let parts = if case.extras.eval {
            vec![whole; case.world]
        } else if is_summed(case, name) {
            halves(&whole, case.world)
        } else {
            sharding::cut(&whole, &case.shards())
        };
        for (part, tensors) in parts.into_iter().zip(&mut shards) {
            tensors.insert(name.name().to_owned(), part);
        }
    }
    shards
}

fn is_summed(case: &AttentionCase, name: AnswerTensor) -> bool {
    let is_of_kv = [AnswerTensor::KeyGradient, AnswerTensor::ValueGradient].contains(&name);
    name.is_head_state() || (is_of_kv && case.extras.cross.is_some())
}

fn halves(whole: &Array, world: usize) -> Vec<Array> {
    let times = |factor: f64| {
        let values: Vec<f64> = whole.to_f64().iter().map(|x| x * factor).collect();
        Array::from_f64(whole.dtype, &whole.shape, &values)
    };
    let mut parts = vec![times(0.0); world];
    parts[0] = times(if world == 1 { 1.0 } else { 0.5 });
    parts[world - 1] = parts[0].clone();
    parts
}

pub(crate) fn info(status: AnswerStatus, message: &str) -> AnswerInfo {
    AnswerInfo {
        status,
        message: message.to_owned(),
        elapsed_s: 0.0,
        peak_memory_bytes: None,
        bytes_sent: None,
    }
}

pub(crate) fn ok(shards: Vec<Tensors>) -> Vec<RankAnswer> {
    let answer = |tensors| Ok((info(AnswerStatus::Ok, ""), tensors));
    shards.into_iter().map(answer).collect()
}

pub(crate) fn said(status: AnswerStatus, message: &str) -> RankAnswer {
    Ok((info(status, message), Tensors::new()))
}

pub(crate) fn judged(case: &AttentionCase, due: Due, answers: Vec<RankAnswer>) -> Judgement {
    let declared = Declared::default();
    let question = Question::of(&Case::from(case.clone()), declared);
    judge(&question, declared, due, &answers)
}

/// Judges the right answer, spoiled.
pub(crate) fn spoiled(case: &AttentionCase, spoil: impl Fn(&mut Answer<Vec<f64>>)) -> Judgement {
    let mut answer = right(case);
    spoil(&mut answer);
    judged(case, Due::Answer, ok(shards(case, &answer)))
}
