//! How the reference answers in the profile `loss`.

use std::sync::Arc;

use fixtures::exchange::{Tensors, tensor};
use fixtures::loss::LossInfo;
use tch::{Device, TchError};
use ulysses::{Communicator, Reduction, cross_entropy, tiled_logits_loss};

use super::gradients;
use crate::tensor::{from_array_on, to_array};

/// Into how many tiles the logits of hidden states are cut.
const TILES: usize = 3;

pub(super) fn answer(
    communicator: &Arc<dyn Communicator>,
    device: Device,
    info: &LossInfo,
    inputs: &Tensors,
) -> Result<Tensors, String> {
    let said = |error: TchError| error.to_string();
    let input = |name| from_array_on(device, tensor(inputs, name)?).map_err(said);
    let leaf = |name| input(name)?.f_set_requires_grad(true).map_err(said);
    let labels = input("labels")?;
    let (loss, leaves) = match info.hidden_size {
        None => {
            let logits = leaf("logits")?;
            let loss = cross_entropy(
                communicator,
                &logits,
                &labels,
                info.ignore_index,
                Reduction::Mean,
            );
            (loss, vec![("logits", logits)])
        }
        Some(_) => {
            let (hidden, head) = (leaf("hidden")?, leaf("head")?);
            let loss = tiled_logits_loss(
                communicator,
                &hidden,
                &head,
                &labels,
                info.ignore_index,
                Reduction::Mean,
                TILES,
            );
            (loss, vec![("hidden", hidden), ("head", head)])
        }
    };
    let loss = loss.map_err(|error| error.to_string())?;
    let cotangent = input("dloss")?;
    loss.f_mul(&cotangent)
        .and_then(|product| product.f_backward())
        .map_err(said)?;
    let loss = loss.f_detach().map_err(said)?;
    let dtype = info.loss_dtype();
    let mut answer = gradients(&leaves, info.dtype)?;
    answer.insert("loss".to_owned(), to_array(&loss, dtype).map_err(said)?);
    Ok(answer)
}
