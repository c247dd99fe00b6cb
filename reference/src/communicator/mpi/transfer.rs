//! Blocks on their way to and from the peers, as messages that MPI can count.
//!
//! A count of MPI is a 32-bit C integer, and so is a displacement in its
//! all-to-all collectives; 64 bits came with MPI 4. A message needs no
//! displacement, and a block of any size is so many messages of bounded size:
//! both sides know the size of the block and cut it alike, and MPI keeps the
//! messages between two ranks in order. So nothing limits a block but memory,
//! with any MPI.
//!
//! A block that is contiguous is sent from where it lies, and received where
//! it belongs; any other goes through a buffer. So does a block on a GPU,
//! through memory that is pinned for it: any MPI will do, and ranks may share a
//! GPU.
#![allow(unsafe_code)]

use super::succeed;
use crate::{
    communicator::{CommunicatorError, strided},
    device,
};
use mpi::ffi;
use std::ffi::c_int;
use tch::Tensor;

/// The bytes of a message: a power of two far from the 2^31 of a count.
const LONGEST: usize = 1 << 30;

/// The order of messages is all that tells them apart.
const TAG: c_int = 0;

/// What one rank sends and receives in one exchange.
///
/// MPI uses the buffers until all messages are done. After an error that never
/// happens: forget this then, and never free it.
pub(super) struct Transfer {
    operation: &'static str,
    communicator: ffi::MPI_Comm,
    rank: usize,
    /// One for each message; MPI sets those that are done to null.
    requests: Vec<ffi::MPI_Request>,
    messages: Vec<Message>,
    leaving: Vec<Tensor>,
    arriving: Vec<Arriving>,
}

struct Message {
    peer: usize,
    bytes: c_int,
    done: bool,
    /// Where in `arriving` its block is, if it is not leaving.
    arriving: Option<usize>,
}

struct Arriving {
    buffer: Tensor,
    place: Tensor,
    messages_left: usize,
}

impl Transfer {
    pub(super) fn new(operation: &'static str, communicator: ffi::MPI_Comm, rank: usize) -> Self {
        Self {
            operation,
            communicator,
            rank,
            requests: Vec::new(),
            messages: Vec::new(),
            leaving: Vec::new(),
            arriving: Vec::new(),
        }
    }

    /// Begins to receive the next block of `peer`, for `place`.
    pub(super) fn receive(&mut self, peer: usize, place: &Tensor) -> Result<(), CommunicatorError> {
        let buffer = if lies_flat(place) {
            place.shallow_clone()
        } else {
            device::staging(place).map_err(CommunicatorError::libtorch(self.operation))?
        };
        let first = buffer.data_ptr().cast::<u8>();
        let block = self.arriving.len();
        let before = self.messages.len();
        for (offset, bytes) in cut(bytes_of(&buffer)) {
            self.begin(peer, bytes, Some(block), |communicator, request| {
                // SAFETY: `cut` stays within the bytes of the buffer, which
                // lie one after another and are kept until MPI is done.
                unsafe {
                    let (datatype, peer) = (ffi::RSMPI_UINT8_T, peer as c_int);
                    let to = first.add(offset).cast();
                    ffi::MPI_Irecv(to, bytes, datatype, peer, TAG, communicator, request)
                }
            })?;
        }
        self.arriving.push(Arriving {
            buffer,
            place: place.shallow_clone(),
            messages_left: self.messages.len() - before,
        });
        Ok(())
    }

    /// Begins to send the next block for `peer`.
    pub(super) fn send(&mut self, peer: usize, block: &Tensor) -> Result<(), CommunicatorError> {
        let libtorch = CommunicatorError::libtorch(self.operation);
        let buffer = if lies_flat(block) {
            block.shallow_clone()
        } else {
            let buffer = device::staging(block).map_err(&libtorch)?;
            strided::copy(block, &buffer).map_err(&libtorch)?;
            buffer
        };
        let first = buffer.data_ptr().cast_const().cast::<u8>();
        let bytes = bytes_of(&buffer);
        self.leaving.push(buffer);
        for (offset, bytes) in cut(bytes) {
            self.begin(peer, bytes, None, |communicator, request| {
                // SAFETY: as in `receive`.
                unsafe {
                    let (datatype, peer) = (ffi::RSMPI_UINT8_T, peer as c_int);
                    let from = first.add(offset).cast();
                    ffi::MPI_Isend(from, bytes, datatype, peer, TAG, communicator, request)
                }
            })?;
        }
        Ok(())
    }

    fn begin(
        &mut self,
        peer: usize,
        bytes: c_int,
        arriving: Option<usize>,
        start: impl FnOnce(ffi::MPI_Comm, *mut ffi::MPI_Request) -> c_int,
    ) -> Result<(), CommunicatorError> {
        // SAFETY: a constant of MPI, read while MPI runs.
        let mut request = unsafe { ffi::RSMPI_REQUEST_NULL };
        succeed(self.operation, start(self.communicator, &raw mut request))?;
        self.requests.push(request);
        self.messages.push(Message {
            peer,
            bytes,
            done: false,
            arriving,
        });
        Ok(())
    }

    /// Lets MPI work, and takes what has arrived to where it belongs; gives
    /// whether nothing is left.
    pub(super) fn progress(&mut self) -> Result<bool, CommunicatorError> {
        let count = self.requests.len();
        let mut indices = Vec::<c_int>::with_capacity(count);
        let mut statuses = Vec::<ffi::MPI_Status>::with_capacity(count);
        let mut done: c_int = 0;
        // SAFETY: there is room for an index and a status for each request.
        // A list of 2^31 blocks would not fit in memory.
        let code = unsafe {
            ffi::MPI_Testsome(
                count as c_int,
                self.requests.as_mut_ptr(),
                &raw mut done,
                indices.as_mut_ptr(),
                statuses.as_mut_ptr(),
            )
        };
        let in_status = code == ffi::MPI_ERR_IN_STATUS as c_int;
        if !in_status {
            succeed(self.operation, code)?;
        }
        if done == ffi::MPI_UNDEFINED {
            // No request is left.
            return Ok(true);
        }
        let done = usize::try_from(done).unwrap_or(0);
        // SAFETY: MPI has written so many of each.
        unsafe {
            indices.set_len(done);
            statuses.set_len(done);
        }
        for (index, status) in indices.into_iter().zip(&statuses) {
            let code = if in_status {
                status.MPI_ERROR
            } else {
                ffi::MPI_SUCCESS as c_int
            };
            self.finish(index as usize, status, code)?;
        }
        Ok(false)
    }

    fn finish(
        &mut self,
        index: usize,
        status: &ffi::MPI_Status,
        code: c_int,
    ) -> Result<(), CommunicatorError> {
        let (operation, rank) = (self.operation, self.rank);
        let message = &mut self.messages[index];
        message.done = true;
        let (peer, due) = (message.peer, message.bytes);
        let mismatch = |sent: String| CommunicatorError::Mismatch {
            operation,
            rank: peer,
            problem: format!("sent rank {rank} {sent} bytes where {due} were due"),
        };
        if class_of(code) == ffi::MPI_ERR_TRUNCATE as c_int {
            return Err(mismatch("more".to_owned()));
        }
        succeed(operation, code)?;
        let Some(block) = message.arriving else {
            return Ok(());
        };
        let mut sent: c_int = 0;
        // SAFETY: the status is that of a message of bytes that has arrived.
        let code = unsafe { ffi::MPI_Get_count(status, ffi::RSMPI_UINT8_T, &raw mut sent) };
        succeed(operation, code)?;
        if sent != due {
            return Err(mismatch(sent.to_string()));
        }
        let block = &mut self.arriving[block];
        block.messages_left -= 1;
        if block.messages_left == 0 && !lies_flat(&block.place) {
            strided::copy(&block.buffer, &block.place)
                .map_err(CommunicatorError::libtorch(operation))?;
        }
        Ok(())
    }

    /// The peers with whom messages are left, in ascending order.
    pub(super) fn waits_for(&self) -> Vec<usize> {
        let left = self.messages.iter().filter(|message| !message.done);
        let mut peers: Vec<usize> = left.map(|message| message.peer).collect();
        peers.sort_unstable();
        peers.dedup();
        peers
    }
}

/// Whether MPI can read or write a tensor where it is.
fn lies_flat(tensor: &Tensor) -> bool {
    strided::is_plain(tensor) && tensor.is_contiguous()
}

fn bytes_of(buffer: &Tensor) -> usize {
    buffer.numel() * buffer.kind().elt_size_in_bytes()
}

/// Offsets and lengths of the messages of a block of so many bytes.
fn cut(bytes: usize) -> impl Iterator<Item = (usize, c_int)> {
    (0..bytes)
        .step_by(LONGEST)
        .map(move |offset| (offset, (bytes - offset).min(LONGEST) as c_int))
}

fn class_of(code: c_int) -> c_int {
    let mut class = code;
    // SAFETY: any code may be asked about; `class` is a valid place.
    unsafe { ffi::MPI_Error_class(code, &raw mut class) };
    class
}
