//! Trains a small Llama on real text, with data and sequence parallelism, and
//! shows that the loss is that of one process.
//!
//!     cargo run -p ulysses --example train
//!     cargo run -p ulysses --example train -- compare --dp-shard 2 --sp 2
//!
//! | module | holds |
//! |---|---|
//! | `arguments` | the command line |
//! | `tokenizer` | from text to token ids |
//! | `samples` | which samples of the text a rank reads |
//! | `weights` | initial weights |
//! | `trainer` | one rank's part of the training |
//! | `curve` | what it gives |
//! | `tolerance` | how far curves may be apart |
//! | `compare`, `plot` | a mesh beside one process |

pub(crate) mod arguments;
pub(crate) mod compare;
pub(crate) mod curve;
mod plot;
mod samples;
mod tokenizer;
pub(crate) mod tolerance;
pub(crate) mod trainer;
mod weights;

use arguments::{Command, CommandLine, Training, TrainingLine};
use clap::Parser;
use compare::Compared;
use std::{env, error::Error, path::Path, process::ExitCode, sync::Arc};
use trainer::Trainer;
use ulysses::{Communicator, MpiWorld};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

fn main() -> ExitCode {
    let line = CommandLine::parse();
    let done = match line.command {
        None => train(&line.training),
        Some(Command::Compare { plot, training }) => compare(plot.as_deref(), &training),
    };
    done.unwrap_or_else(|error| {
        eprintln!("train: {error}");
        ExitCode::FAILURE
    })
}

/// As one process, or as one of `mpirun`.
pub(crate) fn train(training: &Training) -> Result<ExitCode> {
    // More threads would add in an order that depends on the machine.
    tch::set_num_threads(1);
    let by_mpirun = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"].map(env::var_os);
    if by_mpirun.iter().all(Option::is_none) {
        steps(tolerance::world_of_one()?, training)?;
    } else {
        let world = MpiWorld::initialize()?;
        steps(Arc::new(world.communicator()), training)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Rank 0 says how it goes, and writes the curve.
fn steps(world: Arc<dyn Communicator>, training: &Training) -> Result<()> {
    let first = world.rank() == 0;
    let mut trainer = Trainer::new(world, training)?;
    let mut curve = Vec::new();
    for number in 0..training.steps {
        let step = trainer.step()?;
        if first && (number % 10 == 0 || number + 1 == training.steps) {
            println!("step {number}: loss {}", step.loss);
        }
        curve.push(step);
    }
    match &training.out {
        Some(out) if first => curve::write(out, &curve),
        _ => Ok(()),
    }
}

fn compare(plot: Option<&Path>, words: &[String]) -> Result<ExitCode> {
    let line = TrainingLine::parse_from(
        ["train compare"]
            .into_iter()
            .chain(words.iter().map(String::as_str)),
    );
    let training = line.training;
    tch::set_num_threads(1);
    let steps = compare::compare(&training, words)?;
    let mesh = training.mesh();
    if let Some(path) = plot {
        let caption = "Loss of a small Llama on Alice's Adventures in Wonderland";
        plot::draw(path, caption, &format!("{mesh}"), &steps)?;
    }
    let most = |measure: fn(&Compared) -> f64| {
        let measured = steps.iter().map(measure).enumerate();
        measured
            .max_by(|a, b| a.1.total_cmp(&b.1))
            .unwrap_or((0, 0.0))
    };
    let (step, difference) = most(Compared::difference);
    println!("{mesh} beside one process:");
    println!("largest difference of the loss: {difference:.2e}, in step {step}");
    let (step, part) = most(|step| step.difference() / step.tolerance);
    println!(
        "largest part of its tolerance: {:.3} %, in step {step}",
        100.0 * part
    );
    Ok(match steps.iter().position(|step| !step.is_within()) {
        None => ExitCode::SUCCESS,
        Some(step) => {
            println!("step {step} is beyond its tolerance");
            ExitCode::FAILURE
        }
    })
}
