//! A group of ranks that somebody's launcher started, and that stays alive
//! between cases.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::mem;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use fixtures::exchange::{
    AnswerStatus, CaseInfo, Declared, FOLDER_VARIABLE, Hello, Judge, PROTOCOL, Session,
    SessionInfo, Tensors,
};
use tempfile::TempDir;

use super::collapse::{self, Collapse, LastSeen};
use super::{
    Claims, Conditions, Failure, Interrupt, Launch, Log, Means, RankAnswer, processes,
    telling_line, told,
};

/// How long ranks have to leave once there are no more cases.
const LEAVE: Duration = Duration::from_secs(5);
/// How long a launcher has to say what it saw, once one of its ranks ended.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// How long the other ranks have to answer once one has answered with an error:
/// they may wait for it in a collective that it never enters.
const AFTER_AN_ERROR: Duration = Duration::from_secs(5);
/// How often it is seen to that ranks and launcher still live.
const PULSE: Duration = Duration::from_millis(5);
/// How many lines of each stream are kept for a report: the first, which name
/// the cause and where it was, and the last.
const LOG_LINES: (usize, usize) = (24, 4);

pub(super) struct Pool {
    session: Session,
    launcher: Child,
    world: usize,
    hellos: Vec<Option<Hello>>,
    next_number: usize,
    case_limit: Duration,
    means: Means,
    interrupt: Interrupt,
    host: String,
    /// Whether the ranks are known to be waiting for the next case.
    is_idle: bool,
    /// How much each log held before the case.
    logged: BTreeMap<PathBuf, u64>,
    /// How much each held when the ranks became idle: what ended them while they
    /// were counts for the next case.
    at_rest: BTreeMap<PathBuf, u64>,
    /// Removed, with all that is in it, when the pool is dropped.
    folder: TempDir,
}

/// What a look at the ranks shows.
enum Look {
    Done,
    Waiting,
    /// One rank answered with an error, and others have not answered.
    Doomed,
}

/// How a wait for the ranks ended.
enum Waited {
    Done,
    /// These ranks ended; with none in it, the launcher did.
    Died(Vec<usize>),
    TimedOut,
    Interrupted,
}

impl Pool {
    /// Starts `world` ranks and waits until each has said hello. With a failure
    /// comes what was written.
    pub(super) fn start(
        launch: &Launch,
        world: usize,
        conditions: &Conditions,
        interrupt: &Interrupt,
    ) -> Result<Pool, (Failure, Vec<Log>)> {
        let mut pool = Pool::launch(launch, world, conditions, interrupt).map_err(|error| {
            let reason = format!("`{launch}` cannot be started: {error}");
            (Failure::Harness(reason), Vec::new())
        })?;
        let deadline = Instant::now() + conditions.start_limit;
        let waited = pool.wait(deadline, |pool| {
            for rank in 0..world {
                if pool.hellos[rank].is_none() {
                    pool.hellos[rank] = pool.session.hello(rank).ok();
                }
            }
            match pool.hellos.iter().all(Option::is_some) {
                true => Look::Done,
                false => Look::Waiting,
            }
        });
        let missing = pool.with_progress((0..world).filter(|&rank| pool.hellos[rank].is_none()));
        let has_died = matches!(&waited, Waited::Died(dead) if !dead.is_empty());
        let (failure, sentence): (fn(Collapse) -> Failure, String) = match waited {
            Waited::Done => match pool.unfit_hello() {
                None => {
                    pool.is_idle = true;
                    pool.at_rest = pool.log_lengths();
                    return Ok(pool);
                }
                Some(reason) => (Failure::Crashed, reason),
            },
            Waited::Died(dead) if dead.is_empty() => (
                Failure::Crashed,
                format!("the launcher ended before a hello of {missing}"),
            ),
            Waited::Died(dead) => (
                Failure::Crashed,
                format!("a process ended at the start: {}", pool.with_progress(dead)),
            ),
            Waited::TimedOut => (
                Failure::Hung,
                format!(
                    "no hello within {} s: {missing}",
                    conditions.start_limit.as_secs_f64()
                ),
            ),
            Waited::Interrupted => return Err((Failure::Interrupted, Vec::new())),
        };
        let mut collapse = pool.collapse(sentence, 0..world);
        collapse.is_of_ranks &= has_died;
        Err((failure(collapse), pool.written()))
    }

    fn launch(
        launch: &Launch,
        world: usize,
        conditions: &Conditions,
        interrupt: &Interrupt,
    ) -> io::Result<Pool> {
        let folder = tempfile::Builder::new()
            .prefix("ulysses-")
            .tempdir_in(&conditions.exchange)?;
        let host = hostname::get()?.to_string_lossy().into_owned();
        let info = SessionInfo {
            protocol: PROTOCOL,
            world,
            device: conditions.device.to_string(),
            kernel: conditions.kernel.name().to_owned(),
            time_limit_s: conditions.case_limit.as_secs_f64(),
            judge: Judge {
                pid: std::process::id(),
                host: host.clone(),
            },
        };
        let session = Session::create(folder.path(), &info).map_err(io::Error::other)?;
        let log = |stream| File::create(session.log_path("launcher", stream));
        let words = launch.words(world, folder.path());
        let launcher = Command::new(&words[0])
            .args(&words[1..])
            .envs(launch.environment())
            .env(FOLDER_VARIABLE, folder.path())
            .stdin(Stdio::null())
            .stdout(log("stdout")?)
            .stderr(log("stderr")?)
            // An interrupt from the terminal is for the judge alone, who then
            // ends the ranks.
            .process_group(0)
            .spawn()?;
        Ok(Pool {
            session,
            launcher,
            world,
            hellos: vec![None; world],
            next_number: 0,
            case_limit: conditions.case_limit,
            means: Means {
                device: conditions.device.device(0).map_err(io::Error::other)?,
                kernel: conditions.kernel,
            },
            interrupt: interrupt.clone(),
            host,
            is_idle: false,
            logged: BTreeMap::new(),
            at_rest: BTreeMap::new(),
            folder,
        })
    }

    /// What is wrong with a rank's hello, if anything is.
    fn unfit_hello(&self) -> Option<String> {
        let declared = self.declared();
        self.hellos
            .iter()
            .flatten()
            .enumerate()
            .find_map(|(rank, hello)| {
                let said = (hello.protocol, hello.rank, hello.world);
                let due = (PROTOCOL, rank, self.world);
                if said != due {
                    return Some(format!(
                        "rank {rank} said hello with protocol, rank and world {said:?}, \
                         due is {due:?}"
                    ));
                }
                (hello.declared != declared)
                    .then(|| format!("rank {rank} declares {}, rank 0 {declared}", hello.declared))
            })
    }

    /// The features that every rank claims, and what all declare.
    pub(super) fn claims(&self) -> Claims {
        Claims {
            features: self
                .hellos
                .iter()
                .flatten()
                .map(|hello| hello.features.clone())
                .reduce(|all, features| &all & &features)
                .unwrap_or_default(),
            declared: self.declared(),
            means: self.means,
        }
    }

    /// What rank 0 declares, and so all ranks.
    fn declared(&self) -> Declared {
        let first = self.hellos.iter().flatten().next();
        first.map(|hello| hello.declared).unwrap_or_default()
    }

    /// How many ranks there are.
    pub(super) fn world(&self) -> usize {
        self.world
    }

    /// Whether the ranks can be asked.
    pub(super) fn is_idle(&self) -> bool {
        self.is_idle
    }

    /// Asks the ranks one case.
    pub(super) fn ask(
        &mut self,
        mut posed: Vec<(CaseInfo, Tensors)>,
    ) -> Result<Vec<RankAnswer>, Failure> {
        let number = self.next_number;
        self.next_number += 1;
        self.is_idle = false;
        self.logged = mem::take(&mut self.at_rest);
        for (info, _) in &mut posed {
            info.number = number;
        }
        if let Err(error) = self.session.pose(&posed) {
            return Err(Failure::Harness(error.to_string()));
        }
        let deadline = Instant::now() + self.case_limit;
        let mut answers: Vec<Option<RankAnswer>> = vec![None; self.world];
        let waited = self.wait(deadline, |pool| {
            for (rank, answer) in answers.iter_mut().enumerate() {
                if answer.is_none() {
                    *answer = pool.read_answer(number, rank);
                }
            }
            let is_error = |answer: &RankAnswer| {
                matches!(answer, Ok((info, _)) if info.status != AnswerStatus::Ok)
            };
            if answers.iter().all(Option::is_some) {
                Look::Done
            } else if answers.iter().flatten().any(is_error) {
                Look::Doomed
            } else {
                Look::Waiting
            }
        });
        let silent = || (0..self.world).filter(|&rank| answers[rank].is_none());
        match waited {
            Waited::Done => match self.session.forget(number) {
                Ok(()) => {
                    self.at_rest = self.log_lengths();
                    // Ranks that raised an error may have left a collective
                    // half done, and the next case would pay for it. What is
                    // unsupported is said before any.
                    self.is_idle = !answers.iter().flatten().any(|answer| {
                        matches!(answer, Ok((info, _)) if info.status == AnswerStatus::Error)
                    });
                    Ok(answers.into_iter().flatten().collect())
                }
                Err(error) => Err(Failure::Harness(error.to_string())),
            },
            Waited::Died(dead) if dead.is_empty() => {
                let ranks = self.with_progress(silent());
                let sentence = format!("the launcher ended before an answer of {ranks}");
                Err(Failure::Crashed(self.collapse(sentence, silent())))
            }
            Waited::Died(dead) => {
                let seen = dead.iter().map(|&rank| self.last_seen(rank, &answers));
                let sentence = collapse::ended(number, &seen.collect::<Vec<_>>());
                Err(Failure::Crashed(self.collapse(sentence, dead)))
            }
            Waited::TimedOut => {
                let seen = |rank| self.last_seen(rank, &answers);
                let waiting = |ranks: Vec<usize>| {
                    let seen: Vec<_> = ranks.into_iter().map(seen).collect();
                    collapse::waiting(number, &seen)
                };
                let ranks = self.with_progress(silent());
                // A rank that raised an error is why the others wait.
                let errors = answers.iter().enumerate().filter_map(|(rank, answer)| {
                    let (info, _) = answer.as_ref()?.as_ref().ok()?;
                    (info.status != AnswerStatus::Ok).then_some((rank, info.message.trim()))
                });
                let sentence = match errors.clone().next() {
                    None => {
                        let limit = self.case_limit.as_secs_f64();
                        let waiting = waiting((0..self.world).collect()).unwrap_or(ranks);
                        format!("no answer within {limit} s: {waiting}")
                    }
                    Some((rank, message)) => {
                        let line = telling_line(message);
                        let waiting = waiting(silent().collect())
                            .unwrap_or_else(|| format!("no answer of {ranks}"));
                        format!("rank {rank}: {line}, and {waiting}")
                    }
                };
                let mut collapse = self.collapse(sentence, silent());
                collapse.logs.splice(0..0, told(errors));
                Err(Failure::Hung(collapse))
            }
            Waited::Interrupted => Err(Failure::Interrupted),
        }
    }

    fn read_answer(&self, number: usize, rank: usize) -> Option<RankAnswer> {
        match self.session.result(number, rank) {
            Err(error) if error.is_not_found() => None,
            Err(error) => Some(Err(error.to_string())),
            Ok(answer) => Some(Ok(answer)),
        }
    }

    fn wait(&mut self, deadline: Instant, mut look: impl FnMut(&mut Pool) -> Look) -> Waited {
        let start = Instant::now();
        let mut doom = None;
        let mut next_pulse = start + PULSE;
        loop {
            match look(self) {
                Look::Done => return Waited::Done,
                Look::Waiting => {}
                Look::Doomed => {
                    doom.get_or_insert(Instant::now() + AFTER_AN_ERROR);
                }
            }
            if self.interrupt.is_set() {
                return Waited::Interrupted;
            }
            let now = Instant::now();
            if now >= doom.unwrap_or(deadline).min(deadline) {
                return Waited::TimedOut;
            }
            if now >= next_pulse {
                next_pulse = now + PULSE;
                if let Some(dead) = self.dead() {
                    self.wait_for_launcher(LAST_WORDS);
                    // A rank may have answered and then ended.
                    return match look(self) {
                        Look::Done => Waited::Done,
                        _ => Waited::Died(dead),
                    };
                }
            }
            // A small case takes milliseconds, so look often at first.
            let waited = now - start;
            thread::sleep((waited / 20).clamp(Duration::from_micros(100), PULSE));
        }
    }

    /// The ranks that have ended, or none of them if the launcher failed, or
    /// nothing if all is well. What runs on another host is taken to live.
    fn dead(&mut self) -> Option<Vec<usize>> {
        let dead: Vec<usize> = self
            .hellos
            .iter()
            .flatten()
            .filter(|hello| hello.host == self.host && !processes::is_alive(hello.pid))
            .map(|hello| hello.rank)
            .collect();
        // A launcher that succeeded may have left its ranks behind on purpose.
        let launcher_failed =
            matches!(self.launcher.try_wait(), Ok(Some(status)) if !status.success());
        (!dead.is_empty() || launcher_failed).then_some(dead)
    }

    /// `rank 1 (case 17: forward), rank 3`: who, and what it last said it does.
    fn with_progress(&self, ranks: impl IntoIterator<Item = usize>) -> String {
        let one = |rank: usize| match self.session.progress(rank) {
            Some(doing) => format!("rank {rank} ({})", doing.trim()),
            None => format!("rank {rank}"),
        };
        ranks.into_iter().map(one).collect::<Vec<_>>().join(", ")
    }

    fn last_seen(&self, rank: usize, answers: &[Option<RankAnswer>]) -> LastSeen {
        LastSeen {
            rank,
            line: self.session.progress(rank),
            has_answered: answers[rank].is_some(),
        }
    }

    /// Ends what is left of the ranks and keeps what launcher and `suspects`
    /// wrote. What the others wrote while they were ended would only hide it.
    fn collapse(
        &mut self,
        mut sentence: String,
        suspects: impl IntoIterator<Item = usize>,
    ) -> Collapse {
        self.is_idle = false;
        processes::end_all(self.folder.path());
        let hosts = self.hellos.iter().flatten();
        let spread = collapse::spread(hosts.map(|hello| (hello.rank, &*hello.host)));
        let hint = spread.as_ref().map(|spread| {
            sentence = format!("{sentence}; {spread}");
            format!(
                "a host, or the network between them, may be why: from {} it is not seen what \
                 ends on another host",
                self.host
            )
        });
        let mut logs = self.log_lines(suspects, |path| self.since_idle(path));
        if logs.is_empty() {
            // A launcher may lose a host while the case before is answered.
            logs = self.log_lines([], |path| fs::read(path).unwrap_or_default());
        }
        Collapse {
            sentence,
            is_of_ranks: hint.is_none(),
            logs: hint.into_iter().chain(logs).collect(),
        }
    }

    /// What `read` finds in the logs of `ranks` and launcher, a line each.
    fn log_lines(
        &self,
        ranks: impl IntoIterator<Item = usize>,
        read: impl Fn(&Path) -> Vec<u8>,
    ) -> Vec<String> {
        self.logs(ranks)
            .flat_map(|(who, stream, path)| {
                let lines = abridged(&read(&path)).into_iter();
                lines.map(move |line| format!("{who} {stream}: {line}"))
            })
            .collect()
    }

    fn log_lengths(&self) -> BTreeMap<PathBuf, u64> {
        self.logs(0..self.world)
            .map(|(_, _, path)| {
                let length = fs::metadata(&path).map_or(0, |file| file.len());
                (path, length)
            })
            .collect()
    }

    /// What all ranks and the launcher have written for the last case, of those
    /// that wrote anything.
    pub(super) fn written(&self) -> Vec<Log> {
        self.logs(0..self.world)
            .map(|(who, stream, path)| Log {
                who,
                stream,
                bytes: self.since_idle(&path),
            })
            .filter(|log| !log.bytes.is_empty())
            .collect()
    }

    /// What was written to a log since the case before was answered.
    fn since_idle(&self, path: &Path) -> Vec<u8> {
        let already = self.logged.get(path).copied().unwrap_or_default();
        let mut bytes = fs::read(path).unwrap_or_default();
        bytes.drain(..bytes.len().min(already as usize));
        bytes
    }

    /// The streams of `ranks` and launcher: whose, which, and their files.
    fn logs(
        &self,
        ranks: impl IntoIterator<Item = usize>,
    ) -> impl Iterator<Item = (String, &'static str, PathBuf)> {
        ranks
            .into_iter()
            .map(|rank| format!("rank-{rank}"))
            .chain(["launcher".to_owned()])
            .flat_map(|who| {
                ["stderr", "stdout"].map(|stream| {
                    let path = self.session.log_path(&who, stream);
                    (who.clone(), stream, path)
                })
            })
    }

    fn wait_for_launcher(&mut self, limit: Duration) {
        let deadline = Instant::now() + limit;
        while matches!(self.launcher.try_wait(), Ok(None)) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Pool {
    /// Asks idle ranks to leave, and ends those that are still there.
    fn drop(&mut self) {
        if self.is_idle && self.session.end().is_ok() {
            self.wait_for_launcher(LEAVE);
        }
        processes::end_all(self.folder.path());
        self.wait_for_launcher(LEAVE);
    }
}

/// The lines of a log, the middle left out where there are many.
fn abridged(log: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(log);
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let (first, last) = LOG_LINES;
    let more = lines.len().saturating_sub(first + last);
    if more > 0 {
        let left_out = format!("... {more} lines ...");
        lines.splice(first..first + more, [left_out]);
    }
    lines
}
