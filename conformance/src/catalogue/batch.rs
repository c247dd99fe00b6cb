//! Each rank's shard of whole rows of tokens.

use fixtures::batch::{BatchDefect, Stream};
use fixtures::{BatchCase, Documents, Sharding};

/// A change to the plain case.
type Change = fn(&mut BatchCase);

const CHANGES: [Change; 20] = [
    |_| (),
    |c| (c.batch, c.sequence) = (1, 23),
    |c| c.sharding = Sharding::Zigzag,
    |c| (c.sharding, c.sequence, c.has_mask) = (Sharding::Striped, 23, true),
    |c| c.documents = Some(Documents::ByPosition(3)),
    |c| c.documents = Some(Documents::ByEnds(3)),
    |c| (c.documents, c.is_across) = (Some(Documents::ByPosition(4)), true),
    |c| (c.sequence, c.pad) = (19, Some(2 * c.world + 1)),
    |c| {
        (c.sequence, c.pad, c.has_mask) = (21, Some(8 * c.world), true);
        (c.documents, c.sharding) = (Some(Documents::ByEnds(4)), Sharding::Zigzag);
    },
    // Some ranks have no token.
    |c| c.sequence = 1,
    |c| c.stream = Some(STREAM),
    |c| {
        c.documents = Some(Documents::ByPosition(3));
        c.stream = Some(Stream {
            has_lengths: true,
            epochs: 2,
            ..STREAM
        });
    },
    |c| {
        (c.documents, c.is_across) = (Some(Documents::ByEnds(3)), true);
        ragged(c, 1);
    },
    |c| {
        (c.sequence, c.pad, c.has_mask) = (19, Some(4 * c.world), true);
        (c.batch, c.sharding) = (1, Sharding::Striped);
        ragged(c, 2);
    },
    |c| c.defect = Some(BatchDefect::Labels),
    |c| (c.stream, c.defect) = (Some(STREAM), Some(BatchDefect::Labels)),
    |c| {
        c.documents = Some(Documents::ByPosition(3));
        c.defect = Some(BatchDefect::Positions);
    },
    |c| {
        c.documents = Some(Documents::ByEnds(3));
        (c.stream, c.defect) = (Some(STREAM), Some(BatchDefect::Ends));
    },
    |c| (c.has_mask, c.defect) = (true, Some(BatchDefect::Mask)),
    |c| (c.pad, c.defect) = (Some(8), Some(BatchDefect::Pad)),
];

const STREAM: Stream = Stream {
    batches: 2,
    has_lengths: false,
    is_ragged: false,
    epochs: 1,
};

/// Those of a world size.
pub(super) fn cases(world: usize) -> impl Iterator<Item = BatchCase> {
    CHANGES.iter().map(move |change| {
        let mut case = BatchCase {
            world,
            batch: 2,
            sequence: 24,
            seed: 0,
            sharding: Sharding::Contiguous,
            documents: None,
            is_across: false,
            has_mask: false,
            pad: None,
            stream: None,
            defect: None,
        };
        change(&mut case);
        case
    })
}

/// Other numbers of batches, where there is another rank, and other lengths.
fn ragged(case: &mut BatchCase, epochs: usize) {
    case.stream = Some(Stream {
        batches: 1,
        has_lengths: true,
        is_ragged: case.world > 1,
        epochs,
    });
}
