//! Attention by its definition: all scores at once, one dense mask.
//!
//! Nothing here knows of tiles. That makes it a second opinion on those who
//! do.

use super::{
    Call,
    formula::{self, Formula},
    tiled::Place,
    visible::positions,
};
use crate::error::Result;
use std::slice;
use tch::Tensor;

pub(super) fn attention(call: &Call) -> Result<Tensor> {
    let device = call.query.device();
    let formula = Formula {
        scale: call.scale(),
        softcap: call.score.softcap,
        slopes: call.structure.slopes,
        sinks: call.structure.sinks,
        dropout: call.structure.dropout,
        visible: call.visible.dense(device)?,
    };
    let everywhere = Place {
        batch: 0..call.batch(),
        heads: 0..call.heads.query_heads(),
        queries: positions(slice::from_ref(&(0..call.visible.queries)), device)?,
        keys: positions(slice::from_ref(&(0..call.visible.keys)), device)?,
    };
    let inputs = [call.query, call.key, call.value];
    formula::attention(inputs, call.heads, &formula, &everywhere)
}
