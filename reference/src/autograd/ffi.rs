//! The border between Rust and `function.cpp`: raw calls, and nothing that
//! decides anything.
//!
//! Rust errors and panics leave through [`ulysses_answer_failure`], C++
//! exceptions arrive through [`caught`]; neither unwinds across.
#![allow(unsafe_code)]

use super::Function;
use crate::{
    error::{Error, Result},
    exception::{Fail, caught},
};
use std::{
    any::Any,
    ffi::c_void,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, PoisonError},
};
use tch::Tensor;
use torch_sys::C_tensor;

/// The C++ struct that one call into Rust fills; only ever behind a pointer.
#[repr(C)]
struct Answer {
    _private: [u8; 0],
}

type Pass = extern "C" fn(*mut c_void, *const *mut C_tensor, usize, *mut Answer) -> bool;

unsafe extern "C" {
    fn ulysses_answer_tensor(answer: *mut Answer, tensor: *const C_tensor);
    fn ulysses_answer_failure(answer: *mut Answer, text: *const u8, length: usize);
    fn ulysses_grad_enabled() -> bool;
    fn ulysses_autograd_apply(
        rust: *mut c_void,
        forward: Pass,
        backward: Pass,
        release: extern "C" fn(*mut c_void),
        inputs: *const *const C_tensor,
        count: usize,
        outputs: *mut c_void,
        output: extern "C" fn(*mut c_void, *mut C_tensor),
        sink: *mut c_void,
        fail: Fail,
    );
}

/// What the graph owns for one call of [`apply`].
struct State<F> {
    function: F,
    inputs: usize,
    /// The error of forward with its type, which an exception's text loses.
    failure: Arc<Mutex<Option<Error>>>,
}

pub(super) fn grad_enabled() -> bool {
    // SAFETY: reads one thread-local flag.
    unsafe { ulysses_grad_enabled() }
}

pub(super) fn apply<F: Function>(function: F, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
    let failure = Arc::new(Mutex::new(None));
    let state = Box::new(State {
        function,
        inputs: inputs.len(),
        failure: Arc::clone(&failure),
    });
    let handles: Vec<*const C_tensor> = inputs.iter().map(|input| input.as_ptr()).collect();
    let mut outputs: Vec<Tensor> = Vec::new();
    // SAFETY: the callee owns `state` from here on and calls `release::<F>` on
    // it exactly once; the passes are those of the same `F`. `handles` and
    // `outputs` outlive the call, and the callee keeps neither.
    let applied = caught(|sink, fail| unsafe {
        ulysses_autograd_apply(
            Box::into_raw(state).cast(),
            forward::<F>,
            backward::<F>,
            release::<F>,
            handles.as_ptr(),
            handles.len(),
            (&raw mut outputs).cast(),
            take_output,
            sink,
            fail,
        );
    });
    match applied {
        Ok(()) => Ok(outputs),
        Err(exception) => {
            let kept = failure
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            Err(kept.unwrap_or(Error::Libtorch(exception)))
        }
    }
}

extern "C" fn forward<F: Function>(
    state: *mut c_void,
    inputs: *const *mut C_tensor,
    count: usize,
    answer: *mut Answer,
) -> bool {
    // SAFETY: C++ passes back the state that `apply` gave it, and torch holds
    // the node's lock, or the only reference, while a pass runs.
    let state = unsafe { &mut *state.cast::<State<F>>() };
    let inputs = own(inputs, count);
    let result = guarded("forward", || {
        let outputs = state.function.forward(&inputs)?;
        match outputs.iter().position(|output| !output.defined()) {
            None => Ok(outputs.into_iter().map(Some).collect()),
            Some(i) => Err(Error::Libtorch(format!(
                "forward gave no tensor as output {i}"
            ))),
        }
    });
    if let Err(error) = &result {
        *state.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.clone());
    }
    reply(answer, result)
}

extern "C" fn backward<F: Function>(
    state: *mut c_void,
    cotangents: *const *mut C_tensor,
    count: usize,
    answer: *mut Answer,
) -> bool {
    // SAFETY: as in `forward`.
    let state = unsafe { &mut *state.cast::<State<F>>() };
    let cotangents = own(cotangents, count);
    let result = guarded("backward", || {
        let gradients = state.function.backward(&cotangents)?;
        if gradients.len() != state.inputs {
            return Err(Error::Libtorch(format!(
                "backward gave {} cotangents for {} inputs",
                gradients.len(),
                state.inputs
            )));
        }
        Ok(gradients)
    });
    reply(answer, result)
}

extern "C" fn release<F: Function>(state: *mut c_void) {
    // SAFETY: `apply` made this pointer from a box of this very type, and C++
    // calls this once, from the destructor of its only owner.
    let state = unsafe { Box::from_raw(state.cast::<State<F>>()) };
    // A destructor has nobody to report to; a panic must not reach C++.
    let _ = catch_unwind(AssertUnwindSafe(|| drop(state)));
}

extern "C" fn take_output(outputs: *mut c_void, tensor: *mut C_tensor) {
    // SAFETY: `outputs` are those of `apply`, alive until it returns, and the
    // handle is new and ours to free.
    unsafe { (*outputs.cast::<Vec<Tensor>>()).push(Tensor::from_ptr(tensor)) }
}

/// The tensors behind `count` handles, each new and ours to free.
fn own(handles: *const *mut C_tensor, count: usize) -> Vec<Tensor> {
    // SAFETY: C++ passes an array of `count` handles, each from its own `new`;
    // for a count of zero the pointer may be null, hence no slice.
    (0..count)
        .map(|i| unsafe { Tensor::from_ptr(*handles.add(i)) })
        .collect()
}

pub(super) fn guarded<T>(pass: &'static str, body: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| {
        Err(Error::Panicked {
            pass,
            message: text_of(&*payload),
        })
    })
}

/// What a panic said: a string in practice.
fn text_of(payload: &(dyn Any + Send)) -> String {
    let literal = payload
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned());
    let formatted = || payload.downcast_ref::<String>().cloned();
    literal
        .or_else(formatted)
        .unwrap_or_else(|| "no message".to_owned())
}

/// Hands the outcome of one pass to C++; false asks it to throw.
fn reply(answer: *mut Answer, result: Result<Vec<Option<Tensor>>>) -> bool {
    match result {
        Ok(tensors) => {
            for tensor in tensors {
                let tensor = tensor.unwrap_or_else(Tensor::new);
                // SAFETY: C++ copies the handle; ours is freed here.
                unsafe { ulysses_answer_tensor(answer, tensor.as_ptr()) }
            }
            true
        }
        Err(error) => {
            let text = error.to_string();
            // SAFETY: C++ copies `length` bytes before it returns.
            unsafe { ulysses_answer_failure(answer, text.as_ptr(), text.len()) }
            false
        }
    }
}
