//! The oracle's gradients are the derivatives of its own forward, and its
//! forward is what attention is defined to be.
#![allow(missing_docs, clippy::unwrap_used)]

use approx::assert_relative_eq;
use fixtures::{Array, AttentionCase, Dtype, Input, Inputs, Structure, values};
use rstest::rstest;
use ulysses_conformance::oracle::{attention, attention_dropped};

/// <dO, attention(inputs)>, of which the gradients are the derivatives.
fn loss(case: &AttentionCase, inputs: &Inputs, dropout: Option<&[f64]>) -> f64 {
    let out = attention_dropped(case, inputs, dropout).unwrap().out;
    out.iter()
        .zip(inputs.dout.to_f64())
        .map(|(o, d)| o * d)
        .sum()
}

fn array_of(inputs: &mut Inputs, input: Input) -> &mut Array {
    match input {
        Input::Query => &mut inputs.q,
        Input::Key => &mut inputs.k,
        Input::Value => &mut inputs.v,
        Input::OutputCotangent => &mut inputs.dout,
        _ => inputs.head_state.get_mut(&input).unwrap(),
    }
}

/// Changes one element.
fn change(inputs: &mut Inputs, input: Input, element: usize, change: impl Fn(f64) -> f64) {
    let array = array_of(inputs, input);
    let mut values = array.to_f64();
    values[element] = change(values[element]);
    *array = Array::from_f64(Dtype::F64, &array.shape.clone(), &values);
}

/// A multiplier of weights of which about a third is dropped.
fn dropout_of(case: &AttentionCase) -> Option<Vec<f64>> {
    let probability = f64::from(case.extras.dropout?) / 100.0;
    let weights = case.batch * case.query_heads * case.sequence * case.kv_sequence();
    let drops = |i: usize| i * 7 % 10 < 3;
    let of = |i| {
        if drops(i) {
            0.0
        } else {
            1.0 / (1.0 - probability)
        }
    };
    Some((0..weights).map(of).collect())
}

#[rstest]
#[case::mha("attention/p1-b2-s5-hq2-hkv2-d3-full-f64-gaussian-seed1")]
#[case::gqa("attention/p1-b1-s6-hq4-hkv2-d3-causal-f64-peaked-seed2")]
#[case::mqa("attention/p1-b2-s4-hq3-hkv1-d2-causal-f64-gaussian-seed3")]
#[case::value_size("attention/p1-b1-s5-hq4-hkv2-d3-causal-f64-gaussian-seed1-dv5")]
#[case::cross("attention/p1-b2-s4-hq4-hkv2-d3-full-f64-gaussian-seed1-dv2-cross7")]
#[case::window("attention/p1-b1-s7-hq2-hkv1-d3-causal-f64-gaussian-seed1-window3")]
#[case::window_full("attention/p1-b1-s7-hq2-hkv1-d3-full-f64-gaussian-seed1-window3")]
#[case::documents("attention/p1-b2-s7-hq2-hkv1-d3-causal-f64-gaussian-seed1-docs3")]
#[case::ends("attention/p1-b2-s7-hq2-hkv1-d3-full-f64-gaussian-seed1-ends3")]
#[case::pad_left("attention/p1-b2-s8-hq2-hkv1-d3-causal-f64-gaussian-seed1-padleft")]
#[case::pad_right("attention/p1-b2-s8-hq2-hkv1-d3-full-f64-gaussian-seed1-padright")]
#[case::blocks("attention/p1-b1-s7-hq4-hkv2-d3-causal-f64-gaussian-seed1-blocks2")]
#[case::alibi("attention/p1-b2-s5-hq4-hkv2-d3-causal-f64-gaussian-seed1-alibi")]
#[case::sinks("attention/p1-b2-s5-hq4-hkv2-d3-full-f64-gaussian-seed1-sinks")]
#[case::sinks_blind("attention/p1-b2-s8-hq2-hkv1-d3-full-f64-gaussian-seed1-padleft-sinks")]
#[case::norms("attention/p1-b2-s5-hq4-hkv2-d3-causal-f64-gaussian-seed1-norms")]
#[case::rope("attention/p1-b1-s5-hq4-hkv2-d4-causal-f64-gaussian-seed1-rope")]
#[case::mrope("attention/p1-b1-s7-hq2-hkv1-d16-full-f64-gaussian-seed1-mrope")]
#[case::softcap("attention/p1-b1-s5-hq4-hkv2-d3-full-f64-gaussian-seed1-softcap2")]
#[case::scale("attention/p1-b1-s5-hq4-hkv2-d3-causal-f64-gaussian-seed1-scale125")]
#[case::dropout("attention/p1-b2-s5-hq4-hkv2-d5-causal-f64-onehot-seed1-dropout30")]
#[case::all(
    "attention/p1-b2-s6-hq4-hkv2-d6-causal-f64-onehot-seed1-dv7-window4-docs2-padright-blocks2-\
     alibi-sinks-norms-rope-softcap3-scale80-dropout30"
)]
fn gradients_are_finite_differences_of_the_forward(#[case] case: AttentionCase) {
    let inputs = Inputs::of(&case);
    let dropout = dropout_of(&case);
    let answer = attention_dropped(&case, &inputs, dropout.as_deref()).unwrap();
    // Central differences err by the third derivative times step^2 / 6, and by
    // rounding, u / step: both near 1e-10 here.
    let step = 1e-5;
    let mut compared = Vec::new();
    for (tensor, gradients) in answer.iter().skip(1) {
        let input = tensor.like();
        assert_eq!(gradients.len(), inputs.get(input).unwrap().to_f64().len());
        for (i, &gradient) in gradients.iter().enumerate() {
            let at = |step| {
                let mut inputs = inputs.clone();
                change(&mut inputs, input, i, |x| x + step);
                loss(&case, &inputs, dropout.as_deref())
            };
            let is = (at(step) - at(-step)) / (2.0 * step);
            assert_relative_eq!(gradient, is, epsilon = 1e-8, max_relative = 1e-6);
        }
        assert!(gradients.iter().any(|&x| x != 0.0), "{}", tensor.name());
        compared.push(input);
    }
    let mut due: Vec<_> = Input::ALL.to_vec();
    due.retain(|&input| input.is_present(&case) && input != Input::OutputCotangent);
    assert_eq!(compared, due);
}

/// The forward from its definition, one number at a time.
#[rstest]
#[case::full("attention/p1-b2-s7-hq4-hkv2-d3-full-f64-gaussian-seed1")]
#[case::causal("attention/p1-b2-s7-hq6-hkv3-d3-causal-f64-peaked-seed1")]
// More rows than one block of the oracle holds.
#[case::row_blocks("attention/p1-b1-s300-hq2-hkv1-d4-causal-f64-gaussian-seed1")]
#[case::row_blocks_alibi(
    "attention/p1-b1-s150-hq2-hkv1-d4-causal-f64-gaussian-seed1-window9-alibi"
)]
#[case::scores(
    "attention/p1-b2-s7-hq6-hkv3-d3-causal-f64-gaussian-seed1-alibi-sinks-softcap2-scale90"
)]
#[case::heads("attention/p1-b2-s7-hq6-hkv3-d4-causal-f64-gaussian-seed1-docs2-norms-rope")]
#[case::mrope("attention/p1-b2-s20-hq2-hkv1-d32-causal-f64-gaussian-seed1-mrope")]
#[case::cross("attention/p1-b2-s3-hq4-hkv2-d3-full-f64-gaussian-seed1-dv2-cross7-sinks")]
#[case::blind("attention/p1-b2-s8-hq4-hkv2-d3-causal-f64-gaussian-seed1-padleft-blocks2")]
#[case::blind_sinks("attention/p1-b2-s8-hq4-hkv2-d3-causal-f64-gaussian-seed1-padright-sinks")]
fn the_forward_is_the_softmax_of_what_each_query_sees(#[case] case: AttentionCase) {
    let inputs = Inputs::of(&case);
    let out = attention(&case, &inputs).unwrap().out;
    let (q, k) = (
        heads(&case, &inputs, Input::Query),
        heads(&case, &inputs, Input::Key),
    );
    let v = inputs.v.to_f64();
    let of_heads = |input| inputs.get(input).map(Array::to_f64);
    let (slopes, sinks) = (of_heads(Input::Slopes), of_heads(Input::Sinks));
    let structure = Structure::of(&case);
    let (d, dv) = (case.head_size, case.value_size());
    for b in 0..case.batch {
        for t in 0..case.sequence {
            for h in 0..case.query_heads {
                let row = (b * case.sequence + t) * case.query_heads + h;
                let kv_row = |key: usize| {
                    let kv_head = h / (case.query_heads / case.kv_heads);
                    (b * case.kv_sequence() + key) * case.kv_heads + kv_head
                };
                let weight = |key: usize| {
                    if !structure.sees(b, h, t, key) {
                        return 0.0;
                    }
                    let dot: f64 = (0..d)
                        .map(|c| q[row * d + c] * k[kv_row(key) * d + c])
                        .sum();
                    let mut score = dot * case.score_scale();
                    if let Some(cap) = case.extras.softcap.map(f64::from) {
                        score = cap * (score / cap).tanh();
                    }
                    if let Some(slopes) = &slopes {
                        score -= slopes[h] * t.abs_diff(key) as f64;
                    }
                    score.exp()
                };
                let weights: Vec<f64> = (0..case.kv_sequence()).map(weight).collect();
                let sink = sinks.as_ref().map_or(0.0, |sinks| sinks[h].exp());
                let total: f64 = weights.iter().sum::<f64>() + sink;
                for c in 0..dv {
                    let terms = weights.iter().enumerate();
                    let sum: f64 = terms
                        .map(|(j, weight)| weight * v[kv_row(j) * dv + c])
                        .sum();
                    let due = if sum == 0.0 { 0.0 } else { sum / total };
                    let is = out[row * dv + c];
                    assert_relative_eq!(is, due, max_relative = 1e-9, epsilon = 1e-12);
                }
            }
        }
    }
}

/// Q or K with norm and rotation, one number at a time.
fn heads(case: &AttentionCase, inputs: &Inputs, input: Input) -> Vec<f64> {
    let (weight, tokens) = match input {
        Input::Query => (Input::QueryNorm, case.sequence),
        _ => (Input::KeyNorm, case.kv_sequence()),
    };
    let (d, count) = (case.head_size, input.heads(case));
    let mut heads = inputs.get(input).unwrap().to_f64();
    if let Some(weight) = inputs.get(weight).map(Array::to_f64) {
        for (row, head) in heads.chunks_mut(d).enumerate() {
            let mean = head.iter().map(|x| x * x).sum::<f64>() / d as f64;
            for (c, x) in head.iter_mut().enumerate() {
                *x *= weight[row % count * d + c] / (mean + 1e-6).sqrt();
            }
        }
    }
    if case.extras.rotary.is_some() {
        let ids = values::position_ids(case);
        let (positions, is_multimodal) = (ids.to_f64(), ids.shape.len() == 3);
        for (row, head) in heads.chunks_mut(d).enumerate() {
            for c in 0..d / 2 {
                // In sixteenths of the head: two in time, three in height, three
                // in width.
                let component = match 16 * c / d {
                    0 | 1 => 0,
                    2..5 => 1,
                    _ => 2,
                };
                let plane = if is_multimodal {
                    component * case.batch * tokens
                } else {
                    0
                };
                let base = 2.0_f64.powi(d as i32 / 2);
                let angle = positions[plane + row / count] * base.powf(-2.0 * c as f64 / d as f64);
                let (x, y) = (head[c], head[c + d / 2]);
                head[c] = x * angle.cos() - y * angle.sin();
                head[c + d / 2] = y * angle.cos() + x * angle.sin();
            }
        }
    }
    heads
}

/// What one document holds has no say in another: not a bit of it.
#[rstest]
fn nothing_leaks_from_one_document_into_another(
    #[values("full", "causal")] mask: &str,
    #[values("docs3", "ends3")] documents: &str,
) {
    let name = format!("attention/p1-b2-s12-hq4-hkv2-d4-{mask}-f64-gaussian-seed1-{documents}");
    let case: AttentionCase = name.parse().unwrap();
    let structure = Structure::of(&case);
    let inputs = Inputs::of(&case);
    let answer = attention(&case, &inputs).unwrap();
    for batch in 0..case.batch {
        let changed = structure.document(batch, case.sequence / 2);
        let mut other = inputs.clone();
        for input in [
            Input::Query,
            Input::Key,
            Input::Value,
            Input::OutputCotangent,
        ] {
            let of_token = input.heads(&case) * case.head_size;
            let first = (batch * case.sequence + changed.start) * of_token;
            for i in first..first + changed.len() * of_token {
                change(&mut other, input, i, |x| 3.0 * x + 1.0);
            }
        }
        let other = attention(&case, &other).unwrap();
        for ((tensor, a), (_, b)) in answer.iter().zip(other.iter()) {
            let of_token = tensor.like().heads(&case) * case.head_size;
            for (token, (a, b)) in a.chunks(of_token).zip(b.chunks(of_token)).enumerate() {
                let is_changed =
                    token / case.sequence == batch && changed.contains(&(token % case.sequence));
                let name = tensor.name();
                assert!(is_changed || a == b, "{name} of token {token}");
                // The test sees a change where there is one.
                assert!(!is_changed || name != "out" || a != b, "token {token}");
            }
        }
    }
}

#[test]
fn padding_has_no_say_and_gets_no_gradient() {
    for padding in ["padleft", "padright"] {
        let name = format!("attention/p1-b2-s12-hq4-hkv2-d4-causal-f64-gaussian-seed1-{padding}");
        let case: AttentionCase = name.parse().unwrap();
        let structure = Structure::of(&case);
        let answer = attention(&case, &Inputs::of(&case)).unwrap();
        for (tensor, values) in answer.iter() {
            let of_token = tensor.like().heads(&case) * case.head_size;
            for (token, row) in values.chunks(of_token).enumerate() {
                let (batch, token) = (token / case.sequence, token % case.sequence);
                let is_zero = row.iter().all(|&x| x == 0.0);
                assert_eq!(
                    is_zero,
                    structure.is_padding(batch, token),
                    "{}",
                    tensor.name()
                );
            }
        }
    }
}

/// What does not change the dense answer.
#[test]
fn how_a_case_is_asked_does_not_change_its_answer() {
    let plain: AttentionCase = "attention/p2-b1-s12-hq4-hkv2-d4-causal-f64-gaussian-seed1"
        .parse()
        .unwrap();
    let answer = attention(&plain, &Inputs::of(&plain)).unwrap();
    for parts in [
        "zigzag",
        "striped",
        "eval",
        "transposed",
        "recompute",
        "fixed",
        "debug3",
    ] {
        let case: AttentionCase = format!("{plain}-{parts}").parse().unwrap();
        assert_eq!(
            attention(&case, &Inputs::of(&case)).unwrap(),
            answer,
            "{parts}"
        );
    }
}
