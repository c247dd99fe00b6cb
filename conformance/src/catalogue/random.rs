//! Cases that nobody chose: as many as one likes, drawn from a seed.
//!
//! Sizes are small, so that thousands take minutes, and everything meets
//! everything: what [`AttentionCase::check`] calls meaningless is drawn anew.

use fixtures::random::{hash, mix};
use fixtures::{
    AttentionCase, Content, Documents, Dtype, Extras, Mask, Padding, Rotary, Sharding, Strides,
};

/// The first `count` cases that `seed` draws.
pub fn cases(count: usize, seed: u64) -> impl Iterator<Item = AttentionCase> {
    (0..)
        .map(move |number| draw(&mut Draws::new(seed, number)))
        // Nobody is known to have ranks without a query head.
        .filter(|case| case.query_heads >= case.world && case.check().is_ok())
        .take(count)
}

/// Numbers drawn one after the other.
struct Draws {
    state: u64,
}

impl Draws {
    fn new(seed: u64, number: usize) -> Draws {
        Draws {
            state: hash(seed, 0, number, 0, 0),
        }
    }

    fn below(&mut self, end: usize) -> usize {
        self.state = mix(self.state);
        (self.state % end as u64) as usize
    }

    fn from<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    /// One time in `times`.
    fn seldom(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    fn seldom_from<T: Copy>(&mut self, times: usize, choices: &[T]) -> Option<T> {
        self.seldom(times).then(|| self.from(choices))
    }
}

fn draw(draws: &mut Draws) -> AttentionCase {
    let world = 1 + draws.below(4);
    let kv_heads = draws.from(&[1, 2, 3, 4]);
    let group = draws.from(&[1, 1, 2, 3, 4]);
    let sequence = 1 + draws.below(48);
    let head_size = draws.from(&[8, 16, 16, 24, 64]);
    let content = draws.from(&Content::ALL);
    let mut extras = Extras {
        sharding: draws.from(&[
            Sharding::Contiguous,
            Sharding::Contiguous,
            Sharding::Zigzag,
            Sharding::Striped,
        ]),
        value_size: draws.seldom_from(8, &[5, 12, 32]),
        cross: draws.seldom_from(12, &[7, 20, 33]),
        eval: draws.seldom(20),
        window: draws.seldom_from(6, &[1, 3, 7, 20]),
        documents: draws.seldom_from(
            5,
            &[
                Documents::ByPosition(2),
                Documents::ByPosition(4),
                Documents::ByEnds(3),
            ],
        ),
        padding: draws.seldom_from(8, &[Padding::Left, Padding::Right]),
        block: draws.seldom_from(10, &[4, 9]),
        alibi: draws.seldom(6),
        sinks: draws.seldom(6),
        norms: draws.seldom(6),
        rotary: draws.seldom_from(5, &[Rotary::Plain, Rotary::Multimodal]),
        softcap: draws.seldom_from(8, &[1, 2, 5, 30]),
        scale: draws.seldom_from(8, &[5, 40, 100]),
        strides: draws.from(&[
            Strides::Contiguous,
            Strides::Contiguous,
            Strides::Transposed,
            Strides::Packed,
            Strides::Expanded,
        ]),
        recompute: draws.seldom(10),
        ..Extras::default()
    };
    if content == Content::Onehot {
        let keys = extras.cross.unwrap_or(sequence);
        extras.value_size = Some(keys).filter(|&keys| keys != head_size);
    }
    AttentionCase {
        world,
        batch: 1 + draws.below(3),
        sequence,
        query_heads: kv_heads * group,
        kv_heads,
        head_size,
        mask: draws.from(&Mask::ALL),
        dtype: draws.from(&Dtype::FLOATS),
        content,
        seed: draws.below(1 << 20) as u64,
        extras,
    }
}
