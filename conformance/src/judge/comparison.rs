//! How an answer compares with the right one.

use fixtures::{Array, Case, Inputs};

use super::Verdict;
use super::dense::{self, DenseKernel};
use super::padding::PaddingTokens;
use super::ruler::Ruler;
use crate::oracle::{self, Answer, AnswerTensor};

/// How the tensors of an answer compare with the right ones.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// In the order of [`AnswerTensor::ALL`].
    pub tensors: Vec<TensorComparison>,
}

/// How one tensor compares with the right one.
#[derive(Clone, Debug)]
pub struct TensorComparison {
    /// Which tensor.
    pub tensor: AnswerTensor,
    /// Whether it is bit-equal to dense SDPA. Never where scores are not
    /// SDPA's own, nor for a gradient of head state, which is a sum over ranks
    /// in no order of its own.
    pub is_exact: bool,
    /// Its rows.
    pub rows: usize,
    /// How many rows are further off than they may be.
    pub wrong_rows: usize,
    /// The row that is furthest beyond what it may be off, if any is.
    pub worst: Option<WrongRow>,
    /// The largest ratio of a row's error to what it may be.
    pub tightness: f64,
    /// The `alpha` for which `alpha * right` is nearest to the answer, and what
    /// remains then, relative to the answer.
    pub scale: (f64, f64),
}

/// A row that is further off than it may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WrongRow {
    /// Where it stands.
    pub place: Place,
    /// The norm of its error.
    pub error: f64,
    /// What that may be.
    pub bound: f64,
    /// The norm of the right row.
    pub norm: f64,
}

/// Where a row stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// One head of one token.
    Token {
        /// Which sequence of the batch.
        batch: usize,
        /// The token's position in the whole sequence.
        token: usize,
        /// The query head, or for dk and dv the KV head.
        head: usize,
    },
    /// One head of the gradient of a norm's weight.
    Head(usize),
    /// All heads of the gradient of slopes or sinks.
    AllHeads,
}

/// What an answer to a case is measured by.
pub(super) struct Yardstick {
    padding: PaddingTokens,
    rulers: Answer<Ruler>,
}

impl Yardstick {
    /// The right answer, and how far an honest one may be off. An error means
    /// that there is nothing to measure by.
    pub(super) fn of(
        case: &Case,
        inputs: &Inputs,
        dropout: Option<&[f64]>,
    ) -> Result<Yardstick, String> {
        let oracle_failed = |error| format!("the oracle failed: {error}");
        let (right, deviations) = oracle::by_token(case, inputs, dropout).map_err(oracle_failed)?;
        let right = right
            .try_map(|_, tensor| oracle::elements(&tensor))
            .map_err(oracle_failed)?;
        let dense = |kernel: DenseKernel| {
            dense::attention(case, inputs, kernel, dropout)
                .map_err(|error| format!("dense {kernel:?} attention failed: {error}"))
        };
        let sdpa = match DenseKernel::Sdpa.answers(case) {
            true => Some(dense(DenseKernel::Sdpa)?),
            false => None,
        };
        let eager = dense(DenseKernel::Eager)?;
        let padding = PaddingTokens::of(case);
        let rulers = right.try_map(|name, right| {
            let honest = |answer: &Answer<Array>| {
                let elements = answer.get(name).map(Array::to_f64).unwrap_or_default();
                padding.blanked(name, elements)
            };
            let right = padding.blanked(name, right);
            let baselines: Vec<_> = sdpa.iter().chain([&eager]).map(honest).collect();
            let is_usable = |baseline: &Vec<f64>| {
                baseline.len() == right.len() && baseline.iter().all(|x| x.is_finite())
            };
            if !baselines.iter().all(is_usable) {
                return Err(format!(
                    "`{}` of dense attention in {} is not finite here",
                    name.name(),
                    case.dtype
                ));
            }
            if name.is_head_state() {
                return Ok(Ruler::of_parts(case, name, &right, &baselines));
            }
            let sdpa = sdpa.as_ref().and(baselines.first());
            let sdpa = sdpa.map(|sdpa| Array::from_f64(case.dtype, &name.shape(case), sdpa));
            let deviations = deviations.of(name).map_err(oracle_failed)?;
            Ok(Ruler::of_tokens(
                case,
                name,
                right,
                sdpa,
                &baselines,
                &deviations,
            ))
        })?;
        Ok(Yardstick { padding, rulers })
    }

    /// Compares `answer`, which has every tensor in its shape.
    pub(super) fn compare(&self, answer: &Answer<Vec<f64>>) -> Comparison {
        let tensors = self.rulers.iter().map(|(name, ruler)| {
            let elements = answer.get(name).cloned().unwrap_or_default();
            ruler.measure(&self.padding.blanked(name, elements))
        });
        Comparison {
            tensors: tensors.collect(),
        }
    }
}

impl Comparison {
    /// How this tensor compares; none where the case does not have it.
    pub fn of(&self, tensor: AnswerTensor) -> Option<&TensorComparison> {
        self.tensors
            .iter()
            .find(|comparison| comparison.tensor == tensor)
    }

    /// Exact, pass or fail; the first that holds.
    pub(super) fn verdict(&self) -> Verdict {
        if self.wrong().next().is_some() {
            Verdict::Fail
        } else if self
            .tensors
            .iter()
            .all(|t| t.is_exact || t.tensor.is_head_state())
        {
            Verdict::Exact
        } else {
            Verdict::Pass
        }
    }

    fn wrong(&self) -> impl Iterator<Item = &TensorComparison> {
        self.tensors.iter().filter(|tensor| tensor.wrong_rows > 0)
    }

    /// What is wrong, in a sentence; empty where nothing is.
    pub(super) fn sentence(&self) -> String {
        let names: Vec<_> = self.wrong().map(|tensor| tensor.tensor.name()).collect();
        match names.as_slice() {
            [] => String::new(),
            [one] => format!("{one} is wrong"),
            [more @ .., last] => format!("{} and {last} are wrong", more.join(", ")),
        }
    }

    /// A line for each wrong tensor, and one for its worst row.
    pub(super) fn details(&self, case: &Case) -> Vec<String> {
        self.wrong()
            .flat_map(|tensor| [tensor.describe(), tensor.describe_worst(case)])
            .collect()
    }
}

impl TensorComparison {
    fn describe(&self) -> String {
        let (alpha, rest) = self.scale;
        let scale = if rest < 0.05 {
            format!("; it is {alpha:.3} times the right one")
        } else {
            String::new()
        };
        let (wrong, rows, name) = (self.wrong_rows, self.rows, self.tensor.name());
        format!("{name}: {wrong} of {rows} rows are off by more than they may{scale}")
    }

    fn describe_worst(&self, case: &Case) -> String {
        let Some(worst) = self.worst else {
            return String::new();
        };
        format!(
            "{}: worst at {}: off by {:.2e}, may be {:.2e}, the right row's norm is {:.2e}",
            self.tensor.name(),
            self.describe_place(case, worst.place),
            worst.error,
            worst.bound,
            worst.norm,
        )
    }

    fn describe_place(&self, case: &Case, place: Place) -> String {
        match place {
            Place::Token { batch, token, head } => {
                let of_rank = self.describe_rank(case, token);
                format!("batch {batch}, head {head}, token {token}{of_rank}")
            }
            Place::Head(head) => format!("head {head}"),
            Place::AllHeads => "all heads together".to_owned(),
        }
    }

    /// Whose shard the token is in, and where, if it is in that of one rank.
    fn describe_rank(&self, case: &Case, token: usize) -> String {
        let is_whole_everywhere = case.extras.eval
            || case.extras.cross.is_some()
                && matches!(
                    self.tensor,
                    AnswerTensor::KeyGradient | AnswerTensor::ValueGradient
                );
        if is_whole_everywhere {
            return String::new();
        }
        let shards = case.shards();
        let places = shards.iter().enumerate().filter_map(|(rank, shard)| {
            let at = shard.position(token)?;
            Some(format!(" (rank {rank}, its token {at})"))
        });
        places.take(1).collect()
    }
}
