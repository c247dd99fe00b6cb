//! Who caught which fault, in how many of its wrong answers.

use std::iter::once;

use super::{RIVALS, Ruling, Shown};
use crate::report;

/// Who caught which fault.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// In the order in which they came.
    faults: Vec<(String, [Count; RIVALS.len()], Count)>,
}

/// Of the answers that somebody judged, how many were found wrong.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    caught: usize,
    judged: usize,
}

impl Count {
    fn add(&mut self, caught: bool) {
        self.judged += 1;
        self.caught += usize::from(caught);
    }

    fn told(self) -> String {
        match self.judged {
            0 => "n/a".to_owned(),
            judged => format!("{}/{judged}", self.caught),
        }
    }
}

impl Tally {
    /// Shows a wrong answer of `fault` to every rival; `ours_caught` says
    /// whether this suite found it wrong.
    pub fn add(&mut self, fault: &str, shown: &Shown<'_>, ours_caught: bool) {
        let (rivals, ours) = self.counts(fault);
        ours.add(ours_caught);
        for (count, rival) in rivals.iter_mut().zip(&RIVALS) {
            match (rival.judges)(shown) {
                Ruling::Silent => {}
                ruling => count.add(ruling == Ruling::Refuses),
            }
        }
    }

    /// Counts what `fault` did where it answered no tensors: a refusal, a crash
    /// or a hang. Rivals have no rule for it.
    pub fn add_without_tensors(&mut self, fault: &str, ours_caught: bool) {
        self.counts(fault).1.add(ours_caught);
    }

    fn counts(&mut self, fault: &str) -> (&mut [Count; RIVALS.len()], &mut Count) {
        let known = self.faults.iter().position(|(name, ..)| name == fault);
        let place = known.unwrap_or_else(|| {
            self.faults
                .push((fault.to_owned(), Default::default(), Count::default()));
            self.faults.len() - 1
        });
        let (_, rivals, ours) = &mut self.faults[place];
        (rivals, ours)
    }

    /// A row for each fault: of its wrong answers that a rule judges, how many
    /// it refuses. The last row says how many of the faults each caught at all.
    pub fn table(&self) -> String {
        let header = once("fault")
            .chain(RIVALS.iter().map(|rival| rival.name))
            .chain(["this suite"]);
        let mut rows: Vec<Vec<String>> = self
            .faults
            .iter()
            .map(|(fault, rivals, ours)| {
                let counts = rivals.iter().chain([ours]).map(|count| count.told());
                once(fault.clone()).chain(counts).collect()
            })
            .collect();
        let caught_at_all = (0..=RIVALS.len()).map(|column| {
            let mut faults = Count::default();
            for (_, rivals, ours) in &self.faults {
                let count = rivals.get(column).unwrap_or(ours);
                if count.judged > 0 {
                    faults.add(count.caught > 0);
                }
            }
            faults.told()
        });
        rows.push(
            once("faults caught".to_owned())
                .chain(caught_at_all)
                .collect(),
        );
        report::table(header, rows, 1..)
    }
}
