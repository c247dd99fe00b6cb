//! How far a run is: a bar on a terminal, a line for each case elsewhere.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::judge::Verdict;
use crate::runner::{Event, Record};

/// Tells on the standard error how far a run is.
pub struct Progress {
    implementation: String,
    cases: usize,
    done: usize,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// A bar if the standard error is a terminal, lines if it is not.
    pub fn new() -> Progress {
        let bar = io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::no_length();
            // The template is a constant, so that it parses is seen at once.
            if let Ok(style) =
                ProgressStyle::with_template("{prefix} [{bar:30}] {pos}/{len} {eta} {msg}")
            {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        Progress {
            implementation: String::new(),
            cases: 0,
            done: 0,
            bar,
        }
    }

    /// Takes note of an event.
    pub fn tell(&mut self, event: &Event<'_>) {
        match event {
            Event::Started {
                implementation,
                cases,
            } => {
                self.implementation = (*implementation).to_owned();
                self.cases = *cases;
                self.done = 0;
                if let Some(bar) = &self.bar {
                    bar.reset();
                    bar.set_length(*cases as u64);
                    bar.set_prefix(self.implementation.clone());
                }
            }
            Event::Asking(case) => {
                if let Some(bar) = &self.bar {
                    bar.set_message(case.to_string());
                }
            }
            Event::WentWrong(_) => {}
            Event::Judged(record) => {
                self.done += 1;
                match &self.bar {
                    Some(bar) => {
                        bar.inc(1);
                        // A failure stays in view above the bar.
                        if record.judgement.verdict.is_failure() {
                            bar.println(self.line(record));
                        }
                    }
                    None => {
                        // Nobody reads on: no reason to end the run.
                        let _ = writeln!(io::stderr(), "{}", self.line(record));
                    }
                }
            }
            Event::Finished => {
                if let Some(bar) = &self.bar {
                    bar.finish_and_clear();
                }
            }
        }
    }

    fn line(&self, record: &Record) -> String {
        let Record {
            case, judgement, ..
        } = record;
        let width = self.cases.to_string().len();
        let why = match judgement.verdict {
            Verdict::Exact | Verdict::Pass if judgement.sentence.is_empty() => String::new(),
            _ => format!(": {}", judgement.sentence),
        };
        format!(
            "{} [{:>width$}/{}] {:>11} {case}{why}",
            self.implementation, self.done, self.cases, judgement.verdict
        )
    }
}

impl Default for Progress {
    fn default() -> Progress {
        Progress::new()
    }
}
