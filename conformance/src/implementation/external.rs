//! An implementation behind the exchange: somebody's command, started on as
//! many ranks as the cases want.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fixtures::exchange::{CaseInfo, Tensors};

use ulysses::{DeviceChoice, Kernel};

use super::pool::Pool;
use super::{Claims, Collapse, Failure, Implementation, Interrupt, Log, RankAnswer};

/// A command that starts the ranks.
#[derive(Clone, Debug)]
pub struct Launch {
    words: Vec<String>,
    environment: Vec<(String, OsString)>,
}

/// Why a text is no command.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// There is not one word in it.
    #[error("the command is empty")]
    Empty,
    /// A quote is not closed.
    #[error("{0}")]
    Quotes(#[from] shell_words::ParseError),
    /// The program is not on this machine.
    #[error("there is no program `{0}`")]
    NoProgram(String),
}

impl Launch {
    /// A command as one would type it, with `{world}` and `{exchange}` for the
    /// number of ranks and the folder of the exchange. No shell is involved.
    pub fn parse(command: &str) -> Result<Launch, LaunchError> {
        Launch::new(shell_words::split(command)?)
    }

    /// A command, word by word.
    pub fn new(words: Vec<String>) -> Result<Launch, LaunchError> {
        let program = words.first().ok_or(LaunchError::Empty)?;
        if which::which(program).is_err() {
            return Err(LaunchError::NoProgram(program.clone()));
        }
        Ok(Launch {
            words,
            environment: Vec::new(),
        })
    }

    /// The same command with a variable in its environment.
    pub fn with_variable(mut self, name: &str, value: impl Into<OsString>) -> Launch {
        self.environment.push((name.to_owned(), value.into()));
        self
    }

    /// The same command with no GPU in sight where ranks are to compute without:
    /// a framework that sees one may use it.
    pub fn for_device(self, device: DeviceChoice) -> Launch {
        match device {
            DeviceChoice::Cpu => self.with_variable("CUDA_VISIBLE_DEVICES", ""),
            DeviceChoice::Cuda | DeviceChoice::CudaAt(_) => self,
        }
    }

    /// What to call it: the file name of the last word, which is the adapter's
    /// in `torchrun --nproc-per-node {world} my_adapter.py`.
    pub fn name(&self) -> String {
        let last = self.words.last().map(Path::new);
        let name = last.and_then(Path::file_name).unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// The words of the command for `world` ranks. There is at least one.
    pub(super) fn words(&self, world: usize, exchange: &Path) -> Vec<String> {
        let (world, exchange) = (world.to_string(), exchange.to_string_lossy());
        self.words
            .iter()
            .map(|word| {
                word.replace("{world}", &world)
                    .replace("{exchange}", &exchange)
            })
            .collect()
    }

    pub(super) fn environment(&self) -> impl Iterator<Item = (&str, &OsString)> {
        self.environment
            .iter()
            .map(|(name, value)| (name.as_str(), value))
    }
}

impl fmt::Display for Launch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&shell_words::join(&self.words))
    }
}

/// Under what conditions ranks run.
#[derive(Clone, Debug)]
pub struct Conditions {
    /// How long every rank has to say hello.
    pub start_limit: Duration,
    /// How long every rank has to answer a case.
    pub case_limit: Duration,
    /// Where the folders of the exchange are made. All ranks must see it.
    pub exchange: PathBuf,
    /// Where ranks are to compute.
    pub device: DeviceChoice,
    /// By which kernel of attention they are to, if they can choose.
    pub kernel: Kernel,
}

/// An implementation behind the exchange.
pub struct External {
    name: String,
    launch: Launch,
    conditions: Conditions,
    interrupt: Interrupt,
    pool: Option<Pool>,
    /// The world sizes on which it was started.
    started: BTreeSet<usize>,
    /// The world sizes on which it cannot be started.
    unstartable: BTreeMap<usize, Unstartable>,
}

/// What is told of cases on a world size on which it cannot be started, which
/// takes too long to be tried for each.
struct Unstartable {
    failure: Failure,
    /// What was written then.
    logs: Vec<Log>,
    /// After how many cases it is tried again, twice as many each time: a host
    /// may come back. Nothing where it never was started.
    pause: Option<usize>,
    /// How many cases were told so since.
    told: usize,
}

impl External {
    /// The implementation that `launch` starts.
    pub fn new(
        name: impl Into<String>,
        launch: Launch,
        conditions: Conditions,
        interrupt: &Interrupt,
    ) -> External {
        External {
            name: name.into(),
            launch,
            conditions,
            interrupt: interrupt.clone(),
            pool: None,
            started: BTreeSet::new(),
            unstartable: BTreeMap::new(),
        }
    }

    /// Ranks that wait for a case: those of before, or fresh ones.
    fn pool(&mut self, world: usize) -> Result<&mut Pool, Failure> {
        if let Some(unstartable) = self.unstartable.get_mut(&world)
            && unstartable.pause != Some(unstartable.told)
        {
            unstartable.told += 1;
            return Err(not_tried(&unstartable.failure));
        }
        let old = self.pool.take();
        let pool = match old.filter(|pool| pool.world() == world && pool.is_idle()) {
            Some(pool) => pool,
            None => self.start(world)?,
        };
        Ok(self.pool.insert(pool))
    }

    /// Fresh ranks, or how that failed, which is kept.
    fn start(&mut self, world: usize) -> Result<Pool, Failure> {
        let before = self.unstartable.remove(&world);
        match Pool::start(&self.launch, world, &self.conditions, &self.interrupt) {
            Ok(pool) => {
                self.started.insert(world);
                Ok(pool)
            }
            Err((Failure::Interrupted, _)) => Err(Failure::Interrupted),
            Err((failure, logs)) => {
                let unstartable = Unstartable {
                    failure: failure.clone(),
                    logs,
                    pause: match before.and_then(|before| before.pause) {
                        Some(pause) => Some(2 * pause),
                        None => self.started.contains(&world).then_some(1),
                    },
                    told: 0,
                };
                self.unstartable.insert(world, unstartable);
                Err(failure)
            }
        }
    }
}

impl Implementation for External {
    fn name(&self) -> &str {
        &self.name
    }

    fn claims(&mut self, world: usize) -> Result<Claims, Failure> {
        Ok(self.pool(world)?.claims())
    }

    fn ask(&mut self, posed: Vec<(CaseInfo, Tensors)>) -> Result<Vec<RankAnswer>, Failure> {
        self.pool(posed.len())?.ask(posed)
    }

    fn logs(&self, world: usize) -> Vec<Log> {
        match (&self.pool, self.unstartable.get(&world)) {
            (_, Some(unstartable)) => unstartable.logs.clone(),
            (Some(pool), None) if pool.world() == world => pool.written(),
            _ => Vec::new(),
        }
    }
}

/// The same failure for a case for which no start was tried. What was written is
/// told where one was.
fn not_tried(failure: &Failure) -> Failure {
    let again = |collapse: &Collapse| Collapse {
        sentence: format!("as before: {}", collapse.sentence),
        logs: Vec::new(),
        is_of_ranks: collapse.is_of_ranks,
    };
    match failure {
        Failure::Crashed(collapse) => Failure::Crashed(again(collapse)),
        Failure::Hung(collapse) => Failure::Hung(again(collapse)),
        other => other.clone(),
    }
}
