//! Cases in, events out.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use fixtures::{Case, Feature, Inputs};

use crate::implementation::{Failure, Implementation, Interrupt};
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
        let claims = implementation.claims(case.world);
        summary.starting += start.elapsed();
        let record = match claims {
            Ok(claims) => match due(case, &claims, &mut stepped_over) {
                Ok(due) => ask(implementation, case, due),
                Err(feature) => Some(Record::not_claimed(case, feature)),
            },
            Err(failure) => Record::without_answer(case, failure),
        };
        let Some(record) = record else {
            summary.is_interrupted = true;
            break;
        };
        sink(Event::Judged(&record));
        summary.records.push(record);
    }
    sink(Event::Finished);
    summary
}

/// What is due from an implementation that claims these features, or the
/// feature for want of which it is not asked.
fn due(
    case: &Case,
    claims: &BTreeSet<String>,
    stepped_over: &mut BTreeSet<Feature>,
) -> Result<Due, Feature> {
    let mut unclaimed = case
        .features()
        .into_iter()
        .filter(|feature| !claims.contains(feature.name()));
    match (unclaimed.next(), unclaimed.next()) {
        (None, _) => Ok(Due::Answer),
        (Some(feature), None) if stepped_over.insert(feature) => Ok(Due::Refusal(feature)),
        (Some(feature), _) => Err(feature),
    }
}

/// Asks and judges one case; `None` if that was interrupted.
fn ask(implementation: &mut dyn Implementation, case: &Case, due: Due) -> Option<Record> {
    let inputs = Inputs::of(case);
    let start = Instant::now();
    let answers = match implementation.ask(case, &inputs) {
        Ok(answers) => answers,
        Err(failure) => return Record::without_answer(case, failure),
    };
    let asked = start.elapsed();
    let computed = answers
        .iter()
        .flatten()
        .map(|(info, _)| info.elapsed_s)
        .fold(0.0, f64::max);
    // An error inside the judge is never a pass and never a failure.
    let judge = AssertUnwindSafe(|| judge::judge(case, &inputs, due, &answers));
    let judgement = catch_unwind(judge).unwrap_or_else(|_| {
        Judgement::new(
            Verdict::Unclear,
            "the judge panicked; what it said is on the standard error",
        )
    });
    Some(Record {
        case: case.clone(),
        judgement,
        asked,
        computed: Duration::try_from_secs_f64(computed).unwrap_or_default(),
        judged: start.elapsed() - asked,
    })
}

impl Record {
    fn not_claimed(case: &Case, feature: Feature) -> Record {
        let sentence = format!("`{}` is not claimed", feature.name());
        Record::unasked(case, Judgement::new(Verdict::NotClaimed, sentence))
    }

    fn without_answer(case: &Case, failure: Failure) -> Option<Record> {
        let judgement = judge::without_answer(failure)?;
        Some(Record::unasked(case, judgement))
    }

    fn unasked(case: &Case, judgement: Judgement) -> Record {
        Record {
            case: case.clone(),
            judgement,
            asked: Duration::ZERO,
            computed: Duration::ZERO,
            judged: Duration::ZERO,
        }
    }
}
