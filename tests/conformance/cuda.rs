//! The judge and what it judges, on CUDA devices.
#![allow(missing_docs, clippy::unwrap_used)]

mod program;
#[path = "../simulated_cuda/mod.rs"]
mod simulated_cuda;

use std::env;
use std::process::ExitCode;

use fixtures::exchange::Precision;
use fixtures::{AttentionCase, Inputs};
use program::{Run, program};
use simulated_cuda::is_simulated;
use tch::Device;
use ulysses::cuda_devices;
use ulysses_conformance::oracle::{AnswerTensor, attention_rounded};

fn main() -> ExitCode {
    let mut tests: Vec<(&str, fn())> = vec![
        (
            "the_oracle_says_what_it_says_on_a_cpu",
            the_oracle_says_what_it_says_on_a_cpu,
        ),
        (
            "a_device_that_is_not_there_is_named",
            a_device_that_is_not_there_is_named,
        ),
        (
            "the_reference_on_threads_is_right",
            the_reference_on_threads_is_right,
        ),
        (
            "the_reference_over_mpi_is_right",
            the_reference_over_mpi_is_right,
        ),
        (
            "every_kernel_there_is_is_right",
            every_kernel_there_is_is_right,
        ),
    ];
    // Python has the torch of a real device.
    if !is_simulated() {
        tests.push(("plain_torch_is_right", plain_torch_is_right));
    }
    simulated_cuda::suite(&tests)
}

/// The program on the devices that this process has.
fn run(arguments: &str) -> Run {
    let mut program = program();
    match env::var_os("CUDA_VISIBLE_DEVICES") {
        Some(visible) => program.env("CUDA_VISIBLE_DEVICES", visible),
        None => program.env_remove("CUDA_VISIBLE_DEVICES"),
    };
    program
        .args(arguments.split_whitespace())
        .output()
        .unwrap()
        .into()
}

/// All cases of such a run are right, and there are some.
fn expect_right(arguments: &str) {
    let run = run(arguments);
    assert_eq!(run.code, 0, "{arguments}\n{}\n{}", run.stdout, run.stderr);
}

fn the_oracle_says_what_it_says_on_a_cpu() {
    for name in [
        "attention/p2-b2-s13-hq6-hkv2-d8-causal-f64-gaussian-seed1",
        "attention/p2-b1-s24-hq4-hkv2-d16-full-f32-gaussian-seed0-window7-alibi-sinks-norms-rope",
    ] {
        let case: AttentionCase = name.parse().unwrap();
        let inputs = Inputs::of(&case);
        let [on_host, on_device] = [Device::Cpu, Device::Cuda(0)]
            .map(|device| attention_rounded(&case, &inputs, (Precision::Fused, device), None));
        let (on_host, on_device) = (on_host.unwrap(), on_device.unwrap());
        for tensor in AnswerTensor::ALL {
            let pairs = [
                (on_host.right.get(tensor), on_device.right.get(tensor)),
                (on_host.roots.get(tensor), on_device.roots.get(tensor)),
            ];
            for (host, device) in pairs {
                let (Some(host), Some(device)) = (host, device) else {
                    assert_eq!(host.is_some(), device.is_some());
                    continue;
                };
                let largest = host.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
                for (host, device) in host.iter().zip(device) {
                    assert!(
                        (host - device).abs() <= 1e-12 * largest,
                        "{name} {tensor:?}"
                    );
                }
            }
        }
    }
}

fn a_device_that_is_not_there_is_named() {
    let count = cuda_devices().unwrap();
    let run = run(&format!("run --device cuda:{count}"));
    assert_eq!(run.code, 5);
    let said = format!(
        "error: --device cuda:{count}: no device cuda:{count}: this process sees {count}, \
         from cuda:0 on\n"
    );
    assert_eq!(run.stderr, said);
}

fn the_reference_on_threads_is_right() {
    let world = if is_simulated() { "2" } else { "1,2,4" };
    expect_right(&format!("run --device cuda --world {world}"));
}

fn the_reference_over_mpi_is_right() {
    let reference = "run --device cuda --implementation reference-mpi --world 2";
    match is_simulated() {
        true => expect_right(&format!("{reference} --filter bf16")),
        false => expect_right(reference),
    }
}

fn every_kernel_there_is_is_right() {
    let listed = run("kernels --device cuda");
    assert_eq!(listed.code, 0, "{}", listed.stderr);
    let rows = listed.stdout.lines().filter(|line| line.starts_with("| "));
    let there: Vec<&str> = rows
        .filter(|row| row.contains("yes") || row.contains("no groups"))
        .filter_map(|row| row.split_whitespace().nth(1))
        .collect();
    assert!(
        there.contains(&"eager") && there.contains(&"math"),
        "{}",
        listed.stdout
    );
    for kernel in there {
        expect_right(&format!(
            "run --device cuda --kernel {kernel} --filter p2- --filter s84"
        ));
    }
}

fn plain_torch_is_right() {
    expect_right("run --device cuda --implementation torch-plain --world 1,2");
}
