//! A decoder of one rank, put together from the reference's public parts, and
//! attention functions that do something else than they should.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use fixtures::exchange::{AskedInfo, Tensors};
use fixtures::model::ModelInfo;
use tch::{Device, Tensor};
use ulysses::{
    AttentionCall, AttentionFunction, Communicator, Error, Exchange, HeadPartition, Llama, Mesh,
    ModelInput, Options, Reduction, Rotary, Sharding, ThreadCommunicator, TokenPartition,
    UlyssesFunction, cross_entropy, rotate,
};

use super::Told;
use super::rank::{Halt, Staged};
use crate::implementation::model;

/// A rank's model and tokens, to be answered with.
pub(super) struct Run<'a> {
    pub(super) info: &'a ModelInfo,
    pub(super) model: Llama,
    pub(super) mesh: Mesh,
    pub(super) ids: Tensor,
    pub(super) positions: Tensor,
    pub(super) labels: Tensor,
    pub(super) cotangent: Tensor,
    pub(super) are_documents_lost: bool,
}

impl<'a> Run<'a> {
    pub(super) fn of(told: &'a Told<'_>) -> Staged<Run<'a>> {
        let AskedInfo::Model(info) = &told.info.asked else {
            return Err(Halt::Said("this is another profile".to_owned()));
        };
        let model = model::registered(told.communicator, Device::Cpu, info, told.inputs);
        let (model, mesh) = model.map_err(Halt::Said)?;
        let tokens = model::tokens(Device::Cpu, told.inputs).map_err(Halt::Said)?;
        let [ids, positions, labels, cotangent] = tokens;
        Ok(Run {
            info,
            model,
            mesh,
            ids,
            positions,
            labels,
            cotangent,
            are_documents_lost: false,
        })
    }

    pub(super) fn attention_among(
        &self,
        group: &Arc<dyn Communicator>,
    ) -> Arc<dyn AttentionFunction> {
        let options = Options {
            uneven_heads: true,
            ..Options::default()
        };
        Arc::new(UlyssesFunction::new(Arc::clone(group), options))
    }

    pub(super) fn set_attention(&mut self, function: Arc<dyn AttentionFunction>) {
        let functions = self.model.attention_functions_mut();
        functions.override_all(&function);
    }

    pub(super) fn answer(&self) -> Staged<Tensors> {
        self.answer_among(&|mesh| Arc::clone(mesh.world()))
    }

    /// The loss is that of the tokens of these ranks.
    pub(super) fn answer_among(
        &self,
        ranks: &dyn Fn(&Mesh) -> Arc<dyn Communicator>,
    ) -> Staged<Tensors> {
        let input = ModelInput {
            input_ids: &self.ids,
            position_ids: &self.positions,
            documents: model::documents(self.info).filter(|_| !self.are_documents_lost),
            attention_mask: None,
        };
        let logits = self.model.forward(&input)?;
        let index = self.info.ignore_index;
        let ranks = ranks(&self.mesh);
        let loss = cross_entropy(&ranks, &logits, &self.labels, index, Reduction::Mean)?;
        model::answered(&self.model, self.info, &logits, &loss, &self.cotangent).map_err(Halt::Said)
    }
}

pub(super) fn alone_communicator() -> Staged<Arc<dyn Communicator>> {
    let alone = ThreadCommunicator::world(1).into_iter().next();
    let alone = alone.ok_or_else(|| Halt::Said("there is no rank".to_owned()))?;
    Ok(Arc::new(alone))
}

/// 0, 1, 2, .. on every rank.
pub(super) fn local_positions(ids: &Tensor) -> Result<Tensor, Error> {
    let size = ids.size();
    let tokens = size.last().copied().unwrap_or(0);
    let positions = Tensor::f_arange(tokens, (ids.kind(), ids.device()))?;
    Ok(positions.f_expand(&size, false)?.f_contiguous()?)
}

/// One function in the last layer, another in the others.
pub(super) struct OtherInLayer {
    pub(super) last: usize,
    pub(super) right: Arc<dyn AttentionFunction>,
    pub(super) local: Arc<dyn AttentionFunction>,
}

impl AttentionFunction for OtherInLayer {
    fn attend(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        call: &AttentionCall<'_>,
    ) -> Result<Tensor, Error> {
        match call.layer == self.last {
            true => self.local.attend(query, key, value, call),
            false => self.right.attend(query, key, value, call),
        }
    }
}

/// KV heads repeated as 0 1 0 1.
pub(super) struct TiledHeads(pub(super) Arc<dyn AttentionFunction>);

impl AttentionFunction for TiledHeads {
    fn attend(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        call: &AttentionCall<'_>,
    ) -> Result<Tensor, Error> {
        let heads = |x: &Tensor| x.size().get(2).copied().unwrap_or(1);
        let times = heads(query) / heads(key).max(1);
        let tiled = |x: &Tensor| x.f_repeat([1, 1, times, 1]);
        self.0.attend(query, &tiled(key)?, &tiled(value)?, call)
    }
}

/// In backward, queries and keys at other positions.
pub(super) struct OtherAgain {
    pub(super) right: Arc<dyn AttentionFunction>,
    pub(super) theta: f64,
    pub(super) layers: usize,
    pub(super) calls: AtomicUsize,
}

impl AttentionFunction for OtherAgain {
    fn attend(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        call: &AttentionCall<'_>,
    ) -> Result<Tensor, Error> {
        if self.calls.fetch_add(1, Ordering::Relaxed) < self.layers {
            return self.right.attend(query, key, value, call);
        }
        let rotary = Rotary {
            base: self.theta,
            sections: None,
        };
        let offsets = local_positions(call.position_ids)?.f_sub(call.position_ids)?;
        let query = rotate(query, &offsets, &rotary)?;
        let key = rotate(key, &offsets, &rotary)?;
        self.right.attend(&query, &key, value, call)
    }
}

/// Dense attention over all tokens under a mask of tokens' numbers on their ranks.
pub(super) struct CausalByRank {
    pub(super) lengths: Vec<usize>,
    pub(super) group: Arc<dyn Communicator>,
}

impl AttentionFunction for CausalByRank {
    fn attend(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        _: &AttentionCall<'_>,
    ) -> Result<Tensor, Error> {
        let heads = |x: &Tensor| x.size().get(2).copied().unwrap_or(1);
        let group = heads(query) / heads(key).max(1);
        let repeated = |x: &Tensor| x.f_repeat_interleave_self_int(group, 2, None);
        let all = heads(query) as usize;
        let tokens = TokenPartition::new(Sharding::Contiguous, &self.lengths)?;
        let partition = HeadPartition::new(all, all, self.lengths.len())?;
        let exchange = Exchange::new(Arc::clone(&self.group), tokens, partition)?;
        let (query, key, value) =
            exchange.sequence_to_heads(query, &repeated(key)?, &repeated(value)?)?;
        let numbers: Vec<i64> = self.lengths.iter().flat_map(|&n| 0..n as i64).collect();
        let numbers = Tensor::f_from_slice(&numbers)?;
        let hidden = numbers.f_unsqueeze(1)?.f_lt_tensor(&numbers)?;
        let scale = 1.0 / (query.size().last().copied().unwrap_or(1) as f64).sqrt();
        let scores = query
            .f_matmul(&key.f_transpose(2, 3)?)?
            .f_mul_scalar(scale)?
            .f_masked_fill(&hidden, f64::NEG_INFINITY)?;
        let output = scores.f_softmax(-1, None)?.f_matmul(&value)?;
        exchange.heads_to_sequence(&output)
    }
}
