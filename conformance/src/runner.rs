//! Cases in, events out.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use fixtures::{Case, Feature, Inputs};

use crate::implementation::{Failure, Implementation, Interrupt, RankAnswer};
use crate::judge::{self, Cause, Due, Judgement, Verdict};

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
/// What it does not claim is not asked, but for one case for each limit that it
/// does not claim to be without: there the right answer is a refusal. A case of
/// state is asked as its questions in turn, and has one record.
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
///
/// A limit is stepped over by one question that is good but for this limit.
fn due(
    case: &Case,
    claims: &BTreeSet<String>,
    stepped_over: &mut BTreeSet<Feature>,
) -> Result<Due, Feature> {
    let mut unclaimed = case
        .features()
        .into_iter()
        .filter(|feature| !claims.contains(feature.name()));
    let extras = &case.extras;
    let may_step_over = extras.defect.is_none() && extras.state.is_none();
    match (unclaimed.next(), unclaimed.next()) {
        (None, _) => Ok(match extras.defect {
            Some(defect) => Due::Refusal(Cause::BadInput(defect)),
            None => Due::Answer,
        }),
        (Some(limit), None) if may_step_over && limit.is_limit() && stepped_over.insert(limit) => {
            Ok(Due::Refusal(Cause::Unclaimed(limit)))
        }
        (Some(feature), _) => Err(feature),
    }
}

/// Asks and judges one case, its questions in turn up to the first that is not
/// answered rightly; `None` if that was interrupted.
fn ask(implementation: &mut dyn Implementation, case: &Case, due: Due) -> Option<Record> {
    let questions = case.questions();
    let mut record = Record::unasked(case, Judgement::new(Verdict::Exact, ""));
    let mut first = None;
    for (i, question) in questions.iter().enumerate() {
        let (judgement, answers) = ask_one(implementation, question, due, &mut record)?;
        if questions.len() == 1 {
            record.judgement = judgement;
            break;
        }
        if !matches!(judgement.verdict, Verdict::Exact | Verdict::Pass) {
            record.judgement = of_question(judgement, i + 1, &questions);
            break;
        }
        record.judgement = match first {
            None => judgement,
            Some(_) => record.judgement.gravest(judgement),
        };
        let first = first.get_or_insert_with(|| answers.clone());
        if i + 1 == questions.len()
            && let Some(judgement) = judge::repeated(question, first, &answers)
        {
            record.judgement = judgement;
        }
    }
    Some(record)
}

/// Asks and judges one question, and adds to `costs` what that costs. No
/// answers where there are none; `None` if it was interrupted.
fn ask_one(
    implementation: &mut dyn Implementation,
    question: &Case,
    due: Due,
    costs: &mut Record,
) -> Option<(Judgement, Vec<RankAnswer>)> {
    let inputs = Inputs::of(question);
    let start = Instant::now();
    let answers = match implementation.ask(question, &inputs) {
        Ok(answers) => answers,
        Err(failure) => return Some((judge::without_answer(failure)?, Vec::new())),
    };
    let asked = start.elapsed();
    let computed = answers
        .iter()
        .flatten()
        .map(|(info, _)| info.elapsed_s)
        .fold(0.0, f64::max);
    // An error inside the judge is never a pass and never a failure.
    let judge = AssertUnwindSafe(|| judge::judge(question, &inputs, due, &answers));
    let judgement = catch_unwind(judge).unwrap_or_else(|_| {
        Judgement::new(
            Verdict::Unclear,
            "the judge panicked; what it said is on the standard error",
        )
    });
    costs.asked += asked;
    costs.computed += Duration::try_from_secs_f64(computed).unwrap_or_default();
    costs.judged += start.elapsed() - asked;
    Some((judgement, answers))
}

/// Says which of several questions it was that got this judgement.
fn of_question(mut judgement: Judgement, number: usize, questions: &[Case]) -> Judgement {
    let suffix = match number {
        1 => "st",
        2 => "nd",
        3 => "rd",
        _ => "th",
    };
    let place = format!("the {number}{suffix} of {} questions", questions.len());
    judgement.sentence = format!("{place}: {}", judgement.sentence);
    let names = questions.iter().skip(number - 1).take(1);
    judgement
        .details
        .extend(names.map(|name| format!("{place} is {name}")));
    judgement
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
