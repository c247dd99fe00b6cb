//! Failures that are known: a file lists them, each with its reason and a link
//! to where it is explained.
//!
//! A list of known failures rots unless it is held to: who is in it has to be
//! seen, has to fail, and for the reason that stands there.

mod entry;
mod rewrite;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use fixtures::Case;
use toml_edit::DocumentMut;

use self::entry::Entries;
pub use self::entry::Entry;
pub use self::rewrite::Rewriting;
use crate::catalogue;
use crate::judge::Verdict;
use crate::runner::Record;

/// The known failures of a file, and what a run has shown of them.
#[derive(Debug, Default)]
pub struct KnownFailures {
    file: PathBuf,
    /// The file as it stands, comments included.
    document: DocumentMut,
    entries: Vec<Entry>,
    judged: Vec<String>,
    sightings: Vec<Sighting>,
    unlisted: Vec<Entry>,
}

/// What became of a case that an entry is of.
#[derive(Debug)]
struct Sighting {
    /// The number of the entry.
    entry: usize,
    implementation: String,
    case: String,
    seen: Seen,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// Failed for the reason that is given.
    Failed,
    /// Failed for another reason, which no entry gives.
    FailedOtherwise,
    /// Failed for another reason, which another entry gives.
    ExplainedByAnother,
    /// Answered rightly, or refused where that was due.
    Passed,
    /// Not asked, because it is not claimed.
    NotClaimed,
    /// The harness could not judge.
    Unclear,
}

impl KnownFailures {
    /// Reads such a file.
    ///
    /// # Errors
    ///
    /// What is wrong with it, and with which entry.
    pub fn load(file: &Path) -> Result<KnownFailures, String> {
        let known = KnownFailures::read(file)?;
        match known.entries.iter().find_map(Entry::lack) {
            Some(lack) => Err(format!("{}: {lack}", file.display())),
            None => Ok(known),
        }
    }

    /// Reads such a file in order to rewrite it: it need not be there, and links
    /// need not be filled in.
    ///
    /// # Errors
    ///
    /// If it is there and cannot be read.
    pub fn load_to_rewrite(file: &Path) -> Result<KnownFailures, String> {
        match fs::metadata(file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(KnownFailures {
                file: file.to_owned(),
                ..KnownFailures::default()
            }),
            _ => KnownFailures::read(file),
        }
    }

    fn read(file: &Path) -> Result<KnownFailures, String> {
        let wrong = |reason: String| format!("{}: {}", file.display(), reason.trim_end());
        let text = fs::read_to_string(file).map_err(|error| wrong(error.to_string()))?;
        let entries: Entries =
            toml_edit::de::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        Ok(KnownFailures {
            file: file.to_owned(),
            document: text.parse().map_err(|error| wrong(format!("{error}")))?,
            entries: entries.known,
            ..KnownFailures::default()
        })
    }

    /// Takes note of what became of a case. A failure that an entry gives the
    /// reason of becomes [`Verdict::Known`].
    pub fn note(&mut self, implementation: &str, record: &mut Record) {
        let case = record.case.to_string();
        if self.judged.last().is_none_or(|last| last != implementation) {
            self.judged.push(implementation.to_owned());
        }
        let judgement = &mut record.judgement;
        let verdict = judgement.verdict;
        let of_case: Vec<(usize, &Entry)> = self
            .entries
            .iter()
            .enumerate()
            .filter(|(_, entry)| entry.is_of(implementation, &case))
            .collect();
        let explanation = of_case
            .iter()
            .find(|(_, entry)| entry.explains(judgement))
            .map(|(_, entry)| entry.link.clone());
        for &(number, entry) in &of_case {
            let seen = match verdict {
                Verdict::NotClaimed => Seen::NotClaimed,
                Verdict::Unclear => Seen::Unclear,
                verdict if !verdict.is_failure() => Seen::Passed,
                _ if entry.explains(judgement) => Seen::Failed,
                _ if explanation.is_some() => Seen::ExplainedByAnother,
                _ => Seen::FailedOtherwise,
            };
            self.sightings.push(Sighting {
                entry: number,
                implementation: implementation.to_owned(),
                case: case.clone(),
                seen,
            });
        }
        match explanation {
            Some(link) => {
                judgement.sentence = format!("{verdict} as known: {}", judgement.sentence);
                judgement.details.push(format!("known: {link}"));
                judgement.verdict = Verdict::Known;
            }
            None if verdict.is_failure() => {
                self.unlisted
                    .push(Entry::unexplained(implementation, &case, judgement));
                judgement
                    .details
                    .extend(of_case.iter().map(|(_, entry)| entry.mismatch()));
            }
            None => {}
        }
    }

    /// What the run has shown to be wrong with the file, `cases` being those
    /// that were selected: entries that nothing matches, and entries that do
    /// not fail.
    pub fn errors(&self, cases: &[Case]) -> Vec<String> {
        let say = |(number, entry): (usize, &Entry)| {
            let words = self.staleness(number, cases)?;
            let (file, case) = (self.file.display(), &entry.case);
            Some(format!("{file}: `{case}` {words}: remove it"))
        };
        self.entries.iter().enumerate().filter_map(say).collect()
    }

    /// Why an entry has to go, if it has to.
    fn staleness(&self, number: usize, cases: &[Case]) -> Option<String> {
        let sightings = || self.sightings.iter().filter(|s| s.entry == number);
        let all = |seen: Seen| sightings().all(|sighting| sighting.seen == seen);
        if sightings().next().is_none() {
            return self.is_nowhere(&self.entries[number], cases).then(|| {
                "matches no case, neither of the catalogue nor of those asked".to_owned()
            });
        }
        if let Some(passed) = sightings().find(|sighting| sighting.seen == Seen::Passed) {
            let Sighting {
                implementation,
                case,
                ..
            } = passed;
            let which = match *case == self.entries[number].case {
                true => String::new(),
                false => format!(" ({case})"),
            };
            return Some(format!(
                "is expected to fail, and passes with {implementation}{which}"
            ));
        }
        if all(Seen::NotClaimed) {
            return Some("is expected to fail, and is not claimed".to_owned());
        }
        all(Seen::ExplainedByAnother)
            .then(|| "fails for a reason that another entry gives".to_owned())
    }

    /// Whether there is no case that the entry is of, here or in a wider run.
    fn is_nowhere(&self, entry: &Entry, cases: &[Case]) -> bool {
        let is_of_others = entry
            .implementation
            .as_ref()
            .is_some_and(|of| !self.judged.contains(of));
        let catalogue = catalogue::cases();
        let mut known = cases.iter().chain(&catalogue);
        !is_of_others && !known.any(|case| entry.matches(&case.to_string()))
    }
}
