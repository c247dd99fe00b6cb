//! An honest answer in the case's own element type passes, on any seed: the
//! judge's bounds leave room for another order of the same sums.
//!
//! Each rank has the queries of its tokens and all keys, one head at a time,
//! and its part of every sum over tokens is rounded before the judge adds the
//! parts up. All that is an order that no dense attention has.
#![allow(missing_docs, clippy::unwrap_used)]

mod answers;

use answers::{judged, ok};
use fixtures::exchange::Tensors;
use fixtures::{Array, AttentionCase, Dtype, Input, Inputs};
use rstest::rstest;
use tch::{Device, Kind, Tensor};
use ulysses_conformance::judge::{Due, Verdict};
use ulysses_conformance::oracle::AnswerTensor;

fn tensor(array: &Array, kind: Kind) -> Tensor {
    let shape: Vec<i64> = array.shape.iter().map(|&n| n as i64).collect();
    Tensor::from_slice(&array.to_f64())
        .to_kind(kind)
        .view(&shape[..])
}

fn array(tensor: &Tensor, dtype: Dtype) -> Array {
    let shape: Vec<usize> = tensor.size().iter().map(|&n| n as usize).collect();
    let values = Vec::<f64>::try_from(tensor.contiguous().view(-1).to_kind(Kind::Double)).unwrap();
    Array::from_f64(dtype, &shape, &values)
}

/// `x / rms(x) * weight`, of all heads.
fn norm(x: &Tensor, weight: &Tensor) -> Tensor {
    let wide = x.to_kind(Kind::Float);
    let mean = wide.square().mean_dim(-1, true, Kind::Float);
    (wide * (mean + 1e-6).rsqrt()).to_kind(x.kind()) * weight
}

/// Output of some rows of one head, `[batch, rows, head size]`.
fn attend(
    case: &AttentionCase,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    first: i64,
    state: &[Tensor],
) -> Tensor {
    let keys = k.size()[1];
    let mut scores = q.matmul(&k.transpose(1, 2)) * case.score_scale();
    if let Some(cap) = case.extras.softcap.map(f64::from) {
        scores = (scores / cap).tanh() * cap;
    }
    let place = |n| Tensor::arange(n, (Kind::Double, Device::Cpu));
    let behind = (place(q.size()[1]) + first).unsqueeze(1) - place(keys);
    if case.extras.alibi {
        scores -= &state[0] * behind.abs().to_kind(q.kind());
    }
    scores = scores.masked_fill(&behind.lt(0.0), f64::NEG_INFINITY);
    if case.extras.sinks {
        let sink = state[1].expand([q.size()[0], q.size()[1], 1], false);
        scores = Tensor::cat(&[scores, sink], -1);
    }
    let weights = scores.softmax(-1, Kind::Float).to_kind(q.kind());
    weights.narrow(-1, 0, keys).matmul(v)
}

/// What `rank` contributes, computed in `kind`: out and dq of its tokens, dk and
/// dv of all, and its parts of the gradients of head state.
fn contribution(case: &AttentionCase, inputs: &Inputs, rank: usize, kind: Kind) -> Vec<Tensor> {
    let leaf = |array: &Array| tensor(array, kind).set_requires_grad(true);
    let zero = Array::from_f64(
        case.dtype,
        &[case.query_heads],
        &vec![0.0; case.query_heads],
    );
    let of = |input| leaf(inputs.get(input).unwrap_or(&zero));
    let (q, k, v) = (leaf(&inputs.q), leaf(&inputs.k), leaf(&inputs.v));
    let state = [
        Input::Slopes,
        Input::Sinks,
        Input::QueryNorm,
        Input::KeyNorm,
    ]
    .map(of);
    let (normed_q, normed_k) = match case.extras.norms {
        true => (norm(&q, &state[2]), norm(&k, &state[3])),
        false => (q.shallow_clone(), k.shallow_clone()),
    };
    let shard = &case.shards()[rank];
    let (first, rows) = (shard.tokens()[0] as i64, shard.len() as i64);
    let heads: Vec<Tensor> = (0..case.query_heads)
        .map(|head| {
            let kv = case.kv_head_of(head) as i64;
            let q = normed_q.select(2, head as i64).narrow(1, first, rows);
            let state = [state[0].get(head as i64), state[1].get(head as i64)];
            attend(
                case,
                &q,
                &normed_k.select(2, kv),
                &v.select(2, kv),
                first,
                &state,
            )
        })
        .collect();
    let out = Tensor::stack(&heads, 2);
    let dout = tensor(&inputs.dout, kind).narrow(1, first, rows);
    (&out * dout).sum(kind).backward();
    let mut answer = vec![
        out.detach(),
        q.grad().narrow(1, first, rows),
        k.grad(),
        v.grad(),
    ];
    answer.extend(state.iter().map(|state| match state.grad().defined() {
        true => state.grad(),
        false => state.zeros_like(),
    }));
    answer
}

#[rstest]
fn an_honest_answer_in_another_order_passes(
    #[values("alibi", "sinks", "norms", "alibi-sinks-norms-softcap4")] parts: &str,
    #[values("f32", "bf16", "f16")] dtype: &str,
    #[values(false, true)] in_float32: bool,
    #[values(1, 2, 3, 4)] seed: u64,
) {
    let name =
        format!("attention/p3-b2-s39-hq2-hkv1-d16-causal-{dtype}-gaussian-seed{seed}-{parts}");
    let case: AttentionCase = name.parse().unwrap();
    let kind = match case.dtype {
        Dtype::Bf16 if !in_float32 => Kind::BFloat16,
        Dtype::F16 if !in_float32 => Kind::Half,
        _ => Kind::Float,
    };
    let inputs = Inputs::of(&case);
    let contributions: Vec<_> = (0..case.world)
        .map(|rank| contribution(&case, &inputs, rank, kind))
        .collect();
    let of_tokens = |tensor: usize, rank: usize| {
        let copies: Vec<_> = contributions.iter().map(|c| &c[tensor]).collect();
        let sum = Tensor::stack(&copies, 0).sum_dim_intlist(0, false, kind);
        let shard = &case.shards()[rank];
        sum.narrow(1, shard.tokens()[0] as i64, shard.len() as i64)
    };
    let ranks = (0..case.world).map(|rank| {
        let named = AnswerTensor::ALL.into_iter().enumerate();
        let present = named.filter(|(_, name)| name.like().is_present(&case));
        present
            .map(|(i, name)| {
                let tensor = match i {
                    2 | 3 => of_tokens(i, rank),
                    _ => contributions[rank][i].shallow_clone(),
                };
                (name.name().to_owned(), array(&tensor, case.dtype))
            })
            .collect::<Tensors>()
    });
    let judgement = judged(&case, Due::Answer, ok(ranks.collect()));
    // Two heads' sinks may be too few numbers to show much.
    let is_without_power = judgement.sentence.starts_with("the case has no power");
    assert!(
        judgement.verdict == Verdict::Pass || is_without_power,
        "{judgement:?}"
    );
    let comparison = judgement.comparison.unwrap();
    assert!(comparison.tensors.iter().all(|tensor| !tensor.is_wrong()));
}
