//! Rotary position embedding, number by number.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod world;

use rstest::rstest;
use tch::{Device, Kind, Tensor};
use ulysses::{Rotary, rotate};
use world::{leaf, noise};

const SIZE: [i64; 4] = [2, 5, 3, 16];
const PLAIN: Rotary = Rotary {
    base: 256.0,
    sections: None,
};
const MULTIMODAL: Rotary = Rotary {
    base: 256.0,
    sections: Some([4, 1, 3]),
};

/// Positions up to a few thousand: int64 [2, 5] or [3, 2, 5].
fn positions(rotary: &Rotary) -> Tensor {
    let components = if rotary.sections.is_some() { 3 } else { 1 };
    let all = (noise(9, [components, 2, 5, 1], Kind::Double).abs() * 4000.0).to_kind(Kind::Int64);
    match rotary.sections {
        Some(_) => all.view([3, 2, 5]),
        None => all.view([2, 5]),
    }
}

/// Pair by pair, in float64.
fn naive(x: &Tensor, position_ids: &Tensor, rotary: &Rotary) -> Tensor {
    let x = x.to_kind(Kind::Double);
    let result = x.zeros_like();
    let [batch, tokens, heads, size] = <[i64; 4]>::try_from(x.size()).unwrap();
    for (b, t, h) in
        (0..batch * tokens * heads).map(|i| (i / (tokens * heads), i / heads % tokens, i % heads))
    {
        for c in 0..size / 2 {
            let position = match rotary.sections {
                None => position_ids.int64_value(&[b, t]),
                Some([first, second, _]) => {
                    let c = c as usize;
                    let component = i64::from(c >= first) + i64::from(c >= first + second);
                    position_ids.int64_value(&[component, b, t])
                }
            };
            let frequency = rotary.base.powf(-2.0 * c as f64 / size as f64);
            let (sin, cos) = (position as f64 * frequency).sin_cos();
            let (one, other) = ([b, t, h, c], [b, t, h, c + size / 2]);
            let (x1, x2) = (x.double_value(&one), x.double_value(&other));
            for (place, value) in [(one, x1 * cos - x2 * sin), (other, x2 * cos + x1 * sin)] {
                let _ = place
                    .iter()
                    .fold(result.shallow_clone(), |at, &i| at.get(i))
                    .fill_(value);
            }
        }
    }
    result
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double))
        .abs()
        .max()
        .double_value(&[])
}

#[rstest]
fn every_number_is_that_of_the_definition(
    #[values(PLAIN, MULTIMODAL, Rotary { base: 10000.0, sections: None })] rotary: Rotary,
    #[values((Kind::Double, 1e-11), (Kind::Float, 2e-7), (Kind::Half, 6e-4), (Kind::BFloat16, 5e-3))]
    kind: (Kind, f64),
) {
    let (kind, tolerance) = kind;
    let (x, ids) = (noise(1, SIZE, kind), positions(&rotary));
    let got = rotate(&x, &ids, &rotary).unwrap();
    assert_eq!((got.kind(), got.size()), (kind, SIZE.to_vec()));
    let distance = distance(&got, &naive(&x, &ids, &rotary));
    assert!(distance < tolerance, "{distance:e}");
}

/// With frequencies that are powers of two nothing is lost in the angles, and
/// half types are rounded once.
#[rstest]
fn half_types_are_rounded_once(#[values(Kind::Half, Kind::BFloat16)] kind: Kind) {
    let (x, ids) = (noise(1, SIZE, kind), positions(&PLAIN));
    let got = rotate(&x, &ids, &PLAIN).unwrap();
    let due = rotate(&x.to_kind(Kind::Float), &ids, &PLAIN).unwrap();
    assert_eq!(got, due.to_kind(kind));
}

#[rstest]
fn scores_depend_on_the_distance_alone(#[values(1, 77)] moved: i64) {
    let x = noise(1, SIZE, Kind::Double);
    let ids = positions(&PLAIN);
    let scores = |ids: &Tensor| {
        let rotated = rotate(&x, ids, &PLAIN).unwrap().transpose(1, 2);
        rotated.matmul(&rotated.transpose(2, 3))
    };
    assert!(distance(&scores(&ids), &scores(&(&ids + moved))) < 1e-11);
    assert!(distance(&scores(&ids), &scores(&(&ids * 2))) > 1e-2);
}

#[rstest]
fn the_cotangent_is_rotated_back(#[values(PLAIN, MULTIMODAL)] rotary: Rotary) {
    let x = leaf(&noise(1, SIZE, Kind::Double));
    let (cotangent, ids) = (noise(2, SIZE, Kind::Double), positions(&rotary));
    let rotated = rotate(&x, &ids, &rotary).unwrap();
    (rotated * &cotangent).sum(Kind::Double).backward();
    let due = rotate(&cotangent, &-ids, &rotary).unwrap();
    assert!(distance(&x.grad(), &due) < 1e-14);
}

#[test]
fn any_strides_will_do() {
    let x = noise(1, SIZE, Kind::Double);
    let ids = positions(&PLAIN);
    let due = rotate(&x, &ids, &PLAIN).unwrap();
    for (a, b) in [(1, 2), (1, 3), (0, 2)] {
        let strided = x.transpose(a, b).contiguous().transpose(a, b);
        assert_ne!(strided.stride(), x.stride());
        let transposed = ids.transpose(0, 1).contiguous().transpose(0, 1);
        assert_eq!(rotate(&strided, &transposed, &PLAIN).unwrap(), due);
    }
}

#[rstest]
#[case::dimensions(PLAIN, &[2, 5, 16], &[2, 5], Kind::Int64,
    "`x` has shape [2, 5, 16]; give [batch, tokens, heads, head size]")]
#[case::odd(PLAIN, &[2, 5, 3, 15], &[2, 5], Kind::Int64,
    "`rotary` turns pairs of channels, but a head has 15; give an even head size")]
#[case::base(Rotary { base: 0.0, sections: None }, &SIZE, &[2, 5], Kind::Int64,
    "`rotary` has the base 0; give a positive number")]
#[case::base_nan(Rotary { base: f64::NAN, sections: None }, &SIZE, &[2, 5], Kind::Int64,
    "`rotary` has the base NaN; give a positive number")]
#[case::sections(Rotary { base: 2.0, sections: Some([4, 4, 4]) }, &SIZE, &[3, 2, 5], Kind::Int64,
    "`rotary` has the sections [4, 4, 4]; give three that are 8 channel pairs in all")]
#[case::tokens(PLAIN, &SIZE, &[2, 4], Kind::Int64,
    "`position_ids` has shape [2, 4] and kind Int64; give [2, 5] of int64")]
#[case::components(MULTIMODAL, &SIZE, &[2, 2, 5], Kind::Int64,
    "`position_ids` has shape [2, 2, 5] and kind Int64; give [3, 2, 5] of int64")]
#[case::missing_components(MULTIMODAL, &SIZE, &[2, 5], Kind::Int64,
    "`position_ids` has shape [2, 5] and kind Int64; give [3, 2, 5] of int64")]
#[case::kind(PLAIN, &SIZE, &[2, 5], Kind::Float,
    "`position_ids` has shape [2, 5] and kind Float; give [2, 5] of int64")]
fn what_does_not_fit_is_refused(
    #[case] rotary: Rotary,
    #[case] x: &[i64],
    #[case] ids: &[i64],
    #[case] kind: Kind,
    #[case] text: &str,
) {
    let x = Tensor::ones(x, (Kind::Float, Device::Cpu));
    let ids = Tensor::ones(ids, (kind, Device::Cpu));
    assert_eq!(rotate(&x, &ids, &rotary).unwrap_err().to_string(), text);
}
