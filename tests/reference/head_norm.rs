//! Normalisation of heads, number by number.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod world;

use rstest::rstest;
use tch::{Device, Kind, Tensor};
use ulysses::normalize_heads;
use world::{leaf, noise};

const SIZE: [i64; 4] = [2, 3, 4, 5];
const EPSILON: f64 = 1e-2;

fn inputs(kind: Kind) -> (Tensor, Tensor) {
    let weight = noise(2, [1, 1, 4, 5], kind).view([4, 5]) + 1.0;
    (noise(1, SIZE, kind), weight)
}

fn naive(x: &Tensor, weight: &Tensor) -> Tensor {
    let numbers =
        |tensor: &Tensor| Vec::<f64>::try_from(tensor.to_kind(Kind::Double).reshape(-1)).unwrap();
    let (x, weight) = (numbers(x), numbers(weight));
    let heads = x.chunks_exact(5).enumerate().flat_map(|(i, head)| {
        let square: f64 = head.iter().map(|x| x * x).sum();
        let root = (square / 5.0 + EPSILON).sqrt();
        let weight = &weight[i % 4 * 5..][..5];
        head.iter()
            .zip(weight)
            .map(move |(x, weight)| x / root * weight)
    });
    Tensor::from_slice(&heads.collect::<Vec<_>>()).view(SIZE)
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    (a.to_kind(Kind::Double) - b).abs().max().double_value(&[])
}

#[rstest]
fn every_number_is_that_of_the_definition(
    #[values((Kind::Double, 1e-14), (Kind::Float, 1e-6), (Kind::Half, 3e-3), (Kind::BFloat16, 3e-2))]
    kind: (Kind, f64),
) {
    let (kind, tolerance) = kind;
    let (x, weight) = inputs(kind);
    let got = normalize_heads(&x, &weight, EPSILON).unwrap();
    assert_eq!((got.kind(), got.size()), (kind, SIZE.to_vec()));
    let distance = distance(&got, &naive(&x, &weight));
    assert!(distance < tolerance, "{distance:e}");
    let transposed = x.transpose(1, 3).contiguous().transpose(1, 3);
    assert_eq!(
        normalize_heads(&transposed, &weight, EPSILON)
            .unwrap()
            .kind(),
        kind
    );
}

/// The squares of a half type are summed in float32: 300^2 is more than
/// float16 holds.
#[test]
fn squares_do_not_overflow() {
    let x = Tensor::full([1, 1, 1, 8], 300.0, (Kind::Half, Device::Cpu));
    let weight = Tensor::ones([1, 8], (Kind::Half, Device::Cpu));
    let got = normalize_heads(&x, &weight, 1e-6).unwrap();
    assert_eq!(got, Tensor::ones_like(&x));
}

#[test]
fn cotangents_are_derivatives() {
    let (x, weight) = inputs(Kind::Double);
    let (x, weight, cotangent) = (leaf(&x), leaf(&weight), noise(3, SIZE, Kind::Double));
    let output = normalize_heads(&x, &weight, EPSILON).unwrap();
    (output * &cotangent).sum(Kind::Double).backward();
    let loss = |x: &Tensor, weight: &Tensor| {
        (naive(x, weight) * &cotangent)
            .sum(Kind::Double)
            .double_value(&[])
    };
    for (moved, other_is_weight) in [(&x, true), (&weight, false)] {
        for place in 0..moved.numel() as i64 {
            let [up, down] = [1e-5, -1e-5].map(|step| {
                let copy = moved.detach().copy();
                let _ = copy.view(-1).get(place).g_add_scalar_(step);
                if other_is_weight {
                    loss(&copy, &weight)
                } else {
                    loss(&x, &copy)
                }
            });
            let found = moved.grad().reshape(-1).double_value(&[place]);
            assert!((found - (up - down) / 2e-5).abs() < 1e-8, "place {place}");
        }
    }
}

#[rstest]
#[case::dimensions(&[2, 3, 5], &[4, 5], Kind::Float, 0.0,
    "`x` has shape [2, 3, 5]; give [batch, tokens, heads, head size]")]
#[case::heads(&SIZE, &[3, 5], Kind::Float, 0.0,
    "`weight` has shape [3, 5] and kind Float; give [4, 5] of kind Float")]
#[case::kind(&SIZE, &[4, 5], Kind::Half, 0.0,
    "`weight` has shape [4, 5] and kind Half; give [4, 5] of kind Float")]
#[case::epsilon(&SIZE, &[4, 5], Kind::Float, -1.0,
    "`epsilon` is -1; give a number from zero on")]
fn what_does_not_fit_is_refused(
    #[case] x: &[i64],
    #[case] weight: &[i64],
    #[case] kind: Kind,
    #[case] epsilon: f64,
    #[case] text: &str,
) {
    let x = Tensor::ones(x, (Kind::Float, Device::Cpu));
    let weight = Tensor::ones(weight, (kind, Device::Cpu));
    assert_eq!(
        normalize_heads(&x, &weight, epsilon)
            .unwrap_err()
            .to_string(),
        text
    );
}
