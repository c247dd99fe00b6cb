//! What a model is asked about, and what of it is refused.

use super::config::LlamaConfig;
use crate::{
    call::Documents,
    error::{Result, refuse},
};
use tch::{Device, Kind, Tensor};

/// The tokens of this rank.
#[derive(Debug, Clone, Copy)]
pub struct ModelInput<'a> {
    /// Which tokens, int64 [B, s].
    pub input_ids: &'a Tensor,
    /// Their positions in the whole sequence, int64 [B, s]: made before the
    /// sequence was cut.
    pub position_ids: &'a Tensor,
    /// Several documents in one sequence: no token sees another document.
    pub documents: Option<Documents<'a>>,
    /// Which tokens are real, bool or int64 [B, s]; see
    /// [`Call::attention_mask`](crate::Call::attention_mask).
    pub attention_mask: Option<&'a Tensor>,
}

/// The arguments that [`check`] refuses.
pub(super) const ARGUMENTS: [&str; 3] = ["input_ids", "position_ids", "attention_mask"];

/// What this rank sees of its own input.
pub(super) fn check(
    input: &ModelInput<'_>,
    config: &LlamaConfig,
    device: Device,
    micro_batch_size: Option<usize>,
) -> Result<()> {
    let ids = input.input_ids;
    let size = words("input_ids", ids, device)?;
    let &[batch, tokens] = &size[..] else {
        let problem = format!("has shape {size:?}");
        return refuse("input_ids", problem, "give [batch, tokens]");
    };
    if let Some(due) = micro_batch_size.filter(|&due| due as i64 != batch) {
        let problem = format!("has {batch} rows");
        let remedy = format!("give the {due} of the registered micro batch");
        return refuse("input_ids", problem, remedy);
    }
    let positions = words("position_ids", input.position_ids, device)?;
    if positions != size {
        let problem = format!("has shape {positions:?}");
        return refuse("position_ids", problem, format!("give {size:?}"));
    }
    if let Some(mask) = input.attention_mask {
        if !mask.defined() {
            return refuse("attention_mask", "is an undefined tensor", "give none");
        }
        let (kind, given) = (mask.f_kind()?, mask.size());
        let known = matches!(kind, Kind::Bool | Kind::Int64) && mask.device() == device;
        if given != size || !known {
            let problem = format!("has shape {given:?} and kind {kind:?}");
            let remedy = format!("give {size:?} of bool or int64 on {device:?}");
            return refuse("attention_mask", problem, remedy);
        }
    }
    in_vocabulary(ids, tokens, config.vocab_size)
}

/// The size of an int64 tensor.
fn words(argument: &'static str, tensor: &Tensor, device: Device) -> Result<Vec<i64>> {
    if !tensor.defined() {
        return refuse(argument, "is an undefined tensor", "give [batch, tokens]");
    }
    let (kind, on) = (tensor.f_kind()?, tensor.device());
    if kind == Kind::Int64 && on == device {
        return Ok(tensor.size());
    }
    let problem = format!("is of kind {kind:?} on {on:?}");
    refuse(argument, problem, format!("give int64 on {device:?}"))
}

/// torch looks up what is out of the vocabulary by a panic on some devices.
fn in_vocabulary(ids: &Tensor, tokens: i64, vocabulary: usize) -> Result<()> {
    let flat = ids.f_to_device(Device::Cpu)?.f_contiguous()?.f_view([-1])?;
    let flat = Vec::<i64>::try_from(&flat)?;
    let known = 0..vocabulary as i64;
    match flat.iter().position(|id| !known.contains(id)) {
        None => Ok(()),
        Some(place) => refuse(
            "input_ids",
            format!(
                "has {} at row {}, token {}, of {vocabulary} in the vocabulary",
                flat[place],
                place as i64 / tokens,
                place as i64 % tokens
            ),
            "give tokens of the vocabulary",
        ),
    }
}
