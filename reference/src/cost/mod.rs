//! What a model costs: bytes that travel, operations, bytes that are kept.
//!
//! Pure arithmetic on sizes: no tensor and no communication. Three kinds of
//! number are kept apart:
//!
//! * *Exact*: what the reference hands over ([`traffic`]), the operations of
//!   its matrix products ([`flops`]) and the bytes of single tensors
//!   ([`activations`]). Counters and allocated tensors show the same.
//! * *Others' rules*: what DeepSpeed hands over ([`deepspeed`]), and how the
//!   two papers count operations ([`flops`]).
//! * *A fit*: how much a GPU holds in all, and so the longest sequence
//!   ([`memory`]). Its constants were chosen by looking at published readings.
//!
//! [`published`] has the rows that these must come near to.
//!
//! Not here: time. It is an input, from which operations per second follow.

pub mod activations;
pub mod deepspeed;
pub mod flops;
pub mod memory;
mod model;
pub mod published;
mod shares;
pub mod traffic;

pub use model::Model;
pub use shares::Shares;

use crate::error::{Result, refuse};

/// Numbers beyond this describe no machine; sums of some below it fit a u128.
const LIMIT: u128 = 1 << 100;

/// The product, unless it is absurd.
fn product(factors: impl IntoIterator<Item = u64>) -> Result<u128> {
    factors.into_iter().try_fold(1, times)
}

/// `count` times `factor`, unless that is absurd.
fn times(count: u128, factor: impl Into<u128>) -> Result<u128> {
    match count.checked_mul(factor.into()) {
        Some(product) if product <= LIMIT => Ok(product),
        _ => refuse(
            "sizes",
            "have a product beyond 2^100",
            "give the sizes of a model that a machine can hold",
        ),
    }
}

/// Refuses sizes of which one is zero.
fn not_zero(argument: &'static str, sizes: &[(&str, u64)]) -> Result<()> {
    match sizes.iter().find(|(_, size)| *size == 0) {
        None => Ok(()),
        Some((name, _)) => refuse(
            argument,
            format!("has a {name} of 0"),
            "give at least one of everything",
        ),
    }
}
