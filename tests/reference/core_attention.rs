//! Attention on one device is what its definition says, whatever is asked of
//! it at once, and the two kernels are of one opinion.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod naive;
mod world;

use naive::{Blocks, Case, distance, heads};
use proptest::{collection::vec, option, prelude::*};
use rstest::rstest;
use std::ops::Range;
use tch::{Device, Kind, Tensor};
use ulysses::{
    BlockLayout, Dropout, Kernel, Mask, Score, Structure, autograd::grad_enabled, core_attention,
};

const KERNELS: [Kernel; 2] = [Kernel::Eager, Kernel::Sdpa];

/// Runs between some of the cuts: documents, padding, and gaps of both kinds.
fn runs(cuts: &[usize], kept: u8) -> Vec<Range<usize>> {
    let mut cuts = cuts.to_vec();
    cuts.sort_unstable();
    cuts.windows(2)
        .enumerate()
        .filter(|(i, _)| kept >> (i % 8) & 1 == 1)
        .map(|(_, pair)| pair[0]..pair[1])
        .collect()
}

prop_compose! {
    fn scores(tokens: usize)(
        causal in any::<bool>(),
        window in option::of(1..=tokens + 1),
        scale in option::of(-1.0..1.0),
        softcap in option::weighted(0.3, 0.5..4.0),
    ) -> Score {
        let mask = if causal { Mask::Causal } else { Mask::Full };
        Score { mask, window, scale, softcap }
    }
}

/// Any call on up to `most` tokens. `formula` lets scores be more than a
/// scaled product.
fn cases(most: usize, formula: bool) -> impl Strategy<Value = Case> {
    let maps = prop::sample::select(vec![
        heads(3, 3, 1, 0),
        heads(4, 2, 1, 0),
        heads(4, 1, 1, 0),
        // Cuts through a group: query heads 0, 0, 1 and 0, 1, 1.
        heads(6, 3, 2, 0),
        heads(6, 3, 2, 1),
    ]);
    let sizes = prop::sample::select(vec![(4, 4), (4, 2), (2, 4), (8, 3)]);
    (1..=3usize, 1..=most, maps, sizes).prop_flat_map(
        move |(batch, tokens, heads, (head_size, value_size))| {
            let row =
                (vec(0..=tokens, 2..5), any::<u8>()).prop_map(|(cuts, kept)| runs(&cuts, kept));
            let blocks =
                (1..=tokens + 1, any::<u64>(), 1..=3usize).prop_map(|(block, seed, sharing)| {
                    Blocks {
                        block,
                        seed,
                        sharing,
                    }
                });
            let several = if formula { 0.4 } else { 0.0 };
            (
                scores(tokens),
                option::of(vec(row, batch)),
                option::of(blocks),
                prop::bool::weighted(several),
                prop::bool::weighted(several),
            )
                .prop_map(move |(score, segments, blocks, slopes, sinks)| Case {
                    batch,
                    tokens,
                    key_tokens: tokens,
                    heads: heads.clone(),
                    head_size,
                    value_size,
                    score: Score {
                        softcap: score.softcap.filter(|_| formula),
                        ..score
                    },
                    segments,
                    blocks,
                    slopes,
                    sinks,
                    dropout: None,
                })
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_number_is_that_of_the_definition(case in cases(12, true)) {
        let inputs = case.inputs(Kind::Double);
        let due = case.naive(&inputs, None);
        for kernel in KERNELS {
            let got = case.run(kernel, &inputs).unwrap();
            prop_assert!(distance(&got, &due) < 1e-13, "{kernel:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    /// Long enough for tiles to be cut into rows.
    #[test]
    fn tiles_of_the_fused_kernel_are_of_one_opinion_with_the_definition(case in cases(300, false)) {
        agree(&case, Kind::Double, 1e-12)?;
    }

    #[test]
    fn rows_of_the_formula_are_of_one_opinion_with_the_definition(case in cases(300, true)) {
        agree(&case, Kind::Double, 1e-12)?;
    }
}

/// Outputs and cotangents of the two kernels differ by no more than
/// `tolerance`, and are numbers.
fn agree(case: &Case, kind: Kind, tolerance: f64) -> Result<(), TestCaseError> {
    let [eager, sdpa] = KERNELS.map(|kernel| case.output_and_cotangents(kernel, kind));
    for (i, (eager, sdpa)) in eager.iter().zip(&sdpa).enumerate() {
        let distance = distance(sdpa, eager);
        // Not a number is not below anything.
        prop_assert!(distance < tolerance, "tensor {i}: {distance:e}");
    }
    Ok(())
}

/// The derivative of the naive loops, by central differences, in every
/// direction there is.
#[rstest]
#[case::grouped(|c: &mut Case| c.heads = heads(4, 2, 1, 0))]
#[case::cut_group(|c: &mut Case| c.heads = heads(6, 3, 2, 0))]
#[case::causal(|c: &mut Case| c.score.mask = Mask::Causal)]
#[case::window(|c: &mut Case| c.score.window = Some(2))]
#[case::segments(|c: &mut Case| c.segments = Some(vec![runs(&[0, 2, 5], 3)]))]
#[case::padding(|c: &mut Case| c.segments = Some(vec![runs(&[2, 5], 1)]))]
#[case::blocks(|c: &mut Case| c.blocks = Some(Blocks { block: 2, seed: 3, sharing: 1 }))]
#[case::value_size(|c: &mut Case| c.value_size = 2)]
#[case::scale(|c: &mut Case| c.score.scale = Some(0.7))]
#[case::softcap(|c: &mut Case| c.score.softcap = Some(0.8))]
#[case::slopes(|c: &mut Case| c.slopes = true)]
#[case::sinks(|c: &mut Case| c.sinks = true)]
#[case::dropout(|c: &mut Case| c.dropout = Some(Dropout { probability: 0.4, seed: 5, first_head: 3 }))]
#[case::cross(|c: &mut Case| c.key_tokens = 7)]
#[case::all(|c: &mut Case| {
    c.heads = heads(6, 3, 2, 1);
    c.value_size = 2;
    c.score = Score { mask: Mask::Causal, window: Some(4), scale: Some(0.9), softcap: Some(1.5) };
    c.segments = Some(vec![runs(&[0, 2, 5], 3)]);
    c.blocks = Some(Blocks { block: 2, seed: 8, sharing: 2 });
    (c.slopes, c.sinks) = (true, true);
    c.dropout = Some(Dropout { probability: 0.2, seed: 5, first_head: 3 });
})]
fn cotangents_are_derivatives(
    #[case] change: fn(&mut Case),
    #[values(Kernel::Eager, Kernel::Sdpa)] kernel: Kernel,
) {
    let mut case = Case::plain(5);
    change(&mut case);
    let dropped = case.dropout.map(|dropout| dropped(&case, dropout));
    let inputs = case.inputs(Kind::Double);
    let cotangent = case.cotangent(Kind::Double);
    let found = case.output_and_cotangents(kernel, Kind::Double);
    let loss = |inputs: &[Tensor; 5]| {
        let output = case.naive(inputs, dropped.as_ref());
        (output * &cotangent).sum(Kind::Double).double_value(&[])
    };
    for (&input, found) in case.used().iter().zip(&found[1..]) {
        let found = Vec::<f64>::try_from(found.reshape(-1)).unwrap();
        for (place, found) in found.iter().enumerate() {
            let step = 1e-5;
            let [up, down] = [step, -step].map(|step| {
                let moved = inputs.each_ref().map(|tensor| tensor.detach().copy());
                let _ = moved[input].view(-1).get(place as i64).g_add_scalar_(step);
                loss(&moved)
            });
            let due = (up - down) / (2.0 * step);
            assert!(
                (found - due).abs() < 1e-8,
                "input {input}, place {place}: {found} for {due}"
            );
        }
    }
}

/// A query that sees nothing, and what nobody sees, are exactly zero.
#[rstest]
fn who_sees_nothing_gets_zeros(
    #[values(Kernel::Eager, Kernel::Sdpa)] kernel: Kernel,
    #[values(false, true)] sinks: bool,
    #[values(Kind::Double, Kind::BFloat16)] kind: Kind,
) {
    let mut case = Case::plain(6);
    case.batch = 2;
    case.sinks = sinks;
    case.segments = Some(vec![runs(&[2, 6], 1), Vec::new()]);
    let [output, query, key, value, ..] = &case.output_and_cotangents(kernel, kind)[..] else {
        panic!("too few")
    };
    for tensor in [output, query, key, value] {
        let zeros = |tensor: Tensor| tensor.eq(0.0).all() == Tensor::from(true);
        assert!(zeros(tensor.get(0).narrow(1, 0, 2)), "padding");
        assert!(zeros(tensor.get(1)), "a row of padding alone");
        assert!(!zeros(tensor.get(0).narrow(1, 2, 4)), "real tokens");
    }
}

/// The half types are as near to float64 as their rounding lets them be.
#[rstest]
fn precision_is_that_of_the_type(
    #[values((Kind::Float, 2e-6), (Kind::BFloat16, 4e-2), (Kind::Half, 5e-3))] kind: (Kind, f64),
    #[values(Kernel::Eager, Kernel::Sdpa)] kernel: Kernel,
    #[values("plain", "window", "blocks", "segments", "formula")] what: &str,
) {
    let (kind, tolerance) = kind;
    let mut case = Case::plain(200);
    case.heads = heads(4, 2, 1, 0);
    case.score.mask = Mask::Causal;
    match what {
        "window" => case.score.window = Some(30),
        "blocks" => {
            case.blocks = Some(Blocks {
                block: 16,
                seed: 1,
                sharing: 1,
            })
        }
        "segments" => case.segments = Some(vec![runs(&[0, 60, 130, 200], 7)]),
        "formula" => {
            case.score.softcap = Some(2.0);
            (case.slopes, case.sinks) = (true, true);
        }
        _ => {}
    }
    let due = {
        let inputs = case
            .inputs(kind)
            .map(|tensor| world::leaf(&tensor.to_kind(Kind::Double)));
        let output = case.run(Kernel::Eager, &inputs).unwrap();
        let cotangent = case.cotangent(kind).to_kind(Kind::Double);
        let used: Vec<&Tensor> = case.used().into_iter().map(|i| &inputs[i]).collect();
        let scalar = (&output * cotangent).sum(Kind::Double);
        let found = Tensor::run_backward(&[scalar], &used, false, false);
        [output.detach()]
            .into_iter()
            .chain(found)
            .collect::<Vec<_>>()
    };
    let got = case.output_and_cotangents(kernel, kind);
    for (i, (got, due)) in got.iter().zip(&due).enumerate() {
        assert_eq!(got.kind(), kind);
        let distance = distance(got, due);
        assert!(distance < tolerance, "tensor {i}: {distance:e}");
    }
}

/// A key that 512 tiles see: added up in bfloat16, its cotangent would stop
/// growing half way.
#[test]
fn cotangents_of_many_tiles_are_rounded_once() {
    let mut case = Case::plain(512);
    case.heads = heads(1, 1, 1, 0);
    let mut inputs = case.inputs(Kind::BFloat16);
    inputs[0] = inputs[0].zeros_like();
    let [query, key, value, ..] = &inputs;
    let all = Tensor::ones([1, 512, 512], (Kind::Bool, Device::Cpu));
    let structure = Structure {
        layout: Some(BlockLayout::new(&all, 1).unwrap()),
        ..Structure::default()
    };
    let (kernel, score) = (Kernel::Sdpa, Score::default());
    core_attention(query, key, value, &case.heads, kernel, &score, &structure)
        .unwrap()
        .sum(Kind::Float)
        .backward();
    // Each of 512 queries gives each key the weight 1/512.
    assert_eq!(value.grad(), value.ones_like());
}

/// Each document has the bits of the same document alone.
#[rstest]
fn documents_are_as_if_alone(#[values(Kind::Float, Kind::BFloat16)] kind: Kind) {
    tch::set_num_threads(1);
    let mut case = Case::plain(40);
    case.score.mask = Mask::Causal;
    case.batch = 2;
    case.segments = Some(vec![runs(&[0, 15, 40], 3), runs(&[0, 22, 40], 3)]);
    let packed = case.output_and_cotangents(Kernel::Sdpa, kind);
    let (inputs, cotangent) = (case.inputs(kind), case.cotangent(kind));
    for (row, runs) in case.segments.iter().flatten().enumerate() {
        for run in runs {
            let of = |tensor: &Tensor| {
                tensor
                    .narrow(0, row as i64, 1)
                    .narrow(2, run.start as i64, run.len() as i64)
            };
            let [q, k, v] = [0, 1, 2].map(|i| world::leaf(&of(&inputs[i]).detach()));
            let output = Tensor::scaled_dot_product_attention(
                &q,
                &k,
                &v,
                None::<&Tensor>,
                0.0,
                true,
                None,
                false,
            );
            let due = world::gradients(&output, &of(&cotangent), [q, k, v]);
            assert_eq!(packed.iter().map(of).collect::<Vec<_>>(), due);
        }
    }
}

/// What hides nothing takes the way of a plain call, to the bit.
#[test]
fn structure_that_hides_nothing_changes_no_bit() {
    tch::set_num_threads(1);
    let mut case = Case::plain(40);
    case.score.mask = Mask::Causal;
    let plain = case.output_and_cotangents(Kernel::Sdpa, Kind::Float);
    case.score.window = Some(40);
    case.segments = Some(vec![runs(&[0, 40], 1)]);
    case.dropout = Some(Dropout {
        probability: 0.0,
        seed: 1,
        first_head: 0,
    });
    assert_eq!(case.output_and_cotangents(Kernel::Sdpa, Kind::Float), plain);
}

#[rstest]
fn keys_of_another_sequence_may_be_more_or_fewer(
    #[values(0, 1, 7, 150)] key_tokens: usize,
    #[values(5, 140)] tokens: usize,
    #[values("plain", "values", "sinks", "softcap", "dropout")] what: &str,
) {
    let mut case = Case::plain(tokens);
    case.key_tokens = key_tokens;
    case.heads = heads(6, 3, 2, 0);
    match what {
        "values" => case.value_size = 7,
        "sinks" => case.sinks = true,
        "softcap" => case.score.softcap = Some(1.0),
        "dropout" => {
            case.dropout = Some(Dropout {
                probability: 0.3,
                seed: 1,
                first_head: 0,
            })
        }
        _ => {}
    }
    agree(&case, Kind::Double, 1e-12).unwrap();
    let inputs = case.inputs(Kind::Double);
    let dropped = case.dropout.map(|dropout| dropped(&case, dropout));
    let due = case.naive(&inputs, dropped.as_ref());
    let got = case.run(Kernel::Sdpa, &inputs).unwrap();
    assert!(distance(&got, &due) < 1e-13);
}

/// torch's fused kernel takes channels that lie next to one another only.
#[rstest]
fn any_strides_will_do(#[values(None, Some(3))] window: Option<usize>) {
    let mut case = Case::plain(8);
    case.score.window = window;
    let inputs = case.inputs(Kind::Double);
    let strided = inputs.each_ref().map(|tensor| match tensor.dim() {
        4 => tensor.transpose(1, 3).contiguous().transpose(1, 3),
        _ => tensor.shallow_clone(),
    });
    assert_ne!(strided[0].stride(), inputs[0].stride());
    for kernel in KERNELS {
        let [due, got] = [&inputs, &strided].map(|inputs| case.run(kernel, inputs).unwrap());
        assert!(distance(&got, &due) < 1e-14);
    }
}

#[test]
fn no_gradient_is_recorded_where_none_was_asked_for() {
    assert!(grad_enabled());
    let mut case = Case::plain(8);
    case.score.window = Some(3);
    case.sinks = true;
    for kernel in KERNELS {
        let inputs = case.inputs(Kind::Float);
        assert!(case.run(kernel, &inputs).unwrap().requires_grad());
        let quiet = tch::no_grad(|| case.run(kernel, &inputs)).unwrap();
        assert!(!quiet.requires_grad());
        let constant = inputs.each_ref().map(Tensor::detach);
        assert!(!case.run(kernel, &constant).unwrap().requires_grad());
        // The sinks alone.
        let mut some = inputs.each_ref().map(Tensor::detach);
        some[4] = world::leaf(&some[4]);
        case.run(kernel, &some).unwrap().sum(Kind::Float).backward();
        assert!(some[4].grad().defined());
    }
}

// Dropout.

/// Which weights are dropped, [B, h, S, Sk], found by asking for weights that
/// are all alike and values that tell them apart.
fn dropped(case: &Case, dropout: Dropout) -> Tensor {
    let case = Case {
        value_size: case.key_tokens,
        score: Score::default(),
        segments: None,
        blocks: None,
        slopes: false,
        sinks: false,
        dropout: Some(dropout),
        ..case.clone()
    };
    let mut inputs = case.inputs(Kind::Double).map(|tensor| tensor.detach());
    let _ = inputs[0].zero_();
    let keys = case.key_tokens as i64;
    inputs[2] = Tensor::eye(keys, (Kind::Double, Device::Cpu)).expand(inputs[2].size(), false);
    case.run(Kernel::Eager, &inputs)
        .unwrap()
        .eq(0.0)
        .to_kind(Kind::Double)
}

fn with_probability(probability: f64) -> Dropout {
    Dropout {
        probability,
        seed: 7,
        first_head: 0,
    }
}

#[rstest]
fn kept_weights_grow_and_dropped_ones_are_gone(
    #[values(Kernel::Eager, Kernel::Sdpa)] kernel: Kernel,
    #[values(None, Some(20))] window: Option<usize>,
) {
    let mut case = Case::plain(150);
    case.score.mask = Mask::Causal;
    case.score.window = window;
    case.dropout = Some(with_probability(0.25));
    let inputs = case.inputs(Kind::Double);
    let due = case.naive(&inputs, Some(&dropped(&case, with_probability(0.25))));
    assert!(distance(&case.run(kernel, &inputs).unwrap(), &due) < 1e-13);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 30, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn both_kernels_drop_the_same(
        case in cases(200, true),
        probability in 0.0..0.9,
        seed in any::<u64>(),
        first_head in 0..9usize,
    ) {
        let dropout = Some(Dropout { probability, seed, first_head });
        agree(&Case { dropout, ..case }, Kind::Double, 1e-12)?;
    }
}

#[test]
fn heads_drop_the_same_wherever_they_are() {
    let whole = Case {
        batch: 2,
        heads: heads(6, 6, 1, 0),
        ..Case::plain(9)
    };
    let all = dropped(&whole, with_probability(0.5));
    for ranks in [2, 3, 6] {
        let each = 6 / ranks;
        for rank in 0..ranks {
            let part = Case {
                heads: heads(6, 6, ranks, rank),
                ..whole.clone()
            };
            let first_head = rank * each;
            let got = dropped(
                &part,
                Dropout {
                    first_head,
                    ..with_probability(0.5)
                },
            );
            assert_eq!(got, all.narrow(1, first_head as i64, each as i64));
        }
    }
}

#[rstest]
fn the_right_share_is_dropped(#[values(0.1, 0.5, 0.8)] probability: f64) {
    let case = Case {
        batch: 2,
        heads: heads(4, 4, 1, 0),
        ..Case::plain(100)
    };
    let dropped = dropped(&case, with_probability(probability));
    // Six standard deviations of 80000 draws.
    let share = dropped.mean(Kind::Double).double_value(&[]);
    let deviation = (probability * (1.0 - probability) / 80_000.0).sqrt();
    assert!((share - probability).abs() < 6.0 * deviation, "{share}");
}

/// Seeds, batch rows, heads, queries and keys: any two differ in as many
/// places as independent draws do.
#[test]
fn masks_of_different_places_are_independent() {
    let case = Case {
        batch: 3,
        heads: heads(4, 4, 1, 0),
        ..Case::plain(64)
    };
    let masks = [1, 2, 1 << 40, u64::MAX].map(|seed| {
        dropped(
            &case,
            Dropout {
                seed,
                ..with_probability(0.5)
            },
        )
    });
    let all = Tensor::stack(&masks, 0);
    let deviation = |draws: f64| 0.5 / draws.sqrt();
    // Slices along each of seed, row, head, query and key.
    for dimension in 0..5 {
        let slices = all.unbind(dimension);
        for (i, a) in slices.iter().enumerate() {
            for b in &slices[..i] {
                let apart = a.ne_tensor(b).to_kind(Kind::Double);
                let share = apart.mean(Kind::Double).double_value(&[]);
                let limit = 6.0 * deviation(apart.numel() as f64);
                assert!(
                    (share - 0.5).abs() < limit,
                    "dimension {dimension}: {share}"
                );
            }
        }
    }
}

#[test]
fn torchs_own_generator_is_left_alone() {
    let mut case = Case::plain(8);
    case.dropout = Some(with_probability(0.5));
    let inputs = case.inputs(Kind::Float);
    let [first, second] = [1, 2].map(|seed| {
        tch::manual_seed(seed);
        case.run(Kernel::Sdpa, &inputs).unwrap()
    });
    assert_eq!(first, second);
}
