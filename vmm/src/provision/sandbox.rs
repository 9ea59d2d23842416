// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where modules are compiled: a bubblewrap sandbox whose writable places are in memory, and which dies with us.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::kernel::{Build, Kernel};
use crate::failure::{Failure, Result};
use crate::process;

/// A directory of the host that the sandbox sees.
pub(super) struct Shares<'a> {
    /// Sources, read-only.
    pub sources: &'a Path,
    /// Where results go.
    pub results: &'a Path,
}

/// What the sandbox calls the two.
pub(super) const SOURCES: &str = "/tmp/in";
pub(super) const RESULTS: &str = "/tmp/out";

/// A command that runs a shell script in a sandbox fit for building modules for this kernel. The script's `$1` is the
/// directory of headers for `make -C`.
pub(super) fn command(kernel: &Kernel, shares: &Shares<'_>, script: &str) -> Result<Command> {
    let bwrap = process::find_program("bwrap").ok_or_else(missing)?;
    if let Err(why) = bwrap_works() {
        return Err(Failure::environment(format!("bubblewrap cannot make a sandbox to compile in: {why}"))
            .remedy(namespaces_remedy()));
    }
    let mut command = Command::new(bwrap);
    command.args(["--unshare-all", "--die-with-parent", "--new-session", "--ro-bind"]);
    let headers = match &kernel.build {
        Build::Root { item, headers } => {
            command.arg(item.path.join("root")).arg("/");
            PathBuf::from(headers)
        }
        Build::Tree(tree) => {
            command.args(["/", "/"]);
            tree.clone()
        }
    };
    command.args(["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]);
    if let Build::Tree(tree) = &kernel.build {
        // A tree below /tmp has just been covered; a tree built with O= needs its sources as well.
        let sources = fs::canonicalize(tree.join("source")).ok();
        for dir in sources.iter().chain([tree]).filter(|dir| dir.starts_with("/tmp")) {
            command.arg("--ro-bind").arg(dir).arg(dir);
        }
    }
    command.arg("--ro-bind").arg(shares.sources).arg(SOURCES);
    command.arg("--bind").arg(shares.results).arg(RESULTS);
    command.args([
        "--clearenv",
        "--setenv",
        "PATH",
        "/usr/bin:/usr/sbin:/bin:/sbin",
        "--setenv",
        "LC_ALL",
        "C",
    ]);
    command.args(["--chdir", "/tmp", "/bin/sh", "-euc", script, "sh"]).arg(headers);
    Ok(command)
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
