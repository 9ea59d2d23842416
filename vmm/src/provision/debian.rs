// SPDX-License-Identifier: MIT OR Apache-2.0
//! Unpacked Debian packages, by `mmdebstrap --variant=extract`: no maintainer script runs, so no root, no chroot and no
//! namespace is needed. Which mirror is used is mmdebstrap's and the machine's business; none is named here.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use super::cache::{Cache, Partial};
use crate::event::{Event, EventSink};
use crate::failure::{Failure, Result};
use crate::process::{self, last_lines};

/// Adds the backports archive from wherever mmdebstrap found the suite itself, in either format of source lists.
const BACKPORTS_HOOK: &str = r#"set -e
apt="$1/etc/apt"
for list in "$apt"/sources.list "$apt"/sources.list.d/*.list; do
	[ -f "$list" ] && sed -n 's/ trixie main/ trixie-backports main/p' "$list"
done > "$apt/backports.tmp" || true
if [ -s "$apt/backports.tmp" ]; then
	mv "$apt/backports.tmp" "$apt/sources.list.d/backports.list"
else
	rm -f "$apt/backports.tmp"
	for list in "$apt"/sources.list.d/*.sources; do
		[ -f "$list" ] && sed 's/^Suites:.*/Suites: trixie-backports/' "$list" > "$apt/sources.list.d/backports.sources" && break
	done
fi
"#;

/// What to unpack.
pub(super) struct Extract<'a> {
    /// Debian release.
    pub suite: &'a str,
    /// Prefer the release's backports.
    pub backports: bool,
    /// These and what they depend on.
    pub packages: &'a [&'a str],
    /// Name of the step in events.
    pub step: &'a str,
}

/// Unpacks packages into `<partial>/root` and returns their versions by name.
pub(super) fn extract(
    cache: &Cache,
    events: &Arc<dyn EventSink>,
    partial: &mut Partial,
    what: &Extract<'_>,
) -> Result<BTreeMap<String, String>> {
    let Some(program) = process::find_program("mmdebstrap") else {
        return Err(missing_mmdebstrap());
    };
    let root = partial.path.join("root");
    // Inside the partial directory, so that it goes when that goes.
    let temporary = partial.path.join("tmp");
    fs::create_dir_all(&temporary).map_err(|e| cache.trouble("cannot start unpacking packages", &e))?;

    let mut command = Command::new(&program);
    command.arg("--mode=chrootless").arg("--variant=extract").arg("--verbose").arg("--format=directory");
    if nix::unistd::geteuid().is_root() && knows_skip(&program) {
        // The check warns of maintainer scripts that would change the host. None runs here.
        command.arg("--skip=check/chrootless");
    }
    command.arg("--architectures=amd64");
    command.arg(format!("--include={}", what.packages.join(",")));
    for option in [
        "APT::Install-Recommends \"false\"",
        "Acquire::Retries \"3\"",
        "Acquire::Languages \"none\"",
        "Acquire::http::Timeout \"30\"",
        "Acquire::https::Timeout \"30\"",
    ] {
        command.arg(format!("--aptopt={option}"));
    }
    if what.backports {
        command.arg(format!("--aptopt=APT::Default-Release \"{}-backports\"", what.suite));
        command.arg(format!("--setup-hook={}", BACKPORTS_HOOK.replace("trixie", what.suite)));
    }
    command.arg(what.suite).arg(&root);
    command.env("TMPDIR", &temporary).env("LC_ALL", "C.UTF-8").env("DEBIAN_FRONTEND", "noninteractive");
    command.current_dir(&partial.path);

    let mut progress = Progress::new(what.step, events);
    let done = process::run(&mut command, Some(&partial.guard), &mut |line| progress.line(line))
        .map_err(|e| cache.trouble("cannot run mmdebstrap", &e))?;
    if !done.status.success() {
        return Err(explain(cache, what, &done.tail, progress.errors));
    }
    let versions = progress.versions;
    (|| {
        merge_usr(&root)?;
        tidy(&root)?;
        fs::remove_dir_all(&temporary)
    })()
    .map_err(|e| cache.trouble("tidying the unpacked packages", &e))?;
    Ok(versions)
}

pub(super) fn missing_mmdebstrap() -> Failure {
    Failure::environment(
        "mmdebstrap is not installed; it fetches the Debian packages that the guest is made of",
    )
    .remedy("run ci/demo, or: apt-get install mmdebstrap debian-archive-keyring")
}

/// Before 1.0 there was neither the option nor the check.
fn knows_skip(program: &Path) -> bool {
    process::die_with_parent(Command::new(program).arg("--version"))
        .output()
        .ok()
        .and_then(|out| String::from_utf8(out.stdout).ok())
        .and_then(|text| text.split_whitespace().nth(1)?.split('.').next()?.parse::<u32>().ok())
        .is_some_and(|major| major >= 1)
}

/// Turns what mmdebstrap and apt said into one message.
fn explain(cache: &Cache, what: &Extract<'_>, tail: &str, errors: Vec<String>) -> Failure {
    let doing = format!("fetching {} from Debian {}", what.packages.join(", "), what.suite);
    if tail.contains("No space left on device")
        || tail.contains("have enough free space")
        || tail.contains("Disk quota exceeded")
    {
        return cache.disk_full(&doing);
    }
    let lines = if errors.is_empty() { last_lines(tail, 5) } else { errors };
    let failure = Failure::environment(format!("{doing} failed:\n    {}", lines.join("\n    ")));
    let names_network =
        ["Temporary failure resolving", "Could not resolve", "Could not connect", "Connection timed out"];
    if names_network.iter().any(|sign| tail.contains(sign)) {
        failure.remedy(
            "a network with a Debian mirror is needed once (http_proxy is honoured); then run it again",
        )
    } else if tail.contains("NO_PUBKEY") || tail.contains("is not signed") || tail.contains("keyring") {
        failure
            .remedy("install or update the keys of Debian's archive: apt-get install debian-archive-keyring")
    } else {
        failure.remedy("run it again; what was complete is kept")
    }
}

/// Reads apt's words as progress: it says how much there is to get, and the size of each file as it begins.
struct Progress<'a> {
    step: &'a str,
    events: &'a Arc<dyn EventSink>,
    total: Option<u64>,
    done: u64,
    current: u64,
    versions: BTreeMap<String, String>,
    errors: Vec<String>,
}

impl<'a> Progress<'a> {
    fn new(step: &'a str, events: &'a Arc<dyn EventSink>) -> Self {
        Self { step, events, total: None, done: 0, current: 0, versions: BTreeMap::new(), errors: Vec::new() }
    }

    fn line(&mut self, line: &str) {
        if let Some(rest) = line.strip_prefix("Need to get ") {
            // With a part there already it says "12 MB/34 MB"; what is still to come is first.
            self.total = parse_size(rest.split(['/']).next().unwrap_or(rest));
            self.done = 0;
            self.current = 0;
            self.say(Some("downloading".into()));
        } else if let Some(rest) = line.strip_prefix("Get:") {
            self.get(rest);
        } else if line.starts_with("Fetched ") {
            if let Some(total) = self.total {
                self.done = total;
                self.current = 0;
                self.say(None);
            }
        } else if let Some(rest) = line.strip_prefix("I: ") {
            let detail = rest.trim_end_matches("...");
            if detail.starts_with("running apt-get") {
                self.say(Some("reading the package lists".into()));
            } else if detail.starts_with("extracting") {
                self.say(Some("unpacking".into()));
            }
        } else if (line.starts_with("E: ") || line.starts_with("Err:")) && self.errors.len() < 6 {
            self.errors.push(line.to_owned());
        }
    }

    /// `12 <where> trixie/main amd64 gcc-14 amd64 14.2.0-19 [22.2 MB]`; package lists look the same but have no version.
    fn get(&mut self, rest: &str) {
        if self.total.is_none() {
            return;
        }
        let words: Vec<&str> = rest.split_whitespace().collect();
        self.done += std::mem::take(&mut self.current);
        if let Some(size) = rest.rsplit_once('[').and_then(|(_, size)| parse_size(size.trim_end_matches(']')))
        {
            self.current = size;
        }
        if let [_, _, _, _, package, _, version, ..] = words[..] {
            self.versions.insert(package.to_owned(), version.to_owned());
            self.say(Some(package.to_owned()));
        }
    }

    fn say(&self, detail: Option<String>) {
        self.events.event(Event::StepProgress {
            step: self.step.to_owned(),
            done: self.total.map_or(self.done, |total| self.done.min(total)),
            total: self.total,
            detail,
        });
    }
}

/// apt's sizes: `6924 B`, `8790 kB`, `98.3 MB`, `1,024 MB`.
fn parse_size(text: &str) -> Option<u64> {
    let mut words = text.split_whitespace();
    let number: f64 = words.next()?.replace(',', "").parse().ok()?;
    let unit = match words.next()? {
        "B" => 1.0,
        "kB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        _ => return None,
    };
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "sizes are small and not negative"
    )]
    Some((number * unit) as u64)
}

/// Makes `/bin`, `/sbin`, `/lib` and `/lib64` the links into `/usr` that an installation would have made, moving what older
/// packages still put there.
fn merge_usr(root: &Path) -> io::Result<()> {
    for name in ["bin", "sbin", "lib", "lib64"] {
        let outer = root.join(name);
        let inner = root.join("usr").join(name);
        match outer.symlink_metadata() {
            Ok(meta) if meta.is_symlink() => continue,
            Ok(_) => {
                merge(&outer, &inner)?;
                fs::remove_dir_all(&outer)?;
            }
            Err(_) => {}
        }
        if name != "lib64" || inner.exists() {
            fs::create_dir_all(&inner)?;
            symlink(Path::new("usr").join(name), &outer)?;
        }
    }
    Ok(())
}

fn merge(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        let there = target.symlink_metadata().is_ok();
        if entry.file_type()?.is_dir() && there {
            merge(&entry.path(), &target)?;
        } else if !there {
            fs::rename(entry.path(), target)?;
        }
    }
    Ok(())
}

/// Adds what maintainer scripts would have, and the mount points of a sandbox; removes what nobody reads.
fn tidy(root: &Path) -> io::Result<()> {
    for (link, target) in [("usr/bin/awk", "mawk"), ("usr/bin/sh", "dash")] {
        let link = root.join(link);
        if link.symlink_metadata().is_err() && link.with_file_name(target).exists() {
            symlink(target, link)?;
        }
    }
    for unread in [
        "usr/share/doc",
        "usr/share/man",
        "usr/share/info",
        "usr/share/locale",
        "usr/share/lintian",
        "var",
        "dev",
    ] {
        let dir = root.join(unread);
        if dir.symlink_metadata().is_ok() {
            // Some packages bring directories that even their owner may not write.
            make_writable(&dir);
            fs::remove_dir_all(dir)?;
        }
    }
    for mount_point in ["dev", "proc", "tmp", "mnt"] {
        fs::create_dir_all(root.join(mount_point))?;
    }
    Ok(())
}

/// Lets the owner write a directory tree, as far as possible.
pub(super) fn make_writable(dir: &Path) {
    let Ok(meta) = fs::symlink_metadata(dir) else { return };
    if !meta.is_dir() {
        return;
    }
    let _ = fs::set_permissions(dir, fs::Permissions::from_mode(meta.permissions().mode() | 0o700));
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            make_writable(&entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("98.3 MB of archives."), Some(98_300_000));
        assert_eq!(parse_size("6924 B"), Some(6924));
        assert_eq!(parse_size("nothing"), None);
    }

    #[test]
    fn apt_output_becomes_progress_and_versions() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&seen);
        let events: Arc<dyn EventSink> = Arc::new(move |event| {
            if let Event::StepProgress { done, total, .. } = event {
                sink.lock().push((done, total));
            }
        });
        let mut progress = Progress::new("x", &events);
        for line in [
            "Get:4 http://mirror/debian bookworm/main amd64 Packages [8790 kB]",
            "Need to get 30 MB of archives.",
            "Get:1 http://mirror/debian trixie/main amd64 gcc-14 amd64 14.2.0-19 [20 MB]",
            "Get:2 http://mirror/debian trixie/main amd64 make amd64 4.4.1-2 [10 MB]",
            "Fetched 30 MB in 1s (30 MB/s)",
        ] {
            progress.line(line);
        }
        assert_eq!(progress.versions["gcc-14"], "14.2.0-19");
        let total = Some(30_000_000);
        assert_eq!(*seen.lock(), [(0, total), (0, total), (20_000_000, total), (30_000_000, total)]);
    }

    #[test]
    fn usr_is_merged_without_losing_files() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        for (path, text) in [("lib/x/a", "1"), ("usr/lib/x/b", "2"), ("usr/bin/mawk", "")] {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        merge_usr(root).unwrap();
        tidy(root).unwrap();
        assert_eq!(fs::read_to_string(root.join("lib/x/a")).unwrap(), "1");
        assert_eq!(fs::read_to_string(root.join("usr/lib/x/b")).unwrap(), "2");
        assert_eq!(fs::read_link(root.join("usr/bin/awk")).unwrap(), Path::new("mawk"));
        assert!(root.join("mnt").is_dir() && root.join("bin").is_symlink());
    }
}
