//! Compiles what tch does not bind against libtorch's headers and tells
//! the linker where libtorch lies.
//!
//! Dependants find libtorch's folder in `DEP_ULYSSES_LIBTORCH_LIBTORCH_LIB`,
//! so that each can give its own programs the same run path.

use std::{env, fs, path::PathBuf, process::ExitCode};

const SOURCES: [&str; 3] = [
    "src/autograd/function.cpp",
    "src/autograd/gradient.cpp",
    "src/device/device.cpp",
];
const HEADER: &str = "src/exception.h";
const REMEDY: &str = "run `make setup`, or set LIBTORCH to the torch folder of a torch 2.11.0";

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    for source in SOURCES.into_iter().chain([HEADER]) {
        println!("cargo::rerun-if-changed={source}");
    }
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    println!("cargo::rerun-if-env-changed=LIBTORCH_CXX11_ABI");
    match libtorch() {
        Ok(folder) => {
            build(&folder);
            ExitCode::SUCCESS
        }
        Err(sentence) => {
            println!("cargo::error={sentence}");
            ExitCode::FAILURE
        }
    }
}

/// The real path of libtorch: a run path through a link that somebody moves
/// later would leave programs that do not start.
fn libtorch() -> Result<PathBuf, String> {
    let given = env::var("LIBTORCH").map_err(|_| format!("libtorch was not found: {REMEDY}"))?;
    let header = "include/torch/csrc/autograd/custom_function.h";
    match fs::canonicalize(&given) {
        Ok(folder) if folder.join(header).is_file() && folder.join("lib").is_dir() => Ok(folder),
        _ => Err(format!(
            "LIBTORCH is {given}, which holds no libtorch: {REMEDY}"
        )),
    }
}

fn build(libtorch: &std::path::Path) {
    // The same standard and ABI as torch-sys gives its own wrapper: two ABIs
    // of std::string in one program do not link.
    let abi = env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".to_owned());
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .warnings(false)
        .include(libtorch.join("include"))
        .include(libtorch.join("include/torch/csrc/api/include"))
        .define("_GLIBCXX_USE_CXX11_ABI", abi.as_str())
        .files(SOURCES)
        .compile("ulysses_libtorch");

    let lib = libtorch.join("lib");
    println!("cargo::metadata=libtorch_lib={}", lib.display());
    println!("cargo::rustc-link-arg=-Wl,-rpath,{}", lib.display());
}
