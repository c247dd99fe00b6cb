//! A case as it is asked.

use fixtures::exchange::{self, CaseInfo, Declared, Tensors};
use fixtures::{AttentionCase, Case, Inputs};

use super::convention;
use crate::implementation::Means;

/// A case as an implementation that declares some conventions is asked it.
#[derive(Clone, Debug)]
pub struct Question {
    case: Case,
    /// Those of attention, in which the cotangent goes by the conventions.
    inputs: Option<Inputs>,
    means: Means,
}

impl Question {
    /// The case for who declares this.
    pub fn of(case: &Case, declared: Declared) -> Question {
        Question {
            inputs: case
                .attention()
                .map(|case| convention::inputs_for(case, declared)),
            case: case.clone(),
            means: Means::default(),
        }
    }

    /// The same, answered by these means, which the judge follows.
    pub fn by(self, means: Means) -> Question {
        Question { means, ..self }
    }

    /// The case with other inputs than its name says.
    pub fn with_inputs(case: AttentionCase, inputs: Inputs) -> Question {
        Question {
            case: Case::Attention(case),
            inputs: Some(inputs),
            means: Means::default(),
        }
    }

    /// What is asked.
    pub fn case(&self) -> &Case {
        &self.case
    }

    /// What is asked and with which inputs, over the whole sequence, if it is
    /// attention.
    pub fn attention(&self) -> Option<(&AttentionCase, &Inputs)> {
        Some((self.case.attention()?, self.inputs.as_ref()?))
    }

    /// By what means the answer is computed, and judged.
    pub fn means(&self) -> Means {
        self.means
    }

    /// What is posed to each rank, in rank order.
    pub fn posed(&self) -> Vec<(CaseInfo, Tensors)> {
        match self.attention() {
            Some((case, inputs)) => exchange::shards(case, inputs),
            None => exchange::posed(&self.case),
        }
    }
}
