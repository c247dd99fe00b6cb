//! The cases on which faults are tried: small, and each of them there for some
//! faults. They are the catalogue's kinds, at a quarter of its length.

use fixtures::{
    AttentionCase, Case, Content, Defect, Documents, Dtype, Extras, Mask, Padding, Rotary,
    Sharding, State, Strides,
};

use crate::catalogue;

/// A change to the plain case.
type Change = fn(&mut AttentionCase);

/// Sizes, masks, element types and contents.
const SIZES: [(usize, Change); 20] = [
    (2, |_| ()),
    (2, |c| (c.mask, c.content) = (Mask::Full, Content::Gaussian)),
    (2, |c| {
        (c.dtype, c.content) = (Dtype::Bf16, Content::Gaussian)
    }),
    (2, |c| c.dtype = Dtype::F64),
    (2, |c| (c.dtype, c.mask) = (Dtype::F16, Mask::Full)),
    (2, |c| c.kv_heads = 8),
    (2, |c| (c.batch, c.query_heads, c.kv_heads) = (1, 7, 7)),
    (2, |c| c.sequence = 37),
    (2, |c| (c.mask, c.sequence) = (Mask::Full, 37)),
    (2, |c| c.extras.value_size = Some(24)),
    (3, |c| (c.query_heads, c.kv_heads) = (6, 3)),
    (3, |c| (c.query_heads, c.kv_heads, c.sequence) = (6, 2, 37)),
    (4, |_| ()),
    (4, |c| (c.mask, c.content) = (Mask::Full, Content::Gaussian)),
    (4, |c| (c.kv_heads, c.content) = (1, Content::Gaussian)),
    (4, |c| (c.query_heads, c.kv_heads) = (4, 4)),
    (4, |c| (c.query_heads, c.kv_heads, c.sequence) = (6, 3, 38)),
    (4, |c| {
        (c.mask, c.sequence, c.dtype) = (Mask::Full, 38, Dtype::Bf16)
    }),
    // Long enough for the roundings of many blocks.
    (2, |c| many_tokens(c, Dtype::Bf16)),
    (4, |c| many_tokens(c, Dtype::F16)),
];

/// What models ask beyond that.
const BEYOND: [(usize, Change); 39] = [
    (2, |c| {
        (c.dtype, c.extras.sharding) = (Dtype::Bf16, Sharding::Zigzag)
    }),
    (4, |c| c.extras.sharding = Sharding::Striped),
    (2, |c| c.extras.strides = Strides::Transposed),
    (4, |c| (c.kv_heads, c.extras.strides) = (8, Strides::Packed)),
    (2, |c| c.extras.window = Some(7)),
    (4, |c| (c.mask, c.extras.window) = (Mask::Full, Some(7))),
    (2, |c| c.extras.documents = Some(Documents::ByPosition(3))),
    (4, |c| {
        (c.mask, c.extras.documents) = (Mask::Full, Some(Documents::ByPosition(2)));
    }),
    (4, |c| {
        (c.dtype, c.extras.documents) = (Dtype::F16, Some(Documents::ByEnds(3)));
    }),
    (2, |c| c.extras.padding = Some(Padding::Left)),
    (4, |c| {
        (c.mask, c.extras.padding) = (Mask::Full, Some(Padding::Left))
    }),
    (2, |c| {
        (c.mask, c.extras.padding) = (Mask::Full, Some(Padding::Right))
    }),
    (2, |c| c.extras.block = Some(9)),
    (4, |c| (c.mask, c.extras.block) = (Mask::Full, Some(9))),
    (4, |c| {
        (c.extras.documents, c.extras.window) = (Some(Documents::ByPosition(3)), Some(7));
        c.extras.sharding = Sharding::Zigzag;
    }),
    (2, |c| c.extras.alibi = true),
    (4, |c| (c.mask, c.extras.alibi) = (Mask::Full, true)),
    (2, |c| c.extras.sinks = true),
    (4, |c| (c.dtype, c.extras.sinks) = (Dtype::Bf16, true)),
    (2, |c| c.extras.norms = true),
    (4, |c| (c.dtype, c.extras.norms) = (Dtype::F64, true)),
    (4, |c| {
        (c.extras.alibi, c.extras.sinks, c.extras.norms) = (true, true, true);
    }),
    (2, |c| c.extras.rotary = Some(Rotary::Plain)),
    (4, |c| {
        (c.extras.rotary, c.extras.sharding) = (Some(Rotary::Plain), Sharding::Zigzag);
    }),
    (2, |c| {
        c.extras.rotary = Some(Rotary::Plain);
        c.extras.documents = Some(Documents::ByPosition(3));
    }),
    (4, |c| c.extras.rotary = Some(Rotary::Multimodal)),
    (2, |c| {
        (c.mask, c.extras.rotary) = (Mask::Full, Some(Rotary::Multimodal))
    }),
    (2, |c| c.extras.softcap = Some(2)),
    (4, |c| {
        (c.mask, c.extras.softcap, c.extras.scale) = (Mask::Full, Some(3), Some(40));
    }),
    (4, |c| c.extras.scale = Some(20)),
    (2, |c| dropped(c, Mask::Full)),
    (4, |c| dropped(c, Mask::Causal)),
    (2, |c| c.extras.eval = true),
    (4, |c| {
        (c.extras.eval, c.extras.padding) = (true, Some(Padding::Left))
    }),
    (2, |c| c.extras.state = Some(State::Again)),
    (4, |c| c.extras.state = Some(State::OtherHeads)),
    (2, |c| c.extras.state = Some(State::OtherLength)),
    (4, |c| c.extras.state = Some(State::EvalBetween)),
    (4, |c| {
        (c.query_heads, c.kv_heads) = (4, 2);
        c.extras.state = Some(State::EvalBetween);
    }),
];

/// What makes no sense, and is to be refused.
const DEFECTS: [(usize, Change); 14] = [
    (2, |c| {
        (c.query_heads, c.kv_heads, c.extras.defect) = (8, 4, Some(Defect::Heads));
    }),
    (4, |c| c.extras.defect = Some(Defect::Values)),
    (2, |c| {
        c.extras.defect = Some(Defect::Positions);
        c.extras.documents = Some(Documents::ByPosition(3));
    }),
    (4, |c| {
        c.extras.defect = Some(Defect::Ends);
        c.extras.documents = Some(Documents::ByEnds(3));
    }),
    (2, |c| {
        (c.extras.defect, c.extras.window) = (Some(Defect::Window), Some(7))
    }),
    (4, |c| {
        (c.extras.defect, c.extras.padding) = (Some(Defect::Padding), Some(Padding::Left))
    }),
    (2, |c| {
        (c.extras.defect, c.extras.block) = (Some(Defect::Blocks), Some(9))
    }),
    (4, |c| {
        (c.extras.defect, c.extras.alibi) = (Some(Defect::Slopes), true)
    }),
    (2, |c| {
        (c.extras.defect, c.extras.sinks) = (Some(Defect::Sinks), true)
    }),
    (4, |c| {
        (c.extras.defect, c.extras.norms) = (Some(Defect::Norms), true)
    }),
    (2, |c| {
        (c.extras.defect, c.extras.rotary) = (Some(Defect::Mrope), Some(Rotary::Multimodal))
    }),
    (4, |c| {
        (c.extras.defect, c.extras.softcap) = (Some(Defect::Softcap), Some(2))
    }),
    (2, |c| {
        (c.extras.defect, c.extras.fixed) = (Some(Defect::Length), true)
    }),
    (4, |c| {
        (c.extras.defect, c.extras.sharding) = (Some(Defect::Sharding), Sharding::Zigzag)
    }),
];

/// Every case on which faults are tried.
pub fn cases() -> Vec<Case> {
    let changes = SIZES.iter().chain(&BEYOND).chain(&DEFECTS);
    let attention = changes.map(|&(world, change)| changed(world, change).into());
    // The others' cases are small as they are.
    let others = catalogue::cases().into_iter();
    let others = others.filter(|case| case.attention().is_none() && case.world() > 1);
    attention.chain(others).collect()
}

fn changed(world: usize, change: Change) -> AttentionCase {
    let mut case = AttentionCase {
        world,
        batch: 2,
        sequence: 36,
        query_heads: 8,
        // On four ranks each is on two.
        kv_heads: if world == 4 { 2 } else { 4 },
        head_size: 16,
        mask: Mask::Causal,
        dtype: Dtype::F32,
        content: Content::Peaked,
        seed: 0,
        extras: Extras::default(),
    };
    change(&mut case);
    case
}

/// Rows that average over many tokens.
fn many_tokens(case: &mut AttentionCase, dtype: Dtype) {
    (case.batch, case.sequence, case.dtype) = (1, 132, dtype);
    (case.mask, case.content) = (Mask::Full, Content::Gaussian);
}

/// Dropout, where values show which weights were dropped.
fn dropped(case: &mut AttentionCase, mask: Mask) {
    (case.mask, case.extras.value_size) = (mask, Some(case.sequence));
    (case.content, case.extras.dropout) = (Content::Onehot, Some(30));
}
