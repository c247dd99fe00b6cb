//! A decoder on a batch.

use fixtures::loss::Ignored;
use fixtures::model::ModelDefect;
use fixtures::{Dtype, ModelCase};

/// A change to the plain case.
type Change = fn(&mut ModelCase);

const CHANGES: [Change; 16] = [
    |_| (),
    // In bfloat16 the roundings of two layers hide what a mistake does.
    |c| (c.dtype, c.is_tied) = (Dtype::F16, true),
    |c| (c.dtype, c.is_tied, c.ignored) = (Dtype::F64, true, Ignored::Some),
    |c| (c.documents, c.batch) = (Some(3), 2),
    |c| (c.dtype, c.documents, c.is_checkpointed) = (Dtype::F64, Some(2), true),
    |c| (c.is_checkpointed, c.sequence, c.cotangent) = (true, 13, Some(70)),
    |c| c.ignored = Ignored::Rank,
    |c| (c.dtype, c.ignored) = (Dtype::F64, Ignored::All),
    // Some ranks have no token.
    |c| (c.sequence, c.batch) = (2, 2),
    |c| (c.head_size, c.theta, c.epsilon) = (Some(6), Some(100), Some(2)),
    // On three and four ranks some have more heads than others.
    |c| (c.hidden, c.query_heads, c.kv_heads) = (24, 6, 2),
    |c| c.defect = Some(ModelDefect::Ids),
    |c| c.defect = Some(ModelDefect::Positions),
    |c| c.defect = Some(ModelDefect::Labels),
    |c| c.defect = Some(ModelDefect::Heads),
    |c| c.defect = Some(ModelDefect::Weights),
];

/// With replicas.
const REPLICATED: [Change; 3] = [
    |c| c.ignored = Ignored::Some,
    |c| (c.ignored, c.is_tied, c.batch) = (Ignored::Rank, true, 2),
    |c| (c.dtype, c.documents, c.cotangent) = (Dtype::F64, Some(2), Some(40)),
];

/// Those of a world size.
pub(super) fn cases(world: usize) -> impl Iterator<Item = ModelCase> {
    let replicas = (1..=world).filter(move |n| *n > 1 && world.is_multiple_of(*n));
    let replicated = replicas.flat_map(move |replicas| {
        REPLICATED.iter().map(move |change| {
            let mut case = plain(world);
            case.replicas = Some(replicas);
            change(&mut case);
            case
        })
    });
    let alone = CHANGES.iter().map(move |change| {
        let mut case = plain(world);
        change(&mut case);
        case
    });
    alone.chain(replicated)
}

fn plain(world: usize) -> ModelCase {
    // So that the ranks divide the heads.
    let (query_heads, kv_heads) = match world {
        3 => (6, 3),
        _ => (4, 2),
    };
    ModelCase {
        world,
        batch: 1,
        sequence: 12,
        layers: 2,
        hidden: 4 * query_heads,
        query_heads,
        kv_heads,
        mlp: 20,
        vocabulary: 23,
        dtype: Dtype::F32,
        seed: 0,
        replicas: None,
        head_size: None,
        is_tied: false,
        theta: None,
        epsilon: None,
        documents: None,
        is_checkpointed: false,
        ignored: Ignored::Nothing,
        cotangent: None,
        defect: None,
    }
}
