// SPDX-License-Identifier: MIT OR Apache-2.0
//! What this machine has, what it lacks, and how to get that. Looks only; makes and fetches nothing.

use std::fs;
use std::process::Command;
use std::time::Duration;

use serde::Serialize;

use crate::failure::Failure;
use crate::machine::probe;
use crate::process;
use crate::provision::{self, Cache, KERNELS, QemuProgram};

/// How one check went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// There, and works.
    Ok,
    /// Not there yet; provisioning gets it, or things work without.
    Note,
    /// Missing: runs cannot work until the remedy is applied.
    Missing,
}

/// One thing looked at.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What, in a word or two.
    pub name: &'static str,
    /// How it is.
    pub state: State,
    /// What was found.
    pub found: String,
    /// What to do, where something can be done.
    pub remedy: Option<String>,
}

/// All checks.
#[derive(Clone, Debug, Serialize)]
pub struct Doctor {
    /// Nothing is missing.
    pub healthy: bool,
    /// A probe guest has run with KVM.
    pub kvm_can_run_linux: bool,
    /// The single findings.
    pub checks: Vec<Check>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, state: State::Ok, found: found.into(), remedy: None }
    }
    fn note(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            name,
            state: State::Note,
            found: found.into(),
            remedy: Some(remedy.into()).filter(|r| !r.is_empty()),
        }
    }
    fn missing(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, state: State::Missing, found: found.into(), remedy: Some(remedy.into()) }
    }
}

impl Doctor {
    /// Looks at everything.
    #[must_use]
    pub fn examine(cache: &Cache) -> Self {
        let (kvm_can_run_linux, why) = kvm_can_run_linux(probe::DEADLINE);
        let checks = vec![
            processor(),
            kvm(kvm_can_run_linux, why),
            qemu(cache),
            program("mmdebstrap", "apt-get install mmdebstrap debian-archive-keyring"),
            sandbox(),
            namespaces(),
            cargo(),
            program("gcc", "apt-get install gcc libc6-dev"),
            program("patch", "apt-get install patch"),
            memory(),
            disk(cache),
            kernels(cache),
        ];
        let healthy = checks.iter().all(|check| check.state != State::Missing);
        Self { healthy, kvm_can_run_linux, checks }
    }
}

/// Whether this host's KVM can run Linux, and why or why not, by running a probe guest that has this long.
///
/// The node alone proves nothing: a host's KVM without hardware support opens, makes machines, and still cannot run Linux.
#[must_use]
pub fn kvm_can_run_linux(deadline: Duration) -> (bool, String) {
    match probe::run(deadline) {
        Ok(took) => (true, format!("a probe guest ran in {} ms", took.as_millis().max(1))),
        Err(why) if virtualisation_flag().is_none() => {
            (false, format!("{why} (and the processor has neither vmx nor svm)"))
        }
        Err(why) => (false, why),
    }
}

/// The same for those who do not insist on KVM: where the processor says that it has no virtualisation, that is enough, and
/// nobody waits for a probe guest's deadline.
#[must_use]
pub fn kvm_worth_having() -> (bool, String) {
    if virtualisation_flag().is_none() {
        return (false, "the processor has neither vmx nor svm, so KVM cannot run Linux".into());
    }
    kvm_can_run_linux(probe::DEADLINE)
}

fn cpuinfo(field: &str) -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == field).then(|| value.trim().to_owned())
    })
}

fn virtualisation_flag() -> Option<&'static str> {
    let flags = cpuinfo("flags")?;
    ["vmx", "svm"].into_iter().find(|wanted| flags.split_whitespace().any(|flag| flag == *wanted))
}

fn processor() -> Check {
    const NAME: &str = "processor";
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    if !cfg!(target_arch = "x86_64") {
        return Check::missing(NAME, std::env::consts::ARCH, "the testbench needs an x86-64 machine");
    }
    let model = cpuinfo("model name").unwrap_or_else(|| "unknown model".into());
    Check::ok(NAME, format!("{count} x {model}, {}", virtualisation_flag().unwrap_or("neither vmx nor svm")))
}

fn kvm(usable: bool, why: String) -> Check {
    const NAME: &str = "kvm";
    match (usable, why) {
        (true, why) => Check::ok(NAME, why),
        (false, why) if why.contains("ermission") => {
            Check::note(NAME, format!("{why}; guests run under emulation"), "add yourself to the group kvm")
        }
        (false, why) => Check::note(NAME, format!("{why}; guests run under emulation"), ""),
    }
}

fn qemu(cache: &Cache) -> Check {
    const NAME: &str = "qemu";
    let qemu = match QemuProgram::named().transpose() {
        Err(Failure { what, remedy, .. }) => {
            return Check::missing(NAME, what, remedy.unwrap_or_default());
        }
        Ok(named) => named.or_else(QemuProgram::system).or_else(|| provision::cached_qemu(cache)),
    };
    match qemu {
        Some(qemu) => Check::ok(NAME, format!("{} with vfio-user ({})", qemu.version, qemu.origin)),
        None => Check::note(
            NAME,
            "no QEMU with vfio-user-pci on this system",
            "a private one is fetched when needed: hmm-testbench provision",
        ),
    }
}

fn program(name: &'static str, remedy: &str) -> Check {
    match process::find_program(name) {
        Some(path) => Check::ok(name, path.display().to_string()),
        None => Check::missing(name, "not installed", remedy),
    }
}

fn sandbox() -> Check {
    const NAME: &str = "bubblewrap";
    if process::find_program("bwrap").is_none() {
        return Check::missing(NAME, "not installed", "apt-get install bubblewrap");
    }
    match provision::bwrap_works() {
        Ok(()) => Check::ok(NAME, "makes a sandbox"),
        Err(why) => {
            Check::missing(NAME, format!("cannot make a sandbox: {why}"), provision::namespaces_remedy())
        }
    }
}

fn namespaces() -> Check {
    const NAME: &str = "user namespaces";
    let tried = process::die_with_parent(Command::new("unshare").args(["-Ur", "true"])).output();
    match tried {
        Ok(output) if output.status.success() => Check::ok(NAME, "allowed"),
        _ if nix::unistd::geteuid().is_root() => Check::note(NAME, "forbidden, but root needs none", ""),
        // Only the sandbox uses them, and that has a check of its own.
        _ => Check::note(NAME, "forbidden for ordinary programs", provision::namespaces_remedy()),
    }
}

fn cargo() -> Check {
    const NAME: &str = "cargo";
    const REMEDY: &str = "apt-get install cargo (Debian 13), or rustup; 1.85 or newer";
    let version = Command::new("cargo")
        .arg("--version")
        .output()
        .ok()
        .and_then(|out| String::from_utf8(out.stdout).ok());
    let Some(version) = version else { return Check::missing(NAME, "not installed", REMEDY) };
    let number = version.split_whitespace().nth(1).unwrap_or_default().to_owned();
    let mut parts = number.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    if (parts.next(), parts.next()) >= (Some(1), Some(85)) {
        Check::ok(NAME, number)
    } else {
        Check::missing(NAME, format!("{number} is too old"), REMEDY)
    }
}

fn memory() -> Check {
    const NAME: &str = "memory";
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available: u64 = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix("kB")?.trim().parse().ok())
        .unwrap_or(0);
    let found = format!("{} MiB available", available / 1024);
    if available >= 2 << 20 {
        Check::ok(NAME, found)
    } else {
        Check::note(NAME, found, "2 GiB are comfortable; a smaller guest can be asked for with --memory")
    }
}

fn disk(cache: &Cache) -> Check {
    const NAME: &str = "disk";
    match cache.free_bytes() {
        Ok(free) => {
            let found = format!("{} MB free for {}", free / 1_000_000, cache.root().display());
            if free >= 2_000_000_000 {
                Check::ok(NAME, found)
            } else {
                Check::note(
                    NAME,
                    found,
                    "2 GB are needed at first; HMM_TESTBENCH_CACHE moves the cache elsewhere",
                )
            }
        }
        Err(failure) => Check::missing(NAME, failure.what, failure.remedy.unwrap_or_default()),
    }
}

fn kernels(cache: &Cache) -> Check {
    const NAME: &str = "guest kernels";
    let there = provision::cached_kernels(cache);
    if there.is_empty() {
        let names: Vec<&str> = KERNELS.iter().map(|kernel| kernel.name).collect();
        return Check::note(
            NAME,
            format!("none of {} yet", names.join(", ")),
            "fetched when needed: hmm-testbench provision",
        );
    }
    let list: Vec<String> =
        there.iter().map(|kernel| format!("{} ({})", kernel.name, kernel.release)).collect();
    Check::ok(NAME, list.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_cache_is_no_illness() {
        let dir = tempfile::tempdir().unwrap();
        let doctor = Doctor::examine(&Cache::at(dir.path()).unwrap());
        let state = |name: &str| doctor.checks.iter().find(|check| check.name == name).unwrap().state;
        assert_eq!(state("guest kernels"), State::Note);
        assert_ne!(state("qemu"), State::Missing);
        assert!(doctor.checks.iter().all(|check| check.state != State::Missing || check.remedy.is_some()));
        assert!(fs::read_dir(dir.path()).unwrap().next().is_none(), "looking makes nothing");
        serde_json::to_string(&doctor).unwrap();
    }

    #[test]
    fn kvm_verdicts_have_a_reason() {
        let (usable, why) = kvm_can_run_linux(probe::DEADLINE);
        assert!(!why.is_empty());
        assert!(!usable || virtualisation_flag().is_some());
        let (worth, why) = kvm_worth_having();
        assert!(!why.is_empty());
        assert!(!worth || usable);
    }
}
