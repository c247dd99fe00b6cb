//! What a training gives: its loss, step by step.

use super::Result;
use std::{fs, path::Path};

/// One step of the optimizer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Step {
    /// The mean over all tokens of the step, before the weights move.
    pub(crate) loss: f64,
    /// Of the mean, by all weights, before it is clipped.
    pub(crate) gradient_norm: f64,
}

const HEADER: &str = "step,loss,gradient_norm";

/// Numbers are written with as many digits as they need to be read again with
/// the same bits.
pub(crate) fn write(path: &Path, steps: &[Step]) -> Result<()> {
    let lines = steps
        .iter()
        .enumerate()
        .map(|(number, step)| format!("{number},{},{}\n", step.loss, step.gradient_norm));
    fs::write(path, format!("{HEADER}\n{}", lines.collect::<String>()))?;
    Ok(())
}

pub(crate) fn read(path: &Path) -> Result<Vec<Step>> {
    let step = |line: &str| -> Result<Step> {
        let mut numbers = line.split(',').skip(1).map(str::parse);
        let mut next = || numbers.next().ok_or("a line ends early");
        let (loss, gradient_norm) = (next()??, next()??);
        Ok(Step {
            loss,
            gradient_norm,
        })
    };
    let text = fs::read_to_string(path)?;
    text.lines().skip(1).map(step).collect()
}
