//! The loss over the tokens of all ranks.

use fixtures::loss::{Ignored, LossDefect};
use fixtures::{Dtype, LossCase};

/// A change to the plain case.
type Change = fn(&mut LossCase);

const CHANGES: [Change; 14] = [
    |_| (),
    |c| c.ignored = Ignored::Some,
    |c| (c.batch, c.ignored) = (2, Ignored::Rank),
    |c| c.ignored = Ignored::All,
    |c| (c.sequence, c.ignored) = (23, Ignored::Some),
    // Some ranks have no token.
    |c| c.sequence = 1,
    |c| c.cotangent = Some(25),
    |c| (c.is_large, c.dtype) = (true, Dtype::F32),
    |c| c.hidden = Some(8),
    |c| (c.hidden, c.ignored, c.sequence) = (Some(8), Ignored::Rank, 23),
    |c| (c.hidden, c.cotangent, c.batch) = (Some(8), Some(300), 2),
    |c| (c.hidden, c.ignored) = (Some(8), Ignored::All),
    |c| c.defect = Some(LossDefect::Labels),
    |c| c.defect = Some(LossDefect::Length),
];

/// Those of a world size. Over the four of them each meets all four element
/// types.
pub(super) fn cases(world: usize) -> impl Iterator<Item = LossCase> {
    CHANGES.iter().enumerate().map(move |(number, change)| {
        let mut case = LossCase {
            world,
            batch: 1,
            sequence: 24,
            vocabulary: 13,
            dtype: Dtype::FLOATS[(number + world) % Dtype::FLOATS.len()],
            seed: 0,
            hidden: None,
            is_large: false,
            ignored: Ignored::Nothing,
            cotangent: None,
            defect: None,
        };
        change(&mut case);
        case
    })
}
