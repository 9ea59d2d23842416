// SPDX-License-Identifier: MIT OR Apache-2.0
//! The seed's scenarios on the mirror backend: who is right about the patch is what runs. All of them: `ci/seed-table`.

use crate::support::{Finished, machine, run};

fn on(policy: &str, scenario: &str) -> Finished {
    run([scenario, "--backend", "mirror", "--mirror-policy", policy, "--seed", "3", "--iterations", "2"])
}

/// Before the patch, release calls a mirror that unregister has given up meanwhile.
#[test]
fn the_race_of_the_patch_is_caught_before_it_and_not_after() {
    let _one = machine();
    let before = on("drop-lock", "release-unregister-race");
    before.expect_status(1);
    let violation = before.violation("unregister/touch");
    let summary = violation["summary"].as_str().unwrap_or_default();
    assert!(summary.contains("which had been unregistered before"), "{violation}");
    assert!(violation["context"].is_u64(), "{violation}");
    on("read-held", "release-unregister-race").expect_status(0);
}

/// With it, a writer between two readers makes three threads wait for each other; the report names all three and both locks.
#[test]
fn the_deadlock_of_the_thread_names_its_three() {
    let _one = machine();
    let finished = on("read-held", "mirrors-sem-deadlock");
    finished.expect_status(1);
    let violation = finished.violation("hang/deadlock");
    let summary = violation["summary"].as_str().unwrap_or_default();
    for wait in ["A waits for C (device_lock:", "C waits for B (mirrors_sem:", "B waits for A (mirrors_sem:"]
    {
        assert!(summary.contains(wait), "no {wait:?} in {violation}");
    }
    on("srcu", "mirrors-sem-deadlock").expect_status(0);
}

/// A mirror that release has taken off the list is told of nothing until release calls it: the reaper frees pages that it has.
#[test]
fn what_release_hides_from_the_reaper_is_caught() {
    let _one = machine();
    let before = on("drop-lock", "reclaim-under-release");
    before.expect_status(1);
    let violation = before.violation("invalidate/stale-pte");
    assert!(violation["context"].is_u64() && violation["address"].is_u64(), "{violation}");
    on("read-held", "reclaim-under-release").expect_status(0);
}
