//! Functions of long sequences, computed in tiles.

use fixtures::tiled::{Frozen, Function, Ignored, Reduction, TiledDefect};
use fixtures::{Dtype, TiledCase};

/// A change to the plain case, an MLP of 12 tokens on each rank.
type Change = fn(&mut TiledCase);

const CHANGES: [Change; 19] = [
    |_| (),
    |c| {
        ragged(c);
        (c.batch, c.counts_signals) = (2, true);
    },
    // More tiles than tokens.
    |c| (c.sequence, c.tiles) = (3 * c.world, 5),
    |c| {
        ragged(c);
        (c.sequence, c.is_passed, c.counts_signals) = (c.sequence - 1, true, true);
    },
    |c| {
        ragged(c);
        (c.function, c.batch, c.is_passed) = (Function::Affine, 2, true);
    },
    |c| {
        ragged(c);
        (c.function, c.frozen) = (Function::Affine, Some(Frozen::Weights));
    },
    |c| {
        ragged(c);
        c.function = Function::Nll;
    },
    |c| {
        (c.function, c.ignored) = (Function::Nll, Ignored::Tile);
        (c.cotangent, c.counts_signals) = (Some(300), true);
    },
    |c| {
        ragged(c);
        (c.function, c.ignored) = (Function::Nll, Ignored::Some);
        (c.batch, c.is_passed) = (2, true);
    },
    |c| (c.function, c.ignored) = (Function::Nll, Ignored::All),
    |c| {
        ragged(c);
        (c.function, c.reduction) = (Function::Nll, Reduction::Sum);
        (c.ignored, c.cotangent) = (Ignored::Tile, Some(25));
    },
    |c| {
        ragged(c);
        (c.function, c.reduction) = (Function::Nll, Reduction::None);
        c.ignored = Ignored::Some;
    },
    |c| {
        ragged(c);
        (c.function, c.reduction) = (Function::Nll, Reduction::MeanOfTiles);
        (c.batch, c.cotangent) = (2, Some(200));
    },
    |c| {
        (c.function, c.frozen) = (Function::Nll, Some(Frozen::Input));
        (c.ignored, c.counts_signals) = (Ignored::Some, true);
    },
    // Some ranks have no token.
    |c| (c.function, c.sequence) = (Function::Nll, c.world.max(2) - 1),
    |c| c.defect = Some(TiledDefect::Tiles),
    |c| c.defect = Some(TiledDefect::Width),
    |c| (c.function, c.defect) = (Function::Nll, Some(TiledDefect::Labels)),
    |c| (c.function, c.defect) = (Function::Nll, Some(TiledDefect::Length)),
];

/// Tiles of 3, 3, 3 and 2 tokens.
fn ragged(case: &mut TiledCase) {
    (case.sequence, case.tiles) = (11 * case.world, 4);
}

/// Those of a world size. Over the four of them each meets all four element
/// types.
pub(super) fn cases(world: usize) -> impl Iterator<Item = TiledCase> {
    CHANGES.iter().enumerate().map(move |(number, change)| {
        let mut case = TiledCase {
            world,
            function: Function::Mlp,
            batch: 1,
            sequence: 12 * world,
            hidden: 6,
            width: 10,
            tiles: 3,
            dtype: Dtype::FLOATS[(number + world) % Dtype::FLOATS.len()],
            seed: 0,
            reduction: Reduction::default(),
            ignored: Ignored::default(),
            frozen: None,
            is_passed: false,
            cotangent: None,
            counts_signals: false,
            defect: None,
        };
        change(&mut case);
        case
    })
}
