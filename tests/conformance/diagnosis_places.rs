//! A wrong answer is called by the mistake that made it: tokens, heads and parts
//! of gradients that are in another place, or nowhere.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

mod answers;
mod diagnosed;

use answers::{right, spoiled};
use diagnosed::{SIZES, assert_named, diagnosed, judged_as, with};
use fixtures::{Array, AttentionCase, Dtype, Inputs, Shard, Sharding, sharding};
use rstest::rstest;
use ulysses_conformance::diagnosis::Mistake;
use ulysses_conformance::oracle::{Answer, AnswerTensor, attention};

/// The elements of `[batch, tokens, heads, channels]` with row `from(row)` in
/// the place of each row.
fn moved(
    case: &AttentionCase,
    name: AnswerTensor,
    numbers: &mut [f64],
    from: impl Fn(usize, usize) -> (usize, usize),
) {
    let shape = name.shape(case);
    let [_, tokens, heads, channels] = shape[..] else {
        panic!("{shape:?}")
    };
    let before = numbers.to_vec();
    for (row, place) in numbers.chunks_mut(channels).enumerate() {
        let (batch, token, head) = (row / heads / tokens, row / heads % tokens, row % heads);
        let (token, head) = from(token, head);
        let row = (batch * tokens + token) * heads + head;
        place.copy_from_slice(&before[row * channels..(row + 1) * channels]);
    }
}

#[rstest]
fn outputs_of_another_rank_are_told_with_the_order(#[values(0, 1, 2, 3, 4, 5)] size: usize) {
    let case: AttentionCase = SIZES[size].parse().unwrap();
    let each = case.sequence / case.world;
    let diagnosis = diagnosed(spoiled(&case, |answer| {
        let next = |token, head| ((token + each) % case.sequence, head);
        moved(&case, AnswerTensor::Out, &mut answer.out, next);
    }));
    assert_named(&diagnosis, Mistake::OutputToWrongRank);
    let order: Vec<String> = (1..=case.world)
        .map(|r| (r % case.world).to_string())
        .collect();
    assert!(
        diagnosis.sentence.contains(&order.join(" ")),
        "{diagnosis:?}"
    );
}

#[rstest]
fn heads_of_the_output_in_another_order_are_told(
    #[values(0, 1, 2, 3, 4, 5)] size: usize,
    #[values(true, false)] is_interleaved: bool,
) {
    let case: AttentionCase = SIZES[size].parse().unwrap();
    let (heads, ranks) = (case.query_heads, case.world);
    let each = heads / ranks;
    let diagnosis = diagnosed(spoiled(&case, |answer| {
        moved(&case, AnswerTensor::Out, &mut answer.out, |token, head| {
            let from = match is_interleaved {
                true => head % ranks * each + head / ranks,
                false => (ranks - 1 - head / each) * each + head % each,
            };
            (token, from)
        });
    }));
    let mistake = match is_interleaved {
        true => Mistake::OutputHeadsInterleaved,
        false => Mistake::OutputHeadsReordered,
    };
    assert_named(&diagnosis, mistake);
}

#[rstest]
fn gradients_of_another_rank_are_told(#[values(0, 1, 2, 3, 4, 5)] size: usize) {
    let case: AttentionCase = SIZES[size].parse().unwrap();
    let each = case.sequence / case.world;
    let diagnosis = diagnosed(spoiled(&case, |answer| {
        let next = |token, head| ((token + each) % case.sequence, head);
        moved(&case, AnswerTensor::QueryGradient, &mut answer.dq, next);
        moved(&case, AnswerTensor::KeyGradient, &mut answer.dk, next);
        moved(&case, AnswerTensor::ValueGradient, &mut answer.dv, next);
    }));
    assert_named(&diagnosis, Mistake::BackwardToWrongRank);
}

/// The inputs with KV head `from[h]` in the place of KV head h.
fn with_kv_heads(inputs: &Inputs, from: &[usize]) -> Inputs {
    let pick = |array: &Array| {
        let [batch, tokens, heads, channels] = array.shape[..] else {
            panic!()
        };
        let numbers = array.to_f64();
        let rows = (0..batch * tokens).flat_map(|row| from.iter().map(move |h| row * heads + h));
        let picked: Vec<f64> = rows
            .flat_map(|row| numbers[row * channels..(row + 1) * channels].to_vec())
            .collect();
        Array::from_f64(array.dtype, &[batch, tokens, from.len(), channels], &picked)
    };
    Inputs {
        k: pick(&inputs.k),
        v: pick(&inputs.v),
        ..inputs.clone()
    }
}

#[rstest]
#[case::tiled(1, &[0, 1, 2, 3, 0, 1, 2, 3], Mistake::KvHeadsTiled)]
#[case::tiled_for_four(3, &[0, 1, 0, 1, 0, 1, 0, 1], Mistake::KvHeadsTiled)]
#[case::tiled_for_three(2, &[0, 1, 2, 0, 1, 2], Mistake::KvHeadsTiled)]
#[case::of_other_ranks(3, &[0, 0, 1, 1, 0, 0, 1, 1], Mistake::KvHeadsOfOtherRank)]
fn other_kv_heads_are_told(
    #[case] size: usize,
    #[case] attended: &[usize],
    #[case] mistake: Mistake,
) {
    let case: AttentionCase = SIZES[size].parse().unwrap();
    // Every query head has the KV head of its own that it attends.
    let mut wide = case.clone();
    wide.kv_heads = case.query_heads;
    let mut answer = attention(&wide, &with_kv_heads(&Inputs::of(&case), attended)).unwrap();
    let summed = |gradient: &[f64]| {
        let mut sums = vec![0.0; gradient.len() / case.query_heads * case.kv_heads];
        for (i, part) in gradient.chunks(case.head_size).enumerate() {
            let row = i / case.query_heads * case.kv_heads + attended[i % case.query_heads];
            for (sum, part) in sums[row * case.head_size..].iter_mut().zip(part) {
                *sum += part;
            }
        }
        sums
    };
    (answer.dk, answer.dv) = (summed(&answer.dk), summed(&answer.dv));
    assert_named(&judged_as(&case, answer), mistake);
}

#[rstest]
#[case::one_replica(3, |head| f64::from(head % 4 < 2), Mistake::ReplicasNotSummed)]
#[case::last_replica(3, |head| f64::from(head % 4 >= 2), Mistake::ReplicasNotSummed)]
#[case::one_of_group(1, |head| f64::from(head % 2 == 0), Mistake::GroupNotSummed)]
#[case::one_of_eight(5, |head| f64::from(head == 0), Mistake::GroupNotSummed)]
fn parts_of_key_gradients_that_are_lost_are_told(
    #[case] size: usize,
    #[case] weight: fn(usize) -> f64,
    #[case] mistake: Mistake,
) {
    let case: AttentionCase = SIZES[size].parse().unwrap();
    // Gradients are linear in the cotangent: that of lost heads is zero.
    let mut inputs = Inputs::of(&case);
    let mut dout = inputs.dout.to_f64();
    for (i, row) in dout.chunks_mut(case.head_size).enumerate() {
        row.iter_mut()
            .for_each(|x| *x *= weight(i % case.query_heads));
    }
    inputs.dout = Array::from_f64(case.dtype, &inputs.dout.shape, &dout);
    let of_kept = attention(&case, &inputs).unwrap();
    let mut answer = right(&case);
    (answer.dk, answer.dv) = (of_kept.dk, of_kept.dv);
    assert_named(&judged_as(&case, answer), mistake);
}

#[rstest]
fn gradients_of_own_queries_alone_are_told(#[values(0, 2, 3)] size: usize) {
    let case: AttentionCase = SIZES[size].parse().unwrap();
    let mut answer = right(&case);
    for shard in case.shards() {
        let mut inputs = Inputs::of(&case);
        let row = case.query_heads * case.head_size;
        let mut dout = inputs.dout.to_f64();
        for (i, token) in dout.chunks_mut(row).enumerate() {
            if shard.position(i % case.sequence).is_none() {
                token.fill(0.0);
            }
        }
        inputs.dout = Array::from_f64(case.dtype, &inputs.dout.shape, &dout);
        let of_rank = attention(&case, &inputs).unwrap();
        let row = case.kv_heads * case.head_size;
        for (whole, part) in [(&mut answer.dk, &of_rank.dk), (&mut answer.dv, &of_rank.dv)] {
            for (i, token) in whole.chunks_mut(row).enumerate() {
                if shard.position(i % case.sequence).is_some() {
                    token.copy_from_slice(&part[i * row..(i + 1) * row]);
                }
            }
        }
    }
    assert_named(&judged_as(&case, answer), Mistake::OtherRanksGradientLost);
}

/// The answer of attention on the tokens of each shard by itself.
fn of_shards_alone(case: &AttentionCase) -> Answer<Vec<f64>> {
    let inputs = Inputs::of(case);
    let cut = |array: &Array| sharding::cut(array, &case.shards());
    let [q, k, v, dout] = [&inputs.q, &inputs.k, &inputs.v, &inputs.dout].map(cut);
    let parts: Vec<Answer<Vec<f64>>> = (0..case.world)
        .map(|rank| {
            let part = AttentionCase {
                sequence: case.shards()[rank].len(),
                ..case.clone()
            };
            let inputs = Inputs {
                q: q[rank].clone(),
                k: k[rank].clone(),
                v: v[rank].clone(),
                dout: dout[rank].clone(),
                head_state: inputs.head_state.clone(),
            };
            attention(&part, &inputs).unwrap()
        })
        .collect();
    let mut answer = right(case);
    let whole = |name: AnswerTensor| {
        let parts: Vec<Array> = parts
            .iter()
            .zip(case.shards())
            .map(|(part, shard)| {
                let mut shape = name.shape(case);
                shape[1] = shard.len();
                Array::from_f64(Dtype::F64, &shape, part.get(name).unwrap())
            })
            .collect();
        sharding::join(&parts, &case.shards()).to_f64()
    };
    answer.out = whole(AnswerTensor::Out);
    answer.dq = whole(AnswerTensor::QueryGradient);
    answer.dk = whole(AnswerTensor::KeyGradient);
    answer.dv = whole(AnswerTensor::ValueGradient);
    answer
}

#[rstest]
fn attention_to_own_tokens_alone_is_told(#[values(0, 1, 2, 3, 4, 5)] size: usize) {
    let case: AttentionCase = SIZES[size].parse().unwrap();
    let diagnosis = judged_as(&case, of_shards_alone(&case));
    assert_named(&diagnosis, Mistake::LocalTokensOnly);
}

/// Attention on tokens in this order, each answer given to its own token.
fn in_order(case: &AttentionCase, order: &[usize]) -> Answer<Vec<f64>> {
    let inputs = Inputs::of(case);
    let there = [Shard::from_iter(order.iter().copied())];
    let moved = |array: &Array| sharding::cut(array, &there).remove(0);
    let moved_inputs = Inputs {
        q: moved(&inputs.q),
        k: moved(&inputs.k),
        v: moved(&inputs.v),
        dout: moved(&inputs.dout),
        head_state: inputs.head_state.clone(),
    };
    let mut answer = attention(case, &moved_inputs).unwrap();
    let back = |name: AnswerTensor, numbers: &Vec<f64>| {
        let array = Array::from_f64(Dtype::F64, &name.shape(case), numbers);
        sharding::join(&[array], &there).to_f64()
    };
    answer.out = back(AnswerTensor::Out, &answer.out);
    answer.dq = back(AnswerTensor::QueryGradient, &answer.dq);
    answer.dk = back(AnswerTensor::KeyGradient, &answer.dk);
    answer.dv = back(AnswerTensor::ValueGradient, &answer.dv);
    answer
}

#[rstest]
fn ranks_in_another_order_under_a_mask_are_told(#[values(0, 1, 2, 3, 4, 5)] size: usize) {
    let case: AttentionCase = SIZES[size].parse().unwrap();
    let backwards: Vec<usize> = case
        .shards()
        .iter()
        .rev()
        .flat_map(|shard| shard.tokens().to_vec())
        .collect();
    let diagnosis = judged_as(&case, in_order(&case, &backwards));
    assert_named(&diagnosis, Mistake::RanksReordered);
}

#[rstest]
fn shards_taken_for_runs_are_told(
    #[values(0, 1, 2, 3)] size: usize,
    #[values(Sharding::Zigzag, Sharding::Striped)] sharding: Sharding,
) {
    let case = with(size, |case| case.extras.sharding = sharding);
    let order: Vec<usize> = case
        .shards()
        .iter()
        .flat_map(|shard| shard.tokens().to_vec())
        .collect();
    let diagnosis = judged_as(&case, in_order(&case, &order));
    assert_named(&diagnosis, Mistake::ShardingIgnored);
}

#[test]
fn head_state_of_one_rank_and_averaged_are_told() {
    for size in [0, 3, 4] {
        let case = with(size, |case| {
            (case.extras.alibi, case.extras.sinks) = (true, true);
        });
        let own = case.query_heads / case.world;
        let scale = |answer: &mut Answer<Vec<f64>>, factor: &dyn Fn(usize) -> f64| {
            for (_, numbers) in &mut answer.head_state {
                let numbers = numbers.iter_mut().enumerate();
                numbers.for_each(|(head, x)| *x *= factor(head));
            }
        };
        let diagnosis = diagnosed(spoiled(&case, |answer| {
            scale(answer, &|head| f64::from(head / own == 1));
        }));
        assert_named(&diagnosis, Mistake::HeadStateOfOneRank);
        assert!(diagnosis.sentence.contains("rank 1"), "{diagnosis:?}");
        let diagnosis = diagnosed(spoiled(&case, |answer| {
            scale(answer, &|_| 1.0 / case.world as f64);
        }));
        assert_named(&diagnosis, Mistake::HeadStateAveraged);
    }
}

#[test]
fn ranks_in_an_order_that_nobody_tries_are_told_by_where_rows_come_from() {
    let case: AttentionCase = SIZES[4].parse().unwrap();
    let each = case.sequence / case.world;
    // The first two ranks get each other's.
    let from = [1, 0, 2, 3];
    let diagnosis = diagnosed(spoiled(&case, |answer| {
        moved(&case, AnswerTensor::Out, &mut answer.out, |token, head| {
            (from[token / each] * each + token % each, head)
        });
    }));
    assert_named(&diagnosis, Mistake::OutputToWrongRank);
    let told = "out is wrong at the tokens of ranks 0 and 1 alone, dq, dk and dv are right.";
    assert!(diagnosis.sentence.starts_with(told), "{diagnosis:?}");
}
