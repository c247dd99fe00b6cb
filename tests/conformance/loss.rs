//! The judge of the profile `loss`: what it holds to be right is what a plain
//! formula says, and what is wrong it fails and names.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;

use approx::assert_relative_eq;
use fixtures::exchange::{AnswerInfo, AnswerStatus, Declared, Parameters, Tensors, Upstream};
use fixtures::loss::IGNORE_INDEX;
use fixtures::{Array, Case, Dtype, LossCase};
use rstest::rstest;
use ulysses_conformance::diagnosis::Mistake;
use ulysses_conformance::implementation::RankAnswer;
use ulysses_conformance::judge::{self, Due, Judgement, Question, Verdict, lambda, right_answer};
use ulysses_conformance::runner::Asked;

/// Ranks have other numbers of labels, and every mistake changes something.
const NAME: &str = "loss/p3-b1-s24-v5-f32-seed1-hidden4-ignoresome-dloss25";

/// Shape and numbers of each tensor of a rank, by name.
type Numbers = BTreeMap<String, (Vec<usize>, Vec<f64>)>;

/// Loss and gradients of one token, before they are weighted.
struct Token {
    rank: usize,
    label: Option<usize>,
    hidden: Vec<f64>,
    logits: Vec<f64>,
    loss: f64,
    /// The softmax of the logits.
    weights: Vec<f64>,
}

/// All tokens, row by row, on one rank.
fn tokens(case: &LossCase) -> Vec<Token> {
    let inputs = case.inputs();
    let (states, shards) = (inputs.states.to_f64(), case.shards());
    let channels = inputs.states.shape[2];
    let head = head(case);
    let token = |(place, row): (usize, &[f64])| {
        let holds = |token: usize| shards.iter().position(|s| s.position(token).is_some());
        let logits: Vec<f64> = match &head {
            Some(head) => head.iter().map(|class| dot(class, row)).collect(),
            None => row.to_vec(),
        };
        let largest = logits.iter().copied().fold(f64::MIN, f64::max);
        let total: f64 = logits.iter().map(|z| (z - largest).exp()).sum();
        let label = inputs.labels[place];
        let label = (label != IGNORE_INDEX).then_some(label as usize);
        Token {
            rank: holds(place % case.sequence).unwrap(),
            label,
            hidden: row.to_vec(),
            loss: label.map_or(0.0, |y| total.ln() + largest - logits[y]),
            weights: logits.iter().map(|z| (z - largest).exp() / total).collect(),
            logits,
        }
    };
    states.chunks(channels).enumerate().map(token).collect()
}

/// A row of channels for each class.
fn head(case: &LossCase) -> Option<Vec<Vec<f64>>> {
    let head = case.inputs().head?;
    Some(
        head.to_f64()
            .chunks(head.shape[1])
            .map(<[f64]>::to_vec)
            .collect(),
    )
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

impl Token {
    /// The gradient for its logits.
    fn gradient(&self) -> Vec<f64> {
        let Some(label) = self.label else {
            return vec![0.0; self.weights.len()];
        };
        let one = |class: usize| f64::from(u8::from(class == label));
        let weights = self.weights.iter().enumerate();
        weights.map(|(class, p)| p - one(class)).collect()
    }
}

/// What each rank answers where its loss is this and its tokens' gradients are
/// multiplied by that; before it is rounded.
fn answered(case: &LossCase, losses: &[f64], factors: &[f64]) -> Vec<Numbers> {
    let (tokens, head) = (tokens(case), head(case));
    let ranks = case.shards().into_iter().enumerate();
    let ranks = ranks.map(|(rank, shard)| {
        let channels = tokens[0].hidden.len();
        let (mut of_states, mut of_head) = (Vec::new(), vec![0.0; case.vocabulary * channels]);
        for token in tokens.iter().filter(|token| token.rank == rank) {
            let gradient: Vec<f64> = token.gradient().iter().map(|g| g * factors[rank]).collect();
            let Some(head) = &head else {
                of_states.extend(gradient);
                continue;
            };
            for channel in 0..channels {
                let column: Vec<f64> = head.iter().map(|class| class[channel]).collect();
                of_states.push(dot(&column, &gradient));
                for (class, g) in gradient.iter().enumerate() {
                    of_head[class * channels + channel] += g * token.hidden[channel];
                }
            }
        }
        let shape = vec![case.batch, shard.len(), channels];
        let mut answer = BTreeMap::from([
            ("loss".to_owned(), (vec![], vec![losses[rank]])),
            (format!("d{}", case.states_name()), (shape, of_states)),
        ]);
        if head.is_some() {
            let shape = vec![case.vocabulary, channels];
            answer.insert("dhead".to_owned(), (shape, of_head));
        }
        answer
    });
    ranks.collect()
}

/// The number of labels and the sum of the losses of each rank.
fn sums(case: &LossCase) -> Vec<(f64, f64)> {
    let tokens = tokens(case);
    let of = |rank| {
        let own = tokens.iter().filter(|token| token.rank == rank);
        own.fold((0.0, 0.0), |(count, sum), token| {
            (
                count + f64::from(u8::from(token.label.is_some())),
                sum + token.loss,
            )
        })
    };
    (0..case.world).map(of).collect()
}

/// The one loss, and by what each token's gradient is multiplied.
fn one_loss(case: &LossCase) -> (f64, f64) {
    let sums = sums(case);
    let count: f64 = sums.iter().map(|(count, _)| count).sum();
    let sum: f64 = sums.iter().map(|(_, sum)| sum).sum();
    let cotangent = case.inputs().cotangent;
    match count > 0.0 {
        true => (sum / count, cotangent / count),
        false => (0.0, 0.0),
    }
}

fn right(case: &LossCase) -> Vec<Numbers> {
    let (loss, factor) = one_loss(case);
    answered(case, &vec![loss; case.world], &vec![factor; case.world])
}

fn rounded(case: &LossCase, answer: &[Numbers]) -> Vec<Tensors> {
    let array = |name: &str, (shape, numbers): &(Vec<usize>, Vec<f64>)| match name {
        "loss" => Array::from_f64(case.loss_dtype(), shape, numbers),
        _ => Array::from_f64(case.dtype, shape, numbers),
    };
    let rank = |tensors: &BTreeMap<String, _>| {
        let tensors = tensors.iter();
        tensors
            .map(|(name, tensor)| (name.clone(), array(name, tensor)))
            .collect()
    };
    answer.iter().map(rank).collect()
}

fn judged(case: &LossCase, ranks: Vec<Tensors>) -> Judgement {
    judged_by(Declared::default(), case, ranks)
}

fn judged_by(declared: Declared, case: &LossCase, ranks: Vec<Tensors>) -> Judgement {
    let info = AnswerInfo {
        status: AnswerStatus::Ok,
        message: String::new(),
        elapsed_s: 0.0,
        peak_memory_bytes: None,
        bytes_sent: None,
    };
    let answers: Vec<RankAnswer> = ranks.into_iter().map(|t| Ok((info.clone(), t))).collect();
    let question = Question::of(&Case::from(case.clone()), declared);
    judge::judge(&question, declared, Due::Answer, &answers)
}

fn case(name: &str) -> LossCase {
    name.parse().unwrap()
}

/// What the judge holds to be right, and how far it may be off.
fn due(case: &LossCase) -> BTreeMap<String, Vec<f64>> {
    let declared = Declared::default();
    let asked = Asked {
        question: Question::of(&Case::from(case.clone()), declared),
        answers: Vec::new(),
    };
    let due = right_answer(&asked, declared).unwrap();
    due.iter()
        .map(|(name, array)| (name.clone(), array.to_f64()))
        .collect()
}

#[rstest]
#[case::plain("loss/p2-b1-s6-v5-f64-seed1")]
#[case::ignored("loss/p3-b2-s7-v5-f32-seed1-ignorerank-dloss25")]
#[case::none("loss/p2-b1-s6-v5-f64-seed1-hidden3-ignoreall")]
#[case::empty_rank("loss/p4-b2-s2-v5-bf16-seed1-dloss300")]
#[case::large("loss/p2-b1-s6-v5-f64-seed1-large")]
#[case::hidden(NAME)]
fn what_is_due_is_what_the_formula_says(#[case] name: &str) {
    let case = case(name);
    let due = due(&case);
    let answer = right(&case);
    for (rank, tensors) in answer.iter().enumerate() {
        for (name, (_, numbers)) in tensors.iter().filter(|(name, _)| *name != "dhead") {
            let due = &due[&format!("{name}.rank-{rank}")];
            assert_eq!(due.len(), numbers.len());
            for (due, number) in due.iter().zip(numbers) {
                assert_relative_eq!(due, number, max_relative = 1e-12, epsilon = 1e-14);
            }
        }
    }
    for (place, due) in due.get("dhead").into_iter().flatten().enumerate() {
        let sum: f64 = answer.iter().map(|tensors| tensors["dhead"].1[place]).sum();
        assert_relative_eq!(*due, sum, max_relative = 1e-12, epsilon = 1e-14);
    }
    assert_eq!(due.contains_key("dhead"), case.hidden.is_some());
}

#[rstest]
fn a_right_answer_is_right(
    #[values("f64", "f32", "bf16", "f16")] dtype: &str,
    #[values("", "-large", "-ignoreall", "-hidden4-ignorerank", "-hidden4-dloss300")] parts: &str,
) {
    let case = case(&format!("loss/p3-b2-s8-v5-{dtype}-seed1{parts}"));
    let judgement = judged(&case, rounded(&case, &right(&case)));
    assert!(judgement.verdict.is_right(), "{judgement:?}");
}

/// What each rank says the loss is, and by what it multiplies its gradients.
fn mistaken(case: &LossCase, mistake: Mistake) -> (Vec<f64>, Vec<f64>) {
    let (world, sums) = (case.world as f64, sums(case));
    let (loss, factor) = one_loss(case);
    let cotangent = case.inputs().cotangent;
    let all = |(loss, factor)| (vec![loss; case.world], vec![factor; case.world]);
    let own = |over: f64| {
        sums.iter()
            .map(move |(count, _)| cotangent / count / over)
            .collect()
    };
    let means: Vec<f64> = sums.iter().map(|(count, sum)| sum / count).collect();
    match mistake {
        Mistake::MeanOfRankMeans => {
            let mean = means.iter().sum::<f64>() / world;
            (vec![mean; case.world], own(world))
        }
        Mistake::OwnTokensOnly => (means, own(1.0)),
        Mistake::IgnoredCounted => {
            let valid: f64 = sums.iter().map(|(count, _)| count).sum();
            let share = valid / (case.batch * case.sequence) as f64;
            all((loss * share, factor * share))
        }
        Mistake::CotangentIgnored => all((loss, factor / cotangent)),
        Mistake::GradientsOverRanks => all((loss, factor / world)),
        Mistake::GradientsTimesRanks => all((loss, factor * world)),
        _ => all((loss, factor)),
    }
}

#[rstest]
fn a_wrong_answer_fails_by_its_name(
    #[values(
        Mistake::MeanOfRankMeans,
        Mistake::OwnTokensOnly,
        Mistake::IgnoredCounted,
        Mistake::CotangentIgnored,
        Mistake::HeadOfOneRank,
        Mistake::GradientsOverRanks,
        Mistake::GradientsTimesRanks
    )]
    mistake: Mistake,
    #[values("f64", "f32", "bf16", "f16")] dtype: &str,
) {
    let case = case(&NAME.replace("f32", dtype));
    let (losses, factors) = mistaken(&case, mistake);
    let mut answer = answered(&case, &losses, &factors);
    if mistake == Mistake::HeadOfOneRank {
        for rank in &mut answer[1..] {
            rank.get_mut("dhead").unwrap().1.fill(0.0);
        }
    }
    let judgement = judged(&case, rounded(&case, &answer));
    assert_eq!(judgement.verdict, Verdict::Fail, "{judgement:?}");
    assert_eq!(judgement.diagnosis.unwrap().mistake, Some(mistake));
}

/// Of the one loss of P ranks: by what an honest implementation multiplies the
/// gradients of tokens, and its parts of the head's.
#[rstest]
#[case(Upstream::Share, Parameters::Sum, 1.0, 1.0)]
#[case(Upstream::Share, Parameters::Average, 1.0, 3.0)]
#[case(Upstream::TimesRanks, Parameters::Sum, 3.0, 1.0)]
#[case(Upstream::TimesRanks, Parameters::Average, 3.0, 3.0)]
fn gradients_are_judged_by_the_convention_that_is_declared(
    #[case] upstream: Upstream,
    #[case] parameters: Parameters,
    #[case] of_tokens: f64,
    #[case] of_parts: f64,
) {
    let case = case(NAME);
    let mut answer = right(&case);
    for rank in &mut answer {
        for (name, factor) in [("dhidden", of_tokens), ("dhead", of_parts)] {
            rank.get_mut(name)
                .unwrap()
                .1
                .iter_mut()
                .for_each(|x| *x *= factor);
        }
    }
    for (u, p) in [
        (Upstream::Share, Parameters::Sum),
        (Upstream::Share, Parameters::Average),
        (Upstream::TimesRanks, Parameters::Sum),
        (Upstream::TimesRanks, Parameters::Average),
    ] {
        let declared = Declared {
            upstream: u,
            parameters: p,
            ..Declared::default()
        };
        let judgement = judged_by(declared, &case, rounded(&case, &answer));
        let is_right = judgement.verdict.is_right();
        assert_eq!(is_right, (u, p) == (upstream, parameters), "{judgement:?}");
    }
}

#[rstest]
#[case::loss("loss", 2)]
#[case::hidden("dhidden", 1)]
#[case::head("dhead", 0)]
fn one_number_that_is_wrong_or_none_is_seen(#[case] name: &str, #[case] rank: usize) {
    let case = case(NAME);
    let spoiled = |by: fn(f64) -> f64| {
        let mut answer = right(&case);
        let number = &mut answer[rank].get_mut(name).unwrap().1[0];
        *number = by(*number);
        judged(&case, rounded(&case, &answer))
    };
    let wrong = spoiled(|x| x + 0.01);
    assert_eq!(wrong.verdict, Verdict::Fail);
    assert!(wrong.sentence.contains(name), "{}", wrong.sentence);
    assert_eq!(wrong.diagnosis.and_then(|d| d.mistake), None);
    let nan = spoiled(|_| f64::NAN);
    assert_eq!(nan.verdict, Verdict::Fail);
    assert_eq!(nan.diagnosis.unwrap().mistake, Some(Mistake::NotANumber));
}

#[test]
fn what_has_another_shape_or_type_or_is_missing_is_told() {
    // The loss of half types is float32.
    let case = case("loss/p2-b1-s6-v5-bf16-seed1");
    let (loss, dlogits) = ("loss".to_owned(), "dlogits".to_owned());
    let told = |name: &String, array: Option<Array>| {
        let mut ranks = rounded(&case, &right(&case));
        ranks[1].remove(name);
        ranks[1].extend(array.map(|array| (name.clone(), array)));
        let judgement = judged(&case, ranks);
        assert_eq!(judgement.verdict, Verdict::Fail);
        let mistake = judgement.diagnosis.unwrap().mistake;
        assert_eq!(mistake, Some(Mistake::WrongShape));
        judgement.sentence
    };
    let zeros = |dtype, shape: &[usize]| {
        Some(Array::from_f64(
            dtype,
            shape,
            &vec![0.0; shape.iter().product()],
        ))
    };
    assert_eq!(
        told(&loss, zeros(Dtype::Bf16, &[])),
        "rank 1: `loss` is bf16 [], due is f32 []"
    );
    assert_eq!(
        told(&loss, zeros(Dtype::F32, &[1])),
        "rank 1: `loss` is f32 [1], due is f32 []"
    );
    assert_eq!(
        told(&dlogits, zeros(Dtype::Bf16, &[1, 2, 5])),
        "rank 1: `dlogits` is bf16 [1, 2, 5], due is bf16 [1, 3, 5]"
    );
    assert_eq!(told(&loss, None), "rank 1: the tensor `loss` is missing");
}

#[test]
fn a_case_in_which_a_factor_would_not_be_seen_is_unclear() {
    let case = case("loss/p1-b1-s2-v2-bf16-seed0-hidden2-large");
    let judgement = judged(&case, rounded(&case, &right(&case)));
    assert_eq!(judgement.verdict, Verdict::Unclear, "{judgement:?}");
    let sentence = "the case has no power: a factor of 1.25 in ";
    assert!(judgement.sentence.starts_with(sentence), "{judgement:?}");
}

/// By how much a root is larger than its estimate from 64 runs, so that it is
/// as seldom too small as a right number is called wrong:
/// `32 (ln x + 1 - x) = ln(1e-6 / 2^30)` has the solution 0.14406.
const LARGER: f64 = 2.6346;

/// The unit roundoff of bf16.
const UNIT: f64 = 1.0 / 256.0;

/// The roots of a tensor, by the tolerances that follow from them.
fn roots(due: &BTreeMap<String, Vec<f64>>, name: &str) -> Vec<f64> {
    let tolerances = &due[&format!("{name}.may_be_off")];
    tolerances
        .iter()
        .map(|may| may / lambda() / LARGER)
        .collect()
}

/// Of half types nothing but what is kept in them rounds to speak of: here the
/// gradient alone, by half a unit in its last place.
#[test]
fn the_root_of_a_number_that_is_rounded_once_is_half_a_unit() {
    let case = case("loss/p1-b1-s8-v5-bf16-seed1");
    let due = due(&case);
    let roots = roots(&due, "dlogits.rank-0");
    assert_eq!(roots.len(), 40);
    for (root, right) in roots.iter().zip(&due["dlogits.rank-0"]) {
        assert_relative_eq!(*root, UNIT * right.abs(), max_relative = 1e-3);
    }
}

/// dhidden is the product of the logits' gradient with the head. Logits z, their
/// gradient g and the product are rounded; g = f (p - y), where p is the softmax
/// of z, so that dg / dz = f (diag(p) - p p^T).
#[test]
fn the_roots_of_a_product_are_those_of_its_sensitivities() {
    let case = case("loss/p2-b1-s40-v5-bf16-seed1-hidden4");
    let (due, head, (_, factor)) = (due(&case), head(&case).unwrap(), one_loss(&case));
    let sampled = [0, 1].map(|rank| roots(&due, &format!("dhidden.rank-{rank}")));
    let sampled: Vec<f64> = sampled.concat();
    let mut derived = Vec::new();
    for token in tokens(&case) {
        let gradient: Vec<f64> = token.gradient().iter().map(|g| g * factor).collect();
        for channel in 0..4 {
            let column: Vec<f64> = head.iter().map(|class| class[channel]).collect();
            let mean = dot(&column, &token.weights);
            let of_logit = |class: usize| {
                let slope = factor * token.weights[class] * (column[class] - mean);
                slope * token.logits[class]
            };
            let squares: f64 = (0..5)
                .map(|class| (column[class] * gradient[class]).powi(2) + of_logit(class).powi(2))
                .sum();
            derived.push(UNIT * (squares + dot(&column, &gradient).powi(2)).sqrt());
        }
    }
    assert_eq!(sampled.len(), derived.len());
    let ratios: Vec<f64> = sampled
        .iter()
        .zip(&derived)
        .map(|(s, d)| (s / d).powi(2))
        .collect();
    // The mean of 64 squares is off by a factor of 2 as good as never, and that
    // over 40 tokens by a tenth.
    assert!(
        ratios.iter().all(|ratio| (0.4..2.5).contains(ratio)),
        "{ratios:?}"
    );
    let mean = ratios.iter().sum::<f64>() / ratios.len() as f64;
    assert!((mean - 1.0).abs() < 0.1, "{mean}");
}
