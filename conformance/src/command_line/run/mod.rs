//! `run`: asks implementations and judges the answers.

mod known;
mod reports;

use std::env;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use fixtures::Case;
use ulysses::{DeviceChoice, Kernel};

use self::known::KnownFile;
use self::reports::Files;
use super::print;
use crate::implementation::{
    Bundled, Conditions, External, Implementation, Interrupt, kernel_parser, launch_of,
};
use crate::report::{self, Keeper, Notes};
use crate::runner::{self, Summary};
use crate::shrink::{self, Smallest};
use crate::{Clause, ExitCode, catalogue};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// What is judged; give it several times to judge one after the other
    #[arg(long, value_enum, value_name = "NAME", default_value = "reference")]
    implementation: Vec<Bundled>,

    /// Judge what this command starts instead: {world} in it is the number of
    /// ranks, {exchange} the folder of the exchange, which is in
    /// ULYSSES_EXCHANGE too
    #[arg(long, value_name = "COMMAND", conflicts_with = "implementation")]
    launch: Option<String>,

    /// Only cases whose name contains this text; given several times, all of
    /// the texts
    #[arg(long, value_name = "TEXT")]
    filter: Vec<String>,

    /// This case, in the catalogue or not, instead of the catalogue
    #[arg(long, value_name = "NAME")]
    case: Vec<Case>,

    /// This many random cases instead of the catalogue, drawn from the seed
    #[arg(long, value_name = "COUNT", conflicts_with = "case")]
    random: Option<usize>,

    /// Only cases on this many ranks
    #[arg(long, value_name = "RANKS", value_delimiter = ',')]
    world: Vec<usize>,

    /// Other values in every case of the catalogue than those of seed 0, or
    /// other random cases
    #[arg(long, value_name = "SEED", conflicts_with = "case")]
    seed: Option<u64>,

    /// Where ranks compute, and dense attention and the oracle with them: cpu,
    /// cuda (each rank on the GPU of its place on its host, several on one where
    /// there are fewer), or cuda:N [default: cuda where there is a device]
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceChoice>,

    /// The core attention of the reference, and of the dense attention that an
    /// answer may be bit-equal to; others are told it
    #[arg(long, value_parser = kernel_parser(), default_value = "sdpa")]
    kernel: Kernel,

    /// Seconds that every rank has to answer a case
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    time_limit: Duration,

    /// Seconds that every rank has to start
    #[arg(long, value_name = "SECONDS", default_value = "180", value_parser = seconds)]
    start_limit: Duration,

    /// Where the folders of the exchange are made; every rank must see it, so
    /// that ranks on several hosts want a shared file system [default:
    /// /dev/shm, or the folder for temporary files]
    #[arg(long, value_name = "FOLDER")]
    exchange: Option<PathBuf>,

    /// Print the names of the selected cases, each with the clauses of
    /// conformance/SPEC.md that it tests, and run none
    #[arg(long)]
    list: bool,

    #[command(flatten)]
    known: KnownFile,

    /// Search the smallest case that fails in the same way, for the first
    /// 5 failures of different kinds: 60 asks or a minute for each
    #[arg(long)]
    shrink: bool,

    #[command(flatten)]
    files: Files,
}

/// How many failures of an implementation are shrunk.
const SHRUNK: usize = 5;

/// A folder in memory where there is one: a case is written and read once.
fn exchange() -> PathBuf {
    let memory = PathBuf::from("/dev/shm");
    match memory.is_dir() {
        true => memory,
        false => env::temp_dir(),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    text.parse()
        .ok()
        .filter(|&seconds| seconds > 0.0)
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| "a number of seconds above 0 is due".to_owned())
}

/// Judges what is to be judged. `program` is how it was called.
pub(super) fn execute(arguments: &Arguments, program: &str) -> ExitCode {
    let cases = arguments.cases();
    if cases.is_empty() {
        eprintln!(
            "error: no case is selected: --case, --filter and --world leave none of the \
             catalogue's {}; --list without them prints all",
            catalogue::cases().len()
        );
        return ExitCode::NothingJudged;
    }
    if arguments.list {
        for case in cases {
            let ids: Vec<_> = Clause::of_case(&case).into_iter().map(Clause::id).collect();
            print(&format!("{case}  {}\n", ids.join(" ")));
        }
        return ExitCode::Success;
    }
    let interrupt = Interrupt::default();
    let on_signal = interrupt.clone();
    let handle = move || {
        // Who asks a second time does not want to wait for the ranks to end.
        if on_signal.is_set() {
            std::process::exit(ExitCode::Interrupted as i32);
        }
        on_signal.set();
    };
    if let Err(error) = ctrlc::set_handler(handle) {
        eprintln!("error: signals cannot be handled: {error}");
        return ExitCode::Environment;
    }
    let begun = arguments.conditions().and_then(|conditions| {
        let choices = arguments.choices(&conditions, &interrupt)?;
        Ok((conditions, choices))
    });
    let (conditions, choices) = match begun {
        Ok(begun) => begun,
        Err(reason) => {
            eprintln!("error: {reason}");
            return ExitCode::Environment;
        }
    };
    let reports = arguments.files.begin();
    let (mut known, mut reports) = match (arguments.known.read(), reports) {
        (Ok(known), Ok(reports)) => (known, reports),
        (Err(reason), _) | (_, Err(reason)) => {
            eprintln!("error: {reason}");
            return ExitCode::Environment;
        }
    };
    // One thread per rank. The setting is the process', and so the oracle's.
    tch::set_num_threads(1);
    let mut summaries = Vec::new();
    let mut failures = String::new();
    for Choice {
        mut implementation,
        flags,
    } in choices
    {
        let implementation = &mut *implementation;
        let command = format!("{program} run {flags}{}", arguments.limits_and_means());
        let mut keeper = arguments.keeper(implementation.name(), &command, &conditions);
        let summary = runner::run(
            implementation,
            &cases,
            &mut known,
            &interrupt,
            &mut |event| {
                reports.tell(&event);
                if let Some(keeper) = &mut keeper {
                    keeper.tell(&event);
                }
            },
        );
        let mut notes = Notes::new();
        if arguments.shrink {
            shrink(implementation, &summary, &command, &interrupt, &mut notes);
        }
        for (case, kept) in keeper.iter().flat_map(Keeper::kept) {
            let note = match kept {
                Ok(folder) => format!("kept: {}", folder.display()),
                Err(reason) => format!("could not be kept: {reason}"),
            };
            notes.entry(case.clone()).or_default().push(note);
        }
        failures += &report::failures(&summary, &command, &notes);
        summaries.push(summary);
    }
    print(&format!(
        "\n{failures}{}{}\n",
        report::declared(&summaries),
        report::verdicts(&summaries)
    ));
    if let Some(table) = report::closeness(&summaries) {
        print(&format!(
            "How near the right answers are: of each tensor how many are bit-equal to dense attention \
             by the\nsame kernel, and how far the worst number is off, relative to what it may be.\n\n\
             {table}\n{}\n",
            report::chance(&summaries)
        ));
    }
    if let Some(table) = report::closeness_of_profiles(&summaries) {
        print(&format!(
            "How near they are in the other profiles: how many answers are the right one rounded \
             once, and\nhow far the worst number is off, relative to what it may be.\n\n{table}\n"
        ));
    }
    if let Some(table) = report::costs(&summaries) {
        print(&format!("What a case takes, in the median.\n\n{table}\n"));
    }
    let settled = arguments
        .known
        .settle(known, &cases, ExitCode::of(&summaries));
    let (words, exit_code) = match settled {
        Ok(settled) => settled,
        Err(reason) => {
            eprintln!("error: {reason}");
            return ExitCode::Environment;
        }
    };
    print(&words);
    if let Err(reason) = reports.finish() {
        eprintln!("error: {reason}");
        return ExitCode::Environment;
    }
    print(&format!("{}\n", last_line(exit_code)));
    exit_code
}

/// Searches the smallest case of each kind of failure, and notes it.
fn shrink(
    implementation: &mut dyn Implementation,
    summary: &Summary,
    command: &str,
    interrupt: &Interrupt,
    notes: &mut Notes,
) {
    for record in shrink::distinct(&summary.records, SHRUNK) {
        eprintln!("{} shrinking {}", summary.implementation, record.case);
        let Smallest { case, is_complete } = shrink::smallest(implementation, record, interrupt);
        let more = match is_complete {
            true => "",
            false => "  (the search came to its limit)",
        };
        let note = match case == record.case {
            true => format!("smallest: no smaller case was found{more}"),
            false => format!("smallest: {command} --case {case}{more}"),
        };
        let of_case = notes.entry(record.case.to_string()).or_default();
        of_case.push(note);
    }
}

/// What is to be judged, and the flags that choose it.
struct Choice {
    implementation: Box<dyn Implementation>,
    flags: String,
}

impl Arguments {
    fn cases(&self) -> Vec<Case> {
        let mut cases = match (self.case.as_slice(), self.random) {
            ([], Some(count)) => {
                let random = catalogue::random::cases(count, self.seed.unwrap_or(0));
                random.map(Case::from).collect()
            }
            ([], None) => catalogue::cases(),
            (named, _) => named.to_vec(),
        };
        if let (Some(seed), None) = (self.seed, self.random) {
            cases = cases.into_iter().map(|case| case.with_seed(seed)).collect();
        }
        cases.retain(|case| {
            let name = case.to_string();
            self.filter.iter().all(|text| name.contains(text))
                && (self.world.is_empty() || self.world.contains(&case.world()))
        });
        cases
    }

    /// Under what conditions ranks run, on the device that was asked for or
    /// else on what there is.
    fn conditions(&self) -> Result<Conditions, String> {
        let device = self.device.unwrap_or_else(DeviceChoice::of_this_machine);
        if let Err(reason) = device.devices() {
            return Err(format!("--device {device}: {reason}"));
        }
        Ok(Conditions {
            start_limit: self.start_limit,
            case_limit: self.time_limit,
            exchange: self.exchange.clone().unwrap_or_else(exchange),
            device,
            kernel: self.kernel,
        })
    }

    fn choices(
        &self,
        conditions: &Conditions,
        interrupt: &Interrupt,
    ) -> Result<Vec<Choice>, String> {
        if let Some(command) = &self.launch {
            let launch = launch_of(command).map_err(|error| format!("--launch: {error}"))?;
            let launch = launch.for_device(conditions.device);
            let name = launch.name();
            let flags = format!("--launch {}", shell_words::quote(command));
            let external = External::new(name, launch, conditions.clone(), interrupt);
            return Ok(vec![Choice {
                implementation: Box::new(external),
                flags,
            }]);
        }
        self.implementation
            .iter()
            .map(|bundled| {
                let implementation = bundled.implementation(conditions.clone(), interrupt)?;
                let flags = format!("--implementation {}", bundled.name());
                Ok(Choice {
                    implementation,
                    flags,
                })
            })
            .collect()
    }

    fn keeper(
        &self,
        implementation: &str,
        command: &str,
        conditions: &Conditions,
    ) -> Option<Keeper> {
        let folder = self.files.keep.as_ref()?;
        Some(Keeper::new(folder, implementation, command, conditions))
    }

    /// The flags, besides those that choose implementation and case, without
    /// which a case would not be repeated as it was.
    fn limits_and_means(&self) -> String {
        let mut flags = String::new();
        if self.kernel != Kernel::Sdpa {
            flags += &format!(" --kernel {}", self.kernel.name());
        }
        if let Some(device) = self.device {
            flags += &format!(" --device {device}");
        }
        if self.time_limit != Duration::from_secs(30) {
            flags += &format!(" --time-limit {}", self.time_limit.as_secs_f64());
        }
        if let Some(exchange) = &self.exchange {
            let exchange = exchange.to_string_lossy();
            flags += &format!(" --exchange {}", shell_words::quote(&exchange));
        }
        flags
    }
}

fn last_line(exit_code: ExitCode) -> &'static str {
    match exit_code {
        ExitCode::Success => "All that was asked was answered rightly, or refused where due.",
        ExitCode::Failed => "Failures are listed above, each with the command that repeats it.",
        ExitCode::Unclear => "The harness could not judge every case: see above.",
        ExitCode::NothingJudged => "No case was judged, so nothing is shown.",
        ExitCode::Interrupted => "Interrupted: not every case was judged.",
        ExitCode::Usage | ExitCode::Environment => "",
    }
}
