//! From labels, each the token itself, to targets, each the next token.

use super::Batch;
use crate::error::{Result, refuse};
use tch::{Kind, Tensor};

/// The label of a token that is no target, as in PyTorch and Hugging Face's
/// models.
pub const IGNORE_INDEX: i64 = -100;

/// What the last token of a document has as its target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Shift {
    /// Nothing: the next token is the first of another text. Documents are
    /// those whose ends the batch has; without these, one begins wherever a
    /// position of `position_ids` [B, S] is not that of the token before plus
    /// one.
    #[default]
    WithinDocuments,
    /// The first token of the next one, as DeepSpeed's data loader adapter has
    /// it; only the last token of a row has none. The same as above where the
    /// label of every document's first token is the ignore index already.
    AcrossDocuments,
}

/// The targets of `labels` [B, S], int64: at each token the label of the next.
/// The last token of a row has `ignore_index`, and so has the last of each
/// document whose end is given.
///
/// # Errors
/// Refused when `labels` has another shape or dtype, and when the ends are not
/// those of these rows.
pub fn shift_labels(
    labels: &Tensor,
    document_ends: Option<&[Vec<usize>]>,
    ignore_index: i64,
) -> Result<Tensor> {
    let mut alone = Batch::default().with("labels", labels.f_detach()?);
    alone.document_ends = document_ends.map(<[_]>::to_vec);
    let (sequences, tokens) = alone.extent()?;
    let row_end = Tensor::f_full(
        [sequences as i64, 1],
        ignore_index,
        (Kind::Int64, labels.device()),
    )?;
    let next = Tensor::f_cat(&[labels.f_narrow(1, 1, tokens as i64 - 1)?, row_end], 1)?;
    let last_tokens: Vec<i64> = document_ends
        .unwrap_or_default()
        .iter()
        .enumerate()
        .flat_map(|(row, ends)| {
            let real = ends.iter().filter(|&&end| end > 0);
            real.map(move |end| (row * tokens + end - 1) as i64)
        })
        .collect();
    let last_tokens = Tensor::f_from_slice(&last_tokens)?.f_to_device(labels.device())?;
    Ok(next
        .f_view([-1])?
        .f_index_fill(0, &last_tokens, ignore_index)?
        .f_view([sequences as i64, tokens as i64])?)
}

impl Batch {
    /// With `shift_labels`, the targets, in place of `labels`.
    ///
    /// # Errors
    /// Refused when there are no `labels`, when there are `shift_labels`
    /// already, and as [`extent`](Batch::extent) is.
    pub fn shift_labels(mut self, shift: Shift, ignore_index: i64) -> Result<Self> {
        self.extent()?;
        if self.get("shift_labels").is_some() {
            return refuse(
                "shift_labels",
                "are there already: to shift again would make each token's target the one after",
                "shift labels once",
            );
        }
        let Some(labels) = self.entries.remove("labels") else {
            return refuse(
                "labels",
                "are missing",
                "give each token's own id as its label, or ask for no targets",
            );
        };
        let ends = match shift {
            Shift::WithinDocuments => self.ends_or_restarts()?,
            Shift::AcrossDocuments => None,
        };
        let targets = shift_labels(&labels.tensor, ends.as_deref(), ignore_index)?;
        Ok(self.with("shift_labels", targets))
    }
}
