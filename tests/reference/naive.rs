//! Attention as loops over single numbers in float64, and calls to hold
//! against it. Nothing here shares code with the crate.
// Each test program uses its own part of this.
#![allow(dead_code)]

use crate::world::{leaf, noise};
use std::ops::Range;
use tch::{Kind, Tensor};
use ulysses::{
    BlockLayout, Dropout, HeadMap, HeadPartition, Kernel, Mask, Result, Score, Structure,
    core_attention,
};

/// One call of core attention, but for its tensors.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) batch: usize,
    pub(crate) tokens: usize,
    pub(crate) key_tokens: usize,
    pub(crate) heads: HeadMap,
    pub(crate) head_size: usize,
    pub(crate) value_size: usize,
    pub(crate) score: Score,
    pub(crate) segments: Option<Vec<Vec<Range<usize>>>>,
    pub(crate) blocks: Option<Blocks>,
    pub(crate) slopes: bool,
    pub(crate) sinks: bool,
    pub(crate) dropout: Option<Dropout>,
}

/// A block-sparse layout made from a seed.
#[derive(Clone, Debug)]
pub(crate) struct Blocks {
    pub(crate) block: usize,
    pub(crate) seed: u64,
    /// Heads share a layout in groups of this many.
    pub(crate) sharing: usize,
}

impl Blocks {
    pub(crate) fn sees(&self, head: usize, query_block: usize, key_block: usize) -> bool {
        let place = (head / self.sharing) * 1_000_003 + query_block * 1009 + key_block;
        let word = (self.seed + 1)
            .wrapping_mul(place as u64 + 1)
            .wrapping_mul(0x9E37_79B9_7F4A_7C15);
        (word >> 40) & 1 == 1
    }
}

/// Query, key, value, slopes and sinks.
pub(crate) type Inputs = [Tensor; 5];

impl Case {
    /// Multi-head attention of one row and nothing special.
    pub(crate) fn plain(tokens: usize) -> Self {
        Self {
            batch: 1,
            tokens,
            key_tokens: tokens,
            heads: heads(2, 2, 1, 0),
            head_size: 4,
            value_size: 4,
            score: Score::default(),
            segments: None,
            blocks: None,
            slopes: false,
            sinks: false,
            dropout: None,
        }
    }

    /// Leaves with numbers that the seeds and places decide.
    pub(crate) fn inputs(&self, kind: Kind) -> Inputs {
        let (batch, h, hk) = (
            self.batch as i64,
            self.heads.query_heads() as i64,
            self.heads.kv_heads() as i64,
        );
        let (tokens, keys) = (self.tokens as i64, self.key_tokens as i64);
        let (size, value_size) = (self.head_size as i64, self.value_size as i64);
        [
            leaf(&(noise(1, [batch, h, tokens, size], kind) * 2.0)),
            leaf(&(noise(2, [batch, hk, keys, size], kind) * 2.0)),
            leaf(&noise(3, [batch, hk, keys, value_size], kind)),
            leaf(&noise(4, [1, 1, 1, h], kind).view(-1).abs()),
            leaf(&noise(5, [1, 1, 1, h], kind).view(-1)),
        ]
    }

    pub(crate) fn cotangent(&self, kind: Kind) -> Tensor {
        let size = [
            self.batch,
            self.heads.query_heads(),
            self.tokens,
            self.value_size,
        ];
        noise(6, size.map(|length| length as i64), kind)
    }

    pub(crate) fn layout(&self) -> Option<BlockLayout> {
        let blocks = self.blocks.as_ref()?;
        let (heads, count) = (self.heads.query_heads(), self.tokens.div_ceil(blocks.block));
        let mut visible = Vec::new();
        for head in 0..heads {
            for query in 0..count {
                visible.extend((0..count).map(|key| blocks.sees(head, query, key)));
            }
        }
        let size = [heads, count, count].map(|length| length as i64);
        let visible = Tensor::from_slice(&visible).view(size);
        Some(BlockLayout::new(&visible, blocks.block).unwrap())
    }

    pub(crate) fn run(&self, kernel: Kernel, inputs: &Inputs) -> Result<Tensor> {
        let [query, key, value, slopes, sinks] = inputs;
        let structure = Structure {
            segments: self.segments.clone(),
            layout: self.layout(),
            slopes: self.slopes.then_some(slopes),
            sinks: self.sinks.then_some(sinks),
            dropout: self.dropout,
        };
        core_attention(
            query,
            key,
            value,
            &self.heads,
            kernel,
            &self.score,
            &structure,
        )
    }

    /// The inputs that the case uses, in order.
    pub(crate) fn used(&self) -> Vec<usize> {
        let mut used = vec![0, 1, 2];
        used.extend(self.slopes.then_some(3));
        used.extend(self.sinks.then_some(4));
        used
    }

    /// The output and the cotangents of the inputs that the case uses.
    pub(crate) fn output_and_cotangents(&self, kernel: Kernel, kind: Kind) -> Vec<Tensor> {
        let inputs = self.inputs(kind);
        let output = self.run(kernel, &inputs).unwrap();
        let scalar = (&output * self.cotangent(kind)).sum(Kind::Double);
        let used: Vec<&Tensor> = self.used().into_iter().map(|i| &inputs[i]).collect();
        let found = Tensor::run_backward(&[scalar], &used, false, false);
        [output.detach()].into_iter().chain(found).collect()
    }

    /// Whether a query sees a key, word for word.
    pub(crate) fn sees(&self, row: usize, head: usize, query: usize, key: usize) -> bool {
        let in_order = self.score.mask == Mask::Full || key <= query;
        let near = self
            .score
            .window
            .is_none_or(|window| query.abs_diff(key) < window);
        let together = self.segments.as_ref().is_none_or(|segments| {
            segments[row]
                .iter()
                .any(|run| run.contains(&query) && run.contains(&key))
        });
        let in_layout = self
            .blocks
            .as_ref()
            .is_none_or(|blocks| blocks.sees(head, query / blocks.block, key / blocks.block));
        in_order && near && together && in_layout
    }

    /// The output [B, h, S, Dv], number by number. `dropped` says which
    /// weights are, [B, h, S, Sk].
    pub(crate) fn naive(&self, inputs: &Inputs, dropped: Option<&Tensor>) -> Tensor {
        let numbers = |tensor: &Tensor| -> Vec<f64> {
            Vec::try_from(tensor.detach().to_kind(Kind::Double).reshape(-1)).unwrap()
        };
        let [query, key, value, slopes, sinks] = inputs.each_ref().map(numbers);
        let dropped = dropped.map(numbers);
        let (h, hk) = (self.heads.query_heads(), self.heads.kv_heads());
        let (size, value_size) = (self.head_size, self.value_size);
        let scale = self.score.scale.unwrap_or(1.0 / (size as f64).sqrt());
        let mut output = Vec::new();
        for row in 0..self.batch {
            for head in 0..h {
                let kv = row * hk + self.heads.kv_of_query()[head];
                for i in 0..self.tokens {
                    let place = (row * h + head) * self.tokens + i;
                    let score = |j: usize| {
                        let (q, k) = (place * size, (kv * self.key_tokens + j) * size);
                        let mut score = 0.0;
                        for c in 0..size {
                            score += query[q + c] * key[k + c];
                        }
                        score *= scale;
                        if let Some(softcap) = self.score.softcap {
                            score = softcap * (score / softcap).tanh();
                        }
                        if self.slopes {
                            score -= slopes[head] * i.abs_diff(j) as f64;
                        }
                        score
                    };
                    let seen: Vec<(usize, f64)> = (0..self.key_tokens)
                        .filter(|&j| self.sees(row, head, i, j))
                        .map(|j| (j, score(j).exp()))
                        .collect();
                    let mut total: f64 = seen.iter().map(|(_, weight)| weight).sum();
                    if self.sinks {
                        total += sinks[head].exp();
                    }
                    let mut sums = vec![0.0; value_size];
                    for (j, weight) in seen {
                        let mut weight = weight / total;
                        if let (Some(dropout), Some(dropped)) = (self.dropout, &dropped) {
                            weight *= 1.0 - dropped[place * self.key_tokens + j];
                            weight /= 1.0 - dropout.probability;
                        }
                        for (c, sum) in sums.iter_mut().enumerate() {
                            *sum += weight * value[(kv * self.key_tokens + j) * value_size + c];
                        }
                    }
                    output.extend(sums);
                }
            }
        }
        let size = [self.batch, h, self.tokens, value_size].map(|length| length as i64);
        Tensor::from_slice(&output).view(size)
    }
}

/// The heads of one rank of several.
pub(crate) fn heads(query: usize, kv: usize, ranks: usize, rank: usize) -> HeadMap {
    HeadPartition::new(query, kv, ranks).unwrap().head_map(rank)
}

/// The largest difference, in units of the largest number or of one.
pub(crate) fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    if a.numel() == 0 {
        return 0.0;
    }
    let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
    ((&a - &b).abs().max() / b.abs().max().clamp_min(1.0)).double_value(&[])
}
