//! What became of a fault on all cases.

use fixtures::Case;

use super::{Fault, Trial};
use crate::judge::Verdict;

/// What became of a fault on all cases on which it was tried.
#[derive(Debug)]
pub struct Tally {
    /// The fault.
    pub fault: &'static Fault,
    /// On how many cases it was tried.
    pub tried: usize,
    /// On how many its answer is wrong.
    pub wrong: usize,
    /// On how many of these the judge fails it.
    pub caught: usize,
    /// On how many of these the diagnosis names its mistake.
    pub named: usize,
    /// Where the judge lets a wrong answer pass, each with its verdict.
    pub missed: Vec<(Case, Verdict)>,
    /// Where the judge fails an answer that is not wrong.
    pub false_alarms: Vec<(Case, Verdict)>,
    /// Where the diagnosis says something else, or nothing: and what.
    pub misnamed: Vec<(Case, Option<&'static str>)>,
    /// What the judge says where it catches the fault first.
    pub sentence: String,
    /// Whether that names the mistake.
    pub is_first_named: bool,
}

impl Tally {
    /// Nothing yet.
    pub fn new(fault: &'static Fault) -> Tally {
        Tally {
            fault,
            tried: 0,
            wrong: 0,
            caught: 0,
            named: 0,
            missed: Vec::new(),
            false_alarms: Vec::new(),
            misnamed: Vec::new(),
            sentence: String::new(),
            is_first_named: false,
        }
    }

    /// Counts a trial.
    pub fn count(&mut self, case: &Case, trial: &Trial) {
        let verdict = trial.judgement.verdict;
        self.tried += 1;
        if trial.is_false_alarm() {
            self.false_alarms.push((case.clone(), verdict));
        }
        if !trial.is_wrong {
            return;
        }
        self.wrong += 1;
        if !trial.is_caught() {
            self.missed.push((case.clone(), verdict));
            return;
        }
        self.caught += 1;
        let is_named = trial.named() == Some(self.fault.mistake);
        match is_named {
            true => self.named += 1,
            false => {
                let said = trial.named().map(|mistake| mistake.name());
                self.misnamed.push((case.clone(), said));
            }
        }
        if self.sentence.is_empty() {
            self.is_first_named = is_named;
            let judgement = &trial.judgement;
            let diagnosis = judgement.diagnosis.as_ref();
            self.sentence = diagnosis.map_or_else(
                || judgement.sentence.clone(),
                |diagnosis| diagnosis.sentence.clone(),
            );
        }
    }

    /// Whether the fault is wrong somewhere, and caught.
    pub fn is_caught(&self) -> bool {
        self.caught > 0
    }
}
