//! The bundled reference with its ranks as threads of this process.

use std::sync::Arc;
use std::thread;

use fixtures::exchange::{AnswerStatus, CaseInfo, Tensors};
use tch::Device;
use ulysses::{DeviceChoice, Kernel, NoCuda, ThreadCommunicator};

use super::{Claims, Collapse, Failure, Implementation, Means, RankAnswer, ReferenceRank, claims};

/// The bundled reference with its ranks as threads of this process: no
/// launcher, no MPI, no files.
pub struct ReferenceOnThreads {
    claims: Claims,
    /// Where ranks compute, in turn.
    devices: Vec<Device>,
    /// Those of the last case, unless it went wrong.
    ranks: Vec<ReferenceRank>,
}

impl ReferenceOnThreads {
    /// The reference around this core attention, its ranks dealt out over the
    /// devices.
    ///
    /// # Errors
    ///
    /// If a device is not there, or the kernel does nothing on it.
    pub fn new(kernel: Kernel, choice: DeviceChoice) -> Result<ReferenceOnThreads, String> {
        let devices = choice
            .devices()
            .map_err(|error: NoCuda| error.to_string())?;
        let means = Means {
            device: devices[0],
            kernel,
        };
        Ok(ReferenceOnThreads {
            claims: claims(means)?,
            devices,
            ranks: Vec::new(),
        })
    }

    /// Ranks that have what they had after the last case, or fresh ones.
    fn take_ranks(&mut self, world: usize) -> Vec<ReferenceRank> {
        let ranks = std::mem::take(&mut self.ranks);
        if ranks.len() == world {
            return ranks;
        }
        let kernel = self.claims.means.kernel;
        ThreadCommunicator::world(world)
            .into_iter()
            .zip(self.devices.iter().cycle())
            .map(|(communicator, &device)| {
                ReferenceRank::new(Arc::new(communicator), Means { device, kernel })
            })
            .collect()
    }
}

impl Implementation for ReferenceOnThreads {
    fn name(&self) -> &str {
        "reference"
    }

    fn claims(&mut self, _world: usize) -> Result<Claims, Failure> {
        Ok(self.claims.clone())
    }

    fn ask(&mut self, posed: Vec<(CaseInfo, Tensors)>) -> Result<Vec<RankAnswer>, Failure> {
        let ranks = self.take_ranks(posed.len());
        thread::scope(|scope| {
            let ranks: Vec<_> = ranks
                .into_iter()
                .zip(&posed)
                .map(|(mut rank, (info, inputs))| {
                    scope.spawn(move || {
                        let answer = rank.answer(info, inputs);
                        (rank, answer)
                    })
                })
                .collect();
            // Every thread is waited for before one that panicked is told of:
            // its communicator, dropped, has set the others free.
            let answers: Vec<_> = ranks.into_iter().map(|rank| rank.join()).collect();
            if let Some(rank) = answers.iter().position(Result::is_err) {
                return Err(Failure::Crashed(Collapse {
                    sentence: format!("rank {rank} panicked"),
                    logs: Vec::new(),
                    is_of_ranks: true,
                }));
            }
            let (ranks, answers): (Vec<_>, Vec<_>) = answers.into_iter().flatten().unzip();
            if answers
                .iter()
                .all(|(info, _)| info.status == AnswerStatus::Ok)
            {
                self.ranks = ranks;
            }
            Ok(answers.into_iter().map(Ok).collect())
        })
    }
}
