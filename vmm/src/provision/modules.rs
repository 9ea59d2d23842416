// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guest's kernel modules: the driver under test, with patches, and the witness. Each is kept under a hash of everything
//! that went into it, so that a build is done once.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use super::cache::{Cache, Made, Partial, Wanted};
use super::hash::{Hash, is_source};
use super::kernel::{self, Build, Kernel};
use super::{read_input, sandbox, source_tree};
use crate::event::{Event, EventSink};
use crate::failure::{Failure, Result};
use crate::process::{self, last_lines};

/// Part of every module's hash: change it when the way of building changes.
const RECIPE: &str = "kbuild in bwrap, 1";
/// Built modules that are kept, 1.5 MB each: enough for a campaign of patches on three kernels.
const KEPT: usize = 256;
/// How many of the compiler's errors a message shows.
const SHOWN_ERRORS: usize = 8;

/// Built modules.
#[derive(Clone, Debug)]
pub struct Modules {
    /// The driver under test, `hmm_vgpu.ko`.
    pub driver: PathBuf,
    /// The witness, `hmm_witness.ko`.
    pub witness: PathBuf,
}

/// One of the two.
#[derive(Clone, Copy)]
struct Module {
    dir: &'static str,
    file: &'static str,
}

const DRIVER: Module = Module { dir: "driver", file: "hmm_vgpu.ko" };
const WITNESS: Module = Module { dir: "witness", file: "hmm_witness.ko" };

pub(super) fn provide(
    cache: &Cache,
    events: &Arc<dyn EventSink>,
    kernel: &Kernel,
    patches: &[PathBuf],
) -> Result<Modules> {
    // One after the other: each make uses all processors already.
    let driver = one(cache, events, kernel, DRIVER, patches)?;
    let witness = one(cache, events, kernel, WITNESS, &[])?;
    Ok(Modules { driver, witness })
}

pub(super) fn witness(cache: &Cache, events: &Arc<dyn EventSink>, kernel: &Kernel) -> Result<PathBuf> {
    one(cache, events, kernel, WITNESS, &[])
}

fn one(
    cache: &Cache,
    events: &Arc<dyn EventSink>,
    kernel: &Kernel,
    module: Module,
    patches: &[PathBuf],
) -> Result<PathBuf> {
    let guest = source_tree()?.join("guest");
    let sources = [guest.join(module.dir), guest.join("include")];
    let mut hash = Hash::default();
    hash.add(RECIPE).add(&kernel.release).add(module.file);
    add_toolchain(&mut hash, kernel)?;
    for dir in &sources {
        hash.add_sources(dir)
            .map_err(|e| Failure::usage(format!("cannot read the sources in {}: {e}", dir.display())))?;
    }
    let mut diffs = Vec::new();
    for patch in patches {
        let diff = read_input("the patch", patch)?;
        hash.add(&diff);
        diffs.push((patch.as_path(), diff));
    }
    let hash = hash.finish();
    let patched = if diffs.is_empty() { "" } else { " with patches" };
    let wanted = Wanted {
        item: &format!("module-{hash}"),
        step: &format!("{} for {}{patched}", module.dir, kernel.release),
        about: &format!("compiling the {}{patched} for kernel {}", module.dir, kernel.release),
        recipe: RECIPE,
        bytes: 20_000_000,
    };
    if cache.get(wanted.item, wanted.recipe).is_none() {
        kernel::mend(cache, events, kernel)?;
        cache.prune("module-", KEPT);
    }
    let item = cache.ensure(&wanted, events, &mut |partial| {
        build(cache, events, kernel, module, &guest, &diffs, partial, &hash)
    })?;
    Ok(item.path.join("out").join(module.file))
}

/// What besides sources decides over a module's bytes.
fn add_toolchain(hash: &mut Hash, kernel: &Kernel) -> Result<()> {
    match &kernel.build {
        Build::Root { item, .. } => {
            for (name, version) in &item.manifest.versions {
                hash.add(name).add(version);
            }
        }
        Build::Tree(tree) => {
            for file in ["Module.symvers", "include/generated/autoconf.h", "include/config/kernel.release"] {
                hash.add(read_input("the kernel tree's", &tree.join(file))?);
            }
            // A structure that has grown in a header shows in none of these; but whatever was compiled, the image was linked anew.
            hash.add(stamp(&kernel.packed)?);
            for (program, package) in [("gcc", "gcc"), ("make", "make")] {
                let output = process::die_with_parent(Command::new(program).arg("--version"))
                    .output()
                    .map_err(|e| {
                        Failure::environment(format!(
                            "cannot run {program}, which builds modules for a kernel tree: {e}"
                        ))
                        .remedy(format!("apt-get install {package}"))
                    })?;
                hash.add(output.stdout);
            }
        }
        Build::Nowhere => return Err(sandbox::nowhere(kernel)),
    }
    Ok(())
}

/// Which build of a tree an image is from.
fn stamp(image: &Path) -> Result<String> {
    let cannot = |error| Failure::usage(format!("cannot read {}: {error}", image.display()));
    let meta = fs::metadata(image).map_err(cannot)?;
    Ok(format!("{} {}.{}", meta.len(), meta.mtime(), meta.mtime_nsec()))
}

#[allow(clippy::too_many_arguments, reason = "one caller; a struct would only rename them")]
fn build(
    cache: &Cache,
    events: &Arc<dyn EventSink>,
    kernel: &Kernel,
    module: Module,
    guest: &Path,
    diffs: &[(&Path, Vec<u8>)],
    partial: &mut Partial,
    hash: &str,
) -> Result<Made> {
    let sources = partial.path.join("in");
    let results = partial.path.join("out");
    (|| {
        fs::create_dir(&sources)?;
        fs::create_dir(&results)?;
        for dir in [module.dir, "include"] {
            copy_sources(&guest.join(dir), &sources.join(dir))?;
        }
        Ok(())
    })()
    .map_err(|e| cache.trouble("copying the module's sources", &e))?;
    for (patch, diff) in diffs {
        apply(cache, patch, diff, &sources.join(module.dir), partial)?;
    }

    let script = format!(
        "cp -r \"$2\" \"$4/guest\"; make -C \"$1\" M=\"$4/guest/{dir}\" -j{jobs} modules; cp \"$4/guest/{dir}/{file}\" \"$3/\"",
        dir = module.dir,
        file = module.file,
        jobs = std::thread::available_parallelism().map_or(2, usize::from),
    );
    let shares = sandbox::Shares { sources: &sources, results: &results };
    let mut sandbox = sandbox::sandbox(kernel, &shares, &script)?;
    let mut log = String::new();
    let done = process::run(&mut sandbox.command, Some(&partial.guard), &mut |line| {
        log.push_str(line);
        log.push('\n');
    })
    .and_then(|done| sandbox.finish(&results).map(|()| done))
    .map_err(|e| cache.trouble("cannot run the module's build", &e))?;
    if !done.status.success() || !results.join(module.file).is_file() {
        return Err(explain(cache, module, kernel, &log, hash, !diffs.is_empty()));
    }
    for line in log.lines().filter(|line| line.contains("warning: ")).take(SHOWN_ERRORS) {
        events
            .event(Event::Note { text: format!("compiling the {}: {}", module.dir, readable(line, module)) });
    }
    fs::remove_dir_all(&sources)
        .and_then(|()| fs::write(partial.path.join("build.log"), &log))
        .map_err(|e| cache.trouble("keeping the built module", &e))?;
    Ok(Made {
        versions: BTreeMap::from([("kernel".into(), kernel.release.clone())]),
        key_files: vec![format!("out/{}", module.file)],
    })
}

/// Turns a failed build into a message that starts with the compiler's own errors.
fn explain(cache: &Cache, module: Module, kernel: &Kernel, log: &str, hash: &str, patched: bool) -> Failure {
    if log.contains("No space left on device") {
        return cache.disk_full("compiling the module");
    }
    if let Some(line) = log.lines().find(|line| line.starts_with("bwrap: ") || line.starts_with("chroot: ")) {
        // Not the compiler's word: the build did not begin.
        return Failure::environment(format!("cannot compile for kernel {}: {line}", kernel.release))
            .remedy(format!("if it stays so, remove {} and run it again", cache.root().display()));
    }
    let place = cache.root().join("logs").join(format!("{}-{hash}.log", module.dir));
    let kept = place
        .parent()
        .map(fs::create_dir_all)
        .and_then(Result::ok)
        .and_then(|()| fs::write(&place, log).ok())
        .map_or_else(
            || "the log could not be kept".to_owned(),
            |()| format!("whole log: {}", place.display()),
        );
    let is_error = |line: &&str| {
        line.contains("error: ") || line.contains("ERROR: modpost") || line.contains("undefined!")
    };
    let mut errors: Vec<String> =
        log.lines().filter(is_error).take(SHOWN_ERRORS).map(|line| readable(line, module)).collect();
    if errors.is_empty() {
        errors = last_lines(log, SHOWN_ERRORS).iter().map(|line| readable(line, module)).collect();
    }
    let patched = if patched { ", patched," } else { "" };
    Failure::usage(format!(
        "the {}{patched} does not compile for kernel {}:\n    {}",
        module.dir,
        kernel.release,
        errors.join("\n    ")
    ))
    .remedy(kept)
}

/// A line of the compiler's with paths as the user knows them: newer kernels name files relative to the module's directory, all
/// name their own relative to theirs.
fn readable(line: &str, module: Module) -> String {
    if let Some(at) = line.find("/guest/") {
        let start = line[..at].rfind(char::is_whitespace).map_or(0, |space| space + 1);
        return format!("{}{}", &line[..start], &line[at + 1..]);
    }
    match line.split(':').next() {
        Some(file) if is_source(Path::new(file)) && !file.starts_with(['/', '.']) => {
            format!("guest/{}/{line}", module.dir)
        }
        _ => line.to_owned(),
    }
}

/// Copies what belongs to a module's build, and nothing that an earlier build by hand left.
fn copy_sources(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_sources(&entry.path(), &target)?;
        } else if is_source(&entry.path()) {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

/// Sees whether patches can be what they are said to be, before anything is fetched or compiled for them: all are patches, and
/// the first applies. The others go onto a copy that it has changed.
pub(super) fn look(patches: &[PathBuf]) -> Result<()> {
    for patch in patches {
        is_patch(patch, &read_input("the patch", patch)?)?;
    }
    let Some(first) = patches.first() else { return Ok(()) };
    let file = std::path::absolute(first).unwrap_or_else(|_| first.clone());
    let mut command = patching(&file, true)?;
    let done =
        process::run(command.current_dir(source_tree()?.join("guest").join(DRIVER.dir)), None, &mut |_| {})
            .map_err(|e| Failure::environment(format!("cannot run patch: {e}")))?;
    if done.status.success() { Ok(()) } else { Err(does_not_apply(first, &done.tail)) }
}

fn is_patch(patch: &Path, diff: &[u8]) -> Result<()> {
    if diff.starts_with(b"--- ") || diff.windows(5).any(|window| window == b"\n--- ") {
        return Ok(());
    }
    Err(Failure::usage(format!("{} is not a patch: no line begins with '--- '", patch.display())))
}

/// The command that applies a file to the directory it is started in, or only tries.
fn patching(file: &Path, only_try: bool) -> Result<Command> {
    if let Some(program) = process::find_program("patch") {
        let mut command = Command::new(program);
        command.args(["-p1", "--batch", "--forward", "--no-backup-if-mismatch", "-r", "-"]);
        command.args(only_try.then_some("--dry-run")).arg("-i").arg(file);
        Ok(command)
    } else if let Some(program) = process::find_program("git") {
        let mut command = Command::new(program);
        // Not as part of a repository that may happen to be around the cache.
        command.env("GIT_DIR", "/nonexistent").args(["apply", "-p1"]);
        command.args(only_try.then_some("--check")).arg(file);
        Ok(command)
    } else {
        Err(Failure::environment("neither patch nor git is installed; one is needed to apply a patch")
            .remedy("apt-get install patch"))
    }
}

fn does_not_apply(patch: &Path, said: &str) -> Failure {
    Failure::usage(format!(
        "{} does not apply to guest/driver:\n    {}",
        patch.display(),
        last_lines(said, 6).join("\n    ")
    ))
    .remedy("paths in it are relative to guest/driver with one leading component, as in a/main.c")
}

/// Applies one patch, made relative to the driver's directory with one leading component (`-p1`).
fn apply(cache: &Cache, patch: &Path, diff: &[u8], dir: &Path, partial: &mut Partial) -> Result<()> {
    is_patch(patch, diff)?;
    // Under a name of our own, from the bytes that were hashed.
    let copy = partial.path.join("patch.diff");
    fs::write(&copy, diff).map_err(|e| cache.trouble("copying the patch", &e))?;
    let mut command = patching(&copy, false)?;
    let done = process::run(command.current_dir(dir), Some(&partial.guard), &mut |_| {})
        .map_err(|e| cache.trouble("cannot run patch", &e))?;
    let _ = fs::remove_file(&copy);
    if done.status.success() {
        return Ok(());
    }
    if done.tail.contains("No space left on device") {
        return Err(cache.disk_full("applying a patch"));
    }
    Err(does_not_apply(patch, &done.tail))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::failure::FailureKind;

    #[test]
    fn a_tree_that_was_built_again_is_another_one() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let before = stamp(image.path()).unwrap();
        assert_eq!(stamp(image.path()).unwrap(), before);
        let later = image.as_file().metadata().unwrap().modified().unwrap() + Duration::from_millis(1);
        image.as_file().set_modified(later).unwrap();
        assert_ne!(stamp(image.path()).unwrap(), before);
        assert!(stamp(Path::new("/nonexistent")).is_err());
    }

    #[test]
    fn what_is_no_patch_or_does_not_apply_is_seen_without_a_kernel() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::write(&path, text).unwrap();
            path
        };
        let good = source_tree().unwrap().join("guest/mutants/last-page.patch");
        let bad = file("bad", "--- a/main.c\n+++ b/main.c\n@@ -1 +1 @@\n-nobody wrote this\n+x\n");
        let none = file("none", "hello\n");
        look(&[]).unwrap();
        look(&[good.clone(), bad.clone()]).unwrap(); // Who knows what the first leaves of main.c.
        assert!(look(std::slice::from_ref(&bad)).unwrap_err().what.contains("does not apply"));
        assert!(look(&[good, none]).unwrap_err().what.contains("is not a patch"));
        assert_eq!(look(&[dir.path().join("nothing")]).unwrap_err().kind, FailureKind::Usage);
    }

    #[test]
    fn compilers_lines_name_files_as_the_user_knows_them() {
        for (line, shown) in [
            ("/tmp/guest/driver/main.c:7:1: error: x", "guest/driver/main.c:7:1: error: x"),
            ("/tmp/build-1-0/guest/driver/main.c:7:1: error: x", "guest/driver/main.c:7:1: error: x"),
            ("main.c:7:1: error: x", "guest/driver/main.c:7:1: error: x"),
            ("./include/linux/hmm.h:7:1: error: x", "./include/linux/hmm.h:7:1: error: x"),
            ("In file included from /tmp/guest/driver/a.h:1", "In file included from guest/driver/a.h:1"),
            ("ERROR: modpost: \"x\" undefined!", "ERROR: modpost: \"x\" undefined!"),
        ] {
            assert_eq!(readable(line, DRIVER), shown);
        }
    }
}
