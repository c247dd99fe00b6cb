//! Sums and gathers of tensors over ranks.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod world;

use rstest::rstest;
use tch::{Device, Kind, Tensor};
use ulysses::communicator::collectives::{all_gather, all_reduce, reduce_scatter};
use world::{noise, on_ranks};

/// What rank `rank` brings.
fn brought(rank: usize, size: [i64; 4], kind: Kind) -> Tensor {
    noise(rank as u64 + 1, size, kind)
}

/// The sum of what all ranks bring, one after another.
fn sum(ranks: usize, size: [i64; 4], kind: Kind) -> Tensor {
    let wide = if kind == Kind::Double {
        Kind::Double
    } else {
        Kind::Float
    };
    (1..ranks)
        .fold(brought(0, size, kind).to_kind(wide), |sum, rank| {
            sum + brought(rank, size, kind).to_kind(wide)
        })
        .to_kind(kind)
}

#[rstest]
fn all_reduce_has_the_bits_of_a_sum_in_rank_order(
    #[values(1, 2, 3, 4)] ranks: usize,
    #[values(Kind::Double, Kind::Float, Kind::BFloat16, Kind::Half)] kind: Kind,
    // More elements than ranks, and fewer, and none.
    #[values([2, 3, 5, 1], [1, 1, 1, 1], [3, 0, 2, 2])] size: [i64; 4],
) {
    let due = sum(ranks, size, kind);
    for got in on_ranks(ranks, |world| {
        all_reduce(&*world, &brought(world.rank(), size, kind)).unwrap()
    }) {
        assert_eq!(got.kind(), kind);
        assert_eq!(got, due);
    }
}

#[test]
fn any_strides_and_any_number_of_dimensions_are_summed() {
    let size = [2, 3, 5, 4];
    on_ranks(3, |world| {
        let own = brought(world.rank(), size, Kind::Double);
        let due = sum(3, size, Kind::Double);
        let turned = all_reduce(&*world, &own.permute([3, 1, 0, 2])).unwrap();
        assert_eq!(turned, due.permute([3, 1, 0, 2]));
        assert!(turned.is_contiguous());
        let row = own.select(0, 0).select(0, 0).select(0, 0);
        let spread = all_reduce(&*world, &row.expand([7, 4], false)).unwrap();
        assert_eq!(spread.get(6), due.select(0, 0).select(0, 0).select(0, 0));
        let number = all_reduce(&*world, &Tensor::from(world.rank() as i64 + 1)).unwrap();
        assert_eq!((number.size(), number.int64_value(&[])), (vec![], 6));
        // What comes back has no graph.
        let leaf = own.set_requires_grad(true);
        assert!(!all_reduce(&*world, &(leaf * 2)).unwrap().requires_grad());
    });
}

#[rstest]
#[case(vec![3, 0, 4])]
#[case(vec![0, 0, 7])]
#[case(vec![0, 0, 0])]
#[case(vec![2, 3, 2])]
fn parts_may_be_uneven_and_empty(#[case] counts: Vec<i64>) {
    let total: i64 = counts.iter().sum();
    let size = [total, 2, 1, 1];
    on_ranks(3, |world| {
        let rank = world.rank();
        let start: i64 = counts[..rank].iter().sum();
        // Every other element.
        let strided = |tensor: &Tensor| tensor.view([total, 2]).select(1, 1);
        let flat = strided(&brought(rank, size, Kind::Float));
        let due = strided(&sum(3, size, Kind::Float));
        let part = reduce_scatter(&*world, &flat, &counts).unwrap();
        assert_eq!(part, due.narrow(0, start, counts[rank]));
        let pairs = Tensor::stack(&[&part, &part.zeros_like()], 1);
        assert_eq!(
            all_gather(&*world, &pairs.select(1, 0), &counts).unwrap(),
            due
        );
    });
}

fn zeros(size: &[i64], kind: Kind) -> Tensor {
    Tensor::zeros(size, (kind, Device::Cpu))
}

/// Runs `wrong` on three ranks: all get the same refusal and are still in step.
#[track_caller]
fn refused(
    due: &str,
    wrong: impl Fn(&dyn ulysses::Communicator) -> ulysses::Result<Tensor> + Sync,
) {
    let errors = on_ranks(3, |world| {
        let error = wrong(&*world).unwrap_err();
        let one = Tensor::from(1i64);
        assert_eq!(all_reduce(&*world, &one).unwrap().int64_value(&[]), 3);
        error
    });
    for error in errors {
        assert_eq!(error.to_string(), due);
    }
}

#[test]
fn what_differs_between_ranks_is_the_same_refusal_on_every_rank() {
    refused(
        "rank 2: `tensor` has shape [3, 2], but that of rank 0 has [2, 3]; \
         give every rank the same shape",
        |world| {
            let size: &[i64] = if world.rank() == 2 { &[3, 2] } else { &[2, 3] };
            all_reduce(world, &zeros(size, Kind::Float))
        },
    );
    refused(
        "rank 1: `tensor` is float64, but that of rank 0 is float32; \
         give every rank the same dtype",
        |world| {
            let kinds = [Kind::Float, Kind::Double, Kind::Float];
            all_reduce(world, &zeros(&[2], kinds[world.rank()]))
        },
    );
    refused(
        "rank 1: `tensor` is undefined or of a dtype that has no sum; give numbers",
        |world| match world.rank() {
            1 => all_reduce(world, &Tensor::new()),
            _ => all_reduce(world, &zeros(&[2], Kind::Float)),
        },
    );
    refused(
        "rank 0: `tensor` has 9 dimensions; give at most 8",
        |world| all_reduce(world, &zeros(&[1; 9], Kind::Float)),
    );
    refused(
        "rank 1: `counts` are not those of rank 0; give every rank the same counts",
        |world| {
            let counts = [[1, 2, 3], [2, 1, 3], [1, 2, 3]][world.rank()];
            reduce_scatter(world, &zeros(&[6], Kind::Float), &counts)
        },
    );
    refused(
        "rank 0: `counts` add up to 5, but `flat` has 6 elements; count every element once",
        |world| reduce_scatter(world, &zeros(&[6], Kind::Float), &[1, 2, 2]),
    );
    refused(
        "rank 1: `flat` has shape [4], but that of rank 0 has [6]; \
         give every rank the same shape",
        |world| {
            let length = [6, 4, 6][world.rank()];
            reduce_scatter(world, &zeros(&[length], Kind::Float), &[1, 2, 3])
        },
    );
    refused(
        "rank 2: `counts` are for 2 ranks in a world of 3; give one for each rank",
        |world| {
            let counts: &[i64] = if world.rank() == 2 {
                &[3, 3]
            } else {
                &[2, 2, 2]
            };
            reduce_scatter(world, &zeros(&[6], Kind::Float), counts)
        },
    );
    refused(
        "rank 0: `counts` have -1 among them; give numbers that are not negative",
        |world| reduce_scatter(world, &zeros(&[6], Kind::Float), &[-1, 4, 3]),
    );
    refused(
        "rank 0: `flat` has shape [2, 3]; give one dimension",
        |world| reduce_scatter(world, &zeros(&[2, 3], Kind::Float), &[2, 2, 2]),
    );
    refused(
        "rank 1: `counts` give rank 1 2 elements, but its `part` has 3; count every element once",
        |world| all_gather(world, &zeros(&[3], Kind::Float), &[3, 2, 3]),
    );
}
