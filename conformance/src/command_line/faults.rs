//! `faults`: judges implementations that are wrong on purpose.

use std::fs;
use std::path::PathBuf;

use clap::Args;
use clap::builder::PossibleValuesParser;
use fixtures::{AttentionCase, Case, Inputs};

use super::print;
use crate::ExitCode;
use crate::faults::{self, Fault, Tally, Trial, Trials};
use crate::oracle::{self, Answer};
use crate::rivals::{self, Shown};
use crate::{judge, report};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// This fault; given several times, these
    #[arg(long, value_name = "NAME", value_parser = names(), hide_possible_values = true)]
    fault: Vec<String>,

    /// This case instead of those that are kept for it
    #[arg(long, value_name = "NAME")]
    case: Vec<Case>,

    /// Write the table as a page of Markdown to this file
    #[arg(long, value_name = "FILE")]
    table: Option<PathBuf>,

    /// Have other suites' published rules judge the same wrong answers, and
    /// write who catches what as a page of Markdown to this file
    #[arg(long, value_name = "FILE")]
    rivals: Option<PathBuf>,
}

fn names() -> PossibleValuesParser {
    faults::all()
        .map(|fault| fault.name)
        .collect::<Vec<_>>()
        .into()
}

/// Tries what is to be tried.
pub(super) fn execute(arguments: &Arguments) -> ExitCode {
    let faults: Vec<&'static Fault> = faults::all()
        .filter(|fault| {
            arguments.fault.is_empty() || arguments.fault.iter().any(|name| name == fault.name)
        })
        .collect();
    let cases = match arguments.case.as_slice() {
        [] => faults::cases(),
        named => named.to_vec(),
    };
    // One thread per rank. The setting is the process', and so the oracle's.
    tch::set_num_threads(1);
    let mut rivals = rivals::Tally::default();
    let mut tallies: Vec<Tally> = faults.into_iter().map(Tally::new).collect();
    for case in &cases {
        let mut affected = tallies
            .iter_mut()
            .filter(|t| t.fault.applies(case))
            .peekable();
        if affected.peek().is_none() {
            continue;
        }
        let trials = Trials::of(case);
        if !trials.is_right_judged_right() {
            let judgement = &trials.of_right;
            eprintln!(
                "error: the right attention is judged wrong on {case}: {}: {}",
                judgement.verdict, judgement.sentence
            );
            return ExitCode::Unclear;
        }
        let beside = Beside::of(case).filter(|_| arguments.rivals.is_some());
        for tally in affected {
            let trial = trials.trial(tally.fault);
            if let (true, Some(beside)) = (trial.is_wrong, &beside) {
                beside.show(tally.fault, &trial, &mut rivals);
            }
            tally.count(case, &trial);
        }
    }
    if tallies.iter().all(|tally| tally.tried == 0) {
        eprintln!("error: none of these faults can show in any of these cases");
        return ExitCode::NothingJudged;
    }
    print(&report::faults(&tallies));
    let pages = [
        (&arguments.table, report::faults_page(&tallies)),
        (&arguments.rivals, report::rivals_page(&rivals)),
    ];
    for (path, page) in pages {
        if let Some(path) = path
            && let Err(error) = fs::write(path, page)
        {
            eprintln!("error: {} cannot be written: {error}", path.display());
            return ExitCode::Environment;
        }
    }
    match tallies.iter().all(Tally::is_caught) {
        true => ExitCode::Success,
        false => ExitCode::Failed,
    }
}

/// What other suites' rules compare a wrong answer with.
struct Beside {
    case: AttentionCase,
    inputs: Inputs,
    right: Answer<Vec<f64>>,
    dense: Option<Answer<Vec<f64>>>,
}

impl Beside {
    /// None where there is no one right answer that stands by itself: something
    /// is dropped, a refusal is due, or one question is asked after another.
    fn of(case: &Case) -> Option<Beside> {
        let case = case.attention()?;
        let extras = &case.extras;
        if extras.dropout.is_some() || extras.defect.is_some() || extras.state.is_some() {
            return None;
        }
        let inputs = Inputs::of(case);
        let dense = judge::dense_answer(case, &inputs);
        let right = oracle::attention(case, &inputs).ok()?;
        Some(Beside {
            case: case.clone(),
            right: judge::blanked(case, right)?,
            inputs,
            dense,
        })
    }

    fn show(&self, fault: &Fault, trial: &Trial, rivals: &mut rivals::Tally) {
        let answers = trial.answered.first().and_then(|asked| asked.as_ref().ok());
        let answer = answers.and_then(|answers| judge::whole_answer(&self.case, answers));
        match answer {
            Some(answer) => {
                let shown = Shown {
                    case: &self.case,
                    inputs: &self.inputs,
                    right: &self.right,
                    dense: self.dense.as_ref(),
                    answer: &answer,
                };
                rivals.add(fault.name, &shown, trial.is_caught());
            }
            None => rivals.add_without_tensors(fault.name, trial.is_caught()),
        }
    }
}
