//! The attention functions of a model, by name, as `ALL_ATTENTION_FUNCTIONS`
//! of Hugging Face transformers; but every model has its own.
//!
//! A model chooses one by name. Who replaces what stands behind the names
//! changes every layer and no code of the model.

use crate::{
    attention::UlyssesAttention,
    call::{Call, Documents},
    communicator::Communicator,
    core_attention::{Kernel, Score},
    error::{Result, refuse},
    options::Options,
};
use std::{collections::BTreeMap, sync::Arc};
use tch::Tensor;

/// Attention as a layer of a model calls it.
pub trait AttentionFunction: Send + Sync {
    /// Attention of `query` [B, s, Hq, D] to `key` [B, s, Hkv, D] and `value`
    /// [B, s, Hkv, D], which are rotated already; gives [B, s, Hq, D].
    ///
    /// Runs again in backward where the layer is checkpointed.
    ///
    /// # Errors
    /// Whatever went wrong; the forward of the model returns it as it is.
    fn attend(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        call: &AttentionCall<'_>,
    ) -> Result<Tensor>;
}

/// What a layer says beside query, key and value.
#[derive(Debug, Clone, Copy)]
pub struct AttentionCall<'a> {
    /// Which layer calls, from 0.
    pub layer: usize,
    /// Whether the model is in training.
    pub training: bool,
    /// How scores are made and masked.
    pub score: Score,
    /// The global positions of these tokens, int64 [B, s].
    pub position_ids: &'a Tensor,
    /// Several documents in one sequence.
    pub documents: Option<Documents<'a>>,
    /// Which of these tokens are real, [B, s].
    pub attention_mask: Option<&'a Tensor>,
}

/// The crate's kernel of this name, `eager` or `sdpa`.
pub(super) fn kernel(name: &str) -> Option<Kernel> {
    KERNELS
        .into_iter()
        .find_map(|(of, kernel)| (of == name).then_some(kernel))
}

pub(super) const KERNELS: [(&str, Kernel); 2] = [("eager", Kernel::Eager), ("sdpa", Kernel::Sdpa)];

/// Attention functions by name.
#[derive(Clone)]
pub struct AttentionFunctions {
    entries: BTreeMap<String, Arc<dyn AttentionFunction>>,
}

impl AttentionFunctions {
    /// `eager` and `sdpa` among the ranks of `group`.
    pub(super) fn among(group: &Arc<dyn Communicator>) -> Self {
        let entry = |(name, kernel): (&str, Kernel)| {
            let options = Options {
                kernel,
                ..Options::default()
            };
            let function: Arc<dyn AttentionFunction> =
                Arc::new(UlyssesFunction::new(Arc::clone(group), options));
            (name.to_owned(), function)
        };
        Self {
            entries: KERNELS.into_iter().map(entry).collect(),
        }
    }

    /// The function called `name`.
    ///
    /// # Errors
    /// Refused when there is none.
    pub fn get(&self, name: &str) -> Result<&Arc<dyn AttentionFunction>> {
        match self.entries.get(name) {
            Some(function) => Ok(function),
            None => refuse(
                "attention",
                format!("is `{name}`, which names no attention function"),
                format!(
                    "give one of {}",
                    self.names().collect::<Vec<_>>().join(", ")
                ),
            ),
        }
    }

    /// Puts `function` behind `name`, instead of what stood there.
    pub fn insert(&mut self, name: &str, function: Arc<dyn AttentionFunction>) {
        self.entries.insert(name.to_owned(), function);
    }

    /// Puts `function` behind every name.
    pub fn override_all(&mut self, function: &Arc<dyn AttentionFunction>) {
        for entry in self.entries.values_mut() {
            *entry = Arc::clone(function);
        }
    }

    /// All names, in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }
}

/// Ulysses attention among the ranks of a group, as an attention function.
pub struct UlyssesFunction {
    group: Arc<dyn Communicator>,
    options: Options,
}

impl UlyssesFunction {
    /// Attention among the ranks of `group`; the score is that of each call
    /// and not that of `options`.
    pub fn new(group: Arc<dyn Communicator>, options: Options) -> Self {
        Self { group, options }
    }
}

impl AttentionFunction for UlyssesFunction {
    fn attend(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        call: &AttentionCall<'_>,
    ) -> Result<Tensor> {
        let options = Options {
            score: call.score,
            ..self.options
        };
        // Of this call alone: one that is recomputed in backward does as it
        // did, even if the model has left training since.
        let attention = UlyssesAttention::new(Arc::clone(&self.group), options);
        attention.set_training(call.training);
        let call = Call {
            position_ids: Some(call.position_ids),
            documents: call.documents,
            attention_mask: call.attention_mask,
            layer: call.layer,
            ..Call::default()
        };
        attention.forward_with(query, key, value, &call)
    }
}
