//! Less memory for more work: forward leaves no graph behind, and backward
//! runs the function again to have one.
//!
//! Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost",
//! arXiv:1604.06174.

use super::{Function, apply};
use crate::error::{Result, refuse};
use tch::Tensor;

/// Runs `function` on `inputs`, and again in backward, so that between the two
/// only `inputs` are kept.
///
/// Gradients reach `inputs` alone: whatever else `function` holds is a
/// constant. Called again it must do the same, collectives included, in which
/// case every rank recomputes or none does.
///
/// # Errors
/// The error of `function`, and those of [`apply`]. `backward()` fails with the
/// text of the error when the second run does, and when an input was changed in
/// place in between.
pub fn checkpoint(
    function: impl Fn(&[Tensor]) -> Result<Vec<Tensor>> + Send + 'static,
    inputs: &[&Tensor],
) -> Result<Vec<Tensor>> {
    let inputs_kept = Kept::default();
    apply(
        Checkpoint {
            function,
            inputs_kept,
        },
        inputs,
    )
}

struct Checkpoint<F> {
    function: F,
    inputs_kept: Kept,
}

impl<F: Fn(&[Tensor]) -> Result<Vec<Tensor>> + Send + 'static> Function for Checkpoint<F> {
    fn forward(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        self.inputs_kept = Kept::new(inputs)?;
        (self.function)(inputs)
    }

    fn backward(&mut self, cotangents: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let needed = self.inputs_kept.needed();
        pull_back(
            &self.function,
            self.inputs_kept.tensors()?,
            needed,
            cotangents,
        )
    }
}

/// The inputs of a function that runs again in backward.
#[derive(Default)]
pub(crate) struct Kept {
    tensors: Vec<Tensor>,
    needed: Vec<bool>,
    versions: Vec<i64>,
}

impl Kept {
    /// Keeps the data of `inputs`, but no graph.
    pub(crate) fn new(inputs: &[Tensor]) -> Result<Self> {
        Ok(Self {
            tensors: inputs
                .iter()
                .map(Tensor::f_detach)
                .collect::<Result<_, _>>()?,
            needed: inputs.iter().map(Tensor::requires_grad).collect(),
            versions: versions(inputs)?,
        })
    }

    /// Which of the inputs need a cotangent.
    pub(crate) fn needed(&self) -> &[bool] {
        &self.needed
    }

    /// The inputs as they were.
    ///
    /// # Errors
    /// Refused when one was changed in place since; torch's own operations
    /// refuse that too.
    pub(crate) fn tensors(&self) -> Result<&[Tensor]> {
        let now = versions(&self.tensors)?;
        match (0..now.len()).find(|&i| now[i] != self.versions[i]) {
            None => Ok(&self.tensors),
            Some(i) => refuse(
                "inputs",
                format!("has a tensor at position {i} that was changed in place"),
                "run backward before changing it",
            ),
        }
    }
}

/// How often each tensor was changed in place; a detached one counts with its
/// original.
fn versions(tensors: &[Tensor]) -> Result<Vec<i64>> {
    Ok(tensors
        .iter()
        .map(Tensor::f_internal_version)
        .collect::<Result<_, _>>()?)
}

/// The cotangents of those `inputs` that are `needed`, from those of the
/// outputs of `function`, which is run for this.
///
/// `None` is zero: not needed, or without influence on any output.
pub(crate) fn pull_back(
    function: impl Fn(&[Tensor]) -> Result<Vec<Tensor>>,
    inputs: &[Tensor],
    needed: &[bool],
    cotangents: &[Tensor],
) -> Result<Vec<Option<Tensor>>> {
    let leaves: Vec<Tensor> = inputs
        .iter()
        .zip(needed)
        .map(|(input, &needed)| Ok(input.f_detach()?.f_set_requires_grad(needed)?))
        .collect::<Result<_>>()?;
    // tch starts backward from ones only, so that the cotangents go in as
    // factors: the derivative of sum(output * cotangent) by output.
    let roots = tch::with_grad(|| {
        let outputs = function(&leaves)?;
        outputs
            .iter()
            .zip(cotangents)
            .filter(|(output, _)| output.requires_grad())
            .map(|(output, cotangent)| Ok(output.f_mul(cotangent)?.f_sum(None)?))
            .collect::<Result<Vec<Tensor>>>()
    })?;
    let wanted: Vec<&Tensor> = leaves.iter().filter(|leaf| leaf.requires_grad()).collect();
    if roots.is_empty() || wanted.is_empty() {
        return Ok(needed.iter().map(|_| None).collect());
    }
    let mut found = Tensor::f_run_backward(&roots, &wanted, false, false)?.into_iter();
    Ok(needed
        .iter()
        .map(|&needed| {
            if needed {
                found.next().filter(Tensor::defined)
            } else {
                None
            }
        })
        .collect())
}
