//! What can go wrong between ranks.

use std::time::Duration;

/// Why a collective was not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CommunicatorError {
    /// A rank is gone and will never enter the collective.
    #[error("rank {rank} left before {operation}: {reason}")]
    Left {
        /// The collective that cannot be done.
        operation: &'static str,
        /// The rank that is gone.
        rank: usize,
        /// Why it went, in its own words where it had some.
        reason: String,
    },
    /// The collective was not done within the time limit.
    #[error("{operation} was not done within {limit:?}: {}", waited_for(missing))]
    TimedOut {
        /// The collective that was given up.
        operation: &'static str,
        /// The ranks that did not come, where that can be known.
        missing: Vec<usize>,
        /// How long this rank waited.
        limit: Duration,
    },
    /// A rank does something that does not fit what its peers do.
    #[error("rank {rank} {problem} in {operation}; make every rank do the same")]
    Mismatch {
        /// The collective.
        operation: &'static str,
        /// The rank that does not fit.
        rank: usize,
        /// What it did, as a predicate.
        problem: String,
    },
    /// The communicator can no longer be used, or never could be.
    #[error("{operation}: the communicator cannot be used: {reason}")]
    Unusable {
        /// What was asked for.
        operation: &'static str,
        /// Why it is refused.
        reason: String,
    },
    /// MPI reported an error.
    #[error("{operation}: MPI: {message}")]
    Mpi {
        /// The collective.
        operation: &'static str,
        /// MPI's own words.
        message: String,
    },
    /// NCCL reported an error.
    #[error("{operation}: NCCL: {message}")]
    Nccl {
        /// The collective, or the call.
        operation: &'static str,
        /// NCCL's own words.
        message: String,
    },
    /// libtorch could not read or write a block.
    #[error("{operation}: libtorch: {message}")]
    Libtorch {
        /// The collective.
        operation: &'static str,
        /// libtorch's own words.
        message: String,
    },
}

impl CommunicatorError {
    /// The rank at fault, where one is known to be.
    pub fn rank(&self) -> Option<usize> {
        match self {
            Self::Left { rank, .. } | Self::Mismatch { rank, .. } => Some(*rank),
            Self::TimedOut { missing, .. } => missing.first().copied(),
            _ => None,
        }
    }

    /// The same of a collective that was made of the one that failed.
    #[cfg(feature = "nccl")]
    pub(crate) fn in_operation(mut self, whole: &'static str) -> Self {
        match &mut self {
            Self::Left { operation, .. }
            | Self::TimedOut { operation, .. }
            | Self::Mismatch { operation, .. }
            | Self::Unusable { operation, .. }
            | Self::Mpi { operation, .. }
            | Self::Nccl { operation, .. }
            | Self::Libtorch { operation, .. } => *operation = whole,
        }
        self
    }

    pub(crate) fn libtorch(operation: &'static str) -> impl Fn(tch::TchError) -> Self {
        move |error| Self::Libtorch {
            operation,
            message: error.to_string(),
        }
    }
}

fn waited_for(missing: &[usize]) -> String {
    match missing {
        [] => "some rank did not come".to_owned(),
        [rank] => format!("rank {rank} did not come"),
        ranks => format!("ranks {ranks:?} did not come"),
    }
}
