//! By how much the roundings of a computation move its numbers, where no
//! formula for that is written out: by sampling.
//!
//! A computation is run once as it is, in float64, and then many times with
//! every rounding that an honest implementation makes replaced by an error of
//! random sign and full size. To first order a number's error is the sum of its
//! sensitivities times these signs, so that the mean square over the runs
//! estimates the sum of squares that Hoeffding's bound asks for
//! (`judge/tolerance.rs`). This is Monte Carlo arithmetic (Parker, "Monte Carlo
//! Arithmetic", 1997) with the worst of distributions in place of the usual.
//!
//! An estimate from n runs may be too small. By Chernoff's bound for the
//! chi-square distribution, P(mean square < x of the true one) is at most
//! `(x e^(1 - x))^(n / 2)`; each root is divided by the `sqrt(x)` for which that
//! is as seldom as a false alarm of one number.
//!
//! A sum of n terms t is taken in any order: one addition after the other rounds
//! each partial sum, and over random orders the squares of these come to
//! `n / 3 (sum t)^2 + n / 6 sum t^2`; the rounding of each product adds `sum t^2`.
//!
//! Errors are drawn larger than they are and scaled back, for in float64 they
//! would drown in the oracle's own.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use fixtures::{Dtype, random};
use tch::{Device, Kind, TchError, Tensor};
use ulysses::Error;
use ulysses::autograd::{self, Function};

/// How many times a computation is run.
const RUNS: u32 = 64;

/// The unit roundoff by which errors are drawn.
const DRAWN: f64 = 1.0 / (1u64 << 26) as f64;

/// The unit roundoff of sums and of intermediate numbers, at most.
const WIDE: Dtype = Dtype::F32;

/// The numbers of a tensor, and by how much roundings move each.
#[derive(Clone, Debug)]
pub(crate) struct RoundedNumbers {
    pub(crate) right: Vec<f64>,
    pub(crate) roots: Vec<f64>,
}

/// What rounds, in one run of a computation; every operation is differentiable,
/// and rounds in its backward as well.
#[derive(Clone)]
pub(crate) struct Rounding {
    /// The unit of what is kept in the element type, and of sums and what is
    /// computed on the way. None in the run that gives the right numbers.
    units: Option<[f64; 2]>,
    drawn: Arc<AtomicU64>,
}

/// The tensors of an answer, by name.
pub(crate) type Computed = BTreeMap<String, Tensor>;

/// Runs a computation once, as it is.
///
/// # Errors
///
/// If libtorch says so.
pub(crate) fn unrounded(
    compute: impl Fn(&Rounding) -> Result<Computed, TchError>,
) -> Result<BTreeMap<String, RoundedNumbers>, TchError> {
    let right = compute(&Rounding {
        units: None,
        drawn: Arc::default(),
    })?;
    let numbers = right.iter().map(|(name, tensor)| {
        let right = numbers(tensor)?;
        let roots = vec![0.0; right.len()];
        Ok((name.clone(), RoundedNumbers { right, roots }))
    });
    numbers.collect()
}

/// Runs a computation in an element type, as often as it takes. `seed` chooses
/// the signs.
///
/// # Errors
///
/// If libtorch says so.
pub(crate) fn rounded(
    dtype: Dtype,
    seed: u64,
    compute: impl Fn(&Rounding) -> Result<Computed, TchError>,
) -> Result<BTreeMap<String, RoundedNumbers>, TchError> {
    let mut answer = unrounded(&compute)?;
    for run in 0..RUNS {
        let moved = compute(&Rounding::drawn(dtype, seed, run as usize))?;
        add_squares(&mut answer, &moved)?;
    }
    finish(&mut answer, dtype);
    Ok(answer)
}

/// The same for a computation that is made of many small tensors: all runs at
/// once, each tensor with one part for each run along its first dimension.
/// `compute` is told how many.
///
/// # Errors
///
/// If libtorch says so.
pub(crate) fn rounded_at_once(
    dtype: Dtype,
    seed: u64,
    compute: impl Fn(&Rounding, i64) -> Result<Computed, TchError>,
) -> Result<BTreeMap<String, RoundedNumbers>, TchError> {
    let mut answer = unrounded(|rounding| compute(rounding, 1))?;
    let moved = compute(&Rounding::drawn(dtype, seed, 0), i64::from(RUNS))?;
    add_squares(&mut answer, &moved)?;
    finish(&mut answer, dtype);
    Ok(answer)
}

/// Adds the squares of how far numbers were moved, in one run or several.
fn add_squares(
    answer: &mut BTreeMap<String, RoundedNumbers>,
    moved: &Computed,
) -> Result<(), TchError> {
    for (name, moved) in moved {
        if let Some(RoundedNumbers { right, roots }) = answer.get_mut(name) {
            for run in numbers(moved)?.chunks(right.len().max(1)) {
                for ((root, right), moved) in roots.iter_mut().zip(&*right).zip(run) {
                    *root += (moved - right) * (moved - right);
                }
            }
        }
    }
    Ok(())
}

/// From sums of squares to roots.
fn finish(answer: &mut BTreeMap<String, RoundedNumbers>, dtype: Dtype) {
    let stored = dtype.unit_roundoff();
    let scale = stored / DRAWN / smallest_share().sqrt();
    for RoundedNumbers { roots, .. } in answer.values_mut() {
        for root in roots {
            *root = scale * (*root / f64::from(RUNS)).sqrt();
            // What is 0 in every run is 0 in every order.
            if *root > 0.0 {
                *root = root.hypot(dtype.smallest_roundoff());
            }
        }
    }
}

/// The share x of a mean square that its estimate falls short of as seldom as a
/// number is blamed for nothing.
fn smallest_share() -> f64 {
    let seldom = (crate::judge::FALSE_ALARM_OF_RUN / crate::judge::NUMBERS).ln();
    let log_probability = |x: f64| f64::from(RUNS) / 2.0 * (x.ln() + 1.0 - x);
    let (mut low, mut high) = (0.0, 1.0);
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        match log_probability(middle) < seldom {
            true => low = middle,
            false => high = middle,
        }
    }
    low
}

fn numbers(tensor: &Tensor) -> Result<Vec<f64>, TchError> {
    Vec::try_from(tensor.f_contiguous()?.f_view(-1)?)
}

impl Rounding {
    /// Errors of random sign in an element type.
    fn drawn(dtype: Dtype, seed: u64, run: usize) -> Rounding {
        let stored = dtype.unit_roundoff();
        let wide = stored.min(WIDE.unit_roundoff());
        Rounding {
            units: Some([DRAWN, DRAWN * wide / stored]),
            drawn: Arc::new(AtomicU64::new(random::hash(seed, 0, run, 0, 0))),
        }
    }

    /// What is given: a leaf, whose gradient is kept in the element type.
    pub(crate) fn leaf(&self, x: &Tensor) -> Result<Tensor, TchError> {
        self.apply(Rounded::new(self, None, Some(0)), &[x])
    }

    /// What is kept in the element type, as its gradient is.
    pub(crate) fn stored(&self, x: &Tensor) -> Result<Tensor, TchError> {
        self.apply(Rounded::new(self, Some(0), Some(0)), &[x])
    }

    /// The result of one operation on single numbers on the way.
    pub(crate) fn wide(&self, x: &Tensor) -> Result<Tensor, TchError> {
        self.apply(Rounded::new(self, Some(1), Some(1)), &[x])
    }

    /// The product of [.., n] and [n, k], its sums in any order.
    pub(crate) fn matmul(&self, a: &Tensor, b: &Tensor) -> Result<Tensor, TchError> {
        let product = Product {
            rounding: self.clone(),
            factors: None,
        };
        self.apply(product, &[a, b])
    }

    /// The products of two batches of matrices, [.., m, n] and [.., n, k], their
    /// sums in any order.
    pub(crate) fn matmuls(&self, a: &Tensor, b: &Tensor) -> Result<Tensor, TchError> {
        let products = Products {
            rounding: self.clone(),
            factors: None,
        };
        self.apply(products, &[a, b])
    }

    /// The rows `places` of each of a batch of tables, [runs, rows, channels]. A
    /// row's gradient is a sum over the places where it was taken, in any order.
    pub(crate) fn rows(&self, tables: &Tensor, places: &Tensor) -> Result<Tensor, TchError> {
        let rows = Rows {
            rounding: self.clone(),
            places: places.shallow_clone(),
            count: tables.size()[1],
        };
        self.apply(rows, &[tables])
    }

    /// The sum over the last dimension, in any order.
    pub(crate) fn sum(&self, x: &Tensor) -> Result<Tensor, TchError> {
        let terms = *x.size().last().unwrap_or(&1);
        let ones = Tensor::f_ones([terms, 1], (Kind::Double, Device::Cpu))?;
        self.matmul(x, &ones)?.f_squeeze_dim(-1)
    }

    fn apply(&self, function: impl Function, inputs: &[&Tensor]) -> Result<Tensor, TchError> {
        let mut outputs = autograd::apply(function, inputs).map_err(failed)?;
        Ok(outputs.swap_remove(0))
    }

    /// `x` moved by the unit of this number times `size`, each element with a
    /// sign of its own.
    fn moved(&self, x: &Tensor, unit: usize, size: &Tensor) -> Result<Tensor, TchError> {
        let Some(units) = self.units else {
            return Ok(x.shallow_clone());
        };
        let signs = self.signs(x.numel())?.f_view(&x.size()[..])?;
        x.f_add(&signs.f_mul(size)?.f_mul_scalar(units[unit])?)
    }

    fn signs(&self, count: usize) -> Result<Tensor, TchError> {
        let words = count.div_ceil(64) as u64;
        let first = self.drawn.fetch_add(words, Ordering::Relaxed);
        let signs: Vec<f64> = (0..words)
            .flat_map(|word| {
                let bits = random::mix(first + word);
                (0..64).map(move |bit| if bits >> bit & 1 == 0 { 1.0 } else { -1.0 })
            })
            .take(count)
            .collect();
        Tensor::f_from_slice(&signs)
    }

    /// A product, and by what its sums round.
    fn product(&self, a: &Tensor, b: &Tensor) -> Result<Tensor, TchError> {
        let product = a.f_matmul(b)?;
        if self.units.is_none() {
            return Ok(product);
        }
        let terms = *a.size().last().unwrap_or(&1) as f64;
        let squares = a.f_square()?.f_matmul(&b.f_square()?)?;
        let size = squares
            .f_mul_scalar(1.0 + terms / 6.0)?
            .f_add(&product.f_square()?.f_mul_scalar(terms / 3.0)?)?
            .f_sqrt()?;
        self.moved(&product, 1, &size)
    }
}

fn failed(error: Error) -> TchError {
    TchError::Torch(error.to_string())
}

/// A tensor that is rounded to a unit, or not, and its gradient likewise.
struct Rounded {
    rounding: Rounding,
    forward: Option<usize>,
    backward: Option<usize>,
}

impl Rounded {
    fn new(rounding: &Rounding, forward: Option<usize>, backward: Option<usize>) -> Rounded {
        Rounded {
            rounding: rounding.clone(),
            forward,
            backward,
        }
    }

    fn round(&self, x: &Tensor, unit: Option<usize>) -> ulysses::Result<Tensor> {
        Ok(match unit {
            Some(unit) => self.rounding.moved(x, unit, &x.f_abs()?)?,
            None => x.shallow_clone(),
        })
    }
}

impl Function for Rounded {
    fn forward(&mut self, inputs: &[Tensor]) -> ulysses::Result<Vec<Tensor>> {
        Ok(vec![self.round(&inputs[0], self.forward)?])
    }

    fn backward(&mut self, cotangents: &[Tensor]) -> ulysses::Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(self.round(&cotangents[0], self.backward)?)])
    }
}

/// A product of matrices, and its two products in backward.
struct Product {
    rounding: Rounding,
    factors: Option<[Tensor; 2]>,
}

impl Function for Product {
    fn forward(&mut self, inputs: &[Tensor]) -> ulysses::Result<Vec<Tensor>> {
        let [a, b] = [&inputs[0], &inputs[1]];
        self.factors = Some([a.shallow_clone(), b.shallow_clone()]);
        Ok(vec![self.rounding.product(a, b)?])
    }

    fn backward(&mut self, cotangents: &[Tensor]) -> ulysses::Result<Vec<Option<Tensor>>> {
        let Some([a, b]) = &self.factors else {
            return Ok(vec![None, None]);
        };
        let flat = |x: &Tensor| {
            let size = x.size();
            let (columns, rows) = size.split_last().unwrap_or((&1, &[]));
            x.f_contiguous()?.f_view([rows.iter().product(), *columns])
        };
        let (rows, cotangent) = (flat(a)?, flat(&cotangents[0])?);
        let of_a = self.rounding.product(&cotangent, &b.f_transpose(0, 1)?)?;
        let of_b = self
            .rounding
            .product(&rows.f_transpose(0, 1)?, &cotangent)?;
        Ok(vec![Some(of_a.f_view(&a.size()[..])?), Some(of_b)])
    }
}

/// Products of two batches of matrices, and their products in backward.
struct Products {
    rounding: Rounding,
    factors: Option<[Tensor; 2]>,
}

impl Function for Products {
    fn forward(&mut self, inputs: &[Tensor]) -> ulysses::Result<Vec<Tensor>> {
        let [a, b] = [&inputs[0], &inputs[1]];
        self.factors = Some([a.shallow_clone(), b.shallow_clone()]);
        Ok(vec![self.rounding.product(a, b)?])
    }

    fn backward(&mut self, cotangents: &[Tensor]) -> ulysses::Result<Vec<Option<Tensor>>> {
        let Some([a, b]) = &self.factors else {
            return Ok(vec![None, None]);
        };
        let cotangent = &cotangents[0];
        let of_a = self.rounding.product(cotangent, &b.f_transpose(-2, -1)?)?;
        let of_b = self.rounding.product(&a.f_transpose(-2, -1)?, cotangent)?;
        Ok(vec![Some(of_a), Some(of_b)])
    }
}

/// Rows of tables, and the sums over them in backward.
struct Rows {
    rounding: Rounding,
    places: Tensor,
    count: i64,
}

impl Function for Rows {
    fn forward(&mut self, inputs: &[Tensor]) -> ulysses::Result<Vec<Tensor>> {
        Ok(vec![inputs[0].f_index_select(1, &self.places)?])
    }

    fn backward(&mut self, cotangents: &[Tensor]) -> ulysses::Result<Vec<Option<Tensor>>> {
        let cotangent = &cotangents[0];
        let mut size = cotangent.size();
        size[1] = self.count;
        let zeros = Tensor::f_zeros(&size, (Kind::Double, Device::Cpu))?;
        let added = |x: &Tensor| zeros.f_index_add(1, &self.places, x);
        let sum = added(cotangent)?;
        // Of one term and its product, as `product` rounds them.
        let terms = added(&cotangent.f_ones_like()?)?;
        let weight = terms.f_div_scalar(6.0)?.f_add_scalar(1.0)?;
        let squares = added(&cotangent.f_square()?)?.f_mul(&weight)?;
        let of_sum = sum.f_square()?.f_mul(&terms.f_div_scalar(3.0)?)?;
        let size = squares.f_add(&of_sum)?.f_sqrt()?;
        Ok(vec![Some(self.rounding.moved(&sum, 1, &size)?)])
    }
}
