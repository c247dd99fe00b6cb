//! One rank of the bundled reference: how it answers a case, the same on
//! threads and behind the exchange.

mod batch;
mod loss;
mod mesh;
pub(crate) mod model;
mod question;
mod strides;
mod tiled;

use std::sync::Arc;
use std::time::Instant;

use fixtures::Dtype;
use fixtures::Feature;
use fixtures::exchange::{
    AnswerInfo, AnswerStatus, AskedInfo, AttentionInfo, CaseInfo, Declared, Precision, Tensors,
};
use tch::{TchError, Tensor};
use ulysses::{
    Communicator, CountingCommunicator, Kernel, Options, UlyssesAttention, checkpoint,
    cross_attention,
};

use super::Claims;
use crate::tensor::{kind, to_array};
use question::Brought;
pub(crate) use question::Question;

/// What the reference around this core attention claims: everything but ranks
/// without a query head. The eager kernel stores every intermediate tensor.
pub fn claims(kernel: Kernel) -> Claims {
    Claims {
        features: Feature::ALL
            .into_iter()
            .filter(|&feature| feature != Feature::FewerQueryHeadsThanRanks)
            .map(|feature| feature.name().to_owned())
            .collect(),
        declared: Declared {
            precision: match kernel {
                Kernel::Sdpa => Precision::Fused,
                Kernel::Eager => Precision::Stored,
            },
            ..Declared::default()
        },
    }
}

/// One rank of the reference.
///
/// It keeps its attentions from case to case, one for each choice of options,
/// as a model does: so that what one case leaves behind another would meet.
pub struct ReferenceRank {
    communicator: Arc<CountingCommunicator>,
    kernel: Kernel,
    attentions: Vec<(Options, Arc<UlyssesAttention>)>,
}

impl ReferenceRank {
    /// A rank around this core attention.
    pub fn new(communicator: Arc<dyn Communicator>, kernel: Kernel) -> ReferenceRank {
        ReferenceRank {
            communicator: Arc::new(CountingCommunicator::new(communicator)),
            kernel,
            attentions: Vec::new(),
        }
    }

    /// Answers `case`. Whatever goes wrong is in the answer's status and
    /// message.
    pub fn answer(&mut self, case: &CaseInfo, inputs: &Tensors) -> (AnswerInfo, Tensors) {
        self.communicator.reset();
        let start = Instant::now();
        let answered = match &case.asked {
            AskedInfo::Attention(asked) => self.attend(case, asked, inputs),
            _ => {
                let communicator = Arc::clone(&self.communicator) as Arc<dyn Communicator>;
                answer_of_profile(&communicator, case, inputs)
            }
        };
        let (status, message, tensors) = match answered {
            Ok(tensors) => (AnswerStatus::Ok, String::new(), tensors),
            Err(message) => (AnswerStatus::Error, message, Tensors::new()),
        };
        let info = AnswerInfo {
            status,
            message,
            elapsed_s: start.elapsed().as_secs_f64(),
            peak_memory_bytes: None,
            bytes_sent: Some(self.communicator.traffic().off_rank_bytes),
        };
        (info, tensors)
    }

    fn attend(
        &mut self,
        told: &CaseInfo,
        case: &AttentionInfo,
        inputs: &Tensors,
    ) -> Result<Tensors, String> {
        let question = Question::read(told, case, inputs, self.kernel)?;
        let out = self.forward(case, &question)?;
        // Backward of the sum of products gives `out` the cotangent dO, exactly.
        let said = |error: TchError| error.to_string();
        out.f_mul(&question.dout)
            .and_then(|products| products.f_sum(kind(case.dtype)))
            .and_then(|sum| sum.f_backward())
            .map_err(said)?;
        let out = out.f_detach().map_err(said)?;
        let mut answer = gradients(&question.leaves, case.dtype)?;
        answer.insert("out".to_owned(), to_array(&out, case.dtype).map_err(said)?);
        Ok(answer)
    }

    fn forward(&mut self, case: &AttentionInfo, question: &Question) -> Result<Tensor, String> {
        let Question {
            options, brought, ..
        } = question;
        let leaves: Vec<&Tensor> = question.leaves.iter().map(|(_, leaf)| leaf).collect();
        let out = if case.kv_sequence.is_some() {
            let call = brought.call(&leaves, 0);
            cross_attention(leaves[0], leaves[1], leaves[2], &call, options)
        } else {
            let attention = self.attention(options, case.training);
            if case.recompute {
                let brought = brought.shallow_clone();
                let run = move |leaves: &[Tensor]| {
                    let leaves: Vec<&Tensor> = leaves.iter().collect();
                    Ok(vec![through_layers(&attention, &brought, &leaves)?])
                };
                checkpoint(run, &leaves).map(|mut outputs| outputs.swap_remove(0))
            } else {
                through_layers(&attention, brought, &leaves)
            }
        };
        out.map_err(|error| error.to_string())
    }

    /// The attention with these options, in training or out of it.
    fn attention(&mut self, options: &Options, training: bool) -> Arc<UlyssesAttention> {
        let known = self.attentions.iter().position(|(of, _)| of == options);
        let place = known.unwrap_or_else(|| {
            let attention = UlyssesAttention::new(self.communicator.clone(), *options);
            self.attentions.push((*options, Arc::new(attention)));
            self.attentions.len() - 1
        });
        let attention = &self.attentions[place].1;
        attention.set_training(training);
        Arc::clone(attention)
    }
}

/// What the reference answers in the profiles that keep nothing from case to
/// case: all but attention.
pub(crate) fn answer_of_profile(
    communicator: &Arc<dyn Communicator>,
    case: &CaseInfo,
    inputs: &Tensors,
) -> Result<Tensors, String> {
    match &case.asked {
        AskedInfo::Attention(_) => Err("attention is asked of a rank that stays".to_owned()),
        AskedInfo::Loss(asked) => loss::answer(communicator, asked, inputs),
        AskedInfo::Tiled(asked) => tiled::answer(asked, inputs),
        AskedInfo::Batch(asked) => batch::answer(communicator, asked, inputs),
        AskedInfo::Mesh(asked) => mesh::answer(communicator, asked, inputs),
        AskedInfo::Model(asked) => model::answer(communicator, asked, inputs),
    }
}

/// The gradient of each leaf, by its name behind a `d`.
fn gradients(leaves: &[(&'static str, Tensor)], dtype: Dtype) -> Result<Tensors, String> {
    let gradient = |(name, leaf): &(&'static str, Tensor)| {
        let gradient = leaf.f_grad().map_err(|error| error.to_string())?;
        if !gradient.defined() {
            return Err(format!("no gradient reaches `{name}`"));
        }
        let array = to_array(&gradient, dtype).map_err(|error| error.to_string())?;
        Ok((format!("d{name}"), array))
    };
    leaves.iter().map(gradient).collect()
}

/// Layer after layer, each with the output of the last as its queries; one
/// where the case tells of none.
fn through_layers(
    attention: &UlyssesAttention,
    brought: &Brought,
    leaves: &[&Tensor],
) -> ulysses::Result<Tensor> {
    let mut query = leaves[0].shallow_clone();
    // Layer 0 is asked of none as well, to be refused.
    for layer in 0..brought.layers.max(1) {
        let call = brought.call(leaves, layer);
        query = attention.forward_with(&query, leaves[1], leaves[2], &call)?;
    }
    Ok(query)
}
