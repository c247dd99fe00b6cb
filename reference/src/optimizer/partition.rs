//! Who owns which elements of the parameters; pure arithmetic.

use crate::communicator::collectives::near_even;

/// The elements of all parameters, one parameter after another, cut into one
/// run for each owner: as even as can be, so that a run may end within a
/// parameter and an owner may have none of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// Of each parameter the elements of each owner.
    counts: Vec<Vec<i64>>,
}

impl Partition {
    /// Cuts parameters of so many elements into runs for `owners` owners.
    pub fn new(elements: &[i64], owners: usize) -> Partition {
        let runs = near_even(elements.iter().sum(), owners);
        let mut start = 0;
        let counts = elements
            .iter()
            .map(|&elements| {
                let (from, to) = (start, start + elements);
                start = to;
                let mut begin = 0;
                let overlap = |&run: &i64| {
                    let end = begin + run;
                    let shared = end.min(to) - begin.max(from);
                    begin = end;
                    shared.max(0)
                };
                runs.iter().map(overlap).collect()
            })
            .collect();
        Partition { counts }
    }

    /// How many elements of a parameter each owner has, those of the first
    /// owner first.
    pub fn counts(&self, parameter: usize) -> &[i64] {
        self.counts.get(parameter).map_or(&[], Vec::as_slice)
    }

    /// The first of an owner's elements of a parameter, and how many there are.
    pub fn part(&self, parameter: usize, owner: usize) -> (i64, i64) {
        let counts = self.counts(parameter);
        let before = counts.iter().take(owner).sum();
        (before, counts.get(owner).copied().unwrap_or(0))
    }
}
