//! Where each token of a batch is: on which rank, in which sequence, and which
//! others it sees.

use fixtures::ModelCase;
use fixtures::loss::IGNORE_INDEX;
use fixtures::model::ModelInputs;
use tch::{TchError, Tensor};

use crate::diagnosis::Mistake;

/// All tokens in rows, rank after rank, each rank's sequence after sequence.
pub(super) struct Layout {
    /// The first row of each rank, and how many it has.
    pub(super) ranks: Vec<(i64, i64)>,
    /// How many sequences there are, over all replicas.
    pub(super) sequences: i64,
    /// The tokens of each.
    pub(super) length: i64,
    /// The row of each token, sequence after sequence.
    pub(super) row_of_token: Tensor,
    /// The token of each row.
    pub(super) token_of_row: Tensor,
    /// Of each row.
    pub(super) ids: Tensor,
    /// Of each row.
    pub(super) labels: Vec<i64>,
    places: Vec<Place>,
    documents: Vec<usize>,
    positions: Vec<i64>,
}

/// A token of the batch.
#[derive(Clone, Copy)]
struct Place {
    /// Over all sequences.
    token: usize,
    /// Its number among the tokens of its sequence that its rank holds.
    local: usize,
    is_last_of_shard: bool,
}

impl Layout {
    pub(super) fn of(case: &ModelCase, inputs: &ModelInputs) -> Result<Layout, TchError> {
        let (mut places, mut ranks) = (Vec::new(), Vec::new());
        for replica in 0..case.replicas() {
            for shard in case.shards() {
                let rows = case.batch * shard.len();
                ranks.push((places.len() as i64, rows as i64));
                for row in 0..case.batch {
                    let sequence = (replica * case.batch + row) * case.sequence;
                    let all = shard.tokens().iter().enumerate();
                    places.extend(all.map(|(local, token)| Place {
                        token: sequence + token,
                        local,
                        is_last_of_shard: local + 1 == shard.len(),
                    }));
                }
            }
        }
        let token_of_row: Vec<i64> = places.iter().map(|place| place.token as i64).collect();
        let mut row_of_token = vec![0; places.len()];
        for (row, place) in places.iter().enumerate() {
            row_of_token[place.token] = row as i64;
        }
        let of_rows = |numbers: &[i64]| -> Vec<i64> {
            places.iter().map(|place| numbers[place.token]).collect()
        };
        Ok(Layout {
            ranks,
            sequences: (case.replicas() * case.batch) as i64,
            length: case.sequence as i64,
            row_of_token: Tensor::f_from_slice(&row_of_token)?,
            token_of_row: Tensor::f_from_slice(&token_of_row)?,
            ids: Tensor::f_from_slice(&of_rows(&inputs.ids))?,
            labels: of_rows(&inputs.labels),
            documents: inputs.documents.clone(),
            positions: of_rows(&inputs.positions),
            places,
        })
    }

    /// The labels by a mistake.
    pub(super) fn labels(&self, mistake: Option<Mistake>) -> Vec<i64> {
        let rows = self.places.iter().zip(&self.labels).enumerate();
        let label = |(row, (place, &label)): (usize, (&Place, &i64))| match mistake {
            Some(Mistake::EndOfShardUntrained | Mistake::LabelsShiftedAgain)
                if place.is_last_of_shard =>
            {
                IGNORE_INDEX
            }
            Some(Mistake::LabelsShiftedAgain) => self.labels[row + 1],
            _ => label,
        };
        rows.map(label).collect()
    }

    /// By which position each row is rotated.
    pub(super) fn positions(&self, are_local: bool) -> Result<Tensor, TchError> {
        let of_rank = self.places.iter().map(|place| place.local as i64);
        let positions: Vec<i64> = match are_local {
            true => of_rank.collect(),
            false => self.positions.clone(),
        };
        Tensor::f_from_slice(&positions)
    }

    /// 1 where a query does not see a key, else 0: `[1, sequences, 1, queries,
    /// keys]`.
    pub(super) fn hidden(
        &self,
        is_last_layer: bool,
        mistake: Option<Mistake>,
    ) -> Result<Tensor, TchError> {
        let length = self.length as usize;
        let mut rank = vec![0; self.places.len()];
        let mut local = vec![0; self.places.len()];
        for (number, &(first, count)) in self.ranks.iter().enumerate() {
            for place in &self.places[first as usize..(first + count) as usize] {
                rank[place.token] = number;
                local[place.token] = place.local;
            }
        }
        let sees = |query: usize, key: usize| {
            let is_before = match mistake {
                Some(Mistake::CausalByLocalIndex) => local[key] <= local[query],
                _ => key <= query,
            };
            let is_of_document = mistake == Some(Mistake::DocumentsIgnored)
                || self.documents[key] == self.documents[query];
            let is_exchanged = match mistake {
                Some(Mistake::LocalTokensOnly) => false,
                Some(Mistake::LastLayerLocal) => !is_last_layer,
                _ => true,
            };
            is_before && is_of_document && (is_exchanged || rank[key] == rank[query])
        };
        let mut hidden = Vec::with_capacity(self.places.len() * length);
        for query in 0..self.places.len() {
            let sequence = query / length * length;
            hidden.extend((sequence..sequence + length).map(|key| !sees(query, key)));
        }
        Tensor::f_from_slice(&hidden)?.f_view([1, self.sequences, 1, self.length, self.length])
    }
}
