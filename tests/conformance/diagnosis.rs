//! A wrong answer is called by the mistake that made it: factors, what is left
//! out, roundings, what has no numbers to compare, and what has no name.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

mod answers;
mod diagnosed;

use answers::{judged, ok, right, said, shards, spoiled};
use diagnosed::{SIZES, assert_named, diagnosed, judged_as, with};
use fixtures::exchange::AnswerStatus;
use fixtures::{Array, AttentionCase, Defect, Documents, Dtype, Inputs, Mask, Padding, Rotary};
use rstest::rstest;
use ulysses_conformance::diagnosis::Mistake;
use ulysses_conformance::implementation::{Collapse, Failure};
use ulysses_conformance::judge::{Cause, Due, Judgement, without_answer};
use ulysses_conformance::oracle::{Answer, attention};

#[rstest]
fn factors_of_the_number_of_ranks_are_told(#[values(0, 1, 2, 3, 4, 5)] size: usize) {
    let case: AttentionCase = SIZES[size].parse().unwrap();
    let ranks = case.world as f64;
    let scale = |numbers: &mut Vec<f64>, factor: f64| numbers.iter_mut().for_each(|x| *x *= factor);
    let diagnosis = diagnosed(spoiled(&case, |answer| {
        for gradient in [&mut answer.dq, &mut answer.dk, &mut answer.dv] {
            scale(gradient, 1.0 / ranks);
        }
    }));
    assert_named(&diagnosis, Mistake::GradientsOverRanks);
    let diagnosis = diagnosed(spoiled(&case, |answer| {
        for gradient in [&mut answer.dq, &mut answer.dk, &mut answer.dv] {
            scale(gradient, ranks);
        }
    }));
    assert_named(&diagnosis, Mistake::GradientsTimesRanks);
    let diagnosis = diagnosed(spoiled(&case, |answer| {
        for gradient in [&mut answer.dk, &mut answer.dv] {
            scale(gradient, 1.0 / ranks);
        }
    }));
    // With one KV head on all ranks, a mean over its replicas is the same.
    match case.kv_heads {
        1 => assert_named(&diagnosis, Mistake::ReplicasAveraged),
        _ => assert_named(&diagnosis, Mistake::KvGradientsOverRanks),
    }
}

#[rstest]
#[case::replicas(3, Mistake::ReplicasAveraged)]
#[case::key_zero(0, Mistake::GradientZero)]
fn factors_of_some_gradients_are_told(#[case] size: usize, #[case] mistake: Mistake) {
    let case: AttentionCase = SIZES[size].parse().unwrap();
    let factor = if mistake == Mistake::GradientZero {
        0.0
    } else {
        0.5
    };
    let diagnosis = diagnosed(spoiled(&case, |answer| {
        answer.dk.iter_mut().for_each(|x| *x *= factor);
        if mistake == Mistake::ReplicasAveraged {
            answer.dv.iter_mut().for_each(|x| *x *= factor);
        }
    }));
    assert_named(&diagnosis, mistake);
}

#[rstest]
fn swapped_gradients_are_told(#[values(0, 1, 2, 3, 4, 5)] size: usize) {
    let case: AttentionCase = SIZES[size].parse().unwrap();
    let diagnosis = diagnosed(spoiled(&case, |answer| {
        std::mem::swap(&mut answer.dk, &mut answer.dv);
    }));
    assert_named(&diagnosis, Mistake::KeyAndValueGradientSwapped);
}

type Alter = fn(&mut AttentionCase);

/// A mistake, what is asked, and what is answered in its place.
const LEFT_OUT: [(Mistake, Alter, Alter); 16] = [
    (Mistake::CausalIgnored, |_| (), |c| c.mask = Mask::Full),
    (
        Mistake::MaskDroppedInEval,
        |c| c.extras.eval = true,
        |c| c.mask = Mask::Full,
    ),
    (
        Mistake::WindowIgnored,
        |c| c.extras.window = Some(7),
        |c| c.extras.window = None,
    ),
    (
        Mistake::WindowOffByOne,
        |c| c.extras.window = Some(7),
        |c| c.extras.window = Some(8),
    ),
    (
        Mistake::WindowOffByOne,
        |c| c.extras.window = Some(7),
        |c| c.extras.window = Some(6),
    ),
    (
        Mistake::DocumentsIgnored,
        |c| c.extras.documents = Some(Documents::ByEnds(3)),
        |c| c.extras.documents = None,
    ),
    (
        Mistake::PaddingIgnored,
        |c| c.extras.padding = Some(Padding::Left),
        |c| c.extras.padding = None,
    ),
    (
        Mistake::LayoutIgnored,
        |c| c.extras.block = Some(9),
        |c| c.extras.block = None,
    ),
    (
        Mistake::SoftcapIgnored,
        |c| c.extras.softcap = Some(2),
        |c| c.extras.softcap = None,
    ),
    (
        Mistake::ScaleMissing,
        |_| (),
        |c| c.extras.scale = Some(100),
    ),
    (
        Mistake::ScaleIgnored,
        |c| c.extras.scale = Some(60),
        |c| c.extras.scale = None,
    ),
    (
        Mistake::SinksIgnored,
        |c| c.extras.sinks = true,
        |c| c.extras.sinks = false,
    ),
    (
        Mistake::SlopesIgnored,
        |c| c.extras.alibi = true,
        |c| c.extras.alibi = false,
    ),
    (
        Mistake::NormsIgnored,
        |c| c.extras.norms = true,
        |c| c.extras.norms = false,
    ),
    (
        Mistake::RotaryIgnored,
        |c| c.extras.rotary = Some(Rotary::Plain),
        |c| c.extras.rotary = None,
    ),
    (
        Mistake::FirstComponentOnly,
        |c| c.extras.rotary = Some(Rotary::Multimodal),
        |c| c.extras.rotary = Some(Rotary::Plain),
    ),
];

#[rstest]
fn what_is_left_out_is_told(#[values(0, 1, 2, 3, 4)] size: usize) {
    for (mistake, asked, answered) in LEFT_OUT {
        let case = with(size, asked);
        let mut other = case.clone();
        answered(&mut other);
        // What is left out of the question is left out of the inputs.
        let mut inputs = Inputs::of(&case);
        inputs
            .head_state
            .retain(|input, _| input.is_present(&other));
        let answer = attention(&other, &inputs).unwrap();
        assert_named(&judged_as(&case, answer), mistake);
    }
}

#[test]
fn coarse_numbers_are_told() {
    let case: AttentionCase = SIZES[0].parse().unwrap();
    let coarse = |numbers: &mut Vec<f64>| {
        *numbers = Array::from_f64(Dtype::Bf16, &[numbers.len()], numbers).to_f64();
    };
    let of_all = |answer: &mut Answer<Vec<f64>>| {
        for numbers in [
            &mut answer.out,
            &mut answer.dq,
            &mut answer.dk,
            &mut answer.dv,
        ] {
            coarse(numbers);
        }
    };
    assert_named(&diagnosed(spoiled(&case, of_all)), Mistake::ExchangeInBf16);
    let of_gradients = |answer: &mut Answer<Vec<f64>>| {
        for numbers in [&mut answer.dq, &mut answer.dk, &mut answer.dv] {
            coarse(numbers);
        }
    };
    assert_named(
        &diagnosed(spoiled(&case, of_gradients)),
        Mistake::GradientsInBf16,
    );
}

#[test]
fn one_wrong_number_among_many_is_not_taken_for_a_rounding() {
    let name = "attention/p3-b2-s60-hq12-hkv6-d16-causal-bf16-peaked-seed5";
    let case: AttentionCase = name.parse().unwrap();
    let diagnosis = diagnosed(spoiled(&case, |answer| answer.out[0] += 1.0));
    assert_eq!(diagnosis.mistake, None, "{diagnosis:?}");
    let said = "out is wrong in head 0 alone";
    assert!(diagnosis.sentence.contains(said), "{diagnosis:?}");
}

#[test]
fn a_factor_that_nobody_knows_is_told_by_its_number() {
    let case: AttentionCase = SIZES[4].parse().unwrap();
    let diagnosis = diagnosed(spoiled(&case, |answer| {
        answer.dq.iter_mut().for_each(|x| *x *= 0.7);
    }));
    assert_eq!(diagnosis.mistake, None, "{diagnosis:?}");
    let told = "dq is wrong, out, dk and dv are right. dq is 0.7000 times the right one.";
    assert_eq!(diagnosis.sentence, told);
}

/// Numbers in no order, different each time that it is asked for one.
fn noise(i: usize) -> f64 {
    ((i * 7919 + 13) % 1009) as f64 / 504.5 - 1.0
}

#[test]
fn noise_on_a_head_has_no_name_but_a_place() {
    let case: AttentionCase = SIZES[4].parse().unwrap();
    let diagnosis = diagnosed(spoiled(&case, |answer| {
        for (i, row) in answer.dk.chunks_mut(case.head_size).enumerate() {
            if i % case.kv_heads == 2 {
                let numbers = row.iter_mut().enumerate();
                numbers.for_each(|(j, x)| *x = noise(i * case.head_size + j));
            }
        }
    }));
    assert_eq!(diagnosis.mistake, None, "{diagnosis:?}");
    assert!(diagnosis.confidence < 0.5);
    let told = "dk is wrong in KV head 2 alone, out, dq and dv are right.";
    assert_eq!(diagnosis.sentence, told);
    assert_eq!(
        diagnosis.strip,
        [
            "a column for each head: . right, x wrong, 0 wrong and all zero",
            "rank 0  dk ..x.",
            "rank 1  dk ..x.",
            "rank 2  dk ..x.",
            "rank 3  dk ..x.",
        ]
    );
}

#[test]
fn a_strip_shows_which_heads_of_which_rank_are_zero() {
    let case: AttentionCase = SIZES[0].parse().unwrap();
    let diagnosis = diagnosed(spoiled(&case, |answer| {
        for (i, row) in answer.out.chunks_mut(case.head_size).enumerate() {
            let (token, head) = (i / case.query_heads % case.sequence, i % case.query_heads);
            if token < case.sequence / 2 && head > 1 {
                row.fill(0.0);
            }
        }
        answer.dv.iter_mut().for_each(|x| *x += 1.0);
    }));
    assert_eq!(
        diagnosis.strip[1..],
        ["rank 0  out ..00  dv xxxx", "rank 1  out ....  dv xxxx"]
    );
}

#[test]
fn what_has_no_numbers_to_compare_is_named_too() {
    let case: AttentionCase = SIZES[0].parse().unwrap();
    let name = |judgement: Judgement| judgement.diagnosis.unwrap().mistake.unwrap();
    let said = |status, message| said(status, message);
    let refused = || {
        vec![
            said(AnswerStatus::Error, "no"),
            said(AnswerStatus::Error, "no"),
        ]
    };
    let answers = || ok(shards(&case, &right(&case)));
    let bad = Due::Refusal(Cause::BadInput(Defect::Heads.name()));
    assert_eq!(
        name(judged(&case, Due::Answer, refused())),
        Mistake::GoodInputRefused
    );
    assert_eq!(name(judged(&case, bad, answers())), Mistake::BadInputTaken);
    let wordless = vec![said(AnswerStatus::Error, ""), said(AnswerStatus::Error, "")];
    assert_eq!(
        name(judged(&case, bad, wordless)),
        Mistake::RefusedWithoutWords
    );
    let mut mixed = answers();
    mixed[1] = said(AnswerStatus::Error, "no");
    assert_eq!(
        name(judged(&case, Due::Answer, mixed)),
        Mistake::OneRankRefuses
    );
    let mut without = shards(&case, &right(&case));
    without[0].remove("dv");
    assert_eq!(
        name(judged(&case, Due::Answer, ok(without))),
        Mistake::WrongShape
    );
    let collapse = || Collapse {
        sentence: String::new(),
        logs: Vec::new(),
        is_of_ranks: true,
    };
    let named = |failure| name(without_answer(failure).unwrap());
    assert_eq!(named(Failure::Crashed(collapse())), Mistake::RankDies);
    assert_eq!(named(Failure::Hung(collapse())), Mistake::RankStaysAway);
    let eval = with(0, |case| case.extras.eval = true);
    let mut sends = ok(shards(&eval, &right(&eval)));
    sends[0].as_mut().unwrap().0.bytes_sent = Some(8);
    assert_eq!(
        name(judged(&eval, Due::Answer, sends)),
        Mistake::SendsInEval
    );
}

#[test]
fn what_has_no_name_is_told_in_a_sentence() {
    let case = with(4, |case| case.mask = Mask::Full);
    let mut masked = case.clone();
    masked.mask = Mask::Causal;
    let answer = attention(&masked, &Inputs::of(&case)).unwrap();
    let diagnosis = judged_as(&case, answer);
    assert_eq!(diagnosis.mistake, None, "{diagnosis:?}");
    assert!(
        diagnosis
            .sentence
            .contains("a causal mask, and none is due")
    );
    let case: AttentionCase = SIZES[4].parse().unwrap();
    let mut hot = case.clone();
    // A quarter, times the number of ranks.
    hot.extras.scale = Some(100);
    let answer = attention(&hot, &Inputs::of(&case)).unwrap();
    assert_named(&judged_as(&case, answer), Mistake::ScaleMissing);
    hot.extras.scale = Some(50);
    let answer = attention(&hot, &Inputs::of(&case)).unwrap();
    let diagnosis = judged_as(&case, answer);
    let told = "Scores are multiplied by 0.5000, where 0.2500 is due.";
    assert_eq!((diagnosis.mistake, &*diagnosis.sentence), (None, told));
}
