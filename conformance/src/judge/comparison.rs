//! How an answer compares with the right one.

use fixtures::exchange::Precision;
use fixtures::{Array, AttentionCase, Inputs};

use ulysses::Kernel;

use super::Verdict;
use super::dense;
use super::padding::PaddingTokens;
use super::ruler::Ruler;
use crate::diagnosis::Measured;
use crate::implementation::Means;
use crate::oracle::{self, Answer, AnswerTensor, Rounded};

/// How the tensors of an answer compare with the right ones.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// In the order of a report.
    pub tensors: Vec<TensorComparison>,
}

/// How one tensor compares with the right one.
#[derive(Clone, Debug)]
pub struct TensorComparison {
    /// The name, as in a rank's answer: `dq`.
    pub name: String,
    /// Whether it is the sum of the ranks' parts, in no order of its own: such
    /// a one is never exact.
    pub is_sum: bool,
    /// Whether it is bit-equal to what one process gives: of attention to dense
    /// SDPA, never where scores are not SDPA's own; else to the right answer,
    /// rounded once.
    pub is_exact: bool,
    /// Its numbers.
    pub numbers: usize,
    /// Its rows: the numbers of one head of one token.
    pub rows: usize,
    /// How many numbers are further off than they may be.
    pub wrong_numbers: usize,
    /// How many rows have such a number.
    pub wrong_rows: usize,
    /// The number that is furthest beyond what it may be off, if any is.
    pub worst: Option<WrongNumber>,
    /// The largest ratio of a number's error to what it may be.
    pub tightness: f64,
    /// How far the errors of all rows together lean to one side, relative to
    /// what they may: above 0 towards larger numbers, below towards zero.
    pub lean: f64,
    /// The `alpha` for which `alpha * right` is nearest to the answer, and what
    /// remains then, relative to the answer.
    pub scale: (f64, f64),
}

/// A number that is further off than it may be.
#[derive(Clone, Debug, PartialEq)]
pub struct WrongNumber {
    /// The row in which it stands.
    pub place: Place,
    /// Where it stands in the row.
    pub channel: usize,
    /// What it is.
    pub is: f64,
    /// What it should be.
    pub right: f64,
    /// How far it may be off.
    pub tolerance: f64,
}

/// Where a row stands.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// One head of the gradient of what belongs to heads.
    Head(usize),
    /// A row of a rank's tensor, by the indices of all dimensions but the last;
    /// of a sum over ranks with no rank.
    Row(Option<usize>, Vec<usize>),
}

/// What answers to a case are measured by.
pub(crate) struct Yardstick {
    padding: PaddingTokens,
    rulers: Answer<Ruler>,
}

impl Yardstick {
    /// The right answer, and how far an honest one that rounds by this profile
    /// and is computed by these means may be off. An error means that there is nothing to measure by.
    pub(crate) fn of(
        case: &AttentionCase,
        inputs: &Inputs,
        (precision, means): (Precision, Means),
        dropout: Option<&[f64]>,
    ) -> Result<Yardstick, String> {
        let Rounded { right, mut roots } =
            oracle::attention_rounded(case, inputs, (precision, means.device), dropout)
                .map_err(|error| format!("the oracle failed: {error}"))?;
        let sdpa = match dense::is_dense_sdpa(case) {
            true => match dense::attention(case, inputs, means) {
                Ok(answer) => Some(answer),
                // The one kernel does not take the case; what answers it is by
                // another, and right within the tolerance.
                Err(_) if !matches!(means.kernel, Kernel::Sdpa | Kernel::Eager) => None,
                Err(error) => return Err(format!("dense attention failed: {error}")),
            },
            false => None,
        };
        let padding = PaddingTokens::of(case);
        let rulers = right.try_map(|name, right| {
            let roots = roots.take(name).unwrap_or_default();
            let [right, roots] = [right, roots].map(|numbers| padding.blanked(name, numbers));
            if !right.iter().chain(&roots).all(|number| number.is_finite()) {
                return Err(format!(
                    "`{}` of the right answer is not finite",
                    name.name()
                ));
            }
            let sdpa = sdpa.as_ref().and_then(|sdpa| sdpa.get(name)).map(|sdpa| {
                let numbers = padding.blanked(name, sdpa.to_f64());
                Array::from_f64(case.dtype, &name.shape(case), &numbers)
            });
            if sdpa
                .as_ref()
                .is_some_and(|sdpa| !sdpa.to_f64().iter().all(|x| x.is_finite()))
            {
                return Err(format!(
                    "`{}` of dense attention in {} is not finite here",
                    name.name(),
                    case.dtype
                ));
            }
            Ok(Ruler::new(case, name, right, roots, sdpa))
        })?;
        Ok(Yardstick { padding, rulers })
    }

    /// What one tensor is measured by, if the case has it.
    pub(crate) fn ruler(&self, tensor: AnswerTensor) -> Option<&Ruler> {
        self.rulers.get(tensor)
    }

    /// The numbers of `answer`, zero where nobody compares them, and what they
    /// are measured by.
    pub(super) fn measured<'a>(
        &'a self,
        case: &'a AttentionCase,
        answer: &'a Answer<Vec<f64>>,
    ) -> impl Iterator<Item = Measured<'a>> {
        self.rulers.iter().filter_map(|(name, ruler)| {
            let numbers = self.padding.blanked(name, answer.get(name)?.clone());
            let tolerance = (0..numbers.len()).map(|i| ruler.tolerance(i)).collect();
            Some(Measured::new(case, name, numbers, &ruler.right, tolerance))
        })
    }

    /// Compares `answer`, which has every tensor in its shape.
    pub(crate) fn compare(&self, answer: &Answer<Vec<f64>>) -> Comparison {
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
            .find(|comparison| comparison.name == tensor.name())
    }

    /// Exact, pass or fail; the first that holds.
    pub(super) fn verdict(&self) -> Verdict {
        if self.wrong().next().is_some() {
            Verdict::Fail
        } else if self
            .tensors
            .iter()
            .all(|tensor| tensor.is_exact || tensor.is_sum)
        {
            Verdict::Exact
        } else {
            Verdict::Pass
        }
    }

    fn wrong(&self) -> impl Iterator<Item = &TensorComparison> {
        self.tensors.iter().filter(|tensor| tensor.is_wrong())
    }

    /// How many numbers were compared.
    pub fn numbers(&self) -> usize {
        self.tensors.iter().map(|tensor| tensor.numbers).sum()
    }

    /// What is wrong, in a sentence; empty where nothing is.
    pub(super) fn sentence(&self) -> String {
        let wrong: Vec<_> = self.wrong().collect();
        let names: Vec<_> = wrong.iter().map(|tensor| tensor.name.as_str()).collect();
        let is_leaning = wrong.iter().all(|tensor| tensor.wrong_numbers == 0);
        let [one, more] = match is_leaning {
            true => ["leans to one side", "lean to one side"],
            false => ["is wrong", "are wrong"],
        };
        match names.as_slice() {
            [] => String::new(),
            [name] => format!("{name} {one}"),
            [names @ .., last] => format!("{} and {last} {more}", names.join(", ")),
        }
    }

    /// A line for each wrong tensor, and one for its worst number.
    pub(super) fn details(&self, case: Option<&AttentionCase>) -> Vec<String> {
        self.wrong()
            .flat_map(|tensor| [Some(tensor.describe()), tensor.describe_worst(case)])
            .flatten()
            .collect()
    }
}

impl TensorComparison {
    /// Whether a number is further off than it may be, or all together lean
    /// further to one side.
    pub fn is_wrong(&self) -> bool {
        self.wrong_numbers > 0 || (self.lean.abs() > 1.0 && !self.is_exact)
    }

    fn describe(&self) -> String {
        let (alpha, rest) = self.scale;
        let name = &self.name;
        if self.wrong_numbers == 0 {
            let side = if self.lean < 0.0 {
                "towards zero"
            } else {
                "away from zero"
            };
            return format!(
                "{name}: no number is off by more than it may, but over {} rows the errors lean \
                 {side}, {:.1} times as far as they may",
                self.rows,
                self.lean.abs()
            );
        }
        let scale = if rest < 0.05 {
            format!("; it is {alpha:.3} times the right one")
        } else {
            String::new()
        };
        format!(
            "{name}: {} of {} numbers are off by more than they may, in {} of {} rows{scale}",
            self.wrong_numbers, self.numbers, self.wrong_rows, self.rows
        )
    }

    fn describe_worst(&self, case: Option<&AttentionCase>) -> Option<String> {
        let worst = self.worst.as_ref()?;
        Some(format!(
            "{}: worst at {}, channel {}: is {:.4e}, due is {:.4e}, may be off by {:.1e}",
            self.name,
            self.describe_place(case, &worst.place),
            worst.channel,
            worst.is,
            worst.right,
            worst.tolerance,
        ))
    }

    fn describe_place(&self, case: Option<&AttentionCase>, place: &Place) -> String {
        match place {
            Place::Token { batch, token, head } => {
                let of_rank = case.map(|case| self.describe_rank(case, *token));
                let of_rank = of_rank.unwrap_or_default();
                format!("batch {batch}, head {head}, token {token}{of_rank}")
            }
            Place::Head(head) => format!("head {head}"),
            Place::Row(Some(rank), row) => format!("rank {rank}, row {row:?}"),
            Place::Row(None, row) => format!("row {row:?}"),
        }
    }

    /// Whose shard the token is in, and where, if it is in that of one rank.
    fn describe_rank(&self, case: &AttentionCase, token: usize) -> String {
        let is_whole_everywhere = case.extras.eval
            || case.extras.cross.is_some()
                && [AnswerTensor::KeyGradient, AnswerTensor::ValueGradient]
                    .map(AnswerTensor::name)
                    .contains(&self.name.as_str());
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
