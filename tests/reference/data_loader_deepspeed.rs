//! DeepSpeed's own data loader adapter beside this one.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod world;

use serde_json::{Value, json};
use std::{
    io::Write,
    path::Path,
    process::{Command, Stdio},
};
use tch::{Device, Kind, Tensor};
use ulysses::{Batch, DataLoaderAdapter, Preparation, Shard, Shift, position_ids};
use world::on_ranks;

/// Batch `index` of `rank`: two sequences whose ids and weights are all
/// different, in two documents each.
fn whole(rank: usize, index: usize) -> Batch {
    // DeepSpeed's gather over gloo takes equal shapes only.
    let tokens = 4 + 2 * index as i64;
    let count = 2 * tokens;
    let first = (rank * 100 + index) as i64 * 1000;
    let ids = Tensor::arange_start(first, first + count, (Kind::Int64, Device::Cpu));
    let ids = ids.view([2, tokens]);
    let ends = [vec![3, tokens as usize], vec![2, tokens as usize]];
    Batch::default()
        .with("labels", ids.copy())
        .with("weights", ids.to_kind(Kind::Float) / 8)
        .with("position_ids", position_ids(&ends).unwrap())
        .with("input_ids", ids)
}

/// DeepSpeed's own adapter, on two processes, serves the same shards in the
/// same order, over two epochs. What it leaves as it is, and calls targets,
/// has the same names here.
#[test]
fn deepspeeds_own_adapter_serves_the_same() {
    let as_json = |tensor: &Tensor| -> Value {
        match tensor.kind() {
            Kind::Float => json!(Vec::<Vec<f32>>::try_from(tensor).unwrap()),
            _ => json!(Vec::<Vec<i64>>::try_from(tensor).unwrap()),
        }
    };
    let entries = |rank, index| {
        let batch = whole(rank, index);
        let entry = |name: &str| {
            let tensor = batch.get(name).unwrap();
            let dtype = if tensor.kind() == Kind::Float {
                "float32"
            } else {
                "int64"
            };
            (name.to_owned(), json!([dtype, as_json(tensor)]))
        };
        batch.names().map(entry).collect::<Value>()
    };
    let batches = [0, 1].map(|rank| [0, 1, 2].map(|index| entries(rank, index)));
    let theirs = deepspeed(&json!(batches));

    let preparation = Preparation {
        shift: Some(Shift::AcrossDocuments),
        ..Preparation::default()
    };
    let ours = on_ranks(2, |communicator| {
        let rank = communicator.rank();
        let open = |_| [0, 1, 2].map(|index| Ok::<_, String>(whole(rank, index)));
        let mut adapter = DataLoaderAdapter::new(communicator, preparation, open);
        let length = adapter.epoch().remaining();
        let mut epoch = || -> Value {
            let shards = adapter.epoch().map(Result::unwrap);
            let entries = |shard: Shard| -> Value {
                let entries = shard.entries.iter();
                entries
                    .map(|(name, tensor)| (name.clone(), as_json(tensor)))
                    .collect()
            };
            shards.map(entries).collect()
        };
        json!({"len": length.unwrap(), "epochs": [epoch(), epoch()]})
    });
    assert_eq!(json!(ours), theirs);
}

/// The answer of `data_loader_deepspeed.py`.
fn deepspeed(batches: &Value) -> Value {
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut child = Command::new(project.join(".venv/bin/python"))
        .arg(project.join("tests/reference/data_loader_deepspeed.py"))
        .env("OMP_NUM_THREADS", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("this test needs the project's Python: run `make setup`");
    let mut input = child.stdin.take().unwrap();
    input.write_all(batches.to_string().as_bytes()).unwrap();
    drop(input);
    let output = child.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{errors}", output.status);
    serde_json::from_slice(&output.stdout).unwrap()
}
