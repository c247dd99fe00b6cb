//! The custom autograd functions behind the two exchanges: each moves its data
//! in one collective, and goes back by the opposite one.
//!
//! Nothing of the inputs is kept for backward. The cotangents bring all that
//! it needs.

use super::{
    Exchange,
    shapes::{Counts, Likeness},
};
use crate::{
    autograd::Function,
    error::{Error, Result},
};
use tch::Tensor;

/// One list for each rank, of the blocks of all three tensors.
fn zip(
    query: Vec<Vec<Tensor>>,
    key: Vec<Vec<Tensor>>,
    value: Vec<Vec<Tensor>>,
) -> Vec<Vec<Tensor>> {
    query
        .into_iter()
        .zip(key)
        .zip(value)
        .map(|((q, k), v)| q.into_iter().chain(k).chain(v).collect())
        .collect()
}

/// Query, key and value together, from sequence-sharded to head-sharded.
pub(super) struct SequenceToHeads {
    exchange: Exchange,
}

impl SequenceToHeads {
    pub(super) fn new(exchange: &Exchange) -> Self {
        Self {
            exchange: exchange.clone(),
        }
    }

    fn exchange_forward(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let [query, key, value] = three(inputs)?;
        let (exchange, of_query, of_kv) = self.parts();
        let like = of_query.expect_sequence_sharded("query", query)?;
        let (like_key, like_value) = (
            of_kv.expect_sequence_sharded("key", key)?,
            of_kv.expect_sequence_sharded("value", value)?,
        );
        let outputs = [
            of_query.head_sharded(&like)?,
            of_kv.head_sharded(&like_key)?,
            of_kv.head_sharded(&like_value)?,
        ];
        let send = zip(
            exchange.by_query_heads(query)?,
            exchange.by_kv_heads(key)?,
            exchange.by_kv_heads(value)?,
        );
        let [q, k, v] = &outputs;
        let receive = zip(
            exchange.by_tokens(q)?,
            exchange.by_tokens(k)?,
            exchange.by_tokens(v)?,
        );
        exchange.all_to_all(&send, &receive)?;
        Ok(outputs.into())
    }

    fn exchange_backward(&self, cotangents: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let [query, key, value] = three(cotangents)?;
        let (exchange, of_query, of_kv) = self.parts();
        let like = of_query.expect_head_sharded("cotangent of query", query)?;
        let (like_key, like_value) = (
            of_kv.expect_head_sharded("cotangent of key", key)?,
            of_kv.expect_head_sharded("cotangent of value", value)?,
        );
        let send = zip(
            exchange.by_tokens(query)?,
            exchange.by_tokens(key)?,
            exchange.by_tokens(value)?,
        );
        let d_query = of_query.sequence_sharded(&like)?;
        let to_query = exchange.by_query_heads(&d_query)?;
        let (d_key, d_value) = if exchange.heads.is_replicated() {
            // The copies of one head would overwrite one another.
            let room = |like: &Likeness| -> Result<Vec<Tensor>> {
                (0..exchange.tokens.ranks())
                    .map(|rank| {
                        let heads = exchange.heads.kv_range(rank).len() as i64;
                        like.empty([like.batch, of_kv.own_tokens, heads, like.head_size])
                    })
                    .collect()
            };
            let (keys, values) = (room(&like_key)?, room(&like_value)?);
            let places = |copies: &[Tensor]| -> Result<Vec<Vec<Tensor>>> {
                let runs = |copy| exchange.by_own_runs(copy);
                copies.iter().map(runs).collect()
            };
            exchange.all_to_all(&send, &zip(to_query, places(&keys)?, places(&values)?))?;
            (exchange.sum_copies(&keys)?, exchange.sum_copies(&values)?)
        } else {
            let (d_key, d_value) = (
                of_kv.sequence_sharded(&like_key)?,
                of_kv.sequence_sharded(&like_value)?,
            );
            let receive = zip(
                to_query,
                exchange.by_kv_heads(&d_key)?,
                exchange.by_kv_heads(&d_value)?,
            );
            exchange.all_to_all(&send, &receive)?;
            (d_key, d_value)
        };
        Ok(vec![Some(d_query), Some(d_key), Some(d_value)])
    }

    fn parts(&self) -> (&Exchange, Counts, Counts) {
        (
            &self.exchange,
            self.exchange.query_counts(),
            self.exchange.kv_counts(),
        )
    }
}

impl Function for SequenceToHeads {
    fn forward(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        self.exchange.or_abandon(self.exchange_forward(inputs))
    }

    fn backward(&mut self, cotangents: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        self.exchange.or_abandon(self.exchange_backward(cotangents))
    }
}

/// The output, from head-sharded to sequence-sharded.
pub(super) struct HeadsToSequence {
    exchange: Exchange,
}

impl HeadsToSequence {
    pub(super) fn new(exchange: &Exchange) -> Self {
        Self {
            exchange: exchange.clone(),
        }
    }

    fn exchange_forward(&self, output: &Tensor) -> Result<Tensor> {
        let (exchange, counts) = (&self.exchange, self.exchange.query_counts());
        let like = counts.expect_head_sharded("output", output)?;
        let sharded = counts.sequence_sharded(&like)?;
        let send = exchange.by_tokens(output)?;
        exchange.all_to_all(&send, &exchange.by_query_heads(&sharded)?)?;
        Ok(sharded)
    }

    fn exchange_backward(&self, cotangent: &Tensor) -> Result<Tensor> {
        let (exchange, counts) = (&self.exchange, self.exchange.query_counts());
        let like = counts.expect_sequence_sharded("cotangent of output", cotangent)?;
        let gathered = counts.head_sharded(&like)?;
        let send = exchange.by_query_heads(cotangent)?;
        exchange.all_to_all(&send, &exchange.by_tokens(&gathered)?)?;
        Ok(gathered)
    }
}

impl Function for HeadsToSequence {
    fn forward(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let forward = |output: &Tensor| self.exchange_forward(output);
        self.exchange
            .or_abandon(inputs.iter().map(forward).collect())
    }

    fn backward(&mut self, cotangents: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let backward = |cotangent: &Tensor| self.exchange_backward(cotangent).map(Some);
        self.exchange
            .or_abandon(cotangents.iter().map(backward).collect())
    }
}

fn three(tensors: &[Tensor]) -> Result<&[Tensor; 3]> {
    let count = tensors.len();
    tensors
        .try_into()
        .map_err(|_| Error::Libtorch(format!("an exchange of three tensors was given {count}")))
}
