//! The bytes that DeepSpeed's Ulysses hands to its all-to-all.
//!
//! Q, K, V and the output each travel in a call of their own, whole heads of
//! equal shards: b B (S/P) D (2 Hq + 2 r Hkv) bytes in one direction, where
//! KV heads are repeated r = max(1, P/Hkv) times *before* the exchange, and so
//! on the wire. Backward is the same exchange of the cotangents. Position ids
//! are gathered in every forward, 8 bytes for each token of every other rank.
//!
//! Source: `deepspeed/runtime/sequence_parallel/ulysses_sp.py` of DeepSpeed
//! 0.19, `UlyssesSPAttentionHF`.

use super::{not_zero, product, times};
use crate::error::{Result, refuse};

/// The sizes on which the traffic of one attention depends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeepSpeedAttention {
    /// B.
    pub batch: u64,
    /// S, of all ranks.
    pub sequence: u64,
    /// Hq.
    pub query_heads: u64,
    /// Hkv.
    pub kv_heads: u64,
    /// D.
    pub head_size: u64,
    /// P.
    pub ranks: u64,
    /// b.
    pub element_bytes: u64,
}

/// What each rank hands over, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeepSpeedTraffic {
    /// r, how often each KV head is repeated.
    pub kv_copies: u64,
    /// Of the queries or the output, for each rank.
    pub query_block: u128,
    /// Of the keys or the values, for each rank.
    pub kv_block: u128,
    /// Of the largest call, the queries' or the output's. Beyond 2^31 an MPI
    /// whose counts of bytes have 32 bits cannot do it.
    pub largest_call: u128,
    /// By one layer in one direction, the rank's own blocks included.
    pub handed_over: u128,
    /// The same without its own blocks; as many arrive.
    pub off_rank: u128,
    /// Position ids that arrive from the others in one forward.
    pub positions_received: u128,
}

impl DeepSpeedAttention {
    /// All-to-all calls of one layer in one direction: Q, K, V, output.
    pub const CALLS: u64 = 4;

    /// The traffic of one layer in one direction.
    ///
    /// # Errors
    /// Refused when a size is zero, and what DeepSpeed does not do: ranks that
    /// do not divide the tokens or the query heads, and KV heads that neither
    /// divide the ranks nor are divided by them.
    pub fn traffic(&self) -> Result<DeepSpeedTraffic> {
        let &Self {
            batch,
            sequence,
            query_heads,
            kv_heads,
            head_size,
            ranks,
            element_bytes,
        } = self;
        let sizes = [
            ("batch", batch),
            ("length", sequence),
            ("number of query heads", query_heads),
            ("number of KV heads", kv_heads),
            ("head size", head_size),
            ("number of ranks", ranks),
            ("size of elements", element_bytes),
        ];
        not_zero("attention", &sizes)?;
        for (argument, name, count) in [
            ("sequence", "tokens", sequence),
            ("query_heads", "heads", query_heads),
        ] {
            if !count.is_multiple_of(ranks) {
                return refuse(
                    argument,
                    format!("has {count} {name}, which DeepSpeed cannot cut for {ranks} ranks"),
                    "give each rank as many",
                );
            }
        }
        if !kv_heads.is_multiple_of(ranks) && !ranks.is_multiple_of(kv_heads) {
            return refuse(
                "kv_heads",
                format!("has {kv_heads} heads, which DeepSpeed cannot cut for {ranks} ranks"),
                "give a multiple or a divisor of the ranks",
            );
        }
        let kv_copies = (ranks / kv_heads).max(1);
        let tokens = sequence / ranks;
        // r is at most P, so that r Hkv is Hkv or P.
        let all_kv_heads = kv_heads.max(ranks);
        let buffer = |heads: u64| product([element_bytes, batch, tokens, heads, head_size]);
        let (query, kv) = (buffer(query_heads)?, buffer(all_kv_heads)?);
        let (handed_over, parts) = (2 * query + 2 * kv, u128::from(ranks));
        Ok(DeepSpeedTraffic {
            kv_copies,
            query_block: query / parts,
            kv_block: kv / parts,
            largest_call: query.max(kv),
            handed_over,
            off_rank: handed_over - handed_over / parts,
            positions_received: product([8, batch, tokens, ranks - 1])?,
        })
    }
}

impl DeepSpeedTraffic {
    /// What leaves the rank in a step: forward and backward, and forward again
    /// where layers are checkpointed. Position ids are not among it.
    ///
    /// # Errors
    /// Refused when that is absurd.
    pub fn off_rank_of_step(&self, layers: u64, is_checkpointed: bool) -> Result<u128> {
        let directions: u64 = if is_checkpointed { 3 } else { 2 };
        times(times(self.off_rank, layers)?, directions)
    }
}
