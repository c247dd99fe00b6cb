//! Blocks in the form that MPI moves: one flat buffer, with a count and a
//! displacement for each peer.
//!
//! Both are 32-bit in MPI, and this is the one place where that matters: every
//! number of bytes passes through [`count_of`].

use crate::communicator::CommunicatorError;
use std::ffi::c_int;
use tch::{Device, Kind, Tensor};

/// Blocks one after another in one buffer of the host, peer by peer.
pub(super) struct Packed {
    pub(super) buffer: Tensor,
    /// Bytes for each peer.
    pub(super) counts: Vec<c_int>,
    /// Bytes before those of each peer.
    pub(super) displacements: Vec<c_int>,
}

impl Packed {
    pub(super) fn room_for(
        operation: &'static str,
        blocks: &[Vec<Tensor>],
        kind: Kind,
    ) -> Result<Self, CommunicatorError> {
        let (mut counts, mut displacements, mut elements) = (Vec::new(), Vec::new(), 0);
        let size = kind.elt_size_in_bytes();
        for (peer, blocks) in blocks.iter().enumerate() {
            let count = blocks.iter().map(Tensor::numel).sum::<usize>();
            displacements.push(count_of(operation, "displacement", peer, elements * size)?);
            counts.push(count_of(operation, "count", peer, count * size)?);
            elements += count;
        }
        let buffer = Tensor::f_empty([elements as i64], (kind, Device::Cpu))
            .map_err(CommunicatorError::libtorch(operation))?;
        Ok(Self {
            buffer,
            counts,
            displacements,
        })
    }

    /// Each block with the part of the buffer that is for it, in its shape.
    pub(super) fn beside<'a>(
        &'a self,
        blocks: &'a [Vec<Tensor>],
    ) -> impl Iterator<Item = (&'a Tensor, Result<Tensor, tch::TchError>)> {
        let mut start = 0;
        blocks.iter().flatten().map(move |block| {
            let length = block.numel() as i64;
            let part = self.buffer.f_narrow(0, start, length);
            start += length;
            (
                block,
                part.and_then(|part| part.f_view(block.size().as_slice())),
            )
        })
    }
}

/// A number of bytes as MPI takes it.
pub(super) fn count_of(
    operation: &'static str,
    quantity: &'static str,
    peer: usize,
    bytes: usize,
) -> Result<c_int, CommunicatorError> {
    c_int::try_from(bytes).map_err(|_| CommunicatorError::TooLarge {
        operation,
        quantity,
        peer,
        bytes,
    })
}
