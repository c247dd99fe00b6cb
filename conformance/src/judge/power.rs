//! What a case can show, computed from its own numbers.
//!
//! A case whose answer cannot tell right from wrong lets every implementation
//! pass. So from the right numbers and their tolerances follow the mistakes that
//! the comparison would have seen: the smallest factor by which all of a tensor
//! may be wrong, rows that may be lost, heads that may be in each other's place,
//! rows that may hold the next token's. A case that would miss more than it
//! claims to see is at fault itself, whatever was answered.

use fixtures::exchange::Precision;
use fixtures::{AttentionCase, Inputs};

use super::comparison::Yardstick;
use super::ruler::Ruler;
use super::tolerance::lambda;
use crate::implementation::Means;
use crate::oracle::AnswerTensor;

/// A factor of 1.25, and every one further from 1, is seen in each tensor: by
/// less than 4/3 nobody is known to have taken two numbers of ranks for one
/// another.
pub const SCALE: f64 = 0.25;

/// Of the mistakes that concern a single row, so many are seen. One that
/// concerns n rows is missed with a probability of at most (1 - SHARE)^n.
pub const SHARE: f64 = 0.6;

/// What the comparison of one tensor would see.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Power {
    /// Which tensor.
    pub tensor: AnswerTensor,
    /// The smallest relative error of all numbers alike that is seen.
    pub scale: f64,
    /// The share of rows that are seen if they are zero.
    pub rows: f64,
    /// The share of pairs of neighbouring heads that are seen if they are in
    /// each other's place; 1 where there is one head.
    pub heads: f64,
    /// The share of rows that are seen if they hold the next token's; 1 where
    /// there is one token.
    pub shifts: f64,
}

impl Power {
    /// Why this is less than a case has to have.
    fn lack(&self) -> Option<String> {
        let name = self.tensor.name();
        if self.scale > SCALE {
            return Some(format!(
                "a factor of {:.3} in {name} would not be seen",
                1.0 + self.scale
            ));
        }
        let shares = [
            (self.rows, "a lost row of"),
            (self.heads, "two heads in each other's place in"),
            (self.shifts, "a row with the next token's numbers in"),
        ];
        let (share, what) = shares.into_iter().find(|(share, _)| *share < SHARE)?;
        Some(format!(
            "{what} {name} would be seen in {:.0} of 100 places",
            100.0 * share
        ))
    }
}

/// What each tensor of a case shows.
pub(crate) fn of(yardstick: &Yardstick) -> Vec<Power> {
    AnswerTensor::ALL
        .into_iter()
        .filter_map(|tensor| Some(of_ruler(tensor, yardstick.ruler(tensor)?)))
        .collect()
}

/// What each tensor of a case shows of an implementation that rounds by this
/// profile; of one that drops weights nothing, for its answer says which.
///
/// # Errors
///
/// If there is no right answer to measure by.
pub fn of_case(case: &AttentionCase, precision: Precision) -> Result<Vec<Power>, String> {
    Yardstick::of(case, &Inputs::of(case), (precision, Means::default()), None)
        .map(|yardstick| of(&yardstick))
}

/// Why the case cannot show what it is there for, if that is so.
pub(super) fn lack(yardstick: &Yardstick) -> Option<String> {
    of(yardstick).into_iter().find_map(|power| power.lack())
}

fn of_ruler(tensor: AnswerTensor, ruler: &Ruler) -> Power {
    let channels = ruler.channels();
    let rows: Vec<_> = (0..ruler.right.len() / channels).collect();
    let row = |row: usize| row * channels..(row + 1) * channels;
    // Whether it is seen that row a holds these numbers.
    let is_seen = |a: usize, numbers: &dyn Fn(usize) -> f64| {
        row(a).enumerate().any(|(channel, number)| {
            (numbers(channel) - ruler.right[number]).abs() > ruler.tolerance(number)
        })
    };
    let other = |b: usize| move |channel: usize| ruler.right[b * channels + channel];
    // What no tolerance lets tell from nothing is nothing.
    let is_something =
        |a: &usize| row(*a).any(|number| ruler.right[number].abs() > ruler.roots[number]);
    let some: Vec<usize> = rows.into_iter().filter(is_something).collect();
    let share = |places: &[(usize, usize)]| {
        let differ = |&&(a, b): &&(usize, usize)| {
            row(a)
                .zip(row(b))
                .any(|(a, b)| ruler.right[a] != ruler.right[b])
        };
        let places: Vec<_> = places.iter().filter(differ).collect();
        let seen = places.iter().filter(|(a, b)| is_seen(*a, &other(*b)));
        match places.len() {
            0 => 1.0,
            all => seen.count() as f64 / all as f64,
        }
    };
    let lost = some.iter().filter(|&&a| is_seen(a, &|_| 0.0)).count();
    Power {
        tensor,
        // Where a query sees one key, dQ is zero and has no factor.
        scale: if some.is_empty() {
            0.0
        } else {
            smallest_scale(ruler, channels)
        },
        rows: if some.is_empty() {
            1.0
        } else {
            lost as f64 / some.len() as f64
        },
        heads: share(&ruler.neighbouring_heads(&some)),
        shifts: share(&ruler.next_tokens(&some)),
    }
}

/// The smallest relative error of all numbers that one of them shows, or that
/// all of them together do.
fn smallest_scale(ruler: &Ruler, channels: usize) -> f64 {
    let one = (0..ruler.right.len())
        .map(|number| ruler.right[number].abs() / ruler.tolerance(number))
        .filter(|ratio| ratio.is_finite())
        .fold(0.0, f64::max);
    let leans: Vec<f64> = ruler
        .right
        .chunks(channels)
        .zip(ruler.roots.chunks(channels))
        .map(|(right, roots)| {
            right.iter().map(|x| x.abs()).sum::<f64>() / roots.iter().sum::<f64>()
        })
        .filter(|lean| lean.is_finite())
        .collect();
    let all = leans.iter().sum::<f64>() / (leans.len() as f64).sqrt() / lambda();
    1.0 / one.max(all)
}
