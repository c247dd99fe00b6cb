//! Which keys a query sees, as a tensor.

use fixtures::{AttentionCase, Mask, Structure};
use tch::{TchError, Tensor};

/// Which keys the queries of a case see.
pub(crate) struct Visibility<'a> {
    case: &'a AttentionCase,
    structure: Structure,
}

impl<'a> Visibility<'a> {
    pub(crate) fn of(case: &'a AttentionCase) -> Visibility<'a> {
        let structure = Structure::of(case);
        Visibility { case, structure }
    }

    /// Whether every query sees every key.
    pub(crate) fn is_full(&self) -> bool {
        self.case.mask == Mask::Full && is_plain(self.case)
    }

    /// For the queries of tokens `first..first + rows`: whether each sees each
    /// key, `[batch, query heads, rows, KV tokens]`. The batch is 1 where all
    /// sequences are alike, the query heads are 1 where all heads are.
    pub(crate) fn of_rows(&self, first: usize, rows: usize) -> Result<Tensor, TchError> {
        let extras = &self.case.extras;
        let differs_by_batch = extras.documents.is_some() || extras.padding.is_some();
        let batches = if differs_by_batch { self.case.batch } else { 1 };
        let heads = match extras.block {
            Some(_) => self.case.query_heads,
            None => 1,
        };
        let keys = self.case.kv_sequence();
        let mut seen = Vec::with_capacity(batches * heads * rows * keys);
        for batch in 0..batches {
            for head in 0..heads {
                for query in first..first + rows {
                    let sees = |key| self.structure.sees(batch, head, query, key);
                    seen.extend((0..keys).map(sees));
                }
            }
        }
        let shape = [batches, heads, rows, keys].map(|size| size as i64);
        Tensor::f_from_slice(&seen)?.f_view(shape)
    }
}

/// Whether the case's mask, full or causal, is all that hides a key.
pub(crate) fn is_plain(case: &AttentionCase) -> bool {
    let extras = &case.extras;
    extras.window.is_none()
        && extras.documents.is_none()
        && extras.padding.is_none()
        && extras.block.is_none()
}
