//! The blocks of one exchange, as runs of bytes that NCCL can move.
//!
//! A block that is contiguous is sent from where it lies and received where it
//! belongs. Any other goes through a packed one, whose copies are in the order of
//! the stream; and so does one that is not on the device, a batch on the host for
//! instance.

use super::handle::Run;
use crate::communicator::{CommunicatorError, strided};
use tch::{Device, Tensor};

pub(super) struct Transfer {
    operation: &'static str,
    device: Device,
    leaving: Vec<(usize, Tensor)>,
    arriving: Vec<Arriving>,
}

struct Arriving {
    peer: usize,
    buffer: Tensor,
    place: Tensor,
}

impl Transfer {
    /// What `rank` sends to the others and receives from them; empty blocks are
    /// not sent.
    pub(super) fn new(
        operation: &'static str,
        (rank, device): (usize, Device),
        send: &[Vec<Tensor>],
        receive: &[Vec<Tensor>],
    ) -> Result<Transfer, CommunicatorError> {
        let libtorch = CommunicatorError::libtorch(operation);
        let mut transfer = Transfer {
            operation,
            device,
            leaving: Vec::new(),
            arriving: Vec::new(),
        };
        for (peer, block) in blocks(rank, send) {
            let buffer = match lies_flat(block, device) {
                true => block.shallow_clone(),
                false => {
                    let buffer = packed(block, device).map_err(&libtorch)?;
                    strided::copy(block, &buffer).map_err(&libtorch)?;
                    buffer
                }
            };
            transfer.leaving.push((peer, buffer));
        }
        for (peer, place) in blocks(rank, receive) {
            let buffer = match lies_flat(place, device) {
                true => place.shallow_clone(),
                false => packed(place, device).map_err(&libtorch)?,
            };
            transfer.arriving.push(Arriving {
                peer,
                buffer,
                place: place.shallow_clone(),
            });
        }
        Ok(transfer)
    }

    pub(super) fn sent(&self) -> Vec<Run> {
        let leaving = self.leaving.iter();
        leaving.map(|(peer, buffer)| run(*peer, buffer)).collect()
    }

    pub(super) fn received(&self) -> Vec<Run> {
        let arriving = self.arriving.iter();
        arriving
            .map(|arriving| run(arriving.peer, &arriving.buffer))
            .collect()
    }

    /// Takes what has arrived to where it belongs.
    pub(super) fn unpack(&self) -> Result<(), CommunicatorError> {
        for Arriving { buffer, place, .. } in &self.arriving {
            if !lies_flat(place, self.device) {
                strided::copy(buffer, place)
                    .map_err(CommunicatorError::libtorch(self.operation))?;
            }
        }
        Ok(())
    }
}

/// The blocks for other ranks that are not empty.
fn blocks(rank: usize, lists: &[Vec<Tensor>]) -> impl Iterator<Item = (usize, &Tensor)> {
    let others = lists
        .iter()
        .enumerate()
        .filter(move |&(peer, _)| peer != rank);
    others
        .flat_map(|(peer, list)| list.iter().map(move |block| (peer, block)))
        .filter(|(_, block)| block.numel() > 0)
}

fn lies_flat(tensor: &Tensor, device: Device) -> bool {
    strided::is_valued(tensor) && tensor.is_contiguous() && tensor.device() == device
}

fn packed(like: &Tensor, device: Device) -> Result<Tensor, tch::TchError> {
    Tensor::f_empty(like.size(), (like.f_kind()?, device))
}

fn run(peer: usize, buffer: &Tensor) -> Run {
    Run {
        peer,
        first: buffer.data_ptr(),
        bytes: bytes_of(buffer),
    }
}

fn bytes_of(buffer: &Tensor) -> usize {
    buffer.numel() * buffer.kind().elt_size_in_bytes()
}

/// How many bytes a rank's lists have for each rank, itself not counted.
pub(super) fn bytes_for_each(runs: &[Run], size: usize) -> Vec<usize> {
    let mut bytes = vec![0; size];
    for run in runs {
        if let Some(bytes) = bytes.get_mut(run.peer) {
            *bytes += run.bytes;
        }
    }
    bytes
}
