//! From a wrong answer to the mistake's name.
//!
//! In this order: are there but the digits of a coarser element type
//! (`rounding.rs`)? Which mistake, applied to the right answer or to the problem
//! that dense attention solves, gives just what came (`hypotheses/`)? If none
//! does: is it but rounding, do rows stand in another place
//! (`provenance.rs`), is there a factor (`scale.rs`), and what is clean and
//! what is not (`contrast.rs`)? The last always has a sentence, so that a
//! mistake that nobody thought of is told as far as it shows.
//!
//! What has no answer to compare, the judge names where it says why.

mod contrast;
mod evidence;
mod hypotheses;
mod mistake;
mod prediction;
mod provenance;
mod rounding;
mod scale;
mod screening;
mod strip;
mod words;

use fixtures::{AttentionCase, Inputs};

use self::hypotheses::{Hypothesis, Reach};
use self::prediction::{Agreement, Prediction};
use crate::oracle::AnswerTensor;

pub(crate) use self::evidence::{Evidence, Measured};
pub use self::mistake::{Class, Mistake};

/// What is wrong with an answer, as far as it shows.
#[derive(Clone, Debug, PartialEq)]
pub struct Diagnosis {
    /// What was done; none where what is seen is no mistake that has a name.
    pub mistake: Option<Mistake>,
    /// Other mistakes that give this very answer here, and are less plausible.
    pub others: Vec<Mistake>,
    /// How sure that is, between 0 and 1.
    pub confidence: f64,
    /// What was done, in one sentence, with the ranks, heads and factors of
    /// this very answer.
    pub sentence: String,
    /// Which heads are wrong at which ranks' tokens, a line for each rank, and
    /// what the marks mean. Empty where there are no numbers to compare.
    pub strip: Vec<String>,
}

impl Diagnosis {
    /// Whether it says no more than the mistake's own words, nothing of this
    /// answer.
    pub fn is_general(&self) -> bool {
        self.mistake
            .is_some_and(|mistake| mistake.sentence() == self.sentence)
    }

    /// A mistake that shows by itself.
    pub(crate) fn certain(mistake: Mistake) -> Diagnosis {
        Diagnosis {
            mistake: Some(mistake),
            others: Vec::new(),
            confidence: 1.0,
            sentence: mistake.sentence().to_owned(),
            strip: Vec::new(),
        }
    }
}

/// How sure a diagnosis is at most: nobody knows all mistakes.
const SUREST: f64 = 0.98;

/// What an attention weight may be off, in unit roundoffs relative to itself.
const ROUNDED_WEIGHT: f64 = 64.0;

/// What a prediction explains at least to be named although something remains.
const TELLING: f64 = 0.6;

/// What is wrong with a wrong answer; none if nothing is.
pub(crate) fn diagnose(evidence: &Evidence<'_>) -> Option<Diagnosis> {
    let mut diagnosis = without_strip(evidence)?;
    diagnosis.strip = strip::strip(evidence);
    Some(diagnosis)
}

/// What is wrong with an output of which the weights that were dropped cannot be
/// told: as far as the others show it. `undropped` is the right output without
/// dropout.
pub(crate) fn of_kept_weights(
    case: &AttentionCase,
    inputs: &Inputs,
    probability: f64,
    undropped: &[f64],
    out: &[f64],
) -> Option<Diagnosis> {
    let gain = 1.0 / (1.0 - probability);
    let right: Vec<f64> = undropped.iter().map(|weight| weight * gain).collect();
    let u = case.dtype.unit_roundoff();
    let tolerance = right
        .iter()
        .map(|weight| ROUNDED_WEIGHT * u * weight)
        .collect();
    // What is zero was dropped, or is hidden; no number is not compared.
    let kept = out.iter().map(|&x| if x == 0.0 { f64::NAN } else { x });
    let measured = Measured::new(case, AnswerTensor::Out, kept.collect(), &right, tolerance);
    let weights = case.batch * case.query_heads * case.sequence * case.kv_sequence();
    let gains = vec![gain; weights];
    let evidence = Evidence::new(case, inputs, Some(&gains), vec![measured]);
    explained(&tried(&evidence, Reach::Forward, Compared::All))
}

fn without_strip(evidence: &Evidence<'_>) -> Option<Diagnosis> {
    if let Some(diagnosis) = rounding::of_coarse(evidence) {
        return Some(diagnosis);
    }
    let is_forward = evidence.is_wrong(AnswerTensor::Out);
    let wrong = evidence.tensors.iter().filter(|tensor| tensor.is_wrong());
    let (reach, compared) = match (is_forward, wrong.count()) {
        // Backward is another's, and right.
        (true, 1) => (Reach::Forward, Compared::OutputAlone),
        (true, _) => (Reach::Forward, Compared::All),
        (false, _) => (Reach::Backward, Compared::All),
    };
    let mut tried = tried(evidence, reach, compared);
    if let Some(diagnosis) = explained(&tried) {
        return Some(diagnosis);
    }
    // What is wrong in forward is wrong for dq.
    if !is_forward && evidence.is_wrong(AnswerTensor::QueryGradient) {
        // A forward mistake that is made in backward alone.
        let mut in_backward = self::tried(evidence, Reach::Forward, Compared::GradientsAlone);
        for tried in &mut in_backward {
            tried.sentence = format!("In backward alone: {}", tried.sentence);
        }
        if let Some(diagnosis) = explained(&in_backward) {
            return Some(diagnosis);
        }
        tried.extend(in_backward);
    }
    if let Some(diagnosis) = rounding::of_near(evidence) {
        return Some(diagnosis);
    }
    let contrast = contrast::sentence(evidence)?;
    if let Some(diagnosis) = provenance::recognise(evidence, &contrast) {
        return Some(diagnosis);
    }
    if let Some(diagnosis) = scale::recognise(evidence, &contrast) {
        return Some(diagnosis);
    }
    let best = tried
        .into_iter()
        .max_by(|a, b| a.agreement.explained.total_cmp(&b.agreement.explained))
        .filter(|best| best.agreement.explained >= TELLING);
    Some(match best {
        Some(best) => Diagnosis {
            mistake: best.mistake,
            others: Vec::new(),
            strip: Vec::new(),
            confidence: 0.5 * best.agreement.explained,
            sentence: format!("{contrast} Much of it is as if: {}", best.sentence),
        },
        None => Diagnosis {
            mistake: None,
            others: Vec::new(),
            strip: Vec::new(),
            confidence: 0.0,
            sentence: contrast,
        },
    })
}

/// What is held against predictions.
#[derive(Clone, Copy)]
enum Compared {
    All,
    OutputAlone,
    GradientsAlone,
}

/// A prediction that was held against the answer.
struct Tried {
    mistake: Option<Mistake>,
    sentence: String,
    agreement: Agreement,
}

/// Of each hypothesis of this reach the prediction that agrees best, the most
/// plausible hypothesis first.
fn tried(evidence: &Evidence<'_>, reach: Reach, compared: Compared) -> Vec<Tried> {
    let applies =
        |hypothesis: &&Hypothesis| hypothesis.reach == reach && (hypothesis.applies)(evidence.case);
    let best = |hypothesis: &Hypothesis| {
        // A problem that libtorch does not solve explains nothing.
        let predictions = (hypothesis.predict)(evidence).unwrap_or_default();
        let agreement = |prediction: Prediction| {
            let prediction = match compared {
                Compared::All => prediction,
                Compared::OutputAlone => prediction.only(|name| name == AnswerTensor::Out),
                Compared::GradientsAlone => prediction.only(|name| name != AnswerTensor::Out),
            };
            Tried {
                mistake: hypothesis.mistake,
                agreement: prediction.agreement(evidence),
                sentence: prediction.sentence,
            }
        };
        predictions
            .into_iter()
            .map(agreement)
            .reduce(|a, b| if b.is_better_than(&a) { b } else { a })
    };
    hypotheses::all().filter(applies).filter_map(best).collect()
}

impl Tried {
    fn is_better_than(&self, other: &Tried) -> bool {
        let (a, b) = (&self.agreement, &other.agreement);
        match (a.is_whole, b.is_whole) {
            (true, true) => a.rest < b.rest / 1.5,
            (false, false) => a.explained > b.explained,
            (is, _) => is,
        }
    }
}

/// The most plausible of those that explain all, and as well as any.
fn explained(tried: &[Tried]) -> Option<Diagnosis> {
    let whole = || tried.iter().filter(|tried| tried.agreement.is_whole);
    let least = whole().map(|tried| tried.agreement.rest).reduce(f64::min)?;
    let mut best = whole().filter(|tried| tried.agreement.rest <= 1.5 * least + 0.02);
    let first = best.next()?;
    let others: Vec<Mistake> = best.filter_map(|tried| tried.mistake).collect();
    Some(Diagnosis {
        mistake: first.mistake,
        confidence: SUREST / (1.0 + 0.5 * others.len() as f64),
        others,
        strip: Vec::new(),
        sentence: first.sentence.clone(),
    })
}
