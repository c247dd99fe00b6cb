//! What can be judged.
//!
//! An implementation is asked a case and answers with one file's worth of
//! tensors for each rank, whoever it is: the bundled reference on threads of
//! this process, or any program in any language behind the exchange. There is
//! no other way to the judge.

mod bundled;
mod external;
mod kernel;
mod pool;
mod processes;
mod reference_rank;
mod threads;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fixtures::exchange::{AnswerInfo, Tensors};
use fixtures::{Case, Inputs};

pub use bundled::{Bundled, launch_of};
pub use external::{Conditions, External, Launch, LaunchError};
pub use kernel::{kernel_name, kernel_parser};
pub use reference_rank::{ReferenceRank, features};
pub use threads::ReferenceOnThreads;

/// Something that can be asked cases.
pub trait Implementation {
    /// How it is called in reports.
    fn name(&self) -> &str;

    /// The names of the features that it claims, on `world` ranks.
    ///
    /// # Errors
    ///
    /// If it cannot be started on that many ranks.
    fn claims(&mut self, world: usize) -> Result<BTreeSet<String>, Failure>;

    /// Asks it one case, and gives the answers of all ranks, in rank order.
    /// `inputs` are those of the case.
    ///
    /// # Errors
    ///
    /// If not every rank answered.
    fn ask(&mut self, case: &Case, inputs: &Inputs) -> Result<Vec<RankAnswer>, Failure>;
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

/// How a group of ranks came to its end.
#[derive(Clone, Debug)]
pub struct Collapse {
    /// Which rank, and what it was doing, in a sentence.
    pub sentence: String,
    /// What ranks and launcher had written last, a line each.
    pub logs: Vec<String>,
}

/// `rank 1: why`, or `ranks 0, 2: why` for those that say the same.
pub(crate) fn told<'a>(messages: impl IntoIterator<Item = (usize, &'a str)>) -> Vec<String> {
    let mut groups: Vec<(Vec<String>, &str)> = Vec::new();
    for (rank, message) in messages {
        match groups.iter_mut().find(|(_, same)| *same == message) {
            Some((ranks, _)) => ranks.push(rank.to_string()),
            None => groups.push((vec![rank.to_string()], message)),
        }
    }
    groups
        .into_iter()
        .map(|(ranks, message)| {
            let s = if ranks.len() == 1 { "" } else { "s" };
            format!("rank{s} {}: {message}", ranks.join(", "))
        })
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
