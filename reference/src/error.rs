//! The one error type of the crate.
//!
//! Every error is a value that names the rank, the argument, the problem and
//! the remedy. Errors compare equal when they say the same, because a refusal
//! must be the *same* on every rank: a rank that waits for one which refused
//! would hang.

use crate::communicator::CommunicatorError;
use std::fmt;

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation could not be done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument that cannot be right; no data has moved.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Ranks could not talk to one another.
    #[error(transparent)]
    Communicator(#[from] CommunicatorError),
    /// libtorch failed, out of memory for instance.
    #[error("libtorch: {0}")]
    Libtorch(String),
    /// A pass of a custom autograd function panicked.
    #[error("{pass} panicked: {message}")]
    Panicked {
        /// `forward`, `backward` or `a gradient hook`.
        pass: &'static str,
        /// What the panic said.
        message: String,
    },
}

impl Error {
    /// The rank at fault, where one is.
    pub fn rank(&self) -> Option<usize> {
        match self {
            Error::Refused(refusal) => refusal.rank,
            Error::Communicator(error) => error.rank(),
            Error::Libtorch(_) | Error::Panicked { .. } => None,
        }
    }

    /// The argument that was refused: `query`, for instance, or `slopes`.
    pub fn argument(&self) -> Option<&'static str> {
        match self {
            Error::Refused(refusal) => Some(refusal.argument),
            _ => None,
        }
    }
}

// The text is kept rather than the value: a TchError can neither be cloned nor
// compared.
impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        Error::Libtorch(error.to_string())
    }
}

/// What is wrong with an argument, and what to do about it.
///
/// Reads as one sentence: ``rank 2: `key` has head size 64, but `query` has
/// 80; give both the same head size``.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The rank that gave the argument; `None` when no single rank is at fault.
    pub rank: Option<usize>,
    /// The name of the argument.
    pub argument: &'static str,
    /// What is wrong, as the predicate of the argument.
    pub problem: String,
    /// What to do, as an imperative.
    pub remedy: String,
}

/// A refusal for which no single rank is to blame.
pub(crate) fn refuse<T>(
    argument: &'static str,
    problem: impl Into<String>,
    remedy: impl Into<String>,
) -> Result<T> {
    Err(Error::from(Refusal {
        rank: None,
        argument,
        problem: problem.into(),
        remedy: remedy.into(),
    }))
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(rank) = self.rank {
            write!(f, "rank {rank}: ")?;
        }
        write!(f, "`{}` {}; {}", self.argument, self.problem, self.remedy)
    }
}

impl std::error::Error for Refusal {}
