//! What a decoder is made of, from the `config.json` of a Hugging Face model
//! folder.

use super::{config_entries::Entries, rope::Rope};
use crate::error::{Result, refuse};
use serde_json::{Map, Value};
use std::{fs, path::Path};
use tch::Kind;

/// The shape of a decoder and its constants.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    /// How many tokens there are to choose from.
    pub vocab_size: usize,
    /// Channels between layers, h.
    pub hidden_size: usize,
    /// Channels inside an MLP, F.
    pub intermediate_size: usize,
    /// The heads of each layer; may differ from layer to layer.
    pub heads: Vec<LayerHeads>,
    /// Channels of a head, D.
    pub head_dim: usize,
    /// Added to the mean square by every norm.
    pub rms_norm_eps: f64,
    /// How positions become angles.
    pub rope: Rope,
    /// Token i sees token j only if `i - j < sliding_window`.
    pub sliding_window: Option<usize>,
    /// Whether the head that makes logits is the embedding itself.
    pub tie_word_embeddings: bool,
    /// Whether the four projections of attention add a bias.
    pub attention_bias: bool,
    /// Whether the three projections of the MLP add a bias.
    pub mlp_bias: bool,
    /// The token whose embedding gets no gradient.
    pub pad_token_id: Option<usize>,
    /// As it was read, to be saved with all that is not known here.
    json: Map<String, Value>,
}

/// The heads of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerHeads {
    /// Query heads, Hq.
    pub query: usize,
    /// KV heads, Hkv, each for equally many query heads.
    pub kv: usize,
}

impl LlamaConfig {
    /// Reads `config.json` of `folder`.
    ///
    /// # Errors
    /// Refused when it cannot be read, and as [`from_json`](Self::from_json)
    /// does.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        match fs::read_to_string(&path) {
            Ok(text) => Self::from_json(&text),
            Err(error) => refuse(
                "folder",
                format!("has no `{}` that can be read: {error}", path.display()),
                "give a folder that `save_pretrained` wrote",
            ),
        }
    }

    /// From the text of a `config.json`. `num_attention_heads` and
    /// `num_key_value_heads` may be a list with a number for each layer;
    /// `head_dim` has then to be given.
    ///
    /// # Errors
    /// A refusal of the first entry that is missing, out of its range, or asks
    /// for what is not known here.
    pub fn from_json(text: &str) -> Result<Self> {
        let read = || {
            let json: Map<String, Value> = serde_json::from_str(text)?;
            let entries: Entries = serde_json::from_value(Value::Object(json.clone()))?;
            Ok((json, entries))
        };
        let (json, entries) = read().or_else(|error: serde_json::Error| {
            refuse(
                "config",
                format!("is no configuration of a decoder: {error}"),
                "give the `config.json` of a Llama",
            )
        })?;
        entries.check()?;
        let heads = entries.heads()?;
        let head_dim = entries.head_dim(&heads)?;
        Ok(Self {
            vocab_size: entries.vocab_size,
            hidden_size: entries.hidden_size,
            intermediate_size: entries.intermediate_size,
            heads,
            head_dim,
            rms_norm_eps: entries.rms_norm_eps.unwrap_or(1e-6),
            rope: entries.rope()?,
            sliding_window: entries.sliding_window(),
            tie_word_embeddings: entries.tie_word_embeddings.unwrap_or(false),
            attention_bias: entries.attention_bias.unwrap_or(false),
            mlp_bias: entries.mlp_bias.unwrap_or(false),
            pad_token_id: entries.pad_token_id()?,
            json,
        })
    }

    /// How many layers there are.
    pub fn layers(&self) -> usize {
        self.heads.len()
    }

    /// The text of a `config.json` for weights of `kind`.
    pub(super) fn to_json(&self, kind: Kind) -> String {
        let name = match kind {
            Kind::Double => "float64",
            Kind::BFloat16 => "bfloat16",
            Kind::Half => "float16",
            _ => "float32",
        };
        let mut json = self.json.clone();
        json.remove("torch_dtype");
        json.insert("dtype".to_owned(), Value::from(name));
        format!("{:#}\n", Value::Object(json))
    }
}
