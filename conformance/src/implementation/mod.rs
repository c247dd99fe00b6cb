//! What can be judged.
//!
//! An implementation is asked a case and answers with one file's worth of
//! tensors for each rank, whoever it is: the bundled reference on threads of
//! this process, or any program in any language behind the exchange. There is
//! no other way to the judge.

mod bundled;
mod collapse;
mod external;
mod kernel;
mod means;
mod nccl;
mod pool;
mod processes;
mod reference_rank;
mod telling;
mod threads;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fixtures::exchange::{AnswerInfo, CaseInfo, Declared, Tensors};

pub use bundled::{Bundled, launch_of};
pub use collapse::Collapse;
pub use external::{Conditions, External, Launch, LaunchError};
pub use kernel::{kernel, kernel_parser};
pub use means::{Means, Offer};
pub use nccl::nccl_communicator;
pub(crate) use reference_rank::{Question, answer_of_profile, model};
pub use reference_rank::{ReferenceRank, claims};
pub use telling::TellingCommunicator;
pub use threads::ReferenceOnThreads;

/// Something that can be asked cases.
pub trait Implementation {
    /// How it is called in reports.
    fn name(&self) -> &str;

    /// What it says of itself, on `world` ranks.
    ///
    /// # Errors
    ///
    /// If it cannot be started on that many ranks.
    fn claims(&mut self, world: usize) -> Result<Claims, Failure>;

    /// Asks it one question, which is posed to each rank in rank order, and gives
    /// the answers in that order.
    ///
    /// # Errors
    ///
    /// If not every rank answered.
    fn ask(&mut self, posed: Vec<(CaseInfo, Tensors)>) -> Result<Vec<RankAnswer>, Failure>;

    /// What its processes on `world` ranks have written since they were asked
    /// last; nothing where it has no processes.
    fn logs(&self, _world: usize) -> Vec<Log> {
        Vec::new()
    }
}

/// What was written to one stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// By whom: `rank-3` or `launcher`.
    pub who: String,
    /// `stdout` or `stderr`.
    pub stream: &'static str,
    /// The text, which may be in any encoding.
    pub bytes: Vec<u8>,
}

/// What an implementation says of itself before it is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claims {
    /// The names of the features that it claims.
    pub features: BTreeSet<String>,
    /// By which conventions it wants to be judged.
    pub declared: Declared,
    /// By what means it computes, as far as the judge decides that.
    pub means: Means,
}

/// Why there is no answer.
#[derive(Clone, Debug)]
pub enum Failure {
    /// A rank ended before it answered.
    Crashed(Collapse),
    /// A rank did not answer in time.
    Hung(Collapse),
    /// The harness could not ask.
    Harness(String),
    /// The person who judges wants to stop.
    Interrupted,
}

/// The answer of one rank, or why its answer cannot be read.
pub type RankAnswer = Result<(AnswerInfo, Tensors), String>;

/// `rank 1: why`, or `ranks 0, 2: why` for those that say the same.
pub(crate) fn told<'a>(messages: impl IntoIterator<Item = (usize, &'a str)>) -> Vec<String> {
    collapse::grouped(messages)
        .into_iter()
        .map(|(ranks, message)| format!("{}: {message}", collapse::named(&ranks)))
        .collect()
}

/// The line of a message that says most: of a Python traceback the last, of
/// other words the first.
pub(crate) fn telling_line(message: &str) -> &str {
    let line = match message.starts_with("Traceback") {
        true => message.lines().last(),
        false => message.lines().next(),
    };
    line.unwrap_or_default()
}

/// Set when the person who judges wants to stop.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Asks everybody to stop.
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether everybody should stop.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
