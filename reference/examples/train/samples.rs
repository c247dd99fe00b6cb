//! Which samples of the text a rank reads.
//!
//! Samples are numbered, and step t of the optimizer is on those from
//! `t * sequences` on, whatever the mesh. Each replica takes as many of them, one
//! after another, and its group of ranks works on each together. A rank reads
//! every P-th of those of its group: the data loader adapter serves one of rank 0,
//! then one of rank 1, and so on, and so the group gets them in order.

use super::{Result, arguments::Training, tokenizer};
use std::vec::IntoIter;
use tch::TchError;
use ulysses::{Batch, mesh::Coordinates};

const TEXT: &[u8] = include_bytes!("text.txt");

/// How far apart in the text two samples are, in samples: it is not read in its
/// own order.
const STRIDE: usize = 37;

/// The batches that one rank reads, of one sequence each.
#[derive(Clone)]
pub(crate) struct Samples {
    numbers: IntoIter<usize>,
    tokens: usize,
}

impl Samples {
    /// Those of the rank that stands there.
    pub(crate) fn of(training: &Training, at: Coordinates) -> Result<Self> {
        if training.sequence > TEXT.len() {
            return Err(
                format!("the text has {} tokens: give shorter sequences", TEXT.len()).into(),
            );
        }
        let (replica, each) = (
            at.dp_replicate * training.dp_shard + at.dp_shard,
            of_a_replica(training)?,
        );
        let served = (0..training.steps * each).skip(at.sp).step_by(training.sp);
        let number = |served| {
            let (step, place) = (served / each, served % each);
            step * training.sequences + replica * each + place
        };
        Ok(Self {
            numbers: served.map(number).collect::<Vec<_>>().into_iter(),
            tokens: training.sequence,
        })
    }
}

/// How many sequences of a step a replica has.
pub(crate) fn of_a_replica(training: &Training) -> Result<usize> {
    let (sequences, replicas) = (training.sequences, training.mesh().data_parallel());
    if sequences.is_multiple_of(replicas) {
        return Ok(sequences / replicas);
    }
    Err(format!("{sequences} sequences cannot be shared out to {replicas} replicas").into())
}

impl Iterator for Samples {
    type Item = Result<Batch, TchError>;

    fn next(&mut self) -> Option<Self::Item> {
        let number = self.numbers.next()?;
        // After the last sample comes the first.
        let start = number * STRIDE % (TEXT.len() / self.tokens) * self.tokens;
        let ids = tokenizer::ids(&TEXT[start..start + self.tokens]);
        Some(ids.map(|ids| {
            let labels = ids.shallow_clone();
            Batch::default()
                .with("input_ids", ids)
                .with("labels", labels)
        }))
    }
}
