//! What ranks say of single tokens, gathered and put in global order.

use std::ops::Range;

use tch::{Kind, Tensor};
use ulysses::{Communicator, TokenPartition};

use super::rank::Staged;

/// Runs of tokens, for each row of the batch.
pub(super) type Runs = Vec<Vec<Range<usize>>>;

/// The integers of every rank's tokens, [.., s], in global order, [.., S].
pub(super) fn gathered(
    communicator: &dyn Communicator,
    tokens: &TokenPartition,
    own: &Tensor,
) -> Staged<Tensor> {
    let mut shape = own.size();
    let rows = shape.iter().rev().skip(1).product::<i64>() as usize;
    // A gather takes as many words from every rank as from the longest.
    let room = (0..tokens.ranks()).map(|rank| tokens.tokens(rank)).max();
    let room = room.unwrap_or(0);
    let padding = [0, room as i64 - shape.last().copied().unwrap_or(0)];
    let words = own.f_to_kind(Kind::Int64)?.f_constant_pad_nd(padding)?;
    let words = Vec::<i64>::try_from(&words.f_contiguous()?.f_view([-1])?)?;
    let total = tokens.total();
    let mut whole = vec![0; rows * total];
    for (rank, words) in communicator.all_gather(&words)?.iter().enumerate() {
        for row in 0..rows {
            for (place, &word) in tokens.places(rank).zip(&words[row * room..]) {
                whole[row * total + place] = word;
            }
        }
    }
    if let Some(length) = shape.last_mut() {
        *length = total as i64;
    }
    Ok(Tensor::f_from_slice(&whole)?.f_view(shape.as_slice())?)
}

/// The documents of each row, from cumulative ends.
pub(super) fn from_ends(ends: &[Vec<usize>]) -> Runs {
    let row = |ends: &Vec<usize>| {
        let starts = std::iter::once(0).chain(ends.iter().copied());
        starts
            .zip(ends.iter().copied())
            .map(|(start, end)| start..end)
            .filter(|run| !run.is_empty())
            .collect()
    };
    ends.iter().map(row).collect()
}

/// The documents of each row: one for each stretch of positions that go up by
/// one.
pub(super) fn from_positions(positions: &Tensor) -> Staged<Runs> {
    let rows = Vec::<Vec<i64>>::try_from(positions)?;
    let ends = |row: &Vec<i64>| {
        let restarts = (1..row.len()).filter(|&i| row[i] != row[i - 1] + 1);
        restarts.chain([row.len()]).collect()
    };
    let ends: Vec<Vec<usize>> = rows.iter().map(ends).collect();
    Ok(from_ends(&ends))
}

/// The real tokens of each row of a mask, which are side by side.
pub(super) fn from_mask(mask: &Tensor) -> Staged<Runs> {
    let rows = Vec::<Vec<i64>>::try_from(mask)?;
    let row = |row: &Vec<i64>| {
        let first = row.iter().position(|&word| word != 0).unwrap_or(0);
        let past = row
            .iter()
            .rposition(|&word| word != 0)
            .map_or(0, |last| last + 1);
        let real = first..past;
        Some(real)
            .filter(|run| !run.is_empty())
            .into_iter()
            .collect()
    };
    Ok(rows.iter().map(row).collect())
}

/// What is in a run of both.
pub(super) fn meet(some: &Runs, others: &Runs) -> Runs {
    let row = |(runs, others): (&Vec<Range<usize>>, &Vec<Range<usize>>)| {
        let pairs = runs
            .iter()
            .flat_map(|run| others.iter().map(move |other| (run, other)));
        pairs
            .map(|(run, other)| run.start.max(other.start)..run.end.min(other.end))
            .filter(|run| !run.is_empty())
            .collect()
    };
    some.iter().zip(others).map(row).collect()
}
