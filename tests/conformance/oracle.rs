//! The oracle's gradients are the derivatives of its own forward.
#![allow(missing_docs, clippy::unwrap_used)]

use approx::assert_relative_eq;
use fixtures::{Array, Case, Dtype, Inputs};
use rstest::rstest;
use ulysses_conformance::oracle::attention;

/// <dO, attention(inputs)>, of which dQ, dK and dV are the gradients.
fn loss(case: &Case, inputs: &Inputs) -> f64 {
    let out = attention(case, inputs).unwrap().out;
    out.iter()
        .zip(inputs.dout.to_f64())
        .map(|(o, d)| o * d)
        .sum()
}

fn moved(array: &Array, element: usize, step: f64) -> Array {
    let mut values = array.to_f64();
    values[element] += step;
    Array::from_f64(Dtype::F64, &array.shape, &values)
}

#[rstest]
#[case::mha("attention/p1-b2-s5-hq2-hkv2-d3-full-f64-gaussian-seed1")]
#[case::gqa("attention/p1-b1-s6-hq4-hkv2-d3-causal-f64-peaked-seed2")]
#[case::mqa("attention/p1-b2-s4-hq3-hkv1-d2-causal-f64-gaussian-seed3")]
fn gradients_are_finite_differences_of_the_forward(#[case] case: Case) {
    let inputs = Inputs::of(&case);
    let answer = attention(&case, &inputs).unwrap();
    // Central differences err by the third derivative times step^2 / 6, and by
    // rounding, u / step: both near 1e-10 here.
    let step = 1e-5;
    let difference = |change: &dyn Fn(&mut Inputs, f64)| {
        let at = |step| {
            let mut inputs = inputs.clone();
            change(&mut inputs, step);
            loss(&case, &inputs)
        };
        (at(step) - at(-step)) / (2.0 * step)
    };
    for (i, &gradient) in answer.dq.iter().enumerate() {
        let is = difference(&|inputs, step| inputs.q = moved(&inputs.q, i, step));
        assert_relative_eq!(gradient, is, epsilon = 1e-8, max_relative = 1e-6);
    }
    for (i, &gradient) in answer.dk.iter().enumerate() {
        let is = difference(&|inputs, step| inputs.k = moved(&inputs.k, i, step));
        assert_relative_eq!(gradient, is, epsilon = 1e-8, max_relative = 1e-6);
    }
    for (i, &gradient) in answer.dv.iter().enumerate() {
        let is = difference(&|inputs, step| inputs.v = moved(&inputs.v, i, step));
        assert_relative_eq!(gradient, is, epsilon = 1e-8, max_relative = 1e-6);
    }
}

/// The forward from its definition, one number at a time.
#[rstest]
#[case::full("attention/p1-b2-s7-hq4-hkv2-d3-full-f64-gaussian-seed1")]
#[case::causal("attention/p1-b2-s7-hq6-hkv3-d3-causal-f64-peaked-seed1")]
// More rows than one block of the oracle holds.
#[case::blocks("attention/p1-b1-s300-hq2-hkv1-d4-causal-f64-gaussian-seed1")]
fn the_forward_is_the_softmax_of_what_each_query_sees(#[case] case: Case) {
    let inputs = Inputs::of(&case);
    let out = attention(&case, &inputs).unwrap().out;
    let (q, k, v) = (inputs.q.to_f64(), inputs.k.to_f64(), inputs.v.to_f64());
    let (s, d) = (case.sequence, case.head_size);
    let causal = case.to_string().contains("causal");
    for b in 0..case.batch {
        for t in 0..s {
            for h in 0..case.query_heads {
                let kv_head = h / (case.query_heads / case.kv_heads);
                let row = ((b * s + t) * case.query_heads + h) * d;
                let kv_row = |token: usize| ((b * s + token) * case.kv_heads + kv_head) * d;
                let seen = if causal { t + 1 } else { s };
                let weights: Vec<f64> = (0..seen)
                    .map(|token| {
                        let dot: f64 = (0..d).map(|c| q[row + c] * k[kv_row(token) + c]).sum();
                        (dot / (d as f64).sqrt()).exp()
                    })
                    .collect();
                let total: f64 = weights.iter().sum();
                for c in 0..d {
                    let sum: f64 = (0..seen).map(|j| weights[j] * v[kv_row(j) + c]).sum();
                    assert_relative_eq!(
                        out[row + c],
                        sum / total,
                        max_relative = 1e-9,
                        epsilon = 1e-12
                    );
                }
            }
        }
    }
}
