//! The sizes of a decoder, as far as its cost depends on them.

use super::{not_zero, product, times};
use crate::error::Result;

/// A decoder of equal layers: attention, then an MLP, and a head over the
/// vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Model {
    /// L, how many layers there are.
    pub layers: u64,
    /// h, the width of the stream between layers.
    pub hidden: u64,
    /// Hq.
    pub query_heads: u64,
    /// Hkv.
    pub kv_heads: u64,
    /// D, of queries, keys and values.
    pub head_size: u64,
    /// F, the width inside the MLP.
    pub ffn: u64,
    /// The [h, F] matrices of the MLP: 3 where it is gated, 2 where it is not.
    pub mlp_matrices: u64,
    /// V.
    pub vocabulary: u64,
    /// Whether the head is the embedding.
    pub is_tied: bool,
    /// Parameters of a layer that are in no matrix: norms and biases.
    pub small_parameters: u64,
}

impl Model {
    /// Models of the published rows, by name.
    ///
    /// The sizes of the first three are those of the `config.json` published
    /// with the weights: `meta-llama/Llama-3.1-8B`, `meta-llama/Llama-3.1-70B`
    /// and `Qwen/Qwen3-32B`. Those of `GPT-7B` (arXiv:2309.14509, tables 2 and
    /// 3) are inferred: the paper has none, and its figures fit these.
    pub const NAMED: [(&'static str, Model); 4] = [
        ("Llama-3.1-8B", llama(32, 4096, 32, 14336, 128_256)),
        ("Llama-3.1-70B", llama(80, 8192, 64, 28672, 128_256)),
        (
            "Qwen3-32B",
            Model {
                // Queries and keys of a head are normalized too.
                small_parameters: 2 * 5120 + 2 * 128,
                ..llama(64, 5120, 64, 25600, 151_936)
            },
        ),
        (
            "GPT-7B",
            Model {
                kv_heads: 32,
                mlp_matrices: 2,
                is_tied: true,
                // Two norms with biases, and nine biases of width h.
                small_parameters: 13 * 4096,
                ..llama(32, 4096, 32, 4 * 4096, 50_257)
            },
        ),
    ];

    /// The model of this name, in any case.
    pub fn named(name: &str) -> Option<Model> {
        let is_it = |(of, _): &&(&str, Model)| of.eq_ignore_ascii_case(name);
        Self::NAMED.iter().find(is_it).map(|(_, model)| *model)
    }

    /// N, all parameters.
    ///
    /// # Errors
    /// Refused when a size is zero or their product absurd.
    pub fn parameters(&self) -> Result<u128> {
        self.check()?;
        let tables = if self.is_tied { 1 } else { 2 };
        let layer = self.projections()? + self.mlp()? + u128::from(self.small_parameters);
        Ok(product([tables, self.vocabulary, self.hidden])?
            + times(layer, self.layers)?
            + u128::from(self.hidden))
    }

    /// The weights of a layer's query, key, value and output projections.
    pub(super) fn projections(&self) -> Result<u128> {
        let query = product([2, self.hidden, self.query_heads, self.head_size])?;
        Ok(query + product([2, self.hidden, self.kv_heads, self.head_size])?)
    }

    /// The weights of a layer's MLP.
    pub(super) fn mlp(&self) -> Result<u128> {
        product([self.mlp_matrices, self.hidden, self.ffn])
    }

    pub(super) fn check(&self) -> Result<()> {
        let sizes = [
            ("number of layers", self.layers),
            ("hidden size", self.hidden),
            ("number of query heads", self.query_heads),
            ("number of KV heads", self.kv_heads),
            ("head size", self.head_size),
            ("MLP width", self.ffn),
            ("number of MLP matrices", self.mlp_matrices),
            ("vocabulary", self.vocabulary),
        ];
        not_zero("model", &sizes)?;
        // The largest product that any cost of one token has.
        product([8, self.layers, self.hidden, self.ffn.max(self.vocabulary)]).map(drop)
    }
}

/// Llama's family: 8 KV heads of size 128, a gated MLP, two norms.
const fn llama(layers: u64, hidden: u64, query_heads: u64, ffn: u64, vocabulary: u64) -> Model {
    Model {
        layers,
        hidden,
        query_heads,
        kv_heads: 8,
        head_size: 128,
        ffn,
        mlp_matrices: 3,
        vocabulary,
        is_tied: false,
        small_parameters: 2 * hidden,
    }
}
