//! What a call says of single tokens, gathered from all ranks and put in global
//! order: positions, documents, padding.
//!
//! Where a call says nothing of the kind nothing is gathered. Otherwise it is
//! one gather more, of a word for each token and thing said: 8 B s bytes for
//! position ids alone.

use crate::{
    call::{Call, Documents},
    communicator::Communicator,
    error::{Result, refuse},
    options::Options,
    token_partition::TokenPartition,
};
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// The tokens of the whole sequence.
#[derive(Debug, Default)]
pub(crate) struct Sequence {
    /// [B, S], or [3, B, S].
    pub(crate) positions: Option<Tensor>,
    /// For each batch row the runs of tokens that attend among themselves.
    pub(crate) segments: Option<Vec<Vec<Range<usize>>>>,
}

/// Gathers what the ranks' calls say of their tokens. `batch` and the shapes
/// in `call` are what the ranks agreed on.
pub(crate) fn gather(
    communicator: &dyn Communicator,
    tokens: &TokenPartition,
    batch: usize,
    call: &Call<'_>,
    options: &Options,
) -> Result<Sequence> {
    let from_positions = matches!(call.documents, Some(Documents::FromPositions));
    let of_positions = call
        .position_ids
        .filter(|_| from_positions || options.rotary.is_some());
    let told: Vec<&Tensor> = of_positions
        .into_iter()
        .chain(call.attention_mask)
        .collect();
    let mut whole = gather_words(communicator, tokens, &told)?;
    let mask = call.attention_mask.and_then(|_| whole.pop());
    let positions = of_positions.and_then(|_| whole.pop());

    let documents = match (call.documents, &positions) {
        (None, _) => None,
        (Some(Documents::Ends(ends)), _) => Some(ends.iter().map(|ends| runs(ends)).collect()),
        (Some(Documents::FromPositions), Some(positions)) => {
            Some(rows(positions, batch).map(restarts).collect())
        }
        (Some(Documents::FromPositions), None) => None,
    };
    let real = mask
        .map(|mask| rows(&mask, batch).enumerate().map(real_tokens).collect())
        .transpose()?;
    let positions = of_positions
        .zip(positions)
        .map(|(own, words)| {
            let mut shape = own.size();
            if let Some(length) = shape.last_mut() {
                *length = tokens.total() as i64;
            }
            Tensor::f_from_slice(&words)?.f_view(shape.as_slice())
        })
        .transpose()?;
    Ok(Sequence {
        positions,
        segments: meet(documents, real),
    })
}

/// Every token's words in global order, [.., S] for each of `told`, [.., s].
/// All ranks tell the same things.
fn gather_words(
    communicator: &dyn Communicator,
    tokens: &TokenPartition,
    told: &[&Tensor],
) -> Result<Vec<Vec<i64>>> {
    if told.is_empty() {
        return Ok(Vec::new());
    }
    let rows_of = |tensor: &Tensor| tensor.size().iter().rev().skip(1).product::<i64>() as usize;
    // A gather takes as many words from every rank as from the longest.
    let room = (0..tokens.ranks()).map(|rank| tokens.tokens(rank)).max();
    let room = room.unwrap_or(0);
    let own = tokens.tokens(communicator.rank());
    let mut words = Vec::new();
    for tensor in told {
        let flat = tensor
            .f_to_device(Device::Cpu)?
            .f_to_kind(Kind::Int64)?
            .f_contiguous()?
            .f_view([-1])?;
        let flat = Vec::<i64>::try_from(&flat)?;
        for row in 0..rows_of(tensor) {
            words.extend_from_slice(&flat[row * own..(row + 1) * own]);
            words.resize(words.len() + room - own, 0);
        }
    }
    let gathered = communicator.all_gather(&words)?;
    let total = tokens.total();
    let mut first_row = 0;
    let whole = told.iter().map(|tensor| {
        let rows = rows_of(tensor);
        let mut whole = vec![0; rows * total];
        for (rank, words) in gathered.iter().enumerate() {
            for row in 0..rows {
                let held = &words[(first_row + row) * room..][..room];
                for (place, &word) in tokens.places(rank).zip(held) {
                    whole[row * total + place] = word;
                }
            }
        }
        first_row += rows;
        whole
    });
    Ok(whole.collect())
}

fn rows(words: &[i64], batch: usize) -> impl Iterator<Item = &[i64]> {
    words.chunks(words.len() / batch)
}

/// From cumulative lengths to runs; a document without a token is none.
fn runs(ends: &[usize]) -> Vec<Range<usize>> {
    let starts = std::iter::once(0).chain(ends.iter().copied());
    starts
        .zip(ends.iter().copied())
        .map(|(start, end)| start..end)
        .filter(|run| !run.is_empty())
        .collect()
}

/// A run for each stretch of positions that go up by one.
pub(crate) fn restarts(positions: &[i64]) -> Vec<Range<usize>> {
    let restarts = (1..positions.len()).filter(|&i| positions[i] != positions[i - 1] + 1);
    let ends: Vec<usize> = restarts.chain([positions.len()]).collect();
    runs(&ends)
}

/// The one run of tokens whose mask is not zero.
fn real_tokens((row, mask): (usize, &[i64])) -> Result<Range<usize>> {
    let is_real = |&word: &i64| word != 0;
    let first = mask.iter().position(is_real).unwrap_or(0);
    let past = mask
        .iter()
        .rposition(is_real)
        .map_or(first, |last| last + 1);
    match mask[first..past].iter().position(|word| !is_real(word)) {
        None => Ok(first..past),
        Some(hole) => refuse(
            "attention_mask",
            format!(
                "has padding at token {} of batch row {row}, between real tokens",
                first + hole
            ),
            "put padding before or after the real tokens",
        ),
    }
}

/// The documents, without padding.
fn meet(
    documents: Option<Vec<Vec<Range<usize>>>>,
    real: Option<Vec<Range<usize>>>,
) -> Option<Vec<Vec<Range<usize>>>> {
    match (documents, real) {
        (documents, None) => documents,
        (None, Some(real)) => Some(
            real.into_iter()
                .map(|run| {
                    Some(run)
                        .filter(|run| !run.is_empty())
                        .into_iter()
                        .collect()
                })
                .collect(),
        ),
        (Some(documents), Some(real)) => {
            let row = |(runs, real): (Vec<Range<usize>>, Range<usize>)| {
                runs.into_iter()
                    .map(|run| run.start.max(real.start)..run.end.min(real.end))
                    .filter(|run| !run.is_empty())
                    .collect()
            };
            Some(documents.into_iter().zip(real).map(row).collect())
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::single_range_in_vec_init)]
    use super::*;

    #[test]
    fn a_document_begins_where_positions_do_not_go_up_by_one() {
        assert_eq!(restarts(&[0, 1, 2]), [0..3]);
        // Of one token, twice, and one that begins anywhere.
        assert_eq!(restarts(&[0, 0, 0, 1, 7, 8]), [0..1, 1..2, 2..4, 4..6]);
        assert_eq!(restarts(&[3, 4, 4]), [0..2, 2..3]);
    }

    #[test]
    fn a_document_without_a_token_is_none() {
        assert_eq!(runs(&[2, 2, 5]), [0..2, 2..5]);
    }

    #[test]
    fn padding_is_cut_off_documents() {
        let documents = || Some(vec![vec![0..2, 2..5, 5..6]]);
        assert_eq!(
            meet(documents(), Some(vec![1..4])),
            Some(vec![vec![1..2, 2..4]])
        );
        assert_eq!(
            meet(documents(), Some(vec![2..6])),
            Some(vec![vec![2..5, 5..6]])
        );
        assert_eq!(
            meet(None, Some(vec![1..4, 0..0])),
            Some(vec![vec![1..4], vec![]])
        );
        assert_eq!(meet(None, None), None);
    }

    #[test]
    fn real_tokens_are_side_by_side() {
        assert_eq!(real_tokens((0, &[0, 1, 1, 0])).unwrap(), 1..3);
        assert_eq!(real_tokens((0, &[0, 0])).unwrap(), 0..0);
        assert!(real_tokens((0, &[1, 0, 1])).is_err());
    }
}
