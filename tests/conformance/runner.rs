//! What is asked of whom, and what becomes of several questions.
#![allow(missing_docs, clippy::unwrap_used)]

mod answers;

use std::time::Duration;

use answers::{attention, ok, right, said, shards};
use fixtures::exchange::{AnswerStatus, CaseInfo, Tensors};
use fixtures::{Array, AttentionCase, Case, Feature, Structure};
use rstest::rstest;
use ulysses_conformance::implementation::{
    Claims, Collapse, Failure, Implementation, Interrupt, RankAnswer,
};
use ulysses_conformance::judge::Verdict;
use ulysses_conformance::known::KnownFailures;
use ulysses_conformance::runner::{Record, run};

type Answers = Result<Vec<RankAnswer>, Failure>;

/// Claims all but some features, and answers rightly but for what is spoiled.
struct Fake {
    unclaimed: Vec<Feature>,
    asked: Vec<AttentionCase>,
    /// Is given the number of the question, from 1 on.
    spoil: fn(usize, &mut Answers),
}

impl Implementation for Fake {
    fn name(&self) -> &str {
        "fake"
    }

    fn claims(&mut self, _world: usize) -> Result<Claims, Failure> {
        let claimed = Feature::ALL
            .into_iter()
            .filter(|f| !self.unclaimed.contains(f));
        Ok(Claims {
            features: claimed.map(|feature| feature.name().to_owned()).collect(),
            ..Claims::default()
        })
    }

    fn ask(&mut self, posed: Vec<(CaseInfo, Tensors)>) -> Answers {
        let case = attention(&posed);
        self.asked.push(case.clone());
        let mut answers = Ok(ok(shards(&case, &right(&case))));
        for (info, _) in answers.iter_mut().flatten().flatten() {
            info.elapsed_s = 2.0;
        }
        (self.spoil)(self.asked.len(), &mut answers);
        answers
    }
}

fn records(fake: &mut Fake, names: &[String]) -> Vec<Record> {
    let cases: Vec<Case> = names.iter().map(|name| name.parse().unwrap()).collect();
    let known = &mut KnownFailures::default();
    run(fake, &cases, known, &Interrupt::default(), &mut |_| {}).records
}

fn record(parts: &str, spoil: fn(usize, &mut Answers)) -> (Record, Vec<String>) {
    let mut fake = Fake {
        unclaimed: Vec::new(),
        asked: Vec::new(),
        spoil,
    };
    let name = format!("attention/p2-b1-s12-hq4-hkv2-d8-causal-f32-gaussian-seed3-{parts}");
    let record = records(&mut fake, &[name]).remove(0);
    let asked = fake.asked.iter().map(AttentionCase::to_string).collect();
    (record, asked)
}

/// Changes one element of `dq` of the last rank.
fn change(answers: &mut Answers, change: impl Fn(f64) -> f64) {
    let (_, tensors) = answers.as_mut().unwrap()[1].as_mut().unwrap();
    let dq = tensors.get_mut("dq").unwrap();
    let mut values = dq.to_f64();
    values[0] = change(values[0]);
    *dq = Array::from_f64(dq.dtype, &dq.shape.clone(), &values);
}

fn next_float(x: f64) -> f64 {
    f64::from((x as f32).next_up())
}

#[test]
fn the_questions_of_a_case_are_asked_in_turn_and_cost_together() {
    let (record, asked) = record("otherlength", |_, _| {});
    let (first, other) = ("p2-b1-s12-hq4-hkv2-d8", "p2-b1-s24-hq4-hkv2-d8");
    let names: Vec<_> = [first, other, first]
        .map(|sizes| format!("attention/{sizes}-causal-f32-gaussian-seed3"))
        .to_vec();
    assert_eq!(asked, names);
    assert_eq!(record.judgement.verdict, Verdict::Pass);
    assert_eq!(record.judgement.sentence, "");
    assert_eq!(record.computed, Duration::from_secs(6));
    assert!(record.case.to_string().ends_with("-otherlength"));
}

#[test]
fn the_first_question_that_is_wrong_counts_and_none_is_asked_after_it() {
    let wrong = |question, answers: &mut Answers| {
        if question > 1 {
            change(answers, |x| x + 1.0);
        }
    };
    let (record, asked) = record("evalbetween", wrong);
    assert_eq!(asked.len(), 2);
    assert_eq!(record.judgement.verdict, Verdict::Fail);
    assert_eq!(
        record.judgement.sentence,
        "the 2nd of 3 questions: rank 1: dq is wrong"
    );
    assert!(
        record
            .judgement
            .details
            .last()
            .unwrap()
            .starts_with("the 2nd of 3 questions is attention/"),
        "{record:?}"
    );
}

#[test]
fn a_crash_after_the_first_question_is_a_crash() {
    let (record, _) = record("again", |question, answers| {
        if question == 2 {
            *answers = Err(Failure::Crashed(Collapse {
                sentence: "rank 0 ended".to_owned(),
                logs: Vec::new(),
                is_of_ranks: true,
            }));
        }
    });
    assert_eq!(record.judgement.verdict, Verdict::Crash);
    assert_eq!(
        record.judgement.sentence,
        "the 2nd of 2 questions: rank 0 ended"
    );
}

#[rstest]
#[case::again("again", 2)]
#[case::other_heads("otherheads", 3)]
fn the_same_question_has_the_same_bits_each_time(#[case] part: &str, #[case] last: usize) {
    let spoils: [fn(usize, &mut Answers); 2] = [
        |question, answers| {
            if question == 2 {
                change(answers, next_float);
            }
        },
        |question, answers| {
            if question == 3 {
                change(answers, next_float);
            }
        },
    ];
    for (spoil, spoiled) in spoils.into_iter().zip([2, 3]) {
        let (record, _) = record(part, spoil);
        if spoiled == last {
            assert_eq!(record.judgement.verdict, Verdict::Fail);
            assert_eq!(record.judgement.sentence, "not the same result each time");
            assert_eq!(
                record.judgement.details,
                ["rank 1: `dq` has other bits the last time than the first"]
            );
        } else {
            assert_eq!(record.judgement.verdict, Verdict::Pass, "{record:?}");
        }
    }
}

/// What stands at padding tokens may be another thing each time.
#[test]
fn out_at_padding_tokens_need_not_be_the_same_each_time() {
    let (record, asked) = record("padleft-again", |question, answers| {
        let (_, tensors) = answers.as_mut().unwrap()[0].as_mut().unwrap();
        let out = tensors.get_mut("out").unwrap();
        let mut values = out.to_f64();
        values[0] = question as f64;
        *out = Array::from_f64(out.dtype, &out.shape.clone(), &values);
    });
    let structure = Structure::of(&asked[0].parse().unwrap());
    assert!(structure.is_padding(0, 0));
    assert_eq!(record.judgement.verdict, Verdict::Pass, "{record:?}");
}

const PLAIN: &str = "attention/p2-b1-s12-hq4-hkv4-d8-causal-f32-gaussian-seed1";

fn verdicts(unclaimed: Feature, names: &[&str]) -> Vec<Verdict> {
    let refuse = |_, answers: &mut Answers| {
        *answers = Ok(vec![
            said(AnswerStatus::Error, "no"),
            said(AnswerStatus::Error, "no"),
        ]);
    };
    let mut fake = Fake {
        unclaimed: vec![unclaimed],
        asked: Vec::new(),
        spoil: refuse,
    };
    let names: Vec<_> = names
        .iter()
        .map(|parts| format!("{PLAIN}{parts}"))
        .collect();
    let records = records(&mut fake, &names);
    records
        .iter()
        .map(|record| record.judgement.verdict)
        .collect()
}

#[test]
fn one_case_steps_over_a_limit_and_none_asks_what_is_not_claimed() {
    use Verdict::{NotClaimed, Refused};
    assert_eq!(
        verdicts(Feature::Recompute, &["-recompute", "-recompute-fixed"]),
        [Refused, NotClaimed]
    );
    assert_eq!(
        verdicts(Feature::SlidingWindow, &["-window3", "-window4"]),
        [NotClaimed, NotClaimed]
    );
}

#[test]
fn only_one_good_question_steps_over_a_limit() {
    use Verdict::{NotClaimed, Refused};
    assert_eq!(
        verdicts(
            Feature::Recompute,
            &[
                "-window3-recompute-bad:window",
                "-recompute-again",
                "-recompute"
            ]
        ),
        [NotClaimed, NotClaimed, Refused]
    );
}

#[test]
fn bad_input_is_refused_by_who_claims_what_is_bad() {
    assert_eq!(
        verdicts(Feature::Recompute, &["-window3-bad:window", "-window3"]),
        [Verdict::Refused, Verdict::Fail]
    );
}
