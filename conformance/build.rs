//! Lets the programs find libtorch when they start, with nothing sourced.

fn main() {
    println!("cargo::rerun-if-env-changed=DEP_ULYSSES_LIBTORCH_LIBTORCH_LIB");
    if let Ok(folder) = std::env::var("DEP_ULYSSES_LIBTORCH_LIBTORCH_LIB") {
        println!("cargo::rustc-link-arg=-Wl,-rpath,{folder}");
    }
}
