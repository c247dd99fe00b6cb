//! C++ that is called from here, and that throws: `exception.h` is the other
//! side. No exception unwinds into Rust.
#![allow(unsafe_code)]

use std::{
    ffi::{c_char, c_void},
    slice,
};

/// Where C++ takes the text of an exception.
pub(crate) type Fail = extern "C" fn(sink: *mut c_void, text: *const c_char, length: usize);

/// What `call` gives, or the text of the exception that it met. It hands both
/// arguments on to C++, which uses them until it returns and no longer.
pub(crate) fn caught<T>(call: impl FnOnce(*mut c_void, Fail) -> T) -> Result<T, String> {
    let mut exception: Option<String> = None;
    let given = call((&raw mut exception).cast(), take);
    match exception {
        None => Ok(given),
        Some(text) => Err(text),
    }
}

extern "C" fn take(sink: *mut c_void, text: *const c_char, length: usize) {
    // SAFETY: `sink` is the exception of `caught`, which waits for the call, and
    // `text` is alive during this one.
    let (exception, text) = unsafe {
        (
            &mut *sink.cast::<Option<String>>(),
            slice::from_raw_parts(text.cast::<u8>(), length),
        )
    };
    *exception = Some(String::from_utf8_lossy(text).into_owned());
}
