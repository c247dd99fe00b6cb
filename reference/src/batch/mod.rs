//! From a batch of whole sequences to each rank's shard of it.
//!
//! What depends on a token's neighbours or its place is made while the sequence
//! is whole: [`positions`] count from the first token of each document,
//! [`labels`] are shifted so that each token holds its target, [`padding`] fills
//! rows up to a length. Only then is the sequence cut ([`shard`]), and a cut
//! whose entries were not made so is refused: positions counted on one rank
//! begin again at zero, and labels shifted there lose the target of each
//! shard's last token.
//!
//! [`data_loader`] serves the shards of every rank's own batches to the group.
//!
//! Not here: where batches come from, and anything that attention does with
//! their entries.

pub mod data_loader;
pub mod labels;
mod offer;
pub mod padding;
pub mod positions;
pub mod shard;

use crate::error::{Result, refuse};
use std::collections::BTreeMap;
use tch::{Kind, Tensor};

/// The arguments that a refusal may name: what this crate knows of a batch.
pub(crate) const ARGUMENTS: [&str; 9] = [
    "input_ids",
    "labels",
    "shift_labels",
    "position_ids",
    "attention_mask",
    "document_ends",
    "pad_to_multiple_of",
    "sharding",
    "batches",
];

/// The sequences of a training step, as named tensors, before they are cut.
///
/// Entries have any name and any dtype. Those with a meaning here are
/// `input_ids` [B, S], `labels` and `shift_labels` [B, S], and `position_ids`
/// [B, S] or [3, B, S], all int64, and `attention_mask` [B, S], int64 or bool.
#[derive(Debug, Default)]
pub struct Batch {
    entries: BTreeMap<String, Entry>,
    document_ends: Option<Vec<Vec<usize>>>,
}

/// One tensor of a batch.
#[derive(Debug)]
struct Entry {
    tensor: Tensor,
    /// The dimension of the tokens, behind that of the sequences. `None` for an
    /// entry that every rank gets whole.
    tokens: Option<usize>,
}

impl Batch {
    /// With an entry of a value for each token, [B, S, ..], in place of any of
    /// this name.
    #[must_use]
    pub fn with(self, name: &str, tensor: Tensor) -> Self {
        self.with_tokens_at(name, tensor, 1)
    }

    /// With an entry whose tokens are counted by `dimension`, and its sequences
    /// by the dimension before that: 2 for position ids [3, B, S].
    #[must_use]
    pub fn with_tokens_at(mut self, name: &str, tensor: Tensor, dimension: usize) -> Self {
        let tokens = Some(dimension);
        self.entries
            .insert(name.to_owned(), Entry { tensor, tokens });
        self
    }

    /// With an entry that every rank gets whole.
    #[must_use]
    pub fn with_whole(mut self, name: &str, tensor: Tensor) -> Self {
        let tokens = None;
        self.entries
            .insert(name.to_owned(), Entry { tensor, tokens });
        self
    }

    /// With rows of several documents each: for each row their cumulative
    /// lengths, the last of which is S, as
    /// [`Documents::Ends`](crate::Documents::Ends) takes them. See
    /// [`document_ends`](positions::document_ends) for lengths.
    #[must_use]
    pub fn with_document_ends(mut self, ends: Vec<Vec<usize>>) -> Self {
        self.document_ends = Some(ends);
        self
    }

    /// The entry of this name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.entries.get(name).map(|entry| &entry.tensor)
    }

    /// The names of all entries, in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Where the documents of each row end, if that was said.
    pub fn document_ends(&self) -> Option<&[Vec<usize>]> {
        self.document_ends.as_deref()
    }

    /// How many sequences there are, and how many tokens each has.
    ///
    /// # Errors
    /// Refused, with the name of the entry, when one has another count of
    /// sequences or tokens than `input_ids` (than the first entry of tokens
    /// where there are no ids), a dtype or a shape that its name does not
    /// allow, or when the ends of documents are not those of these sequences.
    pub fn extent(&self) -> Result<(usize, usize)> {
        let first = ["input_ids"]
            .into_iter()
            .chain(self.names())
            .find_map(|name| Some((name, self.entries.get(name)?.extent()?)));
        let Some((first, extent)) = first else {
            return refuse(
                "batch",
                "has no entry with a value for each token",
                "give it `input_ids` [B, S]",
            );
        };
        for (name, entry) in &self.entries {
            entry.check(name, first, extent)?;
        }
        if extent[0] == 0 || extent[1] == 0 {
            let size = format!("has {} sequences of {} tokens", extent[0], extent[1]);
            return refuse_entry(first, size, "give at least one token");
        }
        let (sequences, tokens) = (extent[0] as usize, extent[1] as usize);
        if let Some(ends) = &self.document_ends {
            positions::check_ends(ends, sequences, tokens)?;
        }
        Ok((sequences, tokens))
    }
}

impl Entry {
    /// How many sequences and tokens there are, where the tensor has such
    /// dimensions.
    fn extent(&self) -> Option<[i64; 2]> {
        let dimension = self.tokens?;
        let size = self.tensor.size();
        Some([*size.get(dimension.checked_sub(1)?)?, *size.get(dimension)?])
    }

    fn check(&self, name: &str, first: &str, due: [i64; 2]) -> Result<()> {
        let kind = self.tensor.f_kind()?;
        let size = self.tensor.size();
        let (kinds, shapes): (&[Kind], _) = match name {
            "input_ids" | "labels" | "shift_labels" => (&[Kind::Int64], "[B, S]"),
            "position_ids" => (&[Kind::Int64], "[B, S], or [3, B, S] with tokens at 2"),
            "attention_mask" => (&[Kind::Int64, Kind::Bool], "[B, S]"),
            _ => (&[], ""),
        };
        if !kinds.is_empty() && !kinds.contains(&kind) {
            let due: Vec<_> = kinds.iter().map(|kind| format!("{kind:?}")).collect();
            let remedy = format!("make it {}", due.join(" or "));
            return refuse_entry(name, format!("is {kind:?}"), remedy);
        }
        let fits = match (name, self.tokens) {
            ("position_ids", Some(2)) => size.len() == 3,
            _ => kinds.is_empty() || (self.tokens == Some(1) && size.len() == 2),
        };
        if !fits {
            return refuse_entry(
                name,
                format!("has shape {size:?}"),
                format!("give {shapes}"),
            );
        }
        match (self.tokens, self.extent()) {
            (None, _) => Ok(()),
            (Some(_), Some(extent)) if extent == due => Ok(()),
            (Some(dimension), Some([sequences, tokens])) => refuse_entry(
                name,
                format!(
                    "has {sequences} sequences of {tokens} tokens in shape {size:?} with tokens at \
                     {dimension}, but `{first}` has {} of {}",
                    due[0], due[1]
                ),
                "give all entries the same, or pass this one whole",
            ),
            (Some(dimension), None) => refuse_entry(
                name,
                format!("has shape {size:?}, without tokens at dimension {dimension}"),
                "give it as [B, S, ..], or pass it whole",
            ),
        }
    }
}

/// A refusal that names an entry, be it one that this crate knows or not.
fn refuse_entry<T>(name: &str, problem: String, remedy: impl Into<String>) -> Result<T> {
    match ARGUMENTS.into_iter().find(|&known| known == name) {
        Some(known) => refuse(known, problem, remedy),
        None => refuse(
            "batch",
            format!("has an entry `{name}` that {problem}"),
            remedy,
        ),
    }
}
