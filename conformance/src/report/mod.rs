//! Sinks of a run's events: what a person reads, and what a program does.
//!
//! Texts are made by functions that return them, and printed by nobody but
//! [`Progress`] and the command line. [`JsonLines`], [`JUnit`] and [`Keeper`]
//! write files.

mod failures;
mod faults;
mod json;
mod junit;
mod keep;
mod kernels;
mod progress;
mod tables;

pub use failures::{Notes, failure, failures};
pub use faults::{faults, faults_page, rivals_page};
pub use json::JsonLines;
pub use junit::JUnit;
pub use keep::Keeper;
pub use kernels::kernels;
pub use progress::Progress;
pub(crate) use tables::table;
pub use tables::{chance, closeness, closeness_of_profiles, costs, declared, verdicts};
