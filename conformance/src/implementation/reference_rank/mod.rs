//! One rank of the bundled reference: how it answers a case, the same on
//! threads and behind the exchange.

mod question;
mod strides;

use std::sync::Arc;
use std::time::Instant;

use fixtures::Feature;
use fixtures::exchange::{AnswerInfo, AnswerStatus, CaseInfo, Declared, Precision, Tensors};
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
        let (status, message, tensors) = match self.attend(case, inputs) {
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

    fn attend(&mut self, case: &CaseInfo, inputs: &Tensors) -> Result<Tensors, String> {
        let question = Question::read(case, inputs, self.kernel)?;
        let out = self.forward(case, &question)?;
        // Backward of the sum of products gives `out` the cotangent dO, exactly.
        let said = |error: TchError| error.to_string();
        out.f_mul(&question.dout)
            .and_then(|products| products.f_sum(kind(case.dtype)))
            .and_then(|sum| sum.f_backward())
            .map_err(said)?;
        let array = |tensor: &Tensor| to_array(tensor, case.dtype).map_err(said);
        let mut answer =
            Tensors::from([("out".to_owned(), array(&out.f_detach().map_err(said)?)?)]);
        for (name, leaf) in &question.leaves {
            let gradient = leaf.f_grad().map_err(said)?;
            if !gradient.defined() {
                return Err(format!("no gradient reaches `{name}`"));
            }
            answer.insert(format!("d{name}"), array(&gradient)?);
        }
        Ok(answer)
    }

    fn forward(&mut self, case: &CaseInfo, question: &Question) -> Result<Tensor, String> {
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
