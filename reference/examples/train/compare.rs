//! A mesh under `mpirun` beside one process.

use super::{
    Result,
    arguments::Training,
    curve,
    tolerance::{self, Due},
};
use std::{env, process::Command};

/// One step of both.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Compared {
    pub(crate) one: f64,
    pub(crate) mesh: f64,
    pub(crate) tolerance: f64,
}

impl Compared {
    pub(crate) fn difference(&self) -> f64 {
        (self.mesh - self.one).abs()
    }

    /// False, too, where the loss is no number.
    pub(crate) fn is_within(&self) -> bool {
        self.difference() <= self.tolerance
    }
}

/// Trains on both. `words` are those that `training` was read from.
pub(crate) fn compare(training: &Training, words: &[String]) -> Result<Vec<Compared>> {
    let folder = tempfile::tempdir()?;
    let mut command = Vec::from(words);
    let out = training.out.clone().unwrap_or_else(|| {
        let out = folder.path().join("curve.csv");
        command.extend(["--out".to_owned(), out.display().to_string()]);
        out
    });
    let ranks = training.mesh().ranks().ok_or("there are too many ranks")?;
    let status = mpirun(ranks)
        .arg(env::current_exe()?)
        .args(command)
        .status()?;
    if !status.success() {
        return Err(format!("mpirun: {status}").into());
    }
    let mesh = curve::read(&out)?;
    beside(&tolerance::one_process(training)?, &mesh)
}

/// `mpirun` of so many ranks, still without a program.
pub(crate) fn mpirun(ranks: usize) -> Command {
    let mut command = Command::new("mpirun");
    command
        .args(["--oversubscribe", "--bind-to", "none"])
        .args(["-n", &ranks.to_string()])
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        .env("OMP_NUM_THREADS", "1");
    command
}

pub(crate) fn beside(one: &[Due], mesh: &[curve::Step]) -> Result<Vec<Compared>> {
    if one.len() != mesh.len() {
        return Err(format!("{} steps beside {}", mesh.len(), one.len()).into());
    }
    let steps = one.iter().zip(mesh);
    let compared = steps.map(|(one, mesh)| Compared {
        one: one.step.loss,
        mesh: mesh.loss,
        tolerance: one.tolerance,
    });
    Ok(compared.collect())
}
