//! Ulysses attention of one rank, put together from the reference's public
//! parts, in stages of which a fault replaces one.

use std::cell::RefCell;
use std::sync::Arc;

use fixtures::exchange::{AttentionInfo, CaseInfo, Declared, Tensors};
use tch::{TchError, Tensor};
use ulysses::{
    Communicator, CommunicatorError, Error, Exchange, HeadPartition, Options, Sharding,
    ThreadCommunicator, TokenPartition,
};

use super::checks;
use super::local::Local;
use crate::implementation::{Means, Question};
use crate::tensor::{kind, to_array};

/// Why a rank has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Halt {
    /// In words, which all say who refuses.
    #[error("{0}")]
    Said(String),
    /// The reference's parts say so.
    #[error(transparent)]
    Reference(#[from] Error),
}

impl From<TchError> for Halt {
    fn from(error: TchError) -> Halt {
        Halt::Reference(error.into())
    }
}

impl From<CommunicatorError> for Halt {
    fn from(error: CommunicatorError) -> Halt {
        Halt::Reference(error.into())
    }
}

/// What a stage gives.
pub(super) type Staged<T> = Result<T, Halt>;

/// What one call leaves behind for the next. Right attention leaves nothing.
#[derive(Default)]
pub(super) struct Memory {
    /// What a stage counted or measured in the first call.
    pub(super) first: Option<usize>,
    /// The answer of the call before.
    pub(super) last: Option<Tensors>,
}

/// The rank, and what it is asked.
pub(super) struct At<'a> {
    pub(super) told: &'a CaseInfo,
    pub(super) info: &'a AttentionInfo,
    pub(super) communicator: &'a Arc<dyn Communicator>,
    pub(super) memory: &'a RefCell<Memory>,
}

impl At<'_> {
    pub(super) fn rank(&self) -> usize {
        self.told.rank
    }

    pub(super) fn world(&self) -> usize {
        self.told.world
    }

    /// The world size, as a factor.
    pub(super) fn factor(&self) -> f64 {
        self.told.world as f64
    }

    pub(super) fn is_last(&self) -> bool {
        self.told.rank + 1 == self.told.world
    }

    /// Which tokens each rank holds.
    pub(super) fn tokens(&self) -> Staged<TokenPartition> {
        let sharding = match self.info.sharding.as_str() {
            "zigzag" => Sharding::Zigzag,
            "striped" => Sharding::Striped,
            _ => Sharding::Contiguous,
        };
        Ok(TokenPartition::new(sharding, &self.info.shard_lengths)?)
    }

    /// Which heads each rank holds, between the exchanges.
    pub(super) fn heads(&self) -> Staged<HeadPartition> {
        let info = self.info;
        Ok(HeadPartition::new(
            info.query_heads,
            info.kv_heads,
            self.world(),
        )?)
    }
}

/// What a rank brings to attention: inputs, each with the graph to its leaf,
/// and what was said beside them.
pub(super) struct Asked {
    pub(super) options: Options,
    /// Every rank has the whole sequence and computes all of it.
    pub(super) is_alone: bool,
    /// [B, s, H, D].
    pub(super) query: Tensor,
    pub(super) key: Tensor,
    pub(super) value: Tensor,
    /// [B, s], or [3, B, s].
    pub(super) positions: Tensor,
    pub(super) documents: Option<Documents>,
    pub(super) attention_mask: Option<Tensor>,
    pub(super) layout: Option<ulysses::BlockLayout>,
    pub(super) slopes: Option<Tensor>,
    pub(super) sinks: Option<Tensor>,
    /// Of queries and keys.
    pub(super) norms: Option<[Tensor; 2]>,
    pub(super) epsilon: f64,
    pub(super) dropout: Option<ulysses::CallDropout>,
}

/// What tells packed documents apart.
#[derive(Clone)]
pub(super) enum Documents {
    FromPositions,
    Ends(Vec<Vec<usize>>),
}

impl Asked {
    fn of(at: &At<'_>, question: &Question) -> Staged<Asked> {
        let leaves: Vec<&Tensor> = question.leaves.iter().map(|(_, leaf)| leaf).collect();
        let call = question.brought.call(&leaves, 0);
        let positions = call.position_ids.map(Tensor::shallow_clone);
        let kept = |tensor: Option<&Tensor>| tensor.map(Tensor::shallow_clone);
        Ok(Asked {
            options: question.options,
            is_alone: !at.info.training,
            query: leaves[0].shallow_clone(),
            key: leaves[1].shallow_clone(),
            value: leaves[2].shallow_clone(),
            positions: positions.ok_or_else(|| Halt::Said("there are no positions".to_owned()))?,
            documents: call.documents.map(|documents| match documents {
                ulysses::Documents::FromPositions => Documents::FromPositions,
                ulysses::Documents::Ends(ends) => Documents::Ends(ends.to_vec()),
            }),
            attention_mask: kept(call.attention_mask),
            layout: call.layout.cloned(),
            slopes: kept(call.slopes),
            sinks: kept(call.sinks),
            norms: call
                .head_norm
                .map(|norm| [norm.query, norm.key].map(Tensor::shallow_clone)),
            epsilon: call.head_norm.map_or(0.0, |norm| norm.epsilon),
            dropout: call.dropout,
        })
    }

    /// Changes query, key and value alike.
    pub(super) fn each(&mut self, change: impl Fn(&Tensor) -> Staged<Tensor>) -> Staged<()> {
        for tensor in [&mut self.query, &mut self.key, &mut self.value] {
            *tensor = change(tensor)?;
        }
        Ok(())
    }

    /// Changes what belongs to heads and has a gradient.
    pub(super) fn each_of_heads(
        &mut self,
        change: impl Fn(&Tensor) -> Staged<Tensor>,
    ) -> Staged<()> {
        let of_heads = [&mut self.slopes, &mut self.sinks].into_iter().flatten();
        for tensor in of_heads.chain(self.norms.iter_mut().flatten()) {
            *tensor = change(tensor)?;
        }
        Ok(())
    }
}

/// What is done between question and answer. Each stage gives on what it was
/// given, unless a fault replaces it.
#[derive(Clone, Copy)]
pub(super) struct Stages {
    /// By which conventions of gradient scale it wants to be judged.
    pub(super) declared: Declared,
    /// Before anything is checked.
    pub(super) asked: fn(&At<'_>, &mut Asked) -> Staged<()>,
    /// Behind the first exchange: query, key and value [B, h, S, D].
    pub(super) received: fn(&At<'_>, [Tensor; 3]) -> Staged<[Tensor; 3]>,
    /// Before queries and keys are normalised and rotated.
    pub(super) local: fn(&At<'_>, &Asked, &mut Local) -> Staged<()>,
    /// The core attention.
    pub(super) core: fn(&At<'_>, &Local) -> Staged<Tensor>,
    /// Before the second exchange: the output [B, h, S, D].
    pub(super) attended: fn(&At<'_>, Tensor) -> Staged<Tensor>,
    /// Behind it: [B, s, H, D].
    pub(super) returned: fn(&At<'_>, Tensor) -> Staged<Tensor>,
    /// Behind backward.
    pub(super) answered: fn(&At<'_>, &mut Tensors) -> Staged<()>,
}

impl Default for Stages {
    fn default() -> Stages {
        Stages {
            declared: Declared::default(),
            asked: |_, _| Ok(()),
            received: |_, tensors| Ok(tensors),
            local: |_, _, _| Ok(()),
            core: |_, local| local.attend(),
            attended: |_, output| Ok(output),
            returned: |_, output| Ok(output),
            answered: |_, _| Ok(()),
        }
    }
}

impl Stages {
    /// The tensors of the answer of one rank.
    pub(super) fn answer(&self, at: &At<'_>, inputs: &Tensors) -> Staged<Tensors> {
        let question =
            Question::read(at.told, at.info, inputs, Means::default()).map_err(Halt::Said)?;
        let out = self.forward(at, Asked::of(at, &question)?)?;
        // Backward of the sum of products gives `out` the cotangent dO, exactly.
        out.f_mul(&question.dout)?.f_sum(None)?.f_backward()?;
        let dtype = at.info.dtype;
        let mut answer = Tensors::from([("out".to_owned(), to_array(&out.f_detach()?, dtype)?)]);
        for (name, leaf) in &question.leaves {
            let gradient = leaf.f_grad()?;
            let gradient = match gradient.defined() {
                true => gradient,
                // What has no influence.
                false => Tensor::f_zeros(leaf.size(), (kind(dtype), leaf.device()))?,
            };
            answer.insert(format!("d{name}"), to_array(&gradient, dtype)?);
        }
        (self.answered)(at, &mut answer)?;
        Ok(answer)
    }

    fn forward(&self, at: &At<'_>, mut asked: Asked) -> Staged<Tensor> {
        (self.asked)(at, &mut asked)?;
        checks::alone(&asked)?;
        let communicator = match asked.is_alone {
            true => world_of_one()?,
            false => Arc::clone(at.communicator),
        };
        let tokens = checks::token_partition(&*communicator, &asked)?;
        let sizes = |tensor: &Tensor| tensor.size()[2] as usize;
        let (query_heads, kv_heads) = (sizes(&asked.query), sizes(&asked.key));
        let heads = HeadPartition::new(query_heads, kv_heads, communicator.size())?;
        checks::together(&asked, &tokens)?;
        let exchange = Exchange::new(Arc::clone(&communicator), tokens.clone(), heads)?;

        let (query, key, value) =
            exchange.sequence_to_heads(&asked.query, &asked.key, &asked.value)?;
        let received = (self.received)(at, [query, key, value])?;
        let mut local = Local::of(&asked, received, &*communicator, &tokens, heads)?;
        (self.local)(at, &asked, &mut local)?;
        local.prepare()?;
        let output = (self.core)(at, &local)?;
        let output = exchange.heads_to_sequence(&(self.attended)(at, output)?)?;
        (self.returned)(at, output)
    }
}

fn world_of_one() -> Staged<Arc<dyn Communicator>> {
    let alone = ThreadCommunicator::world(1).pop();
    let alone = alone.ok_or_else(|| Halt::Said("a world of one has no rank".to_owned()))?;
    Ok(Arc::new(alone))
}

/// The order of tokens in which those of rank `order(r)` stand where those of
/// rank r do, for ranks with equally many.
pub(super) fn tokens_of_ranks(
    tokens: &TokenPartition,
    order: fn(usize, usize) -> usize,
) -> Vec<i64> {
    let ranks = tokens.ranks();
    let mut places = vec![0; tokens.total()];
    for rank in 0..ranks {
        let from = tokens.places(order(rank, ranks));
        for (place, token) in tokens.places(rank).zip(from) {
            places[place] = token as i64;
        }
    }
    places
}
