//! A tiny decoder, made from a seed.
// Each test program uses its own part of this.
#![allow(dead_code)]

use crate::world::noise;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};
use ulysses::{Llama, LlamaConfig, ModelInput, model::Weights};

pub(crate) const VOCABULARY: i64 = 11;

/// A `config.json` with these heads.
pub(crate) fn config_json(query_heads: usize, kv_heads: usize) -> Value {
    json!({
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": query_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 4,
        "rope_theta": 100.0,
    })
}

pub(crate) fn config(query_heads: usize, kv_heads: usize) -> LlamaConfig {
    LlamaConfig::from_json(&config_json(query_heads, kv_heads).to_string()).unwrap()
}

/// Weights in (-1, 1) that depend on their place alone.
pub(crate) fn weights(config: &LlamaConfig, kind: Kind) -> Weights {
    let parameters = config.parameters().into_iter().zip(1u64..);
    let weight = |shape: &[i64], seed| {
        let count = shape.iter().product();
        noise(seed, [1, 1, 1, count], kind).view(shape)
    };
    parameters
        .map(|(parameter, seed)| (parameter.name, weight(&parameter.shape, seed)))
        .collect()
}

pub(crate) fn llama(query_heads: usize, kv_heads: usize) -> Llama {
    let config = config(query_heads, kv_heads);
    let weights = weights(&config, Kind::Double);
    Llama::new(config, weights, Kind::Double, Device::Cpu).unwrap()
}

/// Ids and positions [batch, tokens].
pub(crate) fn tokens(batch: i64, tokens: i64) -> (Tensor, Tensor) {
    let all = Tensor::arange(batch * tokens, (Kind::Int64, Device::Cpu));
    let ids = (&all * 7 + 3).remainder(VOCABULARY).view([batch, tokens]);
    (ids, all.remainder(tokens).view([batch, tokens]))
}

pub(crate) fn input<'a>(ids: &'a Tensor, positions: &'a Tensor) -> ModelInput<'a> {
    ModelInput {
        input_ids: ids,
        position_ids: positions,
        documents: None,
        attention_mask: None,
    }
}

/// The gradients of all parameters, by name.
pub(crate) fn gradients(model: &Llama) -> Vec<(String, Tensor)> {
    let parameters = model.parameters().into_iter();
    parameters
        .map(|(name, parameter)| (name, parameter.grad()))
        .collect()
}
