//! The gradient of a parameter: word that it is complete, and taking it away.
//!
//! Backward adds what reaches a leaf from all its uses, and then adds that to
//! `.grad`. Who has something to do with whole gradients, such as an optimizer
//! that keeps only a part of each, does it then and need not wait for the end
//! of backward.
//!
//! Not here: gradients of tensors that are no leaves.

use super::gradient_ffi;
use crate::error::{Result, refuse};
use tch::Tensor;

/// Calls `ready` with the parameter in each backward that reaches it, once, when
/// the whole gradient of that backward is in `.grad`.
///
/// It runs on the thread of that backward, with gradients switched off, and
/// until the handle is dropped. Several hooks of a parameter run in the order
/// in which they came. A panic in one ends backward with an error. Derivatives
/// that are asked for by inputs (`run_backward`) go to no `.grad`, and nobody is
/// called.
///
/// `ready` must not run a backward that reaches the same parameter: torch would
/// wait for itself.
///
/// # Errors
/// Refused for anything but a leaf that requires a gradient.
pub fn on_gradient_ready(
    parameter: &Tensor,
    ready: impl FnMut(&Tensor) + Send + 'static,
) -> Result<HookHandle> {
    expect_leaf(parameter)?;
    if !parameter.requires_grad() {
        return refuse(
            "parameter",
            "requires no gradient",
            "leave out the parameters that are frozen",
        );
    }
    Ok(HookHandle {
        id: gradient_ffi::add(parameter, Box::new(ready))?,
        parameter: parameter.shallow_clone(),
    })
}

/// Keeps a hook of [`on_gradient_ready`]; dropping it removes the hook.
#[must_use = "the hook is removed when this is dropped"]
pub struct HookHandle {
    parameter: Tensor,
    id: u64,
}

impl Drop for HookHandle {
    fn drop(&mut self) {
        gradient_ffi::remove(&self.parameter, self.id);
    }
}

/// Takes `.grad` from a parameter, which has none then: `None` if it had none.
///
/// # Errors
/// Refused for anything but a leaf.
pub fn take_gradient(parameter: &Tensor) -> Result<Option<Tensor>> {
    expect_leaf(parameter)?;
    gradient_ffi::take(parameter)
}

fn expect_leaf(parameter: &Tensor) -> Result<()> {
    if parameter.defined() && parameter.f_is_leaf()? {
        return Ok(());
    }
    refuse(
        "parameter",
        "is no leaf of a graph",
        "give a tensor that no operation has made",
    )
}
