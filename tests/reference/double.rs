//! The stand-in for NCCL's library.

use std::{env, path::Path, process::Command};

/// Compiles it into `folder` with these flags; gives its path.
pub(crate) fn compile(folder: &Path, flags: &[&str]) -> String {
    let source = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../tests/reference/nccl_double.c"
    );
    let library = folder.join("libnccl_double.so").display().to_string();
    let compiler = env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    let compiled = Command::new(compiler)
        .args([
            "-shared", "-fPIC", "-pthread", "-O1", "-o", &library, source,
        ])
        .args(flags)
        .status();
    assert!(compiled.unwrap().success());
    library
}
