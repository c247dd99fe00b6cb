//! What stands in `out` at a padding token is nobody's business.

use fixtures::{AttentionCase, Structure};

use crate::oracle::AnswerTensor;

/// The padding tokens of a case.
pub(super) struct PaddingTokens {
    /// For each sequence of the batch, whether each token is one; empty without
    /// padding.
    is_padding: Vec<Vec<bool>>,
}

impl PaddingTokens {
    pub(super) fn of(case: &AttentionCase) -> PaddingTokens {
        let structure = Structure::of(case);
        let batches = case.extras.padding.map_or(0, |_| case.batch);
        let of_batch = |batch| {
            let tokens = 0..case.sequence;
            tokens
                .map(|token| structure.is_padding(batch, token))
                .collect()
        };
        PaddingTokens {
            is_padding: (0..batches).map(of_batch).collect(),
        }
    }

    /// Whether this token is one.
    pub(super) fn holds(&self, batch: usize, token: usize) -> bool {
        self.is_padding
            .get(batch)
            .is_some_and(|tokens| tokens[token])
    }

    /// The elements of a tensor over the whole sequence, zero where nobody
    /// compares them.
    pub(super) fn blanked(&self, tensor: AnswerTensor, elements: Vec<f64>) -> Vec<f64> {
        let tokens: Vec<usize> = match self.is_padding.first() {
            Some(tokens) => (0..tokens.len()).collect(),
            None => return elements,
        };
        self.blanked_shard(tensor, &tokens, elements)
    }

    /// The same of a shard that holds these tokens.
    pub(super) fn blanked_shard(
        &self,
        tensor: AnswerTensor,
        tokens: &[usize],
        mut elements: Vec<f64>,
    ) -> Vec<f64> {
        let rows = self.is_padding.len() * tokens.len();
        if tensor != AnswerTensor::Out || rows == 0 || elements.len() < rows {
            return elements;
        }
        let channels = elements.len() / rows;
        for (i, row) in elements.chunks_mut(channels).enumerate() {
            if self.holds(i / tokens.len(), tokens[i % tokens.len()]) {
                row.fill(0.0);
            }
        }
        elements
    }
}
