//! Each rank's own batches, served to the group one after another.
//!
//! Under data parallelism each rank reads batches of its own. The ranks of a
//! sequence-parallel group work on one batch together: so a round takes one
//! batch of each rank, and serves the shards of rank 0's to all ranks, then
//! those of rank 1's, and so on. P steps consume what one step of data
//! parallelism does, and no rank need read the same data.
//!
//! It is what DeepSpeed's `UlyssesSPDataLoaderAdapter` does, and Accelerate
//! with it, but for this: only shards travel, in one exchange for each round,
//! where DeepSpeed gathers whole batches on every rank; batches may differ in
//! sequences, length and entries from rank to rank; and where some ranks have
//! more batches than others, those are served too, while DeepSpeed's gather
//! waits for ever.

use super::{
    Batch,
    labels::{IGNORE_INDEX, Shift},
    offer::{self, Complaint, Message, Offer, Outline, Step},
    shard::Shard,
};
use crate::{communicator::Communicator, error::Result, token_partition::Sharding};
use std::{collections::VecDeque, fmt::Display, sync::Arc};
use tch::{Device, Tensor};

/// What becomes of a batch before it is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preparation {
    /// Rows are filled up to a multiple of so many tokens; 1 leaves them alone.
    pub pad_to_multiple_of: usize,
    /// The token they are filled up with.
    pub pad_id: i64,
    /// How `labels` are shifted. `None` for batches that have none, or have
    /// them shifted: labels that are no next tokens go by any other name.
    pub shift: Option<Shift>,
    /// The label of a token that is no target.
    pub ignore_index: i64,
    /// How sequences are cut, the same on all ranks.
    pub sharding: Sharding,
}

impl Default for Preparation {
    fn default() -> Self {
        Self {
            pad_to_multiple_of: 1,
            pad_id: 0,
            shift: Some(Shift::default()),
            ignore_index: IGNORE_INDEX,
            sharding: Sharding::default(),
        }
    }
}

impl Preparation {
    /// The batch with position ids, made where there are none, targets in place
    /// of labels, and padding.
    ///
    /// # Errors
    /// Those of [`Batch::with_position_ids`], [`Batch::shift_labels`] and
    /// [`Batch::pad`].
    pub fn prepare(&self, mut batch: Batch) -> Result<Batch> {
        if batch.get("position_ids").is_none() {
            batch = batch.with_position_ids()?;
        }
        if let Some(shift) = self.shift {
            batch = batch.shift_labels(shift, self.ignore_index)?;
        }
        batch.pad(self.pad_to_multiple_of, self.pad_id, self.ignore_index)
    }

    /// A prepared batch, and the shard of each rank on the host.
    fn cut(&self, batch: Batch, ranks: usize) -> Result<(Outline, Vec<Vec<Tensor>>)> {
        let batch = self.prepare(batch)?;
        let shards = (0..ranks).map(|rank| {
            let shard = batch.shard(self.sharding, rank, ranks)?;
            let on_host = |tensor: Tensor| Ok(tensor.f_to_device(Device::Cpu)?);
            shard.entries.into_values().map(on_host).collect()
        });
        let shards = shards.collect::<Result<_>>()?;
        Ok((Outline::of(&batch)?, shards))
    }
}

/// Serves the batches of every rank's `open` to all ranks of a group.
pub struct DataLoaderAdapter<F> {
    communicator: Arc<dyn Communicator>,
    preparation: Preparation,
    open: F,
    epochs: usize,
}

impl<F, I, E> DataLoaderAdapter<F>
where
    F: FnMut(usize) -> I,
    I: IntoIterator<Item = Result<Batch, E>>,
    E: Display,
{
    /// Over the ranks of `communicator`. `open` gives this rank's batches of an
    /// epoch, counted from 0; another order in each is its own affair.
    pub fn new(communicator: Arc<dyn Communicator>, preparation: Preparation, open: F) -> Self {
        Self {
            communicator,
            preparation,
            open,
            epochs: 0,
        }
    }

    /// The next epoch, from its beginning. All ranks begin it together, and
    /// take from it together.
    pub fn epoch(&mut self) -> Epoch<I::IntoIter> {
        let epoch = self.epochs;
        self.epochs += 1;
        Epoch {
            communicator: Arc::clone(&self.communicator),
            preparation: self.preparation,
            source: Some((self.open)(epoch).into_iter()),
            epoch,
            round: 0,
            ready: VecDeque::new(),
            over: false,
        }
    }
}

/// This rank's shards of the batches of all ranks, on the host: all ranks work
/// on the batch of rank 0, then on that of rank 1, and so on, then on their
/// next ones.
///
/// It ends on all ranks at once, when no rank has a batch any more; until then
/// a round serves those that are there. An error is the same on every rank, and
/// ends the epoch, with what other ranks brought to its round: one in a rank's
/// stream, a batch that is refused, another sharding or another epoch than rank
/// 0 has. To take the next shard enters collectives whenever a round is
/// consumed.
pub struct Epoch<I> {
    communicator: Arc<dyn Communicator>,
    preparation: Preparation,
    /// Until it has ended.
    source: Option<I>,
    epoch: usize,
    round: usize,
    ready: VecDeque<Shard>,
    over: bool,
}

impl<I, E> Epoch<I>
where
    I: Iterator<Item = Result<Batch, E>>,
    E: Display,
{
    /// Does the next round; whether there was one.
    fn refill(&mut self) -> Result<bool> {
        let ranks = self.communicator.size();
        let (offer, shards) = self.offer(ranks);
        let offers = self.tell(offer, false)?;
        self.round += 1;
        let mut outlines = Vec::new();
        for (rank, offer) in offers.into_iter().enumerate() {
            outlines.push(match offer {
                Offer::Batch(outline) => Some(outline),
                Offer::Nothing | Offer::Left(_) => None,
                Offer::Failed(complaint) => return Err(complaint.into_error(rank)),
            });
        }
        if outlines.iter().all(Option::is_none) {
            return Ok(false);
        }
        // From here on the peers wait for this rank's part.
        self.exchange(shards, outlines)
            .inspect_err(|error| self.communicator.abandon(&error.to_string()))?;
        Ok(true)
    }

    /// This rank's next batch, in the shards of all ranks.
    fn offer(&mut self, ranks: usize) -> (Offer, Vec<Vec<Tensor>>) {
        let nothing = (0..ranks).map(|_| Vec::new()).collect();
        match self.source.as_mut().and_then(Iterator::next) {
            None => {
                self.source = None;
                (Offer::Nothing, nothing)
            }
            Some(Err(error)) => (Offer::Failed(Complaint::of_stream(error)), nothing),
            Some(Ok(batch)) => match self.preparation.cut(batch, ranks) {
                Ok((outline, shards)) => (Offer::Batch(outline), shards),
                Err(error) => (Offer::Failed(Complaint::of(error)), nothing),
            },
        }
    }

    fn exchange(&mut self, send: Vec<Vec<Tensor>>, outlines: Vec<Option<Outline>>) -> Result<()> {
        let (rank, ranks) = (self.communicator.rank(), self.communicator.size());
        let room = |outline: Outline| outline.room(self.preparation.sharding, rank, ranks);
        let shards = outlines
            .into_iter()
            .map(|outline| outline.map(room).transpose())
            .collect::<Result<Vec<_>>>()?;
        let places = |shard: &Option<Shard>| -> Vec<Tensor> {
            let entries = shard.iter().flat_map(|shard| shard.entries.values());
            entries.map(Tensor::shallow_clone).collect()
        };
        let receive: Vec<_> = shards.iter().map(places).collect();
        self.communicator.all_to_all(&send, &receive)?;
        self.ready.extend(shards.into_iter().flatten());
        Ok(())
    }

    /// How many shards are still to come, the batches of all ranks together:
    /// before the first, the length of the epoch. A collective, for all ranks
    /// to enter together.
    ///
    /// # Errors
    /// Those of the communicator, and when a rank takes the next shard instead.
    pub fn remaining(&mut self) -> Result<usize>
    where
        I: ExactSizeIterator,
    {
        let own = match (&self.source, self.over) {
            (Some(source), false) => source.len(),
            _ => 0,
        };
        let left = self
            .tell(Offer::Left(own), true)?
            .into_iter()
            .map(|offer| match offer {
                Offer::Left(batches) => batches,
                _ => 0,
            });
        Ok(self.ready.len() + left.sum::<usize>())
    }
}

impl<I> Epoch<I> {
    fn tell(&self, offer: Offer, counting: bool) -> Result<Vec<Offer>> {
        let step = Step {
            epoch: self.epoch,
            round: self.round,
            counting,
            sharding: format!("{:?}", self.preparation.sharding),
        };
        offer::gather(&*self.communicator, &Message { step, offer })
    }
}

impl<I, E> Iterator for Epoch<I>
where
    I: Iterator<Item = Result<Batch, E>>,
    E: Display,
{
    type Item = Result<Shard>;

    fn next(&mut self) -> Option<Result<Shard>> {
        if self.ready.is_empty() && !self.over {
            match self.refill() {
                Ok(more) => self.over = !more,
                Err(error) => {
                    self.over = true;
                    return Some(Err(error));
                }
            }
        }
        self.ready.pop_front().map(Ok)
    }
}
