// SPDX-License-Identifier: MIT OR Apache-2.0
//! Two deliberately broken drivers are caught, by the right rule, and the replay command finds them again.

use crate::support::{machine, plain, repository, run};

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
    if has_address {
        assert!(violation["address"].as_u64().is_some_and(|a| a != 0), "{violation}");
    }
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
