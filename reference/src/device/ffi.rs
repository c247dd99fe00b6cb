//! The border between Rust and `device.cpp`: raw calls, and nothing that
//! decides anything.
#![allow(unsafe_code)]

use crate::exception::{Fail, caught};
use std::{ffi::c_void, ptr};
use tch::{TchError, Tensor};
use torch_sys::C_tensor;

unsafe extern "C" {
    fn ulysses_device_set_current(index: i32, sink: *mut c_void, fail: Fail);
    fn ulysses_device_synchronize(index: i32, sink: *mut c_void, fail: Fail);
    fn ulysses_device_stream(index: i32, handle: *mut *mut c_void, sink: *mut c_void, fail: Fail);
    fn ulysses_event_record(index: i32, event: *mut *mut c_void, sink: *mut c_void, fail: Fail);
    fn ulysses_event_query(event: *const c_void, reached: *mut bool, sink: *mut c_void, fail: Fail);
    fn ulysses_event_synchronize(event: *const c_void, sink: *mut c_void, fail: Fail);
    fn ulysses_event_milliseconds(
        from: *const c_void,
        to: *const c_void,
        milliseconds: *mut f64,
        sink: *mut c_void,
        fail: Fail,
    );
    fn ulysses_event_free(event: *mut c_void);
    fn ulysses_device_memory(
        index: i32,
        free: *mut u64,
        total: *mut u64,
        sink: *mut c_void,
        fail: Fail,
    );
    fn ulysses_pinned(
        like: *const C_tensor,
        tensor: *mut *mut C_tensor,
        sink: *mut c_void,
        fail: Fail,
    );
    fn ulysses_keep_backward_on_this_thread();
    fn ulysses_attention_switches() -> u8;
    fn ulysses_set_attention_switches(switches: u8);
}

fn checked(call: impl FnOnce(*mut c_void, Fail)) -> Result<(), TchError> {
    caught(call).map_err(TchError::Torch)
}

pub(super) fn set_current(index: i32) -> Result<(), TchError> {
    // SAFETY: plain numbers, and the sink of `checked`.
    checked(|sink, fail| unsafe { ulysses_device_set_current(index, sink, fail) })
}

pub(super) fn synchronize(index: i32) -> Result<(), TchError> {
    // SAFETY: as above.
    checked(|sink, fail| unsafe { ulysses_device_synchronize(index, sink, fail) })
}

/// The handle of the stream on which torch puts the work of this thread.
pub(super) fn stream(index: i32) -> Result<*mut c_void, TchError> {
    let mut handle = ptr::null_mut();
    // SAFETY: `handle` is a place for a pointer.
    checked(|sink, fail| unsafe { ulysses_device_stream(index, &raw mut handle, sink, fail) })?;
    Ok(handle)
}

/// Free and total bytes.
pub(super) fn memory(index: i32) -> Result<(u64, u64), TchError> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: two places for numbers.
    checked(|sink, fail| unsafe {
        ulysses_device_memory(index, &raw mut free, &raw mut total, sink, fail)
    })?;
    Ok((free, total))
}

pub(super) fn pinned(like: &Tensor) -> Result<Tensor, TchError> {
    let mut tensor = ptr::null_mut();
    // SAFETY: `like` is alive, and `tensor` a place for a pointer.
    checked(|sink, fail| unsafe { ulysses_pinned(like.as_ptr(), &raw mut tensor, sink, fail) })?;
    // SAFETY: the handle is new and ours to free.
    Ok(unsafe { Tensor::from_ptr(tensor) })
}

pub(super) fn keep_backward_on_this_thread() {
    // SAFETY: sets one thread-local flag.
    unsafe { ulysses_keep_backward_on_this_thread() }
}

pub(super) fn attention_switches() -> u8 {
    // SAFETY: reads four flags.
    unsafe { ulysses_attention_switches() }
}

pub(super) fn set_attention_switches(switches: u8) {
    // SAFETY: sets four flags.
    unsafe { ulysses_set_attention_switches(switches) }
}

/// An event of c10, recorded when it was made.
pub(super) struct Event(*mut c_void);

// SAFETY: an event may be asked from any thread; nothing here changes it.
unsafe impl Send for Event {}

impl Event {
    pub(super) fn record(index: i32) -> Result<Event, TchError> {
        let mut event = ptr::null_mut();
        // SAFETY: a place for a pointer.
        checked(|sink, fail| unsafe { ulysses_event_record(index, &raw mut event, sink, fail) })?;
        Ok(Event(event))
    }

    pub(super) fn query(&self) -> Result<bool, TchError> {
        let mut reached = false;
        // SAFETY: the event is alive, and `reached` a place for a flag.
        checked(|sink, fail| unsafe { ulysses_event_query(self.0, &raw mut reached, sink, fail) })?;
        Ok(reached)
    }

    pub(super) fn synchronize(&self) -> Result<(), TchError> {
        // SAFETY: the event is alive.
        checked(|sink, fail| unsafe { ulysses_event_synchronize(self.0, sink, fail) })
    }

    pub(super) fn milliseconds_until(&self, later: &Event) -> Result<f64, TchError> {
        let mut milliseconds = 0.0;
        // SAFETY: both events are alive.
        checked(|sink, fail| unsafe {
            ulysses_event_milliseconds(self.0, later.0, &raw mut milliseconds, sink, fail)
        })?;
        Ok(milliseconds)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `record`, and freed once.
        unsafe { ulysses_event_free(self.0) }
    }
}
