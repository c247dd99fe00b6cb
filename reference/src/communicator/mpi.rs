//! Ranks as processes, through MPI.
//!
//! MPI is spoken through its C interface (`mpi::ffi`), because the safe layer
//! of the `mpi` crate ends the process on an error and waits without limit.
//! Here MPI is asked to return its errors, every collective is started without
//! blocking, and a rank that does not come becomes an error value.
//!
//! Blocks travel as messages between pairs of ranks (`transfer`), which have
//! none of the limits that 32-bit counts and displacements put on MPI's own
//! all-to-all. What a rank has for itself does not go through MPI.
//!
//! Not here: word that this rank gives up. MPI has no message for it, so peers
//! of a rank that left meet the time limit (or `mpirun` ends them, when it
//! sees a process die).
#![allow(unsafe_code)]

mod transfer;

use super::{Communicator, CommunicatorError, blocks};
use mpi::{Threading, environment::Universe, ffi, topology::Communicator as _, traits::AsRaw};
use std::{
    ffi::{c_char, c_int},
    mem::ManuallyDrop,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};
use tch::Tensor;
use transfer::Transfer;

const TIME_LIMIT: Duration = Duration::from_secs(300);

/// How many words all ranks together gather at a time. A gather is of a few
/// words, and a longer one is so many of these: counts of MPI are 32-bit.
const GATHERED_AT_ONCE: usize = 1 << 22;

/// MPI itself, from its beginning to its end in this process.
///
/// Keep it as long as any communicator is used; a communicator that outlives
/// it refuses to work. Drop it in the thread that made it.
pub struct MpiWorld {
    universe: ManuallyDrop<Universe>,
    group: Arc<Group>,
}

/// One rank's end of a world of processes.
#[derive(Clone)]
pub struct MpiCommunicator {
    group: Arc<Group>,
    time_limit: Duration,
}

/// A duplicate of MPI_COMM_WORLD, so that nothing else the program does with
/// MPI can be taken for a message of ours; or a part of one.
struct Group {
    handle: Handle,
    rank: usize,
    size: usize,
    /// The groups that were split off, in the order in which they were. They
    /// last as long as MPI: to free one is a collective, and ranks drop theirs
    /// when they like.
    parts: Mutex<Vec<Arc<Group>>>,
    /// Held during a collective: MPI wants those of one communicator in one
    /// order.
    condition: Mutex<Condition>,
}

struct Handle(ffi::MPI_Comm);

// SAFETY: a handle of MPI may be used from any thread, several at once, where
// MPI_THREAD_MULTIPLE is provided; `MpiWorld::initialize` insists on that.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

/// Whether a group can be used.
enum Condition {
    Ready,
    /// A collective was begun and not completed, for this reason. The ranks
    /// are no longer in step.
    Broken(String),
    Finalized,
}

impl MpiWorld {
    /// Starts MPI, once in a process.
    ///
    /// # Errors
    /// When MPI was started before in this process, does not support calls
    /// from several threads, or reports an error.
    pub fn initialize() -> Result<MpiWorld, CommunicatorError> {
        let operation = "MPI_Init_thread";
        let unusable = |reason: &str| CommunicatorError::Unusable {
            operation,
            reason: reason.to_owned(),
        };
        let (universe, threading) = mpi::initialize_with_threading(Threading::Multiple)
            .ok_or_else(|| unusable("MPI was started before in this process; start it once"))?;
        if threading < Threading::Multiple {
            return Err(unusable(
                "this MPI was built without MPI_THREAD_MULTIPLE; use one with it",
            ));
        }
        let world = universe.world();
        let (rank, size) = (world.rank() as usize, world.size() as usize);
        let mut handle = world.as_raw();
        // SAFETY: MPI is running, `world` is its valid communicator, and
        // `handle` is a valid place for the duplicate. All ranks do this.
        unsafe {
            let errors_return = ffi::RSMPI_ERRORS_RETURN;
            succeed(
                operation,
                ffi::MPI_Comm_set_errhandler(world.as_raw(), errors_return),
            )?;
            succeed(
                operation,
                ffi::MPI_Comm_dup(world.as_raw(), &raw mut handle),
            )?;
            succeed(
                operation,
                ffi::MPI_Comm_set_errhandler(handle, errors_return),
            )?;
        }
        Ok(MpiWorld {
            universe: ManuallyDrop::new(universe),
            group: Arc::new(Group::new(handle, rank, size)),
        })
    }

    /// A communicator of all ranks. Several of them share one order of
    /// collectives.
    pub fn communicator(&self) -> MpiCommunicator {
        MpiCommunicator {
            group: Arc::clone(&self.group),
            time_limit: TIME_LIMIT,
        }
    }
}

impl Drop for MpiWorld {
    fn drop(&mut self) {
        let groups = self.group.with_parts();
        let mut conditions: Vec<_> = groups.iter().map(|group| group.lock()).collect();
        // MPI_Finalize waits for what was begun and never completed, and for
        // peers that wait for this rank. After a failure or in a panic the
        // process ends without it, and `mpirun` ends the others.
        let ready = |condition: &MutexGuard<'_, _>| matches!(**condition, Condition::Ready);
        if thread::panicking() || !conditions.iter().all(ready) {
            return;
        }
        for (group, condition) in groups.iter().zip(&mut conditions) {
            **condition = Condition::Finalized;
            let mut handle = group.handle.0;
            // SAFETY: the handle is ours and, `Finalized` being set, used no
            // more. Every rank has split, and so frees, in the same order.
            unsafe {
                ffi::MPI_Comm_free(&raw mut handle);
            }
        }
        // SAFETY: the universe is not touched after it is dropped here.
        unsafe {
            ManuallyDrop::drop(&mut self.universe);
        }
    }
}

impl MpiCommunicator {
    /// Waits at most `time_limit` for a collective; 300 s unless told.
    #[must_use]
    pub fn with_time_limit(mut self, time_limit: Duration) -> Self {
        self.time_limit = time_limit;
        self
    }

    /// Does a collective, if those before it were done.
    fn in_turn<T>(
        &self,
        operation: &'static str,
        collective: impl FnOnce() -> Result<T, CommunicatorError>,
    ) -> Result<T, CommunicatorError> {
        let mut condition = self.group.lock();
        let reason = match &*condition {
            Condition::Ready => None,
            Condition::Broken(reason) => Some(reason.clone()),
            Condition::Finalized => Some("MPI has ended; keep the MpiWorld".to_owned()),
        };
        if let Some(reason) = reason {
            return Err(CommunicatorError::Unusable { operation, reason });
        }
        let done = collective();
        if let Err(error) = &done {
            *condition = Condition::Broken(error.to_string());
        }
        done
    }

    /// Lets MPI work until it is done, or the time is up: then not so.
    fn poll(
        &self,
        begun: Instant,
        mut is_done: impl FnMut() -> Result<bool, CommunicatorError>,
    ) -> Result<bool, CommunicatorError> {
        while !is_done()? {
            if begun.elapsed() >= self.time_limit {
                return Ok(false);
            }
            // There may be more ranks than cores.
            thread::yield_now();
        }
        Ok(true)
    }

    fn timed_out(&self, operation: &'static str, missing: Vec<usize>) -> CommunicatorError {
        CommunicatorError::TimedOut {
            operation,
            missing,
            limit: self.time_limit,
        }
    }

    /// The words of all ranks one after another; every rank gives equally many,
    /// and all together no more than [`GATHERED_AT_ONCE`].
    fn gather(
        &self,
        operation: &'static str,
        words: &[i64],
    ) -> Result<Vec<i64>, CommunicatorError> {
        let begun = Instant::now();
        let count = words.len() as c_int;
        // After an error MPI may still use these: freed only when all is done.
        let send = ManuallyDrop::new(words.to_vec());
        let mut gathered = ManuallyDrop::new(vec![0i64; words.len() * self.group.size]);
        // SAFETY: a constant of MPI, read while MPI runs.
        let mut request = unsafe { ffi::RSMPI_REQUEST_NULL };
        // SAFETY: `send` has `count` words and `gathered` as many for each
        // rank; both stay until the collective is complete.
        let code = unsafe {
            ffi::MPI_Iallgather(
                send.as_ptr().cast(),
                count,
                ffi::RSMPI_INT64_T,
                gathered.as_mut_ptr().cast(),
                count,
                ffi::RSMPI_INT64_T,
                self.group.handle.0,
                &raw mut request,
            )
        };
        succeed(operation, code)?;
        let done = self.poll(begun, || {
            let mut done: c_int = 0;
            // SAFETY: `request` is the one just started, `done` a valid place.
            let code =
                unsafe { ffi::MPI_Test(&raw mut request, &raw mut done, ffi::RSMPI_STATUS_IGNORE) };
            succeed(operation, code)?;
            Ok(done != 0)
        })?;
        if !done {
            return Err(self.timed_out(operation, Vec::new()));
        }
        drop(ManuallyDrop::into_inner(send));
        Ok(ManuallyDrop::into_inner(gathered))
    }
}

impl Communicator for MpiCommunicator {
    fn rank(&self) -> usize {
        self.group.rank
    }

    fn size(&self) -> usize {
        self.group.size
    }

    fn all_gather(&self, words: &[i64]) -> Result<Vec<Vec<i64>>, CommunicatorError> {
        let (operation, size) = ("all_gather", self.group.size);
        let longest = (GATHERED_AT_ONCE / size).max(1);
        self.in_turn(operation, || {
            let mut all: Vec<Vec<i64>> = (0..size).map(|_| Vec::new()).collect();
            let mut rest = words;
            loop {
                let (now, later) = rest.split_at(rest.len().min(longest));
                let gathered = self.gather(operation, now)?;
                for (rank, words) in all.iter_mut().enumerate() {
                    words.extend_from_slice(&gathered[rank * now.len()..][..now.len()]);
                }
                if later.is_empty() {
                    return Ok(all);
                }
                rest = later;
            }
        })
    }

    fn all_to_all(
        &self,
        send: &[Vec<Tensor>],
        receive: &[Vec<Tensor>],
    ) -> Result<(), CommunicatorError> {
        let operation = "all_to_all";
        let (rank, size) = (self.group.rank, self.group.size);
        // A communicator records no graph.
        let _guard = tch::no_grad_guard();
        blocks::expect_lists(operation, rank, size, send, receive)?;
        self.in_turn(operation, || {
            let begun = Instant::now();
            // After an error MPI may still use its buffers: it is freed only
            // when all is done.
            let mut transfer =
                ManuallyDrop::new(Transfer::new(operation, self.group.handle.0, rank));
            // Receives first: a message that finds one waiting is not copied
            // twice. And each rank begins with another peer.
            for peer in (1..size).map(|step| (rank + size - step) % size) {
                for place in &receive[peer] {
                    transfer.receive(peer, place)?;
                }
            }
            for peer in (1..size).map(|step| (rank + step) % size) {
                for block in &send[peer] {
                    transfer.send(peer, block)?;
                }
            }
            blocks::place(operation, (rank, &send[rank]), (rank, &receive[rank]))?;
            if !self.poll(begun, || transfer.progress())? {
                return Err(self.timed_out(operation, transfer.waits_for()));
            }
            drop(ManuallyDrop::into_inner(transfer));
            Ok(())
        })
    }

    /// MPI splits without a time limit: it is called once every rank has come
    /// to a gather, which has one.
    fn split(&self, color: usize) -> Result<Arc<dyn Communicator>, CommunicatorError> {
        let operation = "split";
        let own = color.cast_signed() as i64;
        let group = self.in_turn(operation, || {
            let colors = self.gather(operation, &[own])?;
            // A color of MPI is a 32-bit number that is not negative.
            let first = colors.iter().position(|&color| color == own);
            let color = first.unwrap_or(self.group.rank) as c_int;
            let (mut handle, mut rank, mut size) = (self.group.handle.0, 0, 0);
            // SAFETY: the handle of the group is valid, and the others are
            // places for what MPI answers. All ranks of the group do this.
            unsafe {
                let (whole, key) = (self.group.handle.0, self.group.rank as c_int);
                succeed(
                    operation,
                    ffi::MPI_Comm_split(whole, color, key, &raw mut handle),
                )?;
                let errors_return = ffi::RSMPI_ERRORS_RETURN;
                succeed(
                    operation,
                    ffi::MPI_Comm_set_errhandler(handle, errors_return),
                )?;
                succeed(operation, ffi::MPI_Comm_rank(handle, &raw mut rank))?;
                succeed(operation, ffi::MPI_Comm_size(handle, &raw mut size))?;
            }
            Ok(Arc::new(Group::new(handle, rank as usize, size as usize)))
        })?;
        self.group.parts().push(Arc::clone(&group));
        Ok(Arc::new(MpiCommunicator {
            group,
            time_limit: self.time_limit,
        }))
    }
}

impl Group {
    fn new(handle: ffi::MPI_Comm, rank: usize, size: usize) -> Group {
        Group {
            handle: Handle(handle),
            rank,
            size,
            parts: Mutex::default(),
            condition: Mutex::new(Condition::Ready),
        }
    }

    /// The group and all that was ever split off from it, directly or not.
    fn with_parts(self: &Arc<Group>) -> Vec<Arc<Group>> {
        let mut all = vec![Arc::clone(self)];
        for part in self.parts().iter() {
            all.extend(part.with_parts());
        }
        all
    }

    fn parts(&self) -> MutexGuard<'_, Vec<Arc<Group>>> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, Condition> {
        self.condition
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// An error value for any code of MPI but success.
fn succeed(operation: &'static str, code: c_int) -> Result<(), CommunicatorError> {
    if code == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    let mut text = [0u8; ffi::MPI_MAX_ERROR_STRING as usize];
    let mut length: c_int = 0;
    // SAFETY: `text` has the length that MPI asks for.
    unsafe {
        ffi::MPI_Error_string(code, text.as_mut_ptr().cast::<c_char>(), &raw mut length);
    }
    let length = usize::try_from(length).unwrap_or(0).min(text.len());
    let message = String::from_utf8_lossy(&text[..length]).into_owned();
    Err(CommunicatorError::Mpi { operation, message })
}
