//! What a case asks beyond plain attention is judged: an answer that ignores it
//! fails, and the rank and place of what is wrong are told.
#![allow(missing_docs, clippy::unwrap_used)]

mod answers;

use answers::{info, judged, ok, right, said, shards, spoiled};
use fixtures::exchange::AnswerStatus;
use fixtures::{AttentionCase, Defect, Extras, Inputs, Structure};
use rstest::rstest;
use ulysses_conformance::judge::{Cause, Due, Judgement, Place, Verdict};
use ulysses_conformance::oracle::{Answer, AnswerTensor, attention};

fn case(parts: &str) -> AttentionCase {
    format!("attention/p2-b2-s36-hq4-hkv2-d16-{parts}")
        .parse()
        .unwrap()
}

#[rstest]
#[case("causal-f32-gaussian-seed1-dv8")]
#[case("full-f32-gaussian-seed1-cross20")]
#[case("causal-f16-gaussian-seed1-zigzag")]
#[case("causal-bf16-gaussian-seed1-striped-window5")]
#[case("full-f32-gaussian-seed1-eval")]
#[case("full-bf16-gaussian-seed1-docs4")]
#[case("causal-f32-gaussian-seed1-ends4")]
#[case("causal-bf16-gaussian-seed1-padleft")]
#[case("full-f32-gaussian-seed1-padright-blocks4")]
#[case("causal-bf16-gaussian-seed1-alibi")]
#[case("causal-f16-gaussian-seed1-sinks")]
#[case("full-f32-gaussian-seed1-norms")]
#[case("causal-bf16-gaussian-seed1-norms-rope")]
#[case("causal-f64-gaussian-seed1-mrope")]
#[case("full-bf16-gaussian-seed1-softcap3-scale50")]
#[case("causal-f32-gaussian-seed1-padleft-alibi-sinks-norms")]
#[case("causal-bf16-gaussian-seed1-transposed-recompute-fixed-debug3")]
fn the_oracles_answer_rounded_once_passes(#[case] parts: &str) {
    let judgement = spoiled(&case(parts), |_| {});
    assert_eq!(judgement.verdict, Verdict::Pass, "{judgement:?}");
    assert_eq!(judgement.sentence, "");
}

/// With fewer tokens than ranks.
#[test]
fn a_rank_without_a_token_gives_tensors_without_a_row() {
    for parts in ["", "-zigzag-norms", "-striped-alibi"] {
        let name = format!("attention/p5-b2-s3-hq5-hkv5-d8-causal-f32-gaussian-seed1{parts}");
        let case: AttentionCase = name.parse().unwrap();
        let answers = shards(&case, &right(&case));
        assert!(answers.iter().any(|rank| rank["dq"].shape == [2, 0, 5, 8]));
        let judgement = judged(&case, Due::Answer, ok(answers));
        assert_eq!(judgement.verdict, Verdict::Pass, "{judgement:?}");
    }
}

/// Judges what is right of `case` but for some of its extras.
fn ignoring(case: &AttentionCase, ignore: fn(&mut Extras)) -> Judgement {
    let mut plainer = case.clone();
    ignore(&mut plainer.extras);
    let mut inputs = Inputs::of(case);
    inputs
        .head_state
        .retain(|input, _| input.is_present(&plainer));
    let mut answer = attention(&plainer, &inputs).unwrap();
    answer.head_state = right(case).head_state;
    judged(case, Due::Answer, ok(shards(case, &answer)))
}

#[rstest]
#[case::window("causal", "window30", |e: &mut Extras| e.window = None)]
#[case::window_full("full", "window30", |e: &mut Extras| e.window = None)]
#[case::documents("causal", "docs2", |e: &mut Extras| e.documents = None)]
#[case::ends("full", "ends2", |e: &mut Extras| e.documents = None)]
#[case::padding_left("causal", "padleft", |e: &mut Extras| e.padding = None)]
#[case::padding_right("full", "padright", |e: &mut Extras| e.padding = None)]
#[case::blocks("causal", "blocks16", |e: &mut Extras| e.block = None)]
#[case::alibi("causal", "alibi", |e: &mut Extras| e.alibi = false)]
#[case::sinks("causal", "sinks", |e: &mut Extras| e.sinks = false)]
#[case::norms("causal", "norms", |e: &mut Extras| e.norms = false)]
#[case::rope("causal", "rope", |e: &mut Extras| e.rotary = None)]
#[case::mrope("causal", "mrope", |e: &mut Extras| e.rotary = Some(fixtures::Rotary::Plain))]
#[case::softcap("full", "softcap3", |e: &mut Extras| e.softcap = None)]
#[case::scale("full", "scale27", |e: &mut Extras| e.scale = None)]
fn an_answer_that_ignores_an_extra_fails(
    #[case] mask: &str,
    #[case] part: &str,
    #[case] ignore: fn(&mut Extras),
    #[values("f32", "bf16")] dtype: &str,
) {
    let case = case(&format!("{mask}-{dtype}-gaussian-seed1-{part}"));
    let judgement = ignoring(&case, ignore);
    assert_eq!(judgement.verdict, Verdict::Fail, "{judgement:?}");
    assert!(judgement.sentence.starts_with("out"), "{judgement:?}");
}

#[rstest]
#[case::slopes("alibi", AnswerTensor::SlopesGradient)]
#[case::sinks("sinks", AnswerTensor::SinksGradient)]
#[case::query_norm("norms", AnswerTensor::QueryNormGradient)]
#[case::key_norm("norms", AnswerTensor::KeyNormGradient)]
fn a_wrong_gradient_of_head_state_fails(
    #[case] part: &str,
    #[case] tensor: AnswerTensor,
    #[values("f32", "bf16")] dtype: &str,
    #[values(0.5, -1.0, 2.0)] factor: f64,
) {
    let case = case(&format!("causal-{dtype}-gaussian-seed1-{part}"));
    let judgement = spoiled(&case, |answer| {
        let channels = match tensor.shape(&case)[..] {
            [_, channels] => channels,
            _ => 1,
        };
        for (name, values) in &mut answer.head_state {
            if *name == tensor {
                // The last head's.
                values
                    .iter_mut()
                    .rev()
                    .take(channels)
                    .for_each(|x| *x *= factor);
            }
        }
    });
    assert_eq!(judgement.verdict, Verdict::Fail);
    assert_eq!(judgement.sentence, format!("{} is wrong", tensor.name()));
    let comparison = judgement.comparison.unwrap();
    let comparison = comparison.of(tensor).unwrap();
    assert_eq!(comparison.wrong_rows, 1);
    let heads = tensor.shape(&case)[0];
    assert_eq!(
        comparison.worst.as_ref().unwrap().place,
        Place::Head(heads - 1)
    );
}

/// A rank that gives the whole sum, not its part.
#[rstest]
#[case::norms("full-f32-gaussian-seed1-norms", "dq_norm", "dq_norm is wrong")]
#[case::cross("full-f32-gaussian-seed1-cross20", "dk", "dk is wrong")]
fn a_gradient_that_every_rank_gives_whole_is_too_large(
    #[case] parts: &str,
    #[case] name: &str,
    #[case] sentence: &str,
) {
    let case = case(parts);
    let mut ranks = shards(&case, &right(&case));
    for tensors in &mut ranks {
        let part = tensors.get_mut(name).unwrap();
        let doubled: Vec<f64> = part.to_f64().iter().map(|x| 2.0 * x).collect();
        *part = fixtures::Array::from_f64(part.dtype, &part.shape, &doubled);
    }
    let judgement = judged(&case, Due::Answer, ok(ranks));
    assert_eq!(judgement.verdict, Verdict::Fail);
    assert_eq!(judgement.sentence, sentence);
    assert!(
        judgement.details[0].contains("it is 2.000 times"),
        "{judgement:?}"
    );
}

#[test]
fn every_rank_gives_every_gradient_of_head_state() {
    let case = case("full-f32-gaussian-seed1-norms");
    let mut ranks = shards(&case, &right(&case));
    ranks[1].remove("dk_norm");
    let judgement = judged(&case, Due::Answer, ok(ranks.clone()));
    assert_eq!(
        judgement.sentence,
        "rank 1: the tensor `dk_norm` is missing"
    );
    ranks[1] = ranks[0].clone();
    ranks[1].get_mut("dk_norm").unwrap().shape = vec![16, 2];
    let judgement = judged(&case, Due::Answer, ok(ranks));
    assert_eq!(
        judgement.sentence,
        "rank 1: `dk_norm` is f32 [16, 2], due is f32 [2, 16] [heads, head size]"
    );
}

#[test]
fn the_shape_that_is_due_has_the_value_size() {
    let case = case("full-f32-gaussian-seed1-dv8");
    let mut ranks = shards(&case, &right(&case));
    ranks[0].get_mut("out").unwrap().shape = vec![2, 18, 2, 16];
    let judgement = judged(&case, Due::Answer, ok(ranks));
    assert_eq!(
        judgement.sentence,
        "rank 0: `out` is f32 [2, 18, 2, 16], due is f32 [2, 18, 4, 8] \
         [batch, tokens, heads, value size]"
    );
}

/// Zeros of `out` at a token.
fn without_token(case: &AttentionCase, answer: &mut Answer<Vec<f64>>, batch: usize, token: usize) {
    let row = case.query_heads * case.value_size();
    let first = (batch * case.sequence + token) * row;
    answer.out[first..first + row].fill(0.0);
}

#[rstest]
#[case::contiguous("", 20, "rank 1, its token 2")]
#[case::zigzag("-zigzag", 20, "rank 1, its token 11")]
#[case::zigzag_back("-zigzag", 27, "rank 0, its token 9")]
#[case::striped("-striped", 21, "rank 1, its token 10")]
fn a_wrong_row_is_told_by_the_rank_that_holds_it(
    #[case] sharding: &str,
    #[case] token: usize,
    #[case] place: &str,
) {
    let case = case(&format!("causal-f32-gaussian-seed1{sharding}"));
    let judgement = spoiled(&case, |answer| without_token(&case, answer, 1, token));
    assert_eq!(judgement.verdict, Verdict::Fail);
    let told = &judgement.details[1];
    assert!(told.contains(&format!("token {token} ({place})")), "{told}");
}

#[test]
fn out_at_padding_tokens_is_nobodys_business_and_gradients_there_are_zero() {
    for dtype in ["f32", "bf16"] {
        let case = case(&format!("causal-{dtype}-gaussian-seed1-padleft"));
        let real = Structure::of(&case).real_tokens(1);
        assert!(real.start > 0);
        let row = case.query_heads * case.head_size;
        let padding = case.sequence * row..(case.sequence + real.start) * row;
        for value in [9.0, f64::NAN] {
            let judgement = spoiled(&case, |answer| answer.out[padding.clone()].fill(value));
            assert_eq!(judgement.verdict, Verdict::Pass, "{judgement:?}");
        }
        let judgement = spoiled(&case, |answer| answer.dq[padding.clone()].fill(0.5));
        assert_eq!(judgement.sentence, "dq is wrong");
        let behind = padding.end..padding.end + row;
        let judgement = spoiled(&case, |answer| answer.out[behind.clone()].fill(0.0));
        assert_eq!(judgement.sentence, "out is wrong");
    }
}

#[test]
fn outside_training_every_ranks_answer_counts() {
    let case = case("causal-f32-gaussian-seed1-eval");
    let mut ranks = shards(&case, &right(&case));
    let mut other = right(&case);
    other.dq.iter_mut().for_each(|x| *x *= 2.0);
    ranks[1] = shards(&case, &other)[1].clone();
    let judgement = judged(&case, Due::Answer, ok(ranks));
    assert_eq!(judgement.verdict, Verdict::Fail);
    assert_eq!(judgement.sentence, "rank 1: dq is wrong");
    assert!(!judgement.details[1].contains("(rank"), "{judgement:?}");
}

#[test]
fn outside_training_nothing_is_sent() {
    for (parts, sentence) in [
        (
            "full-f32-gaussian-seed1-eval",
            "outside training rank 1 sent 8 bytes",
        ),
        ("full-f32-gaussian-seed1", ""),
    ] {
        let case = case(parts);
        let mut answers = ok(shards(&case, &right(&case)));
        for (answer, bytes) in answers.iter_mut().zip([0, 8]) {
            answer.as_mut().unwrap().0.bytes_sent = Some(bytes);
        }
        let judgement = judged(&case, Due::Answer, answers);
        assert_eq!(judgement.sentence, sentence);
        assert_eq!(judgement.verdict == Verdict::Fail, !sentence.is_empty());
    }
}

#[test]
fn bad_input_is_refused_in_words_by_every_rank() {
    let case = case("causal-f32-gaussian-seed1-window5-bad:window");
    let due = Due::Refusal(Cause::BadInput(Defect::Window.name()));
    let of = |status, message| said(status, message);
    let judge = |first, second| {
        let judgement = judged(&case, due, vec![first, second]);
        (judgement.verdict, judgement.sentence)
    };
    let error = AnswerStatus::Error;
    let taken = || {
        Ok((
            info(AnswerStatus::Ok, ""),
            shards(&case, &right(&case))[0].clone(),
        ))
    };
    assert_eq!(
        judge(of(error, "window is 0"), of(error, "window is 0")),
        (Verdict::Refused, "rank 0: window is 0".to_owned())
    );
    assert_eq!(
        judge(of(error, "window is 0"), of(error, " ")),
        (Verdict::Fail, "rank 1 refused without a word".to_owned())
    );
    assert_eq!(
        judge(taken(), taken()),
        (Verdict::Fail, "takes bad window without a word".to_owned())
    );
    assert_eq!(
        judge(of(error, "window is 0"), taken()),
        (
            Verdict::Fail,
            "some ranks answered and others raised an error".to_owned()
        )
    );
}
