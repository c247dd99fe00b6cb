//! One layer of a decoder: attention and an MLP, each on normalised channels
//! and added to what came in.
//!
//! Source: Touvron et al., "LLaMA: Open and Efficient Foundation Language
//! Models", arXiv:2302.13971, section 2.2, in the order of operations of
//! `LlamaDecoderLayer` of Hugging Face transformers.

use super::{
    attention_functions::{AttentionCall, AttentionFunction},
    config::LayerHeads,
};
use crate::{
    call::Documents,
    core_attention::Score,
    error::{Result, refuse},
    head_norm::normalize_heads,
    rotary::turn,
    tiled::{SwiGlu, tiled_mlp},
};
use std::sync::Arc;
use tch::Tensor;

/// A layer without its weights, which come with each call: a function that
/// can run again.
#[derive(Clone)]
pub(super) struct Layer {
    pub(super) index: usize,
    pub(super) heads: LayerHeads,
    pub(super) head_dim: usize,
    pub(super) epsilon: f64,
    pub(super) attention_bias: bool,
    pub(super) mlp_bias: bool,
    pub(super) mlp_tiles: usize,
    pub(super) score: Score,
    pub(super) training: bool,
    pub(super) function: Arc<dyn AttentionFunction>,
    pub(super) documents: Option<OwnedDocuments>,
    pub(super) masked: bool,
}

/// [`Documents`] that outlive the call.
#[derive(Clone)]
pub(super) enum OwnedDocuments {
    FromPositions,
    Ends(Arc<Vec<Vec<usize>>>),
}

impl OwnedDocuments {
    pub(super) fn of(documents: Documents<'_>) -> Self {
        match documents {
            Documents::FromPositions => Self::FromPositions,
            Documents::Ends(ends) => Self::Ends(Arc::new(ends.to_vec())),
        }
    }

    fn lend(&self) -> Documents<'_> {
        match self {
            Self::FromPositions => Documents::FromPositions,
            Self::Ends(ends) => Documents::Ends(ends),
        }
    }
}

/// A projection: `x weight^T + bias`.
struct Linear<'a> {
    weight: &'a Tensor,
    bias: Option<&'a Tensor>,
}

impl Linear<'_> {
    fn of(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_linear(self.weight, self.bias)?)
    }
}

/// The weights of a layer.
pub(super) struct LayerWeights<'a> {
    input_norm: &'a Tensor,
    query: Linear<'a>,
    key: Linear<'a>,
    value: Linear<'a>,
    output: Linear<'a>,
    mlp_norm: &'a Tensor,
    gate: Linear<'a>,
    up: Linear<'a>,
    down: Linear<'a>,
}

impl<'a> LayerWeights<'a> {
    /// From a list in the order of
    /// [`layer_parameters`](super::config::LlamaConfig::layer_parameters).
    pub(super) fn of(list: &'a [Tensor], attention_bias: bool, mlp_bias: bool) -> Result<Self> {
        let mut list = list.iter();
        let mut next = || match list.next() {
            Some(tensor) => Ok(tensor),
            None => refuse("weights", "end within a layer", "give those of the config"),
        };
        let linear = |next: &mut dyn FnMut() -> Result<&'a Tensor>, bias: bool| {
            Ok::<_, crate::Error>(Linear {
                weight: next()?,
                bias: bias.then(next).transpose()?,
            })
        };
        Ok(Self {
            input_norm: next()?,
            query: linear(&mut next, attention_bias)?,
            key: linear(&mut next, attention_bias)?,
            value: linear(&mut next, attention_bias)?,
            output: linear(&mut next, attention_bias)?,
            mlp_norm: next()?,
            gate: linear(&mut next, mlp_bias)?,
            up: linear(&mut next, mlp_bias)?,
            down: linear(&mut next, mlp_bias)?,
        })
    }
}

impl Layer {
    /// [B, s, h] from a list: hidden states [B, s, h], angles [B, s, 1, D/2],
    /// position ids [B, s], the attention mask [B, s] where there is one, and
    /// the weights.
    pub(super) fn run(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let [hidden, angles, position_ids, rest @ ..] = inputs else {
            return refuse(
                "inputs",
                "are too few",
                "give hidden states and what follows",
            );
        };
        let (attention_mask, weights) = match rest {
            [mask, weights @ ..] if self.masked => (Some(mask), weights),
            weights => (None, weights),
        };
        let weights = LayerWeights::of(weights, self.attention_bias, self.mlp_bias)?;
        let call = AttentionCall {
            layer: self.index,
            training: self.training,
            score: self.score,
            position_ids,
            documents: self.documents.as_ref().map(OwnedDocuments::lend),
            attention_mask,
        };
        let normal = rms_norm(hidden, weights.input_norm, self.epsilon)?;
        let hidden = hidden.f_add(&self.attention(&normal, angles, &weights, &call)?)?;
        let normal = rms_norm(&hidden, weights.mlp_norm, self.epsilon)?;
        Ok(hidden.f_add(&self.mlp(&normal, &weights)?)?)
    }

    fn attention(
        &self,
        x: &Tensor,
        angles: &Tensor,
        weights: &LayerWeights<'_>,
        call: &AttentionCall<'_>,
    ) -> Result<Tensor> {
        let size = x.size();
        let &[batch, tokens, _] = &size[..] else {
            let problem = format!("has shape {size:?}");
            return refuse("hidden", problem, "give [batch, tokens, channels]");
        };
        // With sizes for all four: of a shard without a token none follows.
        let by_heads = |linear: &Linear<'_>, heads: usize| {
            let shape = [batch, tokens, heads as i64, self.head_dim as i64];
            Ok::<_, crate::Error>(linear.of(x)?.f_view(shape)?)
        };
        let query = turn(&by_heads(&weights.query, self.heads.query)?, angles)?;
        let key = turn(&by_heads(&weights.key, self.heads.kv)?, angles)?;
        let value = by_heads(&weights.value, self.heads.kv)?;
        let output = self.function.attend(&query, &key, &value, call)?;
        let channels = (self.heads.query * self.head_dim) as i64;
        weights
            .output
            .of(&output.f_reshape([batch, tokens, channels])?)
    }

    /// SwiGLU: `down(silu(gate(x)) * up(x))`. Shazeer, "GLU Variants Improve
    /// Transformer", arXiv:2002.05202.
    fn mlp(&self, x: &Tensor, weights: &LayerWeights<'_>) -> Result<Tensor> {
        let LayerWeights { gate, up, down, .. } = weights;
        if self.mlp_tiles > 1 {
            let weights = SwiGlu {
                gate: gate.weight,
                up: up.weight,
                down: down.weight,
            };
            return tiled_mlp(x, &weights, self.mlp_tiles);
        }
        down.of(&gate.of(x)?.f_silu()?.f_mul(&up.of(x)?)?)
    }
}

/// `x` [B, s, h] divided by the root of the mean of its squares, times
/// `weight` [h]: as one head of h channels.
pub(super) fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<Tensor> {
    let normal = normalize_heads(&x.f_unsqueeze(2)?, &weight.f_unsqueeze(0)?, epsilon)?;
    Ok(normal.f_squeeze_dim(2)?)
}
