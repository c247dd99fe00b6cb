//! Other suites' rules say what their suites would have said, and do not see
//! what they are known not to see.
#![allow(missing_docs, clippy::unwrap_used)]

use std::iter::zip;

use fixtures::exchange::{AnswerInfo, AnswerStatus, Declared, Tensors};
use fixtures::{Array, AttentionCase, Inputs};
use rstest::rstest;
use tch::{Kind, Tensor};
use ulysses_conformance::judge::{self, Due, Verdict};
use ulysses_conformance::oracle::{self, Answer};
use ulysses_conformance::rivals::{RIVALS, Rival, Ruling, Shown, Tally};

type Whole = Answer<Vec<f64>>;

fn rival(name: &str) -> Rival {
    *RIVALS.iter().find(|rival| rival.name == name).unwrap()
}

/// Four tensors that hold the same numbers.
fn answer_of(numbers: &[f64]) -> Whole {
    let tensor = || numbers.to_vec();
    Answer {
        out: tensor(),
        dq: tensor(),
        dk: tensor(),
        dv: tensor(),
        head_state: Vec::new(),
    }
}

fn tensor<'a>(answer: &'a mut Whole, name: &str) -> &'a mut Vec<f64> {
    match name {
        "out" => &mut answer.out,
        "dq" => &mut answer.dq,
        "dk" => &mut answer.dk,
        _ => &mut answer.dv,
    }
}

/// What each rule says of an answer where one element of one tensor is off by
/// so much, and it should be 1 and the other 3.
fn ruling(name: &str, of: &str, dtype: &str, world: usize, off: f64) -> Ruling {
    let name_of_case = format!("attention/p{world}-b1-s1-hq1-hkv1-d2-full-{dtype}-gaussian-seed0");
    let case: AttentionCase = name_of_case.parse().unwrap();
    let mut inputs = Inputs::of(&case);
    inputs.dout = Array::from_f64(case.dtype, &[1, 1, 1, 2], &[1.0, 1.0]);
    let right = answer_of(&[1.0, 3.0]);
    let mut answer = right.clone();
    tensor(&mut answer, of)[0] += off;
    let shown = Shown {
        case: &case,
        inputs: &inputs,
        right: &right,
        dense: Some(&right),
        answer: &answer,
    };
    (rival(name).judges)(&shown)
}

#[rstest]
#[case::deepspeed_loss("DeepSpeed HF, ZeRO-3", "out", "f32", 2, 1e-8, 1e-6)]
#[case::deepspeed_zero3("DeepSpeed HF, ZeRO-3", "dq", "f32", 2, 1.12e-5, 1.14e-5)]
#[case::deepspeed_zero3_half("DeepSpeed HF, ZeRO-3", "dq", "bf16", 2, -0.015, -0.017)]
#[case::deepspeed_zero2("DeepSpeed HF, ZeRO-2", "dq", "f32", 2, 0.017, 0.018)]
#[case::pytorch_half("PyTorch context parallel", "dk", "bf16", 4, -0.035, -0.037)]
#[case::pytorch_more_ranks("PyTorch context parallel", "dv", "bf16", 8, 0.072, 0.073)]
#[case::pytorch_single("PyTorch context parallel", "out", "f32", 4, 1.1e-5, 1.3e-5)]
#[case::te_cp("Transformer Engine, CP", "dq", "bf16", 2, 0.05, 0.052)]
#[case::te_cp_f16("Transformer Engine, CP", "dq", "f16", 2, 0.01, 0.011)]
#[case::te("Transformer Engine", "dv", "bf16", 2, 0.029, 0.031)]
#[case::te_f16("Transformer Engine", "out", "f16", 2, 0.0019, 0.0021)]
#[case::megatron("Megatron-LM", "dk", "bf16", 2, 0.02, 0.021)]
#[case::verl_mean("verl", "out", "bf16", 2, 0.04, 0.041)]
#[case::verl_gradient("verl", "dq", "bf16", 2, 0.0109, 0.0111)]
#[case::yunchang("yunchang hybrid", "out", "bf16", 2, 0.0999, 0.1001)]
#[case::torch_f64("torch.testing", "dk", "f64", 1, 1.9e-7, 2.1e-7)]
#[case::torch_f16("torch.testing", "dv", "f16", 1, 0.001, 0.0011)]
fn a_rule_refuses_beyond_its_tolerance(
    #[case] name: &str,
    #[case] of: &str,
    #[case] dtype: &str,
    #[case] world: usize,
    #[case] within: f64,
    #[case] beyond: f64,
) {
    assert_eq!(ruling(name, of, dtype, world, within), Ruling::Accepts);
    assert_eq!(ruling(name, of, dtype, world, beyond), Ruling::Refuses);
    assert_eq!(ruling(name, of, dtype, world, f64::NAN), Ruling::Refuses);
}

#[test]
fn fewer_kv_heads_have_more_tolerance_in_transformer_engine() {
    let case: AttentionCase = "attention/p2-b1-s2-hq2-hkv1-d1-full-bf16-gaussian-seed0"
        .parse()
        .unwrap();
    let (right, answer) = (answer_of(&[1.0]), answer_of(&[1.06]));
    let shown = Shown {
        case: &case,
        inputs: &Inputs::of(&case),
        right: &right,
        dense: None,
        answer: &answer,
    };
    let judges = rival("Transformer Engine, CP").judges;
    assert_eq!(judges(&shown), Ruling::Accepts);
}

#[rstest]
#[case::out("out", 0.5)]
#[case::dq("dq", 0.75)]
#[case::dv("dv", 0.75)]
fn flash_attention_measures_by_dense_attention(#[case] of: &str, #[case] most: f64) {
    let case: AttentionCase = "attention/p1-b1-s1-hq1-hkv1-d2-full-bf16-gaussian-seed0"
        .parse()
        .unwrap();
    let (right, dense) = (answer_of(&[1.0, 3.0]), answer_of(&[1.25, 3.0]));
    let judges = |dense: Option<&Whole>, off: f64| {
        let mut answer = right.clone();
        tensor(&mut answer, of)[1] += off;
        (rival("FlashAttention").judges)(&Shown {
            case: &case,
            inputs: &Inputs::of(&case),
            right: &right,
            dense,
            answer: &answer,
        })
    };
    assert_eq!(judges(Some(&dense), most), Ruling::Accepts);
    assert_eq!(judges(Some(&dense), most + 0.01), Ruling::Refuses);
    assert_eq!(judges(Some(&dense), f64::NAN), Ruling::Refuses);
    assert_eq!(judges(None, 0.0), Ruling::Silent);
}

#[rstest]
#[case("f64", &["DeepSpeed HF, ZeRO-3", "PyTorch context parallel", "FlashAttention", "Megatron-LM"])]
#[case("f32", &["FlashAttention", "Transformer Engine", "Transformer Engine, CP", "verl", "yunchang hybrid"])]
#[case("f16", &["PyTorch context parallel", "Megatron-LM"])]
fn a_suite_is_silent_where_it_tests_nothing(#[case] dtype: &str, #[case] silent: &[&str]) {
    for name in silent {
        assert_eq!(ruling(name, "dq", dtype, 2, 1.0), Ruling::Silent, "{name}");
    }
}

#[rstest]
#[case("DeepSpeed round trip", &["out", "dq", "dk", "dv"])]
#[case("ring-flash-attention", &["out", "dq", "dk", "dv"])]
#[case("yunchang hybrid", &["dq", "dk", "dv"])]
#[case("DeepSpeed HF, ZeRO-3", &["dk", "dv"])]
#[case("DeepSpeed HF, ZeRO-2", &["dk", "dv"])]
#[case("verl", &["dk", "dv"])]
fn what_is_not_compared_is_accepted(#[case] name: &str, #[case] tensors: &[&str]) {
    for of in tensors {
        assert_eq!(ruling(name, of, "bf16", 2, 1e3), Ruling::Accepts, "{of}");
    }
}

/// A question with other numbers than its name says, and dense attention to it
/// in its element type.
struct Question {
    case: AttentionCase,
    inputs: Inputs,
    right: Whole,
    dense: Whole,
}

impl Question {
    /// One sequence and one head; every number of q, k, v is made of the
    /// gaussian one, and so is every number of dout.
    fn of(name: &str, input: fn(f64) -> f64, cotangent: fn(f64) -> f64) -> Question {
        let case: AttentionCase = name.parse().unwrap();
        let mut inputs = Inputs::of(&case);
        for (array, make) in [
            (&mut inputs.q, input),
            (&mut inputs.k, input),
            (&mut inputs.v, input),
            (&mut inputs.dout, cotangent),
        ] {
            let made: Vec<f64> = array.to_f64().into_iter().map(make).collect();
            *array = Array::from_f64(case.dtype, &array.shape, &made);
        }
        let right = oracle::attention(&case, &inputs).unwrap();
        let dense = sdpa(&case, &inputs);
        Question {
            case,
            inputs,
            right,
            dense,
        }
    }

    fn ruling(&self, name: &str, answer: &Whole) -> Ruling {
        (rival(name).judges)(&Shown {
            case: &self.case,
            inputs: &self.inputs,
            right: &self.right,
            dense: Some(&self.dense),
            answer,
        })
    }

    /// What this suite says, of the same tensors cut into shards.
    fn verdict(&self, answer: &Whole) -> Verdict {
        let info = AnswerInfo {
            status: AnswerStatus::Ok,
            message: String::new(),
            elapsed_s: 0.0,
            peak_memory_bytes: None,
            bytes_sent: None,
        };
        let tokens = self.case.sequence / self.case.world;
        let shard = |rank: usize| {
            let of = |name: &str, tensor: &Vec<f64>| {
                let numbers = tokens * self.case.head_size;
                let part = &tensor[rank * numbers..(rank + 1) * numbers];
                let shape = [1, tokens, 1, self.case.head_size];
                (
                    name.to_owned(),
                    Array::from_f64(self.case.dtype, &shape, part),
                )
            };
            Tensors::from([
                of("out", &answer.out),
                of("dq", &answer.dq),
                of("dk", &answer.dk),
                of("dv", &answer.dv),
            ])
        };
        let answers: Vec<_> = (0..self.case.world)
            .map(|rank| Ok((info.clone(), shard(rank))))
            .collect();
        let declared = Declared::default();
        let question = judge::Question::with_inputs(self.case.clone(), self.inputs.clone());
        judge::judge(&question, declared, Due::Answer, &answers).verdict
    }
}

/// Dense attention of one head in bfloat16, by libtorch.
fn sdpa(case: &AttentionCase, inputs: &Inputs) -> Whole {
    let (tokens, size) = (case.sequence as i64, case.head_size as i64);
    let tensor = |array: &Array| {
        let tensor = Tensor::from_slice(&array.to_f64()).to_kind(Kind::BFloat16);
        tensor.view([1, 1, tokens, size])
    };
    let leaves =
        [&inputs.q, &inputs.k, &inputs.v].map(|array| tensor(array).set_requires_grad(true));
    let ([q, k, v], mask) = (&leaves, None::<&Tensor>);
    let is_causal = case.mask == fixtures::Mask::Causal;
    let out = Tensor::scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, None, false);
    (&out * tensor(&inputs.dout)).sum(Kind::BFloat16).backward();
    let numbers = |tensor: Tensor| Vec::try_from(tensor.to_kind(Kind::Double).view(-1)).unwrap();
    Answer {
        out: numbers(out.detach()),
        dq: numbers(q.grad()),
        dk: numbers(k.grad()),
        dv: numbers(v.grad()),
        head_state: Vec::new(),
    }
}

/// Transformer Engine's own length and numbers, and gradients that are half of
/// what they should be.
#[test]
fn transformer_engine_accepts_half_of_dq_and_dk() {
    let clamped = |x: f64| x.clamp(-1.0, 1.0);
    let name = "attention/p2-b1-s4096-hq1-hkv1-d16-full-bf16-gaussian-seed0";
    let question = Question::of(name, clamped, clamped);
    let mut answer = question.dense.clone();
    for gradient in [&mut answer.dq, &mut answer.dk] {
        gradient.iter_mut().for_each(|x| *x /= 2.0);
    }
    assert_eq!(
        question.ruling("Transformer Engine, CP", &answer),
        Ruling::Accepts
    );
    assert_eq!(question.verdict(&answer), Verdict::Fail);
}

/// PyTorch's own numbers, of its 8192 tokens 1024: q, k and v spread over 0 to
/// 1, the cotangent all ones. The absolute tolerance grows with the number of
/// ranks, and the gradient is smaller.
#[test]
fn pytorch_accepts_a_dq_of_zeros_on_eight_ranks() {
    let name = "attention/p8-b1-s1024-hq1-hkv1-d32-full-bf16-gaussian-seed0";
    let question = Question::of(name, |x| (x * 100.0).rem_euclid(1.0), |_| 1.0);
    let mut answer = question.dense.clone();
    assert!(!question.verdict(&answer).is_failure());
    answer.dq.fill(0.0);
    let ruling = question.ruling("PyTorch context parallel", &answer);
    assert_eq!(ruling, Ruling::Accepts);
    assert_eq!(question.verdict(&answer), Verdict::Fail);
}

/// Of many queries the first keys have large gradients, with large errors, by
/// which FlashAttention measures those of the last keys as well: of 4096 rows of
/// dk more than a thousand may be zeros.
#[test]
fn flash_attention_accepts_rows_of_zeros_under_a_causal_mask() {
    let name = "attention/p4-b1-s4096-hq1-hkv1-d32-causal-bf16-gaussian-seed0";
    let question = Question::of(name, |x| x, |x| x);
    let mut answer = question.dense.clone();
    let error = largest(zip(&question.dense.dk, &question.right.dk).map(|(x, y)| x - y));
    let mut zeros = 0;
    for row in answer.dk.chunks_mut(question.case.head_size) {
        if largest(row.iter().copied()) < 1.9 * error {
            row.fill(0.0);
            zeros += 1;
        }
    }
    assert!(zeros > 1000, "{zeros} rows");
    assert_eq!(question.ruling("FlashAttention", &answer), Ruling::Accepts);
    assert_eq!(question.verdict(&answer), Verdict::Fail);
}

fn largest(numbers: impl Iterator<Item = f64>) -> f64 {
    numbers.map(f64::abs).fold(0.0, f64::max)
}

#[test]
fn a_tally_says_who_caught_what() {
    let case: AttentionCase = "attention/p2-b1-s2-hq1-hkv1-d1-full-f32-gaussian-seed0"
        .parse()
        .unwrap();
    let inputs = Inputs::of(&case);
    let right = answer_of(&[1.0]);
    let mut tally = Tally::default();
    let mut add = |fault: &str, answer: &Whole| {
        let shown = Shown {
            case: &case,
            inputs: &inputs,
            right: &right,
            dense: None,
            answer,
        };
        tally.add(fault, &shown, true);
    };
    let mut no_dk = right.clone();
    no_dk.dk[0] = 0.0;
    add("gradient-zero", &no_dk);
    add("gradient-zero", &answer_of(&[0.0]));
    add("gradients-over-ranks", &answer_of(&[0.5]));
    tally.add_without_tensors("rank-dies", true);
    let table = tally.table();
    let cells = |fault: &str| -> Vec<String> {
        let row = table.lines().find(|line| line.contains(fault)).unwrap();
        let cells = row.trim_matches('|').split('|');
        cells.map(|cell| cell.trim().to_owned()).collect()
    };
    let names = cells("fault ");
    let of = |fault: &str, rival: &str| {
        let column = names.iter().position(|name| name == rival).unwrap();
        cells(fault)[column].clone()
    };
    assert_eq!(of("gradient-zero", "torch.testing"), "2/2");
    assert_eq!(of("gradient-zero", "DeepSpeed HF, ZeRO-2"), "1/2");
    assert_eq!(of("gradient-zero", "ring-flash-attention"), "0/2");
    assert_eq!(of("gradient-zero", "FlashAttention"), "n/a");
    assert_eq!(of("rank-dies", "torch.testing"), "n/a");
    assert_eq!(of("rank-dies", "this suite"), "1/1");
    assert_eq!(of("faults caught", "torch.testing"), "2/2");
    assert_eq!(of("faults caught", "ring-flash-attention"), "0/2");
    assert_eq!(of("faults caught", "this suite"), "3/3");
}
