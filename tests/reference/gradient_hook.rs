//! Word that the gradient of a parameter is complete.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

use std::sync::{Arc, Mutex};
use tch::{Device, Kind, Tensor};
use ulysses::{
    autograd::{HookHandle, on_gradient_ready, take_gradient},
    checkpoint,
};

fn leaf(values: &[f64]) -> Tensor {
    Tensor::from_slice(values).set_requires_grad(true)
}

fn values(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor).unwrap()
}

type Seen = Arc<Mutex<Vec<Vec<f64>>>>;

/// A hook that keeps what `.grad` is at each call.
fn watch(parameter: &Tensor) -> (HookHandle, Seen) {
    let seen = Seen::default();
    let sink = Arc::clone(&seen);
    let handle = on_gradient_ready(parameter, move |parameter| {
        sink.lock().unwrap().push(values(&parameter.grad()));
    });
    (handle.unwrap(), seen)
}

#[test]
fn it_comes_once_with_the_whole_gradient_of_all_uses() {
    let x = leaf(&[1.0, 2.0]);
    let (_handle, seen) = watch(&x);
    // Used thrice: directly, in a sum, and behind a checkpoint.
    let kept = checkpoint(|inputs| Ok(vec![&inputs[0] * 5.0]), &[&x]).unwrap();
    (&x * 2.0 + (&x + 1.0) * 3.0 + &kept[0])
        .sum(Kind::Double)
        .backward();
    assert_eq!(*seen.lock().unwrap(), [[10.0, 10.0]]);
}

#[test]
fn every_backward_calls_once_with_what_has_been_added_up() {
    let x = leaf(&[1.0]);
    let (_handle, seen) = watch(&x);
    for _ in 0..3 {
        (&x * 2.0).sum(Kind::Double).backward();
    }
    assert_eq!(*seen.lock().unwrap(), [[2.0], [4.0], [6.0]]);
}

#[test]
fn nobody_is_called_for_what_no_gradient_reaches() {
    let (x, y) = (leaf(&[1.0]), leaf(&[2.0]));
    let (_handle, seen) = watch(&x);
    (&y * 2.0).sum(Kind::Double).backward();
    // Asked for by inputs, it goes to no `.grad`.
    let asked = Tensor::run_backward(&[(&x * 3.0).sum(Kind::Double)], &[&x], false, false);
    assert_eq!(values(&asked[0]), [3.0]);
    assert!(seen.lock().unwrap().is_empty());
}

#[test]
fn a_handle_that_is_dropped_removes_its_hook_and_no_other() {
    let x = leaf(&[1.0]);
    let held = Arc::new(());
    let (first, first_seen) = watch(&x);
    let inner = Arc::clone(&held);
    let second = on_gradient_ready(&x, move |_| drop(Arc::clone(&inner))).unwrap();
    let (_third, third_seen) = watch(&x);
    drop(first);
    assert_eq!(Arc::strong_count(&held), 2);
    drop(second);
    assert_eq!(Arc::strong_count(&held), 1);
    (&x * 2.0).sum(Kind::Double).backward();
    assert!(first_seen.lock().unwrap().is_empty());
    assert_eq!(*third_seen.lock().unwrap(), [[2.0]]);
}

#[test]
fn a_hook_may_remove_itself() {
    let x = leaf(&[1.0]);
    let place: Arc<Mutex<Option<HookHandle>>> = Arc::default();
    let calls = Arc::new(Mutex::new(0));
    let (own, counter) = (Arc::clone(&place), Arc::clone(&calls));
    let handle = on_gradient_ready(&x, move |_| {
        *counter.lock().unwrap() += 1;
        drop(own.lock().unwrap().take());
    });
    *place.lock().unwrap() = Some(handle.unwrap());
    for _ in 0..2 {
        (&x * 2.0).sum(Kind::Double).backward();
    }
    assert_eq!(*calls.lock().unwrap(), 1);
}

#[test]
fn hooks_of_one_parameter_run_in_the_order_in_which_they_came() {
    let x = leaf(&[1.0]);
    let order: Arc<Mutex<Vec<usize>>> = Arc::default();
    let handles: Vec<_> = (0..3)
        .map(|number| {
            let order = Arc::clone(&order);
            on_gradient_ready(&x, move |_| order.lock().unwrap().push(number)).unwrap()
        })
        .collect();
    (&x * 2.0).sum(Kind::Double).backward();
    assert_eq!(*order.lock().unwrap(), [0, 1, 2]);
    drop(handles);
}

#[test]
fn a_hook_can_take_the_gradient_away() {
    let (x, y) = (leaf(&[1.0]), leaf(&[2.0]));
    let taken: Arc<Mutex<Vec<Vec<f64>>>> = Arc::default();
    let sink = Arc::clone(&taken);
    let _handle = on_gradient_ready(&x, move |parameter| {
        let gradient = take_gradient(parameter).unwrap().unwrap();
        sink.lock().unwrap().push(values(&gradient));
    })
    .unwrap();
    for _ in 0..2 {
        (&x * &y).sum(Kind::Double).backward();
        assert!(!x.grad().defined());
    }
    // Each gradient is that of one backward; where nobody takes, they add up.
    assert_eq!(*taken.lock().unwrap(), [[2.0], [2.0]]);
    assert_eq!(values(&y.grad()), [2.0]);
    assert!(take_gradient(&x).unwrap().is_none());
}

#[test]
fn a_panic_becomes_the_error_of_backward() {
    let x = leaf(&[1.0]);
    let handle = on_gradient_ready(&x, |_| panic!("panic on purpose")).unwrap();
    let error = (&x * 2.0).sum(Kind::Double).f_backward().unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("a gradient hook panicked: panic on purpose"),
        "{text}"
    );
    drop(handle);
    let (_handle, seen) = watch(&x);
    (&x * 2.0).sum(Kind::Double).backward();
    // That of the first backward was added before its hook ran.
    assert_eq!(*seen.lock().unwrap(), [[4.0]]);
}

#[test]
fn what_is_no_leaf_with_a_gradient_is_refused() {
    let said = |tensor: &Tensor| on_gradient_ready(tensor, |_| ()).err().unwrap().to_string();
    let no_leaf = "`parameter` is no leaf of a graph; give a tensor that no operation has made";
    assert_eq!(said(&(leaf(&[1.0]) * 2.0)), no_leaf);
    assert_eq!(said(&Tensor::new()), no_leaf);
    assert_eq!(
        said(&Tensor::zeros([1], (Kind::Float, Device::Cpu))),
        "`parameter` requires no gradient; leave out the parameters that are frozen"
    );
    assert_eq!(
        take_gradient(&Tensor::new()).unwrap_err().to_string(),
        no_leaf
    );
}
