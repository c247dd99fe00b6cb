//! The fixed cases, in the order in which they are asked.
//!
//! World sizes are outermost, so that an implementation is started once for
//! each; within one, plain attention comes first, then plain attention that is
//! traced, and then what models ask beyond it, one thing at a time. All sizes of
//! a case differ from one another and from those of its shards: a dimension
//! taken for another changes a shape.

mod batch;
mod beyond;
mod loss;
mod mesh;
mod model;
mod plain;
pub mod random;
mod tiled;
mod traced;

use fixtures::{AttentionCase, Case};

/// Every case of the catalogue.
pub fn cases() -> Vec<Case> {
    let of_world = |world| {
        let attention = attention_on(world).map(Case::from);
        attention
            .chain(loss::cases(world).map(Case::from))
            .chain(tiled::cases(world).map(Case::from))
            .chain(batch::cases(world).map(Case::from))
            .chain(mesh::cases(world).map(Case::from))
            .chain(model::cases(world).map(Case::from))
    };
    let many_ranks = beyond::many_ranks().map(Case::from);
    let many_ranks = many_ranks.chain(mesh::many_ranks().map(Case::from));
    (1..=4).flat_map(of_world).chain(many_ranks).collect()
}

/// Every case of attention.
pub fn attention() -> Vec<AttentionCase> {
    let many_ranks = beyond::many_ranks();
    (1..=4).flat_map(attention_on).chain(many_ranks).collect()
}

fn attention_on(world: usize) -> impl Iterator<Item = AttentionCase> {
    plain::cases(world)
        .chain(traced::cases(world))
        .chain(beyond::cases(world))
}
