//! Which tokens of the sequence each rank holds, and in which order.
//!
//! Pure arithmetic on counts, like [`head_partition`](crate::head_partition)
//! for heads. Attention itself always sees the tokens in their global order:
//! the exchange writes each to its global place, so that a causal mask means
//! the same for every sharding.
//!
//! Zigzag and striped shardings are those of load-balanced context
//! parallelism, where causal attention would otherwise give the last rank most
//! of the work. Ulysses needs neither, but models are sharded once for all of
//! their layers.

use crate::error::{Error, Refusal, Result, refuse};

/// How a sequence is cut into shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sharding {
    /// Rank r holds the r-th run of tokens, of any length.
    #[default]
    Contiguous,
    /// Of 2P runs, the first `S mod 2P` of them one token longer, rank r holds
    /// run r and then run 2P - 1 - r.
    Zigzag,
    /// Rank r holds tokens r, r + P, r + 2P and so on.
    Striped,
}

/// Tokens `first`, `first + step`, and so on, in the whole sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The first token.
    pub first: usize,
    /// How many tokens there are.
    pub tokens: usize,
    /// From one token to the next.
    pub step: usize,
}

/// The tokens of every rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenPartition {
    /// For each rank its runs, in the order in which it holds them. None of
    /// them is empty.
    runs: Vec<Vec<Run>>,
}

impl TokenPartition {
    /// The partition of a sequence of which rank r holds `tokens[r]` tokens.
    ///
    /// # Errors
    /// Refused when there is no token at all, and when a rank does not hold as
    /// many as a zigzag or striped sharding gives it.
    pub fn new(sharding: Sharding, tokens: &[usize]) -> Result<Self> {
        let total: usize = tokens.iter().sum();
        if total == 0 {
            return refuse(
                "query",
                "has no token on any rank",
                "give at least one rank a token",
            );
        }
        let partition = Self::of(sharding, total, tokens);
        for (rank, &given) in tokens.iter().enumerate() {
            let due = partition.tokens(rank);
            if given != due {
                return Err(Error::from(Refusal {
                    rank: Some(rank),
                    argument: "query",
                    problem: format!(
                        "has {given} of {total} tokens, but a {sharding:?} sharding over {} ranks \
                         gives this one {due}",
                        tokens.len()
                    ),
                    remedy: "give every rank the tokens of its shard".to_owned(),
                }));
            }
        }
        Ok(partition)
    }

    /// The partition of `total` tokens over `ranks` ranks whose shards are as
    /// equal as they can be: of contiguous ones, the first `total mod ranks`
    /// are one token longer.
    ///
    /// # Errors
    /// Refused when there is no rank.
    pub fn even(sharding: Sharding, total: usize, ranks: usize) -> Result<Self> {
        if ranks == 0 {
            return refuse("ranks", "is 0", "give the size of the group");
        }
        let (each, over) = (total / ranks, total % ranks);
        let tokens: Vec<usize> = (0..ranks)
            .map(|rank| each + usize::from(rank < over))
            .collect();
        Ok(Self::of(sharding, total, &tokens))
    }

    /// A contiguous sharding goes by `tokens`, the others by the total.
    fn of(sharding: Sharding, total: usize, tokens: &[usize]) -> Self {
        let runs = match sharding {
            Sharding::Contiguous => contiguous(tokens),
            Sharding::Zigzag => zigzag(total, tokens.len()),
            Sharding::Striped => striped(total, tokens.len()),
        };
        Self { runs }
    }

    /// How many ranks share the tokens.
    pub fn ranks(&self) -> usize {
        self.runs.len()
    }

    /// How many tokens there are in all.
    pub fn total(&self) -> usize {
        (0..self.ranks()).map(|rank| self.tokens(rank)).sum()
    }

    /// How many tokens `rank` holds.
    pub fn tokens(&self, rank: usize) -> usize {
        self.runs[rank].iter().map(|run| run.tokens).sum()
    }

    /// The runs of `rank`, in the order in which it holds them.
    pub fn runs(&self, rank: usize) -> &[Run] {
        &self.runs[rank]
    }

    /// Where in the whole sequence each token of `rank` stands.
    pub fn places(&self, rank: usize) -> impl Iterator<Item = usize> + '_ {
        self.runs[rank]
            .iter()
            .flat_map(|run| (0..run.tokens).map(|i| run.first + i * run.step))
    }
}

fn contiguous(tokens: &[usize]) -> Vec<Vec<Run>> {
    let mut first = 0;
    tokens
        .iter()
        .map(|&tokens| {
            let run = run(first, tokens);
            first += tokens;
            run.into_iter().collect()
        })
        .collect()
}

fn zigzag(total: usize, ranks: usize) -> Vec<Vec<Run>> {
    let (each, over) = (total / (2 * ranks), total % (2 * ranks));
    let first = |chunk: usize| chunk * each + chunk.min(over);
    let chunk = |chunk: usize| run(first(chunk), first(chunk + 1) - first(chunk));
    (0..ranks)
        .map(|rank| {
            let both = [chunk(rank), chunk(2 * ranks - 1 - rank)];
            both.into_iter().flatten().collect()
        })
        .collect()
}

fn striped(total: usize, ranks: usize) -> Vec<Vec<Run>> {
    (0..ranks)
        .map(|rank| {
            let stripe = Run {
                first: rank,
                tokens: total.saturating_sub(rank).div_ceil(ranks),
                step: ranks,
            };
            Some(stripe)
                .filter(|run| run.tokens > 0)
                .into_iter()
                .collect()
        })
        .collect()
}

/// Tokens side by side, if there are any.
fn run(first: usize, tokens: usize) -> Option<Run> {
    (tokens > 0).then_some(Run {
        first,
        tokens,
        step: 1,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn places(sharding: Sharding, tokens: &[usize]) -> Vec<Vec<usize>> {
        let partition = TokenPartition::new(sharding, tokens).unwrap();
        (0..tokens.len())
            .map(|rank| partition.places(rank).collect())
            .collect()
    }

    #[test]
    fn contiguous_shards_may_have_any_length() {
        assert_eq!(
            places(Sharding::Contiguous, &[2, 0, 3]),
            [vec![0, 1], vec![], vec![2, 3, 4]]
        );
    }

    #[test]
    fn zigzag_pairs_an_early_run_with_a_late_one() {
        assert_eq!(
            places(Sharding::Zigzag, &[4, 4]),
            [[0, 1, 6, 7], [2, 3, 4, 5]]
        );
        // 7 tokens in runs of 2, 2, 2 and 1.
        assert_eq!(
            places(Sharding::Zigzag, &[3, 4]),
            [vec![0, 1, 6], vec![2, 3, 4, 5]]
        );
        assert_eq!(
            places(Sharding::Zigzag, &[1, 1, 0]),
            [vec![0], vec![1], vec![]]
        );
    }

    #[test]
    fn stripes_go_round_the_ranks() {
        assert_eq!(
            places(Sharding::Striped, &[3, 2, 2]),
            [vec![0, 3, 6], vec![1, 4], vec![2, 5]]
        );
        assert_eq!(places(Sharding::Striped, &[1, 0]), [vec![0], vec![]]);
    }

    #[test]
    fn every_token_is_held_once() {
        for sharding in [Sharding::Contiguous, Sharding::Zigzag, Sharding::Striped] {
            for ranks in 1..6 {
                for total in 1..30 {
                    let tokens: Vec<usize> = match sharding {
                        Sharding::Contiguous => (0..ranks).map(|r| (total + r) / ranks).collect(),
                        Sharding::Zigzag => counts(&zigzag(total, ranks)),
                        Sharding::Striped => counts(&striped(total, ranks)),
                    };
                    let mut all: Vec<usize> = places(sharding, &tokens).concat();
                    all.sort_unstable();
                    assert_eq!(all, (0..total).collect::<Vec<_>>());
                }
            }
        }
    }

    fn counts(shards: &[Vec<Run>]) -> Vec<usize> {
        let count = |runs: &Vec<Run>| runs.iter().map(|run| run.tokens).sum();
        shards.iter().map(count).collect()
    }

    #[test]
    fn a_shard_of_another_length_is_refused() {
        let error = TokenPartition::new(Sharding::Zigzag, &[4, 5]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "rank 0: `query` has 4 of 9 tokens, but a Zigzag sharding over 2 ranks gives this one \
             5; give every rank the tokens of its shard"
        );
    }
}
