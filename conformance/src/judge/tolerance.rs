//! How far a number of an answer may be off.
//!
//! An honest implementation rounds. The oracle derives, for each number e of
//! the right answer, by how much one unit of each rounding moves it, and gives
//! the root `r_e` of the sum of the squares (`oracle/sensitivity.rs`). Roundings
//! are independent, of mean zero and bounded, so that by Hoeffding ("Probability
//! inequalities for sums of bounded random variables", 1963, theorem 2) the
//! error of e exceeds
//!
//! ```text
//! tolerance_e = lambda r_e        lambda = sqrt(2 ln(2 N / alpha))
//! ```
//!
//! with a probability of at most `alpha / N`. [`NUMBERS`] is the N of every
//! run: a verdict does not depend on which cases were asked beside it. A run
//! that compares fewer numbers has a smaller chance of a false alarm, and
//! [`false_alarm`] tells it.
//!
//! Roundings that lean to one side stay below such a bound, number by number,
//! and add up over many. So the errors of a row, each taken as positive where
//! it makes its number larger, are added up and divided by the sum of their
//! roots: that is at most a unit of one bounded error of mean zero, whatever
//! the numbers of a row share. Over n rows the sum of these exceeds
//! `lambda sqrt(n)` as seldom.

/// How many numbers a run may compare for [`FALSE_ALARM_OF_RUN`] to hold.
pub const NUMBERS: f64 = (1u64 << 30) as f64;

/// The probability that a run over [`NUMBERS`] numbers blames an honest
/// implementation once.
pub const FALSE_ALARM_OF_RUN: f64 = 1e-6;

/// How many of its roots a number may be off.
pub fn lambda() -> f64 {
    (2.0 * (2.0 * NUMBERS / FALSE_ALARM_OF_RUN).ln()).sqrt()
}

/// The probability that a run over this many numbers blames an honest
/// implementation once.
pub fn false_alarm(numbers: usize) -> f64 {
    FALSE_ALARM_OF_RUN * numbers as f64 / NUMBERS
}
