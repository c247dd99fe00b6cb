//! Sinks of a run's events: what a person reads.
//!
//! Texts are made by functions that return them, and printed by nobody but
//! [`Progress`] and the command line.

mod failures;
mod progress;
mod tables;

pub use failures::failures;
pub use progress::Progress;
pub use tables::{chance, closeness, costs, verdicts};
