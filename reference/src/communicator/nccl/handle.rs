//! NCCL's own communicator: made, given transfers, asked, ended.
//!
//! It never blocks: what takes long is begun, and asked about until it is done.
//! But for an abort, which waits for the kernels that it stops.

use super::{
    CommunicatorError,
    library::{IN_PROGRESS, Library, SUCCESS},
};
use crate::device;
use cudarc::nccl::sys::{ncclComm_t, ncclConfig_t, ncclDataType_t, ncclUniqueId};
use std::{
    ffi::{c_char, c_int, c_uint, c_void},
    ptr,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};
use tch::Device;

/// How long an orderly end may take, and then an abort: far longer than either
/// needs.
const END_LIMIT: Duration = Duration::from_secs(5);
/// A pause between two looks at what goes on.
const PAUSE: Duration = Duration::from_micros(50);

/// The bytes of the id by which the ranks of one communicator find each other.
pub(super) type UniqueId = [u8; size_of::<ncclUniqueId>()];

/// What marks a config as one, from `nccl.h`.
const CONFIG_MAGIC: c_uint = 0xcafe_beef;
/// The version whose config this is: a later NCCL gives what came after its own
/// defaults.
const CONFIG_VERSION: c_uint = 21_800;
/// "As NCCL likes", from `nccl.h`.
const UNDEFINED: c_int = c_int::MIN;

pub(super) struct Handle {
    nccl: &'static Library,
    comm: ncclComm_t,
    device: Device,
}

// SAFETY: NCCL lets any thread use a communicator, one at a time; the owner has
// it in a lock.
unsafe impl Send for Handle {}

/// Bytes that lie one after another in memory of the device, and whose they are
/// or will be.
pub(super) struct Run {
    pub(super) peer: usize,
    pub(super) first: *mut c_void,
    pub(super) bytes: usize,
}

fn loaded(operation: &'static str) -> Result<&'static Library, CommunicatorError> {
    Library::get().map_err(|reason| CommunicatorError::Unusable { operation, reason })
}

/// An id for a communicator to be. This process must live until it is made.
pub(super) fn unique_id() -> Result<UniqueId, CommunicatorError> {
    let operation = "ncclGetUniqueId";
    let nccl = loaded(operation)?;
    let mut id = ncclUniqueId {
        internal: [0; size_of::<ncclUniqueId>()],
    };
    // SAFETY: `id` is a place for one.
    let code = unsafe { (nccl.get_unique_id)(&raw mut id) };
    nccl.check(operation, code)?;
    Ok(id.internal.map(|byte| byte.cast_unsigned()))
}

impl Handle {
    /// Begins to make a communicator with all ranks that have this id.
    pub(super) fn begin(
        (rank, size): (usize, usize),
        id: &UniqueId,
        device: Device,
    ) -> Result<Handle, CommunicatorError> {
        let operation = "ncclCommInitRankConfig";
        let nccl = loaded(operation)?;
        let mut handle = Handle {
            nccl,
            comm: ptr::null_mut(),
            device,
        };
        let id = ncclUniqueId {
            internal: id.map(|byte| byte as c_char),
        };
        let mut config = ncclConfig_t {
            size: size_of::<ncclConfig_t>(),
            magic: CONFIG_MAGIC,
            version: CONFIG_VERSION,
            blocking: 0,
            cgaClusterSize: UNDEFINED,
            minCTAs: UNDEFINED,
            maxCTAs: UNDEFINED,
            netName: ptr::null(),
            splitShare: UNDEFINED,
        };
        // SAFETY: places for the communicator and of the config, which NCCL has
        // read when it returns. It writes the former before it goes on by
        // itself, and not later.
        let code = unsafe {
            (nccl.comm_init_rank_config)(
                &raw mut handle.comm,
                size as c_int,
                id,
                rank as c_int,
                &raw mut config,
            )
        };
        nccl.check(operation, code)?;
        Ok(handle)
    }

    /// Whether what was begun is done.
    pub(super) fn is_ready(&self, operation: &'static str) -> Result<bool, CommunicatorError> {
        let mut state = SUCCESS;
        // SAFETY: the communicator is alive, and `state` a place for a result.
        let code = unsafe { (self.nccl.comm_get_async_error)(self.comm, &raw mut state) };
        self.nccl.check(operation, code)?;
        self.nccl.check(operation, state)?;
        Ok(state != IN_PROGRESS)
    }

    /// Begins to send and to receive, all at once, on the stream on which torch
    /// puts the work of this thread. The runs between two ranks are met in
    /// their order.
    ///
    /// # Safety
    /// All runs stay alive and untouched until this is done, or the
    /// communicator has been aborted.
    pub(super) unsafe fn exchange(
        &self,
        operation: &'static str,
        sent: &[Run],
        received: &[Run],
    ) -> Result<(), CommunicatorError> {
        const BYTES: c_uint = ncclDataType_t::ncclUint8 as c_uint;
        let nccl = self.nccl;
        let stream = device::stream(self.device)
            .map_err(CommunicatorError::libtorch(operation))?
            .cast();
        // SAFETY: a group takes only what this thread does until its end, which
        // is reached whatever happens between. Stream and communicator are of
        // one device, and the caller keeps the runs.
        let code = unsafe {
            nccl.check(operation, (nccl.group_start)())?;
            let receives = received.iter().map(|run| {
                let peer = run.peer as c_int;
                (nccl.receive)(run.first, run.bytes, BYTES, peer, self.comm, stream)
            });
            let sends = sent.iter().map(|run| {
                let peer = run.peer as c_int;
                (nccl.send)(run.first, run.bytes, BYTES, peer, self.comm, stream)
            });
            let refused = receives
                .chain(sends)
                .map(|code| nccl.check(operation, code))
                .find(Result::is_err);
            let ended = (nccl.group_end)();
            refused.unwrap_or(Ok(()))?;
            ended
        };
        nccl.check(operation, code)
    }

    /// An end in agreement, where the others come to theirs in time.
    pub(super) fn end(self) {
        let begun = Instant::now();
        // SAFETY: the communicator is alive and has nothing to do.
        let code = unsafe { (self.nccl.comm_finalize)(self.comm) };
        let finalize = "ncclCommFinalize";
        let mut is_ended = self.nccl.check(finalize, code).map(|()| false);
        while let Ok(false) = is_ended {
            if begun.elapsed() >= END_LIMIT {
                break;
            }
            thread::sleep(PAUSE);
            is_ended = self.is_ready(finalize);
        }
        match is_ended {
            Ok(true) => {
                // SAFETY: it is finalized, and used no more.
                unsafe { (self.nccl.comm_destroy)(self.comm) };
            }
            _ => {
                self.abort();
            }
        }
    }

    /// Stops what goes on and ends the communicator; gives whether that is so.
    /// If not, NCCL may still use the memory of the runs.
    pub(super) fn abort(self) -> bool {
        let (done, is_done) = mpsc::channel();
        // NCCL waits for the device here, and a device may be stuck.
        let aborting = thread::Builder::new().spawn(move || {
            // The whole handle, which may be sent, and not its pointer alone.
            let handle = self;
            // Where this fails, NCCL sets the device itself.
            let _ = device::set_current(handle.device);
            // SAFETY: used no more by anybody.
            let code = unsafe { (handle.nccl.comm_abort)(handle.comm) };
            let _ = done.send(code == SUCCESS);
        });
        aborting.is_ok() && is_done.recv_timeout(END_LIMIT) == Ok(true)
    }
}
