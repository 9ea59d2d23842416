// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guest's first file system: a `newc` archive, written without root. The same input gives the same bytes.
//!
//! Host files join it with [`Initramfs::add_host`]: directories recursively, with modes and symbolic links, and for a
//! dynamically linked program also its loader and the libraries that the loader would find on this host, at the same paths.

mod host;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use crate::failure::{Failure, Result};

pub(crate) use host::interpreter;
pub use host::parse_add;

/// The whole archive may not be larger: it is unpacked into the guest's memory.
pub const MAX_BYTES: u64 = 1 << 30;
/// More entries than anybody means to add.
const MAX_ENTRIES: usize = 100_000;
const MAGIC: &str = "070701";

const KIND: u32 = 0o170_000;
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;

/// An archive being put together. Directories above an entry are made as needed; a later entry replaces an earlier one.
#[derive(Debug, Default)]
pub struct Initramfs {
    /// By path without leading slash. A directory sorts before what is in it, which is what the kernel needs.
    entries: BTreeMap<String, Entry>,
    bytes: u64,
}

#[derive(Debug)]
struct Entry {
    mode: u32,
    data: Vec<u8>,
    device: (u32, u32),
}

impl Initramfs {
    /// An empty archive.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory.
    ///
    /// # Errors
    /// Usage when the path is none, or is a file already.
    pub fn dir(&mut self, path: &str, mode: u32) -> Result<&mut Self> {
        let path = self.resolve(&normal(path)?, true)?;
        if let Some(entry) = self.entries.get_mut(&path) {
            if entry.mode & KIND != DIRECTORY {
                return Err(Failure::usage(format!(
                    "/{path} cannot be both a directory and a file in the guest"
                )));
            }
            entry.mode = DIRECTORY | (mode & 0o7777);
            return Ok(self);
        }
        self.insert(path, Entry { mode: DIRECTORY | (mode & 0o7777), data: Vec::new(), device: (0, 0) })
    }

    /// Adds a file.
    ///
    /// # Errors
    /// Usage when the path is none, or the archive gets too large.
    pub fn file(&mut self, path: &str, mode: u32, bytes: impl Into<Vec<u8>>) -> Result<&mut Self> {
        let entry = Entry { mode: REGULAR | (mode & 0o7777), data: bytes.into(), device: (0, 0) };
        self.insert(normal(path)?, entry)
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// As for a file.
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<&mut Self> {
        self.insert(normal(path)?, Entry { mode: SYMLINK | 0o777, data: target.into(), device: (0, 0) })
    }

    /// Adds a character device.
    ///
    /// # Errors
    /// As for a file.
    pub fn node(&mut self, path: &str, mode: u32, major: u32, minor: u32) -> Result<&mut Self> {
        let entry = Entry { mode: CHARACTER | (mode & 0o7777), data: Vec::new(), device: (major, minor) };
        self.insert(normal(path)?, entry)
    }

    /// Whether there is an entry at this path.
    #[must_use]
    pub fn contains(&self, path: &str) -> bool {
        normal(path)
            .and_then(|path| self.resolve(&path, true))
            .is_ok_and(|path| self.entries.contains_key(&path))
    }

    fn insert(&mut self, path: String, entry: Entry) -> Result<&mut Self> {
        // What is put behind a link, such as /lib -> usr/lib, belongs where the link leads.
        let path = self.resolve(&path, false)?;
        if let Some((parent, _)) = path.rsplit_once('/') {
            match self.entries.get(parent).map(|entry| entry.mode & KIND) {
                None => {
                    self.dir(parent, 0o755)?;
                }
                Some(DIRECTORY) => {}
                Some(_) => {
                    return Err(Failure::usage(format!(
                        "/{parent} is a file in the guest; /{path} cannot be below it"
                    )));
                }
            }
        }
        let is_directory = entry.mode & KIND == DIRECTORY;
        if let Some(old) = self.entries.get(&path) {
            if old.mode & KIND == DIRECTORY && !is_directory {
                return Err(Failure::usage(format!(
                    "/{path} cannot be both a directory and a file in the guest"
                )));
            }
            self.bytes -= old.data.len() as u64;
        }
        self.bytes += entry.data.len() as u64;
        if self.bytes > MAX_BYTES || self.entries.len() >= MAX_ENTRIES {
            return Err(Failure::usage(format!(
                "what is added to the guest is too much: over {} MiB or {MAX_ENTRIES} files",
                MAX_BYTES >> 20
            )));
        }
        self.entries.insert(path, entry);
        Ok(self)
    }

    /// The path with links among its leading components followed, and the last one too if `whole`.
    fn resolve(&self, path: &str, whole: bool) -> Result<String> {
        let mut rest: Vec<String> = path.rsplit('/').map(str::to_owned).collect();
        let mut done = String::new();
        let mut hops = 0;
        while let Some(part) = rest.pop() {
            if part == ".." {
                done.truncate(done.rfind('/').unwrap_or(0));
                continue;
            }
            let here = if done.is_empty() { part } else { format!("{done}/{part}") };
            match self.entries.get(&here) {
                Some(entry) if entry.mode & KIND == SYMLINK && (whole || !rest.is_empty()) => {
                    hops += 1;
                    if hops > 40 {
                        return Err(Failure::usage(format!(
                            "/{path} in the guest leads through too many links"
                        )));
                    }
                    let target = String::from_utf8_lossy(&entry.data);
                    if target.starts_with('/') {
                        done.clear();
                    }
                    let parts = target.rsplit('/').filter(|part| !part.is_empty() && *part != ".");
                    rest.extend(parts.map(str::to_owned));
                }
                _ => done = here,
            }
        }
        Ok(done)
    }

    /// The archive. It needs no compression: it never touches a disk.
    ///
    /// # Errors
    /// Usage when a file is larger than the format allows.
    pub fn finish(&self) -> Result<Vec<u8>> {
        let mut out =
            Vec::with_capacity(usize::try_from(self.bytes).unwrap_or(0) + self.entries.len() * 160 + 512);
        for (inode, (path, entry)) in self.entries.iter().enumerate() {
            let inode = u32::try_from(inode + 1).unwrap_or(u32::MAX);
            write_entry(&mut out, inode, path, entry)?;
        }
        write_entry(&mut out, 0, "TRAILER!!!", &Entry { mode: 0, data: Vec::new(), device: (0, 0) })?;
        pad(&mut out, 512);
        Ok(out)
    }
}

fn write_entry(out: &mut Vec<u8>, inode: u32, path: &str, entry: &Entry) -> Result<()> {
    let size = u32::try_from(entry.data.len()).map_err(|_| {
        Failure::usage(format!("/{path} is too large for the guest's first file system (4 GiB)"))
    })?;
    let name_size = u32::try_from(path.len() + 1).map_err(|_| Failure::usage("a path is too long"))?;
    let links = if entry.mode & KIND == DIRECTORY { 2 } else { 1 };
    let (major, minor) = entry.device;
    // Owner root, no time, no device of its own: nothing of this host gets in.
    let fields = [inode, entry.mode, 0, 0, links, 0, size, 0, 0, major, minor, name_size, 0];
    out.extend_from_slice(MAGIC.as_bytes());
    for field in fields {
        out.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    out.extend_from_slice(path.as_bytes());
    out.push(0);
    pad(out, 4);
    out.extend_from_slice(&entry.data);
    pad(out, 4);
    Ok(())
}

fn pad(out: &mut Vec<u8>, to: usize) {
    out.resize(out.len().next_multiple_of(to), 0);
}

/// A guest path without leading slash, empty or dot components; never one that leads upwards.
fn normal(path: &str) -> Result<String> {
    let bad = |why: &str| Err(Failure::usage(format!("'{path}' cannot be a path in the guest: {why}")));
    if path.contains('\0') {
        return bad("it contains a zero byte");
    }
    if path.split('/').any(|part| part == "..") {
        return bad("it contains '..'");
    }
    if path.len() > 4000 {
        return bad("it is too long");
    }
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if parts.is_empty() { bad("it is empty") } else { Ok(parts.join("/")) }
}
