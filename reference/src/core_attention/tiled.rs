//! Attention tile by tile, forward and backward.
//!
//! Forward keeps nothing but its inputs. Backward computes each tile once more
//! and adds its cotangents up where they belong, in float32 for the half
//! types, so that a key in many tiles is not rounded once for each. Memory
//! beside inputs, outputs and cotangents is that of one tile.

use super::{
    Call, Dropout,
    formula::{self, Formula, precise},
    plan::{Inside, Tile, plan},
    sdpa::Fused,
    visible::{Order, positions, without_blind},
};
use crate::{
    autograd::{Function, Kept, apply, pull_back},
    error::{Error, Result},
    head_partition::HeadMap,
};
use std::{ops::Range, slice};
use tch::{Kind, Tensor};

/// Which rows, heads and tokens a rectangle of the score matrix is of.
pub(super) struct Place {
    pub(super) batch: Range<usize>,
    /// Query heads of this device.
    pub(super) heads: Range<usize>,
    /// Places in the sequence, int64 [queries] and [keys].
    pub(super) queries: Tensor,
    pub(super) keys: Tensor,
}

/// How a tile is computed.
#[derive(Clone, Copy)]
pub(super) enum Arithmetic {
    /// By torch's fused kernel, which knows a scale and a mask.
    Fused(Fused),
    /// By the formula, in float32 for the half types.
    Formula {
        scale: f64,
        softcap: Option<f64>,
        slopes: bool,
        sinks: bool,
        dropout: Option<Dropout>,
    },
}

/// Attention of `inputs`, which are query, key and value of `call` or the same
/// with zeros appended to their heads, in tiles of at most `rows` queries.
pub(super) fn attention(
    call: &Call,
    inputs: [&Tensor; 3],
    arithmetic: Arithmetic,
    rows: usize,
) -> Result<Tensor> {
    let query_heads = call.heads.query_heads();
    let tiled = Tiled {
        tiles: plan(&call.visible, call.batch(), query_heads, rows),
        heads: call.heads.clone(),
        order: call.visible.order,
        arithmetic,
        kept: Kept::default(),
    };
    let mut inputs = inputs.to_vec();
    if let Arithmetic::Formula { .. } = arithmetic {
        inputs.extend(call.structure.slopes);
        inputs.extend(call.structure.sinks);
    }
    let outputs = apply(tiled, &inputs)?;
    outputs
        .into_iter()
        .next()
        .ok_or_else(|| Error::Libtorch("attention gave no output".to_owned()))
}

// The inputs, in order; slopes and sinks follow where there are any.
const QUERY: usize = 0;
const KEY: usize = 1;
const VALUE: usize = 2;

struct Tiled {
    tiles: Vec<Tile>,
    heads: HeadMap,
    order: Order,
    arithmetic: Arithmetic,
    kept: Kept,
}

impl Tiled {
    /// What a tile sees of one of the inputs: a view of each range of tokens.
    fn views(&self, tile: &Tile, input: usize, tensor: &Tensor) -> Result<Vec<Tensor>> {
        let heads = match input {
            KEY | VALUE => self.heads.narrow(tile.heads.clone()).0,
            _ => tile.heads.clone(),
        };
        let tokens = match input {
            QUERY => slice::from_ref(&tile.queries),
            KEY | VALUE => &tile.keys,
            _ => return Ok(vec![narrow(tensor, 0, &heads)?]),
        };
        let rows = narrow(&narrow(tensor, 0, &tile.batch)?, 1, &heads)?;
        tokens.iter().map(|range| narrow(&rows, 2, range)).collect()
    }

    /// What a tile sees of the inputs, each in one piece.
    fn parts(&self, tile: &Tile, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let part = |(input, tensor)| {
            let views = self.views(tile, input, tensor)?;
            let part = match &views[..] {
                [view] => view.shallow_clone(),
                views => Tensor::f_cat(views, 2)?,
            };
            Ok(match self.arithmetic {
                Arithmetic::Fused(_) => part,
                Arithmetic::Formula { .. } => part.f_to_kind(precise(part.f_kind()?))?,
            })
        };
        inputs.iter().enumerate().map(part).collect()
    }

    /// The output of a tile from its parts.
    fn compute(&self, tile: &Tile, parts: &[Tensor]) -> Result<Tensor> {
        let [query, key, value, more @ ..] = parts else {
            return Err(Error::Libtorch("a tile lacks an input".to_owned()));
        };
        let inputs = [query, key, value];
        let (_, heads) = self.heads.narrow(tile.heads.clone());
        match self.arithmetic {
            Arithmetic::Fused(fused) => self.fused(tile, inputs, &heads, fused),
            Arithmetic::Formula {
                scale,
                softcap,
                slopes,
                sinks,
                dropout,
            } => {
                let place = self.place(tile, query)?;
                let formula = Formula {
                    scale,
                    softcap,
                    slopes: more.first().filter(|_| slopes),
                    sinks: more.last().filter(|_| sinks),
                    dropout,
                    visible: self.visible(tile, &place)?,
                };
                // As a fused kernel: nothing between inputs and output is rounded
                // to a half type.
                let kind = query.f_kind()?;
                let [query, key, value] = inputs.map(|input| input.f_to_kind(precise(kind)));
                let inputs = [&query?, &key?, &value?];
                let output = formula::attention(inputs, &heads, &formula, &place)?;
                Ok(output.f_to_kind(kind)?)
            }
        }
    }

    fn fused(
        &self,
        tile: &Tile,
        inputs: [&Tensor; 3],
        heads: &HeadMap,
        fused: Fused,
    ) -> Result<Tensor> {
        match tile.inside {
            Inside::All => fused.attention(inputs, heads, None, false),
            Inside::Causal => fused.attention(inputs, heads, None, true),
            Inside::InOrder => {
                let place = self.place(tile, inputs[QUERY])?;
                let Some(visible) = self.visible(tile, &place)? else {
                    return fused.attention(inputs, heads, None, false);
                };
                let (visible, blind) = without_blind(&visible)?;
                let output = fused.attention(inputs, heads, Some(&visible), false)?;
                Ok(output.f_masked_fill(&blind, 0.0)?)
            }
        }
    }

    fn place(&self, tile: &Tile, query: &Tensor) -> Result<Place> {
        Ok(Place {
            batch: tile.batch.clone(),
            heads: tile.heads.clone(),
            queries: positions(slice::from_ref(&tile.queries), query.device())?,
            keys: positions(&tile.keys, query.device())?,
        })
    }

    /// Which keys are visible inside a tile; none where all are.
    fn visible(&self, tile: &Tile, place: &Place) -> Result<Option<Tensor>> {
        match tile.inside {
            Inside::All => Ok(None),
            Inside::Causal | Inside::InOrder => self.order.visible(&place.queries, &place.keys),
        }
    }
}

impl Function for Tiled {
    fn forward(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        self.kept = Kept::new(inputs)?;
        let (query, value) = (&inputs[QUERY], &inputs[VALUE]);
        let mut size = query.size();
        size[3] = value.size()[3];
        let output = zeros(&size, query.f_kind()?, query)?;
        for tile in &self.tiles {
            let computed = self.compute(tile, &self.parts(tile, inputs)?)?;
            for mut room in self.views(tile, QUERY, &output)? {
                room.f_copy_(&computed)?;
            }
        }
        Ok(vec![output])
    }

    fn backward(&mut self, cotangents: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let (inputs, needed) = (self.kept.tensors()?, self.kept.needed());
        let sums: Vec<Tensor> = inputs
            .iter()
            .map(|input| zeros(&input.size(), precise(input.f_kind()?), input))
            .collect::<Result<_>>()?;
        for tile in &self.tiles {
            let compute = |parts: &[Tensor]| Ok(vec![self.compute(tile, parts)?]);
            let cotangent = self.views(tile, QUERY, &cotangents[0])?;
            let found = pull_back(compute, &self.parts(tile, inputs)?, needed, &cotangent)?;
            for (input, (sum, found)) in sums.iter().zip(found).enumerate() {
                if let Some(found) = found {
                    add(self.views(tile, input, sum)?, found)?;
                }
            }
        }
        sums.iter()
            .zip(inputs)
            .zip(needed)
            .map(|((sum, input), &needed)| {
                Ok(if needed {
                    Some(sum.f_to_kind(input.f_kind()?)?)
                } else {
                    None
                })
            })
            .collect()
    }
}

/// Adds to `views`, which follow one another, their parts of `found`.
fn add(views: Vec<Tensor>, found: Tensor) -> Result<()> {
    let parts = match &views[..] {
        [_] => vec![found],
        views => {
            let sizes: Vec<i64> = views.iter().map(|view| view.size()[2]).collect();
            found.f_split_with_sizes(sizes, 2)?
        }
    };
    for (mut view, part) in views.into_iter().zip(parts) {
        // The view is what is meant; the result is another handle of it.
        let _ = view.f_add_(&part)?;
    }
    Ok(())
}

fn narrow(tensor: &Tensor, dimension: i64, range: &Range<usize>) -> Result<Tensor> {
    Ok(tensor.f_narrow(dimension, range.start as i64, range.len() as i64)?)
}

fn zeros(size: &[i64], kind: Kind, like: &Tensor) -> Result<Tensor> {
    Ok(Tensor::f_zeros(size, (kind, like.device()))?)
}
