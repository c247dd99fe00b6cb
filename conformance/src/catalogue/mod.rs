//! The fixed cases, in the order in which they are asked.
//!
//! World sizes are outermost, so that an implementation is started once for
//! each; within one, plain attention comes first, then plain attention that is
//! traced, and then what models ask beyond it, one thing at a time. All sizes of
//! a case differ from one another and from those of its shards: a dimension
//! taken for another changes a shape.

mod beyond;
mod plain;
pub mod random;
mod traced;

use fixtures::Case;

/// Every case of the catalogue.
pub fn cases() -> Vec<Case> {
    [1, 2, 3, 4]
        .into_iter()
        .flat_map(|world| {
            plain::cases(world)
                .chain(traced::cases(world))
                .chain(beyond::cases(world))
        })
        .chain(beyond::many_ranks())
        .collect()
}
