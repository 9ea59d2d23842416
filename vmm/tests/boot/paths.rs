// SPDX-License-Identifier: MIT OR Apache-2.0
//! Paths of the reference driver that no default run takes for certain.

use crate::support::{machine, repository, run};

#[test]
fn a_fault_buffer_that_overflows_loses_no_fault() {
    let _one = machine();
    let patch = repository().join("guest/benign/small-fault-buffer.patch");
    let patch = patch.to_str().expect("a UTF-8 path");
    let finished = run(["access", "--patch", patch, "--seed", "8", "--iterations", "1"]);
    finished.expect_status(0);
    assert!(finished.counter("fault_overflows") >= 10, "{}", finished.counter("fault_overflows"));
}

/// Two that were accused, or could not be tried at all: a context that is quiet when its process exits, and a notifier that comes with
/// the first fault.
#[test]
fn drivers_of_another_style_run_clean() {
    let _one = machine();
    for (patch, seed) in [("quiet-close", "7"), ("lazy-notifier", "11")] {
        let patch = repository().join(format!("guest/benign/{patch}.patch"));
        let patch = patch.to_str().expect("a UTF-8 path");
        let finished = run(["unregister", "release", "--patch", patch, "--seed", seed, "--iterations", "1"]);
        finished.expect_status(0);
    }
}

#[test]
fn a_device_that_is_taken_away_or_reset_under_open_files_does_no_harm() {
    let _one = machine();
    let finished = run(["removal", "--seed", "9", "--iterations", "2"]);
    finished.expect_status(0);
    let removal = &finished.results["workloads"][0];
    assert_eq!((removal["cases"].as_u64(), removal["skipped"].as_u64()), (Some(17), Some(0)), "{removal}");
}

/// Huge pages, memory taken from a dying process by invalidations that must not sleep, a process killed for its memory: the
/// default kernel has what each needs, so none may be skipped.
#[test]
fn nothing_is_skipped_on_the_default_kernel() {
    let _one = machine();
    let finished = run(["access", "release", "--seed", "10", "--iterations", "1"]);
    finished.expect_status(0);
    for workload in finished.results["workloads"].as_array().expect("a list") {
        assert_eq!(workload["skipped"], 0, "{workload}");
    }
}
