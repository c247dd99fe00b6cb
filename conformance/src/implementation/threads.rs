//! The bundled reference with its ranks as threads of this process.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::thread;

use fixtures::{Case, Inputs, exchange};
use ulysses::{Kernel, ThreadCommunicator};

use super::{Collapse, Failure, Implementation, RankAnswer, answer, features};

/// The bundled reference with its ranks as threads of this process: no
/// launcher, no MPI, no files.
pub struct ReferenceOnThreads {
    kernel: Kernel,
}

impl ReferenceOnThreads {
    /// The reference around this core attention.
    pub fn new(kernel: Kernel) -> ReferenceOnThreads {
        ReferenceOnThreads { kernel }
    }
}

impl Implementation for ReferenceOnThreads {
    fn name(&self) -> &str {
        "reference"
    }

    fn claims(&mut self, _world: usize) -> Result<BTreeSet<String>, Failure> {
        Ok(features())
    }

    fn ask(&mut self, case: &Case, inputs: &Inputs) -> Result<Vec<RankAnswer>, Failure> {
        let shards = exchange::shards(case, inputs, 0);
        let kernel = self.kernel;
        thread::scope(|scope| {
            let ranks: Vec<_> = ThreadCommunicator::world(case.world)
                .into_iter()
                .zip(&shards)
                .map(|(communicator, (info, inputs))| {
                    scope.spawn(move || answer(info, inputs, Arc::new(communicator), kernel))
                })
                .collect();
            // Every thread is waited for before one that panicked is told of:
            // its communicator, dropped, has set the others free.
            let answers: Vec<_> = ranks.into_iter().map(|rank| rank.join()).collect();
            match answers.iter().position(Result::is_err) {
                Some(rank) => Err(Failure::Crashed(Collapse {
                    sentence: format!("rank {rank} panicked"),
                    logs: Vec::new(),
                })),
                None => Ok(answers.into_iter().flatten().map(Ok).collect()),
            }
        })
    }
}
