//! The border between Rust and `gradient.cpp`, by the rules of `ffi`.
#![allow(unsafe_code)]

use super::ffi::guarded;
use crate::{
    error::{Error, Result},
    exception::{Fail, caught},
};
use std::{
    ffi::c_void,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Mutex, TryLockError},
};
use tch::Tensor;
use torch_sys::C_tensor;

/// A `std::string`; only ever behind a pointer.
#[repr(C)]
struct Text {
    _private: [u8; 0],
}

type Call = extern "C" fn(*mut c_void, *mut C_tensor, *mut Text) -> bool;
type Release = extern "C" fn(*mut c_void);

unsafe extern "C" {
    fn ulysses_hook_failure(failure: *mut Text, text: *const u8, length: usize);
    fn ulysses_hook_add(
        parameter: *const C_tensor,
        rust: *mut c_void,
        call: Call,
        release: Release,
        sink: *mut c_void,
        fail: Fail,
    ) -> u64;
    fn ulysses_hook_remove(parameter: *const C_tensor, id: u64, sink: *mut c_void, fail: Fail);
    fn ulysses_gradient_take(
        parameter: *const C_tensor,
        sink: *mut c_void,
        fail: Fail,
    ) -> *mut C_tensor;
}

pub(super) type Ready = Box<dyn FnMut(&Tensor) + Send>;

/// What C++ owns for one hook. Backwards of several threads may come at once.
struct State {
    ready: Mutex<Ready>,
}

pub(super) fn add(parameter: &Tensor, ready: Ready) -> Result<u64> {
    let state = Box::new(State {
        ready: Mutex::new(ready),
    });
    // SAFETY: the callee owns `state` from here on and calls `release` on it
    // exactly once.
    caught(|sink, fail| unsafe {
        let state = Box::into_raw(state).cast();
        ulysses_hook_add(parameter.as_ptr(), state, call, release, sink, fail)
    })
    .map_err(Error::Libtorch)
}

pub(super) fn remove(parameter: &Tensor, id: u64) {
    // Called by a destructor, which has nobody to tell of a failure.
    // SAFETY: the parameter is alive.
    let _ = caught(|sink, fail| unsafe {
        ulysses_hook_remove(parameter.as_ptr(), id, sink, fail);
    });
}

pub(super) fn take(parameter: &Tensor) -> Result<Option<Tensor>> {
    // SAFETY: the handle that comes back is null or new and ours to free.
    caught(|sink, fail| unsafe {
        let taken = ulysses_gradient_take(parameter.as_ptr(), sink, fail);
        (!taken.is_null()).then(|| Tensor::from_ptr(taken))
    })
    .map_err(Error::Libtorch)
}

extern "C" fn call(state: *mut c_void, parameter: *mut C_tensor, failure: *mut Text) -> bool {
    // SAFETY: C++ passes back the state that `add` gave it, which lives while a
    // call runs, and a handle that is new and ours to free.
    let (state, parameter) = unsafe { (&*state.cast::<State>(), Tensor::from_ptr(parameter)) };
    let result = guarded("a gradient hook", || {
        let mut ready = match state.ready.try_lock() {
            Ok(ready) => ready,
            // After a panic the hook is as good as it left itself.
            Err(TryLockError::Poisoned(ready)) => ready.into_inner(),
            Err(TryLockError::WouldBlock) => {
                let text = "the gradient hook of a parameter is running already";
                return Err(Error::Libtorch(text.to_owned()));
            }
        };
        ready(&parameter);
        Ok(())
    });
    match result {
        Ok(()) => true,
        Err(error) => {
            let text = error.to_string();
            // SAFETY: C++ copies `length` bytes before it returns.
            unsafe { ulysses_hook_failure(failure, text.as_ptr(), text.len()) }
            false
        }
    }
}

extern "C" fn release(state: *mut c_void) {
    // SAFETY: `add` made this pointer from a box of this very type, and C++
    // calls this once, from the destructor of its last owner.
    let state = unsafe { Box::from_raw(state.cast::<State>()) };
    // A destructor has nobody to report to; a panic must not reach C++.
    let _ = catch_unwind(AssertUnwindSafe(|| drop(state)));
}
