//! Cases in, events out.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use fixtures::exchange::Declared;
use fixtures::{Case, Feature};

use crate::implementation::{Claims, Failure, Implementation, Interrupt, Log, Means, RankAnswer};
use crate::judge::{self, Cause, Due, Judgement, Question, Verdict};
use crate::known::KnownFailures;

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
    /// A case went wrong: its evidence, before its verdict is told.
    WentWrong(&'a Evidence<'a>),
    /// A case has its verdict.
    Judged(&'a Record),
    /// The run is over.
    Finished,
}

/// All that there is to see of a case that went wrong.
#[derive(Debug)]
pub struct Evidence<'a> {
    /// What became of it.
    pub record: &'a Record,
    /// Its questions in turn, up to the one that went wrong. None where the
    /// implementation could not be started.
    pub asked: &'a [Asked],
    /// What was written meanwhile, by whom it was.
    pub logs: &'a [Log],
}

/// A question and what came back.
#[derive(Debug)]
pub struct Asked {
    /// The question.
    pub question: Question,
    /// The answers of all ranks; none where not every rank answered.
    pub answers: Vec<RankAnswer>,
}

/// What became of one case, and what it cost.
#[derive(Clone, Debug)]
pub struct Record {
    /// The case.
    pub case: Case,
    /// By which conventions it was judged.
    pub declared: Declared,
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

/// Asks `implementation` each of `cases`, in their order, and judges it. What
/// fails as is known has the verdict that says so.
///
/// What it does not claim is not asked, but for one case for each limit that it
/// does not claim to be without: there the right answer is a refusal. A case of
/// state is asked as its questions in turn, and has one record.
pub fn run(
    implementation: &mut dyn Implementation,
    cases: &[Case],
    known: &mut KnownFailures,
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
        let claims = implementation.claims(case.world());
        summary.starting += start.elapsed();
        let told = match claims {
            Ok(claims) => match due(case, &claims.features, &mut stepped_over) {
                Ok(due) => ask(implementation, case, &claims, due),
                Err(feature) => Some((Record::not_claimed(case, feature), Vec::new())),
            },
            Err(failure) => Record::without_answer(case, failure).map(|r| (r, Vec::new())),
        };
        let Some((mut record, asked)) = told else {
            summary.is_interrupted = true;
            break;
        };
        known.note(implementation.name(), &mut record);
        let verdict = record.judgement.verdict;
        if verdict.is_failure() || verdict == Verdict::Unclear {
            sink(Event::WentWrong(&Evidence {
                record: &record,
                asked: &asked,
                logs: &implementation.logs(case.world()),
            }));
        }
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
pub(crate) fn due(
    case: &Case,
    claims: &BTreeSet<String>,
    stepped_over: &mut BTreeSet<Feature>,
) -> Result<Due, Feature> {
    let mut unclaimed = case
        .features()
        .into_iter()
        .filter(|feature| !claims.contains(feature.name()));
    let may_step_over = case.defect().is_none() && case.state().is_none();
    match (unclaimed.next(), unclaimed.next()) {
        (None, _) => Ok(match case.defect() {
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
pub(crate) fn ask(
    implementation: &mut dyn Implementation,
    case: &Case,
    claims: &Claims,
    due: Due,
) -> Option<(Record, Vec<Asked>)> {
    let questions = case.questions();
    let mut record = Record::unasked(case, Judgement::new(Verdict::Exact, ""));
    record.declared = claims.declared;
    let mut asked: Vec<Asked> = Vec::new();
    for (i, question) in questions.iter().enumerate() {
        let (judgement, one) = ask_one(implementation, question, claims.means, due, &mut record)?;
        asked.push(one);
        if questions.len() == 1 {
            record.judgement = judgement;
            break;
        }
        if !matches!(judgement.verdict, Verdict::Exact | Verdict::Pass) {
            let judgement = match case.state() {
                Some(state) => judge::of_state(state, i + 1, judgement),
                None => judgement,
            };
            record.judgement = of_question(judgement, i + 1, &questions);
            break;
        }
        record.judgement = match i {
            0 => judgement,
            _ => record.judgement.gravest(judgement),
        };
        if i + 1 == questions.len()
            && let [first, .., last] = asked.as_slice()
            && let Some((question, _)) = last.question.attention()
            && let Some(judgement) = judge::repeated(question, &first.answers, &last.answers)
        {
            record.judgement = judgement;
        }
    }
    Some((record, asked))
}

/// Asks and judges one question, and adds to `costs` what that costs; `None` if
/// it was interrupted.
fn ask_one(
    implementation: &mut dyn Implementation,
    question: &Case,
    means: Means,
    due: Due,
    costs: &mut Record,
) -> Option<(Judgement, Asked)> {
    let mut asked = Asked {
        question: Question::of(question, costs.declared).by(means),
        answers: Vec::new(),
    };
    let start = Instant::now();
    match implementation.ask(asked.question.posed()) {
        Ok(answers) => asked.answers = answers,
        Err(failure) => return Some((judge::without_answer(failure)?, asked)),
    };
    let Asked { question, answers } = &asked;
    let duration = start.elapsed();
    let computed = answers
        .iter()
        .flatten()
        .map(|(info, _)| info.elapsed_s)
        .fold(0.0, f64::max);
    // An error inside the judge is never a pass and never a failure.
    let judge = AssertUnwindSafe(|| judge::judge(question, costs.declared, due, answers));
    let judgement = catch_unwind(judge).unwrap_or_else(|_| {
        Judgement::new(
            Verdict::Unclear,
            "the judge panicked; what it said is on the standard error",
        )
    });
    costs.asked += duration;
    costs.computed += Duration::try_from_secs_f64(computed).unwrap_or_default();
    costs.judged += start.elapsed() - duration;
    Some((judgement, asked))
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
            declared: Declared::default(),
            judgement,
            asked: Duration::ZERO,
            computed: Duration::ZERO,
            judged: Duration::ZERO,
        }
    }
}
