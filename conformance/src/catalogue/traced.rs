//! Plain attention whose inputs say where an answer is from.
//!
//! With coded values an output says which token of which head was read. With a
//! cotangent on one rank or head alone, what other ranks and heads get of the
//! gradient is seen by itself: in a sum over all of them a part that is lost or
//! comes twice may look like a small error.

use fixtures::{AttentionCase, Content, Cotangent, Dtype, Extras, Mask};

/// Pairs of query and KV heads: MHA, GQA, GQA with KV heads that several ranks
/// need, MQA.
fn heads(world: usize) -> [(usize, usize); 4] {
    match world {
        2 => [(8, 8), (8, 4), (6, 3), (8, 1)],
        3 => [(6, 6), (6, 3), (12, 2), (6, 1)],
        _ => [(8, 8), (8, 4), (8, 2), (8, 1)],
    }
}

/// The traced cases on this many ranks. On one there is nothing to trace.
pub(super) fn cases(world: usize) -> impl Iterator<Item = AttentionCase> {
    let cases = (world > 1).then(|| coded(world).chain(single_cotangents(world)));
    cases.into_iter().flatten()
}

fn coded(world: usize) -> impl Iterator<Item = AttentionCase> {
    heads(world).into_iter().flat_map(move |heads| {
        Mask::ALL.into_iter().flat_map(move |mask| {
            [(Dtype::F32, 60), (Dtype::Bf16, 84)].map(|(dtype, sequence)| AttentionCase {
                sequence,
                ..traced(world, heads, mask, dtype, Content::Coded)
            })
        })
    })
}

/// The first rank and the last, the first head and the last: under a causal mask
/// the one has most of what others need, and the other needs most of theirs.
fn single_cotangents(world: usize) -> impl Iterator<Item = AttentionCase> {
    let [plain, grouped, replicated, single] = heads(world);
    let last = world - 1;
    let ends = [
        (
            Cotangent::Rank(last),
            Mask::Causal,
            grouped,
            Content::Peaked,
        ),
        (Cotangent::Rank(0), Mask::Causal, plain, Content::Gaussian),
        (
            Cotangent::Rank(last),
            Mask::Full,
            replicated,
            Content::Coded,
        ),
        (Cotangent::Rank(0), Mask::Full, single, Content::Peaked),
        (
            Cotangent::Head(0),
            Mask::Causal,
            replicated,
            Content::Peaked,
        ),
        (
            Cotangent::Head(plain.0 - 1),
            Mask::Causal,
            plain,
            Content::Gaussian,
        ),
        (
            Cotangent::Head(grouped.0 - 1),
            Mask::Full,
            grouped,
            Content::Coded,
        ),
        (Cotangent::Head(1), Mask::Full, single, Content::Peaked),
    ];
    ends.into_iter()
        .enumerate()
        .map(move |(turn, (cotangent, mask, heads, content))| {
            let dtype = Dtype::FLOATS[(turn + world) % 4];
            let mut case = traced(world, heads, mask, dtype, content);
            case.extras.cotangent = Some(cotangent);
            case
        })
}

fn traced(
    world: usize,
    heads: (usize, usize),
    mask: Mask,
    dtype: Dtype,
    content: Content,
) -> AttentionCase {
    AttentionCase {
        world,
        batch: 2,
        sequence: 60,
        query_heads: heads.0,
        kv_heads: heads.1,
        head_size: 64,
        mask,
        dtype,
        content,
        seed: 0,
        extras: Extras::default(),
    }
}
