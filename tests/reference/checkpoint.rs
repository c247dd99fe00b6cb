//! A checkpointed function gives what it gives without, and leaves nothing
//! behind but its inputs.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod world;

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering},
};
use tch::{Kind, Tensor};
use ulysses::{
    Error, Exchange, HeadPartition, Result, Sharding, TokenPartition, autograd::grad_enabled,
    checkpoint,
};
use world::{leaf, noise};

fn pair() -> (Tensor, Tensor) {
    let of = |seed| leaf(&noise(seed, [1, 1, 2, 3], Kind::Double));
    (of(1), of(2))
}

/// a exp(b), and a + b.
fn function(inputs: &[Tensor]) -> Result<Vec<Tensor>> {
    let (a, b) = (&inputs[0], &inputs[1]);
    Ok(vec![a.f_mul(&b.f_exp()?)?, a.f_add(b)?])
}

fn loss(outputs: &[Tensor]) -> Tensor {
    (&outputs[0] * &outputs[1]).sum(Kind::Double)
}

#[test]
fn outputs_and_gradients_are_those_without() {
    let (a, b) = pair();
    let due = function(&[a.shallow_clone(), b.shallow_clone()]).unwrap();
    let got = checkpoint(function, &[&a, &b]).unwrap();
    assert_eq!(got, due);
    let gradients =
        |outputs: &[Tensor]| Tensor::run_backward(&[loss(outputs)], &[&a, &b], false, false);
    assert_eq!(gradients(&got), gradients(&due));
}

#[test]
fn forward_records_nothing_and_backward_runs_it_again() {
    let recorded = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&recorded);
    let (a, b) = pair();
    let outputs = checkpoint(
        move |inputs| {
            log.lock().unwrap().push(grad_enabled());
            function(inputs)
        },
        &[&a, &b],
    )
    .unwrap();
    assert_eq!(*recorded.lock().unwrap(), [false]);
    loss(&outputs).backward();
    assert_eq!(*recorded.lock().unwrap(), [false, true]);
}

#[test]
fn without_gradients_it_runs_once_and_is_dropped() {
    let runs = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&runs);
    let (a, b) = pair();
    let outputs = tch::no_grad(|| {
        checkpoint(
            move |inputs| {
                counter.fetch_add(1, Ordering::SeqCst);
                function(inputs)
            },
            &[&a, &b],
        )
    });
    assert!(!outputs.unwrap()[0].requires_grad());
    assert_eq!(runs.load(Ordering::SeqCst), 1);
    assert_eq!(Arc::strong_count(&runs), 1);
}

#[test]
fn inputs_without_gradient_or_influence_have_none() {
    let (a, b) = pair();
    let constant = b.detach();
    checkpoint(function, &[&a, &constant]).unwrap()[0]
        .sum(Kind::Double)
        .backward();
    assert_eq!(a.grad(), constant.exp());
    assert!(!constant.grad().defined());

    let (a, b) = pair();
    let only_first = |inputs: &[Tensor]| Ok(vec![inputs[0].f_square()?]);
    checkpoint(only_first, &[&a, &b]).unwrap()[0]
        .sum(Kind::Double)
        .backward();
    assert_eq!(a.grad(), a.detach() * 2.0);
    assert!(!b.grad().defined());
}

#[test]
fn outputs_may_be_inputs_or_constants() {
    let (a, b) = pair();
    let through = |inputs: &[Tensor]| {
        Ok(vec![
            inputs[0].shallow_clone(),
            inputs[1].f_detach()?.f_exp()?,
        ])
    };
    let outputs = checkpoint(through, &[&a, &b]).unwrap();
    assert_eq!((&outputs[0], &outputs[1]), (&a, &b.exp()));
    loss(&outputs).backward();
    assert_eq!(a.grad(), b.exp());
    assert!(!b.grad().defined());
}

#[test]
fn integers_pass_among_the_inputs() {
    let (a, _) = pair();
    let index = Tensor::from_slice(&[1i64, 1]);
    let pick = |inputs: &[Tensor]| Ok(vec![inputs[0].f_index_select(2, &inputs[1])?]);
    checkpoint(pick, &[&a, &index]).unwrap()[0]
        .sum(Kind::Double)
        .backward();
    let due = Tensor::from_slice(&[0.0, 2.0])
        .view([1, 1, 2, 1])
        .expand([1, 1, 2, 3], false);
    assert_eq!(a.grad(), due);
}

#[test]
fn checkpoints_may_hold_checkpoints() {
    let (a, b) = pair();
    let outer = |inputs: &[Tensor]| {
        let inner = checkpoint(function, &[&inputs[0], &inputs[1]])?;
        Ok(vec![inner[0].f_sin()?, inner[1].f_cos()?])
    };
    let plain = |inputs: &[Tensor]| {
        let inner = function(inputs).unwrap();
        [inner[0].sin(), inner[1].cos()]
    };
    let due = plain(&[a.shallow_clone(), b.shallow_clone()]);
    let got = checkpoint(outer, &[&a, &b]).unwrap();
    let gradients =
        |outputs: &[Tensor]| Tensor::run_backward(&[loss(outputs)], &[&a, &b], false, false);
    assert_eq!(gradients(&got), gradients(&due));
}

#[test]
fn backward_through_a_retained_graph_can_be_repeated() {
    let (a, b) = pair();
    let loss = loss(&checkpoint(function, &[&a, &b]).unwrap());
    let first = Tensor::run_backward(&[&loss], &[&a, &b], true, false);
    assert_eq!(
        Tensor::run_backward(&[&loss], &[&a, &b], false, false),
        first
    );
}

#[test]
fn an_input_that_was_changed_in_place_is_refused() {
    let (a, b) = pair();
    let mut doubled = &a * 2.0;
    let outputs = checkpoint(function, &[&doubled, &b]).unwrap();
    let _ = tch::no_grad(|| doubled.g_add_scalar_(1.0));
    let error = outputs[0]
        .sum(Kind::Double)
        .f_backward()
        .unwrap_err()
        .to_string();
    let due = "`inputs` has a tensor at position 0 that was changed in place; \
        run backward before changing it";
    assert!(error.contains(due), "{error}");
}

#[test]
fn errors_of_either_run_are_told() {
    let (a, b) = pair();
    let fails_in = |run: usize| {
        let runs = AtomicUsize::new(0);
        move |inputs: &[Tensor]| match runs.fetch_add(1, Ordering::SeqCst) {
            now if now == run => Err(Error::Libtorch("wrong on purpose".to_owned())),
            _ => function(inputs),
        }
    };
    let error = checkpoint(fails_in(0), &[&a, &b]).unwrap_err();
    assert_eq!(error, Error::Libtorch("wrong on purpose".to_owned()));
    let outputs = checkpoint(fails_in(1), &[&a, &b]).unwrap();
    let error = loss(&outputs).f_backward().unwrap_err().to_string();
    assert!(error.contains("wrong on purpose"), "{error}");
}

/// Both runs exchange, on every rank.
#[test]
fn collectives_are_recomputed_too() {
    world::on_ranks(2, |communicator| {
        let heads = HeadPartition::new(2, 2, 2).unwrap();
        let x = leaf(&noise(
            communicator.rank() as u64,
            [1, 3, 2, 4],
            Kind::Double,
        ));
        let tokens = TokenPartition::new(Sharding::Contiguous, &[3, 3]).unwrap();
        let exchange = Exchange::new(communicator, tokens, heads).unwrap();
        let function = move |inputs: &[Tensor]| {
            let (q, k, v) = exchange.sequence_to_heads(&inputs[0], &inputs[0], &inputs[0])?;
            let product = q.f_mul(&k)?.f_mul(&v)?;
            Ok(vec![exchange.heads_to_sequence(&product)?])
        };
        let outputs = checkpoint(function, &[&x]).unwrap();
        assert!(naive_distance(&outputs[0], &x.pow_tensor_scalar(3)) < 1e-15);
        outputs[0].sum(Kind::Double).backward();
        assert!(naive_distance(&x.grad(), &(x.square() * 3.0)) < 1e-15);
    });
}

fn naive_distance(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().max().double_value(&[])
}
