//! The exchanges move every element to where it belongs, and their backward is
//! their transpose.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod world;

use proptest::prelude::*;
use std::sync::Arc;
use tch::{Kind, Tensor};
use ulysses::{Communicator, Exchange, HeadPartition};
use world::{integers, leaf, on_ranks, shard};

#[derive(Debug, Clone)]
struct Shape {
    batch: i64,
    tokens: Vec<usize>,
    query_heads: i64,
    kv_heads: i64,
    head_size: i64,
}

impl Shape {
    fn ranks(&self) -> usize {
        self.tokens.len()
    }

    fn all_tokens(&self) -> i64 {
        self.tokens.iter().sum::<usize>() as i64
    }

    fn size(&self, heads: i64) -> [i64; 4] {
        [self.batch, self.all_tokens(), heads, self.head_size]
    }

    fn heads(&self) -> HeadPartition {
        let (query, kv) = (self.query_heads as usize, self.kv_heads as usize);
        HeadPartition::new(query, kv, self.ranks()).unwrap()
    }

    fn exchange(&self, communicator: &Arc<dyn Communicator>) -> Exchange {
        Exchange::new(Arc::clone(communicator), self.tokens.clone(), self.heads()).unwrap()
    }
}

fn shapes() -> impl Strategy<Value = Shape> {
    (
        prop::collection::vec(1..=5usize, 1..=4),
        1..=3i64,
        1..=3i64,
        1..=4i64,
        1..=3i64,
    )
        .prop_filter("a query head for each rank", |(tokens, _, kv, group, _)| {
            kv * group >= tokens.len() as i64
        })
        .prop_map(|(tokens, batch, kv_heads, group, head_size)| Shape {
            batch,
            tokens,
            query_heads: kv_heads * group,
            kv_heads,
            head_size,
        })
}

/// The number of element [b, t, h, d] of a tensor of `heads` heads: unlike
/// that of any other element of the three tensors.
fn code(shape: &Shape, tensor: i64, heads: i64, [b, t, h, d]: [i64; 4]) -> f64 {
    let position = ((b * shape.all_tokens() + t) * heads + h) * shape.head_size + d;
    (tensor * 1_000_000 + position) as f64
}

fn coded(shape: &Shape, tensor: i64, heads: i64) -> Tensor {
    let size = shape.size(heads);
    let first = code(shape, tensor, heads, [0; 4]) as i64;
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
            let all_heads = [shape.query_heads, shape.kv_heads, shape.kv_heads];
            let global = [0, 1, 2].map(|i| coded(shape, i as i64, all_heads[i]));
            let [q, k, v] = [0, 1, 2].map(|i| shard(&global[i], &shape.tokens, rank));
            let (q, k, v) = exchange.sequence_to_heads(&q, &k, &v).unwrap();
            let ranges =
                [heads.query_range(rank), heads.kv_range(rank), heads.kv_range(rank)];
            for (i, (got, range)) in [&q, &k, &v].into_iter().zip(ranges).enumerate() {
                let (count, tokens) = (range.len() as i64, shape.all_tokens());
                assert_eq!(got.size(), [shape.batch, count, tokens, shape.head_size]);
                for b in 0..shape.batch {
                    for h in 0..count {
                        for t in 0..tokens {
                            for d in 0..shape.head_size {
                                let head = range.start as i64 + h;
                                let due = code(shape, i as i64, all_heads[i], [b, t, head, d]);
                                assert_eq!(got.double_value(&[b, h, t, d]), due);
                            }
                        }
                    }
                }
            }
            // And the query heads go back to where they came from.
            let back = exchange.heads_to_sequence(&q).unwrap();
            assert_eq!(back, shard(&global[0], &shape.tokens, rank));
        });
    }

    // <A x, y> = <x, A^T y>, exactly: the sums are of whole numbers.
    #[test]
    fn the_adjoint_of_sequence_to_heads_is_its_transpose(shape in shapes()) {
        let shape = &shape;
        let products = on_ranks(shape.ranks(), |communicator| {
            let rank = communicator.rank();
            let exchange = shape.exchange(&communicator);
            let all_heads = [shape.query_heads, shape.kv_heads, shape.kv_heads];
            let x: [Tensor; 3] = std::array::from_fn(|i| {
                leaf(&shard(&integers(i as u64, shape.size(all_heads[i])), &shape.tokens, rank))
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
            let heads_first = integers(1, shape.size(shape.query_heads)).transpose(1, 2);
            let x = leaf(&heads_first.narrow(1, own.start as i64, own.len() as i64));
            let ax = shape.exchange(&communicator).heads_to_sequence(&x).unwrap();
            let y = shard(&integers(2, shape.size(shape.query_heads)), &shape.tokens, rank);
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
        tokens: vec![2, 3],
        query_heads: 4,
        kv_heads: 2,
        head_size: 3,
    };
    on_ranks(2, |communicator| {
        let exchange = shape.exchange(&communicator);
        let rank = communicator.rank();
        let plain = [4, 2, 2].map(|heads| {
            shard(
                &integers(heads as u64, shape.size(heads)),
                &shape.tokens,
                rank,
            )
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
        tokens: vec![4],
        query_heads: 2,
        kv_heads: 2,
        head_size: 3,
    };
    on_ranks(1, |communicator| {
        let x = integers(1, shape.size(2));
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
        let tokens = |count| Exchange::new(Arc::clone(&communicator), vec![1; count], heads);
        let text = |count| tokens(count).err().unwrap().to_string();
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
        tokens: vec![1; 3],
        query_heads: 3,
        kv_heads: 1,
        head_size: 1,
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
