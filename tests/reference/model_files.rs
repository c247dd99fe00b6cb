//! Configurations and weights: what is read, what is written, and what is
//! refused by name.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod tiny;
mod world;

use rstest::rstest;
use serde_json::{Value, json};
use std::fs;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;
use tiny::{config, config_json, llama, weights};
use ulysses::{Llama, LlamaConfig, Refusal, Result, model::Weights};

const LAST: &str = "model.layers.1.mlp.down_proj.weight";

fn refusal<T>(result: Result<T>) -> Refusal {
    match result.map(drop).unwrap_err() {
        ulysses::Error::Refused(refusal) => refusal,
        other => panic!("{other}"),
    }
}

fn with(changes: Value) -> Result<LlamaConfig> {
    let mut json = config_json(4, 2);
    for (name, value) in changes.as_object().unwrap() {
        json[name] = value.clone();
    }
    LlamaConfig::from_json(&json.to_string())
}

#[rstest]
#[case("model_type", json!({"model_type": "gpt2"}))]
#[case("vocab_size", json!({"vocab_size": 0}))]
#[case("hidden_size", json!({"hidden_size": 1u64 << 40}))]
#[case("num_hidden_layers", json!({"num_hidden_layers": 0}))]
#[case("num_attention_heads", json!({"num_attention_heads": 0}))]
#[case("num_attention_heads", json!({"num_attention_heads": [4, 4, 4]}))]
#[case("num_key_value_heads", json!({"num_key_value_heads": 3}))]
#[case("num_key_value_heads", json!({"num_key_value_heads": [2, 3]}))]
#[case("head_dim", json!({"head_dim": 5}))]
#[case("head_dim", json!({"head_dim": null, "num_attention_heads": 3, "num_key_value_heads": 3}))]
#[case("head_dim", json!({"head_dim": null, "num_attention_heads": [4, 2]}))]
#[case("hidden_act", json!({"hidden_act": "gelu"}))]
#[case("attention_dropout", json!({"attention_dropout": 0.1}))]
#[case("rms_norm_eps", json!({"rms_norm_eps": -1.0}))]
#[case("pad_token_id", json!({"pad_token_id": 11}))]
#[case("rope_theta", json!({"rope_theta": 0.0}))]
#[case("rope_type", json!({"rope_scaling": {"type": "yarn", "factor": 2.0}}))]
#[case("factor", json!({"rope_scaling": {"rope_type": "llama3"}}))]
#[case("partial_rotary_factor", json!({"rope_parameters": {"partial_rotary_factor": 0.5}}))]
#[case("config", json!({"hidden_size": "eight"}))]
#[case("config", json!({"intermediate_size": null}))]
fn a_config_is_refused_by_its_entry(#[case] argument: &str, #[case] changes: Value) {
    assert_eq!(refusal(with(changes)).argument, argument);
}

#[test]
fn entries_left_out_have_the_values_of_transformers() {
    let given = with(json!({"num_key_value_heads": null, "head_dim": null, "pad_token_id": -1}));
    let given = given.unwrap();
    assert_eq!((given.heads[1].query, given.heads[1].kv), (4, 4));
    assert_eq!((given.head_dim, given.pad_token_id), (2, Some(10)));
    assert_eq!((given.rms_norm_eps, given.rope.theta), (1e-6, 100.0));
    assert!(!given.tie_word_embeddings && !given.attention_bias && !given.mlp_bias);
    // A Llama that says so slides no window; a Mistral does.
    let window = |model_type| with(json!({"sliding_window": 4, "model_type": model_type}));
    assert_eq!(window("llama").unwrap().sliding_window, None);
    assert_eq!(window("mistral").unwrap().sliding_window, Some(4));
}

#[rstest]
#[case(Kind::Double)]
#[case(Kind::Float)]
#[case(Kind::BFloat16)]
#[case(Kind::Half)]
fn what_is_saved_is_what_is_read(#[case] kind: Kind) {
    let folder = TempDir::new().unwrap();
    let config = with(json!({"mlp_bias": true, "tie_word_embeddings": true})).unwrap();
    let weights = weights(&config, Kind::Double);
    let model = Llama::new(config, weights, kind, Device::Cpu).unwrap();
    model.save(folder.path()).unwrap();
    let read = Llama::from_folder(folder.path(), kind, Device::Cpu).unwrap();
    assert_eq!(read.parameters(), model.parameters());
    assert!(
        read.parameters()
            .iter()
            .all(|(_, one)| one.is_leaf() && one.requires_grad())
    );
    // Into another dtype: rounded once.
    let wide = Llama::from_folder(folder.path(), Kind::Double, Device::Cpu).unwrap();
    for ((name, wide), (_, narrow)) in wide.parameters().into_iter().zip(model.parameters()) {
        assert_eq!(*wide, narrow.to_kind(Kind::Double), "{name}");
    }
}

fn made(weights: Weights) -> Result<Llama> {
    Llama::new(config(4, 2), weights, Kind::Double, Device::Cpu)
}

#[test]
fn weights_are_refused_by_their_name() {
    let all = || weights(&config(4, 2), Kind::Double);
    let refused = |name: &str, tensor: Option<Tensor>| {
        let mut weights = all();
        weights.remove(name);
        weights.extend(tensor.map(|tensor| (name.to_owned(), tensor)));
        let refused = refusal(made(weights));
        assert_eq!(refused.argument, "weights");
        assert!(refused.problem.contains(name), "{refused}");
    };
    refused(LAST, None);
    refused("model.norm.weight", None);
    refused("lm_head.weight", None);
    refused(
        LAST,
        Some(Tensor::zeros([12, 8], (Kind::Double, Device::Cpu))),
    );
    refused(
        LAST,
        Some(Tensor::zeros([8, 12], (Kind::Int64, Device::Cpu))),
    );
    refused(
        "model.layers.2.mlp.down_proj.weight",
        Some(Tensor::zeros([8, 12], (Kind::Double, Device::Cpu))),
    );
    let kind = Llama::new(config(4, 2), all(), Kind::Int, Device::Cpu);
    assert_eq!(refusal(kind).argument, "kind");
}

#[test]
fn what_older_files_hold_besides_is_left_out() {
    let config = with(json!({"tie_word_embeddings": true})).unwrap();
    let mut all = weights(&config, Kind::Double);
    let embedding = all["model.embed_tokens.weight"].shallow_clone();
    let frequencies = Tensor::zeros([2], (Kind::Float, Device::Cpu));
    let of_layer = "model.layers.0.self_attn.rotary_emb.inv_freq".to_owned();
    all.insert(of_layer, frequencies);
    all.insert("lm_head.weight".to_owned(), embedding.shallow_clone());
    let of = |weights| Llama::new(config.clone(), weights, Kind::Double, Device::Cpu);
    let model = of(all).unwrap();
    assert_eq!(model.parameters().len(), 2 * 9 + 2);

    let mut all = weights(&config, Kind::Double);
    all.insert("lm_head.weight".to_owned(), embedding + 1.0);
    assert!(refusal(of(all)).problem.contains("lm_head.weight"));
}

#[test]
fn folders_are_refused() {
    let folder = TempDir::new().unwrap();
    let read = || refusal(Llama::from_folder(folder.path(), Kind::Float, Device::Cpu));
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    assert!(read().problem.contains("config.json"));
    write("config.json", &config_json(4, 2).to_string());
    assert!(read().problem.contains("model.safetensors"));
    let index = "model.safetensors.index.json";
    write(index, r#"{"weight_map": {"x": "../x.safetensors"}}"#);
    assert!(read().problem.contains("../x.safetensors"));
    write(index, r#"{"weight_map": {"x": "one.safetensors"}}"#);
    assert!(read().problem.contains("one.safetensors"));
    // The same tensor in two files.
    let one = Tensor::zeros([1], (Kind::Float, Device::Cpu));
    for name in ["one.safetensors", "two.safetensors"] {
        Tensor::write_safetensors(&[("x", &one)], folder.path().join(name)).unwrap();
    }
    write(
        index,
        r#"{"weight_map": {"x": "one.safetensors", "y": "two.safetensors"}}"#,
    );
    assert!(read().problem.contains("more than one file"));
    // Of a dtype that no weight has.
    let words = Tensor::zeros([1], (Kind::Int64, Device::Cpu));
    let path = folder.path().join("model.safetensors");
    Tensor::write_safetensors(&[("x", &words)], &path).unwrap();
    assert!(read().problem.contains("I64"));
    // Cut short.
    write("model.safetensors", "12345678{");
    assert_eq!(read().argument, "folder");
    // A file is in the way.
    let saved = llama(4, 2).save(&folder.path().join("config.json"));
    assert_eq!(refusal(saved).argument, "folder");
}
