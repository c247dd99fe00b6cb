//! Which clauses a case of the profile `tiled` tests.

use fixtures::tiled::{Frozen, Function, Ignored, Reduction, TiledCase, tiles};

use super::Clause;

pub(super) fn clauses(case: &TiledCase) -> Vec<Clause> {
    if case.defect.is_some() {
        let refusal = [Clause::SenseIsChecked, Clause::InWords];
        let together = (case.world > 1).then_some(Clause::Together);
        return refusal.into_iter().chain(together).collect();
    }
    let is_something = case.ignored != Ignored::All;
    let is_ragged = case.shards().iter().any(|shard| {
        let lengths = tiles(shard.len(), case.tiles);
        let lengths: Vec<usize> = lengths.iter().map(|tile| tile.len()).collect();
        lengths.len() < case.tiles || lengths.last() != lengths.first()
    });
    let is_nll = case.function == Function::Nll;
    let has_empty_tile = matches!(case.ignored, Ignored::Tile | Ignored::All)
        || case.shards().iter().any(|shard| shard.is_empty());
    let trains = case.frozen != Some(Frozen::Weights);
    let tests = [
        (!case.is_scalar(), Clause::TiledOutput),
        (is_ragged, Clause::RaggedTiles),
        (
            is_nll && case.reduction == Reduction::Mean && is_something,
            Clause::TiledMean,
        ),
        (is_nll && has_empty_tile, Clause::EmptyTile),
        (
            case.reduction == Reduction::MeanOfTiles,
            Clause::MeanOfTilesByName,
        ),
        (is_something, Clause::TiledGradients),
        (
            trains && is_something && case.tiles > 1,
            Clause::EachTileOnce,
        ),
        (case.is_passed && is_something, Clause::PassedGradient),
        (case.frozen.is_some(), Clause::FrozenApart),
        (case.counts_signals, Clause::OneSignal),
        (trains && is_something && case.world > 1, Clause::TilesAlone),
    ];
    let tested = tests.into_iter();
    tested
        .filter_map(|(tests, clause)| tests.then_some(clause))
        .collect()
}
