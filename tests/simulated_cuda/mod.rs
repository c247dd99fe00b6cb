//! A suite of tests for CUDA: on the devices of this machine, where there are
//! some, and on simulated ones.
//!
//! libtest cannot skip a test at run time, so a suite is a program of its own on
//! libtest-mimic. Without a device each test is counted as ignored, and says so.

use libtest_mimic::{Arguments, Completion, Failed, Trial, run};
use std::{
    env, fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};
use ulysses::cuda_devices;

/// In the environment of what runs on simulated devices: how many.
const DEVICES: &str = "SIMULATED_CUDA_DEVICES";

/// Whether the devices are simulated.
pub(crate) fn is_simulated() -> bool {
    env::var_os(DEVICES).is_some()
}

/// Runs the tests of a suite, each by its name.
pub(crate) fn suite(tests: &[(&'static str, fn())]) -> ExitCode {
    let mut arguments = Arguments::from_args();
    // They share the devices.
    arguments.test_threads = Some(1);
    let mut trials: Vec<Trial> = tests
        .iter()
        .map(|&(name, test)| {
            Trial::ignorable_test(name, move || {
                if cuda_devices().is_err() {
                    return Ok(Completion::ignored_with("skipped: no CUDA device"));
                }
                test();
                Ok(Completion::Completed)
            })
        })
        .collect();
    if !is_simulated() {
        trials.push(Trial::test(
            "all_on_simulated_devices",
            all_on_simulated_devices,
        ));
    }
    run(&arguments, trials).exit_code()
}

fn all_on_simulated_devices() -> Result<(), Failed> {
    let output = Command::new(env::current_exe()?)
        .env("LD_PRELOAD", library()?)
        .env(DEVICES, "2")
        .env_remove("CUDA_VISIBLE_DEVICES")
        .output()?;
    let told = [output.stdout, output.stderr].concat();
    let told = String::from_utf8_lossy(&told);
    match output.status.success() && told.contains(" 0 failed; 0 ignored") {
        true => Ok(()),
        false => Err(told.into_owned().into()),
    }
}

/// The library of the simulation, compiled once for its sources.
fn library() -> Result<PathBuf, Failed> {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/simulated_cuda");
    let libtorch = fs::canonicalize(env::var("LIBTORCH")?)?;
    let mut key = DefaultHasher::new();
    libtorch.hash(&mut key);
    let mut entries: Vec<_> = fs::read_dir(&sources)?.collect::<Result<_, _>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        fs::read(entry.path())?.hash(&mut key);
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let library = folder.join(format!("simulated_cuda-{:016x}.so", key.finish()));
    if library.exists() {
        return Ok(library);
    }
    // Another suite may be at it too: whoever ends last has made the same.
    let unfinished = library.with_extension(std::process::id().to_string());
    let (include, lib) = (libtorch.join("include"), libtorch.join("lib"));
    let compiler = env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let output = Command::new(compiler)
        .args(["-std=c++17", "-O1", "-shared", "-fPIC"])
        .args([Path::new("-isystem"), &include, Path::new("-isystem")])
        .arg(include.join("torch/csrc/api/include"))
        .arg(sources.join("simulated_cuda.cpp"))
        .arg(format!("-L{0}", lib.display()))
        .arg(format!("-Wl,-rpath,{0}", lib.display()))
        .args(["-lc10", "-ltorch_cpu", "-o"])
        .arg(&unfinished)
        .output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
    }
    fs::rename(unfinished, &library)?;
    Ok(library)
}
