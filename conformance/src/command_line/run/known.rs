//! The file of known failures, on the command line.

use std::path::PathBuf;

use clap::Args;
use fixtures::Case;

use crate::ExitCode;
use crate::known::KnownFailures;

#[derive(Debug, Args)]
pub(super) struct KnownFile {
    /// The file of known failures: what fails as it says does not count. Who
    /// is in it and does not fail does
    #[arg(long, value_name = "FILE")]
    known: Option<PathBuf>,

    /// Write the file of known failures anew from what fails now: entries that
    /// hold stay, those that do not go, and what it does not tell of is added,
    /// for you to fill in a link
    #[arg(long, requires = "known")]
    rewrite_known: bool,
}

impl KnownFile {
    pub(super) fn read(&self) -> Result<KnownFailures, String> {
        match &self.known {
            None => Ok(KnownFailures::default()),
            Some(file) if self.rewrite_known => KnownFailures::load_to_rewrite(file),
            Some(file) => KnownFailures::load(file),
        }
    }

    /// Rewrites the file, or says what is wrong with it; and how the run ends
    /// then.
    pub(super) fn settle(
        &self,
        mut known: KnownFailures,
        cases: &[Case],
        exit_code: ExitCode,
    ) -> Result<(String, ExitCode), String> {
        if let (true, Some(file)) = (self.rewrite_known, &self.known) {
            let rewriting = known.rewrite(cases)?;
            return Ok((format!("{}: {rewriting}.\n", file.display()), exit_code));
        }
        let errors = known.errors(cases);
        let exit_code = match exit_code {
            ExitCode::Interrupted => exit_code,
            _ if errors.is_empty() => exit_code,
            _ => ExitCode::Failed,
        };
        let lines = errors.iter().map(|error| format!("{error}\n"));
        Ok((lines.collect(), exit_code))
    }
}
