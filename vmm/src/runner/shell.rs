// SPDX-License-Identifier: MIT OR Apache-2.0
//! A shell for the guest, out of what the host has.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::failure::{Failure, Result};
use crate::initramfs::Initramfs;
use crate::process::find_program;

/// Programs that a shell is of little use without, where the host has them.
const TOOLS: &[&str] = &[
    "cat", "chmod", "cp", "cut", "date", "dd", "df", "dmesg", "echo", "env", "find", "free", "grep", "head",
    "hexdump", "insmod", "kill", "less", "ln", "ls", "lsmod", "mkdir", "mount", "mv", "od", "ps", "pwd",
    "rm", "rmmod", "sed", "sh", "sleep", "sort", "stat", "strace", "tail", "taskset", "tee", "timeout",
    "touch", "tr", "true", "umount", "uname", "vi", "wc", "xargs",
];

/// Adds a shell and what people expect beside it, unless there is one already.
pub fn add(tree: &mut Initramfs) -> Result<()> {
    if tree.contains("/bin/sh") {
        return Ok(());
    }
    match find_program("busybox") {
        Some(busybox) => {
            tree.add_host(&busybox, "/bin/busybox")?;
            for applet in applets(&busybox) {
                let path = format!("/bin/{applet}");
                if !tree.contains(&path) {
                    tree.symlink(&path, "busybox")?;
                }
            }
        }
        None => {
            for tool in TOOLS {
                if let Some(program) = find_program(tool) {
                    tree.add_host(&program, &format!("/bin/{tool}"))?;
                }
            }
        }
    }
    if tree.contains("/bin/sh") {
        return Ok(());
    }
    Err(Failure::environment("there is no shell on this machine to put into the guest")
        .remedy("install busybox-static, or give one with --add FILE:/bin/sh"))
}

/// What a busybox can be called as.
fn applets(busybox: &Path) -> Vec<String> {
    let output = Command::new(busybox).arg("--list").stdin(Stdio::null()).stderr(Stdio::null()).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.lines().filter(|name| !name.is_empty() && !name.contains('/')).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_host_has_a_shell() {
        let mut tree = Initramfs::new();
        add(&mut tree).unwrap();
        assert!(tree.contains("/bin/sh") && tree.contains("/bin/ls"));
    }

    #[test]
    fn the_users_shell_is_left_alone() {
        let mut tree = Initramfs::new();
        tree.file("/bin/sh", 0o755, "#!").unwrap();
        add(&mut tree).unwrap();
        assert!(!tree.contains("/bin/ls"));
    }
}
