//! Whatever is wrong with the call of any rank is the same error on every
//! rank, says what to do, and leaves nobody waiting.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod world;

use rstest::rstest;
use std::time::Instant;
use tch::{Device, Kind, Tensor};
use ulysses::{Error, HeadPartition, Mask, Options, UlyssesAttention};
use world::{TIME_LIMIT, on_ranks};

/// The call of one rank: a good one, unless a case changes it.
struct Call {
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: Options,
}

impl Call {
    fn good() -> Self {
        let zeros = || of([2, 3, 4, 8]);
        Self {
            query: zeros(),
            key: zeros(),
            value: zeros(),
            options: Options::default(),
        }
    }
}

fn of<const N: usize>(size: [i64; N]) -> Tensor {
    Tensor::zeros(size, (Kind::Float, Device::Cpu))
}

/// What each of `ranks` ranks gets when `change` is made to the call of rank
/// 1, or of every rank.
fn verdicts(ranks: usize, everywhere: bool, change: impl Fn(&mut Call) + Sync) -> Vec<Error> {
    let begun = Instant::now();
    let errors = on_ranks(ranks, |communicator| {
        let mut call = Call::good();
        if everywhere || communicator.rank() == 1 {
            change(&mut call);
        }
        UlyssesAttention::new(communicator, call.options)
            .forward(&call.query, &call.key, &call.value)
            .unwrap_err()
    });
    assert!(
        begun.elapsed() < TIME_LIMIT / 2,
        "a rank waited for one that had refused"
    );
    errors
}

#[rstest]
#[case::undefined(|c: &mut Call| c.value = Tensor::new(),
    "rank 1: `value` is undefined; give a tensor that holds data")]
#[case::three_dimensions(|c: &mut Call| c.query = of([2, 3, 4]),
    "rank 1: `query` has 3 dimensions, but attention takes 4; give [batch, tokens, heads, head size]")]
#[case::five_dimensions(|c: &mut Call| c.key = of([2, 3, 4, 8, 1]),
    "rank 1: `key` has 5 dimensions, but attention takes 4; give [batch, tokens, heads, head size]")]
#[case::no_batch(|c: &mut Call| c.query = of([0, 3, 4, 8]),
    "rank 1: `query` has batch 0; give every rank at least one of each")]
#[case::no_tokens(|c: &mut Call| { c.query = of([2, 0, 4, 8]); c.key = of([2, 0, 4, 8]); c.value = of([2, 0, 4, 8]) },
    "rank 1: `query` has tokens 0; give every rank at least one of each")]
#[case::no_heads(|c: &mut Call| c.key = of([2, 3, 0, 8]),
    "rank 1: `key` has heads 0; give every rank at least one of each")]
#[case::no_head_size(|c: &mut Call| c.value = of([2, 3, 4, 0]),
    "rank 1: `value` has head size 0; give every rank at least one of each")]
#[case::key_batch(|c: &mut Call| c.key = of([1, 3, 4, 8]),
    "rank 1: `key` has batch 1, but `query` has 2; give both the same batch")]
#[case::key_tokens(|c: &mut Call| c.key = of([2, 5, 4, 8]),
    "rank 1: `key` has tokens 5, but `query` has 3; give both the same tokens")]
#[case::key_head_size(|c: &mut Call| c.key = of([2, 3, 4, 6]),
    "rank 1: `key` has head size 6, but `query` has 8; give both the same head size")]
#[case::value_heads(|c: &mut Call| c.value = of([2, 3, 2, 8]),
    "rank 1: `value` has heads 2, but `key` has 4; give both the same heads")]
#[case::value_head_size(|c: &mut Call| c.value = of([2, 3, 4, 6]),
    "rank 1: `value` has head size 6, but `key` has 8; give both the same head size")]
#[case::no_multiple(|c: &mut Call| { c.key = of([2, 3, 3, 8]); c.value = of([2, 3, 3, 8]) },
    "rank 1: `query` has 4 heads, but `key` has 3; give `query` a multiple of the heads of `key`")]
#[case::mixed_dtypes(|c: &mut Call| c.value = c.value.to_kind(Kind::Half),
    "rank 1: `value` is float16, but `query` is float32; give all three the same dtype")]
#[case::integers(|c: &mut Call| c.query = c.query.to_kind(Kind::Int64),
    "rank 1: `query` has a dtype that attention is not computed in; give one of float64, float32, bfloat16, float16")]
#[case::scale(|c: &mut Call| c.options.scale = Some(f64::NAN),
    "rank 1: `options` has the scale NaN; give a finite scale, or none")]
#[case::batch_of_another_rank(|c: &mut Call| { c.query = of([1, 3, 4, 8]); c.key = of([1, 3, 4, 8]); c.value = of([1, 3, 4, 8]) },
    "rank 1: `query` has batch 1, but rank 0 has 2; give every rank the same batch")]
#[case::heads_of_another_rank(|c: &mut Call| c.query = of([2, 3, 8, 8]),
    "rank 1: `query` has heads 8, but rank 0 has 4; give every rank the same heads")]
#[case::kv_heads_of_another_rank(|c: &mut Call| { c.key = of([2, 3, 2, 8]); c.value = of([2, 3, 2, 8]) },
    "rank 1: `key` has heads 2, but rank 0 has 4; give every rank the same heads")]
#[case::head_size_of_another_rank(|c: &mut Call| { c.query = of([2, 3, 4, 6]); c.key = of([2, 3, 4, 6]); c.value = of([2, 3, 4, 6]) },
    "rank 1: `query` has head size 6, but rank 0 has 8; give every rank the same head size")]
#[case::dtype_of_another_rank(|c: &mut Call| for t in [&mut c.query, &mut c.key, &mut c.value] { *t = t.to_kind(Kind::Double) },
    "rank 1: `query` is float64, but on rank 0 it is float32; give every rank the same dtype")]
#[case::gradient_of_another_rank(|c: &mut Call| c.key = c.key.set_requires_grad(true),
    "rank 1: `query` needs gradient here, but needs no gradient on rank 0; record gradients on every rank or on none")]
#[case::mask_of_another_rank(|c: &mut Call| c.options.mask = Mask::Causal,
    "rank 1: `options` has the mask Causal, but on rank 0 it is Full; give every rank the same mask")]
#[case::scale_of_another_rank(|c: &mut Call| c.options.scale = Some(0.5),
    "rank 1: `options` has the scale Some(0.5), but on rank 0 it is None; give every rank the same scale")]
#[case::uneven_heads_of_another_rank(|c: &mut Call| c.options.uneven_heads = true,
    "rank 1: `options` has `uneven_heads` true, but on rank 0 it is false; give every rank the same")]
fn a_bad_call_on_one_rank_is_the_same_error_on_all(
    #[case] change: fn(&mut Call),
    #[case] text: &str,
    #[values(2, 4)] ranks: usize,
) {
    for error in verdicts(ranks, false, change) {
        assert_eq!(error.to_string(), text);
        assert_eq!(error.rank(), Some(1));
        assert!(text.contains(&format!("`{}`", error.argument().unwrap())));
    }
}

#[rstest]
#[case::uneven(3, |_: &mut Call| {},
    "`query` has 4 heads, which 3 ranks cannot share evenly; use a number of ranks that divides the heads, or set `uneven_heads`")]
#[case::too_many_ranks(5, |c: &mut Call| c.options.uneven_heads = true,
    "`query` has 4 heads, fewer than the 5 ranks; use at most 4 ranks")]
fn a_call_that_no_rank_alone_is_to_blame_for_names_none(
    #[case] ranks: usize,
    #[case] change: fn(&mut Call),
    #[case] text: &str,
) {
    for error in verdicts(ranks, true, change) {
        assert_eq!(error.to_string(), text);
        assert_eq!(error.rank(), None);
    }
}

#[test]
fn of_several_bad_calls_every_rank_reports_the_first() {
    let errors = on_ranks(3, |communicator| {
        let size = [2, 3, 4, 8 + communicator.rank() as i64];
        UlyssesAttention::new(communicator, Options::default())
            .forward(&of(size), &of([2, 3, 4, 8]), &of([2, 3, 4, 8]))
            .unwrap_err()
    });
    assert!(errors.iter().all(|error| *error == errors[0]));
    assert_eq!(errors[0].rank(), Some(1));
}

#[test]
fn ranks_work_on_after_a_refusal() {
    on_ranks(2, |communicator| {
        let attention = UlyssesAttention::new(communicator, Options::default());
        let good = of([1, 2, 2, 4]);
        assert!(attention.forward(&of([1, 2, 2]), &good, &good).is_err());
        assert!(attention.forward(&good, &good, &good).is_ok());
    });
}

#[test]
fn unequal_shards_and_each_rank_its_kernel_are_welcome() {
    on_ranks(2, |communicator| {
        let kernel = [ulysses::Kernel::Eager, ulysses::Kernel::Sdpa][communicator.rank()];
        let shard = of([1, 1 + 4 * communicator.rank() as i64, 2, 4]);
        let options = Options {
            kernel,
            ..Options::default()
        };
        let output = UlyssesAttention::new(communicator, options).forward(&shard, &shard, &shard);
        assert_eq!(output.unwrap().size(), shard.size());
    });
}

#[rstest]
#[case(
    0,
    1,
    1,
    "`query` has 0 heads for 1 KV heads and 1 ranks; give at least one of each"
)]
#[case(
    4,
    3,
    1,
    "`query` has 4 heads, which is no multiple of the 3 KV heads; give every KV head the same number of query heads"
)]
#[case(
    4,
    2,
    5,
    "`query` has 4 heads, fewer than the 5 ranks; use at most 4 ranks"
)]
fn heads_that_cannot_be_shared_out_are_refused(
    #[case] query_heads: usize,
    #[case] kv_heads: usize,
    #[case] ranks: usize,
    #[case] text: &str,
) {
    let error = HeadPartition::new(query_heads, kv_heads, ranks).unwrap_err();
    assert_eq!(error.to_string(), text);
}
