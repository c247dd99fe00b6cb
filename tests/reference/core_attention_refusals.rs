//! What core attention cannot do is refused in words, and before anything is
//! computed.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod naive;
mod world;

use naive::{Case, heads};
use rstest::rstest;
use std::ops::Range;
use tch::{Device, Kind, Tensor};
use ulysses::{BlockLayout, Dropout, Kernel, Mask, Score, Structure, core_attention};

fn with_probability(probability: f64) -> Option<Dropout> {
    Some(Dropout {
        probability,
        seed: 7,
        first_head: 0,
    })
}

#[rstest]
#[case::scale(|c: &mut Case| c.score.scale = Some(f64::INFINITY),
    "`scale` is inf; give a finite scale, or none")]
#[case::window(|c: &mut Case| c.score.window = Some(0),
    "`window` is 0, so that no token would see even itself; give at least 1, or none")]
#[case::softcap(|c: &mut Case| c.score.softcap = Some(-1.0),
    "`softcap` is -1; give a positive number, or none")]
#[case::softcap_zero(|c: &mut Case| c.score.softcap = Some(0.0),
    "`softcap` is 0; give a positive number, or none")]
#[case::softcap_nan(|c: &mut Case| c.score.softcap = Some(f64::NAN),
    "`softcap` is NaN; give a positive number, or none")]
#[case::dropout(|c: &mut Case| c.dropout = with_probability(1.5),
    "`dropout` has the probability 1.5; give one from 0 to below 1")]
#[case::dropout_of_all(|c: &mut Case| c.dropout = with_probability(1.0),
    "`dropout` has the probability 1; give one from 0 to below 1")]
#[case::dropout_nan(|c: &mut Case| c.dropout = with_probability(f64::NAN),
    "`dropout` has the probability NaN; give one from 0 to below 1")]
#[case::segment_rows(|c: &mut Case| c.segments = Some(vec![Vec::new(); 2]),
    "`segments` has 2 rows; give one for each of the 1 batch rows")]
#[case::segment_past_the_end(|c: &mut Case| c.segments = Some(vec![one_run(0, 6)]),
    "`segments` has the run 0..6 in row 0, after token 0 of 5; \
    give ascending and disjoint runs of tokens that there are")]
#[case::segments_overlap(|c: &mut Case| c.segments = Some(vec![vec![0..3, 2..5]]),
    "`segments` has the run 2..5 in row 0, after token 3 of 5; \
    give ascending and disjoint runs of tokens that there are")]
#[case::segment_backwards(|c: &mut Case| c.segments = Some(vec![one_run(3, 1)]),
    "`segments` has the run 3..1 in row 0, after token 0 of 5; \
    give ascending and disjoint runs of tokens that there are")]
#[case::causal_across(|c: &mut Case| (c.key_tokens, c.score.mask) = (7, Mask::Causal),
    "`mask` compares tokens, but `query` has 5 of them and `key` another 7; \
    leave it out for attention to another sequence")]
#[case::window_across(|c: &mut Case| (c.key_tokens, c.score.window) = (7, Some(2)),
    "`window` compares tokens, but `query` has 5 of them and `key` another 7; \
    leave it out for attention to another sequence")]
#[case::slopes_across(|c: &mut Case| (c.key_tokens, c.slopes) = (7, true),
    "`slopes` compares tokens, but `query` has 5 of them and `key` another 7; \
    leave it out for attention to another sequence")]
fn what_cannot_be_meant_is_refused(
    #[case] change: fn(&mut Case),
    #[case] text: &str,
    #[values(Kernel::Eager, Kernel::Sdpa)] kernel: Kernel,
) {
    let mut case = Case::plain(5);
    change(&mut case);
    let error = case.run(kernel, &case.inputs(Kind::Float)).unwrap_err();
    assert_eq!(error.to_string(), text);
}

fn one_run(start: usize, end: usize) -> Vec<Range<usize>> {
    std::iter::once(start..end).collect()
}

fn ones<const N: usize>(size: [i64; N]) -> Tensor {
    Tensor::ones(size, (Kind::Float, Device::Cpu))
}

#[rstest]
#[case::dimensions([1, 2, 5].to_vec(), [1, 2, 5, 4].to_vec(), [1, 2, 5, 4].to_vec(),
    "`query` has shape [1, 2, 5]; give [batch, heads, tokens, head size]")]
#[case::query_heads([1, 3, 5, 4].to_vec(), [1, 2, 5, 4].to_vec(), [1, 2, 5, 4].to_vec(),
    "`query` has shape [1, 3, 5, 4]; give [1, 2, 5, 4]")]
#[case::key_heads([1, 2, 5, 4].to_vec(), [1, 1, 5, 4].to_vec(), [1, 2, 5, 4].to_vec(),
    "`key` has shape [1, 1, 5, 4]; give [1, 2, 5, 4]")]
#[case::key_head_size([1, 2, 5, 4].to_vec(), [1, 2, 5, 3].to_vec(), [1, 2, 5, 4].to_vec(),
    "`key` has shape [1, 2, 5, 3]; give [1, 2, 5, 4]")]
#[case::key_batch([1, 2, 5, 4].to_vec(), [3, 2, 5, 4].to_vec(), [1, 2, 5, 4].to_vec(),
    "`key` has shape [3, 2, 5, 4]; give [1, 2, 5, 4]")]
#[case::value_tokens([1, 2, 5, 4].to_vec(), [1, 2, 5, 4].to_vec(), [1, 2, 4, 4].to_vec(),
    "`value` has shape [1, 2, 4, 4]; give [1, 2, 5, 4]")]
fn tensors_that_do_not_fit_are_refused(
    #[case] query: Vec<i64>,
    #[case] key: Vec<i64>,
    #[case] value: Vec<i64>,
    #[case] text: &str,
) {
    let of = |size: Vec<i64>| Tensor::ones(size, (Kind::Float, Device::Cpu));
    let (heads, score) = (heads(2, 2, 1, 0), Score::default());
    let (query, key, value) = (of(query), of(key), of(value));
    for kernel in [Kernel::Eager, Kernel::Sdpa] {
        let structure = Structure::default();
        let error =
            core_attention(&query, &key, &value, &heads, kernel, &score, &structure).unwrap_err();
        assert_eq!(error.to_string(), text);
    }
}

#[test]
fn structure_for_other_heads_or_blocks_is_refused() {
    let [x, three, block] = [
        ones([1, 2, 5, 4]).view(-1),
        ones([3]),
        ones([2, 2, 2]).view(-1),
    ];
    let (x, block) = (x.view([1, 2, 5, 4]), block.view([2, 2, 2]));
    let refusal = |structure: Structure| {
        let (heads, score) = (heads(2, 2, 1, 0), Score::default());
        core_attention(&x, &x, &x, &heads, Kernel::Sdpa, &score, &structure)
            .unwrap_err()
            .to_string()
    };
    let layout = |visible: &Tensor| Structure {
        layout: Some(BlockLayout::new(visible, 2).unwrap()),
        ..Structure::default()
    };
    let slopes = Structure {
        slopes: Some(&three),
        ..Structure::default()
    };
    let sinks = Structure {
        sinks: Some(&three),
        ..Structure::default()
    };
    assert_eq!(refusal(slopes), "`slopes` has shape [3]; give [2]");
    assert_eq!(refusal(sinks), "`sinks` has shape [3]; give [2]");
    assert_eq!(
        refusal(layout(&block)),
        "`layout` is for 2 heads and 2 blocks; give one for 2 heads and 3 blocks"
    );
    assert_eq!(
        refusal(layout(&ones([1, 3, 3]))),
        "`layout` is for 1 heads and 3 blocks; give one for 2 heads and 3 blocks"
    );
}

#[test]
fn layouts_are_square_and_have_heads() {
    let refusal =
        |visible: &Tensor, block| BlockLayout::new(visible, block).unwrap_err().to_string();
    assert_eq!(
        refusal(&ones([2, 3, 2]), 4),
        "`layout` has shape [2, 3, 2]; give [query heads, blocks, blocks]"
    );
    assert_eq!(
        refusal(&ones([2, 3, 3]), 0),
        "`layout` has blocks of 0 tokens; give blocks of at least one token"
    );
    let visible = Tensor::from_slice(&[1i64, 0, 0, 1, 0, 1, 1, 0]).view([2, 2, 2]);
    let layout = BlockLayout::new(&visible, 4).unwrap();
    let second = BlockLayout::new(&visible.narrow(0, 1, 1), 4).unwrap();
    assert_eq!(layout.narrow(1..2).unwrap(), second);
    assert_eq!(
        layout.narrow(1..3).unwrap_err().to_string(),
        "`layout` has 2 heads, none of which are 1..3; give one for each query head"
    );
}
