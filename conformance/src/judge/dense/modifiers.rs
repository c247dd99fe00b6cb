//! What changes scores and weights of dense attention, head by head.

use std::ops::Range;

use fixtures::{Case, Input, Inputs};
use tch::{TchError, Tensor};

use super::narrow;
use super::preparation::leaf;
use crate::oracle::visibility::Visibility;
use crate::tensor;

/// What changes scores and weights of some query heads, each
/// `[batch, query heads, tokens, ..]`, where the case has it.
pub(super) struct Modifiers {
    /// What is hidden; nothing under a full mask.
    pub(super) sight: Option<Sight>,
    /// A slope for each row, so that each has its own gradient.
    pub(super) slopes: Option<Tensor>,
    /// A sink for each row.
    pub(super) sinks: Option<Tensor>,
    pub(super) dropout: Option<Tensor>,
}

/// Which keys are seen. A softmax over nothing is not a number, and neither is
/// its derivative: a query that sees nothing is let see everything, and its
/// answer is made zero thereafter.
pub(super) struct Sight {
    /// Whether a query is let see a key.
    pub(super) open: Tensor,
    /// Whether a query sees nothing.
    pub(super) blind: Tensor,
}

impl Modifiers {
    pub(super) fn of(
        case: &Case,
        inputs: &Inputs,
        dropout: Option<&[f64]>,
    ) -> Result<Modifiers, TchError> {
        let [batch, heads, tokens, keys] = [
            case.batch,
            case.query_heads,
            case.sequence,
            case.kv_sequence(),
        ]
        .map(|n| n as i64);
        let for_each_row = |input| -> Result<Option<Tensor>, TchError> {
            let Some(array) = inputs.get(input) else {
                return Ok(None);
            };
            let by_head = tensor::from_array(array)?.f_view([1, heads, 1, 1])?;
            by_head.f_expand([batch, heads, tokens, 1], false).map(Some)
        };
        let visibility = Visibility::of(case);
        let sight = match visibility.is_full() {
            true => None,
            false => {
                let seen = visibility.of_rows(0, case.sequence)?;
                let blind = seen.f_any_dim(-1, true)?.f_logical_not()?;
                Some(Sight {
                    open: seen.f_logical_or(&blind)?,
                    blind,
                })
            }
        };
        let dropout = match dropout {
            Some(multiplier) => {
                let multiplier = Tensor::f_from_slice(multiplier)?;
                let multiplier = multiplier.f_view([batch, heads, tokens, keys])?;
                Some(multiplier.f_to_kind(tensor::kind(case.dtype))?)
            }
            None => None,
        };
        Ok(Modifiers {
            sight,
            slopes: for_each_row(Input::Slopes)?,
            sinks: for_each_row(Input::Sinks)?,
            dropout,
        })
    }

    /// Those of `heads`, slopes and sinks as leaves.
    pub(super) fn of_heads(&self, heads: &Range<usize>) -> Result<Modifiers, TchError> {
        let of_heads = |tensor: &Tensor| match tensor.size()[1] {
            1 => Ok(tensor.shallow_clone()),
            _ => narrow(tensor, heads),
        };
        let leaf_of = |tensor: &Option<Tensor>| {
            tensor
                .as_ref()
                .map(|tensor| leaf(narrow(tensor, heads)?))
                .transpose()
        };
        let sight = |sight: &Sight| {
            Ok::<_, TchError>(Sight {
                open: of_heads(&sight.open)?,
                blind: of_heads(&sight.blind)?,
            })
        };
        Ok(Modifiers {
            sight: self.sight.as_ref().map(sight).transpose()?,
            slopes: leaf_of(&self.slopes)?,
            sinks: leaf_of(&self.sinks)?,
            dropout: self.dropout.as_ref().map(of_heads).transpose()?,
        })
    }
}
