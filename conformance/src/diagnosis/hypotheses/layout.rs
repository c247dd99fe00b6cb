//! Mistakes about where tokens lie: in shards, in the batch, in memory.

use fixtures::{Documents, Sharding, Strides, Structure};
use tch::{TchError, Tensor};

use super::masked::visible;
use super::moved::{Moves, both, is_split, reordered};
use super::permutation::Permutation;
use super::{Hypothesis, Reach};
use crate::diagnosis::evidence::{Evidence, Sizes};
use crate::diagnosis::mistake::Mistake;
use crate::diagnosis::prediction::Prediction;
use crate::oracle::{AnswerTensor, Problem};

pub(super) const HYPOTHESES: &[Hypothesis] = &[
    Hypothesis {
        mistake: Some(Mistake::ShardingIgnored),
        reach: Reach::Forward,
        applies: |case| is_split(case) && case.extras.sharding != Sharding::Contiguous,
        predict: sharding_ignored,
    },
    Hypothesis {
        mistake: Some(Mistake::BatchMixedIntoSequence),
        reach: Reach::Forward,
        applies: |case| is_split(case) && case.batch > 1 && case.extras.cross.is_none(),
        predict: batch_mixed_into_sequence,
    },
    Hypothesis {
        mistake: Some(Mistake::StridesIgnored),
        reach: Reach::Forward,
        applies: |case| case.extras.strides != Strides::Contiguous,
        predict: strides_ignored,
    },
];

fn sharding_ignored(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let order: Vec<usize> = evidence
        .shards
        .iter()
        .flat_map(|shard| shard.tokens().iter().copied())
        .collect();
    let sentence = format!(
        "The {} shards are taken for contiguous runs of tokens.",
        evidence.case.extras.sharding.name()
    );
    reordered(evidence, &order, &sentence)
}

/// The problem, and the same where positions travel with the tokens, and with
/// them what they say of documents.
pub(super) fn with_positions(
    evidence: &Evidence<'_>,
    order: &[usize],
) -> Result<Vec<Problem>, TchError> {
    let case = evidence.case;
    let problem = evidence.problem()?;
    let mut problems = vec![problem.shallow_clone()];
    if let Some(Documents::ByPosition(_)) = case.extras.documents {
        let mut joined = case.clone();
        joined.extras.documents = None;
        let (structure, without) = (Structure::of(case), Structure::of(&joined));
        let start = |batch: usize, token: usize| structure.document(batch, token).start;
        // A document goes on where a position does.
        let documents: Vec<Vec<usize>> = (0..case.batch)
            .map(|batch| {
                let position = |at: usize| order[at] - start(batch, order[at]);
                let mut numbers = vec![0; order.len()];
                for at in 1..order.len() {
                    let goes_on = position(at) == position(at - 1) + 1;
                    numbers[at] = numbers[at - 1] + usize::from(!goes_on);
                }
                numbers
            })
            .collect();
        let sees = |(batch, head): (usize, usize), query: usize, key: usize| {
            documents[batch][query] == documents[batch][key]
                && without.sees(batch, head, query, key)
        };
        let mut travelling = problem.shallow_clone();
        travelling.visible = Some(visible(case, sees)?);
        problems.push(travelling);
    }
    if let (Some(of_queries), Some(of_keys)) = (&problem.query_angles, &problem.key_angles) {
        let order: Vec<i64> = order.iter().map(|&token| token as i64).collect();
        let order = Tensor::f_from_slice(&order)?;
        let mut travelling = problem.shallow_clone();
        travelling.query_angles = Some(of_queries.f_index_select(2, &order)?);
        travelling.key_angles = Some(of_keys.f_index_select(2, &order)?);
        problems.push(travelling);
    }
    Ok(problems)
}

/// A batch, token and head.
type Place = (usize, usize, usize);

fn batch_mixed_into_sequence(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let (batch, tokens, ranks) = (
        evidence.case.batch,
        evidence.case.sequence,
        evidence.ranks(),
    );
    // Blocks of unequal sizes are no permutation.
    let each = tokens.div_ceil(ranks);
    // What is [P, B, s] is read as [B, P, s], or what is [s, B] as [B, s].
    let of_blocks = |(b, t, h): Place| {
        let place = b * tokens + t;
        let (rank, rest) = (place / (batch * each), place % (batch * each));
        (rest / each, rank * each + rest % each, h)
    };
    let of_tokens = |(b, t, h): Place| {
        let place = b * tokens + t;
        (place % batch, place / batch, h)
    };
    let back_of_blocks = |(b, t, h): Place| {
        let place = (t / each * batch + b) * each + t % each;
        (place / tokens, place % tokens, h)
    };
    // The same of each rank's own tokens.
    let places = evidence.place_of_token();
    let of_own_tokens = |(b, t, h): Place| {
        let (rank, at) = places[t];
        let shard = &evidence.shards[rank];
        let place = b * shard.len() + at;
        (place % batch, shard.tokens()[place / batch], h)
    };
    let maps: [&dyn Fn(Place) -> Place; 4] =
        [&of_blocks, &of_own_tokens, &of_tokens, &back_of_blocks];
    let sentence =
        format!("Tokens of the {batch} sequences of the batch are mixed with one another.");
    let mut predictions = Vec::new();
    for map in maps {
        let Some((q, kv)) = both(evidence, |sizes| Permutation::of(sizes, map)) else {
            continue;
        };
        let out = Permutation::of(Sizes::of(evidence.case, AnswerTensor::Out), map);
        let of_all = |out| Moves {
            q: Some(q.clone()),
            k: Some(kv.clone()),
            v: Some(kv.clone()),
            out,
        };
        let only_out = Moves {
            out: out.clone(),
            ..Moves::default()
        };
        for moves in [
            of_all(Some(q.inverse())),
            only_out,
            of_all(None),
            of_all(out),
        ] {
            predictions.push(moves.predict(evidence, evidence.problem()?, &sentence)?);
        }
    }
    Ok(predictions)
}

fn strides_ignored(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let case = evidence.case;
    match case.extras.strides {
        Strides::Packed => return packed_memory(evidence).map(|one| vec![one]),
        Strides::Transposed => {}
        Strides::Contiguous | Strides::Expanded => return Ok(Vec::new()),
    }
    let Some((q, kv)) = both(evidence, |sizes| transposed_memory(evidence, sizes)) else {
        return Ok(Vec::new());
    };
    let sentence = "Q, K and V, which lie in memory as [batch, heads, tokens], are read as [batch, tokens, heads].";
    let of = |q: &Option<Permutation>, kv: &Option<Permutation>| Moves {
        q: q.clone(),
        k: kv.clone(),
        v: kv.clone(),
        out: None,
    };
    let (q, kv) = (Some(q), Some(kv));
    let mut predictions = Vec::new();
    for moves in [of(&q, &kv), of(&q, &None), of(&None, &kv)] {
        let linear = moves.predict(evidence, evidence.problem()?, sentence)?;
        predictions.push(linear);
    }
    Ok(predictions)
}

/// Each rank's tokens as they are found where heads lie before tokens.
pub(super) fn transposed_memory(evidence: &Evidence<'_>, sizes: Sizes) -> Option<Permutation> {
    let places = evidence.place_of_token();
    Permutation::of(sizes, |(batch, token, head)| {
        let (rank, at) = places[token];
        let shard = &evidence.shards[rank];
        let place = at * sizes.heads + head;
        let from = shard.tokens()[place % shard.len()];
        (batch, from, place / shard.len())
    })
}

/// Q, K and V, which lie in memory as `[batch, tokens, 3, heads]`, each read from
/// its first row on as if it lay alone.
fn packed_memory(evidence: &Evidence<'_>) -> Result<Prediction, TchError> {
    let sizes = Sizes::of(evidence.case, AnswerTensor::QueryGradient);
    let (places, shards) = (evidence.place_of_token(), &evidence.shards);
    // Which of the three is found where `which` is looked for, and its row.
    let found = |which: usize, row: usize| {
        let (batch, token, head) = sizes.place(row);
        let (rank, at) = places[token];
        let held = shards[rank].len();
        let memory = (batch * held + at + which) * sizes.heads + head;
        let (token, of) = (memory / sizes.heads / 3, memory / sizes.heads % 3);
        let from = (
            token / held,
            shards[rank].tokens()[token % held],
            memory % sizes.heads,
        );
        (of, sizes.row(from))
    };
    let rows: Vec<Vec<(usize, usize)>> = (0..3)
        .map(|which| (0..sizes.rows()).map(|row| found(which, row)).collect())
        .collect();
    let mut problem = evidence.problem()?;
    let flat = |tensor: &Tensor| {
        tensor
            .f_transpose(1, 2)?
            .f_reshape([-1, sizes.channels as i64])
    };
    let all = Tensor::f_cat(
        &[flat(&problem.q)?, flat(&problem.k)?, flat(&problem.v)?],
        0,
    )?;
    let read = |which: usize| -> Result<Tensor, TchError> {
        let rows = rows[which].iter();
        let index: Vec<i64> = rows
            .map(|(of, row)| (of * sizes.rows() + row) as i64)
            .collect();
        all.f_index_select(0, &Tensor::f_from_slice(&index)?)?
            .f_view(problem.q.f_transpose(1, 2)?.size().as_slice())?
            .f_transpose(1, 2)
    };
    let [q, k, v] = [read(0)?, read(1)?, read(2)?];
    (problem.q, problem.k, problem.v) = (q, k, v);
    let sentence = "Q, K and V, which lie interleaved in memory, are read as if each lay alone.";
    let mut prediction = evidence.solved(sentence, &problem)?;
    let of_inputs = [
        AnswerTensor::QueryGradient,
        AnswerTensor::KeyGradient,
        AnswerTensor::ValueGradient,
    ];
    for (which, name) in of_inputs.into_iter().enumerate() {
        let Some(gradient) = prediction.get(name).cloned() else {
            return Ok(prediction);
        };
        // What belongs to another of the three does not reach it.
        let mut moved = vec![0.0; gradient.len()];
        for (part, &(of, row)) in gradient.chunks(sizes.channels).zip(&rows[which]) {
            if of == which {
                let row = row * sizes.channels..(row + 1) * sizes.channels;
                moved[row].copy_from_slice(part);
            }
        }
        prediction.set(name, moved);
    }
    Ok(prediction)
}
