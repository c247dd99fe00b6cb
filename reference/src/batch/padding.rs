//! Rows filled up on the right.
//!
//! The attention of this crate takes shards of any length and needs none of
//! it. Hugging Face's collators do it (`pad_to_multiple_of`), because
//! DeepSpeed's adapter refuses what P does not divide.

use super::{Batch, Entry};
use crate::error::{Result, refuse};
use tch::{Kind, Tensor};

impl Batch {
    /// With rows of the next multiple of `multiple` tokens. What is added:
    ///
    /// | entry | value |
    /// |---|---|
    /// | `input_ids` | `pad_id` |
    /// | `labels`, `shift_labels` | `ignore_index` |
    /// | `attention_mask` | 0 |
    /// | `position_ids` | the row's last position plus 1, plus 2, .. |
    /// | ends of documents | the last document ends with the padding |
    /// | any other entry of tokens | 0 |
    ///
    /// So padding belongs to the row's last document. Positions of zero would
    /// make each token of it a document of its own for whoever finds documents
    /// by positions. Under a causal mask no real token sees what is on its
    /// right; under a full one bring an `attention_mask`, for none is made.
    ///
    /// # Errors
    /// Refused when `multiple` is 0, and as [`extent`](Batch::extent) is.
    pub fn pad(mut self, multiple: usize, pad_id: i64, ignore_index: i64) -> Result<Self> {
        let (_, tokens) = self.extent()?;
        if multiple == 0 {
            return refuse("pad_to_multiple_of", "is 0", "give the number of ranks");
        }
        let padded = tokens.next_multiple_of(multiple);
        let more = (padded - tokens) as i64;
        if more == 0 {
            return Ok(self);
        }
        for (name, entry) in &mut self.entries {
            let Some(dimension) = entry.tokens else {
                continue;
            };
            let padding = match name.as_str() {
                "position_ids" => entry.later_positions(dimension, more)?,
                "input_ids" => entry.repeated(dimension, more, pad_id)?,
                "labels" | "shift_labels" => entry.repeated(dimension, more, ignore_index)?,
                _ => entry.repeated(dimension, more, 0)?,
            };
            entry.tensor = Tensor::f_cat(&[&entry.tensor, &padding], dimension as i64)?;
        }
        for ends in self.document_ends.iter_mut().flatten() {
            if let Some(last) = ends.last_mut() {
                *last = padded;
            }
        }
        Ok(self)
    }
}

impl Entry {
    fn repeated(&self, dimension: usize, tokens: i64, value: i64) -> Result<Tensor> {
        let mut size = self.tensor.size();
        size[dimension] = tokens;
        let options = (self.tensor.f_kind()?, self.tensor.device());
        Ok(Tensor::f_full(size, value, options)?)
    }

    fn later_positions(&self, dimension: usize, tokens: i64) -> Result<Tensor> {
        let last = self.tensor.f_narrow(dimension as i64, -1, 1)?;
        let steps = Tensor::f_arange_start(1, tokens + 1, (Kind::Int64, last.device()))?;
        Ok(last.f_add(&steps)?)
    }
}
