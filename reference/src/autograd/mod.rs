//! Custom autograd functions: operations whose forward and backward are
//! written in Rust.
//!
//! tch has no binding for `torch::autograd::Function`, so one small C++ file
//! beside this module makes the node of the graph, `ffi` crosses the border,
//! and this file is the safe face of both. Ulysses needs it because no
//! operation of torch knows that the adjoint of an exchange is the opposite
//! exchange.
//!
//! [`checkpoint`] is built on it: a function that runs again in backward.
//! [`on_gradient_ready`] tells when the gradient of a parameter is complete,
//! which tch does not bind either.
//!
//! Not here: anything about ranks. A [`Function`] may communicate or not.
//! Second derivatives are refused, because a backward written in Rust records
//! no graph of its own.

mod checkpoint;
mod ffi;
mod gradient;
mod gradient_ffi;

pub use checkpoint::checkpoint;
pub(crate) use checkpoint::{Kept, pull_back};
pub use gradient::{HookHandle, on_gradient_ready, take_gradient};

use crate::error::{Result, refuse};
use tch::Tensor;

/// An operation that brings its own derivative.
///
/// The value is kept by the graph of the outputs, and dropped once, with that
/// graph (or at the end of [`apply`], when no gradient can be asked for). What
/// backward needs is kept in `self` by [`Function::forward`]. Keep inputs and
/// plain data there, never outputs: an output holds the graph, the graph holds
/// `self`, and neither would be freed.
pub trait Function: Send + 'static {
    /// The outputs, from the inputs that [`apply`] was given.
    ///
    /// Runs with gradients switched off: nothing done here is recorded.
    ///
    /// # Errors
    /// Whatever went wrong; [`apply`] returns it as it is. A panic becomes
    /// [`Error::Panicked`](crate::Error::Panicked).
    fn forward(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>>;

    /// The cotangent of each input, in order, from one cotangent for each
    /// output; `None` is zero.
    ///
    /// The cotangent of an output that nobody used is zeros of its shape. Runs
    /// with gradients switched off, and again for each backward through a
    /// graph that was retained.
    ///
    /// # Errors
    /// Whatever went wrong; `backward()` of the tensor then fails with a
    /// [`tch::TchError`] that holds the text of the error. So does a panic.
    fn backward(&mut self, cotangents: &[Tensor]) -> Result<Vec<Option<Tensor>>>;
}

/// Runs `function` on `inputs` and records it in the graph.
///
/// Every output requires a gradient if any input does and gradients are
/// enabled.
///
/// # Errors
/// The error of [`Function::forward`], a refusal of an undefined input, or an
/// error of libtorch.
pub fn apply(function: impl Function, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
    if let Some(position) = inputs.iter().position(|input| !input.defined()) {
        return refuse(
            "inputs",
            format!("has an undefined tensor at position {position}"),
            "give a tensor that holds data",
        );
    }
    ffi::apply(function, inputs)
}

/// Whether operations on this thread are being recorded for backward.
pub fn grad_enabled() -> bool {
    ffi::grad_enabled()
}
