//! The rules, each from what its suite asserts.

use std::iter::zip;

use fixtures::Dtype;

use super::{Four, Rival, Ruling, Shown, four};

/// Every rule.
pub const RIVALS: [Rival; 12] = [
    Rival {
        name: "DeepSpeed HF, ZeRO-3",
        source: "deepspeedai/DeepSpeed edaa7221 (0.19.6), \
                 tests/unit/ulysses_alst/test_ulysses_sp_hf.py 181 and 190 (test_ulysses_sp_hf): \
                 the loss is the same number; the gradient of layer 0's q_proj by torch's defaults",
        judges: |shown| deepspeed(shown, Tolerance::of_torch(shown.case.dtype)),
    },
    Rival {
        name: "DeepSpeed HF, ZeRO-2",
        source: "deepspeedai/DeepSpeed edaa7221 (0.19.6), \
                 tests/unit/ulysses_alst/test_ulysses_sp_hf.py 181 and 188 (test_ulysses_sp_hf): \
                 the loss is the same number; the gradient of layer 0's q_proj within rtol \
                 1.6e-2, atol 1e-3",
        judges: |shown| deepspeed(shown, Tolerance::new(1.6e-2, 1e-3)),
    },
    Rival {
        name: "DeepSpeed round trip",
        source: "deepspeedai/DeepSpeed edaa7221 (0.19.6), \
                 tests/unit/sequence_parallelism/test_ulysses.py 147 (TestUlyssesAll2All): \
                 the loop with the assertion is over range(1, 1)",
        judges: |_| Ruling::Accepts,
    },
    Rival {
        name: "PyTorch context parallel",
        source: "pytorch/pytorch 8e4fb1fb, test/distributed/tensor/test_attention.py \
                 (_test_ring_attention_sdpa): out, dq, dk, dv within atol 8e-3 P, rtol 1e-3 P in \
                 bfloat16, atol 2e-6, rtol 1e-5 in float32",
        judges: pytorch_context_parallel,
    },
    Rival {
        name: "FlashAttention",
        source: "Dao-AILab/flash-attention 0251105a (2.8.4), tests/test_flash_attn.py 1121 and \
                 1130 to 1132 (test_flash_attn_output): the largest error of out at most twice, \
                 of dq, dk, dv at most three times that of attention in the element type",
        judges: flash_attention,
    },
    Rival {
        name: "Transformer Engine, CP",
        source: "NVIDIA/TransformerEngine d0067d0d (2.20.0.dev0), \
                 tests/pytorch/attention/run_attention_with_cp.py 172 (get_tols) and \
                 tests/pytorch/utils.py 239 (compare_and_assert): out, dq, dk, dv within atol = \
                 rtol = 2.5e-2 in bfloat16 (3.5e-2 with fewer KV heads), 5e-3 in float16",
        judges: transformer_engine_cp,
    },
    Rival {
        name: "Transformer Engine",
        source: "NVIDIA/TransformerEngine d0067d0d (2.20.0.dev0), \
                 tests/pytorch/attention/test_attention.py 177 (test_dot_product_attention): out, \
                 dq, dk, dv within atol = rtol = 1.5e-2 in bfloat16, 1e-3 in float16",
        judges: transformer_engine,
    },
    Rival {
        name: "Megatron-LM",
        source: "NVIDIA/Megatron-LM d98e8a64 (0.20.0), \
                 tests/unit_tests/transformer/test_attention.py 633, 640 and 690 \
                 (test_parallel_attention_correctness): the output and the gradient of the input \
                 within atol = rtol = 1e-2, in bfloat16",
        judges: megatron,
    },
    Rival {
        name: "verl",
        source: "verl-project/verl 1dda039b (0.10.0.dev), \
                 tests/models/test_transformers_ulysses.py 277 and 279 (_hf_casual_fwd_bwd): the \
                 mean of the logits within rtol 1e-2, atol 3e-5, the gradient of layer 0's q_proj \
                 within rtol 1e-2, atol 1e-3, in bfloat16",
        judges: verl,
    },
    Rival {
        name: "yunchang hybrid",
        source: "feifeibear/long-context-attention 56118e0d (0.6.4), test/test_hybrid_attn.py \
                 386: out within atol 0.1, in bfloat16; gradients are printed. \
                 test/test_ulysses_attn.py prints out as well",
        judges: yunchang,
    },
    Rival {
        name: "ring-flash-attention",
        source: "zhuzilin/ring-flash-attention 89962823 (0.1.7), \
                 test/test_ring_flash_attn_func.py 71 to 92: differences are printed",
        judges: |_| Ruling::Accepts,
    },
    Rival {
        name: "torch.testing",
        source: "pytorch/pytorch 2.11.0, torch/testing/_comparison.py 54 \
                 (assert_close without tolerances): out, dq, dk, dv",
        judges: |shown| {
            all_within(
                shown,
                Tolerance::of_torch(shown.case.dtype),
                Expected::Baseline,
            )
        },
    },
];

/// How far an element may be off: `relative * |expected| + absolute`.
#[derive(Clone, Copy)]
struct Tolerance {
    relative: f64,
    absolute: f64,
}

impl Tolerance {
    const fn new(relative: f64, absolute: f64) -> Tolerance {
        Tolerance { relative, absolute }
    }

    /// The same number for both.
    const fn both(both: f64) -> Tolerance {
        Tolerance::new(both, both)
    }

    /// What `torch.testing.assert_close` takes where it is told nothing.
    const fn of_torch(dtype: Dtype) -> Tolerance {
        match dtype {
            Dtype::F16 => Tolerance::new(1e-3, 1e-5),
            Dtype::Bf16 => Tolerance::new(1.6e-2, 1e-5),
            Dtype::F32 => Tolerance::new(1.3e-6, 1e-5),
            Dtype::F64 => Tolerance::new(1e-7, 1e-7),
            Dtype::I64 => Tolerance::both(0.0),
        }
    }

    /// Whether every element is near enough; one that is not a number never is.
    fn holds(self, actual: &[f64], expected: &[f64]) -> bool {
        let is_near = |(actual, expected): (&f64, &f64)| {
            actual == expected
                || (actual - expected).abs() <= self.absolute + self.relative * expected.abs()
        };
        actual.len() == expected.len() && zip(actual, expected).all(is_near)
    }
}

/// Which of the two a suite hands over as the expected one, of which the
/// relative tolerance is a part.
#[derive(Clone, Copy)]
enum Expected {
    Baseline,
    Answer,
}

/// Whether out, dq, dk and dv are within a tolerance.
fn all_within(shown: &Shown<'_>, tolerance: Tolerance, expected: Expected) -> Ruling {
    let (answer, baseline) = (shown.answered(), shown.baseline());
    let holds = |(answer, baseline): (&Vec<f64>, &Vec<f64>)| match expected {
        Expected::Baseline => tolerance.holds(answer, baseline),
        Expected::Answer => tolerance.holds(baseline, answer),
    };
    Ruling::accepts_if(zip(&answer, &baseline).all(holds))
}

/// The loss, here the sum of the products of out and its cotangent, is the same
/// number in float32, in which losses are computed; and dq is near. So it
/// refuses whatever moves one bit of that sum, honest roundings too, and sees
/// nothing of dk and dv.
fn deepspeed(shown: &Shown<'_>, gradient: Tolerance) -> Ruling {
    if shown.case.dtype == Dtype::F64 {
        return Ruling::Silent;
    }
    let dout = shown.inputs.dout.to_f64();
    let loss = |out: &[f64]| zip(out, &dout).map(|(o, d)| o * d).sum::<f64>() as f32;
    let ([out, dq, ..], [due_out, due_dq, ..]) = (shown.answered(), shown.baseline());
    Ruling::accepts_if(loss(&out) == loss(&due_out) && gradient.holds(&due_dq, &dq))
}

/// With the tolerances of its flash and cuDNN kernels in bfloat16, of the
/// memory-efficient one in float32.
fn pytorch_context_parallel(shown: &Shown<'_>) -> Ruling {
    let ranks = shown.case.world as f64;
    let tolerance = match shown.case.dtype {
        Dtype::Bf16 => Tolerance::new(1e-3 * ranks, 8e-3 * ranks),
        Dtype::F32 => Tolerance::new(1e-5, 2e-6),
        _ => return Ruling::Silent,
    };
    all_within(shown, tolerance, Expected::Answer)
}

/// The one rule without a number of its own but a factor. Its reference is
/// attention in float32, rounded. It measures by products and a softmax in the
/// element type; here it does by the fused kernel, of which the errors on a CPU
/// are larger than that, or it would refuse honest answers.
fn flash_attention(shown: &Shown<'_>) -> Ruling {
    const FACTORS: [f64; 4] = [2.0, 3.0, 3.0, 3.0];
    let is_tested = matches!(shown.case.dtype, Dtype::F16 | Dtype::Bf16);
    let (true, Some(dense)) = (is_tested, shown.dense) else {
        return Ruling::Silent;
    };
    let rounded = shown.rounded();
    let largest_errors = |tensors: &Four| -> Vec<f64> {
        zip(tensors, &rounded)
            .map(|(tensor, rounded)| largest_difference(tensor, rounded))
            .collect()
    };
    let errors = largest_errors(&shown.answered());
    let honest = largest_errors(&four(dense));
    let holds = |((error, honest), factor): ((&f64, &f64), f64)| *error <= factor * honest;
    Ruling::accepts_if(zip(zip(&errors, &honest), FACTORS).all(holds))
}

/// Not a number where a difference is none.
fn largest_difference(actual: &[f64], expected: &[f64]) -> f64 {
    zip(actual, expected)
        .map(|(actual, expected)| (actual - expected).abs())
        .fold(0.0, |largest: f64, difference| {
            match largest.is_nan() || difference.is_nan() {
                true => f64::NAN,
                false => largest.max(difference),
            }
        })
}

/// Its second rule, of the root mean square, is for float8 alone.
fn transformer_engine_cp(shown: &Shown<'_>) -> Ruling {
    let tolerance = match shown.case.dtype {
        Dtype::Bf16 if shown.case.query_heads == shown.case.kv_heads => Tolerance::both(2.5e-2),
        Dtype::Bf16 => Tolerance::both(3.5e-2),
        Dtype::F16 => Tolerance::both(5e-3),
        _ => return Ruling::Silent,
    };
    all_within(shown, tolerance, Expected::Answer)
}

/// One kernel against another.
fn transformer_engine(shown: &Shown<'_>) -> Ruling {
    let tolerance = match shown.case.dtype {
        Dtype::Bf16 => Tolerance::both(1.5e-2),
        Dtype::F16 => Tolerance::both(1e-3),
        _ => return Ruling::Silent,
    };
    all_within(shown, tolerance, Expected::Baseline)
}

/// The gradient of the layer's input is made of dq, dk and dv: here each is
/// held to its tolerance.
fn megatron(shown: &Shown<'_>) -> Ruling {
    match shown.case.dtype {
        Dtype::Bf16 => all_within(shown, Tolerance::both(1e-2), Expected::Answer),
        _ => Ruling::Silent,
    }
}

/// The mean of the logits is here the mean of out.
fn verl(shown: &Shown<'_>) -> Ruling {
    if shown.case.dtype != Dtype::Bf16 {
        return Ruling::Silent;
    }
    let mean = |out: &[f64]| out.iter().sum::<f64>() / out.len() as f64;
    let ([out, dq, ..], [due_out, due_dq, ..]) = (shown.answered(), shown.baseline());
    let means_agree = Tolerance::new(1e-2, 3e-5).holds(&[mean(&due_out)], &[mean(&out)]);
    Ruling::accepts_if(means_agree && Tolerance::new(1e-2, 1e-3).holds(&dq, &due_dq))
}

fn yunchang(shown: &Shown<'_>) -> Ruling {
    if shown.case.dtype != Dtype::Bf16 {
        return Ruling::Silent;
    }
    let ([out, ..], [due, ..]) = (shown.answered(), shown.baseline());
    Ruling::accepts_if(Tolerance::new(0.0, 0.1).holds(&out, &due))
}
