//! The suite's own teeth: wrong implementations of Ulysses attention, each
//! wrong in one way that has a name.
//!
//! `rank.rs` puts a right attention together from the reference's public parts,
//! and a fault replaces one of its stages. Neither has the reference a switch
//! for it, nor does the judge know who answers. A fault is *wrong* on a case
//! where its answer is not that of the right attention, which is decided
//! without the judge (`trial.rs`); there the judge must fail it, and the
//! diagnosis should say its mistake.
//!
//! | module | holds |
//! |---|---|
//! | `rank`, `local`, `sequence`, `checks` | the right attention of one rank, in stages |
//! | `plain`, `detour` | attention by formula, and gradients led astray: what faults are made of |
//! | `implementation` | ranks on threads behind the judge's door |
//! | `exchange` to `refusal` | the faults, class by class |
//! | `selection` | the cases on which they are tried |
//! | `trial`, `tally` | a fault on a case: whether it is wrong there, and what the judge says; and on all cases |

mod attention;
mod batch;
mod checks;
mod communication;
mod decoder;
mod detour;
mod exchange;
mod gradients;
mod heads;
mod implementation;
mod lengths;
mod local;
mod loss;
mod mesh;
mod model;
mod plain;
mod positions;
mod precision;
mod rank;
mod refusal;
mod selection;
mod sequence;
mod state;
mod tally;
mod tiled;
mod trial;

use std::fmt;
use std::sync::Arc;

use fixtures::exchange::{CaseInfo, Tensors};
use fixtures::{AttentionCase, Case};
use tch::Device;
use ulysses::Communicator;

use crate::diagnosis::{Class, Mistake};
use crate::implementation::answer_of_profile;
use rank::{Halt, Staged, Stages};

pub use implementation::Assembled;
pub use selection::cases;
pub use tally::Tally;
pub use trial::{Trial, Trials};

/// A wrong implementation, and what is known of it.
#[derive(Clone, Copy)]
pub struct Fault {
    /// The name, as on the command line: `kv-heads-tiled`.
    pub name: &'static str,
    /// What a diagnosis should say.
    pub mistake: Mistake,
    /// What a user sees.
    pub effect: &'static str,
    /// Where somebody made this mistake, if that is known.
    pub source: Option<&'static str>,
    /// On which cases it can show, and what is done in place of the right
    /// thing.
    made: Made,
}

/// Where a fault shows, and how it is made.
#[derive(Clone, Copy)]
enum Made {
    /// In attention: a stage is replaced.
    InAttention {
        applies: fn(&AttentionCase) -> bool,
        make: fn(&mut Stages),
    },
    /// In another profile: each rank answers so.
    InProfile {
        applies: fn(&Case) -> bool,
        answer: fn(&Told<'_>) -> Staged<Tensors>,
    },
}

/// A rank of another profile than attention, and what it is asked.
struct Told<'a> {
    communicator: &'a Arc<dyn Communicator>,
    info: &'a CaseInfo,
    inputs: &'a Tensors,
}

impl Told<'_> {
    /// What the reference answers.
    fn right(&self) -> Staged<Tensors> {
        answer_of_profile(self.communicator, Device::Cpu, self.info, self.inputs)
            .map_err(Halt::Said)
    }
}

impl Fault {
    /// What kind of mistake it is.
    pub fn class(&self) -> Class {
        self.mistake.class()
    }

    /// Whether the fault can show in `case`.
    pub fn applies(&self, case: &Case) -> bool {
        match &self.made {
            Made::InAttention { applies, .. } => case.attention().is_some_and(applies),
            Made::InProfile { applies, .. } => applies(case),
        }
    }
}

impl fmt::Debug for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Fault").field(&self.name).finish()
    }
}

/// Every fault, class by class.
pub fn all() -> impl Iterator<Item = &'static Fault> {
    [
        exchange::FAULTS,
        heads::FAULTS,
        attention::FAULTS,
        gradients::FAULTS,
        positions::FAULTS,
        loss::FAULTS,
        tiled::FAULTS,
        batch::FAULTS,
        mesh::FAULTS,
        model::FAULTS,
        lengths::FAULTS,
        precision::FAULTS,
        state::FAULTS,
        communication::FAULTS,
        refusal::FAULTS,
    ]
    .into_iter()
    .flatten()
}

/// Whether ranks share the work, and a good question is asked once.
fn is_split(case: &AttentionCase) -> bool {
    let extras = &case.extras;
    case.world > 1 && !extras.eval && extras.state.is_none() && extras.defect.is_none()
}

/// The same, and each rank has equally many tokens.
fn is_even(case: &AttentionCase) -> bool {
    let shards = case.shards();
    is_split(case) && shards.iter().all(|shard| shard.len() == shards[0].len())
}
