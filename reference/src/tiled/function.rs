//! The node of the graph: forward over the tiles, backward over them again.

use super::{Reduction, Tile, TiledCompute};
use crate::{
    autograd::{Function, Kept, pull_back},
    core_attention::precise,
    error::{Error, Result, refuse},
};
use std::ops::Range;
use tch::{Kind, Tensor};

/// The inputs are the tensors to shard, those to pass, and the parameters.
pub(super) struct Tiled<F> {
    function: F,
    /// Of the inputs but the parameters.
    names: Vec<String>,
    sharded: usize,
    tiles: Vec<Range<usize>>,
    shard_dimension: i64,
    join: Join,
    kept: Kept,
}

/// How tiles become one.
enum Join {
    /// Along this dimension.
    Concatenate { dimension: usize },
    /// By a sum with one factor for each tile. Where that is 0 the tile is left
    /// out, for its scalar may not be a number.
    Add { factors: Vec<f64> },
}

impl<F: Fn(&Tile<'_>) -> Result<Tensor> + Send + 'static> Tiled<F> {
    pub(super) fn new(function: F, compute: &TiledCompute<'_>) -> Result<Self> {
        let tiles = cut(compute.sequence_length, compute.tiles);
        let join = match compute.reduction {
            Reduction::None => Join::Concatenate {
                dimension: compute.output_dimension,
            },
            Reduction::Sum => Join::Add {
                factors: vec![1.0; tiles.len()],
            },
            Reduction::MeanOfTiles => Join::Add {
                factors: vec![1.0 / tiles.len() as f64; tiles.len()],
            },
            Reduction::Mean => Join::Add {
                factors: shares(&tiles, compute)?,
            },
        };
        let named = compute.shard.iter().chain(compute.pass);
        Ok(Self {
            function,
            names: named.map(|&(name, _)| name.to_owned()).collect(),
            sharded: compute.shard.len(),
            tiles,
            shard_dimension: compute.shard_dimension as i64,
            join,
            kept: Kept::default(),
        })
    }

    /// What a tile sees of one of the inputs, or of something of its shape.
    fn view(&self, tile: &Range<usize>, input: usize, tensor: &Tensor) -> Result<Tensor> {
        match input < self.sharded {
            true => narrow(tensor, self.shard_dimension, tile),
            false => Ok(tensor.shallow_clone()),
        }
    }

    fn parts(&self, tile: &Range<usize>, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let part = |(input, tensor)| self.view(tile, input, tensor);
        inputs.iter().enumerate().map(part).collect()
    }

    fn compute(&self, tile: &Range<usize>, parts: &[Tensor]) -> Result<Tensor> {
        let output = (self.function)(&Tile {
            names: &self.names,
            tensors: parts,
            tokens: tile.clone(),
        })?;
        if !output.defined() {
            return refuse(
                "function",
                "returned an undefined tensor",
                "return one that holds data",
            );
        }
        Ok(output)
    }

    /// Each tile's output written where it belongs.
    fn concatenate(&self, inputs: &[Tensor], dimension: usize) -> Result<Tensor> {
        let mut whole: Option<Tensor> = None;
        for tile in &self.tiles {
            let output = self.compute(tile, &self.parts(tile, inputs)?)?;
            let size = output.size();
            if size.get(dimension) != Some(&(tile.len() as i64)) {
                return refuse(
                    "function",
                    format!("returned {size:?} for a tile of {} tokens", tile.len()),
                    format!("return as many rows in dimension {dimension}, or reduce"),
                );
            }
            let whole = match &mut whole {
                Some(whole) => whole,
                none => {
                    let mut size = size.clone();
                    size[dimension] = self.tiles.last().map_or(0, |last| last.end) as i64;
                    none.insert(Tensor::f_empty(size, (output.f_kind()?, output.device()))?)
                }
            };
            let mut room = narrow(whole, dimension as i64, tile)?;
            if room.size() != size || room.f_kind()? != output.f_kind()? {
                return refuse(
                    "function",
                    format!(
                        "returned {:?} {size:?} for a tile after one that gives {:?} {:?}",
                        output.f_kind()?,
                        room.f_kind()?,
                        room.size()
                    ),
                    "return the same for every tile, but for its tokens",
                );
            }
            room.f_copy_(&output)?;
        }
        whole.ok_or_else(|| Error::Libtorch("a sequence has no tile".to_owned()))
    }

    /// The sum of the tiles' scalars, each with its factor.
    fn add(&self, inputs: &[Tensor], factors: &[f64]) -> Result<Tensor> {
        let scalar = |tile| {
            let output = self.compute(tile, &self.parts(tile, inputs)?)?;
            match output.size()[..] {
                [] => Ok(output),
                ref size => refuse(
                    "function",
                    format!("returned {size:?} for a tile that is to be reduced"),
                    "return a scalar for each tile, or do not reduce",
                ),
            }
        };
        let mut sum: Option<(Tensor, Kind)> = None;
        for (tile, &factor) in self.tiles.iter().zip(factors) {
            if factor == 0.0 {
                continue;
            }
            let output = scalar(tile)?;
            let kind = output.f_kind()?;
            let term = output.f_to_kind(precise(kind))?.f_mul_scalar(factor)?;
            sum = Some(match sum {
                None => (term, kind),
                Some((sum, kind)) => (sum.f_add(&term)?, kind),
            });
        }
        match (sum, self.tiles.first()) {
            (Some((sum, kind)), _) => Ok(sum.f_to_kind(kind)?),
            // Nothing counts. What a tile gives says which kind of zero is due.
            (None, Some(first)) => Ok(scalar(first)?.f_zeros_like()?),
            (None, None) => Err(Error::Libtorch("a sequence has no tile".to_owned())),
        }
    }

    /// The cotangent of what a tile gave; none where it was left out.
    fn cotangent(&self, index: usize, whole: &Tensor) -> Result<Option<Tensor>> {
        match &self.join {
            Join::Concatenate { dimension } => {
                Ok(Some(narrow(whole, *dimension as i64, &self.tiles[index])?))
            }
            Join::Add { factors } if factors[index] == 0.0 => Ok(None),
            Join::Add { factors } => Ok(Some(whole.f_mul_scalar(factors[index])?)),
        }
    }
}

impl<F: Fn(&Tile<'_>) -> Result<Tensor> + Send + 'static> Function for Tiled<F> {
    fn forward(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        self.kept = Kept::new(inputs)?;
        Ok(vec![match &self.join {
            Join::Concatenate { dimension } => self.concatenate(inputs, *dimension)?,
            Join::Add { factors } => self.add(inputs, factors)?,
        }])
    }

    fn backward(&mut self, cotangents: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let (inputs, needed) = (self.kept.tensors()?, self.kept.needed());
        let sums: Vec<Option<Tensor>> = inputs
            .iter()
            .zip(needed)
            .enumerate()
            .map(|(input, (tensor, &needed))| {
                let kind = match input < self.sharded {
                    true => tensor.f_kind()?,
                    false => precise(tensor.f_kind()?),
                };
                let zeros = || Tensor::f_zeros(tensor.size(), (kind, tensor.device()));
                Ok(needed.then(zeros).transpose()?)
            })
            .collect::<Result<_>>()?;
        for (index, tile) in self.tiles.iter().enumerate() {
            let Some(cotangent) = self.cotangent(index, &cotangents[0])? else {
                continue;
            };
            let compute = |parts: &[Tensor]| Ok(vec![self.compute(tile, parts)?]);
            let found = pull_back(compute, &self.parts(tile, inputs)?, needed, &[cotangent])?;
            // In place: beside the sums there is never more than one tile's part.
            for (input, (sum, found)) in sums.iter().zip(found).enumerate() {
                if let (Some(sum), Some(found)) = (sum, found) {
                    let _ = self.view(tile, input, sum)?.f_add_(&found)?;
                }
            }
        }
        sums.into_iter()
            .zip(inputs)
            .map(|(sum, input)| {
                let kind = input.f_kind()?;
                Ok(sum.map(|sum| sum.f_to_kind(kind)).transpose()?)
            })
            .collect()
    }
}

/// Tiles of as many tokens each, but for the last, which has the rest. None is
/// empty, but the one tile of an empty sequence: what it gives has a shape too.
fn cut(length: usize, tiles: usize) -> Vec<Range<usize>> {
    let step = length.div_ceil(tiles).max(1);
    let starts = (0..length.max(1)).step_by(step);
    starts
        .map(|start| start..(start + step).min(length))
        .collect()
}

/// Which share each tile has in the tokens that count.
fn shares(tiles: &[Range<usize>], compute: &TiledCompute<'_>) -> Result<Vec<f64>> {
    let count = |tile: &Range<usize>| match compute.counted {
        None => Ok(tile.len() as i64),
        Some(counted) => {
            let part = narrow(counted, compute.shard_dimension as i64, tile)?;
            Ok(part.f_sum(Kind::Int64)?.f_int64_value(&[])?)
        }
    };
    let counts = tiles.iter().map(count).collect::<Result<Vec<i64>>>()?;
    let all = counts.iter().sum::<i64>().max(1) as f64;
    Ok(counts.into_iter().map(|count| count as f64 / all).collect())
}

fn narrow(tensor: &Tensor, dimension: i64, range: &Range<usize>) -> Result<Tensor> {
    Ok(tensor.f_narrow(dimension, range.start as i64, range.len() as i64)?)
}
