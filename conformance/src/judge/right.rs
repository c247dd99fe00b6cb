//! The right answer to a question and how far an answer may be off, as files
//! keep them.

use fixtures::exchange::{AnswerStatus, Declared, Tensors};
use fixtures::{Array, Dtype};

use super::{Yardstick, assembly, recover_dropout};
use crate::oracle::AnswerTensor;
use crate::runner::Asked;

/// The right answer over the whole sequence, in float64, and under `NAME.may_be_off`
/// how far each of its numbers may be off. None where there is none: a refusal
/// is due, or which weights are dropped does not show in the answer.
pub fn right_answer(asked: &Asked, declared: Declared) -> Option<Tensors> {
    let (case, inputs) = (&asked.question, &asked.inputs);
    if case.extras.defect.is_some() {
        return None;
    }
    let ranks: Vec<&Tensors> = asked
        .answers
        .iter()
        .filter_map(|answer| answer.as_ref().ok())
        .filter(|(info, _)| info.status == AnswerStatus::Ok)
        .map(|(_, tensors)| tensors)
        .collect();
    let wholes = match ranks.len() == case.world {
        true => assembly::whole_answers(case, &ranks).unwrap_or_default(),
        false => Vec::new(),
    };
    if case.extras.dropout.is_some() && wholes.is_empty() {
        return None;
    }
    let dropout = recover_dropout(case, inputs, &wholes).ok()?;
    let yardstick = Yardstick::of(case, inputs, declared.precision, dropout.as_deref()).ok()?;
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
