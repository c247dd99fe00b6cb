//! A model folder that Hugging Face transformers wrote gives the logits, the
//! loss and the gradient of every weight that transformers' own dense float64
//! run gives, however many ranks share the sequence.
//!
//! `transformers_llama.py` beside this file writes the folders and the answers.
//!
//! The tolerance is relative to the largest number of a tensor. A product adds
//! up n numbers with n roundings of at most u, the unit roundoff; a layer has
//! nine products in a row (four projections, scores, weighted values and three
//! of the MLP), and backward goes over each again. So 2 * 9 * layers * n * u,
//! with the longest sum for n: 2.4e-13 in float64, 1.3e-4 in float32.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod world;

use std::{
    collections::BTreeMap,
    env,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, OnceLock},
};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;
use ulysses::{
    Communicator, Documents, Llama, ModelInput, MpiWorld, Reduction, Registration,
    register_with_model,
};
use world::{TIME_LIMIT, on_ranks, uneven_shards};

/// Where an MPI rank finds the folders that its parent has made.
const FOLDERS: &str = "ULYSSES_TEST_MODELS";
const IGNORED: i64 = -100;

/// Of the repository.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The folders of all cases, made once for each run of this program.
fn folders() -> PathBuf {
    static MADE: OnceLock<TempDir> = OnceLock::new();
    if let Some(made) = env::var_os(FOLDERS) {
        return PathBuf::from(made);
    }
    let made = MADE.get_or_init(|| {
        let root = root();
        let made = TempDir::new().unwrap();
        let python = Command::new(root.join(".venv/bin/python"))
            .arg(root.join("tests/reference/transformers_llama.py"))
            .arg(made.path())
            .output()
            .expect("this test needs .venv: run `make setup`");
        let said = String::from_utf8_lossy(&python.stderr);
        assert!(python.status.success(), "{said}");
        made
    });
    made.path().to_path_buf()
}

fn expected(case: &str) -> BTreeMap<String, Tensor> {
    let path = folders().join(case).join("expected.safetensors");
    Tensor::read_safetensors(path)
        .unwrap()
        .into_iter()
        .collect()
}

/// How one case is run.
#[derive(Clone, Copy)]
struct Run {
    kind: Kind,
    kernel: &'static str,
    documents: Option<Documents<'static>>,
    checkpointing: bool,
    tiles: usize,
}

const PLAIN: Run = Run {
    kind: Kind::Double,
    kernel: "sdpa",
    documents: None,
    checkpointing: false,
    tiles: 1,
};

/// Logits of this rank's tokens, the loss, and this rank's part of every
/// gradient.
type Found = (Tensor, Tensor, BTreeMap<String, Tensor>);

fn on_this_rank(world: Arc<dyn Communicator>, case: &str, shards: &[usize], run: Run) -> Found {
    let (rank, ranks) = (world.rank(), world.size());
    let folder = folders().join(case).join("model");
    let mut model = Llama::from_folder(&folder, run.kind, Device::Cpu).unwrap();
    let registration = Registration {
        core_attention: run.kernel,
        sequence_parallel_size: ranks,
        micro_batch_size: 2,
        uneven_heads: true,
        ..Registration::default()
    };
    register_with_model(&mut model, world, &registration).unwrap();
    model.set_checkpointing(run.checkpointing);
    model.set_mlp_tiles(run.tiles).unwrap();

    let whole = expected(case);
    let own = |name: &str| world::shard(&whole[name], shards, rank);
    let (ids, positions, labels) = (own("input_ids"), own("position_ids"), own("labels"));
    let input = ModelInput {
        input_ids: &ids,
        position_ids: &positions,
        documents: run.documents,
        attention_mask: None,
    };
    let logits = tch::no_grad(|| model.forward(&input)).unwrap();
    let loss = model.loss(&input, &labels, IGNORED, Reduction::Mean, run.tiles);
    let loss = loss.unwrap();
    loss.backward();
    let gradients = model.parameters().into_iter();
    let gradients = gradients.map(|(name, parameter)| (name, parameter.grad()));
    (logits, loss.detach(), gradients.collect())
}

/// How far the answers of all ranks are off, relative to the largest number of
/// each tensor: the worst of all.
fn worst(case: &str, found: &[Found]) -> (f64, String) {
    let expected = expected(case);
    let logits: Vec<&Tensor> = found.iter().map(|(logits, _, _)| logits).collect();
    let mut got = BTreeMap::from([("logits".to_owned(), Tensor::cat(&logits, 1))]);
    for (rank, (_, loss, _)) in found.iter().enumerate() {
        got.insert(format!("loss of rank {rank}"), loss.shallow_clone());
    }
    for name in found[0].2.keys() {
        let parts = found.iter().map(|(_, _, gradients)| &gradients[name]);
        let sum = parts.fold(Tensor::from(0.0), |sum, part| {
            sum + part.to_kind(Kind::Double)
        });
        got.insert(format!("gradient.{name}"), sum);
    }
    let of_weights = |names: &mut dyn Iterator<Item = &String>| {
        names.filter(|name| name.starts_with("gradient.")).count()
    };
    assert_eq!(
        of_weights(&mut got.keys()),
        of_weights(&mut expected.keys())
    );
    let off = got.iter().map(|(name, tensor)| {
        let due = &expected[name.split(" of rank").next().unwrap()];
        assert_eq!(tensor.size(), due.size(), "{name}");
        let largest = due.abs().max().double_value(&[]);
        assert!(largest > 1e-3, "{name} shows nothing: {largest:e}");
        let off = (tensor.to_kind(Kind::Double) - due).abs().max();
        (off.double_value(&[]) / largest, name.clone())
    });
    off.fold((0.0, String::new()), |worst, one| {
        // Not a number is the worst.
        if one.0 <= worst.0 { worst } else { one }
    })
}

fn tolerance(case: &str, unit_roundoff: f64) -> f64 {
    let path = folders().join(case).join("model");
    let config = ulysses::LlamaConfig::read(&path).unwrap();
    let widths = [
        config.hidden_size,
        config.intermediate_size,
        config.vocab_size,
    ];
    let longest = widths.into_iter().max().unwrap();
    (2 * 9 * config.layers() * longest) as f64 * unit_roundoff
}

fn roundoff(kind: Kind) -> f64 {
    match kind {
        Kind::Double => f64::EPSILON / 2.0,
        _ => f64::from(f32::EPSILON) / 2.0,
    }
}

fn agrees(case: &str, shards: &[usize], run: Run, unit_roundoff: f64) {
    let found = on_ranks(shards.len(), |world| on_this_rank(world, case, shards, run));
    let (off, name) = worst(case, &found);
    let tolerance = tolerance(case, unit_roundoff);
    println!(
        "{case} on {shards:?} in {:?}: {off:.1e} of {tolerance:.1e}, {name}",
        run.kind
    );
    assert!(
        off <= tolerance,
        "{case} on {shards:?}: {name} is off by {off:e} of {tolerance:e}"
    );
}

/// On one to four ranks, with shards of different lengths.
fn agrees_on_all(case: &str, run: Run) {
    let tokens = expected(case)["input_ids"].size()[1] as usize;
    for ranks in 1..=4 {
        agrees(case, &uneven_shards(tokens, ranks), run, roundoff(run.kind));
    }
}

#[test]
fn grouped_heads_and_files_with_an_index() {
    let files = folders().join("gqa/model/model.safetensors.index.json");
    assert!(files.exists());
    agrees_on_all("gqa", PLAIN);
    let eager = Run {
        kernel: "eager",
        ..PLAIN
    };
    agrees_on_all("gqa", eager);
}

#[test]
fn a_tied_head_biases_and_a_padding_token() {
    agrees_on_all("tied", PLAIN);
}

#[test]
fn one_kv_head_and_lower_frequencies() {
    agrees_on_all("mqa", PLAIN);
}

#[test]
fn a_sliding_window() {
    agrees_on_all("window", PLAIN);
}

#[test]
fn layers_with_different_heads() {
    agrees_on_all("mixed", PLAIN);
}

#[test]
fn packed_documents_by_positions_that_restart() {
    let packed = Run {
        documents: Some(Documents::FromPositions),
        ..PLAIN
    };
    agrees_on_all("packed", packed);
}

#[test]
fn checkpointed_and_in_tiles() {
    let saving = Run {
        checkpointing: true,
        tiles: 3,
        ..PLAIN
    };
    agrees_on_all("gqa", saving);
}

#[test]
fn in_float32() {
    let single = Run {
        kind: Kind::Float,
        ..PLAIN
    };
    for case in ["gqa", "tied", "mqa"] {
        agrees_on_all(case, single);
    }
}

#[test]
fn shards_without_a_token_or_without_a_label() {
    agrees("gqa", &[0, 13], PLAIN, roundoff(Kind::Double));
    // Tokens 2 to 4 predict 3 to 5, none of which has a label.
    agrees("gqa", &[2, 3, 0, 8], PLAIN, roundoff(Kind::Double));
}

/// With norms and angles in float32, as transformers computes them.
#[test]
fn transformers_as_it_comes_is_as_near_as_float32_is() {
    agrees("as_it_comes", &[7, 6], PLAIN, roundoff(Kind::Float));
}

#[test]
fn transformers_reads_what_is_saved() {
    const READ: &str = "
import sys, torch, transformers
read = lambda folder: transformers.AutoModelForCausalLM.from_pretrained(folder)
due, got = read(sys.argv[1]), read(sys.argv[2])
assert got.dtype == due.dtype == torch.float64
assert got.config.to_diff_dict() == due.config.to_diff_dict()
got = dict(got.named_parameters())
for name, parameter in due.named_parameters():
    assert torch.equal(got.pop(name), parameter), name
assert not got
";
    let saved = TempDir::new().unwrap();
    let folder = folders().join("tied/model");
    let model = Llama::from_folder(&folder, Kind::Double, Device::Cpu).unwrap();
    model.save(saved.path()).unwrap();
    let python = Command::new(root().join(".venv/bin/python"))
        .args(["-c", READ])
        .args([folder.as_path(), saved.path()])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&python.stderr);
    assert!(python.status.success(), "{said}");
}

/// The copies that mpirun starts run the body; the one outside looks at them.
#[test]
fn on_processes() {
    const CASES: [&str; 2] = ["gqa", "tied"];
    if env::var_os("OMPI_COMM_WORLD_SIZE").is_some() {
        tch::set_num_threads(1);
        let world = MpiWorld::initialize().unwrap();
        let communicator = world.communicator().with_time_limit(TIME_LIMIT);
        let (rank, ranks) = (communicator.rank(), communicator.size());
        let communicator: Arc<dyn Communicator> = Arc::new(communicator);
        for case in CASES {
            let shards = uneven_shards(13, ranks);
            let (logits, loss, gradients) =
                on_this_rank(Arc::clone(&communicator), case, &shards, PLAIN);
            let named = [("logits", &logits), ("loss", &loss)];
            let gradients = gradients.iter().map(|(name, part)| (name.as_str(), part));
            let file = format!("{case}-{ranks}-{rank}.safetensors");
            let all: Vec<_> = named.into_iter().chain(gradients).collect();
            Tensor::write_safetensors(&all, folders().join(file)).unwrap();
        }
        return;
    }
    let folders = folders();
    for ranks in [2, 4] {
        let mpirun = Command::new("mpirun")
            .args(["--oversubscribe", "-n", &ranks.to_string()])
            .arg(env::current_exe().unwrap())
            .args(["--exact", "on_processes", "--nocapture", "--test-threads=1"])
            .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
            .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
            .env("OMP_NUM_THREADS", "1")
            .env(FOLDERS, &folders)
            .output()
            .expect("this test needs mpirun: install Open MPI");
        let said =
            String::from_utf8_lossy(&mpirun.stdout) + String::from_utf8_lossy(&mpirun.stderr);
        assert!(mpirun.status.success(), "{said}");
        for case in CASES {
            let found: Vec<Found> = (0..ranks)
                .map(|rank| {
                    let file = folders.join(format!("{case}-{ranks}-{rank}.safetensors"));
                    let mut all: BTreeMap<String, Tensor> = Tensor::read_safetensors(file)
                        .unwrap()
                        .into_iter()
                        .collect();
                    let (logits, loss) = (all.remove("logits"), all.remove("loss"));
                    (logits.unwrap(), loss.unwrap(), all)
                })
                .collect();
            let (off, name) = worst(case, &found);
            let tolerance = tolerance(case, roundoff(Kind::Double));
            assert!(
                off <= tolerance,
                "{case} on {ranks}: {name} is off by {off:e}"
            );
        }
    }
}
