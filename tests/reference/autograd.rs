//! Custom autograd functions: what crosses the border between Rust and C++,
//! and what does not.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};
use tch::{Device, Kind, Tensor};
use ulysses::{
    Error, Result,
    autograd::{Function, apply, grad_enabled},
};

/// What passes of a [`Probe`] do instead of their work.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    Error,
    Panic,
    TooFew,
}

/// From (a, b) to (2 a, 3 b), with the faults a test asks for.
struct Probe {
    forward: Option<Fault>,
    backward: Option<Fault>,
    dropped: Arc<AtomicUsize>,
}

impl Probe {
    fn new() -> (Self, Arc<AtomicUsize>) {
        let dropped = Arc::new(AtomicUsize::new(0));
        (
            Self {
                forward: None,
                backward: None,
                dropped: Arc::clone(&dropped),
            },
            dropped,
        )
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.dropped.fetch_add(1, Ordering::SeqCst);
    }
}

fn run<T>(fault: Option<Fault>, mut tensors: Vec<T>) -> Result<Vec<T>> {
    match fault {
        Some(Fault::Error) => return Err(Error::Libtorch("wrong on purpose".to_owned())),
        Some(Fault::Panic) => panic!("panic on purpose"),
        Some(Fault::TooFew) => drop(tensors.pop()),
        None => {}
    }
    Ok(tensors)
}

impl Function for Probe {
    fn forward(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        assert!(!grad_enabled());
        run(self.forward, vec![&inputs[0] * 2, &inputs[1] * 3])
    }

    fn backward(&mut self, cotangents: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        assert!(!grad_enabled());
        run(
            self.backward,
            vec![Some(&cotangents[0] * 2), Some(&cotangents[1] * 3)],
        )
    }
}

fn ones(requires_grad: bool) -> Tensor {
    Tensor::ones([2], (Kind::Double, Device::Cpu)).set_requires_grad(requires_grad)
}

fn twos_of(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor).unwrap()
}

#[test]
fn gradients_reach_every_input_and_the_state_is_freed_once_with_the_graph() {
    let (probe, dropped) = Probe::new();
    let (a, b) = (ones(true), ones(true));
    let outputs = apply(probe, &[&a, &b]).unwrap();
    assert_eq!(
        (twos_of(&outputs[0]), twos_of(&outputs[1])),
        (vec![2.0; 2], vec![3.0; 2])
    );
    (&outputs[0] + &outputs[1]).sum(Kind::Double).backward();
    assert_eq!(
        (twos_of(&a.grad()), twos_of(&b.grad())),
        (vec![2.0; 2], vec![3.0; 2])
    );
    assert_eq!(dropped.load(Ordering::SeqCst), 0, "the graph is alive");
    drop(outputs);
    assert_eq!(dropped.load(Ordering::SeqCst), 1);
}

#[test]
fn without_gradients_the_state_is_freed_at_once() {
    for quiet in [false, true] {
        let (probe, dropped) = Probe::new();
        let run = || apply(probe, &[&ones(quiet), &ones(false)]).unwrap();
        let outputs = if quiet { tch::no_grad(run) } else { run() };
        assert!(!outputs[0].requires_grad());
        assert_eq!(dropped.load(Ordering::SeqCst), 1);
    }
}

#[test]
fn an_unused_output_has_a_cotangent_of_zeros() {
    let (probe, _) = Probe::new();
    let (a, b) = (ones(true), ones(true));
    let outputs = apply(probe, &[&a, &b]).unwrap();
    outputs[0].sum(Kind::Double).backward();
    assert_eq!(
        (twos_of(&a.grad()), twos_of(&b.grad())),
        (vec![2.0; 2], vec![0.0; 2])
    );
}

#[test]
fn an_input_that_needs_no_gradient_gets_none() {
    let (probe, _) = Probe::new();
    let (a, b) = (ones(false), ones(true));
    let outputs = apply(probe, &[&a, &b]).unwrap();
    assert!(outputs[0].requires_grad() && outputs[1].requires_grad());
    (&outputs[0] + &outputs[1]).sum(Kind::Double).backward();
    assert!(!a.grad().defined());
    assert_eq!(twos_of(&b.grad()), [3.0; 2]);
}

#[test]
fn a_failing_forward_gives_back_its_own_error_and_frees_the_state() {
    for (fault, due) in [
        (Fault::Error, Error::Libtorch("wrong on purpose".to_owned())),
        (
            Fault::Panic,
            Error::Panicked {
                pass: "forward",
                message: "panic on purpose".to_owned(),
            },
        ),
    ] {
        let (mut probe, dropped) = Probe::new();
        probe.forward = Some(fault);
        assert_eq!(apply(probe, &[&ones(true), &ones(true)]).unwrap_err(), due);
        assert_eq!(dropped.load(Ordering::SeqCst), 1);
    }
}

#[test]
fn a_failing_backward_is_an_error_of_the_call_of_backward() {
    for (fault, due) in [
        (Fault::Error, "libtorch: wrong on purpose"),
        (Fault::Panic, "backward panicked: panic on purpose"),
        (
            Fault::TooFew,
            "libtorch: backward gave 1 cotangents for 2 inputs",
        ),
    ] {
        let (mut probe, dropped) = Probe::new();
        probe.backward = Some(fault);
        let outputs = apply(probe, &[&ones(true), &ones(true)]).unwrap();
        let error = outputs[0]
            .sum(Kind::Double)
            .f_backward()
            .unwrap_err()
            .to_string();
        assert!(error.contains(due), "{error}");
        drop(outputs);
        assert_eq!(dropped.load(Ordering::SeqCst), 1);
    }
}

#[test]
fn differentiating_twice_is_refused() {
    let (probe, dropped) = Probe::new();
    let (a, b) = (ones(true), ones(true));
    let outputs = apply(probe, &[&a, &b]).unwrap();
    let sum = outputs[0].sum(Kind::Double);
    let error = Tensor::f_run_backward(&[&sum], &[&a], true, true)
        .unwrap_err()
        .to_string();
    assert!(error.contains("cannot be differentiated twice"), "{error}");
    // And once is still possible.
    let gradient = Tensor::run_backward(&[&sum], &[&a], false, false);
    assert_eq!(twos_of(&gradient[0]), [2.0; 2]);
    drop((outputs, sum));
    assert_eq!(dropped.load(Ordering::SeqCst), 1);
}

#[test]
fn an_undefined_input_is_refused() {
    let (probe, dropped) = Probe::new();
    let error = apply(probe, &[&ones(true), &Tensor::new()]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "`inputs` has an undefined tensor at position 1; give a tensor that holds data"
    );
    assert_eq!(dropped.load(Ordering::SeqCst), 1);
}

/// Squares by recomputing in backward, as tiled computation does.
struct Recomputed {
    input: Option<Tensor>,
}

impl Function for Recomputed {
    fn forward(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        self.input = Some(inputs[0].shallow_clone());
        Ok(vec![inputs[0].f_square()?])
    }

    fn backward(&mut self, cotangents: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let input = self
            .input
            .as_ref()
            .unwrap()
            .detach()
            .set_requires_grad(true);
        let output = tch::with_grad(|| (input.square() * &cotangents[0]).sum(Kind::Double));
        Ok(Tensor::f_run_backward(&[&output], &[&input], false, false)?
            .into_iter()
            .map(Some)
            .collect())
    }
}

#[test]
fn backward_may_call_backward() {
    let a = ones(true) * 3;
    let outputs = apply(Recomputed { input: None }, &[&a]).unwrap();
    let gradient = Tensor::run_backward(&[outputs[0].sum(Kind::Double)], &[&a], false, false);
    assert_eq!(twos_of(&gradient[0]), [6.0; 2]);
}
