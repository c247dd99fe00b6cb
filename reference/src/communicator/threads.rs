//! Ranks as threads of one process.
//!
//! Every collective is made of *rounds*. A rank brings one parcel for each
//! rank to the round and leaves with the parcels for itself, once everybody
//! has brought theirs. In an exchange a parcel holds shallow clones of the
//! sender's views, and each receiver copies view to view: every element is
//! written once, to where it belongs. A second round then tells all ranks that
//! nobody reads their buffers any more, and whether somebody failed.
//!
//! No rank waits for one that will not come. Dropping a communicator, be it at
//! the end of a thread or while it panics, tells the peers; so does
//! [`abandon`](Communicator::abandon); and there is a time limit for a rank
//! that is simply stuck. The first such failure is kept and given to every
//! rank from then on, for ranks that have lost step cannot find it again.
//!
//! Ranks may share a GPU, whose stream keeps what they give it in order. torch
//! runs the backward of all threads on one thread of the device, where a
//! collective would wait for itself: a thread that was once in an exchange keeps
//! its backward to itself.

use super::{Communicator, CommunicatorError, blocks, groups::Groups};
use crate::device;
use std::{
    hint,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};
use tch::Tensor;

const TIME_LIMIT: Duration = Duration::from_secs(300);

/// To sleep and to be woken costs tens of microseconds, as much as the exchange
/// of a short sequence. Ranks that do the same work come within that time of
/// one another, so each stays awake for it, where every rank has a core.
const AWAKE: Duration = Duration::from_micros(100);

/// One rank's end of a world of threads.
///
/// Move each into the thread of its rank; all ranks must be served, each by
/// one thread at a time.
pub struct ThreadCommunicator {
    rank: usize,
    size: usize,
    time_limit: Duration,
    world: Arc<World>,
    /// This rank's ends of the groups that were split off.
    groups: Groups<ThreadCommunicator>,
}

struct World {
    round: Mutex<Round>,
    /// Counts what the ranks that wait should look at: set with the lock held,
    /// and read without it by those that do not sleep yet.
    changes: AtomicU64,
    changed: Condvar,
    /// How long a rank looks out for a change before it sleeps.
    awake: Duration,
}

/// The state that the ranks share.
struct Round {
    /// What each rank has brought to the round that is open.
    brought: Vec<Option<Brought>>,
    /// What awaits each rank from the round that closed last, in order of
    /// sender. No round can close before all of it was taken: who has not
    /// taken has not brought.
    awaiting: Vec<Option<Vec<Parcel>>>,
    /// Why a rank is gone.
    departed: Vec<Option<String>>,
    /// The first failure of the world.
    broken: Option<CommunicatorError>,
}

struct Brought {
    operation: &'static str,
    parcels: Vec<Parcel>,
}

/// What one rank gives to another in a round; most of it empty in each.
#[derive(Default)]
struct Parcel {
    words: Vec<i64>,
    blocks: Vec<Tensor>,
    /// The receiver's end of a group.
    end: Option<ThreadCommunicator>,
    failure: Option<CommunicatorError>,
}

impl ThreadCommunicator {
    /// The ends of a world of `size` ranks, in rank order.
    ///
    /// Where the machine has a core for each, a rank that waits keeps its core
    /// busy for up to 0.1 ms before it sleeps.
    pub fn world(size: usize) -> Vec<ThreadCommunicator> {
        let vacant = || (0..size).map(|_| None);
        let world = Arc::new(World {
            round: Mutex::new(Round {
                brought: vacant().collect(),
                awaiting: (0..size).map(|_| None).collect(),
                departed: vec![None; size],
                broken: None,
            }),
            changes: AtomicU64::new(0),
            changed: Condvar::new(),
            awake: if size <= thread::available_parallelism().map_or(1, usize::from) {
                AWAKE
            } else {
                Duration::ZERO
            },
        });
        (0..size)
            .map(|rank| Self {
                rank,
                size,
                time_limit: TIME_LIMIT,
                world: Arc::clone(&world),
                groups: Groups::new(),
            })
            .collect()
    }

    /// Waits at most `time_limit` for the peers in each round; 300 s unless
    /// told.
    #[must_use]
    pub fn with_time_limit(mut self, time_limit: Duration) -> Self {
        self.time_limit = time_limit;
        self
    }

    /// Brings one parcel for each rank, and gives back one from each rank.
    fn meet(
        &self,
        operation: &'static str,
        parcels: Vec<Parcel>,
    ) -> Result<Vec<Parcel>, CommunicatorError> {
        let begun = Instant::now();
        let mut round = self.world.lock();
        round.bring(self.rank, Brought { operation, parcels })?;
        if round.is_settled(self.rank) {
            self.world.announce();
        } else {
            round = self.world.look_out(round);
        }
        loop {
            // A round that closed is good, whatever happened since.
            if let Some(parcels) = round.awaiting[self.rank].take() {
                return Ok(parcels);
            }
            let left = self.time_limit.saturating_sub(begun.elapsed());
            let failure = round.failure(operation).or_else(|| {
                left.is_zero().then(|| CommunicatorError::TimedOut {
                    operation,
                    missing: round.missing().collect(),
                    limit: self.time_limit,
                })
            });
            if let Some(failure) = failure {
                round.broken = Some(failure.clone());
                self.world.announce();
                return Err(failure);
            }
            let wait = self.world.changed.wait_timeout(round, left);
            round = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn depart(&self, reason: &str) {
        let mut round = self.world.lock();
        round.departed[self.rank].get_or_insert_with(|| reason.to_owned());
        self.world.announce();
    }
}

impl Communicator for ThreadCommunicator {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_gather(&self, words: &[i64]) -> Result<Vec<Vec<i64>>, CommunicatorError> {
        let operation = "all_gather";
        let parcel = || Parcel {
            words: words.to_vec(),
            ..Parcel::default()
        };
        let parcels = (0..self.size).map(|_| parcel()).collect();
        let gathered: Vec<_> = self
            .meet(operation, parcels)?
            .into_iter()
            .map(|parcel| parcel.words)
            .collect();
        // Every rank sees the same lists, so every rank comes to the same end.
        let counts = gathered.iter().map(Vec::len);
        match counts
            .enumerate()
            .find(|&(_, count)| count != gathered[0].len())
        {
            None => Ok(gathered),
            Some((rank, count)) => Err(CommunicatorError::Mismatch {
                operation,
                rank,
                problem: format!("gave {count} words while rank 0 gave {}", gathered[0].len()),
            }),
        }
    }

    fn all_to_all(
        &self,
        send: &[Vec<Tensor>],
        receive: &[Vec<Tensor>],
    ) -> Result<(), CommunicatorError> {
        let operation = "all_to_all";
        let size = self.size;
        // The backward of what is exchanged has an exchange as well.
        device::keep_backward_on_this_thread();
        // A communicator records no graph, least of all one across threads.
        let _guard = tch::no_grad_guard();
        let failure = blocks::expect_lists(operation, self.rank, size, send, receive).err();
        let parcels = (0..size)
            .map(|peer| Parcel {
                blocks: match (&failure, send.get(peer)) {
                    (None, Some(blocks)) => blocks.iter().map(Tensor::shallow_clone).collect(),
                    _ => Vec::new(),
                },
                failure: failure.clone(),
                ..Parcel::default()
            })
            .collect();
        let arrived = first_failure(self.meet(operation, parcels)?)?;
        let failure =
            arrived
                .iter()
                .zip(receive)
                .enumerate()
                .find_map(|(sender, (parcel, places))| {
                    let (from, to) = ((sender, &parcel.blocks[..]), (self.rank, &places[..]));
                    blocks::place(operation, from, to).err()
                });
        let parcels = (0..size)
            .map(|_| Parcel {
                failure: failure.clone(),
                ..Parcel::default()
            })
            .collect();
        first_failure(self.meet("the end of all_to_all", parcels)?)?;
        Ok(())
    }

    /// The first rank of each group makes its ends and gives them to the others.
    fn split(&self, color: usize) -> Result<Arc<dyn Communicator>, CommunicatorError> {
        let operation = "split";
        let words = vec![color.cast_signed() as i64];
        let parcel = || Parcel {
            words: words.clone(),
            ..Parcel::default()
        };
        let colors = self.meet(operation, (0..self.size).map(|_| parcel()).collect())?;
        let members: Vec<usize> = (0..self.size)
            .filter(|&rank| colors[rank].words == words)
            .collect();
        let mut parcels: Vec<_> = (0..self.size).map(|_| Parcel::default()).collect();
        if members.first() == Some(&self.rank) {
            let ends = ThreadCommunicator::world(members.len());
            for (&member, end) in members.iter().zip(ends) {
                parcels[member].end = Some(end.with_time_limit(self.time_limit));
            }
        }
        let arrived = self.meet("the end of split", parcels)?;
        let end = arrived.into_iter().find_map(|parcel| parcel.end);
        let end = Arc::new(end.ok_or_else(|| CommunicatorError::Unusable {
            operation,
            reason: "no rank gave this one an end of its group".to_owned(),
        })?);
        self.groups.add(&end);
        Ok(end)
    }

    fn abandon(&self, reason: &str) {
        self.depart(reason);
        self.groups.abandon(reason);
    }
}

impl Drop for ThreadCommunicator {
    fn drop(&mut self) {
        let panicked = thread::panicking();
        self.depart(if panicked {
            "its thread panicked"
        } else {
            "its communicator was dropped"
        });
    }
}

/// The parcels, unless one tells of a failure; all ranks see the same ones, so
/// all return the same error.
fn first_failure(parcels: Vec<Parcel>) -> Result<Vec<Parcel>, CommunicatorError> {
    match parcels.iter().find_map(|parcel| parcel.failure.clone()) {
        None => Ok(parcels),
        Some(failure) => Err(failure),
    }
}

impl World {
    fn lock(&self) -> MutexGuard<'_, Round> {
        // No code that holds the lock can leave the round half changed.
        self.round.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells all ranks to look at the round again. The caller holds its lock.
    fn announce(&self) {
        self.changes.fetch_add(1, Ordering::Release);
        self.changed.notify_all();
    }

    /// Lets go of the round until something has changed, though not for long.
    fn look_out<'a>(&'a self, round: MutexGuard<'a, Round>) -> MutexGuard<'a, Round> {
        let seen = self.changes.load(Ordering::Acquire);
        drop(round);
        let begun = Instant::now();
        while self.changes.load(Ordering::Acquire) == seen && begun.elapsed() < self.awake {
            hint::spin_loop();
        }
        self.lock()
    }
}

impl Round {
    fn bring(&mut self, rank: usize, brought: Brought) -> Result<(), CommunicatorError> {
        let operation = brought.operation;
        if let Some(failure) = &self.broken {
            return Err(failure.clone());
        }
        if let Some(reason) = &self.departed[rank] {
            let reason = format!("this rank abandoned it: {reason}");
            return Err(CommunicatorError::Unusable { operation, reason });
        }
        if self.brought[rank].is_some() || self.awaiting[rank].is_some() {
            let reason = "another thread of this rank is using it".to_owned();
            return Err(CommunicatorError::Unusable { operation, reason });
        }
        self.brought[rank] = Some(brought);
        if self.missing().next().is_none() {
            self.close();
        }
        Ok(())
    }

    /// Gives every rank what the others brought for it, and opens the next
    /// round.
    fn close(&mut self) {
        let brought: Vec<Brought> = self.brought.iter_mut().filter_map(Option::take).collect();
        let operation = brought[0].operation;
        if let Some((rank, other)) = brought
            .iter()
            .enumerate()
            .find(|(_, other)| other.operation != operation)
        {
            let problem = format!("entered {} while rank 0 was", other.operation);
            self.broken = Some(CommunicatorError::Mismatch {
                operation,
                rank,
                problem,
            });
            return;
        }
        let mut from: Vec<_> = brought.into_iter().map(|b| b.parcels.into_iter()).collect();
        for awaiting in &mut self.awaiting {
            *awaiting = Some(from.iter_mut().filter_map(Iterator::next).collect());
        }
    }

    /// Whether a rank that has brought something need not wait.
    fn is_settled(&self, rank: usize) -> bool {
        self.awaiting[rank].is_some() || self.broken.is_some()
    }

    fn missing(&self) -> impl Iterator<Item = usize> {
        self.brought
            .iter()
            .enumerate()
            .filter(|(_, b)| b.is_none())
            .map(|(rank, _)| rank)
    }

    /// Why the open round cannot close any more, if it cannot.
    fn failure(&self, operation: &'static str) -> Option<CommunicatorError> {
        let left = || {
            self.missing().find_map(|rank| {
                let reason = self.departed[rank].clone()?;
                Some(CommunicatorError::Left {
                    operation,
                    rank,
                    reason,
                })
            })
        };
        self.broken.clone().or_else(left)
    }
}
