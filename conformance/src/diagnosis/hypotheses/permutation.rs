//! Rows that stand in another place.

use tch::{TchError, Tensor};

use crate::diagnosis::evidence::{Evidence, Sizes};

/// Which row of a tensor `[batch, tokens, heads, ..]` stands in each place of
/// another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Permutation(Vec<i64>);

impl Permutation {
    /// The row at `from(batch, token, head)` stands at batch, token and head.
    /// None if that is no permutation, or changes nothing.
    pub(super) fn of(
        sizes: Sizes,
        from: impl Fn((usize, usize, usize)) -> (usize, usize, usize),
    ) -> Option<Permutation> {
        let rows: Vec<i64> = (0..sizes.rows())
            .map(|row| sizes.row(from(sizes.place(row))) as i64)
            .collect();
        let mut is_met = vec![false; rows.len()];
        for &row in &rows {
            *is_met.get_mut(row as usize)? = true;
        }
        let changes = rows
            .iter()
            .enumerate()
            .any(|(place, &row)| place as i64 != row);
        (is_met.into_iter().all(|is| is) && changes).then_some(Permutation(rows))
    }

    /// The token `order[t]` stands in place t, of every batch and head.
    pub(super) fn of_tokens(sizes: Sizes, order: &[usize]) -> Option<Permutation> {
        (order.len() == sizes.tokens)
            .then(|| Permutation::of(sizes, |(batch, token, head)| (batch, order[token], head)))?
    }

    /// The head `order[h]` stands in place h, of every batch and token.
    pub(super) fn of_heads(sizes: Sizes, order: &[usize]) -> Option<Permutation> {
        (order.len() == sizes.heads)
            .then(|| Permutation::of(sizes, |(batch, token, head)| (batch, token, order[head])))?
    }

    /// The row that stands in this place.
    pub(super) fn from(&self, place: usize) -> usize {
        self.0[place] as usize
    }

    /// The one that puts all back.
    pub(super) fn inverse(&self) -> Permutation {
        let mut rows = vec![0; self.0.len()];
        for (place, &row) in self.0.iter().enumerate() {
            rows[row as usize] = place as i64;
        }
        Permutation(rows)
    }

    /// The elements, rows of the same length, in their new places.
    pub(super) fn of_elements(&self, elements: &[f64]) -> Vec<f64> {
        let channels = elements.len() / self.0.len().max(1);
        let row = |&row: &i64| {
            let first = row as usize * channels;
            elements[first..first + channels].iter().copied()
        };
        self.0.iter().flat_map(row).collect()
    }

    /// The rows of a tensor `[batch, heads, tokens, channels]` in their new
    /// places.
    pub(super) fn of_tensor(&self, tensor: &Tensor) -> Result<Tensor, TchError> {
        let by_token = tensor.f_transpose(1, 2)?;
        let shape = by_token.size();
        let channels = shape.last().copied().unwrap_or(1);
        by_token
            .f_reshape([-1, channels])?
            .f_index_select(0, &Tensor::f_from_slice(&self.0)?)?
            .f_view(shape.as_slice())?
            .f_transpose(1, 2)
    }
}

/// Orders of the ranks that people make by mistake: from the back, and shifted
/// by so many ranks. Others are found by where rows come from.
pub(super) fn usual_orders(ranks: usize) -> Vec<Vec<usize>> {
    let reversed: Vec<usize> = (0..ranks).rev().collect();
    let shifted = (1..ranks).map(|by| (0..ranks).map(|rank| (rank + by) % ranks).collect());
    let mut orders: Vec<Vec<usize>> = [reversed].into_iter().chain(shifted).collect();
    orders.dedup();
    orders.retain(|order| order.iter().enumerate().any(|(place, &rank)| place != rank));
    orders
}

/// The tokens of all ranks, the ranks in this order, each rank's in its own.
pub(super) fn tokens_in(evidence: &Evidence<'_>, order: &[usize]) -> Vec<usize> {
    // In the global order, the r-th rank's places are its own tokens'.
    let mut places = vec![0; evidence.case.sequence];
    let into = evidence.shards.iter().flat_map(|shard| shard.tokens());
    let from = order
        .iter()
        .flat_map(|&rank| evidence.shards[rank].tokens());
    for (&place, &token) in into.zip(from) {
        places[place] = token;
    }
    places
}

/// The heads of all ranks, the ranks in this order.
pub(super) fn heads_in(evidence: &Evidence<'_>, heads: usize, order: &[usize]) -> Vec<usize> {
    let ranges = evidence.heads_of_ranks(heads);
    order
        .iter()
        .flat_map(|&rank| ranges[rank].clone())
        .collect()
}
