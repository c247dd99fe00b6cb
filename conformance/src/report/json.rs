//! A run as JSON lines, for programs: one object for each case, written as soon
//! as the case has its verdict.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use fixtures::exchange::Declared;
use serde::Serialize;

use crate::judge::Comparison;
use crate::runner::{Event, Record};

/// Writes the lines.
pub struct JsonLines {
    file: File,
    implementation: String,
    written: io::Result<()>,
}

/// One line; `schemas/report.schema.json` says what it holds.
#[derive(Debug, Serialize)]
struct Line<'a> {
    implementation: &'a str,
    case: String,
    verdict: &'static str,
    /// Whose, if anything went wrong.
    fault: Option<&'static str>,
    sentence: &'a str,
    mistake: Option<&'static str>,
    confidence: Option<f64>,
    declared: Declared,
    /// From posing the case to its verdict.
    seconds: f64,
    /// The largest ratio of an error to what it may be, if there is an answer
    /// to measure; none where it is not finite.
    worst_ratio: Option<f64>,
}

impl JsonLines {
    /// Begins the file.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub fn create(path: &Path) -> io::Result<JsonLines> {
        Ok(JsonLines {
            file: File::create(path)?,
            implementation: String::new(),
            written: Ok(()),
        })
    }

    /// Takes note of an event.
    pub fn tell(&mut self, event: &Event<'_>) {
        match event {
            Event::Started { implementation, .. } => {
                self.implementation = (*implementation).to_owned();
            }
            Event::Judged(record) if self.written.is_ok() => self.written = self.write(record),
            _ => {}
        }
    }

    fn write(&mut self, record: &Record) -> io::Result<()> {
        let line = serde_json::to_string(&Line::of(&self.implementation, record))?;
        writeln!(self.file, "{line}")
    }

    /// Ends the file.
    ///
    /// # Errors
    ///
    /// The first that there was in writing it.
    pub fn finish(mut self) -> io::Result<()> {
        self.written?;
        self.file.flush()
    }
}

impl Line<'_> {
    fn of<'a>(implementation: &'a str, record: &'a Record) -> Line<'a> {
        let judgement = &record.judgement;
        let diagnosis = judgement.diagnosis.as_ref();
        Line {
            implementation,
            case: record.case.to_string(),
            verdict: judgement.verdict.name(),
            fault: judgement.verdict.fault(),
            sentence: &judgement.sentence,
            mistake: diagnosis.and_then(|diagnosis| Some(diagnosis.mistake?.name())),
            confidence: diagnosis.map(|diagnosis| diagnosis.confidence),
            declared: record.declared,
            seconds: (record.asked + record.judged).as_secs_f64(),
            worst_ratio: judgement.comparison.as_ref().and_then(worst_ratio),
        }
    }
}

fn worst_ratio(comparison: &Comparison) -> Option<f64> {
    let ratios = comparison.tensors.iter().map(|tensor| tensor.tightness);
    Some(ratios.fold(0.0, f64::max)).filter(|ratio| ratio.is_finite())
}
