//! Training with an optimizer that is sharded over a mesh.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod training;
mod world;

use proptest::prelude::*;
use rstest::rstest;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};
use training::{ADAMW, SGD, by_libtorch, detached, difference, on_mesh, options, shape};
use ulysses::{
    Communicator, Mesh, MeshShape, Options as AttentionOptions, UlyssesAttention,
    optimizer::{GradientScale, Options, Partition, ShardedOptimizer, Stage, StateKind, Update},
};
use world::on_ranks;

/// Weights of order one, and some hundred operations on each.
const FEW_ULP: f64 = 8.0 * f64::EPSILON;

/// Trains on every rank; all must have the weights of libtorch's optimizer on
/// one process, and the same bits as one another.
#[track_caller]
fn trains_like_one_process(mesh: MeshShape, options: Options) {
    let (due, due_norms) = by_libtorch(mesh.data_parallel(), options);
    // That something was learned, by those that can learn.
    let begun = training::parameters();
    for (index, learned) in [true, true, true, false, true, true, false]
        .into_iter()
        .enumerate()
    {
        let moved = (&begun[index] - &due[index]).abs().max().double_value(&[]);
        assert_eq!(moved > 0.01, learned, "parameter {index} moved by {moved}");
    }
    let ranks = on_ranks(mesh.ranks().unwrap(), |world| on_mesh(world, mesh, options));
    for (got, norms) in &ranks {
        let most = difference(got, &due);
        assert!(most <= FEW_ULP, "off by {most:e}");
        for (norm, due) in norms.iter().zip(&due_norms) {
            assert!(
                (norm - due).abs() <= FEW_ULP * due,
                "norm {norm}, not {due}"
            );
        }
        assert_eq!((got, norms), (&ranks[0].0, &ranks[0].1));
    }
}

#[rstest]
fn steps_are_those_of_the_whole_optimizer(
    #[values([1, 1, 1], [1, 1, 2], [1, 2, 1], [2, 1, 2], [1, 2, 2], [2, 2, 1], [1, 1, 4])]
    mesh: [usize; 3],
    #[values(Stage::One, Stage::Two)] stage: Stage,
    #[values(ADAMW, SGD)] update: Update,
) {
    trains_like_one_process(shape(mesh), options(stage, update));
}

#[rstest]
fn gradients_are_clipped_by_the_norm_of_all_together(
    #[values([1, 2, 2], [2, 1, 2])] mesh: [usize; 3],
    #[values(Stage::One, Stage::Two)] stage: Stage,
) {
    // In some of the steps the norm is greater, in some it is not.
    let options = Options {
        clip: Some(3.0),
        ..options(stage, SGD)
    };
    let (_, norms) = by_libtorch(2, options);
    assert!(
        norms.iter().any(|&norm| norm > 3.3) && norms.iter().any(|&norm| norm < 2.7),
        "{norms:?}"
    );
    trains_like_one_process(shape(mesh), options);
}

#[rstest]
#[case(GradientScale::MeanOfReplicas)]
#[case(GradientScale::Divide(22.0))]
fn the_sum_of_gradients_is_divided_as_told(
    #[case] scale: GradientScale,
    #[values(Stage::One, Stage::Two)] stage: Stage,
) {
    let options = Options {
        scale,
        ..options(stage, SGD)
    };
    trains_like_one_process(shape([2, 1, 2]), options);
}

proptest! {
    #[test]
    fn every_element_has_one_owner_and_owners_have_equally_many(
        elements in prop::collection::vec(0i64..50, 0..8),
        owners in 1usize..7,
    ) {
        let partition = Partition::new(&elements, owners);
        let mut owned = vec![0; owners];
        for (index, &due) in elements.iter().enumerate() {
            prop_assert_eq!(partition.counts(index).len(), owners);
            prop_assert_eq!(partition.counts(index).iter().sum::<i64>(), due);
            let mut next = 0;
            for (owner, owned) in owned.iter_mut().enumerate() {
                let (start, count) = partition.part(index, owner);
                prop_assert_eq!(start, next);
                next += count;
                *owned += count;
            }
        }
        let (least, most) = (owned.iter().min().unwrap(), owned.iter().max().unwrap());
        prop_assert!(most - least <= 1, "{:?}", owned);
    }
}

fn double(values: &[f64]) -> Tensor {
    Tensor::from_slice(values).set_requires_grad(true)
}

fn backward(parameter: &Tensor, factor: f64) {
    (parameter * factor).sum(parameter.kind()).backward();
}

fn mesh(world: &Arc<dyn Communicator>, dp_shard: usize) -> Mesh {
    let sp = world.size() / dp_shard;
    Mesh::new(Arc::clone(world), shape([1, dp_shard, sp])).unwrap()
}

#[test]
fn a_rank_keeps_its_part_of_the_state_alone() {
    let bytes = on_ranks(4, |world| {
        let parameters = [double(&[1.0; 7]), double(&[2.0; 3])];
        let mesh = mesh(&world, 2);
        let mut optimizer =
            ShardedOptimizer::new(&mesh, &parameters, options(Stage::One, ADAMW)).unwrap();
        assert_eq!(optimizer.state_bytes(), 0);
        for parameter in &parameters {
            backward(parameter, 1.0);
        }
        optimizer.step().unwrap();
        optimizer.state_bytes()
    });
    // Two means in float64 of three, three, two and two elements.
    assert_eq!(bytes, [48, 48, 32, 32]);
}

#[rstest]
fn in_stage_two_a_gradient_leaves_as_soon_as_it_is_complete(
    #[values(Stage::One, Stage::Two)] stage: Stage,
) {
    on_ranks(2, |world| {
        let parameter = double(&[1.0, 2.0, 3.0]);
        let mut optimizer = ShardedOptimizer::new(
            &mesh(&world, 1),
            &[parameter.shallow_clone()],
            options(stage, SGD),
        )
        .unwrap();
        backward(&parameter, 1.0);
        assert_eq!(parameter.grad().defined(), stage == Stage::One);
        optimizer.step().unwrap();
        optimizer.zero_grad().unwrap();
        assert!(!parameter.grad().defined());
        // Without an optimizer nobody takes gradients any more.
        drop(optimizer);
        backward(&parameter, 1.0);
        assert!(parameter.grad().defined());
    });
}

#[rstest]
fn gradients_of_several_backwards_add_up_until_they_are_freed(
    #[values(Stage::One, Stage::Two)] stage: Stage,
) {
    let rule = Update::Sgd {
        learning_rate: 1.0,
        momentum: 0.0,
        weight_decay: 0.0,
    };
    on_ranks(2, |world| {
        let parameter = double(&[0.0, 0.0, 0.0]);
        let mut optimizer = ShardedOptimizer::new(
            &mesh(&world, 1),
            &[parameter.shallow_clone()],
            options(stage, rule),
        )
        .unwrap();
        backward(&parameter, 1.0);
        optimizer.end_of_backward().unwrap();
        // In the second backward rank 1 has nothing to add.
        if world.rank() == 0 {
            backward(&parameter, 10.0);
        }
        optimizer.step().unwrap();
        assert_eq!(Vec::<f64>::try_from(&parameter).unwrap(), [-12.0; 3]);
        // They are still there.
        optimizer.step().unwrap();
        assert_eq!(Vec::<f64>::try_from(&parameter).unwrap(), [-24.0; 3]);
        optimizer.zero_grad().unwrap();
        assert_eq!(optimizer.step(), Ok(0.0));
        optimizer.set_learning_rate(0.5);
        backward(&parameter, 1.0);
        optimizer.step().unwrap();
        assert_eq!(Vec::<f64>::try_from(&parameter).unwrap(), [-25.0; 3]);
    });
}

/// Rank 1 has no gradient for the parameter whose turn is first, and in its
/// backward it waits for rank 0 in the exchange of attention: who waited for
/// rank 1 in the signal of that parameter would wait for ever.
#[test]
fn a_signal_does_not_wait_for_a_rank_in_an_exchange() {
    on_ranks(2, |world| {
        let mesh = mesh(&world, 1);
        let whole = || Tensor::ones([1, 3, 2, 4], (Kind::Double, Device::Cpu));
        let before = whole().set_requires_grad(true);
        let after = double(&[1.0]);
        let parameters = [before.shallow_clone(), after.shallow_clone()];
        let mut optimizer =
            ShardedOptimizer::new(&mesh, &parameters, options(Stage::Two, SGD)).unwrap();
        let attention = UlyssesAttention::new(
            Arc::clone(mesh.sequence_parallel()),
            AttentionOptions::default(),
        );
        for _ in 0..3 {
            let mut output = attention.forward(&before, &before, &before).unwrap();
            if world.rank() == 0 {
                output = &after * output;
            }
            output.sum(Kind::Double).backward();
            optimizer.step().unwrap();
            optimizer.zero_grad().unwrap();
        }
        assert!(after.double_value(&[0]) < 1.0);
    });
}

#[test]
fn narrow_weights_are_kept_wider_on_demand() {
    let rule = Update::Sgd {
        learning_rate: 1.0 / 1024.0,
        momentum: 0.0,
        weight_decay: 0.0,
    };
    on_ranks(2, |world| {
        for (state, due) in [(StateKind::Parameter, 1.0), (StateKind::Widened, 0.9921875)] {
            let parameter =
                Tensor::ones([3], (Kind::BFloat16, Device::Cpu)).set_requires_grad(true);
            let options = Options {
                state,
                scale: GradientScale::Divide(2.0),
                ..options(Stage::Two, rule)
            };
            let parameters = [parameter.shallow_clone()];
            let mut optimizer =
                ShardedOptimizer::new(&mesh(&world, 2), &parameters, options).unwrap();
            for _ in 0..8 {
                backward(&parameter, 1.0);
                optimizer.step().unwrap();
                optimizer.zero_grad().unwrap();
            }
            // One step is less than half of what is between two numbers.
            assert_eq!(parameter.kind(), Kind::BFloat16);
            assert_eq!(parameter.double_value(&[2]), due);
            let kept = 4 * [2, 1][world.rank()];
            assert_eq!(
                optimizer.state_bytes(),
                if state == StateKind::Widened { kept } else { 0 }
            );
        }
    });
}

#[test]
fn a_second_gradient_before_the_end_of_backward_is_refused() {
    let errors = on_ranks(2, |world| {
        let parameter = double(&[1.0]);
        let parameters = [parameter.shallow_clone()];
        let mut optimizer =
            ShardedOptimizer::new(&mesh(&world, 1), &parameters, options(Stage::Two, SGD)).unwrap();
        backward(&parameter, 1.0);
        backward(&parameter, 1.0);
        optimizer.step().unwrap_err().to_string()
    });
    let due = "`parameters` has a second gradient at position 0; \
               call `end_of_backward` after each backward that no `step` follows";
    // Who is the second to notice may hear it from the first.
    assert!(errors.iter().any(|error| error == due), "{errors:?}");
    assert!(errors.iter().all(|error| error.contains(due)), "{errors:?}");
}

#[test]
fn a_rank_that_fails_in_a_step_is_an_error_on_the_others() {
    let errors = on_ranks(2, |world| {
        let parameter = double(&[1.0]);
        let parameters = [parameter.shallow_clone()];
        let mut optimizer =
            ShardedOptimizer::new(&mesh(&world, 1), &parameters, options(Stage::Two, SGD)).unwrap();
        backward(&parameter, 1.0);
        if world.rank() == 1 {
            drop(optimizer);
            world.abandon("it has failed");
            return None;
        }
        Some(optimizer.step().unwrap_err().to_string())
    });
    let error = errors[0].as_ref().unwrap();
    assert!(error.starts_with("rank 1 left before "), "{error}");
}

/// Makes an optimizer on two ranks; both get the same refusal.
#[track_caller]
fn refused(due: &str, make: impl Fn(usize) -> (Vec<Tensor>, Options) + Sync) {
    let errors = on_ranks(2, |world| {
        let (parameters, options) = make(world.rank());
        let error = ShardedOptimizer::new(&mesh(&world, 1), &parameters, options)
            .err()
            .unwrap();
        assert!(world.all_gather(&[]).is_ok());
        error.to_string()
    });
    assert_eq!(errors, [due, due]);
}

#[test]
fn what_differs_between_ranks_is_refused_on_all() {
    let good = options(Stage::One, SGD);
    refused(
        "rank 1: `options` are not those of rank 0; give every rank the same",
        |rank| {
            (
                vec![double(&[1.0])],
                options(Stage::One, [SGD, ADAMW][rank]),
            )
        },
    );
    refused(
        "rank 1: `options` are not those of rank 0; give every rank the same",
        |rank| {
            let clip = [None, Some(-1.0)][rank];
            (vec![double(&[1.0])], Options { clip, ..good })
        },
    );
    refused(
        "rank 1: `parameters` has 2 parameters, but that of rank 0 has 1; give every rank the same",
        |rank| ((0..=rank).map(|_| double(&[1.0])).collect(), good),
    );
    for (what, other) in [
        ("other values", double(&[1.0, 2.5])),
        ("another shape", double(&[1.0])),
        (
            "another dtype",
            Tensor::from_slice(&[1.0f32, 2.0]).set_requires_grad(true),
        ),
        (
            "another choice of what is frozen",
            double(&[1.0, 2.0]).set_requires_grad(false),
        ),
    ] {
        let other = std::sync::Mutex::new(other);
        refused(
            &format!(
                "rank 1: `parameters` has {what} at position 1 than that of rank 0; \
                 begin with the same on every rank"
            ),
            |rank| {
                let same = double(&[1.0, 2.0]);
                let second = match rank {
                    0 => double(&[1.0, 2.0]),
                    _ => other.lock().unwrap().shallow_clone(),
                };
                (vec![same, second], good)
            },
        );
    }
}

#[test]
fn what_cannot_be_trained_is_refused_on_all() {
    let good = options(Stage::One, SGD);
    refused(
        "rank 1: `parameters` has no leaf of floating point at position 0; \
         give parameters that no operation has made",
        |rank| {
            let leaf = double(&[1.0]);
            let made = &leaf * 1.0;
            (vec![if rank == 1 { made } else { leaf }], good)
        },
    );
    refused(
        "rank 0: `parameters` has one tensor at positions 0 and 1; give each parameter once",
        |_| {
            let tied = double(&[1.0]);
            (vec![tied.shallow_clone(), tied], good)
        },
    );
    refused(
        "`options` has a norm to clip to of 0; give a finite number above zero",
        |_| {
            (
                vec![],
                Options {
                    clip: Some(0.0),
                    ..good
                },
            )
        },
    );
    refused(
        "`options` has a divisor of gradients of NaN; give a finite number above zero",
        |_| {
            let scale = GradientScale::Divide(f64::NAN);
            (vec![], Options { scale, ..good })
        },
    );
    refused(
        "`options` has momentum 1; give a number from 0 to below 1",
        |_| {
            let update = Update::Sgd {
                learning_rate: 0.1,
                momentum: 1.0,
                weight_decay: 0.0,
            };
            (vec![], Options { update, ..good })
        },
    );
}

#[test]
fn learning_rates_that_differ_are_refused_on_all() {
    on_ranks(2, |world| {
        let parameter = double(&[1.0]);
        let parameters = [parameter.shallow_clone()];
        let mut optimizer =
            ShardedOptimizer::new(&mesh(&world, 1), &parameters, options(Stage::One, SGD)).unwrap();
        backward(&parameter, 1.0);
        optimizer.set_learning_rate(0.1 + world.rank() as f64);
        assert_eq!(
            optimizer.step().unwrap_err().to_string(),
            "`learning_rate` differs between ranks; set the same on every rank"
        );
        assert_eq!(detached(&parameters)[0].double_value(&[0]), 1.0);
        optimizer.set_learning_rate(0.1);
        assert!(optimizer.step().is_ok());
    });
}
