//! The right answer to a question and how far an answer may be off, as files
//! and other suites' rules want them.

use fixtures::exchange::{AnswerStatus, Declared, Tensors};
use fixtures::{Array, AttentionCase, Dtype, Inputs};
use tch::TchError;

use super::assembly::Whole;
use super::attention::recover_dropout;
use super::padding::PaddingTokens;
use super::{Yardstick, assembly, dense, system};
use crate::implementation::{Means, RankAnswer};
use crate::oracle::{Answer, AnswerTensor};
use crate::runner::Asked;

/// The right answer over the whole sequence, in float64, and under `NAME.may_be_off`
/// how far each of its numbers may be off. None where there is none: a refusal
/// is due, or which weights are dropped does not show in the answer.
pub fn right_answer(asked: &Asked, declared: Declared) -> Option<Tensors> {
    let Some((case, inputs)) = asked.question.attention() else {
        return system::right_answer(asked.question.case(), declared);
    };
    if case.extras.defect.is_some() {
        return None;
    }
    let wholes = wholes(case, &asked.answers);
    if case.extras.dropout.is_some() && wholes.is_empty() {
        return None;
    }
    let dropout = recover_dropout(case, inputs, &wholes).ok()?;
    let by = (declared.precision, asked.question.means());
    let yardstick = Yardstick::of(case, inputs, by, dropout.as_deref()).ok()?;
    let mut tensors = Tensors::new();
    for name in AnswerTensor::ALL {
        let Some(ruler) = yardstick.ruler(name) else {
            continue;
        };
        let tolerances: Vec<f64> = (0..ruler.right.len()).map(|i| ruler.tolerance(i)).collect();
        let array = |numbers| Array::from_f64(Dtype::F64, &name.shape(case), numbers);
        tensors.insert(name.name().to_owned(), array(&ruler.right));
        tensors.insert(format!("{}.may_be_off", name.name()), array(&tolerances));
    }
    Some(tensors)
}

/// An answer over the whole sequence, blank at padding tokens; none where not
/// every rank gave its part.
pub(crate) fn whole_answer(
    case: &AttentionCase,
    answers: &[RankAnswer],
) -> Option<Answer<Vec<f64>>> {
    let whole = wholes(case, answers).into_iter().next()?;
    blanked(case, whole.answer)
}

/// What dense SDPA answers in the case's element type on a CPU, where it answers
/// it.
pub(crate) fn dense_answer(case: &AttentionCase, inputs: &Inputs) -> Option<Answer<Vec<f64>>> {
    if !dense::is_dense_sdpa(case) {
        return None;
    }
    let numbers = |_, array: Array| Ok::<_, TchError>(array.to_f64());
    let answer = dense::attention(case, inputs, Means::default())
        .ok()?
        .try_map(numbers)
        .ok()?;
    blanked(case, answer)
}

/// An answer, blank at padding tokens.
pub(crate) fn blanked(case: &AttentionCase, answer: Answer<Vec<f64>>) -> Option<Answer<Vec<f64>>> {
    let padding = PaddingTokens::of(case);
    let blanked = |name, numbers| Ok::<_, TchError>(padding.blanked(name, numbers));
    answer.try_map(blanked).ok()
}

/// The answers over the whole sequence; none where not every rank gave its part.
fn wholes(case: &AttentionCase, answers: &[RankAnswer]) -> Vec<Whole> {
    let ranks: Vec<&Tensors> = answers
        .iter()
        .filter_map(|answer| answer.as_ref().ok())
        .filter(|(info, _)| info.status == AnswerStatus::Ok)
        .map(|(_, tensors)| tensors)
        .collect();
    match ranks.len() == case.world {
        true => assembly::whole_answers(case, &ranks).unwrap_or_default(),
        false => Vec::new(),
    }
}
