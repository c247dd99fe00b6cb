//! The oracle, and the reference on any number of ranks, are held against what
//! JAX computed: `golden/attention.safetensors`.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use fixtures::{Case, Inputs, sharding};
use rstest::rstest;
use safetensors::SafeTensors;
use sha2::{Digest, Sha256};
use ulysses::Kernel;
use ulysses_conformance::implementation::{Implementation, ReferenceOnThreads};
use ulysses_conformance::oracle;

const NAMES: [&str; 4] = ["out", "dq", "dk", "dv"];

fn golden_folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../golden")
}

/// By case, the tensors in the order of [`NAMES`], `[batch, tokens, heads, head
/// size]`.
fn golden() -> Vec<(Case, [Vec<f64>; 4])> {
    let bytes = fs::read(golden_folder().join("attention.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut cases: BTreeMap<String, [Vec<f64>; 4]> = BTreeMap::new();
    for (key, view) in tensors.tensors() {
        let (case, name) = key.rsplit_once('/').unwrap();
        let at = NAMES.iter().position(|&n| n == name).unwrap();
        let (elements, _) = view.data().as_chunks::<8>();
        let values = elements.iter().map(|&bytes| f64::from_le_bytes(bytes));
        cases.entry(case.to_owned()).or_default()[at] = values.collect();
    }
    cases
        .into_iter()
        .map(|(name, tensors)| (name.parse().unwrap(), tensors))
        .collect()
}

/// Two ways to sum the same few dozen products in float64 differ by a few units
/// in the last place of the largest.
fn assert_near(what: &str, is: &[f64], golden: &[f64]) {
    assert_eq!(is.len(), golden.len(), "{what}");
    let largest = golden.iter().fold(0.0, |max: f64, x| max.max(x.abs()));
    for (i, (is, golden)) in is.iter().zip(golden).enumerate() {
        let off = (is - golden).abs();
        assert!(
            off <= 32.0 * f64::EPSILON * largest,
            "{what}: element {i} is {is:e}, JAX says {golden:e}"
        );
    }
}

#[test]
fn the_oracle_says_what_jax_says() {
    let golden = golden();
    assert_eq!(golden.len(), 8);
    for (case, tensors) in golden {
        let answer = oracle::attention(&case, &Inputs::of(&case)).unwrap();
        for ((name, is), golden) in NAMES.iter().zip(answer.tensors()).zip(&tensors) {
            assert_near(&format!("{name} of {case}"), is, golden);
        }
    }
}

#[rstest]
fn the_reference_says_what_jax_says(
    #[values(1, 2, 3, 4)] world: usize,
    #[values(Kernel::Sdpa, Kernel::Eager)] kernel: Kernel,
) {
    tch::set_num_threads(1);
    let mut reference = ReferenceOnThreads::new(kernel);
    for (case, tensors) in golden() {
        let case = Case { world, ..case };
        let answers = reference.ask(&case, &Inputs::of(&case)).unwrap();
        let shards: Vec<_> = answers
            .into_iter()
            .map(|answer| answer.unwrap().1)
            .collect();
        for (name, golden) in NAMES.iter().zip(&tensors) {
            let arrays: Vec<_> = shards.iter().map(|shard| shard[*name].clone()).collect();
            let is = sharding::join(&arrays).to_f64();
            assert_near(&format!("{name} of {case}"), &is, golden);
        }
    }
}

#[test]
fn a_golden_file_is_the_one_that_its_provenance_tells_of() {
    let provenance = fs::read_to_string(golden_folder().join("provenance.json")).unwrap();
    let provenance: BTreeMap<String, serde_json::Value> =
        serde_json::from_str(&provenance).unwrap();
    assert_eq!(
        provenance.keys().collect::<Vec<_>>(),
        ["attention.safetensors", "values.json"]
    );
    for (file, told) in provenance {
        let digest = Sha256::digest(fs::read(golden_folder().join(&file)).unwrap());
        let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            told["sha256"], digest,
            "{file} changed: make it anew with its command, or say in provenance.json why"
        );
    }
}
