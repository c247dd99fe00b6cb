//! The tiles of the score matrix that have anything visible in them.
//!
//! Segments, layout and window decide which tiles there are; what is left to
//! be masked inside a tile is the order of tokens alone. So the masks of all
//! heads and batch rows of a tile are one, and no larger than the tile. Every
//! query that sees anything is in one tile, with all the keys that it sees.
//!
//! Pure arithmetic: no tensor is made here.

use super::visible::Visible;
use std::{iter, ops::Range, slice};

/// Queries and all the keys that they see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tile {
    pub(super) batch: Range<usize>,
    /// Query heads.
    pub(super) heads: Range<usize>,
    pub(super) queries: Range<usize>,
    /// Ascending, disjoint and not empty.
    pub(super) keys: Vec<Range<usize>>,
    pub(super) inside: Inside,
}

/// What is visible inside a tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Inside {
    /// Every key to every query.
    All,
    /// Keys and queries are the same tokens, and each sees those up to itself.
    Causal,
    /// What mask and window let through.
    InOrder,
}

/// The tiles for `batch` rows and `heads` query heads, none of which has more
/// than `rows` queries.
pub(super) fn plan(visible: &Visible, batch: usize, heads: usize, rows: usize) -> Vec<Tile> {
    let mut tiles = Vec::new();
    for (batch, runs) in batch_rows(visible, batch) {
        for run in runs {
            for heads in equal_heads(visible, heads) {
                for queries in cuts(visible, &run, rows) {
                    let keys = keys_of(visible, &run, heads.start, &queries);
                    if keys.is_empty() {
                        continue;
                    }
                    tiles.push(Tile {
                        batch: batch.clone(),
                        heads: heads.clone(),
                        inside: inside(visible, &queries, &keys),
                        queries,
                        keys,
                    });
                }
            }
        }
    }
    tiles
}

/// Neighbouring batch rows with the same runs, and those runs.
fn batch_rows(visible: &Visible, batch: usize) -> Vec<(Range<usize>, Vec<Range<usize>>)> {
    match visible.segments {
        None => vec![(0..batch, iter::once(0..visible.queries).collect())],
        Some(segments) => neighbours(batch, |a, b| segments[a] == segments[b])
            .map(|rows| (rows.clone(), segments[rows.start].clone()))
            .collect(),
    }
}

/// Neighbouring query heads that see the same.
fn equal_heads(visible: &Visible, heads: usize) -> Vec<Range<usize>> {
    let equal = |a, b| {
        visible
            .layout
            .is_none_or(|layout| layout.head(a) == layout.head(b))
    };
    neighbours(heads, equal).collect()
}

/// 0..count in the longest ranges whose members are all equal.
fn neighbours(
    count: usize,
    equal: impl Fn(usize, usize) -> bool,
) -> impl Iterator<Item = Range<usize>> {
    let mut start = 0;
    iter::from_fn(move || {
        let first = start;
        while start < count && equal(first, start) {
            start += 1;
        }
        (first < start).then_some(first..start)
    })
}

/// A run in pieces that go through no block of the layout's cuts and have no
/// more than `rows` tokens.
fn cuts(visible: &Visible, run: &Range<usize>, rows: usize) -> impl Iterator<Item = Range<usize>> {
    let block = visible.layout.map_or(usize::MAX, |layout| layout.block());
    let (mut start, end) = (run.start, run.end);
    iter::from_fn(move || {
        let first = start;
        let block_end = (first / block + 1).saturating_mul(block);
        start = first.saturating_add(rows).min(block_end).min(end);
        (first < start).then_some(first..start)
    })
}

/// The keys in `run` that any of `queries` sees.
fn keys_of(
    visible: &Visible,
    run: &Range<usize>,
    head: usize,
    queries: &Range<usize>,
) -> Vec<Range<usize>> {
    let (mut start, mut end) = (run.start, run.end);
    if visible.segments.is_none() {
        // Keys of another sequence are all in the one run.
        end = visible.keys;
    }
    if let Some(window) = visible.order.window {
        start = start.max((queries.start + 1).saturating_sub(window));
        end = end.min(queries.end + (window - 1));
    }
    if visible.order.causal {
        end = end.min(queries.end);
    }
    let Some(layout) = visible.layout else {
        return iter::once(start..end)
            .filter(|keys| !keys.is_empty())
            .collect();
    };
    let row = layout.row(head, queries.start / layout.block());
    neighbours(row.len(), |a, b| row[a] == row[b])
        .filter(|blocks| row[blocks.start])
        .map(|blocks| {
            let tokens = blocks.start * layout.block()..blocks.end * layout.block();
            tokens.start.max(start)..tokens.end.min(end)
        })
        .filter(|keys| !keys.is_empty())
        .collect()
}

fn inside(visible: &Visible, queries: &Range<usize>, keys: &[Range<usize>]) -> Inside {
    let first = keys.first().map_or(0, |range| range.start);
    let past = keys.last().map_or(0, |range| range.end);
    let behind = (queries.end - 1).saturating_sub(first);
    let ahead = past.saturating_sub(queries.start + 1);
    // Where causal, a key far ahead is hidden anyway.
    let furthest = if visible.order.causal {
        behind
    } else {
        behind.max(ahead)
    };
    let all_near = visible.order.window.is_none_or(|window| furthest < window);
    if all_near && (!visible.order.causal || ahead == 0) {
        Inside::All
    } else if all_near && keys == slice::from_ref(queries) {
        Inside::Causal
    } else {
        Inside::InOrder
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::core_attention::{BlockLayout, visible::Order};
    use proptest::prelude::*;
    use tch::Tensor;

    const HEADS: usize = 3;

    /// Whether exactly those keys that each query sees are in exactly one of
    /// the tiles.
    fn is_exact(visible: &Visible, batch: usize, tiles: &[Tile]) -> bool {
        let together = |row: usize, i: usize, j: usize| {
            visible
                .segments
                .is_none_or(|segments: &[Vec<Range<usize>>]| {
                    let one = |run: &Range<usize>| run.contains(&i) && run.contains(&j);
                    segments[row].iter().any(one)
                })
        };
        let in_order = |i: usize, j: usize| {
            (!visible.order.causal || j <= i)
                && visible.order.window.is_none_or(|n| i.abs_diff(j) < n)
        };
        let in_layout = |head: usize, i: usize, j: usize| {
            visible
                .layout
                .is_none_or(|layout| layout.row(head, i / layout.block())[j / layout.block()])
        };
        let places = (0..batch).flat_map(|row| (0..HEADS).map(move |head| (row, head)));
        places.into_iter().all(|(row, head)| {
            (0..visible.queries * visible.keys).all(|place| {
                let (i, j) = (place / visible.keys, place % visible.keys);
                let shown = tiles.iter().filter(|tile| {
                    tile.batch.contains(&row)
                        && tile.heads.contains(&head)
                        && tile.queries.contains(&i)
                        && tile.keys.iter().any(|keys| keys.contains(&j))
                        && match tile.inside {
                            Inside::All => true,
                            Inside::Causal => j <= i,
                            Inside::InOrder => in_order(i, j),
                        }
                });
                let due = in_order(i, j) && together(row, i, j) && in_layout(head, i, j);
                shown.count() == usize::from(due)
            })
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn tiles_show_exactly_what_is_visible(
            tokens in 1..14usize,
            order in (any::<bool>(), prop::option::of(1..14usize)),
            cuts in prop::option::of(prop::collection::vec((0..14usize, 0..14usize), 2)),
            blocks in prop::option::of((1..6usize, prop::collection::vec(any::<bool>(), 600))),
            rows in 1..16usize,
        ) {
            let segments: Option<Vec<_>> = cuts.map(|cuts| {
                let run = |(a, b): (usize, usize)| {
                    let (a, b) = (a.min(b).min(tokens), a.max(b).min(tokens));
                    vec![0..a, a..b]
                };
                cuts.into_iter().map(run).collect()
            });
            let layout = blocks.map(|(block, visible)| {
                let count = tokens.div_ceil(block);
                let visible = Tensor::from_slice(&visible[..HEADS * count * count]);
                let size = [HEADS, count, count].map(|length| length as i64);
                BlockLayout::new(&visible.view(size), block).unwrap()
            });
            let visible = Visible {
                queries: tokens,
                keys: tokens,
                order: Order { causal: order.0, window: order.1 },
                segments: segments.as_deref(),
                layout: layout.as_ref(),
            };
            let tiles = plan(&visible, 2, HEADS, rows);
            prop_assert!(is_exact(&visible, 2, &tiles), "{tiles:?}");
            for tile in &tiles {
                prop_assert!(tile.queries.len() <= rows);
                prop_assert!(tile.keys.iter().all(|keys| !keys.is_empty()));
            }
        }
    }

    fn seen(causal: bool, window: Option<usize>) -> Visible<'static> {
        Visible {
            queries: 1 << 20,
            keys: 1 << 20,
            order: Order { causal, window },
            segments: None,
            layout: None,
        }
    }

    #[test]
    fn the_tiles_of_a_window_do_not_grow_with_the_sequence() {
        for causal in [false, true] {
            for tile in plan(&seen(causal, Some(100)), 1, 1, 128) {
                assert_eq!(tile.keys.len(), 1);
                assert!(tile.keys[0].len() < 128 + 2 * 100);
            }
        }
    }

    #[test]
    fn rows_and_heads_that_see_the_same_share_tiles_without_masks() {
        let document = |cut: usize| vec![0..cut, cut..1 << 20];
        let segments = [document(7), document(7), document(9)];
        let visible = Visible {
            segments: Some(&segments),
            ..seen(true, None)
        };
        let tiles = plan(&visible, 3, 4, usize::MAX);
        let batches: Vec<_> = tiles.iter().map(|tile| tile.batch.clone()).collect();
        assert_eq!(batches, [0..2, 0..2, 2..3, 2..3]);
        for tile in tiles {
            assert_eq!((tile.heads, tile.inside), (0..4, Inside::Causal));
        }
    }
}
