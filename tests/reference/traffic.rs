//! Two exchanges forward, two backward, and not a byte more than the heads and
//! tokens that have to move.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod world;

use rstest::rstest;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};
use ulysses::{
    Call, CountingCommunicator, Documents, Exchange, HeadPartition, Mask, Options, Score, Sharding,
    TokenPartition, Traffic, UlyssesAttention, cross_attention,
};
use world::{leaf, noise, on_ranks};

const BATCH: u64 = 2;
const HEAD_SIZE: u64 = 8;
/// One description of the call, in words.
const AGREEMENT: u64 = 99 * 8;

/// What one attention hands over, by counts that are written out.
struct Load<'a> {
    kind: Kind,
    value_size: u64,
    /// Of each rank, here and below.
    tokens: &'a [u64],
    query_heads: &'a [u64],
    /// With every copy of a replicated head.
    kv_heads: &'a [u64],
    /// All KV heads, each once.
    distinct_kv_heads: u64,
}

impl Load<'_> {
    fn bytes(&self, elements: u64) -> u64 {
        elements * self.kind.elt_size_in_bytes() as u64 * BATCH
    }

    /// Elements that query, key and value of one token and the heads of `rank`
    /// have.
    fn token(&self, rank: usize) -> u64 {
        self.query_heads[rank] * HEAD_SIZE + self.kv_heads[rank] * (HEAD_SIZE + self.value_size)
    }

    fn sum(of_ranks: impl Iterator<Item = u64>) -> u64 {
        of_ranks.sum()
    }

    /// The tokens of `rank`, to the heads of all ranks; its own go nowhere.
    fn sequence_to_heads(&self, rank: usize) -> (u64, u64) {
        let (tokens, ranks) = (self.tokens[rank], 0..self.tokens.len());
        let all = tokens * Self::sum(ranks.map(|peer| self.token(peer)));
        (self.bytes(all), self.bytes(all - tokens * self.token(rank)))
    }

    /// The output of the heads of `rank`, to the tokens of all ranks.
    fn heads_to_sequence(&self, rank: usize) -> (u64, u64) {
        let output = self.query_heads[rank] * self.value_size;
        let all: u64 = self.tokens.iter().sum();
        let bytes = |tokens| self.bytes(output * tokens);
        (bytes(all), bytes(all - self.tokens[rank]))
    }

    /// The way back of [`sequence_to_heads`](Self::sequence_to_heads).
    fn heads_to_sequence_of_all(&self, rank: usize) -> (u64, u64) {
        let all: u64 = self.tokens.iter().sum();
        let bytes = |tokens| self.bytes(self.token(rank) * tokens);
        (bytes(all), bytes(all - self.tokens[rank]))
    }

    /// The way back of [`heads_to_sequence`](Self::heads_to_sequence).
    fn sequence_to_heads_of_output(&self, rank: usize) -> (u64, u64) {
        let all = Self::sum(self.query_heads.iter().copied());
        let bytes = |heads| self.bytes(self.tokens[rank] * heads * self.value_size);
        (bytes(all), bytes(all - self.query_heads[rank]))
    }

    /// What `rank` hands over forward, and backward.
    fn traffic(&self, rank: usize) -> [Traffic; 2] {
        let both = |(first, first_off), (second, second_off)| match self.tokens.len() {
            1 => Traffic::default(),
            _ => Traffic {
                all_to_all_calls: 2,
                all_to_all_bytes: first + second,
                off_rank_bytes: first_off + second_off,
                ..Traffic::default()
            },
        };
        [
            both(self.sequence_to_heads(rank), self.heads_to_sequence(rank)),
            both(
                self.sequence_to_heads_of_output(rank),
                self.heads_to_sequence_of_all(rank),
            ),
        ]
    }
}

/// The formula for even shares: b B (S/P) D (2 Hq + 2 r Hkv) bytes are handed
/// over, of which (P - 1) / P leave the rank.
fn even(load: &Load<'_>) -> (u64, u64) {
    let ranks = load.tokens.len() as u64;
    let query_heads = Load::sum(load.query_heads.iter().copied());
    let copies = Load::sum(load.kv_heads.iter().copied());
    let bytes = load.bytes(load.tokens[0] * HEAD_SIZE * (2 * query_heads + 2 * copies));
    (bytes, bytes / ranks * (ranks - 1))
}

#[rstest]
#[case::alone(Kind::Float, 8, &[3], &[4], &[4], 4)]
#[case::multi_head(Kind::Float, 8, &[3, 3], &[2, 2], &[2, 2], 4)]
#[case::multi_head(Kind::Double, 8, &[3; 4], &[2; 4], &[2; 4], 8)]
#[case::grouped(Kind::BFloat16, 8, &[3, 3], &[4, 4], &[2, 2], 4)]
#[case::replicated(Kind::Half, 8, &[3; 4], &[2; 4], &[1; 4], 2)]
#[case::multi_query(Kind::Float, 8, &[3; 3], &[2; 3], &[1; 3], 1)]
#[case::uneven_tokens(Kind::Float, 8, &[5, 0, 2], &[1; 3], &[1; 3], 3)]
#[case::uneven_heads(Kind::Float, 8, &[3, 3], &[4, 3], &[4, 3], 7)]
#[case::replicated_in_part(Kind::Float, 8, &[2, 3, 4], &[3, 3, 2], &[2, 2, 1], 4)]
#[case::replicated_in_part(Kind::Float, 8, &[2, 1, 3, 4], &[2, 2, 1, 1], &[1, 1, 1, 1], 3)]
#[case::other_value_size(Kind::Float, 5, &[2, 3], &[2, 2], &[1, 1], 2)]
fn forward_and_backward_move_what_they_must(
    #[case] kind: Kind,
    #[case] value_size: u64,
    #[case] tokens: &[u64],
    #[case] query_heads: &[u64],
    #[case] kv_heads: &[u64],
    #[case] distinct_kv_heads: u64,
) {
    let load = Load {
        kind,
        value_size,
        tokens,
        query_heads,
        kv_heads,
        distinct_kv_heads,
    };
    on_ranks(tokens.len(), |communicator| {
        let rank = communicator.rank();
        let [due_forward, due_backward] = load.traffic(rank);
        let shares = |of_ranks: &[u64]| of_ranks.iter().all(|share| *share == of_ranks[0]);
        if tokens.len() > 1 && value_size == HEAD_SIZE && shares(tokens) && shares(query_heads) {
            let formula = (due_forward.all_to_all_bytes, due_forward.off_rank_bytes);
            assert_eq!(formula, even(&load));
        }

        let counter = Arc::new(CountingCommunicator::new(communicator));
        let options = Options {
            uneven_heads: true,
            ..Options::default()
        };
        let attention = UlyssesAttention::new(counter.clone(), options);
        let of = |seed, heads: u64, size: u64| {
            let size = [BATCH, tokens[rank], heads, size].map(|length| length as i64);
            leaf(&noise(seed, size, kind))
        };
        let query = of(1, Load::sum(query_heads.iter().copied()), HEAD_SIZE);
        let key = of(2, load.distinct_kv_heads, HEAD_SIZE);
        let value = of(3, load.distinct_kv_heads, value_size);
        let output = attention.forward(&query, &key, &value).unwrap();
        let agreement = Traffic {
            all_gather_calls: 1,
            all_gather_bytes: AGREEMENT,
            ..due_forward
        };
        assert_eq!(counter.traffic(), agreement, "forward");

        counter.reset();
        let leaves = [&query, &key, &value];
        let _ = Tensor::run_backward(&[output.sum(kind)], &leaves, false, false);
        assert_eq!(counter.traffic(), due_backward, "backward");
    });
}

/// Counts of two models, worked out by hand from DeepSpeed's exchange: f32, two
/// sequences of 1024 tokens, 8 heads; and bf16, one of 4096, 8 and 2 heads, of
/// which each goes to two ranks.
#[rstest]
#[case::multi_head(Kind::Float, [2, 1024, 8, 8], 4_194_304, 3_145_728)]
#[case::replicated(Kind::BFloat16, [1, 4096, 8, 2], 3_145_728, 2_359_296)]
fn models_move_the_bytes_that_are_worked_out_by_hand(
    #[case] kind: Kind,
    #[case] sizes: [i64; 4],
    #[case] bytes: u64,
    #[case] off_rank: u64,
) {
    let [batch, tokens, query_heads, kv_heads] = sizes;
    on_ranks(4, |communicator| {
        let counter = Arc::new(CountingCommunicator::new(communicator));
        let heads = HeadPartition::new(query_heads as usize, kv_heads as usize, 4).unwrap();
        let shards = [tokens as usize / 4; 4];
        let shards = TokenPartition::new(Sharding::Contiguous, &shards).unwrap();
        let exchange = Exchange::new(counter.clone(), shards, heads).unwrap();
        let of = |heads| Tensor::zeros([batch, tokens / 4, heads, 64], (kind, Device::Cpu));
        let (query, _, _) = exchange
            .sequence_to_heads(&of(query_heads), &of(kv_heads), &of(kv_heads))
            .unwrap();
        let _ = exchange.heads_to_sequence(&query).unwrap();
        let traffic = counter.traffic();
        assert_eq!(traffic.all_to_all_bytes, bytes);
        assert_eq!(traffic.off_rank_bytes, off_rank);
    });
}

#[test]
fn a_refused_call_moves_no_data() {
    on_ranks(2, |communicator| {
        let counter = Arc::new(CountingCommunicator::new(communicator));
        let attention = UlyssesAttention::new(counter.clone(), Options::default());
        let x = noise(1, [1, 2, 3, 4], Kind::Float);
        assert!(attention.forward(&x, &x, &x).is_err());
        let traffic = counter.traffic();
        assert_eq!((traffic.all_gather_calls, traffic.all_to_all_calls), (1, 0));
    });
}

/// Position ids are a gather of their own, 8 B s bytes from each rank, and none
/// where nobody reads them.
#[rstest]
#[case(None, 0)]
#[case(Some(Documents::FromPositions), 1)]
fn position_ids_travel_where_they_are_read(
    #[case] documents: Option<Documents<'static>>,
    #[case] gathers: u64,
) {
    on_ranks(2, |communicator| {
        let counter = Arc::new(CountingCommunicator::new(communicator));
        let attention = UlyssesAttention::new(counter.clone(), Options::default());
        let x = noise(1, [2, 3, 2, 4], Kind::Float);
        let positions = Tensor::arange(3, (Kind::Int64, Device::Cpu)).expand([2, 3], false);
        let call = Call {
            position_ids: Some(&positions),
            documents,
            ..Call::default()
        };
        let _ = attention.forward_with(&x, &x, &x, &call).unwrap();
        let traffic = counter.traffic();
        assert_eq!(traffic.all_gather_calls, 1 + gathers);
        assert_eq!(traffic.all_gather_bytes, AGREEMENT + gathers * 8 * 2 * 3);
    });
}

#[test]
fn the_bypass_outside_training_communicates_nothing_and_training_does_again() {
    on_ranks(2, |communicator| {
        let counter = Arc::new(CountingCommunicator::new(communicator));
        let options = Options {
            score: Score {
                mask: Mask::Causal,
                ..Score::default()
            },
            disable_in_eval: true,
            ..Options::default()
        };
        let attention = UlyssesAttention::new(counter.clone(), options);
        let whole = leaf(&noise(1, [1, 6, 2, 4], Kind::Double));
        let run = |attention: &UlyssesAttention| {
            let output = attention.forward(&whole, &whole, &whole).unwrap();
            let gradient =
                Tensor::run_backward(&[output.sum(Kind::Double)], &[&whole], false, false);
            (output, gradient)
        };
        attention.set_training(false);
        let (output, gradient) = run(&attention);
        assert_eq!(counter.traffic(), Traffic::default());
        assert_eq!(output.size(), [1, 6, 2, 4]);
        assert_eq!(gradient[0].size(), [1, 6, 2, 4]);
        attention.set_training(true);
        let _ = run(&attention);
        assert_eq!(counter.traffic().all_to_all_calls, 4);
    });
}

#[test]
fn without_disable_in_eval_evaluation_is_as_training() {
    on_ranks(2, |communicator| {
        let counter = Arc::new(CountingCommunicator::new(communicator));
        let attention = UlyssesAttention::new(counter.clone(), Options::default());
        attention.set_training(false);
        let x = noise(1, [1, 2, 2, 4], Kind::Float);
        let _ = attention.forward(&x, &x, &x).unwrap();
        assert_eq!(counter.traffic().all_to_all_calls, 2);
    });
}

#[test]
fn cross_attention_needs_no_communicator() {
    let (query, kv) = (
        noise(1, [1, 2, 4, 4], Kind::Float),
        noise(2, [1, 7, 2, 4], Kind::Float),
    );
    let output = cross_attention(&query, &kv, &kv, &Call::default(), &Options::default());
    assert_eq!(output.unwrap().size(), [1, 2, 4, 4]);
}
