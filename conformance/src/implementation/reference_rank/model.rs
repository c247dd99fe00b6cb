//! How the reference answers in the profile `model`.

use std::sync::Arc;

use fixtures::exchange::{Tensors, tensor};
use fixtures::model::ModelInfo;
use tch::{Device, TchError, Tensor};
use ulysses::model::Weights;
use ulysses::{
    Communicator, Documents, Llama, LlamaConfig, Mesh, ModelInput, Reduction, Registration,
    cross_entropy, register_with_model,
};

use crate::tensor::{from_array, from_array_on, kind, to_array};

/// What is given beside the weights.
const BESIDE: [&str; 4] = ["input_ids", "position_ids", "labels", "dloss"];

pub(super) fn answer(
    communicator: &Arc<dyn Communicator>,
    device: Device,
    info: &ModelInfo,
    inputs: &Tensors,
) -> Result<Tensors, String> {
    let said = |error: ulysses::Error| error.to_string();
    let (model, mesh) = registered(communicator, device, info, inputs)?;
    let [ids, positions, labels, cotangent] = tokens(device, inputs)?;
    let input = ModelInput {
        input_ids: &ids,
        position_ids: &positions,
        documents: documents(info),
        attention_mask: None,
    };
    let logits = model.forward(&input).map_err(said)?;
    let loss = cross_entropy(
        mesh.world(),
        &logits,
        &labels,
        info.ignore_index,
        Reduction::Mean,
    );
    answered(&model, info, &logits, &loss.map_err(said)?, &cotangent)
}

/// The model of this rank, registered among those that share its sequences.
pub(crate) fn registered(
    communicator: &Arc<dyn Communicator>,
    device: Device,
    info: &ModelInfo,
    inputs: &Tensors,
) -> Result<(Llama, Mesh), String> {
    let said = |error: ulysses::Error| error.to_string();
    let config = LlamaConfig::from_json(&info.config.to_string()).map_err(said)?;
    let weights = inputs
        .iter()
        .filter(|(name, _)| !BESIDE.contains(&name.as_str()))
        .map(|(name, array)| Ok((name.clone(), from_array(array)?)))
        .collect::<Result<Weights, TchError>>()
        .map_err(|error| error.to_string())?;
    let mut model = Llama::new(config, weights, kind(info.dtype), device).map_err(said)?;
    model.set_checkpointing(info.checkpointing);
    let registration = Registration {
        sequence_parallel_size: info.sequence_parallel,
        micro_batch_size: info.batch,
        uneven_heads: true,
        ..Registration::default()
    };
    let mesh = register_with_model(&mut model, Arc::clone(communicator), &registration);
    Ok((model, mesh.map_err(said)?))
}

/// Token ids, position ids, labels, and the cotangent of the loss.
pub(crate) fn tokens(device: Device, inputs: &Tensors) -> Result<[Tensor; 4], String> {
    let read = |name| {
        let tensor = from_array_on(device, tensor(inputs, name)?);
        tensor.map_err(|error| error.to_string())
    };
    let [ids, positions, labels, cotangent] = BESIDE.map(read);
    Ok([ids?, positions?, labels?, cotangent?])
}

/// Where documents are packed, how they are told apart.
pub(crate) fn documents(info: &ModelInfo) -> Option<Documents<'static>> {
    info.documents.as_ref().map(|_| Documents::FromPositions)
}

/// Loss, logits, and what backward of the loss leaves in the weights.
pub(crate) fn answered(
    model: &Llama,
    info: &ModelInfo,
    logits: &Tensor,
    loss: &Tensor,
    cotangent: &Tensor,
) -> Result<Tensors, String> {
    let said = |error: TchError| error.to_string();
    loss.f_mul(cotangent)
        .and_then(|product| product.f_backward())
        .map_err(said)?;
    let detached = |x: &Tensor, dtype| to_array(&x.f_detach()?, dtype);
    let mut answer = Tensors::new();
    let given = detached(loss, info.loss_dtype()).map_err(said)?;
    answer.insert("loss".to_owned(), given);
    let given = detached(logits, info.dtype).map_err(said)?;
    answer.insert("logits".to_owned(), given);
    for (name, weight) in model.parameters() {
        let gradient = weight.f_grad().map_err(said)?;
        if !gradient.defined() {
            return Err(format!("no gradient reaches `{name}`"));
        }
        let gradient = to_array(&gradient, info.dtype).map_err(said)?;
        answer.insert(format!("d{name}"), gradient);
    }
    Ok(answer)
}
