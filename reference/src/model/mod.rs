//! A decoder of the Llama family on a sequence of which each rank holds a
//! shard: from a Hugging Face model folder to logits.
//!
//! All but attention acts on each token alone, so that nothing else knows of
//! ranks. Attention is called by name in a registry of the model's own, and
//! [`register_with_model`](register::register_with_model) puts Ulysses
//! attention behind every name.
//!
//! | module | holds |
//! |---|---|
//! | `config`, `config_entries` | `config.json` |
//! | `parameters` | names and shapes of all parameters |
//! | `weights` | safetensors files |
//! | `rope` | from positions to angles |
//! | `layer` | one layer |
//! | `forward` | from tokens to logits and loss |
//! | `attention_functions` | attention by name |
//! | [`register`] | Ulysses attention for a model |
//! | `input` | what a model is asked about |
//!
//! In half types and in float32 the order of operations is that of Hugging
//! Face transformers. In float64 everything is float64, while transformers
//! computes norms and angles in float32 in any case.
//!
//! Not here: tokenizers, generation with a cache, and making weights.

mod attention_functions;
mod config;
mod config_entries;
mod forward;
mod input;
mod layer;
mod parameters;
pub mod register;
mod rope;
mod weights;

pub use attention_functions::{
    AttentionCall, AttentionFunction, AttentionFunctions, UlyssesFunction,
};
pub use config::{LayerHeads, LlamaConfig};
pub use input::ModelInput;
pub use parameters::ParameterShape;
pub use rope::{Llama3Scaling, Rope};
pub use weights::Weights;

use crate::{
    communicator::{Communicator, threads::ThreadCommunicator},
    error::{Error, Result, refuse},
};
use std::{fs, path::Path, sync::Arc};
use tch::{Device, Kind, Tensor};

/// A decoder with its weights.
///
/// Every rank has all weights. Those of all ranks are equal, and the gradients
/// that backward leaves in them are parts that add up over the ranks.
pub struct Llama {
    config: LlamaConfig,
    embedding: Tensor,
    layers: Vec<Vec<Tensor>>,
    norm: Tensor,
    /// None where it is the embedding.
    head: Option<Tensor>,
    attention_functions: AttentionFunctions,
    attention: String,
    /// A world of one rank.
    alone: Arc<dyn Communicator>,
    sequence_parallel: Option<SequenceParallel>,
    training: bool,
    checkpointing: bool,
    mlp_tiles: usize,
}

/// What a registration left.
struct SequenceParallel {
    group: Arc<dyn Communicator>,
    micro_batch_size: usize,
    disable_in_eval: bool,
}

impl Llama {
    /// The model in `folder`, as `save_pretrained` writes it, in training, on
    /// one device: `config.json`, and `model.safetensors` or an index of
    /// several files. The weights become leaves of `kind` on `device`.
    ///
    /// # Errors
    /// Refused when a file is missing or no such file, and as
    /// [`LlamaConfig::from_json`] and [`new`](Self::new) do.
    pub fn from_folder(folder: &Path, kind: Kind, device: Device) -> Result<Self> {
        let config = LlamaConfig::read(folder)?;
        Self::new(config, weights::read(folder)?, kind, device)
    }

    /// A model of these weights, which are copied.
    ///
    /// # Errors
    /// Refused when `kind` is none of float64, float32, bfloat16 and float16;
    /// when a weight is missing, of another shape than
    /// [`LlamaConfig::parameters`] says, or no parameter of this model.
    pub fn new(config: LlamaConfig, weights: Weights, kind: Kind, device: Device) -> Result<Self> {
        if !matches!(
            kind,
            Kind::Double | Kind::Float | Kind::BFloat16 | Kind::Half
        ) {
            let remedy = "give float64, float32, bfloat16 or float16";
            return refuse("kind", format!("is {kind:?}"), remedy);
        }
        let mut list = weights::in_order(&config.parameters(), weights, kind, device)?.into_iter();
        let layers = |list: &mut dyn Iterator<Item = Tensor>| {
            (0..config.layers())
                .map(|layer| {
                    let count = config.layer_parameters(layer).len();
                    list.take(count).collect()
                })
                .collect()
        };
        // In the order of `LlamaConfig::parameters`.
        let (Some(embedding), layers, Some(norm), head) =
            (list.next(), layers(&mut list), list.next(), list.next())
        else {
            return refuse("weights", "are too few", "give those of the config");
        };
        let alone = ThreadCommunicator::world(1).pop();
        let alone =
            alone.ok_or_else(|| Error::Libtorch("a world of one has no rank".to_owned()))?;
        let alone: Arc<dyn Communicator> = Arc::new(alone);
        Ok(Self {
            config,
            embedding,
            layers,
            norm,
            head,
            attention_functions: AttentionFunctions::among(&alone),
            attention: "sdpa".to_owned(),
            alone,
            sequence_parallel: None,
            training: true,
            checkpointing: false,
            mlp_tiles: 1,
        })
    }

    /// Writes `config.json` and `model.safetensors` to `folder`, which is made
    /// if it is not there, for [`from_folder`](Self::from_folder) and for
    /// `from_pretrained` of transformers.
    ///
    /// # Errors
    /// Refused when it cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let json = self.config.to_json(self.embedding.f_kind()?);
        let write = || {
            fs::create_dir_all(folder)?;
            fs::write(folder.join("config.json"), &json)
        };
        write().or_else(|error: std::io::Error| weights::unwritable(folder, error))?;
        weights::write(folder, &self.parameters())
    }

    /// What the model is made of.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// Every parameter once, under its Hugging Face name, from the embedding
    /// to the head. Leaves: backward adds to their gradients, those of a tied
    /// head and its embedding to one.
    pub fn parameters(&self) -> Vec<(String, &Tensor)> {
        let tensors = [&self.embedding]
            .into_iter()
            .chain(self.layers.iter().flatten())
            .chain([&self.norm])
            .chain(&self.head);
        let names = self.config.parameters().into_iter();
        names.map(|parameter| parameter.name).zip(tensors).collect()
    }

    /// What makes logits of hidden states, [V, h].
    pub fn head(&self) -> &Tensor {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// The attention functions of this model.
    pub fn attention_functions(&self) -> &AttentionFunctions {
        &self.attention_functions
    }

    /// The attention functions of this model, to be changed on all ranks alike.
    pub fn attention_functions_mut(&mut self) -> &mut AttentionFunctions {
        &mut self.attention_functions
    }

    /// The name of the attention function that layers call, at first `sdpa`.
    pub fn attention(&self) -> &str {
        &self.attention
    }

    /// Makes layers call the attention function of this name.
    ///
    /// # Errors
    /// Refused when there is none.
    pub fn set_attention(&mut self, name: &str) -> Result<()> {
        self.attention_functions.get(name)?;
        self.attention = name.to_owned();
        Ok(())
    }

    /// Goes into training or out of it, on all ranks alike. A model that is
    /// registered with `disable_in_eval` takes the whole sequence on each rank
    /// outside, and communicates nothing.
    pub fn set_training(&mut self, training: bool) {
        self.training = training;
    }

    /// Whether a layer keeps only its input and runs again in backward, on all
    /// ranks alike. The numbers stay the same, to the bit.
    pub fn set_checkpointing(&mut self, checkpointing: bool) {
        self.checkpointing = checkpointing;
    }

    /// Into how many tiles of its tokens each MLP is cut, which backward then
    /// computes again; 1 is none, and computes once. Ranks may choose
    /// different numbers.
    ///
    /// # Errors
    /// Refused when it is 0, and above 1 where the MLPs have biases.
    pub fn set_mlp_tiles(&mut self, tiles: usize) -> Result<()> {
        if tiles == 0 {
            return refuse("tiles", "is 0", "give at least 1");
        }
        if tiles > 1 && self.config.mlp_bias {
            let problem = format!("is {tiles}, but the MLPs have biases");
            return refuse("tiles", problem, "give 1");
        }
        self.mlp_tiles = tiles;
        Ok(())
    }
}
