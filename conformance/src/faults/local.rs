//! Attention of one rank's heads, the whole sequence at hand.

use tch::Tensor;
use ulysses::{
    BlockLayout, Communicator, Dropout, HeadMap, HeadPartition, Kernel, Rotary, Score, Structure,
    TokenPartition, core_attention, normalize_heads, rotate,
};

use super::plain;
use super::rank::{Asked, Documents, Staged};
use super::sequence::{self, Runs};

/// Everything that the attention of one rank's heads depends on.
pub(super) struct Local {
    /// [B, h, S, D].
    pub(super) query: Tensor,
    pub(super) key: Tensor,
    pub(super) value: Tensor,
    /// The KV head, of those here, that each query head here attends.
    pub(super) kv_of_query: Vec<i64>,
    pub(super) tokens: TokenPartition,
    pub(super) heads: HeadPartition,
    pub(super) rank: usize,
    pub(super) score: Score,
    pub(super) documents: Option<Runs>,
    /// The tokens that are no padding.
    pub(super) real: Option<Runs>,
    pub(super) layout: Option<BlockLayout>,
    pub(super) slopes: Option<Tensor>,
    pub(super) sinks: Option<Tensor>,
    pub(super) norms: Option<[Tensor; 2]>,
    pub(super) epsilon: f64,
    pub(super) rotary: Option<Rotary>,
    /// [B, S], or [3, B, S].
    pub(super) query_positions: Option<Tensor>,
    pub(super) key_positions: Option<Tensor>,
    pub(super) dropout: Option<Dropout>,
    /// Which keys a query sees, where it is not what the fields above say:
    /// bool, broadcasts to [B, h, S, S].
    pub(super) visible: Option<Tensor>,
    /// How far a query is from a key, where that is not |i - j|: [S, S].
    pub(super) distances: Option<Tensor>,
}

impl Local {
    /// What belongs to the rank's heads of what was asked, and what the ranks
    /// said of their tokens.
    pub(super) fn of(
        asked: &Asked,
        [query, key, value]: [Tensor; 3],
        communicator: &dyn Communicator,
        tokens: &TokenPartition,
        heads: HeadPartition,
    ) -> Staged<Local> {
        let rank = communicator.rank();
        let (of_queries, of_kv) = (heads.query_range(rank), heads.kv_range(rank));
        let cut = |tensor: &Tensor, heads: &std::ops::Range<usize>| {
            tensor.f_narrow(0, heads.start as i64, heads.len() as i64)
        };
        let of_heads = |tensor: &Option<Tensor>| {
            let tensor = tensor.as_ref();
            tensor.map(|tensor| cut(tensor, &of_queries)).transpose()
        };
        let norms = match &asked.norms {
            Some([query, key]) => Some([cut(query, &of_queries)?, cut(key, &of_kv)?]),
            None => None,
        };
        let gathered = |own: &Tensor| sequence::gathered(communicator, tokens, own);
        let reads_positions = asked.options.rotary.is_some()
            || matches!(asked.documents, Some(Documents::FromPositions));
        let positions = match reads_positions {
            true => Some(gathered(&asked.positions)?),
            false => None,
        };
        let documents = match (&asked.documents, &positions) {
            (Some(Documents::Ends(ends)), _) => Some(sequence::from_ends(ends)),
            (Some(Documents::FromPositions), Some(positions)) => {
                Some(sequence::from_positions(positions)?)
            }
            _ => None,
        };
        let real = match &asked.attention_mask {
            Some(mask) => Some(sequence::from_mask(&gathered(mask)?)?),
            None => None,
        };
        let kv_of_query = heads.head_map(rank);
        let kv_of_query = kv_of_query.kv_of_query().iter();
        Ok(Local {
            query,
            key,
            value,
            kv_of_query: kv_of_query.map(|&head| head as i64).collect(),
            tokens: tokens.clone(),
            heads,
            rank,
            score: asked.options.score,
            documents,
            real,
            layout: match &asked.layout {
                Some(layout) => Some(layout.narrow(of_queries.clone())?),
                None => None,
            },
            slopes: of_heads(&asked.slopes)?,
            sinks: of_heads(&asked.sinks)?,
            norms,
            epsilon: asked.epsilon,
            rotary: asked.options.rotary,
            query_positions: positions.as_ref().map(Tensor::shallow_clone),
            key_positions: positions,
            dropout: asked.dropout.map(|dropout| Dropout {
                probability: dropout.probability,
                seed: dropout.seed,
                first_head: of_queries.start,
            }),
            visible: None,
            distances: None,
        })
    }

    /// Changes the positions of queries and of keys.
    pub(super) fn each_position(
        &mut self,
        change: impl Fn(&Tensor) -> Staged<Tensor>,
    ) -> Staged<()> {
        let positions = [&mut self.query_positions, &mut self.key_positions];
        for positions in positions.into_iter().flatten() {
            *positions = change(positions)?;
        }
        Ok(())
    }

    /// Normalises and rotates queries and keys.
    pub(super) fn prepare(&mut self) -> Staged<()> {
        if let Some([of_queries, of_keys]) = &self.norms {
            let normal = |tensor: &Tensor, weight| {
                let normal = normalize_heads(&tensor.f_transpose(1, 2)?, weight, self.epsilon)?;
                Staged::Ok(normal.f_transpose(1, 2)?)
            };
            self.query = normal(&self.query, of_queries)?;
            self.key = normal(&self.key, of_keys)?;
        }
        if let Some(rotary) = &self.rotary {
            let rotated = |tensor: &Tensor, positions: &Option<Tensor>| match positions {
                Some(positions) => {
                    let rotated = rotate(&tensor.f_transpose(1, 2)?, positions, rotary)?;
                    Staged::Ok(rotated.f_transpose(1, 2)?)
                }
                None => Ok(tensor.shallow_clone()),
            };
            self.query = rotated(&self.query, &self.query_positions)?;
            self.key = rotated(&self.key, &self.key_positions)?;
        }
        Ok(())
    }

    /// The runs of tokens that attend among themselves.
    pub(super) fn segments(&self) -> Option<Runs> {
        match (&self.documents, &self.real) {
            (Some(documents), Some(real)) => Some(sequence::meet(documents, real)),
            (documents, real) => documents.clone().or_else(|| real.clone()),
        }
    }

    /// Attention by the reference's own core, [B, h, S, D]; by the plain
    /// formula where that would not do what is asked.
    pub(super) fn attend(&self) -> Staged<Tensor> {
        self.attend_with([&self.query, &self.key, &self.value])
    }

    /// The same with these queries, keys and values.
    pub(super) fn attend_with(&self, [query, key, value]: [&Tensor; 3]) -> Staged<Tensor> {
        let map = self.heads.head_map(self.rank);
        let of_map = map.kv_of_query().iter().map(|&head| head as i64);
        match !self.is_plain() && of_map.eq(self.kv_of_query.iter().copied()) {
            true => self.attend_by_core([query, key, value], &map),
            false => self.attend_expanded([query, &self.expanded(key)?, &self.expanded(value)?]),
        }
    }

    /// The same, where each query head has a KV head of its own.
    pub(super) fn attend_expanded(&self, tensors: [&Tensor; 3]) -> Staged<Tensor> {
        if self.is_plain() {
            return plain::attention(self, tensors);
        }
        let heads = self.kv_of_query.len();
        let map = HeadPartition::new(heads, heads, 1)?.head_map(0);
        self.attend_by_core(tensors, &map)
    }

    fn attend_by_core(&self, tensors: [&Tensor; 3], map: &HeadMap) -> Staged<Tensor> {
        let [query, key, value] = tensors;
        let structure = Structure {
            segments: self.segments(),
            layout: self.layout.clone(),
            slopes: self.slopes.as_ref(),
            sinks: self.sinks.as_ref(),
            dropout: self.dropout,
        };
        let (kernel, score) = (Kernel::Sdpa, &self.score);
        Ok(core_attention(
            query, key, value, map, kernel, score, &structure,
        )?)
    }

    /// Whether the reference's core has no way to do what is asked.
    fn is_plain(&self) -> bool {
        self.visible.is_some() || self.distances.is_some()
    }

    /// A KV head for each query head.
    pub(super) fn expanded(&self, tensor: &Tensor) -> Staged<Tensor> {
        let map = Tensor::f_from_slice(&self.kv_of_query)?;
        Ok(tensor.f_index_select(1, &map)?)
    }
}
