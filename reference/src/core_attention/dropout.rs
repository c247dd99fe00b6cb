//! Dropout of attention weights, without a generator that remembers anything.
//!
//! Whether a weight is dropped is a hash of its place: seed, batch row, query
//! head among all heads, query token and key token. So the answer is the same
//! in backward as in forward, when a part is computed again, for any kernel,
//! and for any number of ranks; and different heads, hence different ranks,
//! drop different weights.
//!
//! The hash is the finaliser of splitmix64 (Steele, Lea and Flood, "Fast
//! Splittable Pseudorandom Number Generators", 2014), in int64 because torch
//! has no unsigned arithmetic: multiplication wraps all the same, and a shift
//! is masked.

use super::tiled::Place;
use crate::error::Result;
use tch::Tensor;

/// Which attention weights are dropped.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// The probability with which a weight is dropped, from 0 to below 1. The
    /// kept ones are divided by one minus it.
    pub probability: f64,
    /// Where the draws begin: the same on all ranks, another for each call.
    pub seed: u64,
    /// The number among all query heads of the first one on this device.
    pub first_head: usize,
}

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
const FACTORS: [u64; 2] = [0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB];
const SHIFTS: [u32; 3] = [30, 27, 31];

impl Dropout {
    /// Where in `place` weights are dropped: bool [B, h, queries, keys].
    pub(super) fn dropped(&self, place: &Place) -> Result<Tensor> {
        let lanes: Vec<i64> = place
            .batch
            .clone()
            .flat_map(|row| {
                place.heads.clone().map(move |head| {
                    let row = mix(self.seed, row as u64);
                    mix(row, (self.first_head + head) as u64) as i64
                })
            })
            .collect();
        let size = [place.batch.len() as i64, place.heads.len() as i64, 1, 1];
        let lanes = Tensor::f_from_slice(&lanes)?
            .f_to_device(place.queries.device())?
            .f_view(size)?;
        let rows = mix_tensor(&lanes, &place.queries.f_unsqueeze(1)?)?;
        let weights = mix_tensor(&rows, &place.keys)?;
        // The upper 53 bits as a fraction of one, compared as integers.
        let limit = (self.probability * (1u64 << 53) as f64) as i64;
        Ok(shift_right(&weights, 11)?.f_lt(limit)?)
    }
}

/// A word that depends on all bits of `state` and `number`.
fn mix(state: u64, number: u64) -> u64 {
    let mut z = state.wrapping_add(number.wrapping_add(1).wrapping_mul(GOLDEN));
    for (shift, factor) in SHIFTS.into_iter().zip(FACTORS) {
        z = (z ^ (z >> shift)).wrapping_mul(factor);
    }
    z ^ (z >> SHIFTS[2])
}

/// [`mix`] of each state with each number, broadcast.
fn mix_tensor(states: &Tensor, numbers: &Tensor) -> Result<Tensor> {
    let steps = numbers.f_add_scalar(1)?.f_mul_scalar(GOLDEN as i64)?;
    let mut z = states.f_add(&steps)?;
    // In place, because these are the largest tensors of all.
    for (shift, factor) in SHIFTS.into_iter().zip(FACTORS) {
        z = z.f_bitwise_xor_tensor_(&shift_right(&z, shift)?)?;
        z = z.f_mul_scalar_(factor as i64)?;
    }
    Ok(z.f_bitwise_xor_tensor_(&shift_right(&z, SHIFTS[2])?)?)
}

/// A shift that fills with zeros; torch's fills with the sign.
fn shift_right(words: &Tensor, by: u32) -> Result<Tensor> {
    let kept = i64::MAX >> (by - 1);
    Ok(words
        .f_bitwise_right_shift_tensor_scalar(i64::from(by))?
        .f_bitwise_and_(kept)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn tensors_are_mixed_as_words_are() {
        let numbers = [0i64, 1, 2, 1 << 40];
        for state in [0, 1, u64::MAX, 0x8000_0000_0000_0001] {
            let states = Tensor::from_slice(&[state as i64]);
            let mixed = mix_tensor(&states, &Tensor::from_slice(&numbers)).unwrap();
            let due = numbers.map(|number| mix(state, number as u64) as i64);
            assert_eq!(Vec::<i64>::try_from(mixed).unwrap(), due);
        }
    }

    #[test]
    fn the_hash_is_splitmix64() {
        // The first outputs of the published generator from state 0.
        assert_eq!(mix(0, 0), 0xE220_A839_7B1D_CDAF);
        assert_eq!(mix(0, 1), 0x6E78_9E6A_A1B9_65F4);
    }
}
