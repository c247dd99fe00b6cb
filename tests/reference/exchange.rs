//! The exchanges move every element to where it belongs, and their backward is
//! their transpose.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod world;

use proptest::prelude::*;
use std::sync::Arc;
use tch::{Kind, Tensor};
use ulysses::{Communicator, Exchange, HeadPartition, Sharding, TokenPartition};
use world::{integers, leaf, on_ranks, pick};

#[derive(Debug, Clone)]
struct Shape {
    batch: i64,
    /// The tokens of each rank, by their place in the whole sequence.
    places: Vec<Vec<i64>>,
    sharding: Sharding,
    query_heads: i64,
    kv_heads: i64,
    head_size: i64,
    value_size: i64,
}

/// The places of contiguous shards of these lengths.
fn contiguous(lengths: &[usize]) -> Vec<Vec<i64>> {
    let mut next = 0..;
    let shard = |&length: &usize| next.by_ref().take(length).collect();
    lengths.iter().map(shard).collect()
}

/// Places as the words of [`Sharding`] have it, counted out one by one.
fn dealt(sharding: Sharding, tokens: usize, ranks: usize) -> Vec<Vec<i64>> {
    let mut places = vec![Vec::new(); ranks];
    match sharding {
        Sharding::Contiguous => unreachable!(),
        Sharding::Striped => (0..tokens).for_each(|t| places[t % ranks].push(t as i64)),
        Sharding::Zigzag => {
            let lengths: Vec<usize> = (0..2 * ranks)
                .map(|run| (run..tokens).step_by(2 * ranks).count())
                .collect();
            for (run, held) in contiguous(&lengths).into_iter().enumerate() {
                places[run.min(2 * ranks - 1 - run)].extend(held);
            }
        }
    }
    places
}

impl Shape {
    fn ranks(&self) -> usize {
        self.places.len()
    }

    fn all_tokens(&self) -> i64 {
        self.places.concat().len() as i64
    }

    /// Of query, key and value.
    fn sizes(&self) -> [[i64; 4]; 3] {
        [
            (self.query_heads, self.head_size),
            (self.kv_heads, self.head_size),
            (self.kv_heads, self.value_size),
        ]
        .map(|(heads, size)| [self.batch, self.all_tokens(), heads, size])
    }

    /// The shard of `rank` of a tensor [B, S, H, D].
    fn shard(&self, tensor: &Tensor, rank: usize) -> Tensor {
        pick(tensor, &self.places[rank])
    }

    fn heads(&self) -> HeadPartition {
        let (query, kv) = (self.query_heads as usize, self.kv_heads as usize);
        HeadPartition::new(query, kv, self.ranks()).unwrap()
    }

    fn exchange(&self, communicator: &Arc<dyn Communicator>) -> Exchange {
        let lengths: Vec<usize> = self.places.iter().map(Vec::len).collect();
        let tokens = TokenPartition::new(self.sharding, &lengths).unwrap();
        Exchange::new(Arc::clone(communicator), tokens, self.heads()).unwrap()
    }
}

fn shapes() -> impl Strategy<Value = Shape> {
    (
        all_places(),
        (1..=3i64, 1..=3i64, 1..=4i64),
        (1..=3i64, 1..=3i64),
    )
        .prop_filter(
            "a query head for each rank",
            |((places, _), (_, kv, group), _)| kv * group >= places.len() as i64,
        )
        .prop_map(
            |((places, sharding), (batch, kv_heads, group), sizes)| Shape {
                batch,
                places,
                sharding,
                query_heads: kv_heads * group,
                kv_heads,
                head_size: sizes.0,
                value_size: sizes.1,
            },
        )
}

fn all_places() -> impl Strategy<Value = (Vec<Vec<i64>>, Sharding)> {
    let lengths = prop::collection::vec(0..=5usize, 1..=4);
    let dealt = |sharding| {
        let places = move |(tokens, ranks)| (dealt(sharding, tokens, ranks), sharding);
        (1..=20usize, 1..=4usize).prop_map(places)
    };
    prop_oneof![
        lengths
            .prop_filter("a token", |lengths| lengths.iter().sum::<usize>() > 0)
            .prop_map(|lengths| (contiguous(&lengths), Sharding::Contiguous)),
        dealt(Sharding::Zigzag),
        dealt(Sharding::Striped),
    ]
}

/// The number of element [b, t, h, d] of a tensor of this size: unlike that of
/// any other element of the three tensors.
fn code(tensor: usize, size: [i64; 4], [b, t, h, d]: [i64; 4]) -> f64 {
    let position = ((b * size[1] + t) * size[2] + h) * size[3] + d;
    (tensor as i64 * 1_000_000 + position) as f64
}

fn coded(tensor: usize, size: [i64; 4]) -> Tensor {
    let first = code(tensor, size, [0; 4]) as i64;
    let count: i64 = size.iter().product();
    Tensor::arange_start(first, first + count, (Kind::Double, tch::Device::Cpu)).view(size)
}

fn config() -> ProptestConfig {
    ProptestConfig {
        cases: 64,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn every_element_lands_where_it_belongs(shape in shapes()) {
        let shape = &shape;
        on_ranks(shape.ranks(), |communicator| {
            let (rank, heads) = (communicator.rank(), shape.heads());
            let exchange = shape.exchange(&communicator);
            let sizes = shape.sizes();
            let global = [0, 1, 2].map(|i| coded(i, sizes[i]));
            let [q, k, v] = global.each_ref().map(|tensor| shape.shard(tensor, rank));
            let (q, k, v) = exchange.sequence_to_heads(&q, &k, &v).unwrap();
            let ranges =
                [heads.query_range(rank), heads.kv_range(rank), heads.kv_range(rank)];
            for (i, (got, range)) in [&q, &k, &v].into_iter().zip(ranges).enumerate() {
                let [batch, tokens, _, head_size] = sizes[i];
                let count = range.len() as i64;
                assert_eq!(got.size(), [batch, count, tokens, head_size]);
                for b in 0..batch {
                    for h in 0..count {
                        for t in 0..tokens {
                            for d in 0..head_size {
                                let due = code(i, sizes[i], [b, t, range.start as i64 + h, d]);
                                assert_eq!(got.double_value(&[b, h, t, d]), due);
                            }
                        }
                    }
                }
            }
            // And the query heads go back to where they came from.
            let back = exchange.heads_to_sequence(&q).unwrap();
            assert_eq!(back, shape.shard(&global[0], rank));
        });
    }

    // <A x, y> = <x, A^T y>, exactly: the sums are of whole numbers.
    #[test]
    fn the_adjoint_of_sequence_to_heads_is_its_transpose(shape in shapes()) {
        let shape = &shape;
        let products = on_ranks(shape.ranks(), |communicator| {
            let rank = communicator.rank();
            let exchange = shape.exchange(&communicator);
            let sizes = shape.sizes();
            let x: [Tensor; 3] = std::array::from_fn(|i| {
                leaf(&shape.shard(&integers(i as u64, sizes[i]), rank))
            });
            let (q, k, v) = exchange.sequence_to_heads(&x[0], &x[1], &x[2]).unwrap();
            let forward: Tensor = [q, k, v]
                .iter()
                .enumerate()
                .map(|(i, ax)| {
                    let size = ax.size().try_into().unwrap();
                    (ax * integers((10 + 10 * rank + i) as u64, size)).sum(Kind::Double)
                })
                .sum();
            let adjoint = Tensor::run_backward(&[&forward], &x, false, false);
            let backward: f64 =
                x.iter().zip(&adjoint).map(|(x, y)| (x * y).sum(Kind::Double).double_value(&[])).sum();
            (forward.double_value(&[]), backward)
        });
        let (forward, backward) =
            products.iter().fold((0.0, 0.0), |sum, own| (sum.0 + own.0, sum.1 + own.1));
        prop_assert_eq!(forward, backward);
    }

    #[test]
    fn the_adjoint_of_heads_to_sequence_is_its_transpose(shape in shapes()) {
        let shape = &shape;
        let products = on_ranks(shape.ranks(), |communicator| {
            let rank = communicator.rank();
            let own = shape.heads().query_range(rank);
            let size = shape.sizes()[0];
            let heads_first = integers(1, size).transpose(1, 2);
            let x = leaf(&heads_first.narrow(1, own.start as i64, own.len() as i64));
            let ax = shape.exchange(&communicator).heads_to_sequence(&x).unwrap();
            let y = shape.shard(&integers(2, size), rank);
            let forward = (ax * y).sum(Kind::Double);
            let adjoint = Tensor::run_backward(&[&forward], &[&x], false, false);
            (forward.double_value(&[]), (x * &adjoint[0]).sum(Kind::Double).double_value(&[]))
        });
        let (forward, backward) =
            products.iter().fold((0.0, 0.0), |sum, own| (sum.0 + own.0, sum.1 + own.1));
        prop_assert_eq!(forward, backward);
    }
}

#[test]
fn inputs_of_any_strides_are_exchanged_alike() {
    let shape = Shape {
        batch: 2,
        places: contiguous(&[2, 3]),
        sharding: Sharding::Contiguous,
        query_heads: 4,
        kv_heads: 2,
        head_size: 3,
        value_size: 5,
    };
    on_ranks(2, |communicator| {
        let exchange = shape.exchange(&communicator);
        let rank = communicator.rank();
        let plain = shape.sizes().map(|size| {
            shape
                .shard(&integers(size[3] as u64, size), rank)
                .contiguous()
        });
        let strided = plain
            .each_ref()
            .map(|tensor| tensor.transpose(1, 2).contiguous().transpose(1, 2));
        assert!(!strided[0].is_contiguous());
        let [a, b] =
            [plain, strided].map(|[q, k, v]| exchange.sequence_to_heads(&q, &k, &v).unwrap());
        assert_eq!((a.0, a.1, a.2), (b.0, b.1, b.2));
    });
}

#[test]
fn without_a_second_rank_nothing_is_copied() {
    let shape = Shape {
        batch: 1,
        places: contiguous(&[4]),
        sharding: Sharding::Contiguous,
        query_heads: 2,
        kv_heads: 2,
        head_size: 3,
        value_size: 3,
    };
    on_ranks(1, |communicator| {
        let x = integers(1, shape.sizes()[0]);
        let (q, _, _) = shape
            .exchange(&communicator)
            .sequence_to_heads(&x, &x, &x)
            .unwrap();
        assert_eq!(q.data_ptr(), x.data_ptr());
    });
}

#[test]
fn a_description_of_other_ranks_is_refused() {
    on_ranks(1, |communicator| {
        let heads = HeadPartition::new(4, 4, 2).unwrap();
        let text = |count| {
            let tokens = TokenPartition::new(Sharding::Contiguous, &vec![1; count]).unwrap();
            let exchange = Exchange::new(Arc::clone(&communicator), tokens, heads);
            exchange.err().unwrap().to_string()
        };
        assert_eq!(
            text(2),
            "`tokens` is for 2 ranks, but the communicator has 1; describe every rank once"
        );
        assert_eq!(
            text(1),
            "`heads` is for 2 ranks, but the communicator has 1; describe every rank once"
        );
    });
}

/// In bfloat16 neighbours of 256 are 2 apart: adding 1 twice, one at a time,
/// changes nothing, and rounding once gives 258.
#[test]
fn cotangents_of_a_replicated_head_are_summed_before_they_are_rounded() {
    let shape = Shape {
        batch: 1,
        places: contiguous(&[1; 3]),
        sharding: Sharding::Contiguous,
        query_heads: 3,
        kv_heads: 1,
        head_size: 1,
        value_size: 1,
    };
    on_ranks(3, |communicator| {
        let exchange = shape.exchange(&communicator);
        let of = |heads, value| {
            Tensor::full([1, 1, heads, 1], value, (Kind::BFloat16, tch::Device::Cpu))
        };
        let x = [3, 1, 1].map(|heads| leaf(&of(heads, 0.0)));
        let (_, key, _) = exchange.sequence_to_heads(&x[0], &x[1], &x[2]).unwrap();
        let copy = [256.0, 1.0, 1.0][communicator.rank()];
        let gradients = Tensor::run_backward(&[(key * copy).sum(Kind::Float)], &x, false, false);
        assert_eq!(gradients[1].double_value(&[0, 0, 0, 0]), 258.0);
        assert_eq!(
            gradients[0],
            of(3, 0.0),
            "no use of the query, no cotangent"
        );
    });
}

/// Peers read what a rank sends where it lies: the exchange is not over for
/// that rank before they have.
#[test]
fn what_was_sent_may_be_overwritten_at_once() {
    on_ranks(2, |communicator| {
        let peer = 1 - communicator.rank();
        let own = Tensor::zeros([1 << 18], (Kind::Float, tch::Device::Cpu));
        let got = own.zeros_like();
        let blocks = |block: &Tensor| -> Vec<Vec<Tensor>> {
            let list = |rank| (rank == peer).then(|| block.shallow_clone());
            (0..2)
                .map(|rank| list(rank).into_iter().collect())
                .collect()
        };
        for round in 1..=50 {
            let _ = own.shallow_clone().fill_(round);
            // One rank is late to read, by turns.
            if round % 2 == peer as i64 {
                let _ = got.shallow_clone().fill_(-1);
            }
            communicator
                .all_to_all(&blocks(&own), &blocks(&got))
                .unwrap();
            let _ = own.shallow_clone().fill_(-1);
            assert_eq!((got.min(), got.max()), (round.into(), round.into()));
        }
    });
}
