//! Whatever is wrong with the call of any rank is the same error on every
//! rank, says what to do, and leaves nobody waiting.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod world;

use rstest::rstest;
use std::{sync::Arc, time::Instant};
use tch::{Device, Kind, Tensor};
use ulysses::{
    BlockLayout, CallDropout, CountingCommunicator, Documents, Error, HeadNorm, HeadPartition,
    Mask, Options, Rotary, SequenceLength, Sharding, UlyssesAttention, cross_attention,
};
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
#[case::fixed_length(|c: &mut Call| c.options.sequence_length = SequenceLength::Fixed { local: 4, global: 6 },
    "rank 1: `query` has 3 tokens, but the length is fixed at 4; give as many, or let the length vary")]
#[case::no_multiple(|c: &mut Call| { c.key = of([2, 3, 3, 8]); c.value = of([2, 3, 3, 8]) },
    "rank 1: `query` has 4 heads, but `key` has 3; give `query` a multiple of the heads of `key`")]
#[case::mixed_dtypes(|c: &mut Call| c.value = c.value.to_kind(Kind::Half),
    "rank 1: `value` is float16, but `query` is float32; give all three the same dtype")]
#[case::integers(|c: &mut Call| c.query = c.query.to_kind(Kind::Int64),
    "rank 1: `query` has a dtype that attention is not computed in; give one of float64, float32, bfloat16, float16")]
#[case::batch_of_another_rank(|c: &mut Call| { c.query = of([1, 3, 4, 8]); c.key = of([1, 3, 4, 8]); c.value = of([1, 3, 4, 8]) },
    "rank 1: `query` has batch 1, but rank 0 has 2; give every rank the same batch")]
#[case::heads_of_another_rank(|c: &mut Call| c.query = of([2, 3, 8, 8]),
    "rank 1: `query` has heads 8, but rank 0 has 4; give every rank the same heads")]
#[case::kv_heads_of_another_rank(|c: &mut Call| { c.key = of([2, 3, 2, 8]); c.value = of([2, 3, 2, 8]) },
    "rank 1: `key` has heads 2, but rank 0 has 4; give every rank the same heads")]
#[case::value_size_of_another_rank(|c: &mut Call| c.value = of([2, 3, 4, 6]),
    "rank 1: `value` has head size 6, but rank 0 has 8; give every rank the same head size")]
#[case::head_size_of_another_rank(|c: &mut Call| { c.query = of([2, 3, 4, 6]); c.key = of([2, 3, 4, 6]); c.value = of([2, 3, 4, 6]) },
    "rank 1: `query` has head size 6, but rank 0 has 8; give every rank the same head size")]
#[case::dtype_of_another_rank(|c: &mut Call| for t in [&mut c.query, &mut c.key, &mut c.value] { *t = t.to_kind(Kind::Double) },
    "rank 1: `query` is float64, but on rank 0 it is float32; give every rank the same dtype")]
#[case::gradient_of_another_rank(|c: &mut Call| c.key = c.key.set_requires_grad(true),
    "rank 1: `query` needs gradient here, but needs no gradient on rank 0; record gradients on every rank or on none")]
#[case::mask_of_another_rank(|c: &mut Call| c.options.score.mask = Mask::Causal,
    "rank 1: `options` has the mask Causal, but on rank 0 it is Full; give every rank the same")]
#[case::scale_of_another_rank(|c: &mut Call| c.options.score.scale = Some(0.5),
    "rank 1: `options` has the scale 0.5, but on rank 0 it is none; give every rank the same")]
#[case::uneven_heads_of_another_rank(|c: &mut Call| c.options.uneven_heads = true,
    "rank 1: `options` has the flag `uneven_heads` true, but on rank 0 it is false; give every rank the same")]
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

/// What a call brings beside the three tensors, or the options ask for: bad on
/// every rank, as in a program that all ranks run alike.
struct Brought {
    options: Options,
    position_ids: Option<Tensor>,
    attention_mask: Option<Tensor>,
    ends: Option<Vec<Vec<usize>>>,
    from_positions: bool,
    layout: Option<BlockLayout>,
    slopes: Option<Tensor>,
    sinks: Option<Tensor>,
    norms: Option<[Tensor; 2]>,
    dropout: Option<CallDropout>,
    layer: usize,
}

fn integers<const N: usize>(size: [i64; N]) -> Option<Tensor> {
    Some(Tensor::ones(size, (Kind::Int64, Device::Cpu)))
}

const ROTARY: Rotary = Rotary {
    base: 4.0,
    sections: None,
};

#[rstest]
#[case::positions_missing(|b: &mut Brought| b.options.rotary = Some(ROTARY),
    "rank 0: `position_ids` is missing, and a rotary embedding reads it; give the positions of this rank's tokens")]
#[case::positions_missing(|b: &mut Brought| b.from_positions = true,
    "rank 0: `position_ids` is missing, and documents from positions reads it; give the positions of this rank's tokens")]
#[case::positions_of_another_length(|b: &mut Brought| { b.from_positions = true; b.position_ids = integers([2, 4]) },
    "rank 0: `position_ids` has shape [2, 4]; give [2, 3] or [3, 2, 3]")]
#[case::positions_with_two_components(|b: &mut Brought| {
        b.options.rotary = Some(Rotary { sections: Some([2, 1, 1]), ..ROTARY }); b.position_ids = integers([2, 2, 3]) },
    "rank 0: `position_ids` has shape [2, 2, 3]; give [3, 2, 3]")]
#[case::positions_with_three_components(|b: &mut Brought| { b.from_positions = true; b.position_ids = integers([3, 2, 3]) },
    "rank 0: `position_ids` has three components, in which no document is seen to begin; give the ends of the documents")]
#[case::positions_of_floats(|b: &mut Brought| { b.from_positions = true; b.position_ids = Some(of([2, 3])) },
    "rank 0: `position_ids` is float32; give int64")]
#[case::mask_of_another_length(|b: &mut Brought| b.attention_mask = integers([2, 6]),
    "rank 0: `attention_mask` has shape [2, 6]; give [2, 3]")]
#[case::a_hole_in_the_mask(|b: &mut Brought| b.attention_mask = Some(Tensor::from_slice(&[1i64, 0, 1, 1, 1, 1]).view([2, 3])),
    "`attention_mask` has padding at token 1 of batch row 0, between real tokens; put padding before or after the real tokens")]
#[case::ends_of_too_few_rows(|b: &mut Brought| b.ends = Some(vec![vec![6]]),
    "rank 0: `documents` tells of 1 batch rows, but `query` has 2; give the ends of each row")]
#[case::ends_that_do_not_add_up(|b: &mut Brought| b.ends = Some(vec![vec![2, 6], vec![2, 5]]),
    "rank 0: `documents` ends at token 5, but the sequence has 6; give lengths that add up to the sequence")]
#[case::ends_that_go_down(|b: &mut Brought| b.ends = Some(vec![vec![6], vec![4, 2, 6]]),
    "rank 0: `documents` has ends that go down in batch row 1; give cumulative lengths")]
#[case::layout_for_another_length(|b: &mut Brought| b.layout = Some(layout(4, 2)),
    "rank 0: `layout` is for 4 heads and 2 blocks; give one for 4 heads and 3 blocks")]
#[case::layout_for_other_heads(|b: &mut Brought| b.layout = Some(layout(3, 3)),
    "rank 0: `layout` is for 3 heads and 3 blocks; give one for 4 heads and 3 blocks")]
#[case::slopes_for_other_heads(|b: &mut Brought| b.slopes = Some(of([5])),
    "rank 0: `slopes` has shape [5]; give [4]")]
#[case::sinks_for_other_heads(|b: &mut Brought| b.sinks = Some(of([2])),
    "rank 0: `sinks` has shape [2]; give [4]")]
#[case::norms_for_other_heads(|b: &mut Brought| b.norms = Some([of([4, 8]), of([2, 8])]),
    "rank 0: `key_norm` has shape [2, 8]; give [4, 8]")]
#[case::norms_of_another_dtype(|b: &mut Brought| b.norms = Some([of([4, 8]).to_kind(Kind::Half), of([4, 8])]),
    "rank 0: `query_norm` is float16; give float32")]
#[case::window_0(|b: &mut Brought| b.options.score.window = Some(0),
    "`window` is 0, so that no token would see even itself; give at least 1, or none")]
#[case::scale(|b: &mut Brought| b.options.score.scale = Some(f64::NAN),
    "`scale` is NaN; give a finite scale, or none")]
#[case::softcap(|b: &mut Brought| b.options.score.softcap = Some(-1.0),
    "`softcap` is -1; give a positive number, or none")]
#[case::dropout(|b: &mut Brought| b.dropout = Some(CallDropout { probability: 1.5, seed: 0 }),
    "`dropout` has the probability 1.5; give one from 0 to below 1")]
#[case::rotary_sections(|b: &mut Brought| b.options.rotary = Some(Rotary { sections: Some([1, 1, 1]), ..ROTARY }),
    "`rotary` has the sections [1, 1, 1]; give three that are 4 channel pairs in all")]
#[case::no_such_layer(|b: &mut Brought| { b.options.skip_all_but_last = Some(2); b.layer = 2 },
    "`layer` is 2, but `skip_all_but_last` tells of 2 layers; count the layers from 0")]
#[case::global_length(|b: &mut Brought| b.options.sequence_length = SequenceLength::Fixed { local: 3, global: 8 },
    "`query` has 6 tokens on all ranks, but the length is fixed at 8; give as many, or let the length vary")]
fn what_a_call_brings_is_checked_before_any_data_moves(
    #[case] change: fn(&mut Brought),
    #[case] text: &str,
) {
    let errors = on_ranks(2, |communicator| {
        let mut brought = Brought {
            options: Options::default(),
            position_ids: None,
            attention_mask: None,
            ends: None,
            from_positions: false,
            layout: None,
            slopes: None,
            sinks: None,
            norms: None,
            dropout: None,
            layer: 0,
        };
        change(&mut brought);
        let counter = Arc::new(CountingCommunicator::new(communicator));
        let attention = UlyssesAttention::new(counter.clone(), brought.options);
        let call = ulysses::Call {
            position_ids: brought.position_ids.as_ref(),
            documents: match &brought.ends {
                Some(ends) => Some(Documents::Ends(ends)),
                None => brought.from_positions.then_some(Documents::FromPositions),
            },
            attention_mask: brought.attention_mask.as_ref(),
            layout: brought.layout.as_ref(),
            slopes: brought.slopes.as_ref(),
            sinks: brought.sinks.as_ref(),
            head_norm: brought.norms.as_ref().map(|[query, key]| HeadNorm {
                query,
                key,
                epsilon: 1e-6,
            }),
            dropout: brought.dropout,
            layer: brought.layer,
        };
        let x = of([2, 3, 4, 8]);
        let error = attention.forward_with(&x, &x, &x, &call).unwrap_err();
        assert_eq!(counter.traffic().all_to_all_calls, 0);
        error
    });
    assert_eq!(errors[0].to_string(), text);
    assert_eq!(errors[0], errors[1]);
}

/// Blocks of two tokens.
fn layout(heads: i64, blocks: i64) -> BlockLayout {
    let visible = Tensor::ones([heads, blocks, blocks], (Kind::Bool, Device::Cpu));
    BlockLayout::new(&visible, 2).unwrap()
}

#[rstest]
#[case::of_options(|o: &mut Options, _: &mut ulysses::Call<'_>| o.score.window = Some(2),
    "rank 1: `options` has the window 2, but on rank 0 it is none; give every rank the same")]
#[case::of_the_call(|_: &mut Options, c: &mut ulysses::Call<'_>| c.dropout = Some(CallDropout { probability: 0.5, seed: 1 }),
    "rank 1: `dropout` has the probability 0.5, but on rank 0 it is none; give every rank the same")]
#[case::of_sharding(|o: &mut Options, _: &mut ulysses::Call<'_>| o.sharding = Sharding::Striped,
    "rank 1: `options` has the sharding Striped, but on rank 0 it is Contiguous; give every rank the same")]
#[case::of_documents(|_: &mut Options, c: &mut ulysses::Call<'_>| c.documents = Some(Documents::FromPositions),
    "rank 1: `call` has the kind of documents from positions, but on rank 0 it is none; give every rank the same")]
fn a_setting_that_differs_on_one_rank_is_named_on_all(
    #[case] change: fn(&mut Options, &mut ulysses::Call<'_>),
    #[case] text: &str,
) {
    let errors = on_ranks(3, |communicator| {
        let (mut options, mut call) = (Options::default(), ulysses::Call::default());
        if communicator.rank() == 1 {
            change(&mut options, &mut call);
        }
        let x = of([2, 3, 3, 8]);
        let attention = UlyssesAttention::new(communicator, options);
        attention.forward_with(&x, &x, &x, &call).unwrap_err()
    });
    assert!(
        errors.iter().all(|error| error.to_string() == text),
        "{errors:?}"
    );
}

#[rstest]
#[case(
    1,
    "rank 1: `slopes` is given, but rank 0 gives none; give it on every rank or on none"
)]
#[case(
    0,
    "rank 1: `slopes` is missing, but rank 0 gives it; give it on every rank or on none"
)]
fn what_one_rank_alone_brings_is_named_on_all(#[case] who: usize, #[case] text: &str) {
    let errors = on_ranks(2, |communicator| {
        let slopes = of([4]);
        let call = ulysses::Call {
            slopes: (communicator.rank() == who).then_some(&slopes),
            ..ulysses::Call::default()
        };
        let x = of([2, 3, 4, 8]);
        let attention = UlyssesAttention::new(communicator, Options::default());
        attention.forward_with(&x, &x, &x, &call).unwrap_err()
    });
    assert!(
        errors.iter().all(|error| error.to_string() == text),
        "{errors:?}"
    );
}

#[test]
fn a_shard_of_another_length_than_the_sharding_gives_is_refused() {
    let errors = on_ranks(2, |communicator| {
        let options = Options {
            sharding: Sharding::Striped,
            ..Options::default()
        };
        let x = of([1, 2 + 2 * communicator.rank() as i64, 2, 4]);
        UlyssesAttention::new(communicator, options)
            .forward(&x, &x, &x)
            .unwrap_err()
    });
    let text = "rank 0: `query` has 2 of 6 tokens, but a Striped sharding over 2 ranks gives this one 3; \
                give every rank the tokens of its shard";
    assert!(
        errors.iter().all(|error| error.to_string() == text),
        "{errors:?}"
    );
}

#[test]
fn no_token_anywhere_is_refused() {
    let errors = on_ranks(2, |communicator| {
        let x = of([2, 0, 4, 8]);
        UlyssesAttention::new(communicator, Options::default())
            .forward(&x, &x, &x)
            .unwrap_err()
    });
    let text = "`query` has no token on any rank; give at least one rank a token";
    assert!(
        errors.iter().all(|error| error.to_string() == text),
        "{errors:?}"
    );
}

#[rstest]
#[case([1, 2, 4, 8], [1, 5, 2, 6], [1, 5, 2, 6], Options::default(),
    "`key` has shape [1, 5, 2, 6], but `query` has [1, 2, 4, 8]; give both the same batch and head size")]
#[case([1, 2, 4, 8], [1, 5, 2, 8], [1, 4, 2, 8], Options::default(),
    "`value` has shape [1, 4, 2, 8], but `key` has [1, 5, 2, 8]; give both the same batch, tokens and heads")]
#[case([1, 2, 4, 8], [1, 5, 2, 8], [1, 5, 2, 8], Options { rotary: Some(ROTARY), ..Options::default() },
    "`rotary` has no meaning in attention to another sequence; leave it out")]
fn cross_attention_that_makes_no_sense_is_refused(
    #[case] query: [i64; 4],
    #[case] key: [i64; 4],
    #[case] value: [i64; 4],
    #[case] options: Options,
    #[case] text: &str,
) {
    let call = ulysses::Call::default();
    let error = cross_attention(&of(query), &of(key), &of(value), &call, &options).unwrap_err();
    assert_eq!(error.to_string(), text);
}
