// SPDX-License-Identifier: MIT OR Apache-2.0
//! A QEMU that can be a vfio-user client.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use super::cache::{Cache, Item, Made, Wanted};
use super::debian::{self, Extract};
use crate::event::EventSink;
use crate::failure::{Failure, Result};
use crate::process;

const PROGRAM: &str = "qemu-system-x86_64";
const DEVICE: &str = "vfio-user-pci";
/// Part of the item's identity: change it when what is fetched, or how it is laid out, changes.
const RECIPE: &str = "debian trixie-backports qemu-system-x86, 1";
const LIBRARIES: &str = "root/usr/lib/x86_64-linux-gnu";

/// How to start QEMU.
#[derive(Clone, Debug)]
pub struct QemuProgram {
    /// The program to execute: QEMU, or a private QEMU's loader.
    pub program: PathBuf,
    /// What goes before all other arguments.
    pub args: Vec<OsString>,
    /// What goes into the environment.
    pub env: Vec<(OsString, OsString)>,
    /// Version number, such as `11.1.3`.
    pub version: String,
    /// Where it comes from, for people.
    pub origin: String,
}

impl QemuProgram {
    /// A command that starts it; further arguments go behind.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.args).envs(self.env.iter().map(|(name, value)| (name, value)));
        command
    }

    /// That of `$HMM_TESTBENCH_QEMU`, if it names one.
    #[must_use]
    pub(crate) fn named() -> Option<Result<Self>> {
        let path = std::env::var_os("HMM_TESTBENCH_QEMU").filter(|value| !value.is_empty())?;
        let shown = Path::new(&path).display().to_string();
        Some(Self::plain(path.into(), shown.clone()).ok_or_else(|| {
            Failure::environment(format!("HMM_TESTBENCH_QEMU is {shown}, which is no QEMU with {DEVICE}"))
                .remedy(
                    "unset it to let the testbench fetch a QEMU of its own, or name a QEMU of 10.1 or later",
                )
        }))
    }

    /// The system's QEMU if it has vfio-user.
    #[must_use]
    pub fn system() -> Option<Self> {
        let program = process::find_program(PROGRAM)?;
        let origin = program.display().to_string();
        Self::plain(program, origin)
    }

    /// The loader that starts it, where that looks for libraries if it is told, and the program proper.
    ///
    /// # Errors
    /// Says why it is not to be found out.
    pub(crate) fn anatomy(&self) -> Result<(PathBuf, Option<OsString>, PathBuf), String> {
        if let [option, libraries, binary, ..] = self.args.as_slice() {
            if option == "--library-path" {
                return Ok((self.program.clone(), Some(libraries.clone()), binary.into()));
            }
        }
        let loader = crate::initramfs::interpreter(&self.program)
            .ok_or_else(|| format!("{} is not a dynamically linked program", self.program.display()))?;
        Ok((loader, None, self.program.clone()))
    }

    /// The folders in which it looks for firmware, in its own words.
    pub(crate) fn data_folders(&self) -> Vec<PathBuf> {
        let output = process::die_with_parent(self.command().args(["-L", "help"])).output();
        let text =
            output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        text.lines().map(PathBuf::from).filter(|dir| dir.is_dir()).collect()
    }

    fn plain(program: PathBuf, origin: String) -> Option<Self> {
        Self { program, args: Vec::new(), env: Vec::new(), version: String::new(), origin }.probed()
    }

    /// The private one in a cache item.
    fn private(item: &Item) -> Option<Self> {
        let root = item.path.join("root");
        let libraries = item.path.join(LIBRARIES);
        // The host's libraries may be older than this QEMU's: it brings its own, loader included.
        let args: Vec<OsString> = vec![
            "--library-path".into(),
            libraries.clone().into(),
            root.join("usr/bin").join(PROGRAM).into(),
            "-L".into(),
            root.join("usr/share/qemu").into(),
            "-L".into(),
            root.join("usr/share/seabios").into(),
        ];
        let env = vec![("QEMU_MODULE_DIR".into(), libraries.join("qemu").into())];
        let program = libraries.join("ld-linux-x86-64.so.2");
        Self { program, args, env, version: String::new(), origin: "private, Debian trixie-backports".into() }
            .probed()
    }

    /// Asks it for its version and whether it has the device.
    fn probed(mut self) -> Option<Self> {
        let devices = process::die_with_parent(self.command().args(["-device", "help"])).output().ok()?;
        if !String::from_utf8_lossy(&devices.stdout).contains(DEVICE) {
            return None;
        }
        let version = process::die_with_parent(self.command().arg("--version")).output().ok()?;
        let text = String::from_utf8_lossy(&version.stdout).into_owned();
        self.version = text.split_whitespace().nth(3).unwrap_or("unknown").to_owned();
        Some(self)
    }
}

/// The one in the cache, if it is there.
pub(crate) fn cached(cache: &Cache) -> Option<QemuProgram> {
    cache.get("qemu", RECIPE).as_ref().and_then(QemuProgram::private)
}

pub(super) fn provide(cache: &Cache, events: &Arc<dyn EventSink>) -> Result<QemuProgram> {
    if let Some(named) = QemuProgram::named() {
        return named;
    }
    if let Some(qemu) = QemuProgram::system() {
        return Ok(qemu);
    }
    let wanted = Wanted {
        item: "qemu",
        step: "qemu",
        about: "fetching a private QEMU (the system has none with vfio-user)",
        recipe: RECIPE,
        bytes: 400_000_000,
    };
    let item = cache.ensure(&wanted, events, &mut |partial| {
        let what =
            Extract { suite: "trixie", backports: true, packages: &["qemu-system-x86"], step: wanted.step };
        let packages = debian::extract(cache, events, partial, &what)?;
        let mut versions = std::collections::BTreeMap::new();
        if let Some(version) = packages.get("qemu-system-x86") {
            versions.insert("qemu-system-x86".to_owned(), version.clone());
        }
        // All of QEMU and its libraries: it is a few hundred files, and each is needed.
        let mut key_files = Vec::new();
        for dir in ["root/usr/bin", LIBRARIES, "root/usr/share/qemu", "root/usr/share/seabios"] {
            super::cache::walk(&partial.path.join(dir), &mut |file, meta| {
                if meta.is_file() {
                    key_files.push(format!("{dir}/{}", file.display()));
                }
            })
            .map_err(|e| cache.trouble("looking through the private QEMU", &e))?;
        }
        Ok(Made { versions, key_files })
    })?;
    QemuProgram::private(&item).ok_or_else(|| {
        cache.discard(&item);
        Failure::environment(format!(
            "the private QEMU in {} does not start, or has no {DEVICE}",
            item.path.display()
        ))
        .remedy("run it again: it will be fetched anew")
    })
}
