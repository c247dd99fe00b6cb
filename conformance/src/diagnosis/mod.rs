//! From a wrong answer to the mistake's name.

mod mistake;

pub use self::mistake::{Class, Mistake};

/// What is wrong with an answer, as far as it shows.
#[derive(Clone, Debug, PartialEq)]
pub struct Diagnosis {
    /// What was done.
    pub mistake: Mistake,
    /// How sure that is, between 0 and 1.
    pub confidence: f64,
    /// What was done, in one sentence, with the ranks, heads and factors of
    /// this very answer.
    pub sentence: String,
}
