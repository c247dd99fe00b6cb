//! Both sides of the exchange, in Rust and in Python, write what the schemas
//! say.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

mod program;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use fixtures::exchange::{
    self, AnswerInfo, AnswerStatus, CaseInfo, Declared, Hello, Judge, PROTOCOL, Parameters,
    Precision, Session, SessionInfo, Upstream,
};
use fixtures::{Case, Feature};
use rstest::rstest;
use serde_json::{Value, json};
use tempfile::TempDir;

const NAME: &str = "attention/p1-b2-s6-hq4-hkv2-d8-causal-f32-gaussian-seed0";

fn violations(schema: &str, value: &Value) -> Vec<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("schemas");
    let schema = fs::read_to_string(folder.join(format!("{schema}.schema.json"))).unwrap();
    let schema: Value = serde_json::from_str(&schema).unwrap();
    let validator = jsonschema::validator_for(&schema).unwrap();
    validator
        .iter_errors(value)
        .map(|error| error.to_string())
        .collect()
}

fn assert_valid(schema: &str, value: &Value) {
    assert_eq!(violations(schema, value), [""; 0], "{value}");
}

fn session_info() -> SessionInfo {
    SessionInfo {
        protocol: PROTOCOL,
        world: 1,
        device: "cpu".to_owned(),
        kernel: "math".to_owned(),
        time_limit_s: 30.0,
        judge: Judge {
            pid: std::process::id(),
            host: hostname::get().unwrap().to_string_lossy().into_owned(),
        },
    }
}

fn info(name: &str) -> CaseInfo {
    exchange::posed(&name.parse().unwrap()).remove(0).0
}

fn case_info() -> CaseInfo {
    info(NAME)
}

fn loss_info() -> CaseInfo {
    info("loss/p2-b1-s8-v5-f32-seed0")
}

fn answer_info(status: AnswerStatus) -> AnswerInfo {
    AnswerInfo {
        status,
        message: "why".to_owned(),
        elapsed_s: 0.5,
        peak_memory_bytes: None,
        bytes_sent: Some(12),
    }
}

#[test]
fn what_rust_writes_is_valid() {
    for device in ["cpu", "cuda", "cuda:1"] {
        let device = device.to_owned();
        let info = SessionInfo {
            device,
            ..session_info()
        };
        assert_valid("session", &json!(info));
    }
    assert_valid("case", &json!(case_info()));
    for status in [
        AnswerStatus::Ok,
        AnswerStatus::Unsupported,
        AnswerStatus::Error,
    ] {
        assert_valid("answer", &json!(answer_info(status)));
    }
    let hello = Hello {
        protocol: PROTOCOL,
        rank: 0,
        world: 1,
        pid: 1,
        host: "here".to_owned(),
        implementation: "mine".to_owned(),
        version: "1".to_owned(),
        libraries: BTreeMap::new(),
        features: Feature::ALL.map(|feature| feature.name().to_owned()).into(),
        declared: Declared::default(),
    };
    assert_valid("hello", &json!(hello));
    for precision in [Precision::Fused, Precision::Stored, Precision::Tf32] {
        for upstream in [Upstream::Share, Upstream::TimesRanks] {
            for parameters in [Parameters::Sum, Parameters::Average] {
                let declared = Declared {
                    precision,
                    upstream,
                    parameters,
                };
                let hello = Hello {
                    declared,
                    ..hello.clone()
                };
                assert_valid("hello", &json!(hello));
            }
        }
    }
}

#[rstest]
#[case::plain("attention/p1-b2-s6-hq4-hkv2-d16-causal-f32-gaussian-seed18446744073709551615")]
#[case::all(
    "attention/p2-b2-s8-hq4-hkv2-d16-full-bf16-onehot-seed0-dv9-zigzag-window3-ends2-padleft-blocks4\
     -alibi-sinks-norms-mrope-softcap5-scale7-dropout25-transposed-recompute-fixed"
)]
#[case::cross(
    "attention/p2-b2-s6-hq4-hkv2-d16-full-f64-peaked-seed0-cross9-striped-expanded-debug3"
)]
#[case::eval("attention/p3-b1-s2-hq4-hkv2-d16-causal-f16-peaked-seed0-eval-docs2-rope")]
#[case::bad_window("attention/p2-b1-s6-hq4-hkv2-d16-causal-f32-peaked-seed0-window3-bad:window")]
#[case::bad_softcap("attention/p2-b1-s6-hq4-hkv2-d16-causal-f32-peaked-seed0-softcap3-bad:softcap")]
#[case::bad_dropout("attention/p2-b1-s6-hq4-hkv2-d16-causal-f32-onehot-seed0-dropout3-bad:dropout")]
#[case::bad_length("attention/p2-b1-s6-hq4-hkv2-d16-causal-f32-peaked-seed0-fixed-bad:length")]
#[case::bad_layers("attention/p2-b1-s6-hq4-hkv2-d16-causal-f32-peaked-seed0-debug3-bad:layers")]
#[case::loss("loss/p3-b2-s7-v11-bf16-seed0-ignorerank-dloss25")]
#[case::loss_of_hidden("loss/p2-b1-s8-v5-f64-seed0-hidden3-large-ignoreall")]
#[case::batch("batch/p2-b2-s16-seed0-zigzag-docs3-across-mask-pad8")]
#[case::stream("batch/p2-b2-s17-seed0-ends3-stream2-lengths-ragged-epochs2")]
#[case::bad_pad("batch/p2-b2-s17-seed0-pad8-bad:pad")]
#[case::mesh("mesh/p4-replicate2-shard1-sp2-seed0-mpu-sums")]
#[case::bad_product("mesh/p4-replicate2-shard1-sp2-seed0-bad:product")]
#[case::bad_size("mesh/p4-replicate2-shard1-sp2-seed0-bad:zero")]
#[case::bad_labels("loss/p2-b1-s8-v5-f32-seed0-bad:labels")]
#[case::bad_labels_length("loss/p2-b1-s8-v5-f16-seed0-bad:length")]
fn every_part_of_a_case_is_valid(#[case] name: &str) {
    let case: Case = name.parse().unwrap();
    for (info, _) in exchange::posed(&case) {
        assert_valid("case", &json!(info));
    }
}

#[rstest]
#[case::missing("session", json!(session_info()), "world", Value::Null)]
#[case::negative("case", json!(case_info()), "batch", json!(0))]
#[case::sharding("case", json!(case_info()), "sharding", json!("random"))]
#[case::rotary("case", json!(case_info()), "rotary", json!({"base": 4.0, "sections": [1, 2]}))]
#[case::untold("case", json!(case_info()), "window", json!("none"))]
#[case::of_other_profile("case", json!(case_info()), "vocabulary", json!(5))]
#[case::no_profile("case", json!(case_info()), "profile", json!("lose"))]
#[case::labels("case", json!(loss_info()), "ignore_index", Value::Null)]
#[case::no_vocabulary("case", json!(loss_info()), "vocabulary", json!(0))]
#[case::of_attention("case", json!(loss_info()), "scale", json!(1.0))]
#[case::no_rows("case", json!(info("batch/p2-b2-s16-seed0")), "batch", json!(0))]
#[case::fill("case", json!(info("batch/p2-b2-s16-seed0")), "padding", json!({"multiple": 8}))]
#[case::axis("case", json!(info("mesh/p2-replicate1-shard1-sp2-seed0")), "tp", json!(1))]
#[case::unknown("answer", json!(answer_info(AnswerStatus::Ok)), "status", json!("fine"))]
#[case::more("answer", json!(answer_info(AnswerStatus::Ok)), "mood", json!("good"))]
fn what_is_not_of_the_schema_is_seen(
    #[case] schema: &str,
    #[case] mut value: Value,
    #[case] key: &str,
    #[case] change: Value,
) {
    value[key] = change;
    assert!(!violations(schema, &value).is_empty());
}

/// The JSON under `key` in the metadata of a safetensors file, as it stands.
fn metadata(path: &Path, key: &str) -> Value {
    let bytes = fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    serde_json::from_str(header["__metadata__"][key].as_str().unwrap()).unwrap()
}

#[test]
fn what_the_python_kit_writes_is_valid() {
    let folder = TempDir::new().unwrap();
    let session = Session::create(folder.path(), &session_info()).unwrap();
    session
        .pose(&exchange::posed(&NAME.parse().unwrap()))
        .unwrap();
    let mut kit = Command::new(program::python())
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("adapters/torch_plain.py"))
        .env("ULYSSES_EXCHANGE", folder.path())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while session.result(0, 0).is_err() {
        assert!(Instant::now() < deadline, "no answer");
        std::thread::sleep(Duration::from_millis(10));
    }
    session.end().unwrap();
    assert!(kit.wait().unwrap().success());

    let hello = fs::read_to_string(folder.path().join("hello/rank-0.json")).unwrap();
    assert_valid("hello", &serde_json::from_str(&hello).unwrap());
    let result = folder.path().join("results/0/rank-0.safetensors");
    let answer = metadata(&result, "answer");
    assert_valid("answer", &answer);
    assert_eq!(answer["status"], "ok", "{answer}");
    let case = folder.path().join("cases/0/rank-0.safetensors");
    assert_valid("case", &metadata(&case, "case"));
}
