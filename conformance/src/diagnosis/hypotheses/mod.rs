//! The mistakes that can be told by what they would have answered.
//!
//! Each is applied to the right answer, to its parts, or to the problem that
//! dense attention solves, and gives one or several whole answers: a mistake
//! can be made in several ways. The order of the table is that of
//! plausibility: where two mistakes would give the same answer, the first is
//! named. What needs a condition (a window, replicas) comes before what can be
//! done anywhere, and what is often seen before what is seldom.

mod gradients;
mod layout;
mod lengths;
mod masked;
mod moved;
mod parts;
mod permutation;
mod scored;
mod shared;

use fixtures::AttentionCase;
use tch::TchError;

use super::evidence::Evidence;
use super::mistake::Mistake;
use super::prediction::Prediction;

/// A mistake, and what it would have answered.
pub(super) struct Hypothesis {
    /// None where it has no name, and is told in a sentence alone.
    pub(super) mistake: Option<Mistake>,
    pub(super) reach: Reach,
    /// Whether it can be made in this case, and shows.
    pub(super) applies: fn(&AttentionCase) -> bool,
    pub(super) predict: fn(&Evidence<'_>) -> Result<Vec<Prediction>, TchError>,
}

/// What a mistake makes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reach {
    /// The output, and with it the gradients.
    Forward,
    /// Gradients alone.
    Backward,
}

/// Every hypothesis, the most plausible first.
pub(super) fn all() -> impl Iterator<Item = &'static Hypothesis> {
    [
        layout::HYPOTHESES,
        scored::HYPOTHESES,
        masked::HYPOTHESES,
        lengths::HYPOTHESES,
        shared::HYPOTHESES,
        parts::HYPOTHESES,
        gradients::HYPOTHESES,
        moved::HYPOTHESES,
        masked::UNNAMED,
        scored::UNNAMED,
    ]
    .into_iter()
    .flatten()
}
