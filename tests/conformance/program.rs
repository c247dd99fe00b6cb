//! Runs the program as a person does.
// Not every test uses all of it.
#![allow(dead_code)]

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// What a run of the program gave.
pub(crate) struct Run {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl From<Output> for Run {
    fn from(output: Output) -> Run {
        Run {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// The program, to be given arguments; without a GPU in sight.
pub(crate) fn program() -> Command {
    let built = env!("CARGO_BIN_EXE_ulysses-conformance");
    // Tests that are taken to another machine have it beside them.
    let beside = env::current_exe().map(|test| test.with_file_name("ulysses-conformance"));
    let taken = beside.ok().filter(|program| program.exists());
    let mut program = Command::new(taken.unwrap_or_else(|| PathBuf::from(built)));
    program.env("CUDA_VISIBLE_DEVICES", "");
    program
}

/// The program with these arguments, separated by spaces.
pub(crate) fn run(arguments: &str) -> Run {
    let arguments = arguments.split_whitespace();
    program().args(arguments).output().unwrap().into()
}

/// The Python of the project's environment.
pub(crate) fn python() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../.venv/bin/python")
}

/// The command that starts an adapter of this folder's `adapters`.
pub(crate) fn fake(adapter: &str) -> String {
    let adapters = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/conformance/adapters");
    format!("{} {adapters}/{adapter}", python().display())
}

impl Run {
    /// The verdict of each case, as `(verdict, name, why)`, from the lines of
    /// the standard error.
    pub(crate) fn verdicts(&self) -> Vec<(String, String, String)> {
        self.stderr
            .lines()
            .filter_map(|line| {
                let (_, told) = line.split_once("] ")?;
                // The name is the word with the first slash.
                let (before, _) = told.split_once('/')?;
                let (head, name) = told.split_at(before.rfind(' ')?);
                let (name, why) = name.split_once(": ").unwrap_or((name, ""));
                Some((
                    head.trim().to_owned(),
                    name.trim().to_owned(),
                    why.to_owned(),
                ))
            })
            .collect()
    }

    /// The names of the cases with this verdict.
    pub(crate) fn named(&self, verdict: &str) -> Vec<String> {
        let named = |(is, name, _): (String, String, String)| (is == verdict).then_some(name);
        self.verdicts().into_iter().filter_map(named).collect()
    }
}
