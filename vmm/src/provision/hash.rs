// SPDX-License-Identifier: MIT OR Apache-2.0
//! Names for things by their content.

use std::path::Path;

use sha2::{Digest, Sha256};

use super::cache::walk;

/// Collects parts, each with its length, so that no two lists of parts look alike.
#[derive(Default)]
pub(super) struct Hash(Sha256);

impl Hash {
    pub(super) fn add(&mut self, part: impl AsRef<[u8]>) -> &mut Self {
        let part = part.as_ref();
        self.0.update((part.len() as u64).to_le_bytes());
        self.0.update(part);
        self
    }

    /// Adds the names and contents of all sources below a directory, leaving out what a build leaves behind.
    pub(super) fn add_sources(&mut self, dir: &Path) -> std::io::Result<&mut Self> {
        let mut files = Vec::new();
        walk(dir, &mut |path, meta| {
            if meta.is_file() && is_source(path) {
                files.push(path.to_owned());
            }
        })?;
        files.sort();
        for file in files {
            self.add(file.as_os_str().as_encoded_bytes());
            self.add(std::fs::read(dir.join(&file))?);
        }
        Ok(self)
    }

    /// The first 128 bits in hexadecimal: enough for a cache, short enough for a path.
    pub(super) fn finish(&self) -> String {
        self.0.clone().finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Whether a file of a module's directory goes into its build.
pub(super) fn is_source(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let kind = path.extension().and_then(|kind| kind.to_str()).unwrap_or_default();
    !name.starts_with('.') && (matches!(kind, "c" | "h" | "S") || matches!(name, "Kbuild" | "Makefile"))
}
