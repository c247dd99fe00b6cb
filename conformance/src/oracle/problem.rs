//! A question as plain tensors, and its answer, row block by row block.

use fixtures::{Array, AttentionCase, Input, Inputs};
use tch::{Device, Kind, TchError, Tensor};
use ulysses::device;

use super::preparation::Prepared;
use super::scores::{self, Scoring};
use super::sensitivity::{Block, Roundings, Sensitivities};
use super::visibility::Visibility;
use super::{Answer, rotary};
use crate::tensor;

/// Rows of the score matrix that exist at a time on a CPU.
const ROW_BLOCK: i64 = 128;

/// How many numbers for each score exist at a time, roundings included, by a
/// generous count; and the part of what a GPU has free that they may take.
const NUMBERS_OF_A_SCORE: i64 = 32;
const PART_OF_FREE: i64 = 4;

/// A question, every part of which can be made another before it is answered.
/// All numbers are float64.
pub(crate) struct Problem {
    /// `[batch, query heads, tokens, head size]`
    pub(crate) q: Tensor,
    /// `[batch, KV heads, KV tokens, head size]`
    pub(crate) k: Tensor,
    /// `[batch, KV heads, KV tokens, value size]`
    pub(crate) v: Tensor,
    /// `[batch, query heads, tokens, value size]`
    pub(crate) dout: Tensor,
    /// For each query head the KV head that it attends.
    pub(crate) kv_of_query: Vec<i64>,
    /// Which keys are seen, `[batch or 1, query heads or 1, tokens, KV tokens]`;
    /// all of them where there is none.
    pub(crate) visible: Option<Tensor>,
    /// By which queries are rotated, `[batch, 1, tokens, head size / 2]`.
    pub(crate) query_angles: Option<Tensor>,
    /// By which keys are rotated.
    pub(crate) key_angles: Option<Tensor>,
    /// The weight of the queries' norm, `[query heads, head size]`.
    pub(crate) query_norm: Option<Tensor>,
    /// The weight of the keys' norm, `[KV heads, head size]`.
    pub(crate) key_norm: Option<Tensor>,
    /// What products are multiplied by.
    pub(crate) scale: f64,
    /// Between plus and minus what scores stay.
    pub(crate) softcap: Option<f64>,
    /// `[1, query heads, 1, 1]`
    pub(crate) slopes: Option<Tensor>,
    /// What slopes are multiplied by, `[tokens, KV tokens]`.
    pub(crate) distances: Option<Tensor>,
    /// `[1, query heads, 1, 1]`
    pub(crate) sinks: Option<Tensor>,
    /// What weights are multiplied by, `[batch, query heads, tokens, KV
    /// tokens]`.
    pub(crate) dropout: Option<Tensor>,
}

impl Problem {
    /// What `case` asks with `inputs`, without dropout.
    pub(crate) fn of(case: &AttentionCase, inputs: &Inputs) -> Result<Problem, TchError> {
        let head_state = |input| inputs.get(input).map(float64).transpose();
        let by_head = |input| {
            head_state(input)?
                .map(|state| state.f_view([1, -1, 1, 1]))
                .transpose()
        };
        let visibility = Visibility::of(case);
        let slopes = by_head(Input::Slopes)?;
        let (tokens, keys) = (case.sequence, case.kv_sequence());
        Ok(Problem {
            q: by_heads(&inputs.q)?,
            k: by_heads(&inputs.k)?,
            v: by_heads(&inputs.v)?,
            dout: by_heads(&inputs.dout)?,
            kv_of_query: (0..case.query_heads)
                .map(|head| case.kv_head_of(head) as i64)
                .collect(),
            visible: match visibility.is_full() {
                true => None,
                false => Some(visibility.of_rows(0, tokens)?),
            },
            query_angles: rotary::angles(case)?,
            key_angles: rotary::angles(case)?,
            query_norm: head_state(Input::QueryNorm)?,
            key_norm: head_state(Input::KeyNorm)?,
            scale: case.score_scale(),
            softcap: case.extras.softcap.map(f64::from),
            distances: match slopes {
                Some(_) => Some(scores::distances(tokens as i64, keys as i64)?),
                None => None,
            },
            slopes,
            sinks: by_head(Input::Sinks)?,
            dropout: None,
        })
    }

    /// The same where weights are multiplied by `dropout`, one number for each
    /// in row-major order.
    pub(crate) fn with_dropout(mut self, dropout: Option<&[f64]>) -> Result<Problem, TchError> {
        let [batch, heads, tokens, _] = size4(&self.q)?;
        let keys = size4(&self.k)?[2];
        let multiplier =
            |numbers: &[f64]| Tensor::f_from_slice(numbers)?.f_view([batch, heads, tokens, keys]);
        self.dropout = dropout.map(multiplier).transpose()?;
        Ok(self)
    }

    /// The same problem, to be altered: its tensors are shared until they are
    /// replaced.
    pub(crate) fn shallow_clone(&self) -> Problem {
        let of = |tensor: &Option<Tensor>| tensor.as_ref().map(Tensor::shallow_clone);
        Problem {
            q: self.q.shallow_clone(),
            k: self.k.shallow_clone(),
            v: self.v.shallow_clone(),
            dout: self.dout.shallow_clone(),
            kv_of_query: self.kv_of_query.clone(),
            visible: of(&self.visible),
            query_angles: of(&self.query_angles),
            key_angles: of(&self.key_angles),
            query_norm: of(&self.query_norm),
            key_norm: of(&self.key_norm),
            scale: self.scale,
            softcap: self.softcap,
            slopes: of(&self.slopes),
            distances: of(&self.distances),
            sinks: of(&self.sinks),
            dropout: of(&self.dropout),
        }
    }

    /// The same problem with its tensors on a device.
    pub(super) fn on(&self, device: Device) -> Result<Problem, TchError> {
        let there = |tensor: &Tensor| tensor.f_to_device(device);
        let if_any = |tensor: &Option<Tensor>| tensor.as_ref().map(there).transpose();
        Ok(Problem {
            q: there(&self.q)?,
            k: there(&self.k)?,
            v: there(&self.v)?,
            dout: there(&self.dout)?,
            kv_of_query: self.kv_of_query.clone(),
            visible: if_any(&self.visible)?,
            query_angles: if_any(&self.query_angles)?,
            key_angles: if_any(&self.key_angles)?,
            query_norm: if_any(&self.query_norm)?,
            key_norm: if_any(&self.key_norm)?,
            scale: self.scale,
            softcap: self.softcap,
            slopes: if_any(&self.slopes)?,
            distances: if_any(&self.distances)?,
            sinks: if_any(&self.sinks)?,
            dropout: if_any(&self.dropout)?,
        })
    }

    /// How many rows of the score matrix are to exist at a time.
    fn row_block(&self) -> Result<i64, TchError> {
        let free = device::memory(self.q.device())
            .map_err(|error| TchError::Torch(error.to_string()))?
            .map(|(free, _)| i64::try_from(free).unwrap_or(i64::MAX));
        Ok(match free {
            None => ROW_BLOCK,
            Some(free) => {
                let [batch, heads, ..] = size4(&self.q)?;
                let scores = batch * heads * self.k.size()[2].max(1);
                let of_row = scores * NUMBERS_OF_A_SCORE * size_of::<f64>() as i64;
                (free / PART_OF_FREE / of_row).max(1)
            }
        })
    }

    /// The problem of these queries of one sequence alone. Their rows of output
    /// and of the queries' gradient are those of the whole problem.
    pub(crate) fn of_queries(&self, batch: i64, queries: &[i64]) -> Result<Problem, TchError> {
        let rows = Tensor::f_from_slice(queries)?;
        let of_batch = |tensor: &Tensor| match tensor.size()[0] {
            1 => Ok(tensor.shallow_clone()),
            _ => tensor.f_narrow(0, batch, 1),
        };
        let of_rows = |tensor: &Tensor| of_batch(tensor)?.f_index_select(2, &rows);
        let mut problem = self.shallow_clone();
        problem.q = of_rows(&self.q)?;
        problem.dout = of_rows(&self.dout)?;
        problem.k = of_batch(&self.k)?;
        problem.v = of_batch(&self.v)?;
        problem.visible = self.visible.as_ref().map(of_rows).transpose()?;
        problem.query_angles = self.query_angles.as_ref().map(of_rows).transpose()?;
        problem.key_angles = self.key_angles.as_ref().map(of_batch).transpose()?;
        problem.dropout = self.dropout.as_ref().map(of_rows).transpose()?;
        let of_distances = |distances: &Tensor| distances.f_index_select(0, &rows);
        problem.distances = self.distances.as_ref().map(of_distances).transpose()?;
        Ok(problem)
    }

    /// The right answer. Of each gradient of head state the parts of every
    /// token: `[batch, tokens, ..]`, of which the sum is the gradient.
    pub(crate) fn solve(&self) -> Result<Answer<Tensor>, TchError> {
        let (answer, _) = self.solve_with(None)?;
        Ok(answer)
    }

    /// The same, and how far the roundings of `roundings` move each number of
    /// it; of gradients of head state the number, not its parts.
    pub(super) fn solve_with(
        &self,
        mut roundings: Option<Roundings>,
    ) -> Result<(Answer<Tensor>, Option<Sensitivities>), TchError> {
        let prepared = |heads: &Tensor, weight: &Option<Tensor>, angles: &Option<Tensor>| {
            Prepared::new(heads.shallow_clone(), weight.as_ref(), angles.as_ref())
        };
        let queries = prepared(&self.q, &self.query_norm, &self.query_angles)?;
        let keys = prepared(&self.k, &self.key_norm, &self.key_angles)?;
        let groups = Groups::new(&self.kv_of_query, &self.k)?;
        let (k, v) = (groups.expand(&keys.heads)?, groups.expand(&self.v)?);
        let (k_transposed, v_transposed) = (k.f_transpose(2, 3)?, v.f_transpose(2, 3)?);
        if let Some(roundings) = &mut roundings {
            roundings.begin(&queries, &keys, &groups)?;
        }

        let (mut out, mut dq) = (Vec::new(), Vec::new());
        let (mut dslopes, mut dsinks) = (Vec::new(), Vec::new());
        let (mut dk, mut dv) = (k.f_zeros_like()?, v.f_zeros_like()?);
        let (tokens, row_block) = (self.q.size()[2], self.row_block()?);
        for first in (0..tokens).step_by(row_block as usize) {
            let rows = row_block.min(tokens - first);
            let of_rows = |tensor: &Tensor| tensor.f_narrow(-2, first, rows);
            let of_these = |tensor: &Option<Tensor>| tensor.as_ref().map(of_rows).transpose();
            let (q, dout) = (of_rows(&queries.heads)?, of_rows(&self.dout)?);
            let (seen, multiplier) = (of_these(&self.visible)?, of_these(&self.dropout)?);
            let dropped = |weights: &Tensor| match &multiplier {
                Some(multiplier) => weights.f_mul(multiplier),
                None => Ok(weights.shallow_clone()),
            };
            let scoring = Scoring {
                scale: self.scale,
                softcap: self.softcap,
                slopes: self.slopes.as_ref(),
                sinks: self.sinks.as_ref(),
                distances: of_these(&self.distances)?,
            };
            let products = q.f_matmul(&k_transposed)?;
            let scored = scoring.weights(&products, seen.as_ref())?;
            let weights = dropped(&scored.weights)?;
            let out_block = weights.f_matmul(&v)?;
            let dout_dot_out =
                dout.f_mul(&out_block)?
                    .f_sum_dim_intlist([-1].as_slice(), true, Kind::Double)?;
            let dweights = dropped(&dout.f_matmul(&v_transposed)?)?;
            let dscores = scored.weights.f_mul(&dweights.f_sub(&dout_dot_out)?)?;
            let (dproducts, dslopes_block) = scoring.gradients(&scored, &dscores)?;
            if let Some(of_sink) = &scored.of_sink {
                dsinks.push(of_sink.f_mul(&dout_dot_out)?.f_neg()?.f_squeeze_dim(-1)?);
            }
            dslopes.extend(dslopes_block);
            let dq_block = dproducts.f_matmul(&k)?;
            if let Some(roundings) = &mut roundings {
                roundings.add(&Block {
                    first,
                    q: &q,
                    k: &k,
                    v: &v,
                    dout: &dout,
                    scoring: &scoring,
                    scored: &scored,
                    products: &products,
                    dropout: multiplier.as_ref(),
                    weights: &weights,
                    out: &out_block,
                    dweights: &dweights,
                    dout_dot_out: &dout_dot_out,
                    dscores: &dscores,
                    dproducts: &dproducts,
                    dq: &dq_block,
                })?;
            }
            dq.push(dq_block);
            dk = dk.f_add(&dproducts.f_transpose(2, 3)?.f_matmul(&q)?)?;
            dv = dv.f_add(&weights.f_transpose(2, 3)?.f_matmul(&dout)?)?;
            out.push(out_block);
        }

        let dq = Tensor::f_cat(&dq, 2)?;
        let sensitivities = roundings
            .map(|roundings| roundings.finish([&dq, &dk, &dv], [&queries, &keys], &groups))
            .transpose()?;
        let (dq, dq_norm) = queries.gradients(dq)?;
        let (dk, dk_norm) = keys.gradients(groups.sum(&dk)?)?;
        let whole = |blocks: &[Tensor]| match blocks.is_empty() {
            true => Ok(None),
            false => Tensor::f_cat(blocks, 2).map(Some),
        };
        let (out, dv) = (Tensor::f_cat(&out, 2)?, groups.sum(&dv)?);
        let head_state = [whole(&dslopes)?, whole(&dsinks)?, dq_norm, dk_norm];
        let answer = Answer::new([out, dq, dk, dv], head_state);
        // [batch, heads, tokens, ..] -> [batch, tokens, heads, ..]
        let answer = answer.try_map(|_, tensor| tensor.f_transpose(1, 2))?;
        Ok((answer, sensitivities))
    }
}

/// Which query heads attend which KV head.
pub(super) struct Groups {
    kv_of_query: Vec<i64>,
    kv_heads: i64,
    index: Tensor,
}

impl Groups {
    /// Of `kv`, which has KV heads along dimension 1.
    fn new(kv_of_query: &[i64], kv: &Tensor) -> Result<Groups, TchError> {
        Ok(Groups {
            kv_of_query: kv_of_query.to_vec(),
            kv_heads: kv.size()[1],
            index: Tensor::f_from_slice(kv_of_query)?.f_to_device(kv.device())?,
        })
    }

    /// From KV heads to what each query head attends, along dimension 1.
    pub(super) fn expand(&self, kv: &Tensor) -> Result<Tensor, TchError> {
        kv.f_index_select(1, &self.index)
    }

    /// The adjoint of [`Groups::expand`]: the sum over the query heads that
    /// attend a KV head.
    pub(super) fn sum(&self, expanded: &Tensor) -> Result<Tensor, TchError> {
        let mut shape = expanded.size();
        shape[1] = self.kv_heads;
        Tensor::f_zeros(&shape, (Kind::Double, expanded.device()))?.f_index_add(
            1,
            &self.index,
            expanded,
        )
    }

    /// The sums of squares of what a sum over a group is on the way: each
    /// partial sum in the order of heads, but for the first, which is a copy.
    pub(super) fn squared_partial_sums(&self, expanded: &Tensor) -> Result<Tensor, TchError> {
        let mut sums = Vec::new();
        for kv_head in 0..self.kv_heads {
            let of_head = |head: usize| expanded.f_narrow(1, head as i64, 1);
            let mut heads =
                (0..self.kv_of_query.len()).filter(|&head| self.kv_of_query[head] == kv_head);
            let mut partial = match heads.next() {
                Some(head) => of_head(head)?,
                None => expanded.f_narrow(1, 0, 1)?.f_zeros_like()?,
            };
            let mut squares = partial.f_zeros_like()?;
            for head in heads {
                partial = partial.f_add(&of_head(head)?)?;
                squares = squares.f_add(&partial.f_square()?)?;
            }
            sums.push(squares);
        }
        Tensor::f_cat(&sums, 1)
    }
}

fn size4(tensor: &Tensor) -> Result<[i64; 4], TchError> {
    let size = tensor.size();
    let of_four = || TchError::Shape(format!("{size:?} has not four dimensions"));
    size.as_slice().try_into().map_err(|_| of_four())
}

fn float64(array: &Array) -> Result<Tensor, TchError> {
    tensor::from_array(array)?.f_to_kind(Kind::Double)
}

/// `[batch, tokens, heads, head size]` to `[batch, heads, tokens, head size]`.
fn by_heads(array: &Array) -> Result<Tensor, TchError> {
    float64(array)?.f_transpose(1, 2)
}
