//! Ranks on GPUs, through NCCL.
//!
//! Blocks go from where libtorch has them on one GPU to where they belong on
//! another, in one group of sends and receives on libtorch's own stream. Sizes
//! are 64-bit, and no block is too large.
//!
//! NCCL's library is found when the first communicator is made: the one that
//! the variable `ULYSSES_NCCL` names, or the `libnccl.so.2` that libtorch's CUDA
//! library has brought with it. So a program with this module starts where there
//! is neither GPU nor NCCL.
//!
//! NCCL alone would wait for ever, and never know for whom. So it is asked not
//! to block, and is stopped at the time limit; then the ranks hold a roll call
//! at the [`Rendezvous`] on the host, where they found each other.
//!
//! Two ranks cannot share a GPU: NCCL refuses that. MPI does not.
//!
//! | module | holds |
//! |---|---|
//! | `library` | NCCL's library and functions |
//! | `handle` | a communicator of NCCL |
//! | `transfer` | blocks as runs of bytes |
//! | `rendezvous`, `folder` | how ranks find each other: over MPI or threads, in a folder |
//! | `roll_call` | who did not come, and what did not fit |
#![allow(unsafe_code)]

mod folder;
mod handle;
mod library;
mod rendezvous;
mod roll_call;
mod transfer;

pub use folder::FolderRendezvous;
pub use rendezvous::{HostRendezvous, Rendezvous};

use super::{Communicator, CommunicatorError, blocks, groups::Groups};
use crate::device;
use handle::{Handle, UniqueId};
use library::{LIBRARY_VARIABLE, Library};
use roll_call::{Account, roll_call};
use std::{
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};
use tch::{Device, TchError, Tensor};
use transfer::{Transfer, bytes_for_each};

/// An exchange of a short sequence takes less: until then a rank stays awake.
const AWAKE: Duration = Duration::from_millis(1);
const PAUSE: Duration = Duration::from_micros(50);
/// How often it is seen to whether a peer has left, which is to look at files.
const PULSE: Duration = Duration::from_millis(100);
/// How long what a peer began before it left may still take to arrive.
const GRACE: Duration = Duration::from_secs(1);

/// One rank's end of a world of GPUs.
pub struct NcclCommunicator {
    rendezvous: Arc<dyn Rendezvous>,
    device: Device,
    time_limit: Duration,
    state: Mutex<State>,
    /// This rank's ends of the groups that were split off.
    groups: Groups<NcclCommunicator>,
}

struct State {
    /// Collectives that were begun.
    number: u64,
    /// Or why there is none any more.
    handle: Result<Handle, String>,
}

/// Whether there is an NCCL that moves tensors on `device`.
///
/// # Errors
/// What was looked for, and what to do.
pub fn nccl_serves(device: Device) -> Result<(), String> {
    match (Library::get()?.takes_host_memory, device) {
        (false, Device::Cuda(_)) | (true, Device::Cpu) => Ok(()),
        (false, _) => Err(
            "NCCL moves memory of GPUs: choose the device `cuda`, or the \
                           communicator over MPI"
                .to_owned(),
        ),
        (true, _) => Err(format!(
            "{LIBRARY_VARIABLE} names a stand-in for NCCL that moves memory of the host alone: \
             choose the device `cpu`"
        )),
    }
}

impl NcclCommunicator {
    /// A communicator of the ranks of `rendezvous` for tensors on `device`, each
    /// of which is on a GPU of its own. All ranks call it together.
    ///
    /// Here and in every collective it waits `time_limit` at most.
    ///
    /// # Errors
    /// When there is no NCCL, NCCL reports an error, or a rank does not come.
    pub fn new(
        rendezvous: Arc<dyn Rendezvous>,
        device: Device,
        time_limit: Duration,
    ) -> Result<NcclCommunicator, CommunicatorError> {
        let communicator = NcclCommunicator {
            rendezvous,
            device,
            time_limit,
            state: Mutex::new(State {
                number: 0,
                handle: Err("it was not made".to_owned()),
            }),
            groups: Groups::new(),
        };
        match communicator.connect() {
            Ok(handle) => {
                communicator.lock().handle = Ok(handle);
                Ok(communicator)
            }
            Err(error) => {
                communicator.rendezvous.leave(&error.to_string());
                Err(error)
            }
        }
    }

    fn connect(&self) -> Result<Handle, CommunicatorError> {
        let operation = "ncclCommInitRankConfig";
        nccl_serves(self.device)
            .map_err(|reason| CommunicatorError::Unusable { operation, reason })?;
        device::set_current(self.device).map_err(in_libtorch(operation))?;
        let (rank, size) = (self.rank(), self.size());
        let own = match rank {
            0 => handle::unique_id()?.to_vec(),
            _ => Vec::new(),
        };
        let brought = self.rendezvous.gather(operation, &own, self.time_limit)?;
        let id = brought.first().map(Vec::as_slice).unwrap_or_default();
        let id = UniqueId::try_from(id).map_err(|_| CommunicatorError::Mismatch {
            operation,
            rank: 0,
            problem: format!("gave {} bytes where an id of NCCL was due", id.len()),
        })?;
        let begun = Instant::now();
        let handle = Handle::begin((rank, size), &id, self.device)?;
        let made = self.poll(operation, begun, || handle.is_ready(operation));
        match made {
            Ok(()) => Ok(handle),
            Err(error) => {
                handle.abort();
                let account = Account {
                    number: 0,
                    operation: operation.to_owned(),
                    sent: vec![0; size],
                    due: vec![0; size],
                };
                Err(self.after(error, operation, &account))
            }
        }
    }

    /// Does a collective, if those before it were done; after an error no other.
    fn in_turn<T>(
        &self,
        operation: &'static str,
        collective: impl FnOnce(&mut State) -> Result<T, CommunicatorError>,
    ) -> Result<T, CommunicatorError> {
        let mut state = self.lock();
        if let Err(reason) = &state.handle {
            let reason = reason.clone();
            return Err(CommunicatorError::Unusable { operation, reason });
        }
        state.number += 1;
        let done = collective(&mut state);
        if let Err(error) = &done {
            if let Ok(handle) = mem::replace(&mut state.handle, Err(error.to_string())) {
                handle.abort();
            }
            self.rendezvous.leave(&error.to_string());
        }
        done
    }

    fn exchange(
        &self,
        state: &mut State,
        operation: &'static str,
        send: &[Vec<Tensor>],
        receive: &[Vec<Tensor>],
    ) -> Result<(), CommunicatorError> {
        let (rank, size, begun) = (self.rank(), self.size(), Instant::now());
        // A thread that has not computed on the device yet has another one.
        device::set_current(self.device).map_err(in_libtorch(operation))?;
        blocks::place(operation, (rank, &send[rank]), (rank, &receive[rank]))?;
        let transfer = Transfer::new(operation, (rank, self.device), send, receive)?;
        let (sent, received) = (transfer.sent(), transfer.received());
        let account = Account {
            number: state.number,
            operation: operation.to_owned(),
            sent: bytes_for_each(&sent, size),
            due: bytes_for_each(&received, size),
        };
        let handle = mem::replace(&mut state.handle, Err("a collective goes on".to_owned()))
            .map_err(|reason| CommunicatorError::Unusable { operation, reason })?;
        // SAFETY: `transfer` keeps what the runs are of until all is done, and
        // is forgotten where that cannot be known.
        let moved = unsafe { handle.exchange(operation, &sent, &received) }
            .and_then(|()| self.poll(operation, begun, || handle.is_ready(operation)))
            // NCCL has put it on the stream: now it goes on there.
            .and_then(|()| device::Event::record(self.device).map_err(in_libtorch(operation)))
            .and_then(|event| {
                self.poll(operation, begun, || {
                    handle.is_ready(operation)?;
                    event.is_reached().map_err(in_libtorch(operation))
                })
            });
        if let Err(error) = moved {
            if !handle.abort() {
                mem::forget(transfer);
            }
            return Err(self.after(error, operation, &account));
        }
        state.handle = Ok(handle);
        transfer.unpack()
    }

    /// Waits until it is done, a peer has left or the time is up.
    fn poll(
        &self,
        operation: &'static str,
        begun: Instant,
        mut is_done: impl FnMut() -> Result<bool, CommunicatorError>,
    ) -> Result<(), CommunicatorError> {
        let mut next_pulse = begun + PULSE;
        let mut departed: Option<(usize, String, Instant)> = None;
        while !is_done()? {
            let now = Instant::now();
            if now.duration_since(begun) >= self.time_limit {
                return Err(CommunicatorError::TimedOut {
                    operation,
                    missing: Vec::new(),
                    limit: self.time_limit,
                });
            }
            if now >= next_pulse {
                next_pulse = now + PULSE;
                if departed.is_none() {
                    let told = self.rendezvous.departed();
                    departed = told.map(|(rank, reason)| (rank, reason, now));
                }
            }
            match &departed {
                Some((rank, reason, since)) if now.duration_since(*since) >= GRACE => {
                    return Err(CommunicatorError::Left {
                        operation,
                        rank: *rank,
                        reason: reason.clone(),
                    });
                }
                _ if now.duration_since(begun) < AWAKE => thread::yield_now(),
                _ => thread::sleep(PAUSE),
            }
        }
        Ok(())
    }

    /// What becomes of an error now that NCCL was stopped: one of time is
    /// looked into.
    fn after(
        &self,
        error: CommunicatorError,
        operation: &'static str,
        account: &Account,
    ) -> CommunicatorError {
        match error {
            CommunicatorError::TimedOut { .. } => {
                roll_call(&*self.rendezvous, operation, account, self.time_limit)
            }
            error => error,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Communicator for NcclCommunicator {
    fn rank(&self) -> usize {
        self.rendezvous.rank()
    }

    fn size(&self) -> usize {
        self.rendezvous.size()
    }

    fn all_gather(&self, words: &[i64]) -> Result<Vec<Vec<i64>>, CommunicatorError> {
        let (operation, size) = ("all_gather", self.size());
        let libtorch = CommunicatorError::libtorch(operation);
        let _guard = tch::no_grad_guard();
        let own = Tensor::f_from_slice(words)
            .and_then(|words| words.f_to_device(self.device))
            .map_err(&libtorch)?;
        let rooms = own
            .f_new_empty([size as i64, words.len() as i64], (own.kind(), self.device))
            .map_err(&libtorch)?;
        let send: Vec<_> = (0..size).map(|_| vec![own.shallow_clone()]).collect();
        let receive = (0..size).map(|rank| Ok(vec![rooms.f_select(0, rank as i64)?]));
        let receive: Vec<_> = receive
            .collect::<Result<_, TchError>>()
            .map_err(&libtorch)?;
        self.in_turn(operation, |state| {
            self.exchange(state, operation, &send, &receive)
        })?;
        let all = rooms
            .f_to_device(Device::Cpu)
            .and_then(|rooms| rooms.f_view([-1]))
            .and_then(Vec::<i64>::try_from)
            .map_err(&libtorch)?;
        match words.len() {
            0 => Ok(vec![Vec::new(); size]),
            length => Ok(all.chunks(length).map(<[i64]>::to_vec).collect()),
        }
    }

    fn all_to_all(
        &self,
        send: &[Vec<Tensor>],
        receive: &[Vec<Tensor>],
    ) -> Result<(), CommunicatorError> {
        let operation = "all_to_all";
        // A communicator records no graph.
        let _guard = tch::no_grad_guard();
        blocks::expect_lists(operation, self.rank(), self.size(), send, receive)?;
        self.in_turn(operation, |state| {
            self.exchange(state, operation, send, receive)
        })
    }

    /// The ranks of a group meet at a part of the rendezvous, which they need for
    /// their roll calls, and make a communicator there as at the beginning.
    fn split(&self, color: usize) -> Result<Arc<dyn Communicator>, CommunicatorError> {
        let group = self.in_turn("split", |_| {
            let rendezvous = self.rendezvous.split(color, self.time_limit)?;
            NcclCommunicator::new(rendezvous, self.device, self.time_limit)
        })?;
        let group = Arc::new(group);
        self.groups.add(&group);
        Ok(group)
    }

    fn abandon(&self, reason: &str) {
        self.rendezvous.leave(reason);
        self.groups.abandon(reason);
    }
}

impl Drop for NcclCommunicator {
    fn drop(&mut self) {
        let panicked = thread::panicking();
        if panicked {
            self.rendezvous.leave("its thread panicked");
        }
        let handle = mem::replace(&mut self.lock().handle, Err("it was dropped".to_owned()));
        match handle {
            Ok(handle) if panicked => {
                handle.abort();
            }
            Ok(handle) => handle.end(),
            Err(_) => {}
        }
    }
}

fn in_libtorch(operation: &'static str) -> impl Fn(crate::Error) -> CommunicatorError {
    move |error| CommunicatorError::Libtorch {
        operation,
        message: error.to_string(),
    }
}
