//! Positions of tokens in their documents, and where documents end.

use super::{Batch, refuse_entry};
use crate::{
    error::{Result, refuse},
    sequence,
};
use std::iter;
use tch::Tensor;

/// For each row the cumulative lengths of its documents.
pub fn document_ends(lengths: &[Vec<usize>]) -> Vec<Vec<usize>> {
    let cumulative = |lengths: &Vec<usize>| {
        let sum = |end: &mut usize, length: &usize| {
            *end += length;
            Some(*end)
        };
        lengths.iter().scan(0, sum).collect()
    };
    lengths.iter().map(cumulative).collect()
}

/// [B, S], int64: for each row, given the ends of its documents, the positions
/// of their tokens, each document's from 0.
///
/// # Errors
/// Refused when a row's ends go down, or not all rows end alike.
pub fn position_ids(ends: &[Vec<usize>]) -> Result<Tensor> {
    let tokens = ends.first().and_then(|ends| ends.last()).copied();
    let tokens = tokens.unwrap_or(0);
    check_ends(ends, ends.len(), tokens)?;
    let row = |ends: &Vec<usize>| -> Vec<i64> {
        let starts = iter::once(0).chain(ends.iter().copied());
        let runs = starts.zip(ends.iter().copied());
        runs.flat_map(|(start, end)| 0..(end - start) as i64)
            .collect()
    };
    let flat: Vec<i64> = ends.iter().flat_map(row).collect();
    Ok(Tensor::f_from_slice(&flat)?.f_view([ends.len() as i64, tokens as i64])?)
}

impl Batch {
    /// With `position_ids` [B, S] that count the tokens of each document from
    /// 0, a row of which nothing is said being one document.
    ///
    /// # Errors
    /// Refused when there are position ids already, and as
    /// [`extent`](Batch::extent) is.
    pub fn with_position_ids(self) -> Result<Self> {
        let (sequences, tokens) = self.extent()?;
        if self.get("position_ids").is_some() {
            return refuse(
                "position_ids",
                "are there already",
                "keep these, or leave them away",
            );
        }
        let ids = match &self.document_ends {
            Some(ends) => position_ids(ends)?,
            None => position_ids(&vec![vec![tokens]; sequences])?,
        };
        Ok(self.with("position_ids", ids))
    }

    /// Where documents end: as was said, or else wherever a position is not
    /// that of the token before plus one, as
    /// [`Documents::FromPositions`](crate::Documents::FromPositions) has it.
    /// Positions of three components say nothing of documents.
    pub(super) fn ends_or_restarts(&self) -> Result<Option<Vec<Vec<usize>>>> {
        if let Some(ends) = &self.document_ends {
            return Ok(Some(ends.clone()));
        }
        let Some(entry) = self.entries.get("position_ids") else {
            return Ok(None);
        };
        if entry.tokens != Some(1) {
            return Ok(None);
        }
        let rows: Vec<Vec<i64>> = Vec::try_from(&entry.tensor)?;
        let ends = |row: &Vec<i64>| {
            let runs = sequence::restarts(row);
            runs.into_iter().map(|run| run.end).collect()
        };
        Ok(Some(rows.iter().map(ends).collect()))
    }
}

/// Refuses ends that are not those of so many rows of so many tokens.
pub(super) fn check_ends(ends: &[Vec<usize>], sequences: usize, tokens: usize) -> Result<()> {
    let name = "document_ends";
    if ends.len() != sequences {
        let problem = format!("are for {} rows of {sequences}", ends.len());
        return refuse_entry(name, problem, "give them for every row");
    }
    for (row, ends) in ends.iter().enumerate() {
        if !ends.is_sorted() {
            let problem = format!("go down in row {row}: {ends:?}");
            return refuse_entry(name, problem, "give cumulative lengths");
        }
        if ends.last() != Some(&tokens) {
            let last = ends.last();
            let end = last.map_or("nowhere".to_owned(), |end| format!("with token {end}"));
            let problem = format!("end {end} in row {row} of {tokens} tokens");
            return refuse_entry(name, problem, "let the last document end with the row");
        }
    }
    Ok(())
}
