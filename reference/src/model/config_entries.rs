//! The entries of a `config.json`, each checked by itself.
//!
//! Read are the model types `llama` and `mistral`, which differ in the sliding
//! window alone. What would change numbers and is not known here is refused,
//! never passed over.

use super::{
    config::LayerHeads,
    rope::{Llama3Scaling, Rope},
};
use crate::error::{Result, refuse};
use serde::Deserialize;

const MODEL_TYPES: [&str; 2] = ["llama", "mistral"];

/// The entries of `config.json` that decide numbers.
#[derive(Deserialize)]
pub(super) struct Entries {
    model_type: String,
    pub(super) vocab_size: usize,
    pub(super) hidden_size: usize,
    pub(super) intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: Counts,
    num_key_value_heads: Option<Counts>,
    head_dim: Option<usize>,
    hidden_act: Option<String>,
    pub(super) rms_norm_eps: Option<f64>,
    // From transformers 5 on, and before.
    rope_parameters: Option<RopeEntries>,
    rope_scaling: Option<RopeEntries>,
    rope_theta: Option<f64>,
    sliding_window: Option<usize>,
    pub(super) tie_word_embeddings: Option<bool>,
    pub(super) attention_bias: Option<bool>,
    attention_dropout: Option<f64>,
    pub(super) mlp_bias: Option<bool>,
    pad_token_id: Option<i64>,
}

/// One number for all layers, or one for each.
#[derive(Deserialize)]
#[serde(untagged)]
enum Counts {
    Same(usize),
    Each(Vec<usize>),
}

#[derive(Deserialize)]
struct RopeEntries {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    partial_rotary_factor: Option<f64>,
}

impl Entries {
    pub(super) fn check(&self) -> Result<()> {
        if !MODEL_TYPES.contains(&self.model_type.as_str()) {
            let problem = format!("is {:?}", self.model_type);
            let remedy = format!("give one of {}", MODEL_TYPES.join(", "));
            return refuse("model_type", problem, remedy);
        }
        let counts = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
        ];
        for (name, count) in counts {
            check_count(name, count)?;
        }
        if let Some(act) = self.hidden_act.as_ref().filter(|act| *act != "silu") {
            return refuse("hidden_act", format!("is {act:?}"), "give \"silu\"");
        }
        if let Some(dropped) = self.attention_dropout.filter(|&part| part != 0.0) {
            let problem = format!("is {dropped}");
            return refuse("attention_dropout", problem, "give 0");
        }
        match self.rms_norm_eps {
            Some(epsilon) if !(epsilon.is_finite() && epsilon >= 0.0) => refuse(
                "rms_norm_eps",
                format!("is {epsilon}"),
                "give a number from zero on",
            ),
            _ => Ok(()),
        }
    }

    pub(super) fn heads(&self) -> Result<Vec<LayerHeads>> {
        let layers = self.num_hidden_layers;
        let query = self
            .num_attention_heads
            .each("num_attention_heads", layers)?;
        let kv = match &self.num_key_value_heads {
            Some(counts) => counts.each("num_key_value_heads", layers)?,
            None => query.clone(),
        };
        let pairs = query.into_iter().zip(kv).enumerate();
        pairs
            .map(|(layer, (query, kv))| {
                if query.is_multiple_of(kv) {
                    return Ok(LayerHeads { query, kv });
                }
                let problem = format!("is {kv} in layer {layer}, and {query} query heads");
                let remedy = "give every KV head the same number of query heads";
                refuse("num_key_value_heads", problem, remedy)
            })
            .collect()
    }

    pub(super) fn head_dim(&self, heads: &[LayerHeads]) -> Result<usize> {
        let head_dim = match (self.head_dim, &self.num_attention_heads) {
            (Some(given), _) => given,
            (None, Counts::Same(count)) if self.hidden_size.is_multiple_of(*count) => {
                self.hidden_size / count
            }
            (None, _) => {
                return refuse(
                    "head_dim",
                    format!(
                        "is missing, and `hidden_size` {} over {:?} heads is no head size",
                        self.hidden_size,
                        heads.first().map(|layer| layer.query)
                    ),
                    "give the channels of a head",
                );
            }
        };
        check_count("head_dim", head_dim)?;
        if !head_dim.is_multiple_of(2) {
            let problem = format!("is {head_dim}, but pairs of channels are rotated");
            return refuse("head_dim", problem, "give an even number");
        }
        Ok(head_dim)
    }

    pub(super) fn rope(&self) -> Result<Rope> {
        let entries = self.rope_parameters.as_ref().or(self.rope_scaling.as_ref());
        let theta = entries.and_then(|entries| entries.rope_theta);
        let theta = theta.or(self.rope_theta).unwrap_or(10_000.0);
        let scaling = entries.map_or(Ok(None), RopeEntries::scaling)?;
        let rope = Rope { theta, scaling };
        rope.check()?;
        Ok(rope)
    }

    /// Only Mistral has one; transformers pays no heed to it in a Llama.
    pub(super) fn sliding_window(&self) -> Option<usize> {
        self.sliding_window.filter(|_| self.model_type == "mistral")
    }

    /// Counted from the end where it is negative, as torch does.
    pub(super) fn pad_token_id(&self) -> Result<Option<usize>> {
        let vocabulary = self.vocab_size as i64;
        match self.pad_token_id {
            None => Ok(None),
            Some(id) if (-vocabulary..vocabulary).contains(&id) => {
                Ok(Some(id.rem_euclid(vocabulary) as usize))
            }
            Some(id) => refuse(
                "pad_token_id",
                format!("is {id}, of {vocabulary} tokens"),
                "give a token of the vocabulary, or none",
            ),
        }
    }
}

impl Counts {
    /// One for each layer.
    fn each(&self, name: &'static str, layers: usize) -> Result<Vec<usize>> {
        let counts = match self {
            Counts::Same(count) => vec![*count; layers],
            Counts::Each(counts) if counts.len() == layers => counts.clone(),
            Counts::Each(counts) => {
                let problem = format!("has {} numbers", counts.len());
                let remedy = format!("give one for each of the {layers} layers");
                return refuse(name, problem, remedy);
            }
        };
        counts
            .iter()
            .try_for_each(|&count| check_count(name, count))?;
        Ok(counts)
    }
}

impl RopeEntries {
    fn scaling(&self) -> Result<Option<Llama3Scaling>> {
        if let Some(part) = self.partial_rotary_factor.filter(|&part| part != 1.0) {
            let problem = format!("is {part}");
            return refuse("partial_rotary_factor", problem, "rotate all channels");
        }
        match self.rope_type.as_deref() {
            None | Some("default") => Ok(None),
            Some("llama3") => {
                let due = |name: &'static str, entry: Option<f64>| match entry {
                    Some(number) => Ok(number),
                    None => refuse(name, "is missing", "give it beside `rope_type`"),
                };
                Ok(Some(Llama3Scaling {
                    factor: due("factor", self.factor)?,
                    low_freq_factor: due("low_freq_factor", self.low_freq_factor)?,
                    high_freq_factor: due("high_freq_factor", self.high_freq_factor)?,
                    original_max_position_embeddings: due(
                        "original_max_position_embeddings",
                        self.original_max_position_embeddings,
                    )?,
                }))
            }
            Some(other) => {
                let problem = format!("is {other:?}");
                refuse("rope_type", problem, "give \"default\" or \"llama3\"")
            }
        }
    }
}

/// So that the product of any two is an int64.
fn check_count(name: &'static str, count: usize) -> Result<()> {
    if (1..=i32::MAX as usize).contains(&count) {
        return Ok(());
    }
    refuse(
        name,
        format!("is {count}"),
        "give a number from 1 to 2^31 - 1",
    )
}
