// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where modules are compiled: a bubblewrap sandbox whose writable places are in memory, and which dies with us; for root
//! where namespaces are forbidden, a chroot.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use super::kernel::{Build, Kernel};
use crate::failure::{Failure, Result};
use crate::process::{self, Guard};

/// Directories of the host that the sandbox sees.
pub(super) struct Shares<'a> {
    /// Sources, read-only.
    pub sources: &'a Path,
    /// Where results go.
    pub results: &'a Path,
}

/// A sandbox in which a script can be run once.
pub(super) struct Sandbox {
    /// Runs the script. Its `$1` is the directory of headers for `make -C`, `$2` has the sources, `$3` takes the results, and
    /// `$4` is a place to work in.
    pub command: Command,
    scratch: Option<Scratch>,
}

/// The file system of a sandbox.
#[derive(Clone, Copy)]
enum Place<'a> {
    /// A root of its own with compiler and headers.
    Root { root: &'a Path, headers: &'a str },
    /// The host's, with a built kernel tree in it.
    Tree(&'a Path),
}

/// A sandbox fit for building modules for this kernel.
pub(super) fn sandbox(kernel: &Kernel, shares: &Shares<'_>, script: &str) -> Result<Sandbox> {
    match &kernel.build {
        Build::Root { item, headers } => {
            begin(Place::Root { root: &item.path.join("root"), headers }, shares, script)
        }
        Build::Tree(tree) => begin(Place::Tree(tree), shares, script),
        Build::Nowhere => Err(nowhere(kernel)),
    }
}

/// A sandbox in a root that has a compiler, for building something else than modules. The script gets no headers: its `$1` is `/`.
pub(super) fn in_root(root: &Path, shares: &Shares<'_>, script: &str) -> Result<Sandbox> {
    begin(Place::Root { root, headers: "/" }, shares, script)
}

fn begin(place: Place<'_>, shares: &Shares<'_>, script: &str) -> Result<Sandbox> {
    match (bwrap_works(), place) {
        (Ok(()), _) => bubblewrap(place, shares, script),
        // Where not even root gets namespaces, in most containers, it still gets a chroot.
        (Err(_), Place::Root { root, headers }) if nix::unistd::geteuid().is_root() => {
            chroot(root, headers, shares, script)
                .map_err(|e| Failure::environment(format!("cannot prepare a chroot to compile in: {e}")))
        }
        (Err(_), _) if process::find_program("bwrap").is_none() => Err(missing()),
        (Err(why), _) => {
            Err(Failure::environment(format!("bubblewrap cannot make a sandbox to compile in: {why}"))
                .remedy(namespaces_remedy()))
        }
    }
}

impl Sandbox {
    /// Brings the results to where they were wanted, if the way of the sandbox is not to have put them there.
    pub(super) fn finish(self, results: &Path) -> std::io::Result<()> {
        let Some(scratch) = &self.scratch else { return Ok(()) };
        for entry in fs::read_dir(scratch.path.join("out"))? {
            let entry = entry?;
            // Both are in the cache, and so on one file system.
            fs::rename(entry.path(), results.join(entry.file_name()))?;
        }
        Ok(())
    }
}

fn bubblewrap(place: Place<'_>, shares: &Shares<'_>, script: &str) -> Result<Sandbox> {
    let bwrap = process::find_program("bwrap").ok_or_else(missing)?;
    let mut command = Command::new(bwrap);
    command.args(["--unshare-all", "--die-with-parent", "--new-session", "--ro-bind"]);
    let headers = match place {
        Place::Root { root, headers } => {
            command.arg(root).arg("/");
            Path::new(headers)
        }
        Place::Tree(tree) => {
            command.args(["/", "/"]);
            tree
        }
    };
    command.args(["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]);
    if let Place::Tree(tree) = place {
        // A tree below /tmp has just been covered; a tree built with O= needs its sources as well.
        let sources = fs::canonicalize(tree.join("source")).ok();
        for dir in sources.iter().map(PathBuf::as_path).chain([tree]).filter(|dir| dir.starts_with("/tmp")) {
            command.arg("--ro-bind").arg(dir).arg(dir);
        }
    }
    command.arg("--ro-bind").arg(shares.sources).arg("/tmp/in");
    command.arg("--bind").arg(shares.results).arg("/tmp/out");
    command.args(["--clearenv", "--setenv", "PATH", PATH, "--setenv", "LC_ALL", "C"]);
    command.args(["--chdir", "/tmp", "/bin/sh", "-euc", script, "sh"]);
    command.arg(headers).args(["/tmp/in", "/tmp/out", "/tmp"]);
    Ok(Sandbox { command, scratch: None })
}

/// The failure of building for a kernel of which there is the image only.
pub(super) fn nowhere(kernel: &Kernel) -> Failure {
    Failure::environment(format!(
        "no modules can be built for {}: there is its image only (a defect)",
        kernel.release
    ))
}

const PATH: &str = "/usr/bin:/usr/sbin:/bin:/sbin";

/// A directory inside the root, which goes when we go, however that is.
struct Scratch {
    path: PathBuf,
    _guard: Guard,
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

fn chroot(root: &Path, headers: &str, shares: &Shares<'_>, script: &str) -> std::io::Result<Sandbox> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    // Without it, compilers' options are probed wrong.
    let null = root.join("dev/null");
    if !null.exists() {
        let device = nix::sys::stat::makedev(1, 3);
        let mode = nix::sys::stat::Mode::from_bits_truncate(0o666);
        match nix::sys::stat::mknod(&null, nix::sys::stat::SFlag::S_IFCHR, mode, device) {
            Ok(()) | Err(nix::errno::Errno::EEXIST) => {
                fs::set_permissions(&null, fs::Permissions::from_mode(0o666))?
            }
            Err(error) => return Err(error.into()),
        }
    }
    // There is no /proc in it either; newer kernels' objtool asks it where the stack ends, to explain its own crashes.
    // Written apart and renamed, since another build may be reading it.
    let maps = root.join("proc/self/maps");
    if !maps.exists() {
        fs::create_dir_all(root.join("proc/self"))?;
        let temporary = maps.with_extension(std::process::id().to_string());
        fs::write(&temporary, fs::read("/proc/self/maps")?)?;
        fs::rename(&temporary, &maps)?;
    }
    let name = format!("build-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let path = root.join("tmp").join(&name);
    let scratch = Scratch { _guard: Guard::new(&[&path])?, path };
    fs::create_dir_all(scratch.path.join("out"))?;
    copy_tree(shares.sources, &scratch.path.join("in"))?;
    let inside = format!("/tmp/{name}");
    let mut command = Command::new(process::find_program("chroot").unwrap_or_else(|| "chroot".into()));
    command.arg(root).args(["/bin/sh", "-euc", script, "sh", headers]);
    command.args([format!("{inside}/in"), format!("{inside}/out"), inside]);
    command.env_clear().env("PATH", PATH).env("LC_ALL", "C");
    Ok(Sandbox { command, scratch: Some(scratch) })
}

fn copy_tree(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_tree(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

fn missing() -> Failure {
    Failure::environment("bubblewrap (bwrap) is not installed; modules are compiled in its sandbox")
        .remedy("run ci/demo, or: apt-get install bubblewrap")
}

/// Whether a sandbox can be made here; else why not.
pub(crate) fn bwrap_works() -> Result<(), String> {
    let Some(bwrap) = process::find_program("bwrap") else { return Err("it is not installed".into()) };
    let mut command = Command::new(bwrap);
    command.args([
        "--unshare-all",
        "--die-with-parent",
        "--ro-bind",
        "/",
        "/",
        "--proc",
        "/proc",
        "--dev",
        "/dev",
    ]);
    match process::die_with_parent(command.arg("true")).output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(process::last_lines(&String::from_utf8_lossy(&output.stderr), 1).join(" ")),
        Err(error) => Err(error.to_string()),
    }
}

/// What to do where namespaces are forbidden, by the switch that forbids them.
pub(crate) fn namespaces_remedy() -> String {
    let switched = |file: &str, value: &str| fs::read_to_string(file).is_ok_and(|text| text.trim() == value);
    let allow = if switched("/proc/sys/kernel/unprivileged_userns_clone", "0") {
        "allow user namespaces: sysctl kernel.unprivileged_userns_clone=1 (as root)"
    } else if switched("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1") {
        "allow user namespaces: sysctl kernel.apparmor_restrict_unprivileged_userns=0 (as root)"
    } else if switched("/proc/sys/user/max_user_namespaces", "0") {
        "allow user namespaces: sysctl user.max_user_namespaces=15000 (as root)"
    } else {
        "in a container, allow namespaces (docker run --privileged, or --security-opt seccomp=unconfined \
         --security-opt apparmor=unconfined --cap-add SYS_ADMIN)"
    };
    format!(
        "{allow}; or run 'hmm-testbench provision' once as root with HMM_TESTBENCH_CACHE set to a folder that you can \
         read, and use the same folder"
    )
}
