//! What a diagnosis is made from: a question, what is right, and what came.

use std::cell::OnceCell;
use std::ops::Range;

use fixtures::{AttentionCase, Inputs, Shard, Structure, sharding};
use tch::{Kind, TchError, Tensor};

use super::prediction::Prediction;
use super::screening::{self, Places};
use crate::oracle::{self, Answer, AnswerTensor, Problem};

/// A wrong answer, beside the right one.
pub(crate) struct Evidence<'a> {
    pub(crate) case: &'a AttentionCase,
    pub(crate) inputs: &'a Inputs,
    /// In the order of [`AnswerTensor::ALL`].
    pub(super) tensors: Vec<Measured<'a>>,
    /// The tokens of each rank; of one, outside training.
    pub(super) shards: Vec<Shard>,
    dropout: Option<&'a [f64]>,
    /// Which tokens of which sequence are no real ones; none where all are.
    padding: Option<Structure>,
    problem: OnceCell<Problem>,
    by_query_head: OnceCell<Answer<Tensor>>,
}

/// One tensor of an answer, beside the right one and what each element may be
/// off.
pub(crate) struct Measured<'a> {
    pub(super) name: AnswerTensor,
    pub(super) answer: Vec<f64>,
    pub(super) right: &'a [f64],
    pub(super) tolerance: Vec<f64>,
    pub(super) sizes: Sizes,
    is_wrong: bool,
}

/// `[batch, tokens, heads, channels]`. What belongs to heads has one token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    pub(crate) batch: usize,
    pub(crate) tokens: usize,
    pub(crate) heads: usize,
    pub(crate) channels: usize,
}

impl Sizes {
    /// Those of a tensor of an answer to `case`.
    pub(crate) fn of(case: &AttentionCase, name: AnswerTensor) -> Sizes {
        let [batch, tokens, heads, channels] = match name.shape(case)[..] {
            [batch, tokens, heads, channels] => [batch, tokens, heads, channels],
            [heads, channels] => [1, 1, heads, channels],
            [heads] => [1, 1, heads, 1],
            _ => [1, 1, 1, 1],
        };
        Sizes {
            batch,
            tokens,
            heads,
            channels,
        }
    }

    /// How many rows of channels there are.
    pub(crate) fn rows(self) -> usize {
        self.batch * self.tokens * self.heads
    }

    /// Batch, token and head of a row.
    pub(crate) fn place(self, row: usize) -> (usize, usize, usize) {
        let (token, head) = (row / self.heads, row % self.heads);
        (token / self.tokens, token % self.tokens, head)
    }

    /// The row of a batch, token and head.
    pub(crate) fn row(self, (batch, token, head): (usize, usize, usize)) -> usize {
        (batch * self.tokens + token) * self.heads + head
    }
}

impl<'a> Measured<'a> {
    /// `answer`, which is to be `right` and may be off by `tolerance`, of a
    /// case's tensor.
    pub(crate) fn new(
        case: &AttentionCase,
        name: AnswerTensor,
        answer: Vec<f64>,
        right: &'a [f64],
        tolerance: Vec<f64>,
    ) -> Measured<'a> {
        let mut measured = Measured {
            name,
            answer,
            right,
            tolerance,
            sizes: Sizes::of(case, name),
            is_wrong: false,
        };
        measured.is_wrong = (0..measured.answer.len()).any(|i| measured.is_off(i));
        measured
    }

    /// Whether this element is further off than it may be.
    pub(super) fn is_off(&self, i: usize) -> bool {
        let off = (self.answer[i] - self.right[i]).abs();
        off.is_nan() || off > self.tolerance[i]
    }

    /// Whether any is.
    pub(super) fn is_wrong(&self) -> bool {
        self.is_wrong
    }

    /// The elements of a row.
    pub(super) fn row(&self, row: usize) -> Range<usize> {
        row * self.sizes.channels..(row + 1) * self.sizes.channels
    }
}

impl<'a> Evidence<'a> {
    /// `tensors` are those of one answer to `case`, asked with `inputs`, where
    /// weights are multiplied by `dropout`.
    pub(crate) fn new(
        case: &'a AttentionCase,
        inputs: &'a Inputs,
        dropout: Option<&'a [f64]>,
        tensors: Vec<Measured<'a>>,
    ) -> Self {
        let mut shards = case.shards();
        if case.extras.eval {
            shards.truncate(1);
        }
        Evidence {
            case,
            inputs,
            tensors,
            shards,
            dropout,
            padding: case.extras.padding.map(|_| Structure::of(case)),
            problem: OnceCell::new(),
            by_query_head: OnceCell::new(),
        }
    }

    /// One of the answer's tensors.
    pub(super) fn tensor(&self, name: AnswerTensor) -> Option<&Measured<'a>> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    /// Whether this tensor is wrong.
    pub(super) fn is_wrong(&self, name: AnswerTensor) -> bool {
        self.tensor(name).is_some_and(Measured::is_wrong)
    }

    /// How many ranks share heads and tokens.
    pub(super) fn ranks(&self) -> usize {
        self.shards.len()
    }

    /// The heads, out of so many, of each rank.
    pub(super) fn heads_of_ranks(&self, heads: usize) -> Vec<Range<usize>> {
        sharding::contiguous(heads, self.ranks())
    }

    /// The rank of each query head.
    pub(super) fn rank_of_head(&self) -> Vec<usize> {
        let ranges = self.heads_of_ranks(self.case.query_heads);
        let ranks = ranges.into_iter().enumerate();
        ranks
            .flat_map(|(rank, heads)| heads.map(move |_| rank))
            .collect()
    }

    /// For each token its rank, and its number there.
    pub(super) fn place_of_token(&self) -> Vec<(usize, usize)> {
        let mut places = vec![(0, 0); self.case.sequence];
        for (rank, shard) in self.shards.iter().enumerate() {
            for (at, &token) in shard.tokens().iter().enumerate() {
                places[token] = (rank, at);
            }
        }
        places
    }

    /// The ranks' query heads, each rank's that attend this KV head.
    pub(super) fn heads_of_replicas(&self, kv_head: usize) -> Vec<Vec<usize>> {
        let attends = |head: &usize| self.case.kv_head_of(*head) == kv_head;
        self.heads_of_ranks(self.case.query_heads)
            .into_iter()
            .map(|heads| heads.filter(attends).collect())
            .filter(|heads: &Vec<usize>| !heads.is_empty())
            .collect()
    }

    /// The question, to be altered.
    pub(super) fn problem(&self) -> Result<Problem, TchError> {
        if let Some(problem) = self.problem.get() {
            return Ok(problem.shallow_clone());
        }
        let problem = Problem::of(self.case, self.inputs)?.with_dropout(self.dropout)?;
        let copy = problem.shallow_clone();
        // Only one thread fills it, and once.
        let _ = self.problem.set(problem);
        Ok(copy)
    }

    /// The right answer where each query head has a KV head of its own: dk, dv
    /// and the gradient of the keys' norm are then parts, of which the sum over
    /// a group of query heads is due.
    pub(super) fn by_query_head(&self) -> Result<&Answer<Tensor>, TchError> {
        if let Some(answer) = self.by_query_head.get() {
            return Ok(answer);
        }
        let answer = expanded(self.problem()?)?.solve()?;
        Ok(self.by_query_head.get_or_init(|| answer))
    }

    /// What an altered problem answers; nothing if a few rows show that it is not
    /// this answer.
    pub(super) fn solved(
        &self,
        sentence: impl Into<String>,
        problem: &Problem,
    ) -> Result<Prediction, TchError> {
        let mut prediction = Prediction::new(sentence);
        let places = Places {
            out: &|row| row,
            dq: &|row| row,
        };
        if !screening::is_plausible(self, problem, &places)? {
            return Ok(prediction);
        }
        self.solve(problem, &mut prediction)?;
        Ok(prediction)
    }

    /// Adds to a prediction what an altered problem answers.
    pub(super) fn solve(
        &self,
        problem: &Problem,
        prediction: &mut Prediction,
    ) -> Result<(), TchError> {
        for (name, tensor) in problem.solve()?.iter() {
            prediction.set(name, elements(name, tensor)?);
        }
        // What is left out has no gradient.
        for tensor in &self.tensors {
            prediction.set_default(tensor.name, || vec![0.0; tensor.right.len()]);
        }
        Ok(())
    }

    /// A prediction that is right in every tensor, to be altered.
    pub(super) fn right(&self, sentence: impl Into<String>) -> Prediction {
        let mut prediction = Prediction::new(sentence);
        for tensor in &self.tensors {
            prediction.set(tensor.name, tensor.right.to_vec());
        }
        prediction
    }

    /// Whether this token is no real one.
    pub(super) fn is_padding(&self, batch: usize, token: usize) -> bool {
        let padding = self.padding.as_ref();
        padding.is_some_and(|structure| structure.is_padding(batch, token))
    }
}

/// The same problem with a KV head for each query head.
pub(super) fn expanded(mut problem: Problem) -> Result<Problem, TchError> {
    let heads = Tensor::f_from_slice(&problem.kv_of_query)?;
    problem.k = problem.k.f_index_select(1, &heads)?;
    problem.v = problem.v.f_index_select(1, &heads)?;
    if let Some(weight) = &problem.key_norm {
        problem.key_norm = Some(weight.f_index_select(0, &heads)?);
    }
    problem.kv_of_query = (0..problem.kv_of_query.len() as i64).collect();
    Ok(problem)
}

/// The elements of a tensor that a problem answers, head state summed over
/// tokens.
pub(super) fn elements(name: AnswerTensor, tensor: &Tensor) -> Result<Vec<f64>, TchError> {
    match name.is_head_state() {
        true => {
            oracle::elements(&tensor.f_sum_dim_intlist([0, 1].as_slice(), false, Kind::Double)?)
        }
        false => oracle::elements(tensor),
    }
}
