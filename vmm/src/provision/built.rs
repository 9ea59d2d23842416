// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guest kernels of our own configuration, compiled from the distribution's kernel source package.
//!
//! Two cache items: `kernel-source` has the sources and the tools, unpacked packages as for Debian's kernels; `kernel-built-NAME`
//! is a root like those of Debian's kernels, with the tools (the same files, by hard links), what modules are built against, and the
//! kernel. It is made anew when its recipe changes: the configuration's parts in `guest/kernels`, the script, or the versions
//! of sources and compiler.
//!
//! Why: `docs/decisions/0016-built-kernels.md`.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::cache::{Cache, Item, Made, Partial, Wanted};
use super::debian::{self, Extract};
use super::hash::Hash;
use super::{kernel, sandbox, source_tree};
use crate::event::{Event, EventSink};
use crate::failure::{Failure, Result};
use crate::process::{self, last_lines};

/// A configuration that can be built.
#[derive(Debug)]
pub(super) struct Flavour {
    /// The kernel's name.
    pub name: &'static str,
    /// What it is, for people.
    pub about: &'static str,
    /// Its parts in `guest/kernels`, in order.
    parts: &'static [&'static str],
    /// About how many files are compiled; for the progress bar only.
    files: u64,
}

pub(super) const FAST: Flavour = Flavour {
    name: "built:fast",
    about: "built from Debian 13 backports' sources (7.x), small: boots fastest; device-private memory, test_hmm",
    parts: &["common.config", "fast.config"],
    files: 1900,
};

pub(super) const DEBUG: Flavour = Flavour {
    name: "built:debug",
    about: "the same with KASAN, lockdep, fault injection, kmemleak, checks of memory management: several times slower",
    parts: &["common.config", "debug.config"],
    files: 1900,
};

pub(super) const HOST: Flavour = Flavour {
    name: "built:host",
    about: "for --outer-kernel: KVM, an IOMMU and iommufd, for the outer guest of nested runs",
    parts: &["host.config"],
    files: 1400,
};

/// How the image is named in `boot`, before the release: an ELF file with a PVH entry.
pub(super) const IMAGE: &str = "vmlinux-";
/// How its symbols are named there.
pub(super) const SYMBOLS: &str = "symbols-";

const SOURCE: &str = "kernel-source";
/// Change it when what is fetched changes.
const SOURCE_RECIPE: &str = "linux-source, gcc, make, kbuild's tools; 1";
/// What kbuild calls, beside the compiler.
const PACKAGES: &[&str] = &[
    "linux-source",
    "gcc",
    "make",
    "dash",
    "bash",
    "coreutils",
    "sed",
    "grep",
    "mawk",
    "findutils",
    "diffutils",
    "tar",
    "xz-utils",
    "gzip",
    "flex",
    "bison",
    "bc",
    "perl-base",
    "python3-minimal",
    "libelf-dev",
];

/// Part of the recipe: change it when the layout of what is kept changes.
const LAYOUT: &str = "built kernel, 1";
const SCRIPT: &str = include_str!("built.sh");
/// What building takes while it is under way: the unpacked sources, the objects.
const BYTES: u64 = 4_500_000_000;
/// How many of the compiler's errors a message shows.
const SHOWN_ERRORS: usize = 8;

/// The built kernel, if it is there and of today's recipe.
pub(super) fn cached(cache: &Cache, flavour: &Flavour) -> Option<Item> {
    let source = cache.get(SOURCE, SOURCE_RECIPE)?;
    cache.get(&item_name(flavour), &recipe(flavour, &source).ok()?)
}

/// The built kernel, made first if it is not there.
pub(super) fn provide(cache: &Cache, events: &Arc<dyn EventSink>, flavour: &Flavour) -> Result<Item> {
    let source = sources(cache, events)?;
    let recipe = recipe(flavour, &source)?;
    let wanted = Wanted {
        item: &item_name(flavour),
        step: flavour.name,
        about: &format!(
            "building the guest kernel '{}' (ten minutes or more on two processors)",
            flavour.name
        ),
        recipe: &recipe,
        bytes: BYTES,
    };
    cache.ensure(&wanted, events, &mut |partial| build(cache, events, flavour, &source, &recipe, partial))
}

fn item_name(flavour: &Flavour) -> String {
    format!("kernel-{}", flavour.name.replace(':', "-"))
}

fn sources(cache: &Cache, events: &Arc<dyn EventSink>) -> Result<Item> {
    let wanted = Wanted {
        item: SOURCE,
        step: SOURCE,
        about: "fetching the kernel's sources and what they are built with",
        recipe: SOURCE_RECIPE,
        bytes: 1_000_000_000,
    };
    cache.ensure(&wanted, events, &mut |partial| {
        let what = Extract { suite: "trixie", backports: true, packages: PACKAGES, step: SOURCE };
        let packages = debian::extract(cache, events, partial, &what)?;
        let root = partial.path.join("root");
        let archive = archive(&root)?;
        let mut versions = BTreeMap::new();
        for (package, version) in packages {
            let counts = package.starts_with("linux-source-")
                || ["gcc-1", "binutils"].iter().any(|tool| package.starts_with(tool))
                || package == "make";
            if counts {
                versions.insert(package, version);
            }
        }
        let mut key_files = kernel::tools(cache, &root)?;
        key_files.push(format!("root/usr/src/{archive}"));
        Ok(Made { versions, key_files })
    })
}

/// The name of the packed sources in `usr/src`.
fn archive(root: &Path) -> Result<String> {
    let entries = fs::read_dir(root.join("usr/src")).into_iter().flatten().flatten();
    let mut names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.find(|name| name.starts_with("linux-source-") && name.ends_with(".tar.xz")).ok_or_else(|| {
        Failure::environment(format!("no kernel sources were in the packages unpacked in {}", root.display()))
            .remedy("Debian's kernel packages may have changed their layout; please report it")
    })
}

fn parts_dir() -> Result<PathBuf> {
    Ok(source_tree()?.join("guest/kernels"))
}

/// Everything that decides over the kernel.
fn recipe(flavour: &Flavour, source: &Item) -> Result<String> {
    let mut hash = Hash::default();
    hash.add(LAYOUT).add(SCRIPT);
    for part in flavour.parts {
        hash.add(part).add(super::read_input("the kernel's configuration", &parts_dir()?.join(part))?);
    }
    for (package, version) in &source.manifest.versions {
        hash.add(package).add(version);
    }
    Ok(hash.finish())
}

fn build(
    cache: &Cache,
    events: &Arc<dyn EventSink>,
    flavour: &Flavour,
    source: &Item,
    recipe: &str,
    partial: &mut Partial,
) -> Result<Made> {
    if let Some(damage) = Cache::damage(source) {
        cache.discard(source);
        return Err(Failure::environment(format!("the cached sources of the kernel are damaged: {damage}"))
            .remedy("run it again: they will be fetched anew"));
    }
    let (parts, results) = (partial.path.join("in"), partial.path.join("out"));
    (|| {
        fs::create_dir(&parts)?;
        fs::create_dir(&results)?;
        for (index, part) in flavour.parts.iter().enumerate() {
            // In the order of the flavour, whatever the names: the script takes them in that of the shell.
            fs::copy(
                parts_dir().map_err(io::Error::other)?.join(part),
                parts.join(format!("{index}-{part}")),
            )?;
        }
        Ok(())
    })()
    .map_err(|e: io::Error| cache.trouble("copying the kernel's configuration", &e))?;

    let root = source.path.join("root");
    let jobs = std::thread::available_parallelism().map_or(2, usize::from);
    let script = format!("set -- \"$1\" \"$2\" \"$3\" {jobs}\n{SCRIPT}");
    let shares = sandbox::Shares { sources: &parts, results: &results };
    let mut sandbox = sandbox::in_root(&root, &shares, &script)?;
    let mut progress = Progress { flavour, events, files: 0, log: String::new() };
    let done = process::run(&mut sandbox.command, Some(&partial.guard), &mut |line| progress.line(line))
        .and_then(|done| if done.status.success() { sandbox.finish(&results) } else { Ok(()) }.map(|()| done))
        .map_err(|e| cache.trouble("cannot run the kernel's build", &e))?;
    if !done.status.success() {
        return Err(explain(cache, flavour, source, &progress.log));
    }
    let files = progress.files;
    let release = (|| {
        let release = fs::read_to_string(results.join("release"))?.trim().to_owned();
        arrange(&root, &partial.path.join("root"), &results, &release)?;
        fs::write(partial.path.join("build.log"), &progress.log)?;
        fs::remove_dir_all(&parts)?;
        fs::remove_dir_all(&results)?;
        Ok(release)
    })()
    .map_err(|e: io::Error| cache.trouble("keeping the built kernel", &e))?;

    let mut versions = source.manifest.versions.clone();
    let sources = versions.iter().find(|(name, _)| name.starts_with("linux-source-")).map(|(_, v)| v.clone());
    versions.insert(format!("linux-image-{release}"), sources.unwrap_or_default());
    // Modules are named by these: they must not outlive a kernel that was configured otherwise.
    versions.insert("recipe".into(), recipe.to_owned());
    versions.insert("compiled files".into(), files.to_string());
    let headers = format!("root/usr/src/linux-headers-{release}");
    let mut key_files = kernel::tools(cache, &partial.path.join("root"))?;
    key_files.extend([IMAGE, SYMBOLS, "config-"].map(|name| format!("root/boot/{name}{release}")));
    key_files.extend(
        ["Makefile", ".config", "Module.symvers", "include/config/kernel.release", "scripts/mod/modpost"]
            .map(|file| format!("{headers}/{file}")),
    );
    versions.insert("release".into(), release);
    Ok(Made { versions, key_files })
}

/// Lays what the build left out as Debian's packages would have, beside the tools.
fn arrange(tools: &Path, root: &Path, results: &Path, release: &str) -> io::Result<()> {
    link_tree(tools, root, Path::new(""))?;
    let boot = root.join("boot");
    fs::create_dir_all(&boot)?;
    for (file, name) in [("image", IMAGE), ("symbols", SYMBOLS), ("config", "config-")] {
        fs::rename(results.join(file), boot.join(format!("{name}{release}")))?;
    }
    fs::rename(results.join("headers"), root.join(format!("usr/src/linux-headers-{release}")))?;
    let modules = root.join("usr/lib/modules");
    fs::create_dir_all(&modules)?;
    match fs::rename(results.join("modules"), modules.join(release)) {
        // A configuration without modules.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The same files under another directory: links where the file system has them, copies where not.
fn link_tree(from: &Path, to: &Path, inside: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (inside, target) = (inside.join(entry.file_name()), to.join(entry.file_name()));
        let kind = entry.file_type()?;
        if kind.is_symlink() {
            symlink(fs::read_link(entry.path())?, target)?;
        } else if kind.is_dir() {
            let empty = ["dev", "proc", "tmp"].iter().any(|dir| inside == Path::new(dir));
            if empty {
                // Builds of others may be under way in there.
                fs::create_dir_all(target)?;
            } else {
                link_tree(&entry.path(), &target, &inside)?;
            }
        } else if inside.starts_with("usr/src") {
            // The packed sources are of no use to modules.
        } else if kind.is_file() && fs::hard_link(entry.path(), &target).is_err() {
            fs::copy(entry.path(), &target)?;
        }
    }
    Ok(())
}

/// Reads kbuild's output as progress: a line for each file, of which the number is known about.
struct Progress<'a> {
    flavour: &'a Flavour,
    events: &'a Arc<dyn EventSink>,
    files: u64,
    log: String,
}

impl Progress<'_> {
    fn line(&mut self, line: &str) {
        self.log.push_str(line);
        self.log.push('\n');
        let detail = if let Some(stage) = line.strip_prefix("== ") {
            stage
        } else if let Some(file) = file(line) {
            self.files += 1;
            file
        } else {
            return;
        };
        let total = self.flavour.files;
        self.events.event(Event::StepProgress {
            step: self.flavour.name.into(),
            // The end is the end of the step, not a number.
            done: self.files.min(total * 99 / 100),
            total: Some(total),
            detail: Some(detail.to_owned()),
        });
    }
}

/// What kbuild says that it makes: `  CC      mm/hmm.o`, `  CC [M]  lib/test_hmm.o`.
fn file(line: &str) -> Option<&str> {
    let line = line.strip_prefix("  ")?;
    let mut words = line.split_whitespace();
    let verb = words.next()?;
    let file = words.find(|word| *word != "[M]")?;
    (!verb.is_empty() && verb.bytes().all(|byte| byte.is_ascii_uppercase())).then_some(file)
}

/// Turns a failed build into a message that starts with what went wrong.
fn explain(cache: &Cache, flavour: &Flavour, source: &Item, log: &str) -> Failure {
    let name = flavour.name;
    if log.contains("No space left on device") {
        return cache.disk_full(&format!("building the kernel '{name}'"));
    }
    if let Some(line) = log.lines().find(|line| line.starts_with("bwrap: ") || line.starts_with("chroot: ")) {
        return Failure::environment(format!("cannot build the kernel '{name}': {line}"))
            .remedy(format!("if it stays so, remove {} and run it again", cache.root().display()));
    }
    if let Some(lost) = log.lines().find_map(|line| line.strip_prefix("== options not taken:")) {
        let version =
            source.manifest.versions.iter().find(|(package, _)| package.starts_with("linux-source-"));
        let version = version.map_or("?", |(_, version)| version.as_str());
        return Failure::environment(format!(
            "the kernel's sources ({version}) do not take these options of {}:{lost}",
            flavour.parts.join(" and ")
        ))
        .remedy("what they depend on is off, or they have other names by now: mend guest/kernels, or put them below '# optional' there");
    }
    let place = cache.root().join("logs").join(format!("{}.log", item_name(flavour)));
    let kept = place.parent().map(fs::create_dir_all).is_some_and(|made| made.is_ok())
        && fs::write(&place, log).is_ok();
    let is_error = |line: &&str| {
        ["error: ", "ERROR: ", "undefined reference", "Killed"].iter().any(|sign| line.contains(sign))
    };
    let mut errors: Vec<String> =
        log.lines().filter(is_error).take(SHOWN_ERRORS).map(|line| line.trim().to_owned()).collect();
    if errors.is_empty() {
        errors = last_lines(log, SHOWN_ERRORS);
    }
    let failure = Failure::environment(format!(
        "the kernel '{name}' could not be built:\n    {}",
        errors.join("\n    ")
    ));
    if kept { failure.remedy(format!("whole log: {}", place.display())) } else { failure }
}

#[cfg(test)]
#[path = "built_test.rs"]
mod tests;
