//! What other suites would have said: the acceptance rules that they publish,
//! applied to the answers that this one judges.
//!
//! A rule is its tolerances, the tensors that they are applied to, and the
//! element types for which its suite asserts anything; where it asserts
//! nothing, it is silent. The inputs are ours, for every rule, so that a table
//! compares rules and not inputs: what a suite's own inputs hide on top, such as
//! a cotangent of ones, is not held against it here. Suites compare with a run
//! of theirs without parallelism, in the same element type: dense attention
//! stands for it.
//!
//! A suite that compares a model's loss and the gradient of a projection's
//! weight is mapped to attention in its favour: the loss is a number made of the
//! whole output, and the gradient is that of Q, token by token, where the
//! suite sees a sum over tokens.
//!
//! Deliberately not here: any line of theirs, for the rules are written down anew
//! from what they assert; and tests of an exchange without attention, such as
//! DeepSpeed's `TestUlyssesAll2All_odd`, which an answer of attention does not
//! show. Its neighbour `TestUlyssesAll2All` is here, since it accepts any.

mod rules;
mod tally;

use fixtures::{Array, AttentionCase, Inputs};

use crate::oracle::Answer;

pub use self::rules::RIVALS;
pub use self::tally::Tally;

/// Somebody else's acceptance rule.
#[derive(Clone, Copy, Debug)]
pub struct Rival {
    /// What to call it in a table.
    pub name: &'static str,
    /// Where it stands: repository, version, file, lines.
    pub source: &'static str,
    /// What it says of an answer.
    pub judges: fn(&Shown<'_>) -> Ruling,
}

/// What a rule says of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ruling {
    /// The suite's test would have passed.
    Accepts,
    /// The suite's test would have failed.
    Refuses,
    /// The suite has no test for this element type.
    Silent,
}

impl Ruling {
    fn accepts_if(accepts: bool) -> Ruling {
        if accepts {
            Ruling::Accepts
        } else {
            Ruling::Refuses
        }
    }
}

/// An answer, and what a rule compares it with. All tensors are over the whole
/// sequence; at padding tokens `out` is the same in each.
#[derive(Clone, Copy, Debug)]
pub struct Shown<'a> {
    /// What was asked.
    pub case: &'a AttentionCase,
    /// With which tensors.
    pub inputs: &'a Inputs,
    /// The right answer, in float64.
    pub right: &'a Answer<Vec<f64>>,
    /// Dense attention in the case's element type by the fused kernel, where it
    /// can answer the case: what an honest implementation may equal bit by bit.
    pub dense: Option<&'a Answer<Vec<f64>>>,
    /// What was answered.
    pub answer: &'a Answer<Vec<f64>>,
}

/// The four tensors of an answer, in the order of
/// [`AnswerTensor::ALWAYS`](crate::oracle::AnswerTensor::ALWAYS).
type Four = [Vec<f64>; 4];

impl Shown<'_> {
    fn answered(&self) -> Four {
        four(self.answer)
    }

    /// What a suite's own run without parallelism gives: dense attention in the
    /// element type, or the right answer rounded to it.
    fn baseline(&self) -> Four {
        self.dense.map_or_else(|| self.rounded(), four)
    }

    /// The right answer rounded to the element type.
    fn rounded(&self) -> Four {
        four(self.right)
            .map(|right| Array::from_f64(self.case.dtype, &[right.len()], &right).to_f64())
    }
}

fn four(answer: &Answer<Vec<f64>>) -> Four {
    [&answer.out, &answer.dq, &answer.dk, &answer.dv].map(Clone::clone)
}
