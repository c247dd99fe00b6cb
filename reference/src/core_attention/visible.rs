//! Which keys a query sees: mask, window, segments and layout in one place.

use super::{BlockLayout, Mask, Score, Structure};
use crate::error::Result;
use std::{ops::Range, slice};
use tch::{Device, Kind, Tensor};

/// What the order of tokens decides.
#[derive(Debug, Clone, Copy)]
pub(super) struct Order {
    pub(super) causal: bool,
    pub(super) window: Option<usize>,
}

impl Order {
    /// Which keys queries see, bool [queries, keys], given the places in the
    /// sequence of both; none where each sees all.
    pub(super) fn visible(self, queries: &Tensor, keys: &Tensor) -> Result<Option<Tensor>> {
        if !self.causal && self.window.is_none() {
            return Ok(None);
        }
        let ahead = keys.f_unsqueeze(0)?.f_sub(&queries.f_unsqueeze(1)?)?;
        let window = self.window.map_or(i64::MAX, |window| window as i64);
        let furthest_ahead = if self.causal { 0 } else { window - 1 };
        let not_ahead = ahead.f_le(furthest_ahead)?;
        Ok(Some(not_ahead.f_logical_and(&ahead.f_gt(-window)?)?))
    }
}

/// Lets queries that see nothing see everything, so that no softmax divides by
/// zero, and says which they are: [.., queries, 1].
pub(super) fn without_blind(visible: &Tensor) -> Result<(Tensor, Tensor)> {
    let blind = visible.f_any_dim(-1, true)?.f_logical_not()?;
    Ok((visible.f_logical_or(&blind)?, blind))
}

/// A query sees a key if each of these lets it.
pub(super) struct Visible<'a> {
    pub(super) queries: usize,
    pub(super) keys: usize,
    pub(super) order: Order,
    pub(super) segments: Option<&'a [Vec<Range<usize>>]>,
    pub(super) layout: Option<&'a BlockLayout>,
}

impl<'a> Visible<'a> {
    /// Leaves out what hides nothing, so that a call which asks for a window as
    /// long as the sequence, or for one document, is a plain call.
    pub(super) fn new(
        queries: i64,
        keys: i64,
        score: &Score,
        structure: &'a Structure<'a>,
    ) -> Self {
        let (queries, keys) = (queries as usize, keys as usize);
        let all = 0..queries;
        let hides =
            |segments: &&[Vec<Range<usize>>]| !segments.iter().all(|runs| *runs == [all.clone()]);
        Self {
            queries,
            keys,
            order: Order {
                causal: score.mask == Mask::Causal,
                window: score.window.filter(|&window| window < queries),
            },
            segments: structure.segments.as_deref().filter(hides),
            layout: structure.layout.as_ref(),
        }
    }

    /// Whether the order of tokens decides everything.
    pub(super) fn is_plain(&self) -> bool {
        self.order.window.is_none() && self.segments.is_none() && self.layout.is_none()
    }

    /// The definition as one boolean tensor that broadcasts to [B, h, S, S];
    /// none where everything is visible.
    pub(super) fn dense(&self, device: Device) -> Result<Option<Tensor>> {
        let queries = positions(slice::from_ref(&(0..self.queries)), device)?;
        let keys = positions(slice::from_ref(&(0..self.keys)), device)?;
        let parts = [
            self.order.visible(&queries, &keys)?,
            self.in_segments(device)?,
            self.in_layout(&queries, &keys)?,
        ];
        let mut all: Option<Tensor> = None;
        for part in parts.into_iter().flatten() {
            all = Some(match all {
                None => part,
                Some(all) => all.f_logical_and(&part)?,
            });
        }
        Ok(all)
    }

    /// [B, 1, S, S]: both tokens are in the same run.
    fn in_segments(&self, device: Device) -> Result<Option<Tensor>> {
        let Some(segments) = self.segments else {
            return Ok(None);
        };
        let mut runs_of_tokens = vec![-1; segments.len() * self.queries];
        for (runs, row) in segments
            .iter()
            .zip(runs_of_tokens.chunks_exact_mut(self.queries.max(1)))
        {
            for (number, run) in runs.iter().enumerate() {
                row[run.clone()].fill(number as i64);
            }
        }
        let size = [segments.len() as i64, 1, self.queries as i64];
        let runs = Tensor::f_from_slice(&runs_of_tokens)?
            .f_to_device(device)?
            .f_view(size)?;
        let of_query = runs.f_unsqueeze(3)?;
        let same = of_query.f_eq_tensor(&runs.f_unsqueeze(2)?)?;
        Ok(Some(same.f_logical_and(&of_query.f_ge(0)?)?))
    }

    /// [1, h, S, S]: the layout with each block spread over its tokens.
    fn in_layout(&self, queries: &Tensor, keys: &Tensor) -> Result<Option<Tensor>> {
        let Some(layout) = self.layout else {
            return Ok(None);
        };
        let (heads, blocks) = (layout.heads() as i64, layout.blocks() as i64);
        let of_tokens =
            |positions: &Tensor| positions.f_divide_scalar_mode(layout.block() as i64, "floor");
        Ok(Some(
            Tensor::f_from_slice(layout.as_slice())?
                .f_to_device(queries.device())?
                .f_view([1, heads, blocks, blocks])?
                .f_index_select(2, &of_tokens(queries)?)?
                .f_index_select(3, &of_tokens(keys)?)?,
        ))
    }
}

/// The places in the sequence of the tokens of `ranges`, int64.
pub(super) fn positions(ranges: &[Range<usize>], device: Device) -> Result<Tensor> {
    let tokens = |range: &Range<usize>| {
        Tensor::f_arange_start(range.start as i64, range.end as i64, (Kind::Int64, device))
    };
    match ranges {
        [range] => Ok(tokens(range)?),
        ranges => {
            let parts: Vec<Tensor> = ranges.iter().map(tokens).collect::<Result<_, _>>()?;
            Ok(Tensor::f_cat(&parts, 0)?)
        }
    }
}
