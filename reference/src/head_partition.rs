//! Which query heads, and which KV heads, each rank attends with.
//!
//! Pure arithmetic on counts: no tensor and no communication. Everything is
//! worked out from three numbers that all ranks know, so no rank has to tell
//! another what it holds.
//!
//! * Rank `i` holds a contiguous range of query heads, one more than the last
//!   ranks do while `i < query_heads mod ranks`.
//! * Query head `h` attends to KV head `floor(h * kv_heads / query_heads)`
//!   (grouped-query attention; Ainslie et al., arXiv:2305.13245, section 2.2).
//! * A rank holds the KV heads its query heads attend to. The range is
//!   contiguous, for that map never falls. A KV head that several ranks need
//!   is *replicated*: its tokens are sent to each of them.

use crate::error::{Result, refuse};
use std::ops::Range;

/// The heads of every rank, for one choice of query heads, KV heads and ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadPartition {
    query_heads: usize,
    kv_heads: usize,
    ranks: usize,
}

impl HeadPartition {
    /// Shares `query_heads` and `kv_heads` out over `ranks`.
    ///
    /// `kv_heads` need not divide `ranks`, nor `ranks` either of the counts.
    ///
    /// # Errors
    /// Refused when a count is zero, when the query heads are not a multiple of
    /// the KV heads, or when a rank would be left without a query head.
    pub fn new(query_heads: usize, kv_heads: usize, ranks: usize) -> Result<Self> {
        if query_heads == 0 || kv_heads == 0 || ranks == 0 {
            return refuse(
                "query",
                format!("has {query_heads} heads for {kv_heads} KV heads and {ranks} ranks"),
                "give at least one of each",
            );
        }
        if !query_heads.is_multiple_of(kv_heads) {
            return refuse(
                "query",
                format!("has {query_heads} heads, which is no multiple of the {kv_heads} KV heads"),
                "give every KV head the same number of query heads",
            );
        }
        if ranks > query_heads {
            return refuse(
                "query",
                format!("has {query_heads} heads, fewer than the {ranks} ranks"),
                format!("use at most {query_heads} ranks"),
            );
        }
        Ok(Self {
            query_heads,
            kv_heads,
            ranks,
        })
    }

    /// How many query heads there are in all.
    pub fn query_heads(&self) -> usize {
        self.query_heads
    }

    /// How many KV heads there are in all.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// How many ranks share the heads.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// Whether every rank holds equally many query heads.
    pub fn is_even(&self) -> bool {
        self.query_heads.is_multiple_of(self.ranks)
    }

    /// The query heads of `rank`, by their number in the whole.
    pub fn query_range(&self, rank: usize) -> Range<usize> {
        let (each, over) = (self.query_heads / self.ranks, self.query_heads % self.ranks);
        let first = |rank: usize| rank * each + rank.min(over);
        first(rank)..first(rank + 1)
    }

    /// The KV head that `query_head` attends to.
    pub fn kv_head_of(&self, query_head: usize) -> usize {
        query_head * self.kv_heads / self.query_heads
    }

    /// The KV heads of `rank`, by their number in the whole.
    pub fn kv_range(&self, rank: usize) -> Range<usize> {
        let query = self.query_range(rank);
        // `new` leaves no rank without a query head, so `end` is at least 1.
        self.kv_head_of(query.start)..self.kv_head_of(query.end - 1) + 1
    }

    /// The ranks that hold `kv_head`, a contiguous range.
    pub fn kv_holders(&self, kv_head: usize) -> Range<usize> {
        let first = (0..self.ranks)
            .take_while(|&r| self.kv_range(r).end <= kv_head)
            .count();
        let past = (0..self.ranks)
            .take_while(|&r| self.kv_range(r).start <= kv_head)
            .count();
        first..past
    }

    /// Whether any KV head is held by more than one rank.
    pub fn is_replicated(&self) -> bool {
        (1..self.ranks).any(|rank| self.kv_range(rank).start < self.kv_range(rank - 1).end)
    }

    /// Which of its own KV heads each query head of `rank` attends to.
    pub fn head_map(&self, rank: usize) -> HeadMap {
        let kv = self.kv_range(rank);
        HeadMap {
            kv_of_query: self
                .query_range(rank)
                .map(|h| self.kv_head_of(h) - kv.start)
                .collect(),
            kv_heads: kv.len(),
        }
    }
}

/// From a rank's query heads to its KV heads, both numbered from zero.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeadMap {
    kv_of_query: Vec<usize>,
    kv_heads: usize,
}

impl HeadMap {
    /// The KV head of each query head.
    pub fn kv_of_query(&self) -> &[usize] {
        &self.kv_of_query
    }

    /// How many KV heads there are.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// How many query heads there are.
    pub fn query_heads(&self) -> usize {
        self.kv_of_query.len()
    }

    /// The query heads that attend to `kv_head`, a contiguous range.
    pub fn query_range_of(&self, kv_head: usize) -> Range<usize> {
        let first = |kv: usize| self.kv_of_query.partition_point(|&head| head < kv);
        first(kv_head)..first(kv_head + 1)
    }

    /// The KV heads that a contiguous range of query heads attends to, and the
    /// map from the former to the latter. An empty range has no KV heads.
    pub fn narrow(&self, query_heads: Range<usize>) -> (Range<usize>, HeadMap) {
        let picked = self.kv_of_query.get(query_heads).unwrap_or_default();
        let kv_range = match picked {
            [] => 0..0,
            [first, .., last] => *first..last + 1,
            [only] => *only..only + 1,
        };
        let narrowed = HeadMap {
            kv_of_query: picked.iter().map(|kv| kv - kv_range.start).collect(),
            kv_heads: kv_range.len(),
        };
        (kv_range, narrowed)
    }

    /// The number of query heads of every KV head, if that is the same for
    /// all; a kernel for grouped-query attention can then be used as it is.
    ///
    /// An uneven cut may go through a group: query heads attending to KV heads
    /// `[0, 0, 1]` have no uniform group.
    pub fn uniform_group(&self) -> Option<usize> {
        let group = self.query_heads() / self.kv_heads;
        let uniform = self
            .kv_of_query
            .iter()
            .enumerate()
            .all(|(h, &kv)| kv == h / group);
        (uniform && group * self.kv_heads == self.query_heads()).then_some(group)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn more_ranks_than_kv_heads_replicates_them() {
        let heads = HeadPartition::new(8, 2, 4).unwrap();
        let ranges: Vec<_> = (0..4).map(|rank| heads.kv_range(rank)).collect();
        assert_eq!(ranges, [0..1, 0..1, 1..2, 1..2]);
        assert_eq!((heads.kv_holders(0), heads.kv_holders(1)), (0..2, 2..4));
        assert!(heads.is_replicated());
    }

    #[test]
    fn an_uneven_cut_may_go_through_a_group() {
        let heads = HeadPartition::new(6, 3, 4).unwrap();
        let query: Vec<_> = (0..4).map(|rank| heads.query_range(rank)).collect();
        assert_eq!(query, [0..2, 2..4, 4..5, 5..6]);
        assert_eq!(heads.kv_holders(2), 2..4);
        let heads = HeadPartition::new(6, 3, 2).unwrap();
        assert_eq!(heads.head_map(0).kv_of_query(), [0, 0, 1]);
        assert_eq!(heads.head_map(0).uniform_group(), None);
        assert_eq!(heads.head_map(1).kv_of_query(), [0, 1, 1]);
        assert_eq!(heads.head_map(1).query_range_of(0), 0..1);
        assert_eq!(heads.head_map(1).query_range_of(1), 1..3);
        assert_eq!(heads.head_map(1).uniform_group(), None);
    }

    #[test]
    fn a_range_of_query_heads_keeps_its_kv_heads() {
        let map = HeadPartition::new(8, 4, 1).unwrap().head_map(0);
        let (kv, narrowed) = map.narrow(3..6);
        assert_eq!(kv, 1..3);
        assert_eq!(narrowed.kv_of_query(), [0, 1, 1]);
        assert_eq!(narrowed.kv_heads(), 2);
        assert_eq!(map.narrow(0..8), (0..4, map.clone()));
        assert_eq!(map.narrow(5..5).0, 0..0);
    }

    #[test]
    fn whole_groups_stay_uniform() {
        let heads = HeadPartition::new(12, 4, 2).unwrap();
        assert_eq!(heads.head_map(1).uniform_group(), Some(3));
        assert!(!heads.is_replicated());
    }

    #[test]
    fn every_query_head_finds_its_kv_head_on_its_own_rank() {
        for kv_heads in 1..=6 {
            for group in 1..=4 {
                for ranks in 1..=kv_heads * group {
                    let heads = HeadPartition::new(kv_heads * group, kv_heads, ranks).unwrap();
                    let mut next = 0;
                    for rank in 0..ranks {
                        let query = heads.query_range(rank);
                        assert_eq!(query.start, next);
                        next = query.end;
                        let (kv, map) = (heads.kv_range(rank), heads.head_map(rank));
                        for (local, head) in query.enumerate() {
                            assert_eq!(kv.start + map.kv_of_query()[local], head / group);
                        }
                        for head in 0..kv_heads {
                            assert_eq!(heads.kv_holders(head).contains(&rank), kv.contains(&head));
                        }
                    }
                    assert_eq!(next, kv_heads * group);
                }
            }
        }
    }
}
