//! A communicator that counts what another one carries.
//!
//! Ulysses promises a constant number of collectives and a volume that falls
//! with the number of ranks; this is how one sees that it keeps to it. Counts
//! are of what this rank hands over, whatever the wire adds to it.

use super::{Communicator, CommunicatorError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tch::Tensor;

/// What one rank handed to its communicator and the groups split off from it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Exchanges of blocks entered.
    pub all_to_all_calls: u64,
    /// Bytes of blocks handed over, those for this rank itself included.
    pub all_to_all_bytes: u64,
    /// Bytes of blocks handed over for other ranks.
    pub off_rank_bytes: u64,
    /// Gathers of words entered.
    pub all_gather_calls: u64,
    /// Bytes of words handed over.
    pub all_gather_bytes: u64,
}

/// Counts calls and bytes, and passes everything on to `inner`.
///
/// The counters are those of the groups that are split off as well; the split
/// itself counts as nothing. To count a group alone, put a counter around it.
pub struct CountingCommunicator {
    inner: Arc<dyn Communicator>,
    traffic: Arc<Mutex<Traffic>>,
}

impl CountingCommunicator {
    /// Counts the traffic of `inner` from zero.
    pub fn new(inner: Arc<dyn Communicator>) -> Self {
        Self {
            inner,
            traffic: Arc::default(),
        }
    }

    /// The traffic since the beginning or the last [`reset`](Self::reset).
    pub fn traffic(&self) -> Traffic {
        *self.lock()
    }

    /// Starts again from zero.
    pub fn reset(&self) {
        *self.lock() = Traffic::default();
    }

    fn lock(&self) -> MutexGuard<'_, Traffic> {
        // Plain numbers are valid whatever their last holder was doing.
        self.traffic.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Communicator for CountingCommunicator {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn all_gather(&self, words: &[i64]) -> Result<Vec<Vec<i64>>, CommunicatorError> {
        {
            let mut traffic = self.lock();
            traffic.all_gather_calls += 1;
            traffic.all_gather_bytes += size_of_val(words) as u64;
        }
        self.inner.all_gather(words)
    }

    fn all_to_all(
        &self,
        send: &[Vec<Tensor>],
        receive: &[Vec<Tensor>],
    ) -> Result<(), CommunicatorError> {
        {
            let mut traffic = self.lock();
            traffic.all_to_all_calls += 1;
            for (peer, blocks) in send.iter().enumerate() {
                let bytes: usize = blocks.iter().map(bytes_of).sum();
                traffic.all_to_all_bytes += bytes as u64;
                if peer != self.rank() {
                    traffic.off_rank_bytes += bytes as u64;
                }
            }
        }
        self.inner.all_to_all(send, receive)
    }

    fn split(&self, color: usize) -> Result<Arc<dyn Communicator>, CommunicatorError> {
        Ok(Arc::new(CountingCommunicator {
            inner: self.inner.split(color)?,
            traffic: Arc::clone(&self.traffic),
        }))
    }

    fn abandon(&self, reason: &str) {
        self.inner.abandon(reason);
    }
}

/// An undefined block has no dtype and counts as nothing; `inner` refuses it.
fn bytes_of(block: &Tensor) -> usize {
    block
        .f_kind()
        .map_or(0, |kind| block.numel() * kind.elt_size_in_bytes())
}
