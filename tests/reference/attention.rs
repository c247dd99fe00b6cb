//! Attention over any number of ranks is the attention of one process, to the
//! bit where the order of sums is the same.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod world;

use approx::assert_relative_eq;
use rstest::rstest;
use tch::{Kind, Tensor};
use ulysses::{HeadPartition, Kernel, Mask, Options, Score, UlyssesAttention};
use world::{Inputs, gradients, leaf, on_ranks, shard, uneven_shards};

const TOKENS: usize = 13;
const HEAD_SIZE: i64 = 16;
const MULTI_HEAD: (i64, i64) = (4, 4);
const GROUPED: (i64, i64) = (8, 2);
const MULTI_QUERY: (i64, i64) = (4, 1);
const ODD: (i64, i64) = (6, 3);

/// Output and cotangents of query, key and value of the whole sequence, with
/// the sequence cut over `ranks` ranks.
fn ulysses(
    ranks: usize,
    batch: i64,
    heads: (i64, i64),
    kind: Kind,
    options: Options,
) -> [Tensor; 4] {
    ulysses_of_length(TOKENS, ranks, batch, heads, kind, options)
}

fn ulysses_of_length(
    tokens: usize,
    ranks: usize,
    batch: i64,
    heads: (i64, i64),
    kind: Kind,
    options: Options,
) -> [Tensor; 4] {
    let shards = uneven_shards(tokens, ranks);
    let parts = on_ranks(ranks, |communicator| {
        let rank = communicator.rank();
        let global = Inputs::new(batch, tokens as i64, heads, HEAD_SIZE, kind);
        let inputs = [&global.query, &global.key, &global.value]
            .map(|tensor| leaf(&shard(tensor, &shards, rank)));
        let attention = UlyssesAttention::new(communicator, options);
        let output = attention
            .forward(&inputs[0], &inputs[1], &inputs[2])
            .unwrap();
        gradients(&output, &shard(&global.cotangent, &shards, rank), inputs)
    });
    std::array::from_fn(|i| Tensor::cat(&parts.iter().map(|part| &part[i]).collect::<Vec<_>>(), 1))
}

/// The largest difference, in units of the largest number.
fn distance(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
    ((&a - &b).abs().max() / b.abs().max()).double_value(&[])
}

/// A few roundings of one sum.
fn closeness(kind: Kind) -> f64 {
    let unit_roundoff = match kind {
        Kind::Double => 2f64.powi(-53),
        Kind::Float => 2f64.powi(-24),
        Kind::Half => 2f64.powi(-11),
        _ => 2f64.powi(-8),
    };
    16.0 * unit_roundoff
}

#[rstest]
fn sdpa_has_the_bits_of_one_process(
    #[values(1, 2, 3, 4)] ranks: usize,
    #[values(Kind::Double, Kind::Float, Kind::BFloat16, Kind::Half)] kind: Kind,
    #[values(MULTI_HEAD, GROUPED, MULTI_QUERY, ODD)] heads: (i64, i64),
    #[values(Mask::Full, Mask::Causal)] mask: Mask,
    #[values(1, 3)] batch: i64,
) {
    tch::set_num_threads(1);
    let options = Options {
        score: Score {
            mask,
            ..Score::default()
        },
        uneven_heads: true,
        ..Options::default()
    };
    let got = ulysses(ranks, batch, heads, kind, options);
    let due = Inputs::new(batch, TOKENS as i64, heads, HEAD_SIZE, kind).dense(mask);
    assert_eq!(got[0], due[0], "output");
    assert_eq!(got[1], due[1], "cotangent of query");
    let partition = HeadPartition::new(heads.0 as usize, heads.1 as usize, ranks).unwrap();
    for (i, name) in [(2, "key"), (3, "value")] {
        if partition.is_replicated() {
            let distance = distance(&got[i], &due[i]);
            assert!(
                distance <= closeness(kind),
                "cotangent of {name}: {distance:e}"
            );
        } else {
            assert_eq!(got[i], due[i], "cotangent of {name}");
        }
    }
}

/// torch's kernel goes through the sequence in blocks whose size depends on
/// its length.
#[rstest]
fn longer_sequences_have_the_bits_of_one_process_too(
    #[values(250, 800)] tokens: usize,
    #[values(Kind::Float, Kind::BFloat16)] kind: Kind,
) {
    tch::set_num_threads(1);
    let options = Options {
        score: Score {
            mask: Mask::Causal,
            ..Score::default()
        },
        ..Options::default()
    };
    let got = ulysses_of_length(tokens, 2, 1, GROUPED, kind, options);
    let due = Inputs::new(1, tokens as i64, GROUPED, HEAD_SIZE, kind).dense(Mask::Causal);
    assert_eq!(got, due);
}

#[rstest]
fn eager_agrees_with_sdpa_in_float64(
    #[values(1, 2, 4)] ranks: usize,
    #[values(MULTI_HEAD, GROUPED, MULTI_QUERY, ODD)] heads: (i64, i64),
    #[values(Mask::Full, Mask::Causal)] mask: Mask,
    #[values(None, Some(0.5))] scale: Option<f64>,
) {
    let [eager, sdpa] = [Kernel::Eager, Kernel::Sdpa].map(|kernel| {
        let options = Options {
            score: Score {
                mask,
                scale,
                ..Score::default()
            },
            kernel,
            uneven_heads: true,
            ..Options::default()
        };
        ulysses(ranks, 2, heads, Kind::Double, options)
    });
    for (eager, sdpa) in eager.iter().zip(&sdpa) {
        assert_relative_eq!(distance(eager, sdpa), 0.0, epsilon = 1e-14);
    }
}

#[rstest]
fn eager_does_not_depend_on_the_number_of_ranks(
    #[values(2, 3, 4)] ranks: usize,
    #[values(Kind::Float, Kind::BFloat16)] kind: Kind,
    #[values(MULTI_HEAD, MULTI_QUERY)] heads: (i64, i64),
) {
    let options = Options {
        score: Score {
            mask: Mask::Causal,
            ..Score::default()
        },
        kernel: Kernel::Eager,
        uneven_heads: true,
        ..Options::default()
    };
    let (one, many) = (
        ulysses(1, 1, heads, kind, options),
        ulysses(ranks, 1, heads, kind, options),
    );
    for (one, many) in one.iter().zip(&many) {
        assert_relative_eq!(distance(many, one), 0.0, epsilon = closeness(kind));
    }
}

#[rstest]
fn the_scale_is_one_over_the_root_of_the_head_size_by_default(
    #[values(Kernel::Eager, Kernel::Sdpa)] kernel: Kernel,
) {
    let [without, with, other] = [None, Some(0.25), Some(0.5)].map(|scale| {
        let options = Options {
            score: Score {
                scale,
                ..Score::default()
            },
            kernel,
            ..Options::default()
        };
        ulysses(2, 1, MULTI_HEAD, Kind::Double, options)
    });
    assert_eq!(without, with);
    assert_ne!(without, other);
}

#[test]
fn no_gradient_is_recorded_where_none_was_asked_for() {
    on_ranks(2, |communicator| {
        let x = world::noise(1, [1, 3, 2, 4], Kind::Float);
        let attention = UlyssesAttention::new(communicator, Options::default());
        assert!(!attention.forward(&x, &x, &x).unwrap().requires_grad());
        let x = leaf(&x);
        let quiet = tch::no_grad(|| attention.forward(&x, &x, &x)).unwrap();
        assert!(!quiet.requires_grad());
        assert!(attention.forward(&x, &x, &x).unwrap().requires_grad());
    });
}

#[test]
fn backward_through_a_retained_graph_can_be_repeated() {
    on_ranks(2, |communicator| {
        let x = leaf(&world::noise(1, [1, 3, 2, 4], Kind::Float));
        let output = UlyssesAttention::new(communicator, Options::default())
            .forward(&x, &x, &x)
            .unwrap()
            .sum(Kind::Float);
        let first = Tensor::run_backward(&[&output], &[&x], true, false);
        let second = Tensor::run_backward(&[&output], &[&x], false, false);
        assert_eq!(first, second);
    });
}
