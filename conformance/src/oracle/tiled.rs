//! Functions of a long sequence, and their gradients, densely: the tokens of a
//! rank at once.
//!
//! The MLP is `down(silu(gate x) * up x)` with `silu(g) = g / (1 + e^-g)`, the
//! affine function `weight x`; the loss of a token is that of the logits
//! `head x` (`oracle/loss.rs`). Each is of `scale * x` where there is a scale.
//!
//! Tiles are seen in two things: the gradient of a weight is a sum over tiles,
//! of which an honest implementation may round every partial sum to the element
//! type; and DeepSpeed's mean is over tiles.

use std::iter;
use std::ops::Range;

use fixtures::exchange::Declared;
use fixtures::tiled::{Frozen, Function, IGNORE_INDEX, Reduction, TiledCase, TiledInputs, tiles};
use fixtures::{Array, Dtype, Shard};
use tch::{Kind, TchError, Tensor};

use super::due::{DueAnswer, DueTensor};
use super::loss::losses;
use super::rounding::{Computed, Rounding, rounded, unrounded};
use crate::diagnosis::Mistake;
use crate::tensor::from_array;

/// The mistakes that are told by what they make of the answer.
pub(super) const MISTAKES: [Mistake; 13] = [
    Mistake::MeanOfTiles,
    Mistake::MeanOfTokens,
    Mistake::TileMeansInBackward,
    Mistake::IgnoredCounted,
    Mistake::CotangentIgnored,
    Mistake::TilesReordered,
    Mistake::LastTileLost,
    Mistake::GradientOfLastTile,
    Mistake::AccumulatedTwice,
    Mistake::PassedGradientLost,
    Mistake::FrozenStopsAll,
    Mistake::AnnouncedPerTile,
    Mistake::ReducedUnasked,
];

/// What is due; or what would come by a mistake, without the roots. Nobody hands
/// anything to another rank: conventions change nothing.
pub(super) fn due(
    case: &TiledCase,
    _: Declared,
    mistake: Option<Mistake>,
) -> Result<DueAnswer, String> {
    let inputs = case.inputs();
    let compute = |rounding: &Rounding| compute(case, &inputs, mistake, rounding);
    let numbers = match mistake {
        None => rounded(case.dtype, case.seed, compute),
        Some(_) => unrounded(compute),
    };
    let mut numbers = numbers.map_err(|error| format!("the oracle failed: {error}"))?;
    let mut answer = DueAnswer::default();
    for (rank, shard) in case.shards().iter().enumerate() {
        let gradient =
            |name: &'static str| (format!("d{name}"), case.dtype, shape(case, name, shard));
        let out = case.out_shape(shard.len());
        let mut due = vec![("out".to_owned(), case.out_dtype(), out)];
        due.extend(case.gradients().into_iter().map(gradient));
        if case.counts_signals {
            let parameters = vec![case.trained().len()];
            due.push(("gradient_signals".to_owned(), Dtype::I64, parameters));
        }
        let tensors = due.into_iter().map(|(name, dtype, shape)| {
            let tensor = DueTensor::take(&mut numbers, &format!("{name} {rank}"), dtype, shape)?;
            Ok((name, tensor))
        });
        answer.ranks.push(tensors.collect::<Result<_, String>>()?);
    }
    let weights = inputs.weights.iter().map(|(name, _)| *name);
    answer.undue = ["hidden"]
        .into_iter()
        .chain(weights)
        .filter(|name| !case.gradients().contains(name))
        .map(|name| format!("d{name}"))
        .collect();
    Ok(answer)
}

/// The shape of an input, on the rank of this shard.
fn shape(case: &TiledCase, name: &str, shard: &Shard) -> Vec<usize> {
    match name {
        "hidden" => vec![case.batch, shard.len(), case.hidden],
        "scale" => vec![case.hidden],
        "down" => vec![case.hidden, case.width],
        _ => vec![case.width, case.hidden],
    }
}

/// The answers of all ranks, each tensor by its name and rank.
fn compute(
    case: &TiledCase,
    inputs: &TiledInputs,
    mistake: Option<Mistake>,
    rounding: &Rounding,
) -> Result<Computed, TchError> {
    let mut computed = Computed::new();
    for (rank, shard) in case.shards().iter().enumerate() {
        let of_rank = Rank::new(case, inputs, shard, mistake, rounding)?.answer()?;
        for (name, tensor) in of_rank {
            computed.insert(format!("{name} {rank}"), tensor);
        }
    }
    if mistake == Some(Mistake::ReducedUnasked) {
        for name in case.trained() {
            let of = |rank: usize| format!("d{name} {rank}");
            let mut sum = computed[&of(0)].f_zeros_like()?;
            for rank in 0..case.world {
                sum = sum.f_add(&computed[&of(rank)])?;
            }
            for rank in 0..case.world {
                computed.insert(of(rank), sum.shallow_clone());
            }
        }
    }
    Ok(computed)
}

/// One rank, and what it computes with.
struct Rank<'a> {
    case: &'a TiledCase,
    mistake: Option<Mistake>,
    rounding: &'a Rounding,
    /// Not empty but where the rank has no token: then it has that one.
    tiles: Vec<Range<usize>>,
    /// How many tiles from the first on are not lost.
    kept: usize,
    hidden: Tensor,
    scale: Option<Tensor>,
    weights: Vec<(&'static str, Tensor)>,
    /// `[batch, tokens]`.
    labels: Tensor,
    /// 1 where a token counts, whatever its label is: `[1, tokens]`.
    counted: Tensor,
    cotangent: Tensor,
}

impl<'a> Rank<'a> {
    fn new(
        case: &'a TiledCase,
        inputs: &TiledInputs,
        shard: &Shard,
        mistake: Option<Mistake>,
        rounding: &'a Rounding,
    ) -> Result<Rank<'a>, TchError> {
        let wide = |array: &Array| from_array(array)?.f_to_kind(Kind::Double);
        let leaf = |x: Tensor| x.f_set_requires_grad(true);
        let (first, length) = (shard.tokens().first().copied(), shard.len() as i64);
        let own = |x: Tensor| {
            x.f_narrow(1, first.unwrap_or(0) as i64, length)?
                .f_contiguous()
        };
        let mut tiles = tiles(shard.len(), case.tiles);
        let mut kept = tiles.len().max(1);
        let counted = Tensor::f_ones([1, length], (Kind::Double, tch::Device::Cpu))?;
        if let (Some(first), Some(last), Some(Mistake::LastTileLost)) =
            (tiles.first(), tiles.last(), mistake)
            && last.len() < first.len()
        {
            let _ = narrow(&counted, last)?.f_fill_(0.0)?;
            kept -= 1;
        }
        if tiles.is_empty() {
            tiles.push(0..0);
        }
        let cotangent = wide(&inputs.cotangent)?;
        let cotangent = match mistake {
            Some(Mistake::CotangentIgnored) => cotangent.f_ones_like()?,
            _ => cotangent,
        };
        let labels = Tensor::f_from_slice(&inputs.labels)?;
        let labels = labels.f_view([case.batch as i64, case.sequence as i64])?;
        let weights = inputs.weights.iter();
        let weights = weights.map(|(name, weight)| Ok((*name, leaf(wide(weight)?)?)));
        Ok(Rank {
            case,
            mistake,
            rounding,
            tiles,
            kept,
            hidden: leaf(own(wide(&inputs.hidden)?)?)?,
            scale: match &inputs.scale {
                Some(scale) => Some(leaf(wide(scale)?)?),
                None => None,
            },
            weights: weights.collect::<Result<_, TchError>>()?,
            labels: own(labels)?,
            counted,
            cotangent: match case.is_scalar() {
                true => cotangent,
                false => own(cotangent)?,
            },
        })
    }

    fn answer(&self) -> Result<Vec<(String, Tensor)>, TchError> {
        let x = self.scaled()?;
        let (out, objective) = match self.case.function {
            Function::Mlp => self.twice(self.mlp(&x)?),
            Function::Affine => self.twice(self.through(&x, 0)?),
            Function::Nll => self.loss(&x)?,
        };
        objective
            .f_mul(&self.cotangent)?
            .f_sum(Kind::Double)?
            .f_backward()?;
        let mut out = out.f_detach()?;
        if self.mistake == Some(Mistake::TilesReordered) && !self.case.is_scalar() {
            let tiles = self.tiles.iter().rev().map(|tile| narrow(&out, tile));
            out = Tensor::f_cat(&tiles.collect::<Result<Vec<_>, _>>()?, 1)?;
        }
        let mut answer = vec![("out".to_owned(), out)];
        let stops_all = self.mistake == Some(Mistake::FrozenStopsAll)
            && self.case.frozen == Some(Frozen::Input);
        let factor = |mistake, factor| match self.mistake == Some(mistake) {
            true => factor,
            false if stops_all => 0.0,
            false => 1.0,
        };
        let mut give = |name: &str, leaf: &Tensor, factor: f64| {
            answer.push((format!("d{name}"), leaf.f_grad()?.f_mul_scalar(factor)?));
            Ok::<_, TchError>(())
        };
        give("hidden", &self.hidden, 1.0)?;
        if let Some(scale) = &self.scale {
            give("scale", scale, factor(Mistake::PassedGradientLost, 0.0))?;
        }
        for (name, weight) in &self.weights {
            give(name, weight, factor(Mistake::AccumulatedTwice, 2.0))?;
        }
        let announced = match self.mistake {
            Some(Mistake::AnnouncedPerTile) => self.tiles.len() as f64,
            _ => 1.0,
        };
        let signals = Tensor::f_from_slice(&vec![announced; self.case.trained().len()])?;
        answer.push(("gradient_signals".to_owned(), signals));
        Ok(answer)
    }

    /// What is given back, and what is derived: the same.
    fn twice(&self, out: Tensor) -> (Tensor, Tensor) {
        let out = &out * self.counted.unsqueeze(-1);
        (out.shallow_clone(), out)
    }

    /// The tokens that the function is given.
    fn scaled(&self) -> Result<Tensor, TchError> {
        let hidden = self.rounding.leaf(&self.hidden)?;
        let Some(scale) = &self.scale else {
            return Ok(hidden);
        };
        // A product, for its backward is the sum over tokens.
        let [batch, tokens] = [self.hidden.size()[0], self.hidden.size()[1]];
        let ones = Tensor::f_ones([batch, tokens, 1], (Kind::Double, tch::Device::Cpu))?;
        let scale = self.rounding.leaf(scale)?.f_unsqueeze(0)?;
        let each = self.rounding.leaf(&self.rounding.matmul(&ones, &scale)?)?;
        self.rounding.stored(&hidden.f_mul(&each)?)
    }

    /// The tiles whose sums may be rounded more than those within a tile are: of
    /// wide element types none. By a mistake they are told apart anyway.
    fn summed(&self) -> Vec<Range<usize>> {
        match (self.case.dtype, self.mistake) {
            (Dtype::F64 | Dtype::F32, None) => {
                iter::once(0..self.hidden.size()[1] as usize).collect()
            }
            _ => self.tiles.clone(),
        }
    }

    /// The product of tokens and a weight, whose gradient is summed tile by tile.
    fn through(&self, x: &Tensor, weight: usize) -> Result<Tensor, TchError> {
        let weight = &self.weights[weight].1;
        let x = self.rounding.leaf(x)?;
        let (mut products, mut partial) = (Vec::new(), weight.shallow_clone());
        for (number, tile) in self.summed().iter().rev().enumerate() {
            // What comes to a tile's from the right is the sum over those before
            // it, and is rounded with its own.
            partial = match self.mistake {
                Some(Mistake::GradientOfLastTile) if number > 0 => partial.f_detach()?,
                _ => self.rounding.leaf(&partial)?,
            };
            let columns = partial.f_transpose(0, 1)?;
            products.push(self.rounding.matmul(&narrow(&x, tile)?, &columns)?);
        }
        products.reverse();
        self.rounding.stored(&Tensor::f_cat(&products, 1)?)
    }

    fn mlp(&self, x: &Tensor) -> Result<Tensor, TchError> {
        let rounding = self.rounding;
        let x = rounding.leaf(x)?;
        let gate = self.through(&x, 0)?;
        let exponential = rounding.wide(&gate.f_neg()?.f_exp()?)?;
        let divisor = rounding.wide(&exponential.f_add_scalar(1.0)?)?;
        let share = rounding.wide(&divisor.f_reciprocal()?)?;
        let silu = rounding.stored(&gate.f_mul(&share)?)?;
        let product = rounding.stored(&silu.f_mul(&self.through(&x, 1)?)?)?;
        self.through(&product, 2)
    }

    /// The loss that is given back, and the one that is derived.
    fn loss(&self, x: &Tensor) -> Result<(Tensor, Tensor), TchError> {
        let losses = losses(self.rounding, &self.through(x, 0)?, &self.labels)?;
        let losses = losses.f_mul(&self.counted)?;
        let reduction = match (self.case.reduction, self.mistake) {
            (Reduction::Mean, Some(Mistake::MeanOfTiles)) => Reduction::MeanOfTiles,
            (Reduction::MeanOfTiles, Some(Mistake::MeanOfTokens)) => Reduction::Mean,
            (reduction, _) => reduction,
        };
        let loss = self.reduced(&losses, reduction)?;
        let objective = match (reduction, self.mistake) {
            (Reduction::Mean, Some(Mistake::TileMeansInBackward)) => {
                self.reduced(&losses, Reduction::MeanOfTiles)?
            }
            _ => loss.shallow_clone(),
        };
        Ok((loss, objective))
    }

    fn reduced(&self, losses: &Tensor, reduction: Reduction) -> Result<Tensor, TchError> {
        let rounding = self.rounding;
        let sum = |losses: &Tensor| {
            let all = losses.f_reshape([1, losses.numel() as i64])?;
            rounding.sum(&all)?.f_squeeze()
        };
        let mean = |tile: &Range<usize>| {
            let labels = narrow(&self.labels, tile)?;
            let counts = match self.mistake {
                Some(Mistake::IgnoredCounted) => labels.f_ones_like()?,
                _ => labels.f_not_equal(IGNORE_INDEX)?,
            };
            let counts = counts.f_mul(&narrow(&self.counted, tile)?)?;
            let count = counts.f_sum(Kind::Double)?.f_double_value(&[])?;
            let sum = sum(&narrow(losses, tile)?)?;
            // The mean of nothing is 0.
            rounding.wide(&sum.f_mul_scalar(if count > 0.0 { 1.0 / count } else { 0.0 })?)
        };
        match reduction {
            Reduction::None => Ok(losses.shallow_clone()),
            Reduction::Sum => sum(losses),
            Reduction::Mean => mean(&(0..losses.size()[1] as usize)),
            Reduction::MeanOfTiles => {
                let means = self.tiles.iter().take(self.kept).map(mean);
                let means = Tensor::f_stack(&means.collect::<Result<Vec<_>, _>>()?, 0)?;
                rounding.wide(&sum(&means)?.f_div_scalar(self.kept as f64)?)
            }
        }
    }
}

/// The tokens of a tile.
fn narrow(x: &Tensor, tile: &Range<usize>) -> Result<Tensor, TchError> {
    x.f_narrow(1, tile.start as i64, tile.len() as i64)
}
