// SPDX-License-Identifier: MIT OR Apache-2.0
//! The native machine: on this host's KVM where it runs guests, in an outer guest elsewhere; and what is special about the latter.

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::lost::killed_leaves_nothing;
use crate::support::{Finished, binary, machine, plain, repository, run};

/// The options of the native machine here, and whether they nest.
fn native() -> (&'static [&'static str], bool) {
    if plain(binary().args(["doctor", "--json"])).stdout.contains("\"kvm_can_run_linux\":true") {
        (&["--machine", "kvm"], false)
    } else {
        (&["--machine", "kvm", "--nested"], true)
    }
}

fn on_native(args: &[&str]) -> Finished {
    let (options, nested) = native();
    let finished = run(args.iter().chain(options));
    assert_eq!(finished.results["machine"], "kvm", "{}", finished.stderr);
    assert_eq!(finished.results["accel"], "kvm");
    assert_eq!(finished.results["nested"], nested);
    finished
}

#[test]
fn the_native_machine_runs_the_workloads_clean() {
    let _one = machine();
    let finished = on_native(&["access", "release", "unregister", "--seed", "1", "--iterations", "1"]);
    finished.expect_status(0);
    assert_eq!(finished.counter("probes_missed"), 0);
    for (name, least) in [("contexts", 20), ("releases", 2), ("accesses", 10_000), ("faults", 50)] {
        assert!(finished.counter(name) >= least, "{name}: {}", finished.counter(name));
    }
    if finished.results["nested"] == true {
        let reason = finished.results["accel_reason"].as_str().unwrap_or_default();
        assert!(reason.contains("emulates"), "{reason}");
    }
}

#[test]
fn a_broken_driver_is_caught_on_the_native_machine() {
    let _one = machine();
    let patch = repository().join("guest/mutants/release-skip-teardown.patch");
    let patch = patch.to_str().expect("a UTF-8 path");
    let finished = on_native(&["release", "--patch", patch, "--seed", "7", "--iterations", "1"]);
    finished.expect_status(1).expect_said("release/late");
    let violation = finished.violations().iter().find(|v| v["rule"] == "release/late").expect("it");
    let replay = violation["replay"].as_str().expect("a replay command");
    assert!(replay.contains(&native().0.join(" ")), "{replay}");
    assert!(replay.contains(patch), "{replay}");
}

/// The device is pulled out under load and put back in, with MSI-X; the driver copes, and nobody is accused.
#[test]
fn the_device_is_pulled_out_and_put_back_in() {
    let _one = machine();
    let finished = on_native(&["unplug", "--seed", "1", "--iterations", "1"]);
    finished.expect_status(0);
    let workload = &finished.results["workloads"][0];
    assert_eq!((&workload["outcome"], &workload["cases"]), (&"pass".into(), &5.into()), "{workload}");
    assert_eq!(finished.counter("probes_missed"), 0);
    // Each of the five cases began with contexts on the device, and found it working afterwards.
    assert!(finished.counter("contexts") >= 2 * 5 + 6 + 6, "{}", finished.counter("contexts"));
    assert!(finished.counter("contexts_lost") > 0, "the device went with nothing on it");
}

#[test]
fn what_cannot_be_pulled_out_is_refused() {
    let finished = plain(binary().args(["run", "unplug"]));
    finished.expect_status(2).expect_said("--machine kvm");
}

#[test]
fn kill_9_of_a_nested_run_leaves_nothing() {
    killed_leaves_nothing(&["--machine", "kvm", "--nested"], Duration::from_secs(5));
}

/// An interrupted nested run ends in order: what was seen until then is told, marked as the nested run's, and both consoles are kept.
#[test]
fn an_interrupted_nested_run_ends_in_order() {
    let _one = machine();
    let out = tempfile::tempdir().expect("a temporary folder");
    let mut command: Command = binary();
    let mut child = command
        .args(["run", "stress", "--duration", "10m", "--machine", "kvm", "--nested"])
        .args(["--seed", "1", "--format", "jsonl", "--out"])
        .arg(out.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the binary starts");
    let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    let booted = lines.by_ref().map_while(Result::ok).any(|line| {
        let value: Value = serde_json::from_str(&line).expect("JSON lines");
        value["nested"] == true && value["message"]["type"] == "booted"
    });
    let begin = Instant::now();
    let pid = i32::try_from(child.id()).expect("a process number");
    kill(Pid::from_raw(pid), Signal::SIGINT).expect("signalled");
    // Nobody may wait for us to read.
    let rest = std::thread::spawn(move || lines.map_while(Result::ok).last());
    let status = child.wait().expect("reaped");
    assert!(booted, "it ended before its guest ran");
    assert_eq!(status.code(), Some(3));
    assert!(begin.elapsed() < Duration::from_secs(40), "{:?}", begin.elapsed());
    let last = rest.join().expect("read").expect("a last line");
    assert!(last.contains("interrupted"), "{last}");
    for name in ["console.log", "console-outer.log"] {
        let mut text = String::new();
        std::fs::File::open(out.path().join(name))
            .and_then(|mut file| file.read_to_string(&mut text))
            .expect(name);
        assert!(!text.is_empty(), "{name} is empty");
    }
}

/// QEMU in the outer guest, with its KVM: minutes, so only on demand.
#[test]
#[ignore = "takes minutes: QEMU's own firmware and devices under an emulated processor"]
fn qemu_with_kvm_in_the_outer_guest() {
    let _one = machine();
    let finished = run([
        "access",
        "--machine",
        "qemu",
        "--accel",
        "kvm",
        "--nested",
        "--cpus",
        "1",
        "--seed",
        "1",
        "--iterations",
        "1",
    ]);
    finished.expect_status(0);
    assert_eq!(finished.results["machine"], "qemu");
    assert_eq!((&finished.results["accel"], &finished.results["nested"]), (&"kvm".into(), &true.into()));
}
