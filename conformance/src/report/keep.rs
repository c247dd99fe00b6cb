//! Keeps all that there is of a case that went wrong, in a folder of its own.
//!
//! The folder is that of an exchange, so that every file in it is one that the
//! exchange's README tells of, and a rank can be started on it by hand.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use fixtures::exchange::{self, Judge, PROTOCOL, Session, SessionInfo};

use super::failures::failure;
use crate::implementation::Conditions;
use crate::judge;
use crate::runner::{Event, Evidence};

/// A host that no rank runs on: ranks then take the judge to live.
const NO_HOST: &str = ".";

/// Keeps the failures of one implementation.
pub struct Keeper {
    folder: PathBuf,
    implementation: String,
    command: String,
    conditions: Conditions,
    kept: BTreeMap<String, Result<PathBuf, String>>,
}

impl Keeper {
    /// Keeps failures in `folder`, those of each implementation in one by its
    /// name. `command` repeats a case, as in [`failure`].
    pub fn new(
        folder: &Path,
        implementation: &str,
        command: &str,
        conditions: &Conditions,
    ) -> Keeper {
        Keeper {
            folder: folder.join(implementation),
            implementation: implementation.to_owned(),
            command: command.to_owned(),
            conditions: conditions.clone(),
            kept: BTreeMap::new(),
        }
    }

    /// Takes note of an event: keeps what went wrong.
    pub fn tell(&mut self, event: &Event<'_>) {
        if let Event::WentWrong(evidence) = event {
            let case = evidence.record.case.to_string();
            let kept = self.keep(evidence, &case);
            self.kept.insert(case, kept);
        }
    }

    /// The cases that went wrong, and the folder of each, or why there is none.
    pub fn kept(&self) -> &BTreeMap<String, Result<PathBuf, String>> {
        &self.kept
    }

    fn keep(&self, evidence: &Evidence<'_>, case: &str) -> Result<PathBuf, String> {
        let folder = new_folder(&self.folder.join(case)).map_err(|error| error.to_string())?;
        let write = |path: PathBuf, bytes: &[u8]| {
            fs::write(&path, bytes).map_err(|error| format!("{}: {error}", path.display()))
        };
        let text = failure(&self.implementation, evidence.record, &self.command);
        write(folder.join("judgement.txt"), text.as_bytes())?;
        let info = SessionInfo {
            protocol: PROTOCOL,
            world: evidence.record.case.world(),
            device: self.conditions.device.to_string(),
            kernel: self.conditions.kernel.name().to_owned(),
            time_limit_s: self.conditions.case_limit.as_secs_f64(),
            judge: Judge {
                pid: std::process::id(),
                host: NO_HOST.to_owned(),
            },
        };
        let session = Session::create(&folder, &info).map_err(|error| error.to_string())?;
        for log in evidence.logs {
            write(session.log_path(&log.who, log.stream), &log.bytes)?;
        }
        self.keep_tensors(evidence, &session)?;
        Ok(folder)
    }

    fn keep_tensors(&self, evidence: &Evidence<'_>, session: &Session) -> Result<(), String> {
        let said = |error: exchange::ExchangeError| error.to_string();
        let right_answers = session.folder().join("right");
        fs::create_dir(&right_answers).map_err(|error| error.to_string())?;
        for (number, asked) in evidence.asked.iter().enumerate() {
            let mut posed = asked.question.posed();
            for (info, _) in &mut posed {
                info.number = number;
            }
            session.pose(&posed).map_err(said)?;
            for (rank, answer) in asked.answers.iter().enumerate() {
                if let Ok((info, tensors)) = answer {
                    session.answer(number, rank, info, tensors).map_err(said)?;
                }
            }
            // Where a refusal is due there is no right answer.
            if let Some(right) = judge::right_answer(asked, evidence.record.declared) {
                let path = right_answers.join(format!("{number}.safetensors"));
                let name = asked.question.case().to_string();
                exchange::write_message(&path, "case", &name, &right).map_err(said)?;
            }
        }
        session.end().map_err(said)
    }
}

/// A new folder of this name, or behind it the first number that is free.
fn new_folder(folder: &Path) -> io::Result<PathBuf> {
    if let Some(above) = folder.parent() {
        fs::create_dir_all(above)?;
    }
    let mut free = folder.to_owned();
    let mut number = 2;
    loop {
        match fs::create_dir(&free) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                free.set_file_name(format!(
                    "{}.{number}",
                    folder.file_name().unwrap_or_default().to_string_lossy()
                ));
                number += 1;
            }
            made => return made.map(|()| free),
        }
    }
}
