//! Tensors that go on as they are, or nearly, and whose cotangents do not: how
//! a backward is made wrong behind a right forward.

use tch::Tensor;
use ulysses::autograd::{Function, apply};

use super::rank::Staged;

type Change = Box<dyn Fn(&[Tensor]) -> ulysses::Result<Vec<Tensor>> + Send>;

struct Detour {
    forward: Change,
    backward: Change,
}

impl Function for Detour {
    fn forward(&mut self, inputs: &[Tensor]) -> ulysses::Result<Vec<Tensor>> {
        (self.forward)(inputs)
    }

    fn backward(&mut self, cotangents: &[Tensor]) -> ulysses::Result<Vec<Option<Tensor>>> {
        Ok((self.backward)(cotangents)?.into_iter().map(Some).collect())
    }
}

/// The tensors, whose cotangents go through `change`.
pub(super) fn backward<const N: usize>(
    tensors: [&Tensor; N],
    change: impl Fn(&[Tensor]) -> ulysses::Result<Vec<Tensor>> + Send + 'static,
) -> Staged<Vec<Tensor>> {
    let detour = Detour {
        // A function's output is not its input, though it has the same bits.
        forward: Box::new(|tensors| {
            let same = |tensor: &Tensor| Ok(tensor.f_mul_scalar(1.0)?);
            tensors.iter().map(same).collect()
        }),
        backward: Box::new(change),
    };
    Ok(apply(detour, &tensors)?)
}

/// The tensor, whose cotangent goes through `change`.
pub(super) fn backward_of(
    tensor: &Tensor,
    change: impl Fn(&Tensor) -> ulysses::Result<Tensor> + Send + 'static,
) -> Staged<Tensor> {
    let mut tensors = backward([tensor], move |cotangents| {
        cotangents.iter().map(&change).collect()
    })?;
    Ok(tensors.swap_remove(0))
}

/// The tensor, whose cotangent is multiplied by `factor`.
pub(super) fn scaled(tensor: &Tensor, factor: f64) -> Staged<Tensor> {
    backward_of(tensor, move |cotangent| Ok(cotangent.f_mul_scalar(factor)?))
}

/// The tensor, whose cotangent is multiplied by `factors`, which broadcast and
/// are exact in its element type or rounded to it.
pub(super) fn weighted(tensor: &Tensor, factors: &Tensor) -> Staged<Tensor> {
    let factors = factors.f_to_kind(tensor.f_kind()?)?;
    backward_of(tensor, move |cotangent| Ok(cotangent.f_mul(&factors)?))
}

/// What `change` makes of the tensor, whose cotangent goes back as it is.
pub(super) fn forward_of(
    tensor: &Tensor,
    change: impl Fn(&Tensor) -> ulysses::Result<Tensor> + Send + 'static,
) -> Staged<Tensor> {
    let detour = Detour {
        forward: Box::new(move |tensors| tensors.iter().map(&change).collect()),
        backward: Box::new(|cotangents| Ok(cotangents.iter().map(Tensor::shallow_clone).collect())),
    };
    Ok(apply(detour, &[tensor])?.swap_remove(0))
}
