//! Judges implementations of Ulysses sequence parallelism against dense
//! attention and its gradients.
//!
//! ```no_run
//! # fn main() -> Result<(), String> {
//! use ulysses::{DeviceChoice, Kernel};
//! use ulysses_conformance::implementation::{Interrupt, ReferenceOnThreads};
//! use ulysses_conformance::known::KnownFailures;
//! use ulysses_conformance::{ExitCode, catalogue, runner};
//!
//! let mut reference = ReferenceOnThreads::new(Kernel::Sdpa, DeviceChoice::Cpu)?;
//! let summary = runner::run(
//!     &mut reference,
//!     &catalogue::cases(),
//!     &mut KnownFailures::default(),
//!     &Interrupt::default(),
//!     &mut |event| println!("{event:?}"),
//! );
//! assert_eq!(ExitCode::of(&[summary]), ExitCode::Success);
//! # Ok(())
//! # }
//! ```
//!
//! One direction, no step back: a case is posed to an *implementation*, its
//! shards of the answer are put together, the *oracle* computes the same thing
//! densely in float64, the *judge* compares and gives a verdict, the *runner*
//! tells of it in events, and *reports* are sinks of these events.
//!
//! Deliberately not here: how attention is done sequence-parallel. The judge
//! shares no arithmetic with the reference that it also judges.

pub mod catalogue;
pub mod clause;
pub mod command_line;
pub mod diagnosis;
pub mod exit_code;
pub mod faults;
pub mod implementation;
pub mod judge;
pub mod known;
pub mod oracle;
pub mod report;
pub mod rivals;
pub mod runner;
pub mod shrink;
mod tensor;

pub use clause::Clause;
pub use exit_code::ExitCode;
