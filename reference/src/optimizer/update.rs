//! One step of an optimizer on a part of a parameter.
//!
//! Every operation is elementwise: a part of a parameter moves as it would
//! within the whole.

use crate::error::{Result, refuse};
use tch::Tensor;

/// What a gradient does to a parameter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Update {
    /// Stochastic gradient descent, as `torch.optim.SGD` without dampening.
    Sgd {
        /// How far a step goes.
        learning_rate: f64,
        /// How much of the last step is in the next; 0 for none.
        momentum: f64,
        /// How much of the weight is added to its gradient.
        weight_decay: f64,
    },
    /// Adam with decoupled weight decay, as `torch.optim.AdamW`.
    ///
    /// Source: Loshchilov and Hutter, "Decoupled Weight Decay
    /// Regularization", arXiv:1711.05101.
    AdamW {
        /// How far a step goes.
        learning_rate: f64,
        /// How slowly the means of the gradient and its square change.
        betas: (f64, f64),
        /// Added to the root of the mean square.
        epsilon: f64,
        /// The part of the weight, times the learning rate, that a step takes.
        weight_decay: f64,
    },
}

/// What is kept between steps for one part of a parameter.
#[derive(Default)]
pub(super) struct State {
    /// The weights in a wider dtype than the parameter's, if they are kept so.
    pub(super) weight: Option<Tensor>,
    /// The mean of the gradient, or what momentum makes of it.
    mean: Option<Tensor>,
    mean_square: Option<Tensor>,
    steps: i32,
}

impl State {
    pub(super) fn bytes(&self) -> usize {
        [&self.weight, &self.mean, &self.mean_square]
            .into_iter()
            .flatten()
            .map(|kept| kept.numel() * kept.kind().elt_size_in_bytes())
            .sum()
    }
}

impl Update {
    pub(super) fn learning_rate(&self) -> f64 {
        match *self {
            Update::Sgd { learning_rate, .. } | Update::AdamW { learning_rate, .. } => {
                learning_rate
            }
        }
    }

    pub(super) fn set_learning_rate(&mut self, rate: f64) {
        match self {
            Update::Sgd { learning_rate, .. } | Update::AdamW { learning_rate, .. } => {
                *learning_rate = rate;
            }
        }
    }

    /// The kind, and every number with its name.
    pub(super) fn numbers(&self) -> (i64, [(&'static str, f64); 5]) {
        match *self {
            Update::Sgd {
                learning_rate,
                momentum,
                weight_decay,
            } => (
                0,
                [
                    ("learning rate", learning_rate),
                    ("momentum", momentum),
                    ("weight decay", weight_decay),
                    ("", 0.0),
                    ("", 0.0),
                ],
            ),
            Update::AdamW {
                learning_rate,
                betas,
                epsilon,
                weight_decay,
            } => (
                1,
                [
                    ("learning rate", learning_rate),
                    ("first beta", betas.0),
                    ("second beta", betas.1),
                    ("epsilon", epsilon),
                    ("weight decay", weight_decay),
                ],
            ),
        }
    }

    /// Refuses numbers that no step can be made with.
    pub(super) fn check(&self) -> Result<()> {
        for (name, number) in self.numbers().1 {
            let below_one = matches!(name, "momentum" | "first beta" | "second beta");
            if !(number.is_finite() && number >= 0.0 && (!below_one || number < 1.0)) {
                return refuse(
                    "options",
                    format!("has {name} {number}"),
                    if below_one {
                        "give a number from 0 to below 1"
                    } else {
                        "give a finite number that is not negative"
                    },
                );
            }
        }
        Ok(())
    }

    /// Moves `weight`, in place, by `gradient` of the same size and dtype.
    pub(super) fn apply(
        &self,
        weight: &mut Tensor,
        gradient: Tensor,
        state: &mut State,
    ) -> Result<()> {
        state.steps += 1;
        match *self {
            Update::Sgd {
                learning_rate,
                momentum,
                weight_decay,
            } => {
                let mut gradient = gradient;
                if weight_decay != 0.0 {
                    gradient = gradient.f_add(&weight.f_mul_scalar(weight_decay)?)?;
                }
                let step = if momentum == 0.0 {
                    gradient
                } else {
                    let step = match state.mean.take() {
                        None => gradient.f_detach_copy()?,
                        Some(mut mean) => mean.f_mul_scalar_(momentum)?.f_add_(&gradient)?,
                    };
                    state.mean.insert(step).shallow_clone()
                };
                let _ = weight.f_sub_(&step.f_mul_scalar(learning_rate)?)?;
            }
            Update::AdamW {
                learning_rate,
                betas,
                epsilon,
                weight_decay,
            } => {
                let blend = |kept: Option<Tensor>, new: Tensor, beta: f64| -> Result<Tensor> {
                    let mut kept = match kept {
                        None => new.f_zeros_like()?,
                        Some(kept) => kept,
                    };
                    let kept = kept.f_mul_scalar_(beta)?;
                    Ok(kept
                        .shallow_clone()
                        .f_add_(&new.f_mul_scalar(1.0 - beta)?)?)
                };
                let square = gradient.f_mul(&gradient)?;
                let mean = blend(state.mean.take(), gradient, betas.0)?;
                let mean_square = blend(state.mean_square.take(), square, betas.1)?;
                let corrected = |beta: f64| 1.0 - beta.powi(state.steps);
                let root = mean_square
                    .f_sqrt()?
                    .f_div_scalar(corrected(betas.1).sqrt())?;
                let step = mean
                    .f_div(&root.f_add_scalar(epsilon)?)?
                    .f_mul_scalar(learning_rate / corrected(betas.0))?;
                let mut weight = weight.f_mul_scalar_(1.0 - learning_rate * weight_decay)?;
                let _ = weight.f_sub_(&step)?;
                state.mean = Some(mean);
                state.mean_square = Some(mean_square);
            }
        }
        Ok(())
    }
}
