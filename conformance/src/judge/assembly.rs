//! From the ranks' tensors to the answer over the whole sequence.

use fixtures::exchange::{Tensors, tensor};
use fixtures::{Array, AttentionCase, Shard, sharding};

use crate::oracle::{Answer, AnswerTensor};

/// An answer over the whole sequence, and the rank whose it is where each rank
/// gives a whole one.
pub(super) struct Whole {
    pub(super) rank: Option<usize>,
    pub(super) answer: Answer<Vec<f64>>,
}

/// The answers over the whole sequence, if every rank gave every tensor in the
/// shape and element type that is due: outside training one of each rank, else
/// one of all.
///
/// # Errors
///
/// Which rank's tensor is missing, or is not what is due.
pub(super) fn whole_answers(
    case: &AttentionCase,
    ranks: &[&Tensors],
) -> Result<Vec<Whole>, String> {
    let shards = case.shards();
    let parts = ranks
        .iter()
        .zip(&shards)
        .enumerate()
        .map(|(rank, (tensors, shard))| {
            Answer::try_of(case, |name| part(case, rank, shard, name, tensors))
        })
        .collect::<Result<Vec<Answer<&Array>>, String>>()?;
    if case.extras.eval {
        let whole = |(rank, answer): (usize, Answer<&Array>)| {
            let answer = answer.try_map(|_, array| Ok::<_, String>(array.to_f64()))?;
            Ok(Whole {
                rank: Some(rank),
                answer,
            })
        };
        return parts.into_iter().enumerate().map(whole).collect();
    }
    let answer = Answer::try_of(case, |name| {
        let parts: Vec<&Array> = parts
            .iter()
            .filter_map(|part| part.get(name).copied())
            .collect();
        Ok::<_, String>(match is_whole_on_each_rank(case, name) {
            true => sum(&parts),
            false => {
                let parts: Vec<Array> = parts.into_iter().cloned().collect();
                sharding::join(&parts, &shards).to_f64()
            }
        })
    })?;
    Ok(vec![Whole { rank: None, answer }])
}

/// Whether every rank gives a part of each element, and not some tokens whole.
fn is_whole_on_each_rank(case: &AttentionCase, name: AnswerTensor) -> bool {
    let of_kv = matches!(
        name,
        AnswerTensor::KeyGradient | AnswerTensor::ValueGradient
    );
    name.is_head_state() || (of_kv && case.extras.cross.is_some())
}

/// One tensor of one rank, if it is what is due.
fn part<'a>(
    case: &AttentionCase,
    rank: usize,
    shard: &Shard,
    name: AnswerTensor,
    tensors: &'a Tensors,
) -> Result<&'a Array, String> {
    let array = tensor(tensors, name.name()).map_err(|e| format!("rank {rank}: {e}"))?;
    let mut due = name.shape(case);
    if !is_whole_on_each_rank(case, name) {
        due[1] = shard.len();
    }
    if array.shape != due || array.dtype != case.dtype {
        let axes = match (name, due.len()) {
            (_, 1) => "[heads]",
            (_, 2) => "[heads, head size]",
            (AnswerTensor::Out | AnswerTensor::ValueGradient, _)
                if case.extras.value_size.is_some() =>
            {
                "[batch, tokens, heads, value size]"
            }
            _ => "[batch, tokens, heads, head size]",
        };
        return Err(format!(
            "rank {rank}: `{}` is {} {:?}, due is {} {due:?} {axes}",
            name.name(),
            array.dtype,
            array.shape,
            case.dtype
        ));
    }
    Ok(array)
}

fn sum(parts: &[&Array]) -> Vec<f64> {
    let elements = parts.first().map_or(0, |part| part.to_f64().len());
    parts.iter().fold(vec![0.0; elements], |mut sum, part| {
        let part = part.to_f64();
        sum.iter_mut()
            .zip(part)
            .for_each(|(sum, part)| *sum += part);
        sum
    })
}
