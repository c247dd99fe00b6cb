//! Cases in, events out.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use fixtures::{Case, Feature};

use crate::implementation::{Implementation, Interrupt, Outcome};
use crate::judge::{self, Due, Judgement, Verdict};

/// Something that happened in a run.
#[derive(Debug)]
pub enum Event<'a> {
    /// A run begins.
    Started {
        /// Who is judged.
        implementation: &'a str,
        /// How many cases there are.
        cases: usize,
    },
    /// A case is about to be asked.
    Asking(&'a Case),
    /// A case has its verdict.
    Judged(&'a Record),
    /// The run is over.
    Finished,
}

/// What became of one case, and what it cost.
#[derive(Clone, Debug)]
pub struct Record {
    /// The case.
    pub case: Case,
    /// Its verdict, and why.
    pub judgement: Judgement,
    /// From posing the case to the last answer.
    pub asked: Duration,
    /// What the slowest rank says that forward and backward took, of this.
    pub computed: Duration,
    /// What the judge took, oracle and dense baselines included.
    pub judged: Duration,
}

/// What became of all cases that an implementation was asked.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Who was judged.
    pub implementation: String,
    /// The cases, in the order in which they were asked.
    pub records: Vec<Record>,
    /// What starting the implementation took, over all world sizes.
    pub starting: Duration,
    /// Whether it ended before all cases were judged.
    pub is_interrupted: bool,
}

impl Summary {
    /// How many cases have this verdict.
    pub fn count(&self, verdict: Verdict) -> usize {
        self.records
            .iter()
            .filter(|record| record.judgement.verdict == verdict)
            .count()
    }

    /// Whether something was judged and nothing went wrong.
    pub fn is_success(&self) -> bool {
        let verdicts = || self.records.iter().map(|record| record.judgement.verdict);
        !self.is_interrupted
            && verdicts().any(Verdict::is_judged)
            && !verdicts().any(|verdict| verdict.is_failure() || verdict == Verdict::Unclear)
    }
}

/// Asks `implementation` each of `cases`, in their order, and judges it.
///
/// What it does not claim is not asked, but for one case for each feature that
/// it does not claim: there the right answer is a refusal.
pub fn run(
    implementation: &mut dyn Implementation,
    cases: &[Case],
    interrupt: &Interrupt,
    sink: &mut dyn FnMut(Event<'_>),
) -> Summary {
    let mut summary = Summary {
        implementation: implementation.name().to_owned(),
        records: Vec::with_capacity(cases.len()),
        starting: Duration::ZERO,
        is_interrupted: false,
    };
    sink(Event::Started {
        implementation: implementation.name(),
        cases: cases.len(),
    });
    let mut stepped_over = BTreeSet::new();
    for case in cases {
        if interrupt.is_set() {
            summary.is_interrupted = true;
            break;
        }
        sink(Event::Asking(case));
        let start = Instant::now();
        let plan = plan(implementation, case, &mut stepped_over);
        summary.starting += start.elapsed();
        let Some(record) = record(implementation, case, plan) else {
            summary.is_interrupted = true;
            break;
        };
        sink(Event::Judged(&record));
        summary.records.push(record);
    }
    sink(Event::Finished);
    summary
}

/// What to do with a case.
enum Plan {
    Ask(Due),
    /// It needs this feature, which is not claimed.
    Skip(Feature),
    /// The implementation could not be started.
    GiveUp(Outcome),
}

fn plan(
    implementation: &mut dyn Implementation,
    case: &Case,
    stepped_over: &mut BTreeSet<Feature>,
) -> Plan {
    let claims = match implementation.claims(case.world) {
        Ok(claims) => claims,
        Err(outcome) => return Plan::GiveUp(outcome),
    };
    let mut unclaimed = case
        .features()
        .into_iter()
        .filter(|feature| !claims.contains(feature.name()));
    match (unclaimed.next(), unclaimed.next()) {
        (None, _) => Plan::Ask(Due::Answer),
        (Some(feature), None) if stepped_over.insert(feature) => Plan::Ask(Due::Refusal(feature)),
        (Some(feature), _) => Plan::Skip(feature),
    }
}

/// Asks and judges one case; `None` if that was interrupted.
fn record(implementation: &mut dyn Implementation, case: &Case, plan: Plan) -> Option<Record> {
    let start = Instant::now();
    let (due, outcome) = match plan {
        Plan::Ask(due) => (due, implementation.ask(case)),
        Plan::GiveUp(outcome) => (Due::Answer, outcome),
        Plan::Skip(feature) => {
            let sentence = format!("`{}` is not claimed", feature.name());
            return Some(Record {
                case: case.clone(),
                judgement: Judgement::new(Verdict::NotClaimed, sentence),
                asked: Duration::ZERO,
                computed: Duration::ZERO,
                judged: Duration::ZERO,
            });
        }
    };
    let asked = start.elapsed();
    let computed = match &outcome {
        Outcome::Answered(answers) => answers
            .iter()
            .flatten()
            .map(|(info, _)| info.elapsed_s)
            .fold(0.0, f64::max),
        _ => 0.0,
    };
    // An error inside the judge is never a pass and never a failure.
    let judgement = catch_unwind(AssertUnwindSafe(|| judge::judge(case, due, outcome)))
        .unwrap_or_else(|_| {
            Some(Judgement::new(
                Verdict::Unclear,
                "the judge panicked; what it said is on the standard error",
            ))
        })?;
    Some(Record {
        case: case.clone(),
        judgement,
        asked,
        computed: Duration::try_from_secs_f64(computed).unwrap_or_default(),
        judged: start.elapsed() - asked,
    })
}
