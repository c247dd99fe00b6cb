//! By what gradients are scaled, as an implementation declares it.
//!
//! Two conventions are in use, and both are right: the ranks' losses are summed
//! or averaged, and so are the gradients of parameters that every rank has.
//! Whoever averages multiplies by P elsewhere. Token gradients are always due
//! for the cotangent that was handed over.

use fixtures::exchange::{Declared, Parameters, Upstream};
use fixtures::{Array, AttentionCase, Inputs};

use crate::diagnosis::{Diagnosis, Mistake};
use crate::oracle::Answer;

/// The inputs of `case` for an implementation that declares this: the cotangent
/// of the output is multiplied by P if it wants that, and rounded.
pub(super) fn inputs_for(case: &AttentionCase, declared: Declared) -> Inputs {
    let mut inputs = Inputs::of(case);
    if declared.upstream == Upstream::TimesRanks {
        let dout = &inputs.dout;
        let values: Vec<f64> = dout.to_f64().iter().map(|x| x * ranks(case)).collect();
        inputs.dout = Array::from_f64(dout.dtype, &dout.shape, &values);
    }
    inputs
}

/// Turns the sums of the ranks' parts of the gradients of head state into
/// gradients for the cotangent that was handed over.
pub(super) fn reduce(case: &AttentionCase, declared: Declared, answer: &mut Answer<Vec<f64>>) {
    let factor = averaged_over(declared, ranks(case));
    for (_, gradient) in &mut answer.head_state {
        gradient.iter_mut().for_each(|x| *x /= factor);
    }
}

/// By what the sum of the ranks' parts of a parameter's gradient is divided,
/// where the gradients of who declares this are those that are due.
pub(super) fn averaged_over(declared: Declared, ranks: f64) -> f64 {
    match (declared.upstream, declared.parameters) {
        (Upstream::Share, Parameters::Sum) | (Upstream::TimesRanks, Parameters::Average) => 1.0,
        (Upstream::Share, Parameters::Average) => ranks,
        (Upstream::TimesRanks, Parameters::Sum) => 1.0 / ranks,
    }
}

/// Names a factor of the number of ranks for what it is where an implementation
/// declares another convention than the usual one: it does not do what it says.
pub(super) fn name(declared: Declared, mut diagnosis: Diagnosis) -> Diagnosis {
    let is_usual = (declared.upstream, declared.parameters) == Default::default();
    let is_factor = matches!(
        diagnosis.mistake,
        Some(
            Mistake::GradientsOverRanks | Mistake::GradientsTimesRanks | Mistake::HeadStateAveraged
        )
    );
    if is_factor && !is_usual {
        diagnosis.mistake = Some(Mistake::OtherConvention);
        diagnosis.sentence = format!(
            "{} {}",
            Mistake::OtherConvention.sentence(),
            diagnosis.sentence
        );
    }
    diagnosis
}

/// P: the ranks whose losses and parts come together. Outside training each is
/// a world of its own.
fn ranks(case: &AttentionCase) -> f64 {
    match case.extras.eval {
        true => 1.0,
        false => case.world as f64,
    }
}
