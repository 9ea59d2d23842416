// SPDX-License-Identifier: MIT OR Apache-2.0
//! A group of processes with little memory.

use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};

use crate::outcome::{Checked, Failure};

const ROOT: &str = "/sys/fs/cgroup";

/// The group, in the control groups' file system (cgroup2).
pub(in crate::workload) struct Narrow(PathBuf);

impl Narrow {
    /// One with at most so many bytes, none of them swapped out beyond what there is room for.
    pub(in crate::workload) fn new(bytes: usize) -> Checked<Self> {
        let root = Path::new(ROOT);
        let skip = |what: &str, error: &dyn std::fmt::Display| Failure::Skip(format!("{what}: {error}"));
        match mount(Some("cgroup2"), root, Some("cgroup2"), MsFlags::empty(), None::<&str>) {
            // It is there already.
            Ok(()) | Err(Errno::EBUSY) => {}
            Err(errno) => return Err(skip("cgroup2", &errno)),
        }
        let write = |path: PathBuf, text: &str| {
            std::fs::write(&path, text).map_err(|error| skip(&path.display().to_string(), &error))
        };
        write(root.join("cgroup.subtree_control"), "+memory")?;
        let group = Self(root.join(format!("narrow-{}", std::process::id())));
        std::fs::create_dir_all(&group.0).map_err(|error| skip("cgroup", &error))?;
        write(group.0.join("memory.max"), &bytes.to_string())?;
        Ok(group)
    }

    /// The caller belongs to it from now on.
    pub(in crate::workload) fn join(&self) -> Checked {
        self.set("cgroup.procs", "0")
    }

    /// The caller belongs to no such group any more.
    pub(in crate::workload) fn leave(&self) -> Checked {
        crate::kernel::write(Path::new(ROOT).join("cgroup.procs"), "0")
    }

    /// Writes to one of its files.
    pub(super) fn set(&self, file: &str, text: &str) -> Checked {
        crate::kernel::write(self.0.join(file), text)
    }

    /// A counter in one of its files that has a name and a number in each line.
    pub(in crate::workload) fn count(&self, file: &str, name: &str) -> Checked<u64> {
        let text = crate::kernel::read(self.0.join(file))?;
        let value = |line: &str| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok();
        Ok(text.lines().find_map(value).unwrap_or(0))
    }

    /// Has some of its memory reclaimed; whether all that was asked for could be.
    pub(in crate::workload) fn reclaim(&self, bytes: usize) -> Checked<bool> {
        let path = self.0.join("memory.reclaim");
        match std::fs::write(&path, bytes.to_string()) {
            Ok(()) => Ok(true),
            // Less than that was to be had.
            Err(error) if error.raw_os_error() == Some(Errno::EAGAIN as i32) => Ok(false),
            Err(error) => Err(Failure::Skip(format!("{}: {error}", path.display()))),
        }
    }
}

impl Drop for Narrow {
    fn drop(&mut self) {
        // Who is left in it keeps it; the next user of it takes it as it is.
        let _ = std::fs::remove_dir(&self.0);
    }
}
