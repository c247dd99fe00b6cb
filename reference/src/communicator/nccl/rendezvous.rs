//! How the ranks of an NCCL communicator find each other, and who is missing
//! when they do not: what NCCL itself cannot say.
//!
//! Used at the beginning, when a communicator is split, and when a collective
//! is given up; never while all is well.

use crate::communicator::{Communicator, CommunicatorError};
use std::{sync::Arc, time::Duration};
use tch::{Device, TchError, Tensor};

/// A place on the host where ranks meet.
pub trait Rendezvous: Send + Sync {
    /// This rank, counted from zero.
    fn rank(&self) -> usize;

    /// How many ranks there are.
    fn size(&self) -> usize;

    /// What every rank brings, in rank order, for as long a wait as `limit` at
    /// most. All ranks call it together; `operation` is for whom and for errors.
    ///
    /// # Errors
    /// The ranks that did not come, or one that has left.
    fn gather(
        &self,
        operation: &'static str,
        brought: &[u8],
        limit: Duration,
    ) -> Result<Vec<Vec<u8>>, CommunicatorError>;

    /// A place for the ranks that gave the same `color`, in the order of their
    /// ranks here. All ranks call it together.
    ///
    /// # Errors
    /// As for [`Rendezvous::gather`].
    fn split(
        &self,
        color: usize,
        limit: Duration,
    ) -> Result<Arc<dyn Rendezvous>, CommunicatorError>;

    /// Tells the others that this rank takes no further part, and why; where
    /// that cannot be told, nothing.
    fn leave(&self, reason: &str);

    /// A rank that has told so, and why, if one is known: to be asked often.
    fn departed(&self) -> Option<(usize, String)> {
        None
    }
}

/// A rendezvous over a communicator for tensors of the host, MPI or threads.
///
/// It waits as long as that communicator does, which should be as long as the
/// one that is made with it, and which has no other use meanwhile.
pub struct HostRendezvous {
    communicator: Arc<dyn Communicator>,
}

impl HostRendezvous {
    /// The ranks of `communicator` meet.
    pub fn new(communicator: Arc<dyn Communicator>) -> HostRendezvous {
        HostRendezvous { communicator }
    }

    /// An exchange of host tensors, and not a gather, because over MPI the
    /// former alone knows who has not come.
    fn exchange(&self, own: &Tensor, lengths: &[i64]) -> Result<Vec<Tensor>, CommunicatorError> {
        let libtorch = CommunicatorError::libtorch("all_to_all");
        let kind = own.f_kind().map_err(&libtorch)?;
        let room = |&length| Tensor::f_zeros([length], (kind, Device::Cpu));
        let rooms: Result<Vec<Tensor>, TchError> = lengths.iter().map(room).collect();
        let rooms = rooms.map_err(&libtorch)?;
        let lists = |tensors: &mut dyn Iterator<Item = &Tensor>| -> Vec<Vec<Tensor>> {
            tensors.map(|tensor| vec![tensor.shallow_clone()]).collect()
        };
        let send = lists(&mut lengths.iter().map(|_| own));
        self.communicator
            .all_to_all(&send, &lists(&mut rooms.iter()))?;
        Ok(rooms)
    }

    fn met(&self, brought: &[u8]) -> Result<Vec<Vec<u8>>, CommunicatorError> {
        let libtorch = CommunicatorError::libtorch("all_to_all");
        let tensor = |length: usize| Tensor::f_from_slice(&[length as i64]).map_err(&libtorch);
        let ones = vec![1; self.size()];
        let lengths = self.exchange(&tensor(brought.len())?, &ones)?;
        let lengths: Result<Vec<i64>, TchError> =
            lengths.iter().map(|one| one.f_int64_value(&[0])).collect();
        let own = Tensor::f_from_slice(brought).map_err(&libtorch)?;
        let texts = self.exchange(&own, &lengths.map_err(&libtorch)?)?;
        let bytes = |text: &Tensor| Vec::<u8>::try_from(text).map_err(&libtorch);
        texts.iter().map(bytes).collect()
    }
}

impl Rendezvous for HostRendezvous {
    fn rank(&self) -> usize {
        self.communicator.rank()
    }

    fn size(&self) -> usize {
        self.communicator.size()
    }

    fn gather(
        &self,
        operation: &'static str,
        brought: &[u8],
        _limit: Duration,
    ) -> Result<Vec<Vec<u8>>, CommunicatorError> {
        self.met(brought)
            .map_err(|error| error.in_operation(operation))
    }

    fn split(
        &self,
        color: usize,
        _limit: Duration,
    ) -> Result<Arc<dyn Rendezvous>, CommunicatorError> {
        let group = self.communicator.split(color)?;
        Ok(Arc::new(HostRendezvous::new(group)))
    }

    fn leave(&self, reason: &str) {
        self.communicator.abandon(reason);
    }
}
