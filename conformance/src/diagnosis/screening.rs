//! A look at a few rows, which spares most problems from being solved whole.

use tch::TchError;

use super::evidence::Evidence;
use super::prediction::may_be_off;
use crate::oracle::{self, AnswerTensor, Problem};

/// How many queries are looked at.
const QUERIES: usize = 12;

/// Of the numbers that are looked at, those that agree where a problem may be
/// the one that was solved: what is wrong may be so in these rows alone.
const SOME: f64 = 0.4;

/// Where rows of attention stand in an answer: of the output, and of the
/// gradient of Q.
pub(super) struct Places<'a> {
    pub(super) out: &'a dyn Fn(usize) -> usize,
    pub(super) dq: &'a dyn Fn(usize) -> usize,
}

/// Whether the answer may be that of this problem: by rows of the output, or
/// where that is right by those of the gradient of Q.
pub(super) fn is_plausible(
    evidence: &Evidence<'_>,
    problem: &Problem,
    places: &Places<'_>,
) -> Result<bool, TchError> {
    let is_out_wrong = evidence.is_wrong(AnswerTensor::Out);
    let (name, place) = match is_out_wrong {
        true => (AnswerTensor::Out, places.out),
        false => (AnswerTensor::QueryGradient, places.dq),
    };
    let Some(tensor) = evidence.tensor(name) else {
        return Ok(true);
    };
    let tokens: Vec<usize> = (0..tensor.sizes.tokens)
        .filter(|&token| !evidence.is_padding(0, token))
        .collect();
    let step = tokens.len().div_ceil(QUERIES).max(1);
    let queries: Vec<usize> = tokens.into_iter().skip(step / 2).step_by(step).collect();
    let index: Vec<i64> = queries.iter().map(|&token| token as i64).collect();
    let answer = problem.of_queries(0, &index)?.solve()?;
    let predicted = match answer.get(name) {
        Some(rows) => oracle::elements(rows)?,
        None => return Ok(true),
    };
    let u = evidence.case.dtype.unit_roundoff();
    let off = may_be_off(&predicted, u);
    let (mut count, mut agrees) = (0usize, 0usize);
    for (i, due) in predicted.iter().enumerate() {
        let (row, channel) = (i / tensor.sizes.channels, i % tensor.sizes.channels);
        let (query, head) = (queries[row / tensor.sizes.heads], row % tensor.sizes.heads);
        let at = place(tensor.sizes.row((0, query, head))) * tensor.sizes.channels + channel;
        let is = tensor.answer[at];
        if is.is_finite() {
            count += 1;
            agrees += usize::from((is - due).abs() <= 2.0 * tensor.tolerance[at] + off);
        }
    }
    Ok(agrees as f64 >= SOME * count as f64)
}
