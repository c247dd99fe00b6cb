//! The decoder, written out: from tokens to what the head makes logits of.
//!
//! Every number that an implementation may round on the way is rounded, whether
//! it stores it or computes several operations in one: who does less is nearer.

use std::collections::BTreeMap;

use fixtures::ModelCase;
use tch::{Device, Kind, TchError, Tensor};

use super::layout::Layout;
use crate::diagnosis::Mistake;
use crate::oracle::rounding::Rounding;

/// What takes the place of a score that is not seen: its exponential is 0.
const UNSEEN: f64 = -1e4;

/// One computation, in several runs at once: every tensor has one part for each
/// run along its first dimension.
pub(super) struct Decoder<'a> {
    pub(super) case: &'a ModelCase,
    pub(super) layout: &'a Layout,
    pub(super) rounding: &'a Rounding,
    pub(super) runs: i64,
    pub(super) mistake: Option<Mistake>,
    /// The weights as each rank has them, by name.
    pub(super) weights: Vec<BTreeMap<String, Tensor>>,
}

impl Decoder<'_> {
    /// `[runs, rows, channels]`.
    pub(super) fn hidden_states(&self) -> Result<Tensor, TchError> {
        let tokens = |rank: usize, first: i64, count: i64| {
            let ids = self.layout.ids.f_narrow(0, first, count)?;
            let table = self.weight(rank, "model.embed_tokens.weight")?;
            self.rounding.rows(&self.rounding.leaf(table)?, &ids)
        };
        let mut hidden = self.on_each_rank(tokens)?;
        let right = self.angles(self.mistake == Some(Mistake::RotaryByLocalPosition))?;
        let other = self.angles(true)?;
        for layer in 0..self.case.layers {
            let done = self.layer(layer, &hidden, &right)?;
            hidden = match self.mistake {
                // The value of the one, and the derivative of the other.
                Some(Mistake::RecomputedElsewhere) => {
                    let again = self.layer(layer, &hidden, &other)?;
                    let apart = done.f_sub(&again)?.f_detach()?;
                    again.f_add(&apart)?
                }
                _ => done,
            };
        }
        self.norm(&hidden, "model.norm.weight")
    }

    /// What the head makes of hidden states, in parts of the ranks.
    pub(super) fn logits(&self, hidden: &Tensor) -> Result<Vec<Tensor>, TchError> {
        let name = match self.case.is_tied {
            true => "model.embed_tokens.weight",
            false => "lm_head.weight",
        };
        let ranks = self.layout.ranks.iter().enumerate();
        ranks
            .map(|(rank, &(first, count))| {
                let head = match self.mistake {
                    Some(Mistake::TiedGradientLost) if self.case.is_tied => {
                        self.weight(rank, name)?.f_detach()?
                    }
                    _ => self.weight(rank, name)?.shallow_clone(),
                };
                let head = self.rounding.leaf(&head)?;
                self.project(&hidden.f_narrow(1, first, count)?, &head)
            })
            .collect()
    }

    fn layer(
        &self,
        layer: usize,
        hidden: &Tensor,
        angles: &[Tensor; 2],
    ) -> Result<Tensor, TchError> {
        let rounding = self.rounding;
        let name = |module: &str| format!("model.layers.{layer}.{module}.weight");
        let normal = self.norm(hidden, &name("input_layernorm"))?;
        let projected = |module: &str, heads: usize| {
            let size = self.case.head_size() as i64;
            self.linear(&normal, &name(module))?
                .f_view([self.runs, -1, heads as i64, size])
        };
        let (heads, kv_heads) = (self.case.query_heads, self.case.kv_heads);
        let query = self.rotated(&projected("self_attn.q_proj", heads)?, angles)?;
        let key = self.rotated(&projected("self_attn.k_proj", kv_heads)?, angles)?;
        let value = projected("self_attn.v_proj", kv_heads)?;
        let attended = self.attention(layer, &query, &key, &value)?;
        let attended = self.linear(&attended, &name("self_attn.o_proj"))?;
        let hidden = rounding.stored(&hidden.f_add(&attended)?)?;
        let normal = self.norm(&hidden, &name("post_attention_layernorm"))?;
        let gate = self.linear(&normal, &name("mlp.gate_proj"))?;
        let up = self.linear(&normal, &name("mlp.up_proj"))?;
        let sigmoid = rounding.wide(&rounding.wide(&gate.f_sigmoid()?)?)?;
        let gate = rounding.stored(&gate.f_mul(&sigmoid)?)?;
        let inner = rounding.stored(&gate.f_mul(&up)?)?;
        let down = self.linear(&inner, &name("mlp.down_proj"))?;
        rounding.stored(&hidden.f_add(&down)?)
    }

    /// `x / sqrt(mean(x^2) + epsilon)`, times a weight for each channel.
    fn norm(&self, x: &Tensor, name: &str) -> Result<Tensor, TchError> {
        let rounding = self.rounding;
        let channels = self.case.hidden as i64;
        let squares = rounding.wide(&x.f_square()?)?;
        let mean = rounding.wide(&rounding.sum(&squares)?.f_div_scalar(channels)?)?;
        let mean = rounding.wide(&mean.f_add_scalar(self.case.epsilon())?)?;
        let inverse = rounding.wide(&rounding.wide(&mean.f_rsqrt()?)?)?;
        let inverse = self.spread(&inverse.f_unsqueeze(-1)?, channels)?;
        let normal = rounding.stored(&x.f_mul(&inverse)?)?;
        let weights = |rank: usize, _: i64, count: i64| {
            let weight = rounding.leaf(self.weight(rank, name)?)?.f_unsqueeze(1)?;
            let zeros = Tensor::f_zeros([count], (Kind::Int64, Device::Cpu))?;
            rounding.rows(&weight, &zeros)
        };
        rounding.stored(&normal.f_mul(&self.on_each_rank(weights)?)?)
    }

    /// `x W^T`.
    fn linear(&self, x: &Tensor, name: &str) -> Result<Tensor, TchError> {
        self.on_each_rank(|rank, first, count| {
            let weight = self.rounding.leaf(self.weight(rank, name)?)?;
            self.project(&x.f_narrow(1, first, count)?, &weight)
        })
    }

    fn project(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor, TchError> {
        let product = self.rounding.matmuls(x, &weight.f_transpose(1, 2)?)?;
        self.rounding.stored(&product)
    }

    /// Cosine and sine of each row's angles, `[runs, rows, 1, pairs]`.
    fn angles(&self, are_local: bool) -> Result<[Tensor; 2], TchError> {
        let rounding = self.rounding;
        let pairs = (self.case.head_size() / 2) as i64;
        let exponents = Tensor::f_arange(pairs, (Kind::Double, Device::Cpu))?
            .f_div_scalar(pairs)?
            .f_expand([self.runs, pairs], false)?;
        let exponents = rounding.wide(&exponents)?;
        let frequencies = exponents.f_mul_scalar(-self.case.theta().ln())?.f_exp()?;
        // Of a power, and of its inverse.
        let frequencies = rounding.wide(&rounding.wide(&rounding.wide(&frequencies)?)?)?;
        let positions = self.layout.positions(are_local)?.f_to_kind(Kind::Double)?;
        let angles = positions
            .f_view([1, -1, 1, 1])?
            .f_mul(&frequencies.f_view([self.runs, 1, 1, pairs])?)?;
        let angles = rounding.wide(&angles)?;
        let both = [angles.f_cos()?, angles.f_sin()?];
        let [cos, sin] = both.map(|x| rounding.stored(&rounding.wide(&x)?));
        Ok([cos?, sin?])
    }

    /// Channel c and channel c + D/2, turned by the c-th angle.
    fn rotated(&self, x: &Tensor, [cos, sin]: &[Tensor; 2]) -> Result<Tensor, TchError> {
        let rounding = self.rounding;
        let pairs = (self.case.head_size() / 2) as i64;
        let (first, second) = (x.f_narrow(3, 0, pairs)?, x.f_narrow(3, pairs, pairs)?);
        let times = |x: &Tensor, y: &Tensor| rounding.stored(&x.f_mul(y)?);
        let turned = [
            times(&first, cos)?.f_sub(&times(&second, sin)?)?,
            times(&second, cos)?.f_add(&times(&first, sin)?)?,
        ];
        rounding.stored(&Tensor::f_cat(&turned, 3)?)
    }

    /// From `[runs, rows, heads, channels]` to `[runs, rows, all channels]`.
    fn attention(
        &self,
        layer: usize,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
    ) -> Result<Tensor, TchError> {
        let rounding = self.rounding;
        let Layout {
            sequences, length, ..
        } = *self.layout;
        let heads = self.case.query_heads as i64;
        // By sequences: [runs, sequences, heads, tokens, channels].
        let by_sequences = |x: &Tensor| {
            let (_, _, heads, size) = x.size4()?;
            x.f_index_select(1, &self.layout.row_of_token)?
                .f_view([self.runs, sequences, length, heads, size])?
                .f_transpose(2, 3)
        };
        let of_head = self.kv_head_of_query_head()?;
        let by_heads = |x: &Tensor| rounding.stored(&by_sequences(x)?.f_index_select(2, &of_head)?);
        let query = by_sequences(query)?;
        let (key, value) = (
            by_heads(&rounding.stored(key)?)?,
            by_heads(&rounding.stored(value)?)?,
        );
        let scale = 1.0 / (self.case.head_size() as f64).sqrt();
        let scores = rounding.matmuls(&query, &key.f_transpose(-2, -1)?.f_contiguous()?)?;
        let scores = rounding.stored(&rounding.stored(&scores)?.f_mul_scalar(scale)?)?;
        let is_last_layer = layer + 1 == self.case.layers;
        let hidden = self.layout.hidden(is_last_layer, self.mistake)?;
        let scores = scores.f_masked_fill(&hidden, UNSEEN)?;
        let largest = scores.f_detach()?.f_amax([-1], true)?;
        let shifted = rounding.wide(&scores.f_sub(&largest)?)?;
        let powers = rounding.wide(&rounding.wide(&shifted.f_exp()?)?)?;
        let total = rounding.sum(&powers)?.f_unsqueeze(-1)?;
        let weights = rounding.stored(&powers.f_div(&self.spread(&total, length)?)?)?;
        let out = rounding.stored(&rounding.matmuls(&weights, &value)?)?;
        let channels = heads * self.case.head_size() as i64;
        out.f_transpose(2, 3)?
            .f_reshape([self.runs, -1, channels])?
            .f_index_select(1, &self.layout.token_of_row)
    }

    fn kv_head_of_query_head(&self) -> Result<Tensor, TchError> {
        let (heads, kv_heads) = (self.case.query_heads, self.case.kv_heads);
        let of_head = |head: usize| match self.mistake {
            Some(Mistake::KvHeadsTiled) => head % kv_heads,
            _ => head * kv_heads / heads,
        };
        let of_head: Vec<i64> = (0..heads).map(|head| of_head(head) as i64).collect();
        Tensor::f_from_slice(&of_head)
    }

    /// The one number of the last dimension, `count` times: its gradient is their
    /// sum, in any order.
    fn spread(&self, x: &Tensor, count: i64) -> Result<Tensor, TchError> {
        let ones = Tensor::f_ones([1, count], (Kind::Double, Device::Cpu))?;
        self.rounding.matmul(x, &ones)
    }

    /// What each rank makes, given its number, first row and rows, put together.
    fn on_each_rank(
        &self,
        make: impl Fn(usize, i64, i64) -> Result<Tensor, TchError>,
    ) -> Result<Tensor, TchError> {
        let ranks = self.layout.ranks.iter().enumerate();
        let made = ranks.map(|(rank, &(first, count))| make(rank, first, count));
        Tensor::f_cat(&made.collect::<Result<Vec<_>, _>>()?, 1)
    }

    fn weight(&self, rank: usize, name: &str) -> Result<&Tensor, TchError> {
        let weight = self.weights.get(rank).and_then(|all| all.get(name));
        weight.ok_or_else(|| TchError::Shape(format!("there is no `{name}`")))
    }
}
