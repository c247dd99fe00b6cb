//! Mistakes about what scores are made of.

use fixtures::{AttentionCase, Mask, Rotary};
use tch::{TchError, Tensor};

use super::moved::is_split;
use super::{Hypothesis, Reach};
use crate::diagnosis::evidence::Evidence;
use crate::diagnosis::mistake::Mistake;
use crate::diagnosis::prediction::Prediction;
use crate::oracle::Problem;

pub(super) const HYPOTHESES: &[Hypothesis] = &[
    Hypothesis {
        mistake: Some(Mistake::DropoutNotRescaled),
        reach: Reach::Forward,
        applies: |case| case.extras.dropout.is_some(),
        predict: dropout_not_rescaled,
    },
    Hypothesis {
        mistake: Some(Mistake::ScaleIgnored),
        reach: Reach::Forward,
        applies: |case| case.extras.scale.is_some(),
        predict: |evidence| scaled(evidence, 1.0 / (evidence.case.head_size as f64).sqrt()),
    },
    Hypothesis {
        mistake: Some(Mistake::ScaleMissing),
        reach: Reach::Forward,
        applies: |_| true,
        predict: |evidence| scaled(evidence, 1.0),
    },
    Hypothesis {
        mistake: Some(Mistake::ScaleByHidden),
        reach: Reach::Forward,
        applies: |case| case.query_heads > 1,
        predict: |evidence| {
            let case = evidence.case;
            let hidden = case.query_heads * case.head_size;
            scaled(evidence, 1.0 / (hidden as f64).sqrt())
        },
    },
    Hypothesis {
        mistake: Some(Mistake::SoftcapIgnored),
        reach: Reach::Forward,
        applies: |case| case.extras.softcap.is_some(),
        predict: |evidence| {
            altered(evidence, "Scores are not capped.", |problem| {
                problem.softcap = None;
            })
        },
    },
    Hypothesis {
        mistake: Some(Mistake::SinksIgnored),
        reach: Reach::Forward,
        applies: |case| case.extras.sinks,
        predict: |evidence| {
            altered(
                evidence,
                "The softmax's denominator lacks the sinks.",
                |problem| {
                    problem.sinks = None;
                },
            )
        },
    },
    Hypothesis {
        mistake: Some(Mistake::SlopesIgnored),
        reach: Reach::Forward,
        applies: |case| case.extras.alibi,
        predict: |evidence| {
            altered(evidence, "ALiBi is left out.", |problem| {
                problem.slopes = None;
            })
        },
    },
    Hypothesis {
        mistake: Some(Mistake::NormsIgnored),
        reach: Reach::Forward,
        applies: |case| case.extras.norms,
        predict: |evidence| {
            altered(
                evidence,
                "Queries and keys are not normalised.",
                |problem| {
                    (problem.query_norm, problem.key_norm) = (None, None);
                },
            )
        },
    },
    Hypothesis {
        mistake: Some(Mistake::SlopesByLocalDistance),
        reach: Reach::Forward,
        applies: |case| case.extras.alibi && is_split(case),
        predict: slopes_by_local_distance,
    },
    Hypothesis {
        mistake: Some(Mistake::RotaryByLocalPosition),
        reach: Reach::Forward,
        applies: |case| case.extras.rotary.is_some() && is_split(case),
        predict: rotary_by_local_position,
    },
    Hypothesis {
        mistake: Some(Mistake::RotaryOfKeysOnly),
        reach: Reach::Forward,
        applies: |case| case.extras.rotary.is_some(),
        predict: |evidence| {
            let mut predictions =
                altered(evidence, "Keys are rotated and queries are not.", |p| {
                    p.query_angles = None;
                })?;
            predictions.extend(altered(
                evidence,
                "Queries are rotated and keys are not.",
                |p| {
                    p.key_angles = None;
                },
            )?);
            Ok(predictions)
        },
    },
    Hypothesis {
        mistake: Some(Mistake::RotaryIgnored),
        reach: Reach::Forward,
        applies: |case| case.extras.rotary.is_some(),
        predict: |evidence| {
            altered(evidence, "Queries and keys are not rotated.", |problem| {
                (problem.query_angles, problem.key_angles) = (None, None);
            })
        },
    },
    Hypothesis {
        mistake: Some(Mistake::FirstComponentOnly),
        reach: Reach::Forward,
        applies: |case| case.extras.rotary == Some(Rotary::Multimodal),
        predict: |evidence| {
            let angles = angles_of(evidence, |case| case.extras.rotary = Some(Rotary::Plain))?;
            let sentence = "Of three components of positions only the first is used.";
            altered(evidence, sentence, |problem| {
                (problem.query_angles, problem.key_angles) =
                    (Some(angles.shallow_clone()), Some(angles.shallow_clone()));
            })
        },
    },
];

/// What has no name.
pub(super) const UNNAMED: &[Hypothesis] = &[Hypothesis {
    mistake: None,
    reach: Reach::Forward,
    applies: |_| true,
    predict: scale_times_something,
}];

fn altered(
    evidence: &Evidence<'_>,
    sentence: &str,
    alter: impl Fn(&mut Problem),
) -> Result<Vec<Prediction>, TchError> {
    let mut problem = evidence.problem()?;
    alter(&mut problem);
    Ok(vec![evidence.solved(sentence, &problem)?])
}

fn scaled(evidence: &Evidence<'_>, scale: f64) -> Result<Vec<Prediction>, TchError> {
    let due = evidence.case.score_scale();
    let sentence = format!("Scores are multiplied by {scale:.4}, where {due:.4} is due.");
    altered(evidence, &sentence, |problem| problem.scale = scale)
}

/// Scales that are off by the number of ranks, the head size or the base of the
/// exponential, or applied twice.
fn scale_times_something(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let (case, due) = (evidence.case, evidence.case.score_scale());
    let (ranks, channels) = (evidence.ranks() as f64, case.head_size as f64);
    let factors = [
        ranks,
        1.0 / ranks,
        ranks.sqrt(),
        1.0 / ranks.sqrt(),
        due,
        1.0 / channels,
        channels,
        std::f64::consts::LOG2_E,
        std::f64::consts::LN_2,
    ];
    let mut predictions = Vec::new();
    for factor in factors.into_iter().filter(|&factor| factor != 1.0) {
        predictions.extend(scaled(evidence, due * factor)?);
    }
    Ok(predictions)
}

/// The angles of an altered case.
fn angles_of(
    evidence: &Evidence<'_>,
    alter: impl Fn(&mut AttentionCase),
) -> Result<Tensor, TchError> {
    let mut case = evidence.case.clone();
    alter(&mut case);
    let angles = Problem::of(&case, evidence.inputs)?.query_angles;
    angles.ok_or_else(|| TchError::Shape("the case has no rotation".to_owned()))
}

/// For each token its number on its rank.
fn local_numbers(evidence: &Evidence<'_>) -> Result<Tensor, TchError> {
    let places = evidence.place_of_token();
    let local: Vec<i64> = places.iter().map(|&(_, at)| at as i64).collect();
    Tensor::f_from_slice(&local)
}

fn rotary_by_local_position(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    // The angles of token t are those of position t without documents.
    let by_position = angles_of(evidence, |case| {
        case.extras.documents = None;
        case.mask = Mask::Full;
    })?;
    let angles = by_position.f_index_select(2, &local_numbers(evidence)?)?;
    // All three components the same number.
    let of_one = angles_of(evidence, |case| {
        (case.extras.documents, case.mask) = (None, Mask::Full);
        case.extras.rotary = Some(Rotary::Plain);
    })?;
    let of_one = of_one.f_index_select(2, &local_numbers(evidence)?)?;
    let sentence = "Rotary positions begin anew on every rank.";
    let by = |angles: &Tensor| {
        altered(evidence, sentence, |problem| {
            (problem.query_angles, problem.key_angles) =
                (Some(angles.shallow_clone()), Some(angles.shallow_clone()));
        })
    };
    Ok([by(&angles)?, by(&of_one)?].concat())
}

fn dropout_not_rescaled(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let hundredths = evidence.case.extras.dropout.unwrap_or_default();
    let kept = 1.0 - f64::from(hundredths) / 100.0;
    let sentence = format!("Weights that are kept are not divided by {kept}.");
    let mut problem = evidence.problem()?;
    if let Some(dropout) = &problem.dropout {
        problem.dropout = Some(dropout.f_mul_scalar(kept)?);
    }
    Ok(vec![evidence.solved(sentence, &problem)?])
}

fn slopes_by_local_distance(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let local = local_numbers(evidence)?;
    let mut problem = evidence.problem()?;
    let Some(distances) = &problem.distances else {
        return Ok(Vec::new());
    };
    problem.distances = Some(
        distances
            .f_index_select(0, &local)?
            .f_index_select(1, &local)?,
    );
    let sentence = "ALiBi distances are those of tokens' numbers on their ranks.";
    Ok(vec![evidence.solved(sentence, &problem)?])
}
