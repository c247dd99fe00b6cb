//! Each rank's shard of whole rows of tokens, token by token.
//!
//! Of a row of S tokens that is filled up to F, token t < S of document d has its
//! id, the position t - start of d, and as its target the label of token t + 1,
//! where that is one of the row's and, unless targets reach across, one of d. A
//! token t >= S is of the row's last document, and has no target.

use std::collections::BTreeMap;

use fixtures::batch::{PAD_ID, Rows};
use fixtures::loss::IGNORE_INDEX;
use fixtures::{BatchCase, Documents};

use super::due::{DueAnswer, DueTensor};
use crate::diagnosis::Mistake;

/// The mistakes that are told by what they make of the answer.
pub(super) const MISTAKES: [Mistake; 16] = [
    Mistake::LabelsShiftedAfterCut,
    Mistake::LabelsShiftedTwice,
    Mistake::LabelsNotShifted,
    Mistake::PositionsOfShards,
    Mistake::PositionsRunOn,
    Mistake::TargetsAcrossDocuments,
    Mistake::FillIsTarget,
    Mistake::FillPositionsZero,
    Mistake::MaskNotCut,
    Mistake::ShardingIgnored,
    Mistake::RemainderTokensLost,
    Mistake::ShardOfFirstRank,
    Mistake::SameBatchServed,
    Mistake::OwnBatchesOnly,
    Mistake::LastBatchesDropped,
    Mistake::SecondEpochEmpty,
];

/// One row, filled up, token by token.
struct Row {
    ids: Vec<i64>,
    positions: Vec<i64>,
    targets: Vec<i64>,
    mask: Vec<i64>,
    documents: Vec<usize>,
    labels: Vec<i64>,
}

/// What is due; or what would come by a mistake.
pub(super) fn due(case: &BatchCase, mistake: Option<Mistake>) -> DueAnswer {
    let ranks = (0..case.world).map(|rank| match case.stream {
        None => shard(case, &case.rows(0, 0), rank, mistake)
            .into_iter()
            .map(|(name, tensor)| (name.to_owned(), tensor))
            .collect(),
        Some(_) => of_stream(case, rank, mistake),
    });
    DueAnswer {
        ranks: ranks.collect(),
        ..DueAnswer::default()
    }
}

/// What one rank has of all batches of all epochs.
fn of_stream(
    case: &BatchCase,
    rank: usize,
    mistake: Option<Mistake>,
) -> BTreeMap<String, DueTensor> {
    let counts = case.counts();
    let fewest = counts.iter().copied().min().unwrap_or(0);
    let epochs = case.stream.map_or(0, |stream| stream.epochs);
    let mut tensors = BTreeMap::new();
    let mut lengths = Vec::new();
    let mut number = 0;
    for epoch in 0..epochs {
        let mut served = case.served();
        match mistake {
            Some(Mistake::LastBatchesDropped) => served.retain(|&(_, round)| round < fewest),
            Some(Mistake::SecondEpochEmpty) if epoch > 0 => served.clear(),
            _ => {}
        }
        lengths.push(served.len() as i64);
        for (source, round) in served {
            let source = match mistake {
                Some(Mistake::SameBatchServed) => first_with(&counts, round),
                Some(Mistake::OwnBatchesOnly) => rank,
                _ => source,
            };
            let rows = case.rows(source, round);
            for (name, tensor) in shard(case, &rows, rank, mistake) {
                tensors.insert(format!("{name}.{number}"), tensor);
            }
            number += 1;
        }
    }
    let served = DueTensor::exactly(&[lengths.len()], &lengths);
    tensors.insert("served".to_owned(), served);
    tensors
}

/// The first rank that still has a batch in this round.
fn first_with(counts: &[usize], round: usize) -> usize {
    counts
        .iter()
        .position(|&count| round < count)
        .unwrap_or_default()
}

/// One rank's shard of a batch.
fn shard(
    case: &BatchCase,
    batch: &Rows,
    rank: usize,
    mistake: Option<Mistake>,
) -> Vec<(&'static str, DueTensor)> {
    let filled = case.filled(batch.tokens);
    let tokens = tokens_of(case, filled, rank, mistake);
    let rows: Vec<Row> = (0..case.batch)
        .map(|row| filled_row(case, batch, row, filled, mistake))
        .collect();
    let shape = [case.batch, tokens.len()];
    let cut = |values: fn(&Row) -> &Vec<i64>| {
        let of_row = |row| tokens.iter().map(move |&t| values(row)[t]);
        let numbers: Vec<i64> = rows.iter().flat_map(of_row).collect();
        DueTensor::exactly(&shape, &numbers)
    };
    let positions = match mistake {
        Some(Mistake::PositionsOfShards) => {
            let local = (0..case.batch).flat_map(|_| 0..tokens.len() as i64);
            DueTensor::exactly(&shape, &local.collect::<Vec<_>>())
        }
        _ => cut(|row| &row.positions),
    };
    let targets = match mistake {
        Some(Mistake::LabelsShiftedAfterCut) => {
            let numbers: Vec<i64> = rows
                .iter()
                .flat_map(|row| shifted_after_cut(case, row, &tokens))
                .collect();
            DueTensor::exactly(&shape, &numbers)
        }
        _ => cut(|row| &row.targets),
    };
    let mut tensors = vec![
        ("input_ids", cut(|row| &row.ids)),
        ("position_ids", positions),
        ("shift_labels", targets),
    ];
    if case.has_mask {
        let mask = match mistake {
            Some(Mistake::MaskNotCut) => {
                let whole: Vec<i64> = rows.iter().flat_map(|row| row.mask.clone()).collect();
                DueTensor::exactly(&[case.batch, filled], &whole)
            }
            _ => cut(|row| &row.mask),
        };
        tensors.push(("attention_mask", mask));
    }
    tensors
}

/// Where the tokens of a rank stand in the row.
fn tokens_of(case: &BatchCase, filled: usize, rank: usize, mistake: Option<Mistake>) -> Vec<usize> {
    let world = case.world;
    let run = |length: usize, start: usize| (start..start + length).collect();
    match mistake {
        Some(Mistake::ShardingIgnored) => {
            let (each, more) = (filled / world, filled % world);
            run(
                each + usize::from(rank < more),
                rank * each + rank.min(more),
            )
        }
        Some(Mistake::RemainderTokensLost) => run(filled / world, rank * (filled / world)),
        Some(Mistake::ShardOfFirstRank) => case.shards(filled)[0].tokens().to_vec(),
        _ => case.shards(filled)[rank].tokens().to_vec(),
    }
}

/// The label of the next token of the shard, if it is of the same document.
fn shifted_after_cut(case: &BatchCase, row: &Row, tokens: &[usize]) -> Vec<i64> {
    let targets = tokens.iter().enumerate().map(|(place, &token)| {
        let next = tokens.get(place + 1);
        let next = next.filter(|&&next| case.is_across || is_one(row, token, next));
        next.map_or(IGNORE_INDEX, |&next| row.labels[next])
    });
    targets.collect()
}

fn is_one(row: &Row, token: usize, next: usize) -> bool {
    row.documents[token] == row.documents[next]
}

fn filled_row(
    case: &BatchCase,
    batch: &Rows,
    number: usize,
    filled: usize,
    mistake: Option<Mistake>,
) -> Row {
    let (length, ends) = (batch.tokens, &batch.ends[number]);
    let and_filled = |values: &[i64], with: i64| {
        let mut values = values[number * length..(number + 1) * length].to_vec();
        values.resize(filled, with);
        values
    };
    let document = |token: usize| {
        ends.iter()
            .filter(|&&end| end <= token.min(length - 1))
            .count()
    };
    let start = |document: usize| match document {
        0 => 0,
        document => ends[document - 1],
    };
    let documents: Vec<usize> = (0..filled).map(document).collect();
    let is_running_on = mistake == Some(Mistake::PositionsRunOn)
        && matches!(case.documents, Some(Documents::ByEnds(_)));
    let position = |token: usize| {
        if is_running_on {
            token as i64
        } else if token >= length && mistake == Some(Mistake::FillPositionsZero) {
            0
        } else {
            (token - start(documents[token])) as i64
        }
    };
    let labels = and_filled(&batch.labels, IGNORE_INDEX);
    let is_across = case.is_across || mistake == Some(Mistake::TargetsAcrossDocuments);
    let has_target = |token: usize| {
        token + 1 < length && (is_across || documents[token] == documents[token + 1])
    };
    let target = |token: usize| match mistake {
        Some(Mistake::LabelsNotShifted) => labels[token],
        Some(Mistake::LabelsShiftedTwice) => match has_target(token) && has_target(token + 1) {
            true => labels[token + 2],
            false => IGNORE_INDEX,
        },
        Some(Mistake::FillIsTarget) if token >= length => PAD_ID,
        _ => match has_target(token) {
            true => labels[token + 1],
            false => IGNORE_INDEX,
        },
    };
    Row {
        ids: and_filled(&batch.ids, PAD_ID),
        positions: (0..filled).map(position).collect(),
        targets: (0..filled).map(target).collect(),
        mask: and_filled(&batch.mask, 0),
        labels,
        documents,
    }
}
