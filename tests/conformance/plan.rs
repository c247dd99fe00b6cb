//! What `plan` prints of a model's cost, and of what others published.
#![allow(missing_docs, clippy::unwrap_used)]

mod program;

use std::fs;

use insta::assert_snapshot;
use program::{program, run};
use rstest::rstest;
use serde_json::{Value, json};

#[test]
fn a_plan_is_a_table_for_each_kind_of_cost() {
    let run = run("plan --model Llama-3.1-8B --sequence 131072,3.8M --sp 8 \
         --offload optimizer,checkpoints --tiled-mlp auto --tiled-loss auto --seconds 6455");
    assert_eq!((run.code, run.stderr.as_str()), (0, ""));
    assert_snapshot!("plan", run.stdout);
}

#[test]
fn shares_that_deepspeed_cannot_cut_are_planned_for_the_reference() {
    let run = run(
        "plan --model Qwen3-32B --sequence 100001 --sp 3 --dtype f32 --rank 2 \
         --no-checkpoints --full",
    );
    assert_eq!((run.code, run.stderr.as_str()), (0, ""));
    assert_snapshot!("plan-uneven", run.stdout);
}

#[test]
fn published_rows_stand_beside_what_is_said_of_them() {
    let run = run("plan --published");
    assert_eq!((run.code, run.stderr.as_str()), (0, ""));
    assert_snapshot!("plan-published", run.stdout);
}

#[test]
fn help_says_what_a_plan_is_told() {
    assert_snapshot!("help-plan", run("plan --help").stdout);
}

/// A tied model with biases, of head size h / Hq.
fn config() -> Value {
    json!({
        "model_type": "qwen2",
        "num_hidden_layers": 24,
        "hidden_size": 896,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151_936,
        "tie_word_embeddings": true,
    })
}

/// The lines of a plan with this `config.json`.
fn planned(config: &Value, arguments: &[&str]) -> Vec<Value> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    fs::write(&path, config.to_string()).unwrap();
    let run: program::Run = program()
        .args(["plan", "--json", "--config"])
        .arg(&path)
        .args(arguments)
        .output()
        .unwrap()
        .into();
    assert_eq!((run.code, run.stderr.as_str()), (0, ""));
    let lines = run.stdout.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn value<'a>(line: &'a Value, section: &str, name: &str) -> &'a Value {
    let quantities = line["quantities"].as_array().unwrap();
    let found = quantities.iter().find(|quantity| {
        quantity["name"] == name && quantity["section"].as_str().unwrap().starts_with(section)
    });
    &found.unwrap()["value"]
}

#[rstest]
// As published: Qwen2.5-0.5B, and Llama-3.1-8B.
#[case(json!({}), 494_032_768)]
#[case(
    json!({
        "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
        "vocab_size": 128_256, "tie_word_embeddings": false, "attention_bias": false,
    }),
    8_030_261_248u64
)]
fn a_config_of_hugging_face_has_its_published_parameters(
    #[case] changes: Value,
    #[case] parameters: u64,
) {
    let mut config = config();
    for (name, value) in changes.as_object().unwrap() {
        config[name] = value.clone();
    }
    let [line] = &planned(&config, &["--sequence", "1000"])[..] else {
        unreachable!("one length, one line");
    };
    assert_eq!(value(line, "memory", "parameters of the model"), parameters);
}

#[test]
fn json_has_a_line_for_each_length() {
    let lines = planned(&config(), &["--sequence", "8K,1.5M", "--sp", "2"]);
    let lengths: Vec<_> = lines.iter().map(|line| &line["sequence"]).collect();
    assert_eq!(lengths, [8000, 1_500_000]);
    // 2 bytes of 4000 tokens, twice 14 and twice 2 heads of size 64.
    let handed_over = value(
        &lines[0],
        "exchanges of a rank, exact",
        "layer forward, handed over",
    );
    assert_eq!(*handed_over, 2 * 4000 * (28 + 4) * 64);
}

#[rstest]
#[case("plan", "--sequence <TOKENS>")]
#[case("plan --sequence 8", "--model <NAME>")]
#[case("plan --model Llama-3.1-8B --sequence 0", "no number of tokens")]
#[case("plan --model Llama-3.1-8B --sequence 1.5", "no number of tokens")]
#[case("plan --model Llama-9B --sequence 8", "invalid value 'Llama-9B'")]
#[case(
    "plan --model Llama-3.1-8B --sequence 8 --dtype i64",
    "none of f64, f32"
)]
#[case(
    "plan --model Llama-3.1-8B --sequence 8 --tiled-mlp 0",
    "neither auto nor"
)]
#[case(
    "plan --model Llama-3.1-8B --sequence 8 --seconds 0",
    "seconds above 0"
)]
#[case("plan --model Llama-3.1-8B --sequence 8 --sp 0", "0 ranks")]
#[case("plan --model Llama-3.1-8B --sequence 8 --batch 0", "batch of 0")]
#[case(
    "plan --model Llama-3.1-8B --sequence 8 --sp 64",
    "fewer than the 64 ranks"
)]
#[case("plan --model Llama-3.1-8B --sequence 8 --sp 2 --rank 2", "is 2 of 2")]
#[case(
    "plan --model Llama-3.1-8B --sequence 8 --sp 4 --world 6",
    "do not divide"
)]
#[case("plan --config /nowhere/config.json --sequence 8", "No such file")]
#[case("plan --published --sequence 8", "cannot be used with")]
fn what_cannot_be_planned_is_refused(#[case] arguments: &str, #[case] reason: &str) {
    let run = run(arguments);
    assert_eq!(run.code, 2, "{}", run.stderr);
    assert!(run.stderr.contains(reason), "{}", run.stderr);
    assert_eq!(run.stdout, "");
}
