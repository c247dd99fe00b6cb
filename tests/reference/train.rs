//! The training example. In worlds of processes a test starts `mpirun` on itself,
//! and the copies train as the example does.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, missing_docs)]

// `main` of the example is called by the example alone.
#[allow(dead_code)]
#[path = "../../reference/examples/train/main.rs"]
mod example;

use clap::Parser as _;
use example::{
    arguments::{Training, TrainingLine},
    compare::{beside, mpirun},
    curve::{self, Step},
    tolerance,
    trainer::Trainer,
};
use std::{env, sync::Arc, thread};
use ulysses::ThreadCommunicator;

/// Sequences of 67 tokens are cut into 34 and 33.
const MODEL: &str = "--steps 6 --layers 2 --hidden 32 --sequence 67";
const WORDS: &str = "ULYSSES_TRAIN";

fn training(words: &str) -> Training {
    let line = format!("train {MODEL} {words}");
    TrainingLine::parse_from(line.split_whitespace()).training
}

/// Trains with these words, under `mpirun` where we are started by it.
fn curves_are_those_of_one_process(name: &str, meshes: &[&str]) {
    if let Ok(words) = env::var(WORDS) {
        example::train(&training(&words)).unwrap();
        return;
    }
    let one = tolerance::one_process(&training("")).unwrap();
    assert!(
        one[5].step.loss < one[0].step.loss - 0.5,
        "nothing is learnt"
    );
    for due in &one {
        let relative = due.tolerance / due.step.loss;
        assert!(
            relative < 1e-12,
            "a tolerance of {relative:e} would see little"
        );
    }
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("curve.csv");
    for mesh in meshes {
        let words = format!("{mesh} --out {}", out.display());
        let ranks = training(mesh).mesh().ranks().unwrap();
        let ended = mpirun(ranks)
            .arg(env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture", "--test-threads=1"])
            .env(WORDS, words)
            // Not the one of all mpiruns: one that ends may remove it while another begins.
            .env("OMPI_MCA_orte_tmpdir_base", folder.path())
            .output()
            .expect("these tests need mpirun: install Open MPI");
        let said = String::from_utf8_lossy(&ended.stderr);
        assert!(ended.status.success(), "{mesh}: {said}");
        let compared = beside(&one, &curve::read(&out).unwrap()).unwrap();
        for (number, step) in compared.iter().enumerate() {
            assert!(step.is_within(), "{mesh}, step {number}: {step:?}");
        }
    }
}

#[test]
fn every_mesh_has_the_curve_of_one_process() {
    curves_are_those_of_one_process(
        "every_mesh_has_the_curve_of_one_process",
        &[
            "--sp 2",
            "--dp-replicate 2 --sp 2",
            "--dp-shard 2 --sp 2 --stage 2 --checkpointing --mlp-tiles 3 --loss-tiles 5",
        ],
    );
}

/// The curve of a mesh on threads, which every rank has.
fn on_threads(words: &str) -> Vec<Step> {
    let training = training(words);
    let ranks = training.mesh().ranks().unwrap();
    tch::set_num_threads(1);
    let curves: Vec<Vec<Step>> = thread::scope(|scope| {
        let ranks = ThreadCommunicator::world(ranks).into_iter().map(|rank| {
            let training = &training;
            scope.spawn(move || {
                let mut trainer = Trainer::new(Arc::new(rank), training).unwrap();
                let steps = (0..training.steps).map(|_| trainer.step().unwrap());
                steps.collect()
            })
        });
        let ranks: Vec<_> = ranks.collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    assert!(curves.iter().all(|curve| *curve == curves[0]), "{words}");
    curves.into_iter().next().unwrap()
}

/// With one sequence of a step for each replica, and so with one gradient.
#[test]
fn what_adds_in_the_same_order_has_the_same_bits() {
    let mesh = "--dp-shard 2 --sp 2 --sequences 2";
    let due = on_threads(mesh);
    for options in ["", "--checkpointing", "--stage 2"] {
        assert_eq!(on_threads(&format!("{mesh} {options}")), due, "{options}");
    }
    assert_ne!(on_threads(&format!("{mesh} --seed 2")), due);
}
