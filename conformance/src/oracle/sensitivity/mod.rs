//! How far roundings move each number of an answer: its first-order
//! sensitivity to each rounding that attention makes, squared, times the
//! square of what that rounding may be, summed. In short its *squares*.
//!
//! | what is rounded | by at most |
//! |---|---|
//! | a score s of a query q and a key k, a sum of D products | `w sqrt(D) scale sum abs(q k)`, and `x` times its terms and itself |
//! | an exponential, of which a weight P is made | `w` times 6 and the distance to the largest score |
//! | the sum of a row's n exponentials, and its logarithm L | `w sqrt(n)` and `w L`, relative |
//! | P as a factor of P V and of P^T dO | `u P` |
//! | dP = dO V^T | `w sqrt(Dv) sum abs(dO v)`, and `x dP` |
//! | D = rowsum(dO O) or rowsum(P dP) | what its terms are, and the sum |
//! | dS = P (dP - D), as a factor of dS K and of dS^T Q | `u dS`, and `x dS` for each step |
//! | an answer, a sum of n products | `u` times itself, and `w sqrt(n)` times the sum of the products' sizes |
//! | what is added up in the element type: dQ block of keys after block of keys; dK and dV block of rows after block of rows, and query head after query head of a group | `u` times each partial sum |
//!
//! u is the unit roundoff of the element type, w that of sums (at least
//! float32's), and x that of what a precision profile stores (`precision.rs`).
//! A sum of n terms has n partial sums, none larger than the sum of the terms'
//! sizes: so `sqrt(n)` times that bounds it in whatever order it is taken.
//!
//! A fused kernel recomputes the scores in backward, and its roundings there
//! are others than those in forward, from which the row's sum, out and D are. So
//! with `c` the derivative of a cap, `L = c dS + dS (dc/ds)`, and errors b_ij of
//! a score in backward and f_ij in forward, to first order
//!
//! ```text
//! out_i   is off by  sum_j P_ij (V_j - out_i) f_ij
//! dV_j               sum_i P_ij (b_ij - l_i) dO_i                l_i = sum_j P_ij f_ij
//! dQ_i               scale sum_j (L_ij b_ij - c dS_ij l_i - c P_ij d_i) k_j
//! dK_j               scale sum_i (L_ij b_ij - c dS_ij l_i - c P_ij d_i) q_i
//!                                                     d_i = sum_j dS_ij f_ij
//! ```
//!
//! The l_i and d_i are shared by a row, and so are the other errors of its sum
//! and of D.
//!
//! Source: Higham and Mary, "A new approach to probabilistic rounding error
//! analysis", SIAM J. Sci. Comput. 41(5), 2019, for roundings as independent
//! errors of mean zero.

mod backward;
mod sums;

use tch::{Kind, TchError, Tensor};

use self::sums::{HeadSums, KeySums, over_keys, product, total};
use super::answer::Answer;
use super::precision::Roundoffs;
use super::preparation::Prepared;
use super::problem::Groups;
use super::scores::{Scoring, Weights};

/// After how many keys and, in a sequence of so many tokens, after how many rows
/// sums are stored in the element type: as in PyTorch's flash attention for
/// CPUs, ATen/native/cpu/FlashAttentionKernel.cpp.
const KEYS_OF_PARTIAL_SUM: i64 = 512;

fn rows_of_partial_sum(tokens: i64) -> i64 {
    match tokens {
        ..192 => 32,
        192..768 => 64,
        _ => 256,
    }
}

/// Squares of an answer, each tensor in the order of the answer, gradients of
/// head state summed over tokens.
pub(crate) type Sensitivities = Answer<Tensor>;

/// A block of rows of the score matrix on its way through forward and backward;
/// `[batch, query heads, rows, ..]` each, keys and values whole.
pub(super) struct Block<'a> {
    /// The token of the first row.
    pub(super) first: i64,
    pub(super) q: &'a Tensor,
    pub(super) k: &'a Tensor,
    pub(super) v: &'a Tensor,
    pub(super) dout: &'a Tensor,
    pub(super) scoring: &'a Scoring<'a>,
    pub(super) scored: &'a Weights,
    /// `q k^T`
    pub(super) products: &'a Tensor,
    pub(super) dropout: Option<&'a Tensor>,
    /// The softmax, after dropout.
    pub(super) weights: &'a Tensor,
    pub(super) out: &'a Tensor,
    /// dP, after dropout.
    pub(super) dweights: &'a Tensor,
    /// D, a number for each row.
    pub(super) dout_dot_out: &'a Tensor,
    pub(super) dscores: &'a Tensor,
    /// The gradient of `q k^T`.
    pub(super) dproducts: &'a Tensor,
    pub(super) dq: &'a Tensor,
}

/// Squares, as far as blocks have been seen.
pub(super) struct Roundings {
    roundoffs: Roundoffs,
    /// Of prepared queries, where they are prepared.
    of_q: Option<Tensor>,
    /// Of prepared keys, for each query head.
    of_k: Option<Tensor>,
    out: Vec<Tensor>,
    dq: Vec<Tensor>,
    dk: KeySums,
    dv: KeySums,
    /// After how many rows sums over rows are stored.
    rows_of_partial_sum: i64,
    dslopes: HeadSums,
    dsinks: HeadSums,
}

/// What the roundings of a block's scores and weights are, in squares.
struct OfBlock {
    /// Of each score, `[batch, query heads, rows, keys]`.
    scores: Tensor,
    /// Of each row's sum, relative, `[batch, query heads, rows, 1]`.
    row: Tensor,
    /// 1 where a key is seen, 0 elsewhere.
    seen: Tensor,
    /// How many keys each row sees.
    keys: Tensor,
}

impl Roundings {
    pub(super) fn new(roundoffs: Roundoffs) -> Roundings {
        Roundings {
            roundoffs,
            of_q: None,
            of_k: None,
            out: Vec::new(),
            dq: Vec::new(),
            dk: KeySums::default(),
            dv: KeySums::default(),
            rows_of_partial_sum: 1,
            dslopes: HeadSums::default(),
            dsinks: HeadSums::default(),
        }
    }

    /// Notes how queries and keys were prepared.
    pub(super) fn begin(
        &mut self,
        queries: &Prepared,
        keys: &Prepared,
        groups: &Groups,
    ) -> Result<(), TchError> {
        self.of_q = queries.squares(&self.roundoffs)?;
        self.of_k = keys
            .squares(&self.roundoffs)?
            .map(|squares| groups.expand(&squares))
            .transpose()?;
        self.rows_of_partial_sum = rows_of_partial_sum(queries.heads.size()[2]);
        Ok(())
    }

    /// Adds a block of rows.
    pub(super) fn add(&mut self, block: &Block<'_>) -> Result<(), TchError> {
        let of_block = self.of_scores(block)?;
        self.forward(block, &of_block)?;
        self.backward(block, &of_block)
    }

    fn of_scores(&self, block: &Block<'_>) -> Result<OfBlock, TchError> {
        let Roundoffs {
            element,
            stored,
            sum,
            factors,
            ..
        } = self.roundoffs;
        let (scoring, scored) = (block.scoring, block.scored);
        let scale2 = scoring.scale * scoring.scale;
        let channels = block.q.size()[3] as f64;
        let [q2, k2] = [block.q, block.k].map(Tensor::f_square);
        let (q2, k2_transposed) = (q2?, k2?.f_transpose(2, 3)?);
        let sizes = block
            .q
            .f_abs()?
            .f_matmul(&block.k.f_abs()?.f_transpose(2, 3)?)?;
        let terms2 = q2.f_matmul(&k2_transposed)?;
        let scores = block.products.f_mul_scalar(scoring.scale)?;
        let mut squares = total(&[
            &sizes.f_square()?.f_mul_scalar(sum * channels * scale2)?,
            &terms2.f_mul_scalar((2.0 * stored + factors) * scale2)?,
            &scores.f_square()?.f_mul_scalar(2.0 * stored)?,
        ])?;
        if let Some(of_q) = &self.of_q {
            let of_q = of_q.f_narrow(2, block.first, block.q.size()[2])?;
            let moved = of_q.f_matmul(&k2_transposed)?.f_mul_scalar(scale2)?;
            squares = squares.f_add(&moved)?;
        }
        if let Some(of_k) = &self.of_k {
            let moved = q2.f_matmul(&of_k.f_transpose(2, 3)?)?;
            squares = squares.f_add(&moved.f_mul_scalar(scale2)?)?;
        }
        if let Some(of_cap) = scored.of_cap()? {
            let of_cap2 = of_cap.f_square()?;
            let divided = scores.f_square()?.f_mul_scalar(stored)?;
            squares = squares.f_add(&divided)?.f_mul(&of_cap2)?;
            // A tanh is off by two units, and its multiple by one.
            let capped = scored.scores.f_square()?.f_mul_scalar(5.0 * stored)?;
            squares = squares.f_add(&capped)?;
        }
        if let Some((slopes, distances)) = scoring.slopes.zip(scoring.distances.as_ref()) {
            let bias2 = slopes.f_mul(distances)?.f_square()?;
            squares = total(&[
                &squares,
                &bias2.f_mul_scalar(2.0 * element)?,
                &scored.scores.f_square()?.f_mul_scalar(stored)?,
            ])?;
        }
        let seen = scored.weights.f_gt(0.0)?.f_to_kind(Kind::Double)?;
        let keys = over_keys(&seen)?;
        // A row that sees nothing has no largest score.
        let is_blind = keys.f_eq(0.0)?;
        let largest = scored.largest.f_masked_fill(&is_blind, 0.0)?;
        let log_total = scored.log_total.f_masked_fill(&is_blind, 0.0)?;
        // An exponential is off by two units, and by its argument's rounding;
        // two more make a weight of it.
        let away = scored.scores.f_sub(&largest)?.f_square()?;
        let squares = squares.f_add(&away.f_add_scalar(6.0)?.f_mul_scalar(sum)?)?;
        let logarithm2 = largest.f_add(&log_total)?.f_square()?;
        Ok(OfBlock {
            scores: squares,
            row: keys
                .f_add(&logarithm2)?
                .f_add_scalar(6.0)?
                .f_mul_scalar(sum)?,
            seen,
            keys,
        })
    }

    /// out = W V.
    fn forward(&mut self, block: &Block<'_>, of: &OfBlock) -> Result<(), TchError> {
        let Roundoffs {
            element,
            sum,
            factors,
            tiny,
            ..
        } = self.roundoffs;
        let (softmax, weights, out) = (&block.scored.weights, block.weights, block.out);
        let (weights2, v2, out2) = (weights.f_square()?, block.v.f_square()?, out.f_square()?);
        let stores = if block.dropout.is_some() { 2.0 } else { 1.0 };
        let along = product(&[&of.scores, weights, softmax])?.f_matmul(block.v)?;
        let of_scores = total(&[
            &of.scores.f_mul(&weights2)?.f_matmul(&v2)?,
            &product(&[&along, out])?.f_mul_scalar(-2.0)?,
            &out2.f_mul(&over_keys(&of.scores.f_mul(&softmax.f_square()?)?)?)?,
        ])?
        .f_clamp_min(0.0)?;
        let sizes = weights.f_matmul(&block.v.f_abs()?)?;
        let squares = total(&[
            &of_scores,
            &weights2
                .f_matmul(&v2)?
                .f_mul_scalar(stores * element + factors)?,
            &out2.f_mul(&of.row)?,
            &sizes.f_square()?.f_mul(&of.keys)?.f_mul_scalar(sum)?,
            &out2.f_mul_scalar(element)?,
        ])?;
        // Of weights that are small, and of the output itself.
        let of_tiny = of
            .seen
            .f_matmul(&v2)?
            .f_add_scalar(1.0)?
            .f_mul_scalar(tiny)?;
        self.out.push(squares.f_add(&of_tiny)?);

        // dV = W^T dO.
        let row = over_keys(&of.scores.f_mul(&softmax.f_square()?)?)?;
        let of_weights = of
            .scores
            .f_add(&row)?
            .f_add(&of.row)?
            .f_add_scalar(stores * element + factors)?
            .f_mul(&weights2)?
            .f_add(&of.seen.f_mul_scalar(tiny)?)?;
        let squares = of_weights
            .f_transpose(2, 3)?
            .f_matmul(&block.dout.f_square()?)?;
        self.dv
            .add(squares, weights, block.dout, self.rows_of_partial_sum)
    }

    /// The squares of the whole answer, given the gradients of the prepared
    /// queries and, for each query head, of keys and values.
    pub(super) fn finish(
        self,
        [dq, dk, dv]: [&Tensor; 3],
        [queries, keys]: [&Prepared; 2],
        groups: &Groups,
    ) -> Result<Sensitivities, TchError> {
        let roundoffs = self.roundoffs;
        let of_keys = |sums: KeySums, gradient: &Tensor| -> Result<Tensor, TchError> {
            groups.sum(&sums.squares(gradient, &roundoffs)?)?.f_add(
                &groups
                    .squared_partial_sums(gradient)?
                    .f_mul_scalar(roundoffs.element)?,
            )
        };
        let of_dq = Tensor::f_cat(&self.dq, 2)?;
        let (of_dk, of_dv) = (of_keys(self.dk, dk)?, of_keys(self.dv, dv)?);
        let (dq, dq_norm) = queries.gradient_squares(dq, of_dq, &roundoffs)?;
        let (dk, dk_norm) = keys.gradient_squares(&groups.sum(dk)?, of_dk, &roundoffs)?;
        let over_tokens = |sums: Option<HeadSums>| -> Result<Option<Tensor>, TchError> {
            sums.map(|sums| sums.over_tokens(&roundoffs)).transpose()
        };
        let of_norm = |norm: Option<(Tensor, Tensor)>| {
            norm.map(|(squares, part)| HeadSums {
                squares: vec![squares],
                parts: vec![part],
            })
        };
        let of_scalar = |sums: HeadSums| (!sums.parts.is_empty()).then_some(sums);
        let one_number =
            |squares: Option<Tensor>| squares.map(|squares| squares.f_squeeze_dim(-1)).transpose();
        let head_state = [
            one_number(over_tokens(of_scalar(self.dslopes))?)?,
            one_number(over_tokens(of_scalar(self.dsinks))?)?,
            over_tokens(of_norm(dq_norm))?,
            over_tokens(of_norm(dk_norm))?,
        ];
        let squares = Answer::new([Tensor::f_cat(&self.out, 2)?, dq, dk, of_dv], head_state);
        squares.try_map(|name, tensor| {
            let tensor = match name.is_head_state() {
                true => tensor,
                false => tensor.f_transpose(1, 2)?,
            };
            tensor.f_mul_scalar(roundoffs.of_oracle)
        })
    }
}
