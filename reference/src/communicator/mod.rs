//! How ranks talk to one another.
//!
//! A [`Communicator`] has two collectives, which are all that Ulysses needs: a
//! gather of a few words, and an exchange of blocks between every pair of
//! ranks. It can be split into groups, and [`collectives`] makes sums and
//! gathers of tensors of it. [`threads`] runs ranks as threads of one process,
//! [`mpi`] as processes, `nccl` as either on GPUs of their own, and [`counting`]
//! counts the traffic of any other.
//!
//! The exchange takes *lists of strided views*, not one flat buffer. So Q, K
//! and V travel in one collective instead of three, and whoever moves the data
//! can write each element straight to where it belongs: no packing, transpose
//! or concatenation is forced on a communicator that can do without.
//!
//! Not here: what the blocks mean (see [`exchange`](crate::exchange)), and
//! anything differentiable. A communicator moves data and records no graph.
//! Nor does libtorch learn that a tensor was received into: none should be that a
//! graph has saved.

mod blocks;
pub mod collectives;
pub mod counting;
mod error;
mod groups;
pub mod mpi;
#[cfg(feature = "nccl")]
pub mod nccl;
mod strided;
pub mod threads;

pub use error::CommunicatorError;

use std::sync::Arc;
use tch::Tensor;

/// One rank's end of a group of ranks.
///
/// All ranks call the same collectives in the same order. An implementation
/// never waits for ever: a peer that left, failed or does not come becomes a
/// [`CommunicatorError`] that names it.
pub trait Communicator: Send + Sync {
    /// This rank, counted from zero.
    fn rank(&self) -> usize;

    /// How many ranks there are.
    fn size(&self) -> usize;

    /// Every rank's words, in rank order. Every rank gives equally many.
    ///
    /// # Errors
    /// When a rank left, did not come within the time limit, entered another
    /// collective, or gave another number of words.
    fn all_gather(&self, words: &[i64]) -> Result<Vec<Vec<i64>>, CommunicatorError>;

    /// Sends `send[p]` to each rank p, and writes what rank p sent here to
    /// `receive[p]`, in place.
    ///
    /// Each list holds one list of blocks for each rank, itself included; a
    /// list or a block may be empty. A block is a tensor of any shape, size and
    /// strides, and the n-th block sent is written to the n-th to be received,
    /// which has the same shape and dtype.
    ///
    /// # Errors
    /// As for [`Communicator::all_gather`], and when what is sent does not fit
    /// what is to be received. The contents of `receive` are then undefined.
    fn all_to_all(
        &self,
        send: &[Vec<Tensor>],
        receive: &[Vec<Tensor>],
    ) -> Result<(), CommunicatorError>;

    /// The group of the ranks that gave the same `color`, in the order of their
    /// ranks here. All ranks call it together.
    ///
    /// The group has collectives and ranks of its own: errors of it name ranks
    /// of the group. It waits as long as this communicator did when it was
    /// split, and may outlive it.
    ///
    /// # Errors
    /// As for [`Communicator::all_gather`].
    fn split(&self, color: usize) -> Result<Arc<dyn Communicator>, CommunicatorError>;

    /// Tells the peers that this rank takes no further part, and why, so that
    /// they need not wait for the time limit.
    ///
    /// Where it is told, the groups that were split off learn it too. A
    /// courtesy: by default nothing is said, and peers meet the time limit.
    fn abandon(&self, reason: &str) {
        let _ = reason;
    }
}
