//! A function in tiles gives what it gives on the whole sequence, to outputs,
//! inputs and parameters alike, and records nothing in between.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

mod world;

use proptest::prelude::*;
use rstest::rstest;
use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering},
};
use tch::{Device, Kind, Tensor};
use ulysses::{
    Reduction, Result, SwiGlu, Tile, TiledCompute,
    autograd::{Function, apply, grad_enabled},
    checkpoint, sequence_tiled_compute, tiled_mlp,
};
use world::{leaf, noise};

fn values(seed: u64, size: &[i64], kind: Kind) -> Tensor {
    noise(seed, [1, 1, 1, size.iter().product()], kind).view(size)
}

fn parameter(seed: u64, size: &[i64], kind: Kind) -> Tensor {
    leaf(&values(seed, size, kind))
}

/// Largest difference, in units of the largest number due.
fn distance(got: &Tensor, due: &Tensor) -> f64 {
    assert_eq!((got.size(), got.kind()), (due.size(), due.kind()));
    if due.numel() == 0 {
        return 0.0;
    }
    let largest = due.abs().max().double_value(&[]);
    let apart = (got - due).abs().max().double_value(&[]);
    if apart == 0.0 { 0.0 } else { apart / largest }
}

/// How far apart sums in another order may be: tens of roundings.
fn tolerance(kind: Kind) -> f64 {
    if kind == Kind::Double { 1e-14 } else { 5e-6 }
}

fn untiled_mlp(hidden: &Tensor, [gate, up, down]: &[Tensor; 3]) -> Tensor {
    let by = |weight: &Tensor| hidden.linear(weight, None::<&Tensor>);
    (by(gate).silu() * by(up)).linear(down, None::<&Tensor>)
}

const FEATURES: i64 = 6;
const WIDE: i64 = 20;

fn mlp_weights(output: i64, kind: Kind) -> [Tensor; 3] {
    let sizes = [[WIDE, FEATURES], [WIDE, FEATURES], [output, WIDE]];
    [0, 1, 2].map(|i| parameter(20 + i as u64, &sizes[i], kind))
}

fn mlp_distance(
    batch: i64,
    tokens: i64,
    tiles: usize,
    upstream: f64,
    output: i64,
    kind: Kind,
) -> f64 {
    let hidden = parameter(1, &[batch, tokens, FEATURES], kind);
    let weights = mlp_weights(output, kind);
    let [gate, up, down] = &weights;
    let cotangent = values(2, &[batch, tokens, output], kind) * upstream;
    let found = |result: &Tensor| {
        let leaves = [&hidden, gate, up, down];
        let mut found =
            Tensor::run_backward(&[(result * &cotangent).sum(kind)], &leaves, false, false);
        found.push(result.detach());
        found
    };
    let got = tiled_mlp(&hidden, &SwiGlu { gate, up, down }, tiles).unwrap();
    let due = found(&untiled_mlp(&hidden, &weights));
    let distances = found(&got)
        .into_iter()
        .zip(due)
        .map(|(got, due)| distance(&got, &due));
    distances.fold(0.0, f64::max)
}

#[rstest]
fn a_tiled_mlp_is_the_untiled_one(
    #[values((8, 4), (125, 4), (5, 4), (3, 4), (2, 4), (1, 4), (0, 3), (9, 1))] (tokens, tiles): (
        i64,
        usize,
    ),
    #[values(1, 2)] batch: i64,
    #[values(1.0, 0.25, -3.0)] upstream: f64,
    #[values(FEATURES, 3)] output: i64,
    #[values(Kind::Double, Kind::Float)] kind: Kind,
) {
    let far = mlp_distance(batch, tokens, tiles, upstream, output, kind);
    assert!(far <= tolerance(kind), "{far:e}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_tokens_in_any_tiles(batch in 1i64..4, tokens in 0i64..40, tiles in 1usize..50, output in 1i64..9) {
        let far = mlp_distance(batch, tokens, tiles, 1.0, output, Kind::Double);
        prop_assert!(far <= tolerance(Kind::Double), "{far:e}");
    }
}

#[test]
fn what_is_frozen_has_no_gradient_and_the_rest_has_its_own() {
    let hidden = parameter(1, &[2, 7, FEATURES], Kind::Double);
    let weights = mlp_weights(FEATURES, Kind::Double);
    untiled_mlp(&hidden, &weights)
        .square()
        .sum(Kind::Double)
        .backward();
    let run = |hidden: &Tensor, [gate, up, down]: [&Tensor; 3]| {
        let output = tiled_mlp(hidden, &SwiGlu { gate, up, down }, 3).unwrap();
        output.square().sum(Kind::Double).backward();
    };
    let frozen = weights.each_ref().map(Tensor::detach);
    let own = leaf(&hidden.detach());
    run(&own, frozen.each_ref());
    assert!(distance(&own.grad(), &hidden.grad()) < 1e-14);
    assert!(frozen.iter().all(|weight| !weight.grad().defined()));

    let own = weights.each_ref().map(|weight| leaf(&weight.detach()));
    let frozen = hidden.detach();
    run(&frozen, own.each_ref());
    for (own, weight) in own.iter().zip(&weights) {
        assert!(distance(&own.grad(), &weight.grad()) < 1e-14);
    }
    assert!(!frozen.grad().defined());
}

/// Scalars of tiles: the mean of squares of a sharded x, scaled by a passed
/// and a parameter, over those tokens that a mask leaves.
fn mean_of_squares(tile: &Tile<'_>) -> Result<Tensor> {
    let (x, mask) = (tile.tensor("x")?, tile.tensor("mask")?);
    let squares = x.f_square()?.f_sum_dim_intlist(-1, false, None)?;
    let scaled = squares
        .f_mul(tile.tensor("scale")?)?
        .f_mul(&tile.parameters()[0])?;
    Ok(scaled.f_masked_select(mask)?.f_mean(None)?)
}

struct Squares {
    x: Tensor,
    mask: Tensor,
    scale: Tensor,
    weight: Tensor,
}

impl Squares {
    fn new(tokens: i64, counted: impl Fn(i64) -> bool) -> Self {
        let mask: Vec<bool> = (0..tokens).map(counted).collect();
        let scalar = |value: f64| Tensor::from(value).set_requires_grad(true);
        Self {
            x: parameter(5, &[1, tokens, 3], Kind::Double),
            mask: Tensor::from_slice(&mask).view([1, tokens]),
            scale: scalar(1.5),
            weight: scalar(-0.7),
        }
    }

    fn tiled(&self, tiles: usize, reduction: Reduction, counted: bool) -> Result<Tensor> {
        sequence_tiled_compute(
            mean_of_squares,
            &TiledCompute {
                sequence_length: self.mask.size()[1] as usize,
                tiles,
                shard: &[("x", &self.x), ("mask", &self.mask)],
                pass: &[("scale", &self.scale)],
                parameters: &[&self.weight],
                reduction,
                counted: counted.then_some(&self.mask),
                ..TiledCompute::default()
            },
        )
    }

    /// The mean over tokens `first` to `end` that count.
    fn mean(&self, first: i64, end: i64) -> Tensor {
        let narrow = |tensor: &Tensor| tensor.narrow(1, first, end - first);
        let squares = narrow(&self.x).square().sum_dim_intlist(-1, false, None);
        (squares * &self.scale * &self.weight)
            .masked_select(&narrow(&self.mask))
            .mean(None)
    }

    /// What reaches x, the scale and the weight from a scalar, and the scalar.
    fn found(&self, scalar: &Tensor, upstream: f64) -> Vec<Tensor> {
        let leaves = [&self.x, &self.scale, &self.weight];
        let mut found = Tensor::run_backward(&[scalar * upstream], &leaves, false, false);
        found.push(scalar.detach());
        found
    }
}

fn assert_near(got: Vec<Tensor>, due: Vec<Tensor>) {
    for (got, due) in got.iter().zip(&due) {
        assert!(distance(got, due) < 1e-14, "{got} {due}");
    }
}

#[rstest]
fn a_mean_is_over_tokens(
    #[values((8, 4), (10, 4), (125, 4), (5, 4), (3, 4), (1, 4))] (tokens, tiles): (i64, usize),
    #[values(1.0, 0.25, -3.0)] upstream: f64,
) {
    let all = Squares::new(tokens, |_| true);
    let due = all.found(&all.mean(0, tokens), upstream);
    for counted in [false, true] {
        let got = all.tiled(tiles, Reduction::Mean, counted).unwrap();
        let due = due.iter().map(Tensor::shallow_clone).collect();
        assert_near(all.found(&got, upstream), due);
    }
}

/// All tokens of the second tile are left out, and some of the third.
#[rstest]
fn a_mean_is_over_tokens_that_count(#[values(1.0, 0.25, -3.0)] upstream: f64) {
    let some = Squares::new(10, |token| !(3..7).contains(&token));
    let due = some.found(&some.mean(0, 10), upstream);
    let got = some.tiled(4, Reduction::Mean, true).unwrap();
    assert_near(some.found(&got, upstream), due);
    // What DeepSpeed says of this.
    let theirs = some.tiled(4, Reduction::MeanOfTiles, false).unwrap();
    assert!(theirs.double_value(&[]).is_nan());
}

#[test]
fn a_mean_of_nothing_is_zero_and_so_are_its_gradients() {
    for tokens in [0, 5] {
        let none = Squares::new(tokens, |_| false);
        let got = none.tiled(2, Reduction::Mean, true).unwrap();
        let due = [&none.x, &none.scale, &none.weight, &got.detach()].map(Tensor::zeros_like);
        assert_eq!(none.found(&got, 1.0), due);
        assert_eq!(got.double_value(&[]), 0.0);
    }
}

/// DeepSpeed cuts 10 tokens into 3, 3, 3 and 1, and takes the mean of four.
#[rstest]
fn a_mean_of_tiles_is_that_of_deepspeed(#[values(1.0, 0.25, -3.0)] upstream: f64) {
    let all = Squares::new(10, |_| true);
    let bounds = [(0, 3), (3, 6), (6, 9), (9, 10)];
    let means = bounds.map(|(first, end)| all.mean(first, end));
    let due = all.found(&Tensor::stack(&means, 0).mean(None), upstream);
    let got = all.tiled(4, Reduction::MeanOfTiles, false).unwrap();
    assert_near(all.found(&got, upstream), due);
    let tokens = all.tiled(4, Reduction::Mean, false).unwrap();
    assert!(distance(&got, &tokens) > 1e-3);
}

#[test]
fn a_sum_is_the_sum_of_tiles() {
    let all = Squares::new(5, |_| true);
    let due = all.mean(0, 2) + all.mean(2, 4) + all.mean(4, 5);
    let got = all.tiled(4, Reduction::Sum, false).unwrap();
    assert_near(all.found(&got, -3.0), all.found(&due, -3.0));
}

/// Tokens in dimension 0 of the inputs, in dimension 2 of the output; two
/// sharded inputs and a passed one have gradients.
#[test]
fn dimensions_may_differ_and_every_input_has_its_gradient() {
    let [a, b, c] =
        [[7, 3], [7, 4], [3, 4]].map(|size| parameter(size[1] as u64, &size, Kind::Double));
    let compute = |tensors: [&Tensor; 3]| {
        let [a, b, c] = tensors;
        // [3, 4, t]
        let product = a.f_unsqueeze(2)?.f_mul(&b.f_unsqueeze(1)?)?;
        Ok(product.f_mul(c)?.f_permute([1, 2, 0])?)
    };
    let tiled = |gradient: Option<&[&str]>| {
        sequence_tiled_compute(
            move |tile| compute([tile.tensor("a")?, tile.tensor("b")?, tile.tensor("c")?]),
            &TiledCompute {
                sequence_length: 7,
                tiles: 3,
                shard: &[("a", &a), ("b", &b)],
                shard_dimension: 0,
                pass: &[("c", &c)],
                gradient,
                output_dimension: 2,
                reduction: Reduction::None,
                ..TiledCompute::default()
            },
        )
        .unwrap()
    };
    let cotangent = values(9, &[3, 4, 7], Kind::Double);
    let found = |output: &Tensor| {
        Tensor::run_backward(
            &[(output * &cotangent).sum(Kind::Double)],
            &[&a, &b, &c],
            false,
            false,
        )
    };
    let whole: Tensor = compute([&a, &b, &c])
        .map_err(|error: ulysses::Error| error)
        .unwrap();
    let due = found(&whole);
    let output = tiled(None);
    assert_eq!(output, whole);
    assert_near(
        found(&output),
        due.iter().map(Tensor::shallow_clone).collect(),
    );
    // Only what is named has one.
    let only = found(&tiled(Some(&["c"])));
    assert!(!only[0].defined() && !only[1].defined());
    assert!(distance(&only[2], &due[2]) < 1e-14);
}

/// Hands on a parameter, and counts what comes back to it.
struct Counted(Arc<AtomicUsize>);

impl Function for Counted {
    fn forward(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        Ok(vec![inputs[0].f_view_as(&inputs[0])?])
    }

    fn backward(&mut self, cotangents: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(vec![Some(cotangents[0].shallow_clone())])
    }
}

#[test]
fn a_parameter_is_given_its_gradient_once_after_the_last_tile() {
    let (counter, log) = (
        Arc::new(AtomicUsize::new(0)),
        Arc::new(Mutex::new(Vec::new())),
    );
    let weight = parameter(1, &[4, 3], Kind::Double);
    let counted = apply(Counted(Arc::clone(&counter)), &[&weight])
        .unwrap()
        .remove(0);
    let x = parameter(2, &[1, 9, 3], Kind::Double);
    let (arrived, runs) = (Arc::clone(&counter), Arc::clone(&log));
    let output = sequence_tiled_compute(
        move |tile| {
            let now = (
                tile.tokens(),
                grad_enabled(),
                arrived.load(Ordering::SeqCst),
            );
            runs.lock().unwrap().push(now);
            Ok(tile
                .tensor("x")?
                .f_linear(&tile.parameters()[0], None::<&Tensor>)?)
        },
        &TiledCompute {
            sequence_length: 9,
            tiles: 4,
            shard: &[("x", &x)],
            parameters: &[&counted],
            reduction: Reduction::None,
            ..TiledCompute::default()
        },
    )
    .unwrap();
    let tiles = [0..3, 3..6, 6..9];
    let run = |recorded: bool| tiles.clone().map(|tokens| (tokens, recorded, 0));
    assert_eq!(*log.lock().unwrap(), run(false));
    output.sum(Kind::Double).backward();
    assert_eq!(*log.lock().unwrap(), [run(false), run(true)].concat());
    assert_eq!(counter.load(Ordering::SeqCst), 1);
    assert!(
        distance(
            &weight.grad(),
            &x.detach()
                .sum_dim_intlist([0, 1].as_slice(), false, None)
                .expand([4, 3], false)
        ) < 1e-14
    );
}

#[test]
fn without_gradients_it_runs_once_and_is_dropped() {
    let runs = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&runs);
    let x = parameter(2, &[1, 9, 3], Kind::Double);
    let compute = TiledCompute {
        sequence_length: 9,
        tiles: 3,
        shard: &[("x", &x)],
        reduction: Reduction::None,
        ..TiledCompute::default()
    };
    let function = move |tile: &Tile<'_>| {
        counter.fetch_add(1, Ordering::SeqCst);
        Ok(tile.tensor("x")?.f_exp()?)
    };
    let output = tch::no_grad(|| sequence_tiled_compute(function, &compute)).unwrap();
    assert!(!output.requires_grad());
    assert_eq!(output, x.exp());
    assert_eq!(runs.load(Ordering::SeqCst), 3);
    assert_eq!(Arc::strong_count(&runs), 1);
}

#[test]
fn tiles_inside_a_checkpoint() {
    let hidden = parameter(1, &[2, 7, FEATURES], Kind::Double);
    let weights = mlp_weights(FEATURES, Kind::Double);
    let [gate, up, down] = &weights;
    let layer = |inputs: &[Tensor]| {
        let [hidden, gate, up, down] = inputs else {
            panic!()
        };
        let output = tiled_mlp(hidden, &SwiGlu { gate, up, down }, 3)?;
        Ok(vec![output.f_add(hidden)?.f_sin()?])
    };
    let leaves = [&hidden, gate, up, down];
    let found = |output: &Tensor| {
        Tensor::run_backward(&[output.square().sum(Kind::Double)], &leaves, false, false)
    };
    let due = found(&(untiled_mlp(&hidden, &weights) + &hidden).sin());
    assert_near(found(&checkpoint(layer, &leaves).unwrap()[0]), due);
}

#[test]
fn backward_through_a_retained_graph_can_be_repeated() {
    let some = Squares::new(10, |token| token != 4);
    let mean = some.tiled(4, Reduction::Mean, true).unwrap();
    let leaves = [&some.x, &some.scale, &some.weight];
    let first = Tensor::run_backward(&[&mean], &leaves, true, false);
    assert_eq!(Tensor::run_backward(&[&mean], &leaves, false, false), first);
}

/// 600 tiles that each add 1: in bfloat16 the sum would stay at 256.
#[test]
fn gradients_of_half_types_are_summed_in_float32() {
    let weight = Tensor::ones([1], (Kind::BFloat16, Device::Cpu)).set_requires_grad(true);
    let x = Tensor::ones([1, 600, 1], (Kind::BFloat16, Device::Cpu));
    let output = sequence_tiled_compute(
        |tile| Ok(tile.tensor("x")?.f_mul(&tile.parameters()[0])?),
        &TiledCompute {
            sequence_length: 600,
            tiles: 600,
            shard: &[("x", &x)],
            parameters: &[&weight],
            reduction: Reduction::None,
            ..TiledCompute::default()
        },
    );
    output.unwrap().sum(Kind::BFloat16).backward();
    assert_eq!(weight.grad().kind(), Kind::BFloat16);
    assert_eq!(weight.grad().double_value(&[0]), 600.0);
}

#[test]
fn an_input_that_was_changed_in_place_is_refused() {
    let hidden = parameter(1, &[1, 7, FEATURES], Kind::Double);
    let mut doubled = &hidden * 2.0;
    let [gate, up, down] = &mlp_weights(FEATURES, Kind::Double);
    let output = tiled_mlp(&doubled, &SwiGlu { gate, up, down }, 2).unwrap();
    let _ = tch::no_grad(|| doubled.g_add_scalar_(1.0));
    let error = output
        .sum(Kind::Double)
        .f_backward()
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("was changed in place; run backward before changing it"),
        "{error}"
    );
}

/// What is said of one thing wrong with a good call.
fn refusal(spoil: impl for<'a> Fn(&mut TiledCompute<'a>, &'a Tensor)) -> String {
    refusal_of(|tile| Ok(tile.tensor("x")?.shallow_clone()), spoil)
}

fn refusal_of(
    function: impl Fn(&Tile<'_>) -> Result<Tensor> + Send + 'static,
    spoil: impl for<'a> Fn(&mut TiledCompute<'a>, &'a Tensor),
) -> String {
    let (x, other) = (
        parameter(1, &[2, 8, 4], Kind::Double),
        values(2, &[2, 9], Kind::Double),
    );
    let (shard, pass) = ([("x", &x)], [("other", &other)]);
    let mut compute = TiledCompute {
        sequence_length: 8,
        tiles: 3,
        shard: &shard,
        pass: &pass,
        reduction: Reduction::None,
        ..TiledCompute::default()
    };
    spoil(&mut compute, &other);
    sequence_tiled_compute(function, &compute)
        .unwrap_err()
        .to_string()
}

#[test]
fn what_cannot_be_right_is_refused() {
    let undefined = Tensor::new();
    for (error, due) in [
        (refusal(|c, _| c.tiles = 0), "`tiles` is 0; give at least 1"),
        (
            refusal(|c, _| c.shard = &[]),
            "`shard` has no tensor; give at least one tensor of which each tile sees its tokens",
        ),
        (
            refusal(|c, _| c.sequence_length = 7),
            "`shard` has \"x\" [2, 8, 4], of 8 tokens in dimension 1, but `sequence_length` is 7; \
             give every tensor to shard as many tokens",
        ),
        (
            refusal(|c, _| c.shard_dimension = 3),
            "`shard` has \"x\" [2, 8, 4], without dimension 3; \
             give the dimension of the tokens as `shard_dimension`",
        ),
        (
            refusal(|c, _| c.gradient = Some(&["x", "y"])),
            "`gradient` names a tensor \"y\"; name some of [\"x\", \"other\"]",
        ),
        (
            refusal(|c, _| c.pass = c.shard),
            "`pass` names another tensor \"x\"; give each tensor a name of its own",
        ),
        (
            refusal(|c, other| c.counted = Some(other)),
            "`counted` is given, but the reduction is None; leave it out, or take the mean over tokens",
        ),
        (
            refusal(|c, other| (c.reduction, c.counted) = (Reduction::Mean, Some(other))),
            "`counted` has element type Double; give Bool: whether a token counts",
        ),
        (
            refusal(|c, _| c.reduction = Reduction::Sum),
            "`function` returned [2, 3, 4] for a tile that is to be reduced; \
             return a scalar for each tile, or do not reduce",
        ),
        (
            refusal(|c, _| c.output_dimension = 2),
            "`function` returned [2, 3, 4] for a tile of 3 tokens; \
             return as many rows in dimension 2, or reduce",
        ),
        (
            refusal_of(
                |tile| {
                    Ok(tile
                        .tensor("x")?
                        .f_narrow(2, 0, tile.tokens().len() as i64)?)
                },
                |_, _| (),
            ),
            "`function` returned Double [2, 2, 2] for a tile after one that gives Double [2, 2, 3]; \
             return the same for every tile, but for its tokens",
        ),
        (
            refusal_of(|tile| Ok(tile.tensor("z")?.shallow_clone()), |_, _| ()),
            "`function` asks for a tensor \"z\"; give it to be sharded or passed, beside [\"x\", \"other\"]",
        ),
        (
            refusal_of(|_| Ok(Tensor::new()), |_, _| ()),
            "`function` returned an undefined tensor; return one that holds data",
        ),
    ] {
        assert_eq!(error, due);
    }
    let x = values(1, &[2, 8, 3], Kind::Double);
    for (compute, due) in [
        (
            TiledCompute {
                shard: &[("x", &undefined)],
                ..TiledCompute::default()
            },
            "`shard` has an undefined tensor x",
        ),
        (
            TiledCompute {
                shard: &[("x", &x)],
                sequence_length: 8,
                pass: &[("y", &undefined)],
                ..TiledCompute::default()
            },
            "`pass` has an undefined tensor y",
        ),
        (
            TiledCompute {
                shard: &[("x", &x)],
                sequence_length: 8,
                parameters: &[&x, &undefined],
                ..TiledCompute::default()
            },
            "`parameters` has an undefined tensor at position 1",
        ),
    ] {
        let error = sequence_tiled_compute(|tile| Ok(tile.tensor("x")?.shallow_clone()), &compute)
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("{due}; give a tensor that holds data")
        );
    }
}

#[test]
fn an_mlp_that_does_not_fit_is_refused() {
    let hidden = values(1, &[1, 8, FEATURES], Kind::Double);
    let [gate, up, down] = &mlp_weights(FEATURES, Kind::Double);
    let error = |hidden: &Tensor, gate: &Tensor, tiles| {
        tiled_mlp(hidden, &SwiGlu { gate, up, down }, tiles)
            .unwrap_err()
            .to_string()
    };
    assert_eq!(error(&hidden, gate, 0), "`tiles` is 0; give at least 1");
    assert_eq!(
        error(&hidden.select(0, 0), gate, 2),
        "`hidden` is [8, 6]; give [batch, tokens, features]"
    );
    assert_eq!(
        error(&hidden, &gate.transpose(0, 1), 2),
        "`gate` is [6, 20], `up` [20, 6] and `down` [6, 20], with 6 features in `hidden`; \
         give [F, h], [F, h] and [o, F]"
    );
    assert_eq!(
        error(&hidden, &gate.to_kind(Kind::Float), 2),
        "`gate` has element type Float, but `hidden` has Double; give all the same"
    );
}
