//! Plain attention: every size that there is, and no more than a mask.
//!
//! Every world size, pair of head counts, mask and element type meets every
//! other. Batch, head size, length and content take turns over these, so that
//! each value of them meets each of the others' many times at a twelfth of the
//! whole product's cost.

use fixtures::{AttentionCase, Content, Dtype, Extras, Mask};

/// (query heads, KV heads): MHA, GQA, MQA, and head counts that are no powers
/// of two.
const HEADS: [(usize, usize); 6] = [(8, 8), (8, 4), (8, 2), (8, 1), (6, 3), (12, 3)];

/// (batch, head size, sequence, content). The lengths are multiples of every
/// world size.
const TURNS: [(usize, usize, usize, Content); 12] = [
    (1, 16, 60, Content::Gaussian),
    (3, 64, 84, Content::Peaked),
    (1, 80, 132, Content::Gaussian),
    (3, 16, 60, Content::Peaked),
    (1, 64, 84, Content::Gaussian),
    (3, 80, 60, Content::Peaked),
    (1, 16, 132, Content::Peaked),
    (3, 64, 60, Content::Gaussian),
    (1, 80, 84, Content::Peaked),
    (3, 16, 84, Content::Gaussian),
    (1, 64, 132, Content::Peaked),
    (3, 80, 84, Content::Gaussian),
];

/// Lengths that leave one and two tokens over when they are cut in two, three
/// and four.
const UNEVEN_SEQUENCES: [usize; 2] = [85, 86];

/// (world, query heads, KV heads, head size, sequence) whose heads and tokens
/// per rank are no powers of two: sizes that are computed as floating-point
/// ratios of head counts come out one too small here.
const AWKWARD_SIZES: [(usize, usize, usize, usize, usize); 4] = [
    (2, 13, 13, 16, 18),
    (2, 39, 13, 16, 18),
    (3, 14, 14, 64, 27),
    (4, 13, 13, 80, 28),
];

/// Fewer query heads than ranks: nobody is known to do this, and to refuse it is
/// right.
const IDLE_RANKS: (usize, usize, usize, usize, usize) = (4, 2, 2, 16, 36);

/// The plain cases on this many ranks.
pub(super) fn cases(world: usize) -> impl Iterator<Item = AttentionCase> {
    even_sequences(world)
        .chain(uneven_sequences(world))
        .chain(odd_sizes(world))
}

fn even_sequences(world: usize) -> impl Iterator<Item = AttentionCase> {
    let grid = HEADS.into_iter().flat_map(|heads| {
        Mask::ALL
            .into_iter()
            .flat_map(move |mask| Dtype::FLOATS.map(|dtype| (heads, mask, dtype)))
    });
    // A stride prime to the number of turns, offset by the world size: the
    // same turn does not come back to the same element type.
    grid.enumerate()
        .map(move |(i, ((query_heads, kv_heads), mask, dtype))| {
            let (batch, head_size, sequence, content) = TURNS[(5 * i + i / 12 + world) % 12];
            AttentionCase {
                world,
                batch,
                sequence,
                query_heads,
                kv_heads,
                head_size,
                mask,
                dtype,
                content,
                seed: 0,
                extras: Extras::default(),
            }
        })
}

fn uneven_sequences(world: usize) -> impl Iterator<Item = AttentionCase> {
    UNEVEN_SEQUENCES
        .into_iter()
        .filter(move |sequence| !sequence.is_multiple_of(world))
        .flat_map(move |sequence| {
            // The first pair of head counts that `world` divides, then GQA.
            let plain = if world == 3 { (6, 3) } else { (8, 8) };
            [plain, (12, 3)].into_iter().flat_map(move |heads| {
                [(Mask::Full, Dtype::F32), (Mask::Causal, Dtype::Bf16)].map(|(mask, dtype)| {
                    AttentionCase {
                        world,
                        batch: 1,
                        sequence,
                        query_heads: heads.0,
                        kv_heads: heads.1,
                        head_size: 16,
                        mask,
                        dtype,
                        content: Content::Peaked,
                        seed: 0,
                        extras: Extras::default(),
                    }
                })
            })
        })
}

fn odd_sizes(world: usize) -> impl Iterator<Item = AttentionCase> {
    AWKWARD_SIZES
        .into_iter()
        .chain([IDLE_RANKS])
        .filter(move |&(of_world, ..)| of_world == world)
        .map(
            |(world, query_heads, kv_heads, head_size, sequence)| AttentionCase {
                world,
                batch: 1,
                sequence,
                query_heads,
                kv_heads,
                head_size,
                mask: Mask::Causal,
                dtype: Dtype::F32,
                content: Content::Gaussian,
                seed: 0,
                extras: Extras::default(),
            },
        )
}
