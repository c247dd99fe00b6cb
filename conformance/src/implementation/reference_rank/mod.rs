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
use tch::{Device, TchError, Tensor};
use ulysses::{
    Communicator, CountingCommunicator, Kernel, Options, UlyssesAttention, checkpoint,
    cross_attention,
};

use super::{Claims, Means, Offer};
use crate::tensor::{kind, to_array};
use question::Brought;
pub(crate) use question::Question;

/// What the reference claims that computes by these means: everything but ranks
/// without a query head, and what the kernel does not do on that device. The
/// eager kernel stores every intermediate tensor.
///
/// # Errors
///
/// If the kernel does nothing on that device: in torch's words.
pub fn claims(means: Means) -> Result<Claims, String> {
    let lacking = lacking(means)?;
    Ok(Claims {
        features: Feature::ALL
            .into_iter()
            .filter(|feature| !lacking.contains(feature))
            .map(|feature| feature.name().to_owned())
            .collect(),
        declared: Declared {
            precision: match means.kernel {
                Kernel::Eager => Precision::Stored,
                _ => Precision::Fused,
            },
            ..Declared::default()
        },
        means,
    })
}

/// What the reference does not do by these means.
fn lacking(means: Means) -> Result<Vec<Feature>, String> {
    let mut lacking = vec![Feature::FewerQueryHeadsThanRanks];
    let offers = Offer::of(means)?;
    let dtypes = [
        (Dtype::F64, Feature::DtypeF64),
        (Dtype::F32, Feature::DtypeF32),
        (Dtype::Bf16, Feature::DtypeBf16),
        (Dtype::F16, Feature::DtypeF16),
    ];
    for (dtype, feature) in dtypes {
        if !offers
            .iter()
            .any(|offer| offer.dtype == dtype && offer.is_taken())
        {
            lacking.push(feature);
        }
    }
    if !offers
        .iter()
        .any(|offer| offer.is_grouped && offer.is_taken())
    {
        lacking.push(Feature::GroupedKv);
    }
    Ok(lacking)
}

/// One rank of the reference.
///
/// It keeps its attentions from case to case, one for each choice of options,
/// as a model does: so that what one case leaves behind another would meet.
pub struct ReferenceRank {
    communicator: Arc<CountingCommunicator>,
    means: Means,
    attentions: Vec<(Options, Arc<UlyssesAttention>)>,
}

impl ReferenceRank {
    /// A rank that computes by these means.
    pub fn new(communicator: Arc<dyn Communicator>, means: Means) -> ReferenceRank {
        ReferenceRank {
            communicator: Arc::new(CountingCommunicator::new(communicator)),
            means,
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
                answer_of_profile(&communicator, self.means.device, case, inputs)
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
        let question = Question::read(told, case, inputs, self.means)?;
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
/// case: all but attention. Batches are prepared on the host, whatever the
/// device.
pub(crate) fn answer_of_profile(
    communicator: &Arc<dyn Communicator>,
    device: Device,
    case: &CaseInfo,
    inputs: &Tensors,
) -> Result<Tensors, String> {
    match &case.asked {
        AskedInfo::Attention(_) => Err("attention is asked of a rank that stays".to_owned()),
        AskedInfo::Loss(asked) => loss::answer(communicator, device, asked, inputs),
        AskedInfo::Tiled(asked) => tiled::answer(device, asked, inputs),
        AskedInfo::Batch(asked) => batch::answer(communicator, asked, inputs),
        AskedInfo::Mesh(asked) => mesh::answer(communicator, device, asked, inputs),
        AskedInfo::Model(asked) => model::answer(communicator, device, asked, inputs),
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
