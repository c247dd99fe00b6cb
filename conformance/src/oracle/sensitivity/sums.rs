//! What gradients that are sums over tokens are off by, and the sums that all of
//! this is written in.

use tch::{Kind, TchError, Tensor};

use crate::oracle::precision::Roundoffs;

/// Of a gradient of keys or values, for each query head.
#[derive(Default)]
pub(super) struct KeySums {
    /// Of each row on its own.
    squares: Option<Tensor>,
    /// The gradient, as far as blocks have been seen.
    partial: Option<Tensor>,
    /// The squares of what it was after each block of rows.
    partial_squares: Option<Tensor>,
    /// The sum of the sizes of what is added up.
    sizes: Option<Tensor>,
    rows: f64,
}

/// Of a gradient of head state, for each block of rows: squares and parts.
#[derive(Default)]
pub(super) struct HeadSums {
    pub(super) squares: Vec<Tensor>,
    pub(super) parts: Vec<Tensor>,
}

impl KeySums {
    /// Adds a block of rows: the squares of its rows, and the numbers `[batch,
    /// query heads, rows, keys]` and `[batch, query heads, rows, channels]` of
    /// whose products the gradient is the sum.
    pub(super) fn add(
        &mut self,
        squares: Tensor,
        numbers: &Tensor,
        vectors: &Tensor,
        rows_of_partial_sum: i64,
    ) -> Result<(), TchError> {
        let plus = |sum: &Option<Tensor>, more: Tensor| match sum {
            Some(sum) => sum.f_add(&more),
            None => Ok(more),
        };
        let split = |tensor: &Tensor| tensor.f_split(rows_of_partial_sum, 2);
        for (numbers, vectors) in split(numbers)?.iter().zip(split(vectors)?) {
            let by_keys = numbers.f_transpose(2, 3)?;
            let partial = plus(&self.partial, by_keys.f_matmul(&vectors)?)?;
            self.partial_squares = Some(plus(&self.partial_squares, partial.f_square()?)?);
            self.partial = Some(partial);
            let sizes = by_keys.f_abs()?.f_matmul(&vectors.f_abs()?)?;
            self.sizes = Some(plus(&self.sizes, sizes)?);
        }
        self.squares = Some(plus(&self.squares, squares)?);
        self.rows += numbers.size()[2] as f64;
        Ok(())
    }

    /// The squares of a query head's gradient.
    pub(super) fn squares(
        self,
        gradient: &Tensor,
        roundoffs: &Roundoffs,
    ) -> Result<Tensor, TchError> {
        let (Some(squares), Some(partial_squares), Some(sizes)) =
            (self.squares, self.partial_squares, self.sizes)
        else {
            return Err(TchError::Shape("there is no row".to_owned()));
        };
        total(&[
            &squares,
            &partial_squares.f_mul_scalar(roundoffs.element)?,
            &sizes.f_square()?.f_mul_scalar(roundoffs.sum * self.rows)?,
            &gradient.f_square()?.f_mul_scalar(roundoffs.stored)?,
        ])?
        .f_add_scalar(roundoffs.tiny)
    }
}

impl HeadSums {
    pub(super) fn add(&mut self, squares: Tensor, parts: Tensor) {
        self.squares.push(squares);
        self.parts.push(parts);
    }

    /// The squares of the sum over batch and tokens, `[heads, ..]`, of parts
    /// `[batch, heads, tokens, ..]`: each part's own, each partial sum's, and
    /// what it takes to store a part and the whole.
    pub(super) fn over_tokens(self, roundoffs: &Roundoffs) -> Result<Tensor, TchError> {
        let whole = |blocks: &[Tensor]| Tensor::f_cat(blocks, 2);
        let sum =
            |tensor: &Tensor| tensor.f_sum_dim_intlist([0, 2].as_slice(), false, Kind::Double);
        let (squares, parts) = (whole(&self.squares)?, whole(&self.parts)?);
        let terms = (parts.size()[0] * parts.size()[2]) as f64;
        total(&[
            &sum(&squares)?,
            &sum(&parts.f_abs()?)?
                .f_square()?
                .f_mul_scalar(roundoffs.sum * terms)?,
            &sum(&parts.f_square()?)?.f_mul_scalar(roundoffs.element)?,
            &sum(&parts)?.f_square()?.f_mul_scalar(roundoffs.element)?,
        ])?
        .f_add_scalar(roundoffs.tiny * terms)
    }
}

/// The sum over the last dimension, which stays.
pub(super) fn over_keys(tensor: &Tensor) -> Result<Tensor, TchError> {
    tensor.f_sum_dim_intlist([-1].as_slice(), true, Kind::Double)
}

/// The elementwise sum of several tensors.
pub(super) fn total(terms: &[&Tensor]) -> Result<Tensor, TchError> {
    let (first, more) = split(terms)?;
    more.iter()
        .try_fold(first.shallow_clone(), |sum, term| sum.f_add(term))
}

/// The elementwise product of several tensors.
pub(super) fn product(factors: &[&Tensor]) -> Result<Tensor, TchError> {
    let (first, more) = split(factors)?;
    more.iter()
        .try_fold(first.shallow_clone(), |product, factor| {
            product.f_mul(factor)
        })
}

fn split<'a, 'b>(tensors: &'b [&'a Tensor]) -> Result<(&'a Tensor, &'b [&'a Tensor]), TchError> {
    tensors
        .split_first()
        .map(|(first, more)| (*first, more))
        .ok_or_else(|| TchError::Shape("there is no tensor".to_owned()))
}
