//! Ulysses around any core attention, in any layout.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod world;

use rstest::rstest;
use tch::{Kind, Tensor};
use ulysses::{DistributedAttention, Error, HeadMap, Options, Refusal, UlyssesAttention};
use world::{leaf, noise, on_ranks};

/// Causal attention of a user's own, by way of [B, h, S, D].
fn core(
    order: [i64; 4],
) -> impl Fn(&Tensor, &Tensor, &Tensor, &HeadMap) -> ulysses::Result<Tensor> {
    // From [B, h, S, D] to the layout, and back.
    let back: [i64; 4] =
        std::array::from_fn(|i| order.iter().position(|&o| o == i as i64).unwrap() as i64);
    move |query, key, value, heads| {
        let kv: Vec<i64> = heads
            .kv_of_query()
            .iter()
            .map(|&head| head as i64)
            .collect();
        let kv = Tensor::from_slice(&kv);
        let query = query.permute(back);
        let [key, value] = [key, value].map(|tensor| tensor.permute(back).index_select(1, &kv));
        let scores = query.matmul(&key.transpose(2, 3)) / (query.size()[3] as f64).sqrt();
        let unseen = scores.ones_like().triu(1).to_kind(Kind::Bool);
        let weights = scores
            .masked_fill(&unseen, f64::NEG_INFINITY)
            .softmax(-1, Kind::Double);
        Ok(weights.matmul(&value).permute(order))
    }
}

/// `order` takes [B, h, S, D] to the layout.
#[rstest]
#[case::sequence_first(2, 0, [2, 0, 1, 3])]
#[case::batch_first(2, 1, [0, 2, 1, 3])]
#[case::heads_before_the_sequence(1, 2, [0, 1, 2, 3])]
#[case::head_size_before_the_heads(3, 0, [2, 0, 3, 1])]
#[case::sequence_last(1, 3, [0, 1, 3, 2])]
fn any_layout_says_what_ulysses_attention_says(
    #[case] scatter: usize,
    #[case] gather: usize,
    #[case] order: [i64; 4],
    #[values(1, 2, 3)] ranks: usize,
) {
    on_ranks(ranks, |communicator| {
        let tokens = 2 + communicator.rank() as i64;
        let plain = [(1, 4, 6), (2, 2, 6), (3, 2, 5)]
            .map(|(seed, heads, size)| leaf(&noise(seed, [2, tokens, heads, size], Kind::Double)));
        // From [B, s, H, D], where heads and tokens stand the other way round.
        let to_layout = |tensor: &Tensor| tensor.transpose(1, 2).permute(order);
        let options = Options {
            score: ulysses::Score {
                mask: ulysses::Mask::Causal,
                ..ulysses::Score::default()
            },
            uneven_heads: true,
            ..Options::default()
        };
        let gradients = |output: &Tensor| {
            let weighted = output * noise(9, [2, tokens, 4, 5], Kind::Double);
            Tensor::run_backward(&[weighted.sum(Kind::Double)], &plain, false, false)
        };
        let [query, key, value] = &plain;
        let attention = UlyssesAttention::new(communicator.clone(), options);
        let due = attention.forward(query, key, value).unwrap();
        let due_gradients = gradients(&due);

        let attention =
            DistributedAttention::new(communicator, core(order), scatter, gather).unwrap();
        let [query, key, value] = plain.each_ref().map(to_layout);
        let got = attention.forward(&query, &key, &value).unwrap();
        assert_eq!(got.size()[..2], query.size()[..2]);
        let back: [i64; 4] =
            std::array::from_fn(|i| order.iter().position(|&o| o == i as i64).unwrap() as i64);
        let got = got.permute(back).transpose(1, 2);
        let got_gradients = gradients(&got);
        for (got, due) in
            std::iter::once((&got, &due)).chain(got_gradients.iter().zip(&due_gradients))
        {
            assert!((got - due).abs().max().double_value(&[]) < 1e-13);
        }
    });
}

#[rstest]
#[case(2, 2)]
#[case(4, 1)]
fn indices_that_are_no_two_dimensions_are_refused(#[case] scatter: usize, #[case] gather: usize) {
    on_ranks(1, |communicator| {
        let attention =
            DistributedAttention::new(communicator, core([0, 2, 1, 3]), scatter, gather);
        assert_eq!(
            attention.err().unwrap().to_string(),
            format!(
                "`scatter` is {scatter} and `gather` is {gather}; give two different dimensions \
                 of 0, 1, 2 and 3"
            )
        );
    });
}

#[test]
fn an_output_of_another_shape_is_refused_and_told_to_the_others() {
    let errors = on_ranks(2, |communicator| {
        let rank = communicator.rank();
        let core = |query: &Tensor, _: &Tensor, _: &Tensor, _: &HeadMap| {
            Ok(if rank == 0 {
                query.narrow(1, 0, 1)
            } else {
                query.shallow_clone()
            })
        };
        let x = noise(1, [1, 2, 2, 4], Kind::Float);
        let attention = DistributedAttention::new(communicator, core, 2, 1).unwrap();
        attention.forward(&x, &x, &x).unwrap_err().to_string()
    });
    let due = "`core` returned [batch, heads, tokens, head size] [1, 1, 1, 4]; return [1, 1, 4, 4], \
               in the layout of its arguments";
    assert_eq!(errors[0], format!("rank 0: {due}"));
    assert!(errors[1].contains(due), "{}", errors[1]);
}

#[test]
fn an_error_of_the_core_reaches_every_rank() {
    let errors = on_ranks(2, |communicator| {
        let rank = communicator.rank();
        let core = |query: &Tensor, _: &Tensor, _: &Tensor, _: &HeadMap| match rank {
            0 => Ok(query.shallow_clone()),
            _ => Err(Error::from(Refusal {
                rank: Some(rank),
                argument: "query",
                problem: "is not to the taste of this core".to_owned(),
                remedy: "give another".to_owned(),
            })),
        };
        let x = noise(1, [1, 2, 2, 4], Kind::Float);
        let attention = DistributedAttention::new(communicator, core, 2, 1).unwrap();
        attention.forward(&x, &x, &x).unwrap_err().to_string()
    });
    assert!(
        errors
            .iter()
            .all(|error| error.contains("not to the taste")),
        "{errors:?}"
    );
}
