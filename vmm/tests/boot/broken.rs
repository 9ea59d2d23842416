// SPDX-License-Identifier: MIT OR Apache-2.0
//! Deliberately broken drivers are caught, each by the right rule; for two of them the replay command finds it again.

use crate::support::{machine, mutant, plain, repository, run};

#[track_caller]
fn caught(patch: &str, workloads: &[&str], rule: &str, has_address: bool) {
    let _one = machine();
    let patch = repository().join("guest/mutants").join(patch);
    let mut args: Vec<&str> = workloads.to_vec();
    let patch = patch.to_str().expect("a UTF-8 path");
    args.extend(["--patch", patch, "--seed", "7", "--iterations", "2"]);
    let finished = run(&args);
    finished.expect_status(1).expect_said(rule);
    assert_eq!(finished.results["verdict"], "violation");
    let violation = finished
        .violations()
        .iter()
        .find(|v| v["rule"] == rule)
        .unwrap_or_else(|| panic!("no {rule} in {:?}", finished.violations()));
    assert!(violation["context"].is_u64(), "{violation}");
    // The second driver's stale command is for all addresses, from 0 on.
    let address = violation["address"].as_u64().unwrap_or_else(|| panic!("no address: {violation}"));
    assert_eq!(address != 0, has_address, "{violation}");
    assert!(!violation["summary"].as_str().unwrap_or_default().is_empty());

    let replay = violation["replay"].as_str().expect("a replay command");
    let arguments = replay.split_once(' ').expect("arguments").1;
    let mut command = std::process::Command::new("sh");
    command
        .arg("-c")
        .arg(format!("exec \"$0\" {arguments}"))
        .arg(env!("CARGO_BIN_EXE_hmm-testbench"))
        .stdin(std::process::Stdio::null());
    plain(&mut command).expect_status(1).expect_said(rule);
}

#[test]
fn a_driver_that_skips_teardown_on_release_is_caught() {
    caught("release-skip-teardown.patch", &["release"], "release/late", true);
}

#[test]
fn a_driver_that_touches_its_context_after_unregister_is_caught() {
    caught("touch-after-unregister.patch", &["unregister"], "unregister/touch", false);
}

/// One round of one workload is enough, the rule is the right one and no other, and it is known where.
#[track_caller]
fn caught_once(name: &str, workload: &str, rule: &str, has_address: bool) {
    caught_with(name, workload, rule, &[], has_address);
}

/// The same, where the fault goes on to break other rules.
#[track_caller]
fn caught_with(name: &str, workload: &str, rule: &str, also: &[&str], has_address: bool) {
    let _one = machine();
    let finished = run([workload, "--patch", &mutant(name), "--seed", "7", "--iterations", "1"]);
    finished.expect_status(1).expect_said(rule).expect_said("verdict: violation");
    for violation in finished.violations() {
        let named = violation["rule"].as_str().unwrap_or_default();
        assert!(named == rule || also.contains(&named), "{violation}");
    }
    let violation = finished.violation(rule);
    assert!(violation["context"].is_u64(), "{violation}");
    assert!(!has_address || violation["address"].as_u64().is_some_and(|address| address != 0), "{violation}");
    assert!(violation["events"].as_array().is_some_and(|events| !events.is_empty()), "{violation}");
}

#[test]
fn a_driver_that_serves_faults_after_release_is_caught() {
    caught_once("serve-after-release", "release", "fault/after-release", true);
}

#[test]
fn a_driver_that_forgets_a_page_is_caught() {
    let also = ["mirror/wrong-page", "data/mismatch", "kernel/warn"];
    caught_with("skip-a-page", "access", "invalidate/stale-pte", &also, true);
}

#[test]
fn a_driver_that_releases_twice_is_caught() {
    caught_once("release-twice", "release", "release/twice", false);
}

#[test]
fn a_driver_that_leaks_a_table_is_caught() {
    caught_once("leak-a-table", "unregister", "unregister/leak", false);
}

#[test]
fn a_driver_that_uses_a_table_it_has_returned_is_caught() {
    caught_once("table-after-return", "unregister", "context/unknown-handle", false);
}
