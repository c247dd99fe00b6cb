//! What a call brings beside query, key and value means the same on any number
//! of ranks and for any sharding. What it means is the core attention's to
//! know, whose definition, on one rank, everything here is compared with.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod world;

use rstest::rstest;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};
use ulysses::{
    BlockLayout, Call, CallDropout, Documents, HeadNorm, Kernel, Mask, Options, Rotary, Score,
    Sharding, UlyssesAttention, checkpoint, cross_attention, rotate,
};
use world::{leaf, noise, on_ranks, pick};

const BATCH: i64 = 2;
const TOKENS: usize = 14;
const QUERY_HEADS: i64 = 6;
const KV_HEADS: i64 = 3;
const HEAD_SIZE: i64 = 8;

/// Which tokens each of `ranks` ranks holds.
fn places(sharding: Sharding, ranks: usize) -> Vec<Vec<i64>> {
    let all = 0..TOKENS as i64;
    let rank_of = |place: i64| match sharding {
        Sharding::Contiguous => place as usize * ranks / TOKENS,
        Sharding::Striped => place as usize % ranks,
        Sharding::Zigzag => {
            let (each, over) = (TOKENS / (2 * ranks), TOKENS % (2 * ranks));
            let end = |run: usize| (run + 1) * each + over.min(run + 1);
            let run = (0..2 * ranks)
                .find(|&run| (place as usize) < end(run))
                .unwrap();
            run.min(2 * ranks - 1 - run)
        }
    };
    (0..ranks)
        .map(|rank| {
            all.clone()
                .filter(|&place| rank_of(place) == rank)
                .collect()
        })
        .collect()
}

/// Everything that a call may bring, for the whole sequence.
struct Whole {
    position_ids: Tensor,
    attention_mask: Tensor,
    ends: Vec<Vec<usize>>,
    layout: BlockLayout,
    slopes: Tensor,
    sinks: Tensor,
    query_norm: Tensor,
    key_norm: Tensor,
}

impl Whole {
    fn new() -> Self {
        let row = |ends: &[i64]| -> Vec<i64> {
            let starts = std::iter::once(&0).chain(ends);
            starts
                .zip(ends)
                .flat_map(|(start, end)| 0..end - start)
                .collect()
        };
        let ends = [[5, 11, 14], [1, 2, 14]];
        let positions = ends.each_ref().map(|ends| row(ends)).concat();
        let real = |first: i64, past: i64| {
            (0..TOKENS as i64).map(move |t| i64::from(first <= t && t < past))
        };
        let real: Vec<i64> = real(0, 9).chain(real(3, 14)).collect();
        let visible: Vec<i64> = (0..QUERY_HEADS * 9)
            .map(|i| i64::from(i % 4 == 0 || i * i % 7 < 3))
            .collect();
        let heads =
            |seed, size: [i64; 2]| noise(seed, [1, 1, size[0], size[1]], Kind::Double).view(size);
        let whole = [BATCH, TOKENS as i64];
        Self {
            position_ids: Tensor::from_slice(&positions).view(whole),
            attention_mask: Tensor::from_slice(&real).view(whole),
            ends: ends
                .map(|ends| ends.map(|end| end as usize).to_vec())
                .to_vec(),
            layout: BlockLayout::new(&Tensor::from_slice(&visible).view([QUERY_HEADS, 3, 3]), 5)
                .unwrap(),
            slopes: leaf(&heads(11, [1, QUERY_HEADS]).view([QUERY_HEADS]).abs()),
            sinks: leaf(&heads(12, [1, QUERY_HEADS]).view([QUERY_HEADS])),
            query_norm: leaf(&(heads(13, [QUERY_HEADS, HEAD_SIZE]) + 1.5)),
            key_norm: leaf(&(heads(14, [KV_HEADS, HEAD_SIZE]) + 1.5)),
        }
    }

    fn head_state(&self) -> [&Tensor; 4] {
        [&self.slopes, &self.sinks, &self.query_norm, &self.key_norm]
    }
}

/// What is asked for, and what of the whole is brought.
#[derive(Clone, Copy, Default)]
struct Question {
    score: Score,
    rotary: Option<Rotary>,
    positions: bool,
    documents: Option<bool>,
    mask: bool,
    layout: bool,
    slopes: bool,
    sinks: bool,
    norms: bool,
    dropout: bool,
    recompute: bool,
    value_size: Option<i64>,
}

const CAUSAL: Score = Score {
    mask: Mask::Causal,
    window: None,
    scale: None,
    softcap: None,
};
const ROTARY: Rotary = Rotary {
    base: 16.0,
    sections: None,
};

/// Output and all gradients, over the whole sequence and all ranks.
fn answers(question: Question, kernel: Kernel, sharding: Sharding, ranks: usize) -> Vec<Tensor> {
    let places = places(sharding, ranks);
    let options = Options {
        kernel,
        score: question.score,
        rotary: question.rotary,
        uneven_heads: true,
        sharding,
        ..Options::default()
    };
    let value_size = question.value_size.unwrap_or(HEAD_SIZE);
    let size = |heads, size| [BATCH, TOKENS as i64, heads, size];
    let parts = on_ranks(ranks, |communicator| {
        let held = &places[communicator.rank()];
        let whole = Whole::new();
        let of_tokens = |tensor: &Tensor| tensor.index_select(1, &Tensor::from_slice(held));
        let (positions, mask) = (
            of_tokens(&whole.position_ids),
            of_tokens(&whole.attention_mask),
        );
        let inputs = [
            noise(1, size(QUERY_HEADS, HEAD_SIZE), Kind::Double),
            noise(2, size(KV_HEADS, HEAD_SIZE), Kind::Double),
            noise(3, size(KV_HEADS, value_size), Kind::Double),
        ]
        .map(|tensor| leaf(&pick(&tensor, held)));
        let attention = Arc::new(UlyssesAttention::new(communicator, options));
        let call = Call {
            position_ids: question.positions.then_some(&positions),
            documents: question.documents.map(|ends| match ends {
                true => Documents::Ends(&whole.ends),
                false => Documents::FromPositions,
            }),
            attention_mask: question.mask.then_some(&mask),
            layout: question.layout.then_some(&whole.layout),
            slopes: question.slopes.then_some(&whole.slopes),
            sinks: question.sinks.then_some(&whole.sinks),
            head_norm: question.norms.then_some(HeadNorm {
                query: &whole.query_norm,
                key: &whole.key_norm,
                epsilon: 1e-6,
            }),
            dropout: question.dropout.then_some(CallDropout {
                probability: 0.3,
                seed: 7,
            }),
            layer: 0,
        };
        let output = if question.recompute {
            let again = Arc::clone(&attention);
            let run = move |inputs: &[Tensor]| {
                Ok(vec![again.forward(&inputs[0], &inputs[1], &inputs[2])?])
            };
            let inputs: Vec<&Tensor> = inputs.iter().collect();
            checkpoint(run, &inputs).unwrap().remove(0)
        } else {
            let [query, key, value] = &inputs;
            attention.forward_with(query, key, value, &call).unwrap()
        };
        let cotangent = pick(&noise(4, size(QUERY_HEADS, value_size), Kind::Double), held);
        (&output * cotangent).sum(Kind::Double).backward();
        let tokens: Vec<Tensor> = std::iter::once(output.detach())
            .chain(inputs.iter().map(Tensor::grad))
            .collect();
        let heads = whole.head_state().map(|tensor| match tensor.grad() {
            gradient if gradient.defined() => gradient,
            _ => tensor.zeros_like(),
        });
        (tokens, heads)
    });
    let order = Tensor::from_slice(&places.concat()).argsort(0, false);
    let of_tokens = (0..4).map(|i| {
        let shards: Vec<&Tensor> = parts.iter().map(|(tokens, _)| &tokens[i]).collect();
        Tensor::cat(&shards, 1).index_select(1, &order)
    });
    let of_heads = (0..4).map(|i| parts.iter().map(|(_, heads)| heads[i].detach()).sum());
    of_tokens.chain(of_heads).collect()
}

const NAMES: [&str; 8] = [
    "output",
    "query",
    "key",
    "value",
    "slopes",
    "sinks",
    "query norm",
    "key norm",
];

#[rstest]
#[case::plain(Question { score: CAUSAL, ..Question::default() })]
#[case::value_size(Question { value_size: Some(5), ..Question::default() })]
#[case::window(Question { score: Score { window: Some(4), ..CAUSAL }, ..Question::default() })]
#[case::softcap(Question { score: Score { softcap: Some(0.5), scale: Some(0.7), ..CAUSAL }, ..Question::default() })]
#[case::rotary(Question { rotary: Some(ROTARY), positions: true, ..Question::default() })]
#[case::documents_from_positions(Question { score: CAUSAL, positions: true, documents: Some(false), ..Question::default() })]
#[case::documents_by_ends(Question { documents: Some(true), ..Question::default() })]
#[case::padding(Question { score: CAUSAL, mask: true, ..Question::default() })]
#[case::padded_documents(Question { documents: Some(true), mask: true, ..Question::default() })]
#[case::blocks(Question { score: CAUSAL, layout: true, ..Question::default() })]
#[case::slopes(Question { score: CAUSAL, slopes: true, ..Question::default() })]
#[case::sinks(Question { sinks: true, ..Question::default() })]
#[case::norms(Question { norms: true, positions: true, rotary: Some(ROTARY), ..Question::default() })]
#[case::dropout(Question { dropout: true, ..Question::default() })]
#[case::recomputed(Question { score: CAUSAL, recompute: true, ..Question::default() })]
#[case::all_at_once(Question {
    score: Score { window: Some(6), softcap: Some(2.0), ..CAUSAL }, rotary: Some(ROTARY), positions: true,
    documents: Some(false), mask: true, layout: true, slopes: true, sinks: true, norms: true, dropout: true, ..Question::default() })]
fn any_number_of_ranks_says_what_the_definition_says(
    #[case] question: Question,
    #[values(Sharding::Contiguous, Sharding::Zigzag, Sharding::Striped)] sharding: Sharding,
) {
    let due = answers(question, Kernel::Eager, Sharding::Contiguous, 1);
    for ranks in 1..=4 {
        let got = answers(question, Kernel::Sdpa, sharding, ranks);
        for ((got, due), name) in got.iter().zip(&due).zip(NAMES) {
            let distance = (got - due).abs().max().double_value(&[]);
            assert!(distance < 1e-12, "{name} on {ranks} ranks: {distance:e}");
        }
    }
}

#[test]
fn positions_may_be_rotated_before_the_exchange_as_well() {
    let inside = answers(
        Question {
            rotary: Some(ROTARY),
            positions: true,
            ..Question::default()
        },
        Kernel::Sdpa,
        Sharding::Contiguous,
        1,
    );
    let places = places(Sharding::Contiguous, 3);
    let outputs = on_ranks(3, |communicator| {
        let held = &places[communicator.rank()];
        let size = |heads| [BATCH, TOKENS as i64, heads, HEAD_SIZE];
        let [query, key, value] = [(1, QUERY_HEADS), (2, KV_HEADS), (3, KV_HEADS)]
            .map(|(seed, heads)| pick(&noise(seed, size(heads), Kind::Double), held));
        let positions = Whole::new()
            .position_ids
            .index_select(1, &Tensor::from_slice(held));
        let rotated = |tensor: &Tensor| rotate(tensor, &positions, &ROTARY).unwrap();
        UlyssesAttention::new(communicator, Options::default())
            .forward(&rotated(&query), &rotated(&key), &value)
            .unwrap()
    });
    let distance = (Tensor::cat(&outputs, 1) - &inside[0])
        .abs()
        .max()
        .double_value(&[]);
    assert!(distance < 1e-14, "{distance:e}");
}

#[test]
fn three_components_of_positions_travel_too() {
    let rotary = Rotary {
        base: 16.0,
        sections: Some([2, 1, 1]),
    };
    let options = Options {
        rotary: Some(rotary),
        uneven_heads: true,
        ..Options::default()
    };
    let run = |ranks: usize| {
        let places = places(Sharding::Contiguous, ranks);
        let outputs = on_ranks(ranks, |communicator| {
            let held = Tensor::from_slice(&places[communicator.rank()]);
            let t = Tensor::arange(TOKENS as i64, (Kind::Int64, Device::Cpu));
            let components = Tensor::stack(&[&t, &(&t * 5).remainder(11), &(&t * 3)], 0);
            let positions = components
                .unsqueeze(1)
                .expand([3, BATCH, TOKENS as i64], true);
            let positions = positions.index_select(2, &held);
            let x = noise(1, [BATCH, TOKENS as i64, 4, HEAD_SIZE], Kind::Double);
            let x = x.index_select(1, &held);
            let call = Call {
                position_ids: Some(&positions),
                ..Call::default()
            };
            UlyssesAttention::new(communicator, options)
                .forward_with(&x, &x, &x, &call)
                .unwrap()
        });
        Tensor::cat(&outputs, 1)
    };
    let distance = (run(3) - run(1)).abs().max().double_value(&[]);
    assert!(distance < 1e-14, "{distance:e}");
}

#[test]
fn parts_of_cross_attention_add_up() {
    let run = |ranks: usize| {
        let places = places(Sharding::Contiguous, ranks);
        let parts = on_ranks(ranks, |communicator| {
            let held = &places[communicator.rank()];
            let query = noise(
                1,
                [BATCH, TOKENS as i64, QUERY_HEADS, HEAD_SIZE],
                Kind::Double,
            );
            let query = leaf(&pick(&query, held));
            let key = leaf(&noise(2, [BATCH, 9, KV_HEADS, HEAD_SIZE], Kind::Double));
            let value = leaf(&noise(3, [BATCH, 9, KV_HEADS, 5], Kind::Double));
            let call = Call::default();
            let output = cross_attention(&query, &key, &value, &call, &Options::default()).unwrap();
            (&output * &output).sum(Kind::Double).backward();
            [output.detach(), query.grad(), key.grad(), value.grad()]
        });
        let tokens = |i: usize| Tensor::cat(&parts.iter().map(|p| &p[i]).collect::<Vec<_>>(), 1);
        let sum = |i: usize| -> Tensor { parts.iter().map(|part| part[i].detach()).sum() };
        [tokens(0), tokens(1), sum(2), sum(3)]
    };
    for (many, one) in run(3).iter().zip(&run(1)) {
        let distance = (many - one).abs().max().double_value(&[]);
        assert!(distance < 1e-13, "{distance:e}");
    }
}

#[test]
fn skipped_layers_give_their_queries_back_and_the_last_one_attends() {
    on_ranks(2, |communicator| {
        let options = Options {
            skip_all_but_last: Some(3),
            ..Options::default()
        };
        let plain = UlyssesAttention::new(Arc::clone(&communicator), Options::default());
        let attention = UlyssesAttention::new(communicator, options);
        let x = noise(1, [1, 3, 4, HEAD_SIZE], Kind::Float);
        let layer = |layer| {
            let call = Call {
                layer,
                ..Call::default()
            };
            attention.forward_with(&x, &x, &x, &call).unwrap()
        };
        assert_eq!(layer(0), x);
        assert_eq!(layer(1), x);
        assert_eq!(layer(2), plain.forward(&x, &x, &x).unwrap());
    });
}

/// Two attentions with other head counts, other lengths, evaluation in
/// between: the same question has the same answer, to the bit.
#[test]
fn nothing_is_kept_from_call_to_call() {
    on_ranks(2, |communicator| {
        let options = Options {
            disable_in_eval: true,
            ..Options::default()
        };
        let first = UlyssesAttention::new(Arc::clone(&communicator), options);
        let second = UlyssesAttention::new(communicator, Options::default());
        let ask = |attention: &UlyssesAttention, tokens, heads| {
            let x = leaf(&noise(1, [1, tokens, heads, HEAD_SIZE], Kind::Float));
            let output = attention.forward(&x, &x, &x).unwrap();
            output.sum(Kind::Float).backward();
            (output.detach(), x.grad())
        };
        let due = ask(&first, 5, 4);
        let _ = ask(&second, 3, 2);
        assert_eq!(
            ask(&first, 5, 4),
            due,
            "after other heads in another attention"
        );
        let _ = ask(&first, 9, 8);
        assert_eq!(
            ask(&first, 5, 4),
            due,
            "after another length and other heads"
        );
        first.set_training(false);
        let _ = ask(&first, 4, 4);
        first.set_training(true);
        assert_eq!(ask(&first, 5, 4), due, "after evaluation");
    });
}

#[test]
fn a_rank_without_a_token_takes_part() {
    on_ranks(3, |communicator| {
        let rank = communicator.rank();
        let tokens = [2, 0, 1][rank];
        let x = leaf(&noise(1, [2, tokens, 3, HEAD_SIZE], Kind::Double));
        let output = UlyssesAttention::new(communicator, Options::default())
            .forward(&x, &x, &x)
            .unwrap();
        assert_eq!(output.size(), x.size());
        output.sum(Kind::Double).backward();
        assert_eq!(x.grad().size(), x.size());
    });
}
