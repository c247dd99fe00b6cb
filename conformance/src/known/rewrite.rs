//! The file of known failures, rewritten from what failed.

use std::collections::BTreeSet;
use std::path::Path;
use std::{fmt, fs, io};

use fixtures::Case;
use toml_edit::{ArrayOfTables, Item, Table, value};

use super::{Entry, KnownFailures, Seen};
use crate::judge::Verdict;

/// What rewriting the file came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rewriting {
    /// Entries that still hold, or that this run says nothing of.
    pub kept: usize,
    /// Entries that no longer hold.
    pub dropped: usize,
    /// Failures that no entry told of.
    pub added: usize,
    /// Entries whose link is still to be filled in.
    pub without_link: usize,
}

impl KnownFailures {
    /// Writes the file anew from what the run has shown, `cases` being those
    /// that were selected. Entries that still hold stay as they are, with what
    /// is written around them; those that do not go, and of a pattern that
    /// holds in part, the cases that fail stay. What no entry tells of is added
    /// with its sentence as the reason and without a link.
    ///
    /// # Errors
    ///
    /// If the file cannot be written, or is not made of `[[known]]` tables.
    pub fn rewrite(&mut self, cases: &[Case]) -> Result<Rewriting, String> {
        let wrong = |reason: &dyn fmt::Display| format!("{}: {reason}", self.file.display());
        let stale: BTreeSet<usize> = (0..self.entries.len())
            .filter(|&number| self.staleness(number, cases).is_some())
            .collect();
        let mut new = Vec::new();
        for sighting in &self.sightings {
            if stale.contains(&sighting.entry) && sighting.seen == Seen::Failed {
                new.push(Entry {
                    case: sighting.case.clone(),
                    implementation: Some(sighting.implementation.clone()),
                    ..self.entries[sighting.entry].clone()
                });
            }
        }
        let added = self.unlisted.len();
        new.append(&mut self.unlisted.clone());

        let item = self.document.entry("known");
        let tables = item
            .or_insert_with(|| Item::ArrayOfTables(ArrayOfTables::new()))
            .as_array_of_tables_mut()
            .ok_or_else(|| wrong(&"its entries are not written as `[[known]]`"))?;
        let mut number = 0..;
        tables.retain(|_| number.next().is_none_or(|number| !stale.contains(&number)));
        let kept = tables.len();
        new.iter().for_each(|entry| tables.push(table(entry)));
        let is_empty = |table: &Table| {
            let link = table.get("link").and_then(Item::as_str).unwrap_or_default();
            link.trim().is_empty()
        };
        let rewriting = Rewriting {
            kept,
            dropped: stale.len(),
            added,
            without_link: tables.iter().filter(|table| is_empty(table)).count(),
        };
        replace(&self.file, &self.document.to_string()).map_err(|error| wrong(&error))?;
        Ok(rewriting)
    }
}

/// The entry as it stands in the file.
fn table(entry: &Entry) -> Table {
    let mut table = Table::new();
    table.decor_mut().set_prefix("\n");
    table.insert("case", value(&entry.case));
    if let Some(implementation) = &entry.implementation {
        table.insert("implementation", value(implementation));
    }
    if let Some(verdict) = entry.verdict.map(Verdict::name) {
        table.insert("verdict", value(verdict));
    }
    table.insert("reason", value(&entry.reason));
    table.insert("link", value(&entry.link));
    table
}

/// Puts `text` in the place of what the file held, all at once.
fn replace(file: &Path, text: &str) -> io::Result<()> {
    let beside = file.with_extension("toml.new");
    fs::write(&beside, text)?;
    fs::rename(&beside, file)
}

impl fmt::Display for Rewriting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Rewriting {
            kept,
            dropped,
            added,
            without_link,
        } = self;
        write!(f, "{kept} entries kept, {dropped} dropped, {added} added")?;
        match without_link {
            0 => Ok(()),
            _ => write!(f, "; {without_link} without a link, which is due"),
        }
    }
}
