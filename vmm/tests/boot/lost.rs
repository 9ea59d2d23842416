// SPDX-License-Identifier: MIT OR Apache-2.0
//! What goes wrong ends soon, with one clear message and the right exit status, and leaves nothing behind.

use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::time::{Duration, Instant};

use crate::support::{binary, machine, plain, run};

#[test]
fn a_guest_that_panics_at_boot_is_inconclusive_with_its_last_words() {
    let _one = machine();
    let finished = run(["access", "--append", "rdinit=/nonexistent", "--seed", "1"]);
    finished.expect_status(3).expect_said("Kernel panic");
    assert!(finished.took < Duration::from_secs(60), "{:?}", finished.took);
    assert_eq!(finished.results["verdict"], "inconclusive");
}

#[test]
fn a_guest_that_hangs_at_boot_is_given_up() {
    let _one = machine();
    // PID 1 that only sleeps: no message, no further console line.
    let finished =
        run(["access", "--add", "/bin/sleep:/sleep", "--append", "rdinit=/sleep -- 100000", "--seed", "1"]);
    finished.expect_status(3);
    assert!(finished.took < Duration::from_secs(150), "{:?}", finished.took);
}

#[test]
fn a_driver_that_does_not_compile_says_where() {
    let _one = machine();
    let mut patch = tempfile::NamedTempFile::new().expect("a temporary file");
    let source = crate::support::repository().join("guest/driver/main.c");
    let first =
        std::fs::read_to_string(source).expect("the driver").lines().next().unwrap_or_default().to_owned();
    writeln!(patch, "--- a/main.c\n+++ b/main.c\n@@ -1,1 +1,2 @@\n {first}\n+this is not C;")
        .expect("written");
    let finished = run(["access".as_ref(), "--patch".as_ref(), patch.path().as_os_str()]);
    finished.expect_status(2).expect_said("main.c:2");
}

#[test]
fn a_patch_that_does_not_apply_says_so() {
    let mut patch = tempfile::NamedTempFile::new().expect("a temporary file");
    writeln!(patch, "--- a/main.c\n+++ b/main.c\n@@ -1,1 +1,1 @@\n-no such line\n+at all").expect("written");
    let finished = run(["access".as_ref(), "--patch".as_ref(), patch.path().as_os_str()]);
    finished.expect_status(2).expect_said("does not apply");
}

#[test]
fn a_kernel_that_is_none_is_refused() {
    let finished = run(["access", "--kernel", "/etc/hostname"]);
    finished.expect_status(2);
    assert!(finished.took < Duration::from_secs(10));
}

#[test]
fn kvm_demanded_and_absent_is_an_error() {
    if plain(binary().args(["doctor", "--json"])).stdout.contains("\"kvm_can_run_linux\":true") {
        return; // this host has it; the error cannot be had here
    }
    run(["access", "--accel", "kvm"]).expect_status(4);
}

/// Whether a process is a QEMU that was given a kernel.
fn runs_a_kernel(pid: u32) -> bool {
    std::fs::read(format!("/proc/{pid}/cmdline"))
        .is_ok_and(|line| line.split(|b| *b == 0).any(|word| word == b"-kernel"))
}

/// Every process that has `marker` in its environment.
pub(crate) fn processes_with(marker: &str) -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| {
            std::fs::read(format!("/proc/{pid}/environ"))
                .is_ok_and(|env| env.split(|b| *b == 0).any(|v| v == marker.as_bytes()))
        })
        .collect()
}

#[test]
fn kill_9_leaves_no_process_and_no_file() {
    killed_leaves_nothing(&[], Duration::from_secs(3));
}

/// Kills a run some time after its machine has started, and looks for what it left behind.
pub(crate) fn killed_leaves_nothing(options: &[&str], after: Duration) {
    let _one = machine();
    let marker = format!("HMM_TESTBENCH_MARKER={}", std::process::id());
    let (name, value) = marker.split_once('=').expect("a pair");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut child = binary()
        .args(["run", "stress", "--duration", "10m", "--seed", "1"])
        .args(options)
        .env(name, value)
        .env("TMPDIR", folder.path())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .process_group(0)
        .spawn()
        .expect("the binary starts");
    let begin = Instant::now();
    // A machine, not only a process that helps to make the parts.
    let started = || processes_with(&marker).into_iter().any(runs_a_kernel);
    while !started() && begin.elapsed() < Duration::from_secs(120) {
        std::thread::sleep(Duration::from_millis(200));
    }
    assert!(started(), "no machine was started");
    std::thread::sleep(after);
    child.kill().expect("killed");
    child.wait().expect("reaped");
    let begin = Instant::now();
    while !processes_with(&marker).is_empty() && begin.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(processes_with(&marker), Vec::<u32>::new(), "processes outlived the testbench");
    let left: Vec<_> =
        std::fs::read_dir(folder.path()).expect("readable").flatten().map(|e| e.path()).collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}
