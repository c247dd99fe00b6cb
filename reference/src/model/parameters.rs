//! The parameters of a decoder: their names, as Hugging Face gives them, and
//! their shapes.
//!
//! Said once. Files are checked against it, and a layer takes its weights from
//! a list in the same order.

use super::config::LlamaConfig;

pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(super) const NORM: &str = "model.norm.weight";
pub(super) const HEAD: &str = "lm_head.weight";

/// One parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParameterShape {
    /// As Hugging Face calls it: `model.layers.0.mlp.up_proj.weight`.
    pub name: String,
    /// Its size; a projection is [channels out, channels in].
    pub shape: Vec<i64>,
}

impl LlamaConfig {
    /// All parameters of the model, each once, from the embedding to the head.
    /// A tied head is the embedding and does not appear.
    pub fn parameters(&self) -> Vec<ParameterShape> {
        let (vocabulary, hidden) = (self.vocab_size as i64, self.hidden_size as i64);
        let one = |name: &str, shape: &[i64]| ParameterShape {
            name: name.to_owned(),
            shape: shape.to_vec(),
        };
        let mut all = vec![one(EMBEDDING, &[vocabulary, hidden])];
        all.extend((0..self.layers()).flat_map(|layer| self.layer_parameters(layer)));
        all.push(one(NORM, &[hidden]));
        if !self.tie_word_embeddings {
            all.push(one(HEAD, &[vocabulary, hidden]));
        }
        all
    }

    /// Those of one layer, in the order in which
    /// [`LayerWeights::of`](super::layer::LayerWeights::of) takes them.
    pub(super) fn layer_parameters(&self, layer: usize) -> Vec<ParameterShape> {
        let Some(heads) = self.heads.get(layer) else {
            return Vec::new();
        };
        let (hidden, inner) = (self.hidden_size as i64, self.intermediate_size as i64);
        let channels = |heads: usize| (heads * self.head_dim) as i64;
        let (query, kv) = (channels(heads.query), channels(heads.kv));
        let norm = |name: &'static str| vec![(name, "weight", vec![hidden])];
        let linear = |name: &'static str, to: i64, from: i64, bias: bool| {
            let mut both = vec![(name, "weight", vec![to, from])];
            both.extend(bias.then(|| (name, "bias", vec![to])));
            both
        };
        let (attention_bias, mlp_bias) = (self.attention_bias, self.mlp_bias);
        [
            norm("input_layernorm"),
            linear("self_attn.q_proj", query, hidden, attention_bias),
            linear("self_attn.k_proj", kv, hidden, attention_bias),
            linear("self_attn.v_proj", kv, hidden, attention_bias),
            linear("self_attn.o_proj", hidden, query, attention_bias),
            norm("post_attention_layernorm"),
            linear("mlp.gate_proj", inner, hidden, mlp_bias),
            linear("mlp.up_proj", inner, hidden, mlp_bias),
            linear("mlp.down_proj", hidden, inner, mlp_bias),
        ]
        .into_iter()
        .flatten()
        .map(|(module, what, shape)| ParameterShape {
            name: format!("model.layers.{layer}.{module}.{what}"),
            shape,
        })
        .collect()
    }
}
