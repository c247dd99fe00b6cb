//! A model among ranks: its registry of attention functions, registration,
//! training and evaluation, and what is refused.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod tiny;
mod world;

use rstest::rstest;
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};
use tch::{Device, Kind, Tensor};
use tiny::{VOCABULARY, gradients, input, llama, tokens};
use ulysses::{
    AttentionCall, AttentionFunction, Communicator, CountingCommunicator, Error, Llama, MeshShape,
    Reduction, Registration, Result, register_in_group, register_with_model,
};
use world::{on_ranks, shard};

/// Of numbers near 1 through two layers.
const TOLERANCE: f64 = 1e-13;

fn registration(ranks: usize) -> Registration<'static> {
    Registration {
        sequence_parallel_size: ranks,
        micro_batch_size: 2,
        ..Registration::default()
    }
}

fn near(got: &Tensor, due: &Tensor) {
    assert_eq!(got.size(), due.size());
    let off = (got - due).abs().max().double_value(&[]);
    let largest = due.abs().max().double_value(&[]);
    assert!(off <= TOLERANCE * largest, "off by {off:e} of {largest:e}");
}

/// Logits of the whole sequence from the shards of all ranks.
fn whole(shards: &[Tensor]) -> Tensor {
    Tensor::cat(shards, 1)
}

fn logits(model: &Llama, shards: &[usize], rank: usize) -> Tensor {
    let (ids, positions) = tokens(2, shards.iter().sum::<usize>() as i64);
    let (ids, positions) = (shard(&ids, shards, rank), shard(&positions, shards, rank));
    model.forward(&input(&ids, &positions)).unwrap().detach()
}

fn dense(model: &Llama, length: usize) -> Tensor {
    logits(model, &[length], 0)
}

/// Counts its calls, and passes them on.
struct Counted(Arc<AtomicUsize>, Arc<dyn AttentionFunction>);

impl AttentionFunction for Counted {
    fn attend(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        call: &AttentionCall<'_>,
    ) -> Result<Tensor> {
        assert_eq!(self.0.fetch_add(1, Ordering::SeqCst) % 2, call.layer);
        self.1.attend(query, key, value, call)
    }
}

#[test]
fn models_of_one_process_have_each_their_own() {
    let shards = [3, 4];
    let found = on_ranks(2, |world| {
        let rank = world.rank();
        let (mut four, mut six, alone) = (llama(4, 2), llama(6, 3), llama(8, 1));
        let before = dense(&alone, 7);
        for model in [&mut four, &mut six] {
            register_in_group(model, Arc::clone(&world), &registration(2)).unwrap();
        }
        // In turn, so that nothing may be left from one to the other.
        let pairs = [0; 2].map(|_| [logits(&four, &shards, rank), logits(&six, &shards, rank)]);
        assert_eq!(pairs[0], pairs[1]);
        assert_eq!(dense(&alone, 7), before);
        let [pair, _] = pairs;
        pair
    });
    for (which, model) in [llama(4, 2), llama(6, 3)].iter().enumerate() {
        let got: Vec<Tensor> = found
            .iter()
            .map(|pair| pair[which].shallow_clone())
            .collect();
        near(&whole(&got), &dense(model, 7));
    }
}

#[test]
fn a_model_calls_the_function_that_it_chose_by_name() {
    let mut model = llama(4, 2);
    let due = dense(&model, 7);
    let calls = Arc::new(AtomicUsize::new(0));
    let functions = model.attention_functions_mut();
    let eager = Arc::clone(functions.get("eager").unwrap());
    functions.insert("counted", Arc::new(Counted(Arc::clone(&calls), eager)));
    let names: Vec<&str> = functions.names().collect();
    assert_eq!(names, ["counted", "eager", "sdpa"]);
    assert_eq!(dense(&model, 7), due);
    assert_eq!(calls.load(Ordering::SeqCst), 0);

    model.set_attention("counted").unwrap();
    near(&dense(&model, 7), &due);
    assert_eq!(calls.load(Ordering::SeqCst), 2);

    let refused = model.set_attention("flash").unwrap_err();
    assert_eq!(refused.argument(), Some("attention"));
    assert!(
        refused.to_string().contains("counted, eager, sdpa"),
        "{refused}"
    );
    assert_eq!(model.attention(), "counted");
}

#[test]
fn registration_replaces_every_function_and_no_choice() {
    let shards = [4, 3];
    let found = on_ranks(2, |world| {
        let mut model = llama(4, 2);
        let calls = Arc::new(AtomicUsize::new(0));
        let functions = model.attention_functions_mut();
        let eager = Arc::clone(functions.get("eager").unwrap());
        functions.insert("counted", Arc::new(Counted(Arc::clone(&calls), eager)));
        model.set_attention("counted").unwrap();
        register_in_group(&mut model, Arc::clone(&world), &registration(2)).unwrap();
        assert_eq!(model.attention(), "counted");
        let names: Vec<String> = model
            .attention_functions()
            .names()
            .map(Into::into)
            .collect();
        let by_name = names.iter().map(|name| {
            model.set_attention(name).unwrap();
            logits(&model, &shards, world.rank())
        });
        let by_name: Vec<Tensor> = by_name.collect();
        assert_eq!(calls.load(Ordering::SeqCst), 0);
        by_name
    });
    let due = dense(&llama(4, 2), 7);
    for name in 0..3 {
        let got: Vec<Tensor> = found.iter().map(|all| all[name].shallow_clone()).collect();
        near(&whole(&got), &due);
    }
}

#[rstest]
#[case("core_attention", Registration { core_attention: "flash_attention_2", ..registration(2) })]
#[case("sequence_parallel_size", registration(0))]
#[case("sequence_parallel_size", registration(4))]
#[case("micro_batch_size", Registration { micro_batch_size: 0, ..registration(2) })]
#[case("sequence_length", Registration { sequence_length_is_variable: false, ..registration(2) })]
#[case("sequence_length", Registration {
    sequence_length: Some(7), sequence_length_is_variable: false, ..registration(2)
})]
fn a_bad_registration_is_refused_by_its_argument(
    #[case] argument: &str,
    #[case] registration: Registration<'static>,
) {
    let errors = on_ranks(2, |world| {
        let mut model = llama(4, 2);
        let before = dense(&model, 7);
        let in_group = register_in_group(&mut model, Arc::clone(&world), &registration);
        let in_world = register_with_model(&mut model, world, &registration).map(drop);
        // The model is as it was.
        assert_eq!(dense(&model, 7), before);
        [in_group.unwrap_err(), in_world.unwrap_err()]
    });
    assert_eq!(errors[0], errors[1]);
    for error in &errors[0] {
        assert_eq!(error.argument(), Some(argument), "{error}");
    }
}

#[test]
fn heads_that_cannot_be_shared_out_are_refused() {
    let registered = |query, kv, uneven_heads| {
        let errors = on_ranks(3, |world| {
            let registration = Registration {
                uneven_heads,
                ..registration(3)
            };
            register_in_group(&mut llama(query, kv), world, &registration).map_err(|error| {
                assert_eq!(error.argument(), Some("sequence_parallel_size"));
                error.to_string()
            })
        });
        assert!(errors.iter().all(|error| *error == errors[0]));
        errors[0].clone()
    };
    assert!(
        registered(4, 2, false)
            .unwrap_err()
            .contains("layer 0 has 4 query")
    );
    assert!(registered(2, 1, true).is_err());
    assert_eq!(registered(4, 2, true), Ok(()));
    assert_eq!(registered(6, 1, false), Ok(()));
}

#[test]
fn what_one_rank_registers_otherwise_is_refused_on_all() {
    type Change = (&'static str, fn(&mut Registration<'_>));
    let changes: [Change; 4] = [
        ("micro_batch_size", |one| one.micro_batch_size = 3),
        ("disable_in_eval", |one| one.disable_in_eval = true),
        ("uneven_heads", |one| one.uneven_heads = true),
        ("core_attention", |one| one.core_attention = "none"),
    ];
    for (argument, change) in changes {
        let errors = on_ranks(3, |world| {
            let mut registration = Registration {
                sequence_parallel_size: 3,
                ..registration(3)
            };
            if world.rank() == 1 {
                change(&mut registration);
            }
            register_in_group(&mut llama(6, 3), world, &registration).unwrap_err()
        });
        assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
        assert_eq!(errors[0].argument(), Some(argument));
        assert_eq!(errors[0].rank(), Some(1));
    }
}

/// Two rows of three tokens, of which the last is `id`.
fn ending_in(id: i64) -> (Tensor, Tensor) {
    let (ids, positions) = tokens(2, 3);
    let _ = ids.narrow(0, 1, 1).narrow(1, 2, 1).fill_(id);
    (ids, positions)
}

#[test]
fn a_bad_input_on_one_rank_is_refused_on_all() {
    type Bad = (&'static str, fn() -> (Tensor, Tensor));
    let (as_ids, as_positions) = ("input_ids", "position_ids");
    let bad: [Bad; 7] = [
        (as_ids, || ending_in(VOCABULARY)),
        (as_ids, || ending_in(-1)),
        (as_ids, || {
            let (ids, positions) = tokens(2, 3);
            (ids.to_kind(Kind::Int), positions)
        }),
        (as_ids, || {
            let (ids, positions) = tokens(2, 3);
            (ids.view([2, 3, 1]), positions)
        }),
        (as_ids, || tokens(3, 3)),
        (as_positions, || {
            let (ids, positions) = tokens(2, 3);
            (ids, positions.to_kind(Kind::Double))
        }),
        (as_positions, || {
            let (ids, positions) = tokens(2, 3);
            (ids, positions.narrow(1, 0, 2))
        }),
    ];
    for (argument, make) in bad {
        let texts = on_ranks(2, |world| {
            let mut model = llama(4, 2);
            register_in_group(&mut model, Arc::clone(&world), &registration(2)).unwrap();
            let forward = |(ids, positions): (Tensor, Tensor)| {
                let logits = model.forward(&input(&ids, &positions))?;
                Ok::<_, Error>(logits.size())
            };
            let is_bad = world.rank() == 1;
            let given = if is_bad { make() } else { tokens(2, 3) };
            let error = forward(given).unwrap_err();
            assert_eq!(error.argument(), Some(argument), "{error}");
            assert_eq!(error.rank(), Some(1));
            // Nobody is left waiting, and the next call goes well.
            assert_eq!(forward(tokens(2, 3)), Ok(vec![2, 3, VOCABULARY]));
            error.to_string()
        });
        assert_eq!(texts[0], texts[1]);
    }
    let (ids, positions) = ending_in(VOCABULARY);
    let alone = llama(4, 2).forward(&input(&ids, &positions));
    let text = alone.unwrap_err().to_string();
    assert!(text.contains("has 11 at row 1, token 2"), "{text}");
    let alone = llama(4, 2).forward(&input(&Tensor::new(), &positions));
    assert_eq!(alone.unwrap_err().argument(), Some("input_ids"));
}

#[test]
fn a_fixed_length_is_held_to() {
    let errors = on_ranks(2, |world| {
        let mut model = llama(4, 2);
        let fixed = Registration {
            sequence_length: Some(6),
            sequence_length_is_variable: false,
            ..registration(2)
        };
        register_in_group(&mut model, world, &fixed).unwrap();
        let of = |length| {
            let (ids, positions) = tokens(2, length);
            model.forward(&input(&ids, &positions)).map(drop)
        };
        of(3).unwrap();
        of(4).unwrap_err()
    });
    assert_eq!(errors[0], errors[1]);
    assert!(matches!(errors[0], Error::Refused(_)));
}

#[test]
fn evaluation_goes_without_the_others_and_training_does_not() {
    on_ranks(2, |world| {
        let (rank, due) = (world.rank(), dense(&llama(4, 2), 6));
        let counting = Arc::new(CountingCommunicator::new(world));
        let mut model = llama(4, 2);
        let disabled = Registration {
            disable_in_eval: true,
            ..registration(2)
        };
        let group: Arc<dyn Communicator> = counting.clone();
        register_in_group(&mut model, group, &disabled).unwrap();
        let (ids, positions) = tokens(2, 6);
        let trained = logits(&model, &[3, 3], rank);
        near(&trained, &shard(&due, &[3, 3], rank));
        for _ in 0..2 {
            model.set_training(false);
            let before = counting.traffic();
            near(
                &model.forward(&input(&ids, &positions)).unwrap().detach(),
                &due,
            );
            assert_eq!(counting.traffic(), before);
            model.set_training(true);
            assert_eq!(logits(&model, &[3, 3], rank), trained);
            assert_ne!(counting.traffic(), before);
        }
    });
}

/// The gradients of a loss on two ranks.
fn trained(
    change: impl Fn(&mut Llama) + Sync,
    between: impl Fn(&mut Llama) + Sync,
) -> Vec<Vec<(String, Tensor)>> {
    let shards = [4, 3];
    on_ranks(2, |world| {
        let rank = world.rank();
        let mut model = llama(4, 2);
        let disabled = Registration {
            disable_in_eval: true,
            ..registration(2)
        };
        register_in_group(&mut model, world, &disabled).unwrap();
        change(&mut model);
        let (ids, positions) = tokens(2, 7);
        let (ids, positions) = (shard(&ids, &shards, rank), shard(&positions, &shards, rank));
        let labels = (&ids + 1).remainder(VOCABULARY);
        let given = input(&ids, &positions);
        let loss = model
            .loss(&given, &labels, -100, Reduction::Mean, 1)
            .unwrap();
        between(&mut model);
        loss.backward();
        gradients(&model)
    })
}

#[test]
fn checkpointing_changes_no_bit() {
    let due = trained(|_| (), |_| ());
    assert_eq!(trained(|model| model.set_checkpointing(true), |_| ()), due);
    // Recomputed as it was computed, in training.
    let left = trained(
        |model| model.set_checkpointing(true),
        |model| model.set_training(false),
    );
    assert_eq!(left, due);
}

#[test]
fn a_mesh_has_a_sequence_for_each_group() {
    let due = dense(&llama(4, 2), 6);
    let found = on_ranks(4, |world| {
        let rank = world.rank();
        let mut model = llama(4, 2);
        let one_row = Registration {
            micro_batch_size: 1,
            ..registration(2)
        };
        let mesh = register_with_model(&mut model, world, &one_row).unwrap();
        let shape = MeshShape {
            dp_replicate: 1,
            dp_shard: 2,
            sp: 2,
        };
        assert_eq!(mesh.shape(), shape);
        // Each group has a row of its own.
        let (ids, positions) = tokens(2, 6);
        let own = |tensor: &Tensor| shard(&tensor.narrow(0, rank as i64 / 2, 1), &[2, 4], rank % 2);
        let (ids, positions) = (own(&ids), own(&positions));
        model.forward(&input(&ids, &positions)).unwrap().detach()
    });
    let rows = [whole(&found[..2]), whole(&found[2..])];
    near(&Tensor::cat(&rows, 0), &due);
}

#[test]
fn tiles_are_refused_where_there_can_be_none() {
    let mut model = llama(4, 2);
    assert_eq!(
        model.set_mlp_tiles(0).unwrap_err().argument(),
        Some("tiles")
    );
    model.set_mlp_tiles(4).unwrap();
    let mut json = tiny::config_json(4, 2);
    json["mlp_bias"] = true.into();
    let config = ulysses::LlamaConfig::from_json(&json.to_string()).unwrap();
    let weights = tiny::weights(&config, Kind::Double);
    let mut model = Llama::new(config, weights, Kind::Double, Device::Cpu).unwrap();
    assert_eq!(
        model.set_mlp_tiles(2).unwrap_err().argument(),
        Some("tiles")
    );
    model.set_mlp_tiles(1).unwrap();
}
