//! The fixed cases, in the order in which they are asked.
//!
//! World sizes are outermost, so that an implementation is started once for
//! each; within one, plain attention comes first, and then what models ask
//! beyond it, one thing at a time. All sizes of a case differ from one another
//! and from those of its shards: a dimension taken for another changes a shape.

mod beyond;
mod plain;
pub mod random;

use fixtures::{Case, Feature};

/// Every case of the catalogue.
pub fn cases() -> Vec<Case> {
    [1, 2, 3, 4]
        .into_iter()
        .flat_map(|world| plain::cases(world).chain(beyond::cases(world)))
        .chain(beyond::many_ranks())
        .collect()
}

/// What a case holds an implementation to, beyond that its sizes, mask and
/// element type are dealt with: sentences that can turn out to be wrong.
pub fn clauses(case: &Case) -> Vec<&'static str> {
    let mut clauses = Vec::new();
    if case.extras.defect.is_some() {
        clauses.push("What makes no sense is refused in words by every rank, and nobody waits.");
    }
    if case.extras.state.is_some() {
        clauses.push("An answer does not depend on what was asked before it, to the bit.");
    }
    let features = case.features();
    let tests = |from: Feature| features.range(from..).map(|feature| feature.clause());
    // What a case is there for; if nothing, the sizes that it has.
    clauses.extend(tests(Feature::ValueHeadSize));
    if clauses.is_empty() {
        clauses.extend(tests(Feature::GroupedKv));
    }
    if clauses.is_empty() {
        clauses.push("Output and gradients are those of dense attention.");
    }
    clauses
}
