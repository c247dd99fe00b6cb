//! The profile `tiled`: what is due is what loops over tokens and finite
//! differences give.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::BTreeMap;

use approx::assert_abs_diff_eq;
use fixtures::exchange::{AskedInfo, Declared, Tensors, posed};
use fixtures::tiled::{TiledInfo, tiles};
use fixtures::{Case, Profile};
use rstest::rstest;
use ulysses_conformance::catalogue;
use ulysses_conformance::judge::{Question, lambda, right_answer};
use ulysses_conformance::runner::Asked;

/// How far an input is moved to either side for a derivative.
const STEP: f64 = 1e-5;

type Numbers = BTreeMap<String, Vec<f64>>;

fn due(case: &Case) -> Tensors {
    let question = Question::of(case, Declared::default());
    let answers = Vec::new();
    right_answer(&Asked { question, answers }, Declared::default()).unwrap()
}

/// What each rank is told, with its inputs in float64.
fn told(case: &Case) -> Vec<(TiledInfo, Numbers)> {
    let told = posed(case).into_iter().filter_map(|(info, tensors)| {
        let numbers = tensors
            .iter()
            .map(|(name, array)| (name.clone(), array.to_f64()));
        match info.asked {
            AskedInfo::Tiled(info) => Some((info, numbers.collect())),
            _ => None,
        }
    });
    told.collect()
}

/// The products of a row and each row of a weight.
fn products(weight: &[f64], row: &[f64]) -> Vec<f64> {
    let product = |of: &[f64]| of.iter().zip(row).map(|(a, b)| a * b).sum();
    weight.chunks(row.len()).map(product).collect()
}

/// The output of a rank, token by token.
fn out(info: &TiledInfo, inputs: &Numbers) -> Vec<f64> {
    let of_token = |(token, row): (usize, &[f64])| {
        let scaled = row
            .iter()
            .enumerate()
            .map(|(channel, x)| match inputs.get("scale") {
                Some(scale) => scale[channel] * x,
                None => *x,
            });
        let row: Vec<f64> = scaled.collect();
        match info.function.as_str() {
            "mlp" => {
                let gate = products(&inputs["gate"], &row);
                let gate = gate.iter().map(|g| g / (1.0 + (-g).exp()));
                let both = gate.zip(products(&inputs["up"], &row)).map(|(g, u)| g * u);
                products(&inputs["down"], &both.collect::<Vec<_>>())
            }
            "affine" => products(&inputs["weight"], &row),
            _ => {
                let logits = products(&inputs["head"], &row);
                let label = inputs["labels"][token];
                if label == info.ignore_index as f64 {
                    return vec![f64::NAN];
                }
                let sum: f64 = logits.iter().map(|z| z.exp()).sum();
                vec![sum.ln() - logits[label as usize]]
            }
        }
    };
    let rows = inputs["hidden"].chunks(info.hidden_size).enumerate();
    let tokens: Vec<Vec<f64>> = rows.map(of_token).collect();
    let mean = |tokens: &mut dyn Iterator<Item = f64>| {
        let counted: Vec<f64> = tokens.filter(|loss| !loss.is_nan()).collect();
        counted.iter().sum::<f64>() / counted.len().max(1) as f64
    };
    let losses = || tokens.iter().map(|loss| loss[0]);
    let length = tokens.len() / info.batch;
    match info.reduction.as_deref() {
        None => tokens.concat(),
        Some("none") => losses()
            .map(|loss| if loss.is_nan() { 0.0 } else { loss })
            .collect(),
        Some("sum") => vec![losses().filter(|loss| !loss.is_nan()).sum()],
        Some("mean") => vec![mean(&mut losses())],
        Some(_) => {
            let tiles = tiles(length, info.tiles);
            let means = tiles.iter().map(|tile| {
                let is_in = |token: usize| tile.contains(&(token % length));
                let losses = losses().enumerate().filter(|(token, _)| is_in(*token));
                mean(&mut losses.map(|(_, loss)| loss))
            });
            vec![means.sum::<f64>() / tiles.len() as f64]
        }
    }
}

/// How the output, times its cotangent, changes with each number of an input.
fn derivative(info: &TiledInfo, inputs: &Numbers, name: &str) -> Vec<f64> {
    let objective = |place: usize, step: f64| {
        let mut moved = inputs.clone();
        moved.get_mut(name).unwrap()[place] += step;
        let products = out(info, &moved).into_iter().zip(&inputs["dout"]);
        products.map(|(out, dout)| out * dout).sum::<f64>()
    };
    let places = 0..inputs[name].len();
    places
        .map(|place| (objective(place, STEP) - objective(place, -STEP)) / (2.0 * STEP))
        .collect()
}

#[rstest]
#[case::mlp("tiled/p2-mlp-b2-s7-h3-w4-t2-f64-seed0-passed")]
#[case::affine("tiled/p2-affine-b2-s7-h3-w4-t2-f64-seed0-passed-signals")]
#[case::mean("tiled/p2-nll-b2-s11-h3-w5-t3-f64-seed0-ignoresome-passed-dout300")]
#[case::empty_tile("tiled/p2-nll-b1-s11-h3-w5-t3-f64-seed0-ignoretile")]
#[case::sum("tiled/p2-nll-b1-s11-h3-w5-t3-f64-seed0-sum-ignoresome-dout25")]
#[case::none("tiled/p2-nll-b2-s11-h3-w5-t3-f64-seed0-none-ignoresome")]
#[case::tile_means("tiled/p2-nll-b2-s11-h3-w5-t3-f64-seed0-tilemeans-dout200")]
#[case::nothing("tiled/p2-nll-b1-s11-h3-w5-t3-f64-seed0-ignoreall")]
#[case::no_token("tiled/p3-nll-b1-s2-h3-w5-t3-f64-seed0")]
fn what_is_due_is_what_each_token_gives(#[case] name: &str) {
    let case: Case = name.parse().unwrap();
    let due = due(&case);
    for (rank, (info, inputs)) in told(&case).iter().enumerate() {
        let right = |name: &str| due[&format!("{name}.rank-{rank}")].to_f64();
        assert_abs_diff_eq!(right("out")[..], out(info, inputs)[..], epsilon = 1e-12);
        for name in &info.gradients {
            let derivative = derivative(info, inputs, name);
            assert_abs_diff_eq!(
                right(&format!("d{name}"))[..],
                derivative[..],
                epsilon = 1e-8
            );
        }
        if !info.signals.is_empty() {
            assert_eq!(right("gradient_signals"), vec![1.0; info.signals.len()]);
            let off = &due[&format!("gradient_signals.rank-{rank}.may_be_off")];
            assert_eq!(off.to_f64(), vec![0.0; info.signals.len()]);
        }
    }
}

/// By how much a root is larger than its estimate from 64 runs, so that it is
/// as seldom too small as a right number is called wrong:
/// `32 (ln x + 1 - x) = ln(1e-6 / 2^30)` has the solution 0.14406.
const LARGER: f64 = 2.6346;

/// Of n terms t in any order: partial sums round by
/// `n / 3 (sum t)^2 + n / 6 sum t^2`, products by `sum t^2`, what is kept by
/// `(sum t)^2`.
#[test]
fn the_root_of_a_sum_in_float32_is_that_of_its_partial_sums() {
    let case = "tiled/p1-affine-b1-s40-h9-w3-t1-f32-seed0".parse().unwrap();
    let (due, told) = (due(&case), told(&case));
    let (info, inputs) = &told[0];
    let tolerances = due["out.rank-0.may_be_off"].to_f64();
    let (terms, unit) = (info.hidden_size as f64, 0.5f64.powi(24));
    let mut ratios = Vec::new();
    for (token, row) in inputs["hidden"].chunks(info.hidden_size).enumerate() {
        for (class, weight) in inputs["weight"].chunks(info.hidden_size).enumerate() {
            let products = || row.iter().zip(weight).map(|(x, w)| x * w);
            let square = products().sum::<f64>().powi(2);
            let squares: f64 = products().map(|t| t * t).sum();
            let root = square * (terms / 3.0 + 1.0) + squares * (terms / 6.0 + 1.0);
            let sampled = tolerances[token * info.width + class] / lambda() / LARGER / unit;
            ratios.push(sampled.powi(2) / root);
        }
    }
    assert_eq!(ratios.len(), 120);
    // The mean of 64 squares is off by a factor of 2 as good as never, and that
    // over 120 numbers by a tenth.
    assert!(ratios.iter().all(|ratio| (0.4..2.5).contains(ratio)));
    let mean = ratios.iter().sum::<f64>() / ratios.len() as f64;
    assert!((mean - 1.0).abs() < 0.1, "{mean}");
}

#[test]
fn the_catalogue_of_each_world_asks_every_function_and_element_type() {
    for world in 1..=4 {
        let cases = catalogue::cases().into_iter();
        let cases: Vec<Case> = cases
            .filter(|case| case.profile() == Profile::Tiled && case.world() == world)
            .collect();
        for case in &cases {
            assert_eq!(case.check(), Ok(()));
            assert_eq!(case.to_string().parse().as_ref(), Ok(case));
        }
        for part in [
            "-mlp-", "-affine-", "-nll-", "-f64-", "-f32-", "-bf16-", "-f16-",
        ] {
            let has = |case: &Case| case.to_string().contains(part);
            assert!(cases.iter().any(has), "{part} on {world} ranks");
        }
    }
}
