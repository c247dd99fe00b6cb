//! The loss over ranks is one number, whoever holds which tokens, and its
//! gradients are those of the same loss on one rank.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod world;

use proptest::prelude::*;
use rstest::rstest;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};
use ulysses::{
    Communicator, CommunicatorError, Error, Reduction, Result, cross_entropy, tiled_logits_loss,
};
use world::{leaf, noise, on_ranks};

const IGNORED: i64 = -100;
const CLASSES: i64 = 11;
const FEATURES: i64 = 5;

/// What a loss is of, in words that every rank can make its tensors from.
#[derive(Debug, Clone)]
struct Shape {
    batch: i64,
    /// The tokens of each rank.
    shards: Vec<i64>,
    /// Places in the sequence that have no label.
    ignored: Vec<i64>,
    kind: Kind,
}

struct Problem {
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
}

impl Shape {
    /// All tokens.
    fn whole(&self) -> Problem {
        let (batch, tokens) = (self.batch, self.shards.iter().sum::<i64>());
        let label = |i: i64| match self.ignored.contains(&(i % tokens)) {
            true => IGNORED,
            false => (7 * i + 3) % CLASSES,
        };
        let labels: Vec<i64> = (0..batch * tokens).map(label).collect();
        let rows = |seed, rows| noise(seed, [1, 1, rows, FEATURES], self.kind) * 3.0;
        Problem {
            hidden: rows(1, batch * tokens).view([batch, tokens, FEATURES]),
            head: rows(2, CLASSES).view([CLASSES, FEATURES]),
            labels: Tensor::from_slice(&labels).view([batch, tokens]),
        }
    }

    fn shard(&self, tensor: &Tensor, rank: usize) -> Tensor {
        tensor.narrow(1, self.shards[..rank].iter().sum(), self.shards[rank])
    }
}

fn logits(hidden: &Tensor, head: &Tensor) -> Tensor {
    hidden.linear(head, None::<&Tensor>)
}

/// A loss, or losses of tokens, and what reaches hidden states and head.
fn found(problem: &Problem, upstream: f64, loss: impl Fn(&Problem) -> Tensor) -> [Tensor; 3] {
    let leaves = Problem {
        hidden: leaf(&problem.hidden),
        head: leaf(&problem.head),
        labels: problem.labels.shallow_clone(),
    };
    let loss = loss(&leaves);
    let scalar = (&loss * upstream).sum(loss.kind());
    let inputs = [&leaves.hidden, &leaves.head];
    let found = Tensor::run_backward(&[scalar], &inputs, false, false);
    let [hidden, head] = <[Tensor; 2]>::try_from(found).unwrap();
    [loss.detach(), hidden, head]
}

/// By the definition, on one rank.
fn dense(problem: &Problem, reduction: Reduction) -> Tensor {
    let logits = logits(&problem.hidden, &problem.head);
    let counts = problem.labels.ne(IGNORED);
    let labels = problem.labels.clamp_min(0).unsqueeze(-1);
    let picked = logits.gather(-1, &labels, false).squeeze_dim(-1);
    let losses = (logits.logsumexp([-1i64].as_slice(), false) - picked) * &counts;
    match reduction {
        Reduction::None => losses,
        Reduction::Mean => losses.sum(None) / counts.sum(Kind::Int64).clamp_min(1),
        _ => losses.sum(None),
    }
}

/// The loss of a rank's tokens, of logits or in tiles.
fn of_rank(
    communicator: &Arc<dyn Communicator>,
    own: &Problem,
    ignored: i64,
    reduction: Reduction,
    tiles: Option<usize>,
) -> Result<Tensor> {
    let Problem {
        hidden,
        head,
        labels,
    } = own;
    match tiles {
        None => cross_entropy(
            communicator,
            &logits(hidden, head),
            labels,
            ignored,
            reduction,
        ),
        Some(tiles) => tiled_logits_loss(
            communicator,
            hidden,
            head,
            labels,
            ignored,
            reduction,
            tiles,
        ),
    }
}

fn near(got: &Tensor, due: &Tensor) {
    assert_eq!((got.size(), got.kind()), (due.size(), due.kind()));
    let far = if due.kind() == Kind::Double {
        2e-14
    } else {
        2e-5
    };
    assert!(got.allclose(due, far, far, false), "{got} {due}");
}

/// Ranks give the loss and gradients of one.
fn check(shape: &Shape, reduction: Reduction, upstream: f64, tiles: Option<usize>) {
    let of_ranks = on_ranks(shape.shards.len(), |communicator| {
        let (whole, rank) = (shape.whole(), communicator.rank());
        let own = Problem {
            hidden: shape.shard(&whole.hidden, rank),
            labels: shape.shard(&whole.labels, rank),
            head: whole.head,
        };
        found(&own, upstream, |own| {
            of_rank(&communicator, own, IGNORED, reduction, tiles).unwrap()
        })
    });
    let [loss, hidden, head] = found(&shape.whole(), upstream, |whole| dense(whole, reduction));
    let mut parts = head.zeros_like();
    for (rank, [got, of_hidden, of_head]) in of_ranks.iter().enumerate() {
        match reduction {
            Reduction::None => near(got, &shape.shard(&loss, rank)),
            _ => {
                assert_eq!(got, &of_ranks[0][0], "one number on all ranks");
                near(got, &loss);
            }
        }
        near(of_hidden, &shape.shard(&hidden, rank));
        parts += of_head;
    }
    near(&parts, &head);
}

/// Unequal counts, a rank without a label, a rank without a token, no label
/// anywhere, and labels in one tile alone.
#[rstest]
#[case::alone(&[9], &[2, 3])]
#[case::unequal(&[5, 3], &[0, 1, 2, 6])]
#[case::a_rank_without_label(&[3, 4, 2], &[3, 4, 5, 6])]
#[case::a_rank_without_token(&[4, 0, 3, 1], &[1])]
#[case::no_label(&[2, 2], &[0, 1, 2, 3])]
#[case::labels_in_one_tile(&[8, 8], &[0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 14])]
fn ranks_have_the_loss_and_gradients_of_one(
    #[case] shards: &[i64],
    #[case] ignored: &[i64],
    #[values(1, 2)] batch: i64,
    #[values(Reduction::Mean, Reduction::Sum, Reduction::None)] reduction: Reduction,
    #[values(1.0, 0.25, -3.0)] upstream: f64,
    #[values(None, Some(1), Some(4))] tiles: Option<usize>,
) {
    for kind in [Kind::Double, Kind::Float] {
        let shape = Shape {
            batch,
            shards: shards.to_vec(),
            ignored: ignored.to_vec(),
            kind,
        };
        check(&shape, reduction, upstream, tiles);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_cut_of_the_tokens(
        shards in prop::collection::vec(0i64..9, 1..5),
        ignored in prop::collection::vec(0i64..30, 0..20),
        batch in 1i64..3,
        tiles in prop::option::of(1usize..10),
    ) {
        let shape = Shape { batch, shards, ignored, kind: Kind::Double };
        check(&shape, Reduction::Mean, 1.0, tiles);
    }
}

/// 4096 losses of ln 11: a sum in bfloat16 would be far off.
#[rstest]
fn half_types_are_summed_in_float32(#[values(Kind::Half, Kind::BFloat16)] kind: Kind) {
    on_ranks(2, |communicator| {
        let hidden = leaf(&Tensor::zeros([1, 2048, 2], (kind, Device::Cpu)));
        let head = leaf(&Tensor::ones([CLASSES, 2], (kind, Device::Cpu)));
        let labels = Tensor::zeros([1, 2048], (Kind::Int64, Device::Cpu));
        let mean = Reduction::Mean;
        let whole = logits(&hidden, &head);
        let due = (CLASSES as f64).ln();
        for loss in [
            cross_entropy(&communicator, &whole, &labels, IGNORED, mean).unwrap(),
            tiled_logits_loss(&communicator, &hidden, &head, &labels, IGNORED, mean, 5).unwrap(),
        ] {
            assert_eq!(loss.kind(), Kind::Float);
            assert!((loss.double_value(&[]) - due).abs() < 1e-5, "{loss}");
            loss.backward();
        }
        assert_eq!((hidden.grad().kind(), head.grad().kind()), (kind, kind));
    });
}

/// What is ignored may be a class, or lie beyond all of them.
#[rstest]
fn any_number_may_stand_for_no_label(
    #[values(-1, 3, CLASSES, 1000)] ignored: i64,
    #[values(Reduction::Mean, Reduction::None)] reduction: Reduction,
) {
    let shape = Shape {
        batch: 2,
        shards: vec![9],
        ignored: vec![4],
        kind: Kind::Double,
    };
    on_ranks(1, |communicator| {
        let named = |places: &Tensor, number| {
            let own = shape.whole();
            let labels = own.labels.masked_fill(places, number);
            Problem { labels, ..own }
        };
        let labels = shape.whole().labels;
        let places = labels.eq(IGNORED).logical_or(&labels.eq(ignored));
        let due = found(&named(&places, IGNORED), 0.5, |own| dense(own, reduction));
        for tiles in [None, Some(2)] {
            let got = found(&named(&places, ignored), 0.5, |own| {
                of_rank(&communicator, own, ignored, reduction, tiles).unwrap()
            });
            got.iter().zip(&due).for_each(|(got, due)| near(got, due));
        }
    });
}

#[rstest]
fn a_graph_that_is_retained_runs_back_again(#[values(None, Some(3))] tiles: Option<usize>) {
    let shape = Shape {
        batch: 1,
        shards: vec![7],
        ignored: vec![2],
        kind: Kind::Double,
    };
    on_ranks(1, |communicator| {
        let own = shape.whole();
        let own = Problem {
            hidden: leaf(&own.hidden),
            head: leaf(&own.head),
            ..own
        };
        let loss = of_rank(&communicator, &own, IGNORED, Reduction::Mean, tiles).unwrap();
        let back = |keep| Tensor::run_backward(&[&loss], &[&own.hidden, &own.head], keep, false);
        let (first, second) = (back(true), back(false));
        assert!(first[0].abs().max().double_value(&[]) > 0.0);
        assert_eq!(first, second);
    });
}

/// What all three ranks are told when rank 1 has spoiled its own.
fn refusal(
    tiles: Option<usize>,
    spoil: impl Fn(&mut Problem, &mut i64, &mut Reduction, &mut Option<usize>) + Sync,
) -> String {
    let shape = Shape {
        batch: 1,
        shards: vec![2, 3, 2],
        ignored: vec![0],
        kind: Kind::Float,
    };
    let told = on_ranks(3, |communicator| {
        let (whole, rank) = (shape.whole(), communicator.rank());
        let good = || Problem {
            hidden: shape.shard(&whole.hidden, rank),
            labels: shape.shard(&whole.labels, rank),
            head: whole.head.shallow_clone(),
        };
        let (mut own, mut ignored, mut reduction, mut own_tiles) =
            (good(), IGNORED, Reduction::Mean, tiles);
        if rank == 1 {
            spoil(&mut own, &mut ignored, &mut reduction, &mut own_tiles);
        }
        let loss = of_rank(&communicator, &own, ignored, reduction, own_tiles);
        let error = loss.unwrap_err();
        assert_eq!(error.rank(), Some(1));
        // Nobody has lost step.
        assert!(of_rank(&communicator, &good(), IGNORED, Reduction::Mean, tiles).is_ok());
        error.to_string()
    });
    assert!(told.iter().all(|error| *error == told[0]), "{told:?}");
    told[0].clone()
}

#[rstest]
fn what_cannot_be_right_on_one_rank_is_refused_on_all(
    #[values(None, Some(2))] tiles: Option<usize>,
) {
    for label in [CLASSES, -1] {
        assert_eq!(
            refusal(tiles, |own, _, _, _| own.labels =
                own.labels.full_like(label)),
            format!(
                "rank 1: `labels` has {label}, but there are 11 classes; \
                 give labels below 11, or -100 for tokens that do not count"
            )
        );
    }
    assert_eq!(
        refusal(tiles, |own, _, _, _| own.labels =
            own.labels.narrow(1, 0, 2)),
        "rank 1: `labels` is Int64 [1, 2]; give Int64 [1, 3], a label for each token"
    );
    assert_eq!(
        refusal(tiles, |own, _, _, _| own.labels =
            own.labels.to_kind(Kind::Float)),
        "rank 1: `labels` is Float [1, 3]; give Int64 [1, 3], a label for each token"
    );
    assert_eq!(
        refusal(tiles, |_, ignored, _, _| *ignored = -1),
        "rank 1: `labels` is read with another `ignore_index` than on rank 0; \
         give the same on every rank"
    );
    assert_eq!(
        refusal(tiles, |_, _, reduction, _| *reduction = Reduction::None),
        "rank 1: `reduction` is another than on rank 0; give the same on every rank"
    );
    assert_eq!(
        refusal(tiles, |_, _, reduction, _| *reduction =
            Reduction::MeanOfTiles),
        "rank 1: `reduction` is a mean of tiles, which tokens that count differently often have \
         no use for; take the mean over tokens"
    );
    assert_eq!(
        refusal(tiles, |own, _, _, _| own.head = own.head.narrow(0, 0, 7)),
        "rank 1: `labels` has 9, but there are 7 classes; \
         give labels below 7, or -100 for tokens that do not count"
    );
    assert_eq!(
        refusal(tiles, |own, _, _, _| own.head = own.head.narrow(0, 0, 0)),
        "rank 1: `logits` has no class; give at least one"
    );
    assert_eq!(
        refusal(tiles, |own, _, _, _| own.head = own.head.repeat([2, 1])),
        "rank 1: `logits` has another number of classes than on rank 0; \
         give the same on every rank"
    );
    assert_eq!(
        refusal(tiles, |own, _, _, _| {
            own.hidden = own.hidden.to_kind(Kind::Double);
            own.head = own.head.to_kind(Kind::Double);
        }),
        "rank 1: `logits` has another element type than on rank 0; give the same on every rank"
    );
}

#[test]
fn what_is_refused_of_tiles_alone() {
    let tiles = Some(2);
    assert_eq!(
        refusal(tiles, |_, _, _, tiles| *tiles = Some(0)),
        "rank 1: `tiles` is 0; give at least 1"
    );
    assert_eq!(
        refusal(tiles, |own, _, _, _| own.head = own.head.narrow(1, 0, 4)),
        "rank 1: `head` is [11, 4], but `hidden` is [1, 3, 5]; \
         give [classes, features] and [batch, tokens, features]"
    );
    assert_eq!(
        refusal(tiles, |own, _, _, _| own.head =
            own.head.to_kind(Kind::Double)),
        "rank 1: `head` is Double on Cpu, but `hidden` is Float on Cpu; give both the same"
    );
    assert_eq!(
        refusal(tiles, |own, _, _, _| own.hidden = Tensor::new()),
        "rank 1: `hidden` is undefined; give a tensor that holds data"
    );
}

/// The first rank that refuses is the one that all are told of.
#[test]
fn of_two_refusals_all_are_told_the_first() {
    let told = on_ranks(4, |communicator| {
        let tiles = if communicator.rank() % 2 == 1 { 0 } else { 1 };
        let size = if communicator.rank() == 1 {
            [3, 5]
        } else {
            [3, 4]
        };
        let head = Tensor::zeros(size, (Kind::Float, Device::Cpu));
        let hidden = Tensor::zeros([1, 2, 5], (Kind::Float, Device::Cpu));
        let labels = Tensor::zeros([1, 2], (Kind::Int64, Device::Cpu));
        tiled_logits_loss(
            &communicator,
            &hidden,
            &head,
            &labels,
            0,
            Reduction::Sum,
            tiles,
        )
        .unwrap_err()
    });
    assert!(told.iter().all(|error| *error == told[0]));
    assert_eq!(told[0].rank(), Some(0));
    assert_eq!(told[0].argument(), Some("head"));
}

#[test]
fn a_rank_that_does_not_come_is_an_error() {
    let told = on_ranks(2, |communicator| {
        if communicator.rank() == 1 {
            return None;
        }
        let logits = Tensor::zeros([1, 2, 5], (Kind::Float, Device::Cpu));
        let labels = Tensor::zeros([1, 2], (Kind::Int64, Device::Cpu));
        cross_entropy(&communicator, &logits, &labels, 0, Reduction::Mean).err()
    });
    assert!(matches!(
        told[0],
        Some(Error::Communicator(CommunicatorError::Left { .. }))
    ));
}
