//! Blocks that one rank has for another, and the places they are for.

use super::{CommunicatorError, strided};
use tch::{Kind, Tensor};

/// Copies the blocks of rank `sender` to the places that rank `receiver` has
/// for them.
pub(super) fn place(
    operation: &'static str,
    (sender, blocks): (usize, &[Tensor]),
    (receiver, places): (usize, &[Tensor]),
) -> Result<(), CommunicatorError> {
    let libtorch = CommunicatorError::libtorch(operation);
    let mismatch = |problem| CommunicatorError::Mismatch {
        operation,
        rank: sender,
        problem: format!("sent rank {receiver} {problem}"),
    };
    if blocks.len() != places.len() {
        let (sent, due) = (blocks.len(), places.len());
        return Err(mismatch(format!("{sent} blocks where {due} were due")));
    }
    for (block, place) in blocks.iter().zip(places) {
        let kinds: (Kind, Kind) = (
            block.f_kind().map_err(&libtorch)?,
            place.f_kind().map_err(&libtorch)?,
        );
        let (sent, due) = (block.size(), place.size());
        if sent != due {
            let problem = format!("a block of {sent:?} where {due:?} was due");
            return Err(mismatch(problem));
        }
        let (sent, due) = kinds;
        if sent != due {
            return Err(mismatch(format!("{sent:?} where {due:?} was due")));
        }
        strided::copy(block, place).map_err(&libtorch)?;
    }
    Ok(())
}

/// Refuses lists that are not for the `size` ranks of the world.
pub(super) fn expect_lists(
    operation: &'static str,
    rank: usize,
    size: usize,
    send: &[Vec<Tensor>],
    receive: &[Vec<Tensor>],
) -> Result<(), CommunicatorError> {
    if send.len() == size && receive.len() == size {
        return Ok(());
    }
    let (send, receive) = (send.len(), receive.len());
    Err(CommunicatorError::Mismatch {
        operation,
        rank,
        problem: format!("gave lists for {send} and {receive} ranks in a world of {size}"),
    })
}
