// SPDX-License-Identifier: MIT OR Apache-2.0
//! Drivers that hang, in a real guest: who waits for what is said by the right rule, with the stacks that show it, while the
//! guest itself goes on living.

use std::time::Duration;

use serde_json::Value;

use crate::support::{Finished, machine, mutant, run};

/// Runs one round of `workload` with a broken driver, which must end it with this rule.
#[track_caller]
fn hangs(name: &str, workload: &str, rule: &str) -> (Finished, Value) {
    let patch = mutant(name);
    let finished = run([workload, "--patch", &patch, "--seed", "7", "--iterations", "1"]);
    finished.expect_status(1).expect_said(rule).expect_said("verdict: violation");
    // Booting, building, thirty seconds of guest time without progress at the most, and an end; longer where others work too.
    assert!(finished.took < Duration::from_secs(300), "{:?}", finished.took);
    assert!(finished.counter("heartbeats") >= 100, "the guest did not live on");
    let violation = finished.violation(rule).clone();
    (finished, violation)
}

fn printed(violation: &Value) -> String {
    let lines = violation["events"].as_array().map_or(&[][..], Vec::as_slice);
    lines.iter().filter_map(Value::as_str).collect::<Vec<_>>().join("\n")
}

#[test]
fn a_callback_that_waits_for_its_own_fault_handler_is_a_deadlock() {
    let _one = machine();
    let (finished, violation) = hangs("deadlock-in-invalidate", "invalidate", "hang/deadlock");
    let stacks = printed(&violation);
    for function in ["mutex_lock", "vgpu_mirror_invalidate", "vgpu_mirror_fault"] {
        assert!(stacks.contains(function), "{function} is not in\n{stacks}");
    }
    let summary = violation["summary"].as_str().unwrap_or_default();
    assert!(summary.contains("vgpu_mirror_invalidate [hmm_vgpu]"), "{summary}");
    // The fault that nobody answers meanwhile says where.
    finished.violation("fault/unanswered");
    assert!(violation["context"].is_u64() && violation["address"].is_u64(), "{violation}");
}

#[test]
fn a_completion_that_nobody_looks_for_is_a_lost_interrupt() {
    let _one = machine();
    let (finished, violation) = hangs("lost-interrupt", "access", "hang/lost-interrupt");
    assert_eq!(finished.violations().len(), 1, "{violation}");
    assert!(violation["summary"].as_str().is_some_and(|text| text.contains("in access")), "{violation}");
}

#[test]
fn a_retry_that_never_ends_is_a_livelock() {
    let _one = machine();
    let (_, violation) = hangs("livelock-in-retry", "access", "hang/livelock");
    assert!(printed(&violation).contains("[hmm_vgpu]"), "{violation}");
    assert!(violation["context"].is_u64() && violation["address"].is_u64(), "{violation}");
}

#[test]
fn a_fault_that_nobody_answers_is_no_hang_of_anybody() {
    let _one = machine();
    let (finished, violation) = hangs("fault-not-answered", "access", "fault/unanswered");
    assert_eq!(finished.violations().len(), 1, "{:?}", finished.violations());
    assert!(violation["context"].is_u64() && violation["address"].is_u64(), "{violation}");
}
