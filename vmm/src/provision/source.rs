// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where this testbench's own source tree is: the guest's parts are built from it.

use std::path::{Path, PathBuf};

use crate::failure::{Failure, Result};

/// The source tree: `$HMM_TESTBENCH_SOURCE`, else where this binary was built, if that is still there.
///
/// # Errors
/// Usage when neither holds the guest's sources.
pub fn source_tree() -> Result<PathBuf> {
    let looks_right = |dir: &Path| dir.join("guest/driver").is_dir() && dir.join("Cargo.toml").is_file();
    if let Some(dir) = std::env::var_os("HMM_TESTBENCH_SOURCE").filter(|value| !value.is_empty()) {
        let dir = PathBuf::from(dir);
        return if looks_right(&dir) {
            Ok(std::path::absolute(&dir).unwrap_or(dir))
        } else {
            Err(Failure::usage(format!(
                "HMM_TESTBENCH_SOURCE is {}, which has no Cargo.toml and guest/driver",
                dir.display()
            )))
        };
    }
    match Path::new(env!("CARGO_MANIFEST_DIR")).parent() {
        Some(dir) if looks_right(dir) => Ok(dir.to_owned()),
        _ => Err(Failure::usage("the source tree that this testbench was built from is gone")
            .remedy("set HMM_TESTBENCH_SOURCE to a checkout of it: the guest's parts are built from there")),
    }
}
