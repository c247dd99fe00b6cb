//! The model of a plan: by name, or by its `config.json`.

use std::fs;
use std::path::Path;

use serde::Deserialize;
use ulysses::cost::Model;

use super::Arguments;

/// The model that is asked for.
pub(super) fn of(arguments: &Arguments) -> Result<Model, String> {
    match (&arguments.config, &arguments.model) {
        (Some(path), _) => read(path).map_err(|reason| format!("{}: {reason}", path.display())),
        (None, Some(name)) => Model::named(name).ok_or_else(|| format!("no model {name}")),
        (None, None) => Err("no model is given".to_owned()),
    }
}

/// What a `config.json` of Hugging Face transformers says of sizes, by the
/// names that it has there.
#[derive(Deserialize)]
struct Config {
    model_type: String,
    num_hidden_layers: u64,
    hidden_size: u64,
    num_attention_heads: u64,
    num_key_value_heads: Option<u64>,
    head_dim: Option<u64>,
    intermediate_size: u64,
    vocab_size: u64,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
}

fn read(path: &Path) -> Result<Model, String> {
    let text = fs::read_to_string(path).map_err(|error| error.to_string())?;
    let config: Config = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    let (hidden, query_heads) = (config.hidden_size, config.num_attention_heads);
    let kv_heads = config.num_key_value_heads.unwrap_or(query_heads);
    let head_size = match (config.head_dim, config.model_type.as_str()) {
        (Some(head_size), _) => head_size,
        (None, "qwen3") => 128,
        (None, _) => hidden.checked_div(query_heads).unwrap_or(0),
    };
    let heads = |count: u64| count.saturating_mul(head_size);
    let of_projections = heads(query_heads).saturating_add(heads(kv_heads.saturating_mul(2)));
    let has_bias = config.attention_bias.unwrap_or(false);
    let of_attention = match config.model_type.as_str() {
        "llama" | "mistral" if has_bias => of_projections.saturating_add(hidden),
        "llama" | "mistral" => 0,
        "qwen2" => of_projections,
        "qwen3" if has_bias => of_projections.saturating_add(hidden + 2 * head_size),
        "qwen3" => heads(2),
        other => {
            return Err(format!(
                "models of type {other} are unknown here; llama, mistral, qwen2 and qwen3 are known"
            ));
        }
    };
    let of_mlp = match config.mlp_bias {
        Some(true) => config
            .intermediate_size
            .saturating_mul(2)
            .saturating_add(hidden),
        _ => 0,
    };
    let of_norms = hidden.saturating_mul(2);
    let model = Model {
        layers: config.num_hidden_layers,
        hidden,
        query_heads,
        kv_heads,
        head_size,
        ffn: config.intermediate_size,
        mlp_matrices: 3,
        vocabulary: config.vocab_size,
        is_tied: config.tie_word_embeddings.unwrap_or(false),
        small_parameters: of_norms.saturating_add(of_attention).saturating_add(of_mlp),
    };
    Ok(model)
}
