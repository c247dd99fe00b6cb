//! `show`: what a case asks, what it can show, and how far one number of its
//! answer may be off, and why.

use clap::Args;
use fixtures::exchange::Precision;
use fixtures::{AttentionCase, Inputs};
use tch::Device;

use super::print;
use crate::judge::{self, power};
use crate::oracle::{self, Answer, AnswerTensor};
use crate::{Clause, ExitCode, report};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The case
    #[arg(value_name = "CASE")]
    case: AttentionCase,

    /// A number of its answer, as TENSOR[PLACE]: out[0,17,3,5] is channel 5 of
    /// head 3 of token 17 of sequence 0, dsinks[2] that of head 2
    #[arg(long, value_name = "ELEMENT")]
    element: Option<String>,

    /// The precision profile by which an implementation rounds
    #[arg(long, value_name = "PROFILE", default_value = "fused", value_parser = precision)]
    precision: Precision,
}

fn precision(text: &str) -> Result<Precision, String> {
    serde_json::from_value(text.into()).map_err(|_| "is none of fused, stored, tf32".to_owned())
}

/// Shows what is to be shown.
pub(super) fn execute(arguments: &Arguments) -> ExitCode {
    tch::set_num_threads(1);
    let shown = match &arguments.element {
        None => of_case(&arguments.case, arguments.precision),
        Some(element) => of_element(&arguments.case, element, arguments.precision),
    };
    match shown {
        Ok(text) => {
            print(&text);
            ExitCode::Success
        }
        Err(reason) => {
            eprintln!("error: {reason}");
            ExitCode::Usage
        }
    }
}

fn of_case(case: &AttentionCase, precision: Precision) -> Result<String, String> {
    let mut text = format!("{case}\n\n");
    for clause in Clause::of_case(&case.clone().into()) {
        text += &format!("{} {}\n", clause.id(), clause.sentence());
    }
    let header = [
        "tensor",
        "factor",
        "lost rows",
        "swapped heads",
        "next tokens",
    ];
    let percent = |share: f64| format!("{:.0} %", 100.0 * share);
    let rows = power::of_case(case, precision)?.into_iter().map(|power| {
        vec![
            power.tensor.name().to_owned(),
            format!("{:.4}", 1.0 + power.scale),
            percent(power.rows),
            percent(power.heads),
            percent(power.shifts),
        ]
    });
    text += "\nWhat it shows: the smallest factor by which a tensor may be wrong and is seen, and\n\
             the share of single mistakes that are seen.\n\n";
    Ok(text + &report::table(header, rows.collect(), 1..))
}

/// The derivation of one number's tolerance.
fn of_element(case: &AttentionCase, element: &str, precision: Precision) -> Result<String, String> {
    let (tensor, number) = place(case, element)?;
    let failed = |error| format!("the oracle failed: {error}");
    let inputs = Inputs::of(case);
    let numbers = |answer: &Answer<Vec<f64>>| {
        let numbers = answer.get(tensor).map(|numbers| numbers[number]);
        numbers.ok_or_else(|| format!("this case has no {}", tensor.name()))
    };
    let whole =
        oracle::attention_rounded(case, &inputs, (precision, Device::Cpu), None).map_err(failed)?;
    let (right, root) = (numbers(&whole.right)?, numbers(&whole.roots)?);
    let parts = oracle::attention_rounded_in_parts(case, &inputs, precision).map_err(failed)?;
    let rows = parts.iter().map(|(words, roundoff, part)| {
        let moved = numbers(&part.roots)?;
        Ok(vec![
            (*words).to_owned(),
            format!("{roundoff:.2e}"),
            format!("{:.3e}", moved / roundoff),
            format!("{moved:.3e}"),
        ])
    });
    let header = ["rounding", "unit roundoff", "sensitivity", "moves it by"];
    let table = report::table(header, rows.collect::<Result<_, String>>()?, 1..);
    let lambda = judge::lambda();
    Ok(format!(
        "{element} of {case}\n\n\
         right, in float64:   {right:.9e}\n\n{table}\n\
         root of the sum of their squares:   {root:.3e}\n\
         lambda = sqrt(2 ln(2 N / alpha)) = {lambda:.3} for N = {:.0} numbers in a run and\n\
         alpha = {:.0e}, the probability that a run blames an honest implementation once\n\
         may be off by lambda times the root:   {:.3e}, which is {:.2e} of it\n",
        judge::NUMBERS,
        judge::FALSE_ALARM_OF_RUN,
        lambda * root,
        lambda * root / right.abs()
    ))
}

/// Which tensor, and which of its numbers in row-major order.
fn place(case: &AttentionCase, element: &str) -> Result<(AnswerTensor, usize), String> {
    let wanted = "--element is TENSOR[PLACE], as out[0,17,3,5]";
    let (name, indices) = element
        .strip_suffix(']')
        .and_then(|rest| rest.split_once('['))
        .ok_or_else(|| format!("`{element}`: {wanted}"))?;
    let tensor = AnswerTensor::ALL
        .into_iter()
        .find(|tensor| tensor.name() == name && tensor.like().is_present(case))
        .ok_or_else(|| format!("`{name}` is no tensor of this case's answer; {wanted}"))?;
    let indices: Vec<usize> = indices
        .split(',')
        .map(|index| index.trim().parse())
        .collect::<Result<_, _>>()
        .map_err(|_| format!("`{element}`: {wanted}"))?;
    let shape = tensor.shape(case);
    let fits = indices.len() == shape.len() && indices.iter().zip(&shape).all(|(i, n)| i < n);
    if !fits {
        return Err(format!("`{element}` is not in a tensor {name} {shape:?}"));
    }
    let number = indices.iter().zip(&shape).fold(0, |at, (i, n)| at * n + i);
    Ok((tensor, number))
}
