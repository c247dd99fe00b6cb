//! The oracle, and the reference on any number of ranks, are held against what
//! JAX computed: `golden/attention.safetensors`.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

use fixtures::exchange::{self, AnswerStatus, Tensors};
use fixtures::{Array, AttentionCase, Feature, Inputs, sharding};
use rstest::rstest;
use safetensors::SafeTensors;
use sha2::{Digest, Sha256};
use ulysses::{DeviceChoice, Kernel};
use ulysses_conformance::catalogue;
use ulysses_conformance::implementation::{Implementation, ReferenceOnThreads};
use ulysses_conformance::oracle::{self, AnswerTensor};

/// The numbers of ranks on which the reference is held against each case.
const WORLDS: [usize; 4] = [1, 2, 3, 4];

/// The features without a golden case, and why there can or need be none.
const WITHOUT_GOLDEN: [(Feature, &str); 9] = [
    (Feature::DtypeF32, "JAX said it in float64"),
    (Feature::DtypeF16, "JAX said it in float64"),
    (Feature::DtypeBf16, "JAX said it in float64"),
    (
        Feature::FewerQueryHeadsThanRanks,
        "the reference refuses them",
    ),
    (
        Feature::Dropout,
        "each implementation drops other weights; the judge recovers which",
    ),
    (Feature::Recompute, "it says how, and changes no number"),
    (Feature::EvalBypass, "it says where, and changes no number"),
    (
        Feature::FixedLength,
        "it says when to refuse, and changes no number",
    ),
    (
        Feature::SkipAllButLast,
        "the layers that are skipped change no number",
    ),
];

/// The tensors of an answer over the whole sequence, by name.
type Whole = BTreeMap<String, Vec<f64>>;

fn golden_folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../golden")
}

fn golden() -> Vec<(AttentionCase, Whole)> {
    let bytes = fs::read(golden_folder().join("attention.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut cases: BTreeMap<String, Whole> = BTreeMap::new();
    for (key, view) in tensors.tensors() {
        let (case, name) = key.rsplit_once('/').unwrap();
        let (elements, _) = view.data().as_chunks::<8>();
        let values = elements.iter().map(|&bytes| f64::from_le_bytes(bytes));
        let tensors = cases.entry(case.to_owned()).or_default();
        tensors.insert(name.to_owned(), values.collect());
    }
    cases
        .into_iter()
        .map(|(name, tensors)| (name.parse().unwrap(), tensors))
        .collect()
}

/// Where `is` is not what JAX says. Two ways to sum the same few dozen products
/// in float64 differ by a few units in the last place of the largest.
fn departures(case: &AttentionCase, is: &Whole, golden: &Whole) -> Vec<String> {
    if !is.keys().eq(golden.keys()) {
        let (is, golden) = (is.keys(), golden.keys());
        return vec![format!("{case}: {is:?} are answered, JAX has {golden:?}")];
    }
    let mut departures = Vec::new();
    for ((name, is), golden) in is.iter().zip(golden.values()) {
        if is.len() != golden.len() {
            let (is, golden) = (is.len(), golden.len());
            departures.push(format!("{name} of {case}: {is} elements, JAX has {golden}"));
            continue;
        }
        let largest = golden.iter().fold(0.0, |max: f64, x| max.max(x.abs()));
        let bound = 32.0 * f64::EPSILON * largest;
        // A NaN is within no bound.
        let beyond = |&i: &usize| {
            (is[i] - golden[i])
                .abs()
                .partial_cmp(&bound)
                .is_none_or(|o| o.is_gt())
        };
        let wrong: Vec<usize> = (0..is.len()).filter(beyond).collect();
        if let Some(&i) = wrong.first() {
            departures.push(format!(
                "{name} of {case}: {} of {} elements are off, first element {i}: {:e}, JAX says {:e}",
                wrong.len(),
                is.len(),
                is[i],
                golden[i]
            ));
        }
    }
    departures
}

#[test]
fn the_oracle_says_what_jax_says() {
    let mut wrong = Vec::new();
    for (case, golden) in golden() {
        let answer = oracle::attention(&case, &Inputs::of(&case)).unwrap();
        let is = answer
            .iter()
            .map(|(name, elements)| (name.name().to_owned(), elements.clone()))
            .collect();
        wrong.extend(departures(&case, &is, &golden));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[rstest]
fn the_reference_says_what_jax_says(#[values(Kernel::Sdpa, Kernel::Eager)] kernel: Kernel) {
    tch::set_num_threads(1);
    let golden = golden();
    let mut wrong = Vec::new();
    for world in WORLDS {
        let mut reference = ReferenceOnThreads::new(kernel, DeviceChoice::Cpu).unwrap();
        for (case, golden) in &golden {
            let case = AttentionCase {
                world,
                ..case.clone()
            };
            match answer(&mut reference, &case) {
                Ok(is) => wrong.extend(departures(&case, &is, golden)),
                Err(message) => wrong.push(format!("{case}: {message}")),
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The ranks' answers over the whole sequence, or what a rank that has none
/// says.
fn answer(reference: &mut ReferenceOnThreads, case: &AttentionCase) -> Result<Whole, String> {
    let mut ranks: Vec<Tensors> = Vec::new();
    for (rank, answer) in reference
        .ask(exchange::shards(case, &Inputs::of(case)))
        .map_err(|failure| format!("{failure:?}"))?
        .into_iter()
        .enumerate()
    {
        let (info, tensors) = answer?;
        if info.status != AnswerStatus::Ok {
            return Err(format!("rank {rank}: {}", info.message));
        }
        ranks.push(tensors);
    }
    let whole = |name: &String| {
        let parts: Vec<Array> = ranks.iter().map(|rank| rank[name].clone()).collect();
        match is_part_of_a_sum(case, name) {
            true => sum(&parts),
            false => sharding::join(&parts, &case.shards()).to_f64(),
        }
    };
    let named = |name: &String| (name.clone(), whole(name));
    Ok(ranks[0].keys().map(named).collect())
}

/// Whether each rank has a part of every element, in place of some tokens.
fn is_part_of_a_sum(case: &AttentionCase, name: &str) -> bool {
    let is_of_heads = |tensor: AnswerTensor| tensor.name() == name && tensor.is_head_state();
    AnswerTensor::ALL.into_iter().any(is_of_heads)
        || (case.extras.cross.is_some() && ["dk", "dv"].contains(&name))
}

fn sum(parts: &[Array]) -> Vec<f64> {
    let mut sum = vec![0.0; parts[0].shape.iter().product()];
    for part in parts {
        assert_eq!(part.shape, parts[0].shape, "parts of one sum are alike");
        let add = |(sum, part): (&mut f64, f64)| *sum += part;
        sum.iter_mut().zip(part.to_f64()).for_each(add);
    }
    sum
}

#[test]
fn every_feature_that_changes_a_number_has_a_golden_case() {
    let on_each_world = |case: AttentionCase| {
        WORLDS.map(|world| {
            let case = AttentionCase {
                world,
                ..case.clone()
            };
            case.check().unwrap();
            case.features()
        })
    };
    let cases = golden().into_iter().map(|(case, _)| case);
    let covered: BTreeSet<Feature> = cases.flat_map(on_each_world).flatten().collect();
    let asked = catalogue::attention().into_iter();
    let asked: BTreeSet<Feature> = asked.flat_map(|case| case.features()).collect();
    assert!(asked.len() > WITHOUT_GOLDEN.len());
    for feature in asked {
        let excuse = WITHOUT_GOLDEN.iter().find(|(of, _)| *of == feature);
        match (covered.contains(&feature), excuse) {
            (true, None) | (false, Some(_)) => {}
            (true, Some((_, why))) => {
                panic!(
                    "`{}` has a golden case, and none is said to be: {why}",
                    feature.name()
                )
            }
            (false, None) => panic!(
                "no golden case has `{}`: add one to golden/attention.py, or say above why not",
                feature.name()
            ),
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
