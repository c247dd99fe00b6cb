//! What models ask beyond plain attention, one thing at a time, and a few at
//! once.
//!
//! Each line changes one plain case. Over the four world sizes it meets all
//! four element types.

use fixtures::{
    AttentionCase, Content, Defect, Documents, Dtype, Extras, Mask, Padding, Rotary, Sharding,
    State, Strides,
};

/// A change to the plain case.
type Change = fn(&mut AttentionCase);

/// Where a rank's tokens, heads and memory are.
const HELD: [Change; 14] = [
    |c| c.extras.value_size = Some(24),
    |c| (c.mask, c.extras.value_size) = (Mask::Full, Some(5)),
    |c| (c.mask, c.extras.cross) = (Mask::Full, Some(37)),
    |c| {
        (c.mask, c.sequence) = (Mask::Full, 59);
        (c.extras.cross, c.extras.value_size, c.extras.sinks) = (Some(37), Some(24), true);
    },
    |c| c.extras.sharding = Sharding::Zigzag,
    |c| (c.sequence, c.extras.sharding) = (59, Sharding::Zigzag),
    |c| c.extras.sharding = Sharding::Striped,
    |c| (c.sequence, c.extras.sharding) = (59, Sharding::Striped),
    |c| c.sequence = 3,
    |c| (c.sequence, c.mask, c.batch) = (1, Mask::Full, 2),
    |c| c.extras.strides = Strides::Transposed,
    |c| (c.kv_heads, c.extras.strides) = (c.query_heads, Strides::Packed),
    |c| c.extras.strides = Strides::Expanded,
    |c| c.extras.fixed = true,
];

/// Which keys a query sees.
const MASKS: [Change; 19] = [
    |c| c.extras.window = Some(7),
    |c| (c.mask, c.extras.window) = (Mask::Full, Some(7)),
    |c| c.extras.window = Some(1),
    |c| c.extras.documents = Some(Documents::ByPosition(3)),
    |c| (c.mask, c.extras.documents) = (Mask::Full, Some(Documents::ByPosition(2))),
    // Some of them a single token.
    |c| c.extras.documents = Some(Documents::ByPosition(20)),
    |c| c.extras.documents = Some(Documents::ByEnds(3)),
    |c| (c.mask, c.extras.documents) = (Mask::Full, Some(Documents::ByEnds(4))),
    |c| c.extras.padding = Some(Padding::Left),
    |c| c.extras.padding = Some(Padding::Right),
    |c| (c.mask, c.extras.padding) = (Mask::Full, Some(Padding::Left)),
    |c| (c.mask, c.extras.padding) = (Mask::Full, Some(Padding::Right)),
    |c| c.extras.block = Some(9),
    |c| (c.mask, c.extras.block) = (Mask::Full, Some(9)),
    |c| {
        (c.extras.documents, c.extras.window) = (Some(Documents::ByPosition(3)), Some(7));
        c.extras.sharding = Sharding::Zigzag;
    },
    |c| (c.extras.documents, c.extras.block) = (Some(Documents::ByEnds(3)), Some(9)),
    |c| (c.extras.padding, c.extras.block) = (Some(Padding::Left), Some(9)),
    |c| (c.extras.padding, c.extras.window) = (Some(Padding::Right), Some(7)),
    |c| (c.sequence, c.extras.documents) = (59, Some(Documents::ByPosition(3))),
];

/// How scores are made.
const SCORES: [Change; 15] = [
    |c| c.extras.alibi = true,
    |c| (c.mask, c.extras.alibi) = (Mask::Full, true),
    |c| c.extras.sinks = true,
    |c| c.extras.norms = true,
    |c| (c.extras.alibi, c.extras.sinks, c.extras.norms) = (true, true, true),
    |c| c.extras.rotary = Some(Rotary::Plain),
    |c| (c.extras.rotary, c.extras.sharding) = (Some(Rotary::Plain), Sharding::Zigzag),
    |c| {
        c.extras.rotary = Some(Rotary::Plain);
        c.extras.documents = Some(Documents::ByPosition(3));
    },
    |c| (c.extras.rotary, c.extras.norms) = (Some(Rotary::Plain), true),
    |c| c.extras.rotary = Some(Rotary::Multimodal),
    |c| c.extras.softcap = Some(2),
    |c| (c.mask, c.extras.softcap, c.extras.scale) = (Mask::Full, Some(3), Some(40)),
    |c| c.extras.scale = Some(20),
    |c| dropped(c, Mask::Full),
    |c| dropped(c, Mask::Causal),
];

/// What happened before, and what happens in backward.
const STATES: [Change; 7] = [
    |c| c.extras.eval = true,
    |c| c.extras.recompute = true,
    |c| c.extras.debug = Some(3),
    |c| c.extras.state = Some(State::Again),
    |c| c.extras.state = Some(State::OtherHeads),
    |c| c.extras.state = Some(State::OtherLength),
    |c| c.extras.state = Some(State::EvalBetween),
];

/// What makes no sense, and is to be refused.
const DEFECTS: [Change; 17] = [
    |c| {
        c.extras.defect = Some(Defect::Heads);
        // One KV head fewer must not divide them.
        c.query_heads = if c.world == 3 { 9 } else { 8 };
    },
    |c| c.extras.defect = Some(Defect::Values),
    |c| {
        c.extras.defect = Some(Defect::Positions);
        c.extras.documents = Some(Documents::ByPosition(3));
    },
    |c| {
        c.extras.defect = Some(Defect::Ends);
        c.extras.documents = Some(Documents::ByEnds(3));
    },
    |c| (c.extras.defect, c.extras.window) = (Some(Defect::Window), Some(7)),
    |c| (c.extras.defect, c.extras.padding) = (Some(Defect::Padding), Some(Padding::Left)),
    |c| (c.extras.defect, c.extras.block) = (Some(Defect::Blocks), Some(9)),
    |c| (c.extras.defect, c.extras.alibi) = (Some(Defect::Slopes), true),
    |c| (c.extras.defect, c.extras.sinks) = (Some(Defect::Sinks), true),
    |c| (c.extras.defect, c.extras.norms) = (Some(Defect::Norms), true),
    |c| (c.extras.defect, c.extras.rotary) = (Some(Defect::Mrope), Some(Rotary::Multimodal)),
    |c| (c.extras.defect, c.extras.softcap) = (Some(Defect::Softcap), Some(2)),
    |c| {
        dropped(c, Mask::Full);
        c.extras.defect = Some(Defect::Dropout);
    },
    |c| (c.extras.defect, c.extras.fixed) = (Some(Defect::Length), true),
    |c| (c.extras.defect, c.extras.sharding) = (Some(Defect::Sharding), Sharding::Zigzag),
    |c| {
        c.mask = Mask::Full;
        (c.extras.defect, c.extras.cross) = (Some(Defect::Cross), Some(37));
    },
    |c| (c.extras.defect, c.extras.debug) = (Some(Defect::Layers), Some(3)),
];

/// Several at once, where one may forget the other or come before it.
const TOGETHER: [Change; 2] = [
    |c| (c.extras.softcap, c.extras.alibi) = (Some(2), true),
    |c| {
        c.extras.eval = true;
        c.extras.documents = Some(Documents::ByPosition(3));
        c.extras.padding = Some(Padding::Left);
    },
];

/// One query head for each rank, and fewer KV heads: what replication leaves
/// behind in training breaks evaluation here in DeepSpeed 0.19.8
/// (`ulysses_sp.py`, line 317).
const ONE_HEAD_EACH: Change = |c| {
    (c.query_heads, c.kv_heads) = (4, 2);
    c.extras.state = Some(State::EvalBetween);
};

/// A few of all, for eight ranks.
const MANY_RANKS: [Change; 8] = [
    |_| (),
    |c| c.sequence = 59,
    |c| c.sequence = 5,
    |c| c.extras.documents = Some(Documents::ByPosition(3)),
    |c| (c.extras.rotary, c.extras.sharding) = (Some(Rotary::Plain), Sharding::Zigzag),
    |c| (c.extras.alibi, c.extras.sinks, c.extras.norms) = (true, true, true),
    |c| (c.extras.padding, c.extras.window) = (Some(Padding::Left), Some(7)),
    |c| (c.extras.defect, c.extras.window) = (Some(Defect::Window), Some(7)),
];

/// The cases beyond plain attention on this many ranks.
pub(super) fn cases(world: usize) -> impl Iterator<Item = AttentionCase> {
    let one_head_each = (world == 4).then_some(&ONE_HEAD_EACH);
    let changes = HELD.iter().chain(&MASKS).chain(&SCORES).chain(&STATES);
    changes
        .chain(one_head_each)
        .chain(&DEFECTS)
        .enumerate()
        .chain(TOGETHER.iter().enumerate())
        .map(move |(i, change)| changed(world, i + world, *change))
        // A rank that is alone holds any number of tokens rightly.
        .filter(|case| case.world > 1 || case.extras.defect != Some(Defect::Sharding))
}

/// The cases on eight ranks.
pub(super) fn many_ranks() -> impl Iterator<Item = AttentionCase> {
    let changes = MANY_RANKS.iter().enumerate();
    changes.map(|(i, change)| changed(8, i, *change))
}

/// The plain case with a change. Content and heads are those that say most: of
/// which token and which head an answer is.
fn changed(world: usize, turn: usize, change: Change) -> AttentionCase {
    let (query_heads, kv_heads, head_size) = match world {
        3 => (6, 3, 16),
        8 => (16, 4, 24),
        _ => (8, 4, 16),
    };
    let mut case = AttentionCase {
        world,
        batch: 2,
        sequence: 60,
        query_heads,
        kv_heads,
        head_size,
        mask: Mask::Causal,
        dtype: Dtype::FLOATS[turn % 4],
        content: Content::Peaked,
        seed: 0,
        extras: Extras::default(),
    };
    change(&mut case);
    case
}

/// Dropout, where values show which weights were dropped.
fn dropped(case: &mut AttentionCase, mask: Mask) {
    (case.mask, case.sequence, case.extras.value_size) = (mask, 36, Some(36));
    (case.content, case.extras.dropout) = (Content::Onehot, Some(30));
    // What a weight was is not to be read from halves.
    if !matches!(case.dtype, Dtype::F64 | Dtype::F32) {
        case.dtype = Dtype::F32;
    }
}
