//! Attention in stages as an implementation that can be judged, its ranks as
//! threads of this process.

use std::cell::RefCell;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use fixtures::exchange::{AnswerInfo, AnswerStatus, AskedInfo, CaseInfo, Declared, Tensors};
use ulysses::{Communicator, CommunicatorError, CountingCommunicator, Error, ThreadCommunicator};

use super::rank::{At, Halt, Memory, Staged, Stages};
use super::{Fault, Made, Told};
use crate::implementation::{self, Claims, Collapse, Failure, Implementation, Means, RankAnswer};

/// How long ranks wait for one that does not come. Those here have milliseconds
/// of work.
const TIME_LIMIT: Duration = Duration::from_secs(1);

/// Ulysses attention put together from the reference's public parts: right, or
/// with a fault.
pub struct Assembled {
    name: &'static str,
    stages: Stages,
    /// What a rank answers in the other profiles.
    other: fn(&Told<'_>) -> Staged<Tensors>,
    /// Those of the last case, unless it went wrong.
    ranks: Vec<Rank>,
}

/// What a rank has for as long as it lives.
struct Rank {
    communicator: Arc<CountingCommunicator>,
    memory: RefCell<Memory>,
}

impl Assembled {
    /// Without a fault.
    pub fn right() -> Assembled {
        Assembled {
            name: "right",
            stages: Stages::default(),
            other: |told| told.right(),
            ranks: Vec::new(),
        }
    }

    /// Without a fault, and judged by these conventions, in which token
    /// gradients are the same.
    pub(super) fn right_in(declared: Declared) -> Assembled {
        let mut assembled = Assembled::right();
        assembled.stages.declared = declared;
        assembled
    }

    /// By which conventions it wants to be judged.
    pub(super) fn declared(&self) -> Declared {
        self.stages.declared
    }

    /// With this fault.
    pub fn with(fault: &Fault) -> Assembled {
        let mut assembled = Assembled::right();
        assembled.name = fault.name;
        match &fault.made {
            Made::InAttention { make, .. } => make(&mut assembled.stages),
            Made::InProfile { answer, .. } => assembled.other = *answer,
        }
        assembled
    }

    /// Ranks that have what they had after the last case, or fresh ones.
    fn take_ranks(&mut self, world: usize) -> Vec<Rank> {
        let ranks = std::mem::take(&mut self.ranks);
        if ranks.len() == world {
            return ranks;
        }
        let rank = |communicator: ThreadCommunicator| {
            let communicator = Arc::new(communicator.with_time_limit(TIME_LIMIT));
            Rank {
                communicator: Arc::new(CountingCommunicator::new(communicator)),
                memory: RefCell::default(),
            }
        };
        ThreadCommunicator::world(world)
            .into_iter()
            .map(rank)
            .collect()
    }
}

impl Implementation for Assembled {
    fn name(&self) -> &str {
        self.name
    }

    fn claims(&mut self, _world: usize) -> Result<Claims, Failure> {
        Ok(Claims {
            declared: self.stages.declared,
            ..implementation::claims(Means::default()).map_err(Failure::Harness)?
        })
    }

    fn ask(&mut self, posed: Vec<(CaseInfo, Tensors)>) -> Result<Vec<RankAnswer>, Failure> {
        let ranks = self.take_ranks(posed.len());
        let (stages, other) = (&self.stages, self.other);
        let ended: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = ranks
                .into_iter()
                .zip(&posed)
                .map(|(rank, (info, inputs))| {
                    scope.spawn(move || {
                        let answered = rank.answer(stages, other, info, inputs);
                        (rank, answered)
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join()).collect()
        });
        if let Some(rank) = ended.iter().position(Result::is_err) {
            return Err(Failure::Crashed(Collapse {
                sentence: format!("rank {rank} died"),
                logs: Vec::new(),
                is_of_ranks: true,
            }));
        }
        let (ranks, answers): (Vec<Rank>, Vec<_>) = ended.into_iter().flatten().unzip();
        if let Some(waited) = answers.iter().find_map(|(answered, _)| hung(answered)) {
            return Err(Failure::Hung(waited));
        }
        if answers.iter().all(|(answered, _)| answered.is_ok()) {
            self.ranks = ranks;
        }
        Ok(answers
            .into_iter()
            .map(|(a, info)| Ok(read(a, info)))
            .collect())
    }
}

impl Rank {
    fn answer(
        &self,
        stages: &Stages,
        other: fn(&Told<'_>) -> Staged<Tensors>,
        info: &CaseInfo,
        inputs: &Tensors,
    ) -> (Staged<Tensors>, AnswerInfo) {
        self.communicator.reset();
        let start = Instant::now();
        let communicator: Arc<dyn Communicator> = Arc::clone(&self.communicator) as _;
        let answered = match &info.asked {
            AskedInfo::Attention(asked) => {
                let at = At {
                    told: info,
                    info: asked,
                    communicator: &communicator,
                    memory: &self.memory,
                };
                stages.answer(&at, inputs)
            }
            _ => other(&Told {
                communicator: &communicator,
                info,
                inputs,
            }),
        };
        let info = AnswerInfo {
            status: AnswerStatus::Ok,
            message: String::new(),
            elapsed_s: start.elapsed().as_secs_f64(),
            peak_memory_bytes: None,
            bytes_sent: Some(self.communicator.traffic().off_rank_bytes),
        };
        (answered, info)
    }
}

/// The answer as the judge reads it.
fn read(answered: Staged<Tensors>, mut info: AnswerInfo) -> (AnswerInfo, Tensors) {
    match answered {
        Ok(tensors) => (info, tensors),
        Err(halt) => {
            info.status = AnswerStatus::Error;
            info.message = halt.to_string();
            (info, Tensors::new())
        }
    }
}

/// For whom a rank waited in vain, if it did.
fn hung(answered: &Staged<Tensors>) -> Option<Collapse> {
    match answered {
        Err(Halt::Reference(Error::Communicator(error @ CommunicatorError::TimedOut { .. }))) => {
            Some(Collapse {
                sentence: error.to_string(),
                logs: Vec::new(),
                is_of_ranks: true,
            })
        }
        _ => None,
    }
}
