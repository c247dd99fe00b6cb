//! From tokens to logits and their loss.

use super::{
    Llama, SequenceParallel,
    input::{self, ModelInput},
    layer::{Layer, OwnedDocuments, rms_norm},
};
use crate::{
    agreement,
    autograd::checkpoint,
    core_attention::{Mask, Score},
    error::{Error, Result, refuse},
    tiled::{Reduction, tiled_logits_loss},
};
use std::sync::Arc;
use tch::Tensor;

impl Llama {
    /// Logits [B, s, V] of this rank's tokens, in the dtype of the weights.
    ///
    /// All ranks of a registered model call this together, and all call
    /// backward or none. `s` may be another on each rank, and 0.
    ///
    /// # Errors
    /// A refusal of the input or of what attention refuses, the same on every
    /// rank; otherwise an error of libtorch here, of which the other ranks are
    /// told.
    pub fn forward(&self, input: &ModelInput<'_>) -> Result<Tensor> {
        let hidden = self.hidden_states(input)?;
        Ok(hidden.f_linear(self.head(), None::<&Tensor>)?)
    }

    /// The cross-entropy of the logits with `labels` [B, s], int64, over the
    /// tokens of all ranks: [`tiled_logits_loss`] of
    /// [`hidden_states`](Self::hidden_states), so that the logits are never
    /// whole. Labels were shifted before the sequence was cut.
    ///
    /// # Errors
    /// As for [`forward`](Self::forward) and [`tiled_logits_loss`].
    pub fn loss(
        &self,
        input: &ModelInput<'_>,
        labels: &Tensor,
        ignore_index: i64,
        reduction: Reduction,
        tiles: usize,
    ) -> Result<Tensor> {
        let hidden = self.hidden_states(input)?;
        let group = self.in_force().map_or(&self.alone, |found| &found.group);
        let head = self.head();
        tiled_logits_loss(group, &hidden, head, labels, ignore_index, reduction, tiles)
    }

    /// What the head makes logits of: the normalised output of the last layer,
    /// [B, s, h].
    ///
    /// # Errors
    /// As for [`forward`](Self::forward).
    pub fn hidden_states(&self, input: &ModelInput<'_>) -> Result<Tensor> {
        let parallel = self.in_force();
        let micro_batch_size = parallel.map(|parallel| parallel.micro_batch_size);
        let device = self.embedding.device();
        let own = input::check(input, &self.config, device, micro_batch_size);
        let group = &**parallel.map_or(&self.alone, |parallel| &parallel.group);
        let own = own.map(|()| Vec::new());
        agreement::gather(group, own, 0, &input::ARGUMENTS)?;
        self.decode(input).inspect_err(|error| {
            // Whatever else fails here is known to every rank already.
            if let Error::Libtorch(_) = error {
                group.abandon(&error.to_string());
            }
        })
    }

    /// The registration, unless evaluation goes without.
    fn in_force(&self) -> Option<&SequenceParallel> {
        self.sequence_parallel
            .as_ref()
            .filter(|parallel| self.training || !parallel.disable_in_eval)
    }

    fn decode(&self, input: &ModelInput<'_>) -> Result<Tensor> {
        let padding = self.config.pad_token_id.map_or(-1, |token| token as i64);
        let mut hidden =
            Tensor::f_embedding(&self.embedding, input.input_ids, padding, false, false)?;
        let angles = self
            .config
            .rope
            .angles(input.position_ids, self.config.head_dim)?;
        let function = self.attention_functions.get(&self.attention)?;
        for (index, (weights, &heads)) in self.layers.iter().zip(&self.config.heads).enumerate() {
            let layer = Layer {
                index,
                heads,
                head_dim: self.config.head_dim,
                epsilon: self.config.rms_norm_eps,
                attention_bias: self.config.attention_bias,
                mlp_bias: self.config.mlp_bias,
                mlp_tiles: self.mlp_tiles,
                score: Score {
                    mask: Mask::Causal,
                    window: self.config.sliding_window,
                    ..Score::default()
                },
                training: self.training,
                function: Arc::clone(function),
                documents: input.documents.map(OwnedDocuments::of),
                masked: input.attention_mask.is_some(),
            };
            let inputs: Vec<&Tensor> = [&hidden, &angles, input.position_ids]
                .into_iter()
                .chain(input.attention_mask)
                .chain(weights)
                .collect();
            hidden = self.run(layer, &inputs)?;
        }
        rms_norm(&hidden, &self.norm, self.config.rms_norm_eps)
    }

    fn run(&self, layer: Layer, inputs: &[&Tensor]) -> Result<Tensor> {
        if self.checkpointing {
            let again = move |inputs: &[Tensor]| Ok(vec![layer.run(inputs)?]);
            let outputs = checkpoint(again, inputs)?.into_iter().next();
            return outputs.map_or_else(
                || refuse("inputs", "gave no output", "run a layer that gives one"),
                Ok,
            );
        }
        let inputs: Vec<Tensor> = inputs.iter().map(|tensor| tensor.shallow_clone()).collect();
        layer.run(&inputs)
    }
}
