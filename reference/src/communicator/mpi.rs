//! Ranks as processes, through MPI.
//!
//! MPI is spoken through its C interface (`mpi::ffi`), because the safe layer
//! of the `mpi` crate ends the process on an error and waits without limit.
//! Here MPI is asked to return its errors, every collective is started without
//! blocking, and a rank that does not come becomes an error value.
//!
//! MPI moves flat buffers, so blocks are packed for each peer and unpacked
//! again. Counts and displacements of MPI are 32-bit: a rank that would hand
//! over or receive 2 GiB or more in one exchange is refused with an error that
//! says so.
//!
//! Not here: word that this rank gives up. MPI has no message for it, so peers
//! of a rank that left meet the time limit (or `mpirun` ends them, when it
//! sees a process die).
#![allow(unsafe_code)]

mod packing;

use super::{Communicator, CommunicatorError};
use mpi::{Threading, environment::Universe, ffi, topology::Communicator as _, traits::AsRaw};
use packing::{Packed, count_of};
use std::{
    ffi::{c_char, c_int},
    mem::ManuallyDrop,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};
use tch::{Kind, Tensor};

const TIME_LIMIT: Duration = Duration::from_secs(300);

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
/// MPI can be taken for a message of ours.
struct Group {
    handle: Handle,
    rank: usize,
    size: usize,
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
        let condition = Mutex::new(Condition::Ready);
        let group = Arc::new(Group {
            handle: Handle(handle),
            rank,
            size,
            condition,
        });
        Ok(MpiWorld {
            universe: ManuallyDrop::new(universe),
            group,
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
        let mut condition = self.group.lock();
        // MPI_Finalize waits for what was begun and never completed, and for
        // peers that wait for this rank. After a failure or in a panic the
        // process ends without it, and `mpirun` ends the others.
        if thread::panicking() || !matches!(*condition, Condition::Ready) {
            return;
        }
        *condition = Condition::Finalized;
        let mut handle = self.group.handle.0;
        // SAFETY: the handle is ours and, `Finalized` being set, used no more;
        // the universe is not touched after it is dropped here.
        unsafe {
            ffi::MPI_Comm_free(&raw mut handle);
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

    /// Starts a collective and polls it until it is done.
    ///
    /// After an error MPI may still use the buffers: they must never be freed.
    fn complete(
        &self,
        operation: &'static str,
        start: impl FnOnce(ffi::MPI_Comm, *mut ffi::MPI_Request) -> c_int,
    ) -> Result<(), CommunicatorError> {
        let mut condition = self.group.lock();
        let reason = match &*condition {
            Condition::Ready => None,
            Condition::Broken(reason) => Some(reason.clone()),
            Condition::Finalized => Some("MPI has ended; keep the MpiWorld".to_owned()),
        };
        if let Some(reason) = reason {
            return Err(CommunicatorError::Unusable { operation, reason });
        }
        let done = self.start_and_poll(operation, start);
        if let Err(error) = &done {
            *condition = Condition::Broken(error.to_string());
        }
        done
    }

    fn start_and_poll(
        &self,
        operation: &'static str,
        start: impl FnOnce(ffi::MPI_Comm, *mut ffi::MPI_Request) -> c_int,
    ) -> Result<(), CommunicatorError> {
        let begun = Instant::now();
        // SAFETY: a constant of MPI, read while MPI runs.
        let mut request = unsafe { ffi::RSMPI_REQUEST_NULL };
        succeed(operation, start(self.group.handle.0, &raw mut request))?;
        loop {
            let mut done: c_int = 0;
            // SAFETY: `request` is the one just started, `done` a valid place.
            let code =
                unsafe { ffi::MPI_Test(&raw mut request, &raw mut done, ffi::RSMPI_STATUS_IGNORE) };
            succeed(operation, code)?;
            if done != 0 {
                return Ok(());
            }
            if begun.elapsed() >= self.time_limit {
                return Err(CommunicatorError::TimedOut {
                    operation,
                    missing: Vec::new(),
                    limit: self.time_limit,
                });
            }
            // There may be more ranks than cores.
            thread::yield_now();
        }
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
        let operation = "all_gather";
        let count = words.len();
        let bytes = count_of(operation, "count", self.group.rank, size_of_val(words))?;
        // Not freed unless the collective completes.
        let send = ManuallyDrop::new(words.to_vec());
        let mut gathered = ManuallyDrop::new(vec![0i64; count * self.group.size]);
        let (from, to) = (send.as_ptr(), gathered.as_mut_ptr());
        self.complete(operation, |communicator, request| {
            // SAFETY: `from` has `bytes` bytes and `to` as many for each rank;
            // both stay until the collective is complete.
            unsafe {
                ffi::MPI_Iallgather(
                    from.cast(),
                    bytes,
                    ffi::RSMPI_UINT8_T,
                    to.cast(),
                    bytes,
                    ffi::RSMPI_UINT8_T,
                    communicator,
                    request,
                )
            }
        })?;
        drop(ManuallyDrop::into_inner(send));
        let gathered = ManuallyDrop::into_inner(gathered);
        Ok((0..self.group.size)
            .map(|r| gathered[r * count..(r + 1) * count].to_vec())
            .collect())
    }

    fn all_to_all(
        &self,
        send: &[Vec<Tensor>],
        receive: &[Vec<Tensor>],
    ) -> Result<(), CommunicatorError> {
        let operation = "all_to_all";
        let _guard = tch::no_grad_guard();
        let kind = self.common_dtype(operation, send, receive)?;
        let outgoing = ManuallyDrop::new(Packed::room_for(operation, send, kind)?);
        let incoming = ManuallyDrop::new(Packed::room_for(operation, receive, kind)?);
        for (block, place) in outgoing.beside(send) {
            let place = place.map_err(CommunicatorError::libtorch(operation));
            place?
                .f_copy_(block)
                .map_err(CommunicatorError::libtorch(operation))?;
        }
        self.complete(operation, |communicator, request| {
            // SAFETY: counts and displacements have an entry for each rank and
            // stay inside buffers of their sum, by `Packed::room_for`; all of
            // it stays until the collective is complete, being freed only
            // below.
            unsafe {
                ffi::MPI_Ialltoallv(
                    outgoing.buffer.data_ptr().cast_const(),
                    outgoing.counts.as_ptr(),
                    outgoing.displacements.as_ptr(),
                    ffi::RSMPI_UINT8_T,
                    incoming.buffer.data_ptr(),
                    incoming.counts.as_ptr(),
                    incoming.displacements.as_ptr(),
                    ffi::RSMPI_UINT8_T,
                    communicator,
                    request,
                )
            }
        })?;
        drop(ManuallyDrop::into_inner(outgoing));
        let incoming = ManuallyDrop::into_inner(incoming);
        for (place, arrived) in incoming.beside(receive) {
            let arrived = arrived.map_err(CommunicatorError::libtorch(operation))?;
            let mut place = place.shallow_clone();
            place
                .f_copy_(&arrived)
                .map_err(CommunicatorError::libtorch(operation))?;
        }
        Ok(())
    }
}

impl MpiCommunicator {
    /// The one dtype of all blocks, given lists for all ranks.
    fn common_dtype(
        &self,
        operation: &'static str,
        send: &[Vec<Tensor>],
        receive: &[Vec<Tensor>],
    ) -> Result<Kind, CommunicatorError> {
        let (rank, size) = (self.group.rank, self.group.size);
        let mismatch = |problem| {
            Err(CommunicatorError::Mismatch {
                operation,
                rank,
                problem,
            })
        };
        if send.len() != size || receive.len() != size {
            let (send, receive) = (send.len(), receive.len());
            return mismatch(format!(
                "gave lists for {send} and {receive} ranks in a world of {size}"
            ));
        }
        let mut common = None;
        for block in send.iter().chain(receive).flatten() {
            let kind = block
                .f_kind()
                .map_err(CommunicatorError::libtorch(operation))?;
            if *common.get_or_insert(kind) != kind {
                return mismatch(format!("gave blocks of {kind:?} and of another dtype"));
            }
        }
        // Without a block any dtype describes the empty buffers.
        Ok(common.unwrap_or(Kind::Uint8))
    }
}

impl Group {
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
