//! The files that a run writes.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::Args;

use crate::report::{JUnit, JsonLines, Progress};
use crate::runner::Event;

#[derive(Debug, Args)]
pub(super) struct Files {
    /// Write a line of JSON for each case into this file; the schema is
    /// conformance/schemas/report.schema.json
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Write JUnit XML into this file, which continuous integration shows
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,

    /// Keep all that there is of each failure in a folder of its own in this
    /// one, which is new or empty: inputs, the ranks' answers, the right answer
    /// and how far each number may be off, the judgement, and what ranks and
    /// launcher wrote. Without it nothing is kept, since a failure is repeated
    /// by one command
    #[arg(long, value_name = "FOLDER")]
    pub(super) keep: Option<PathBuf>,
}

/// The sinks of a run that live as long as it does.
pub(super) struct Reports {
    progress: Progress,
    json: Option<(PathBuf, JsonLines)>,
    junit: Option<(PathBuf, JUnit)>,
}

impl Files {
    /// Begins the files, so that what cannot be written is known before
    /// anything is asked.
    pub(super) fn begin(&self) -> Result<Reports, String> {
        let begun = |path: &Path| {
            let path = path.to_owned();
            move |error: io::Error| format!("{}: {error}", path.display())
        };
        if let Some(folder) = &self.keep {
            fs::create_dir_all(folder).map_err(begun(folder))?;
            let mut entries = fs::read_dir(folder).map_err(begun(folder))?;
            if entries.next().is_some() {
                return Err(format!(
                    "--keep: {} is not empty; name a new folder, or empty it",
                    folder.display()
                ));
            }
        }
        let json = self.json.as_ref().map(|path| {
            let json = JsonLines::create(path).map_err(begun(path))?;
            Ok::<_, String>((path.clone(), json))
        });
        let junit = self.junit.as_ref().map(|path| {
            let junit = JUnit::create(path).map_err(begun(path))?;
            Ok::<_, String>((path.clone(), junit))
        });
        Ok(Reports {
            progress: Progress::new(),
            json: json.transpose()?,
            junit: junit.transpose()?,
        })
    }
}

impl Reports {
    pub(super) fn tell(&mut self, event: &Event<'_>) {
        self.progress.tell(event);
        if let Some((_, json)) = &mut self.json {
            json.tell(event);
        }
        if let Some((_, junit)) = &mut self.junit {
            junit.tell(event);
        }
    }

    /// Ends the files.
    pub(super) fn finish(self) -> Result<(), String> {
        let failed =
            |path: PathBuf, error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        if let Some((path, json)) = self.json {
            json.finish().map_err(|error| failed(path, &error))?;
        }
        if let Some((path, junit)) = self.junit {
            junit.finish().map_err(|error| failed(path, &error))?;
        }
        Ok(())
    }
}
