//! A run as JUnit XML, which continuous integration shows: a test suite for
//! each implementation, a test for each case.

use std::fs::File;
use std::io;
use std::path::Path;

use quick_junit::{NonSuccessKind, Report, SerializeError, TestCase, TestCaseStatus, TestSuite};

use super::failures::telling_sentence;
use crate::judge::Verdict;
use crate::runner::{Event, Record};

/// Collects the tests, and writes them in the end.
pub struct JUnit {
    file: File,
    report: Report,
}

impl JUnit {
    /// Begins the file.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub fn create(path: &Path) -> io::Result<JUnit> {
        Ok(JUnit {
            file: File::create(path)?,
            report: Report::new("ulysses-conformance"),
        })
    }

    /// Takes note of an event.
    pub fn tell(&mut self, event: &Event<'_>) {
        match event {
            Event::Started { implementation, .. } => {
                self.report.add_test_suite(TestSuite::new(*implementation));
            }
            Event::Judged(record) => {
                if let Some(suite) = self.report.test_suites.last_mut() {
                    let test = test(suite.name.as_str(), record);
                    suite.add_test_case(test);
                }
            }
            _ => {}
        }
    }

    /// Writes the file.
    ///
    /// # Errors
    ///
    /// If that cannot be done.
    pub fn finish(self) -> Result<(), SerializeError> {
        self.report.serialize(self.file)
    }
}

/// What failed, crashed or hung is a failure, what is unclear an error, and
/// what is not claimed or a known failure is skipped.
fn test(implementation: &str, record: &Record) -> TestCase {
    let judgement = &record.judgement;
    let verdict = judgement.verdict;
    let mut status = match verdict {
        Verdict::Exact | Verdict::Pass | Verdict::Refused => TestCaseStatus::success(),
        Verdict::NotClaimed | Verdict::Known => TestCaseStatus::skipped(),
        Verdict::Fail | Verdict::Crash | Verdict::Hang => {
            TestCaseStatus::non_success(NonSuccessKind::Failure)
        }
        Verdict::Unclear => TestCaseStatus::non_success(NonSuccessKind::Error),
    };
    if !matches!(status, TestCaseStatus::Success { .. }) {
        let said = telling_sentence(judgement);
        status.set_message(format!("{verdict}: {said}"));
        status.set_type(verdict.name());
        status.set_description(judgement.details.join("\n"));
    }
    let mut test = TestCase::new(record.case.to_string(), status);
    test.set_classname(implementation);
    test.set_time(record.asked + record.judged);
    test
}
