// SPDX-License-Identifier: MIT OR Apache-2.0
//! Scenarios: a race is there in every repetition, and the driver that loses it is caught in each.

use crate::support::{machine, mutant, run, run_in};

const PAIR: [&str; 2] = ["fault-under-invalidate", "invalidate-under-fault"];

#[test]
fn the_reference_driver_keeps_up_in_every_repetition() {
    let _one = machine();
    for scenario in PAIR {
        let finished = run([scenario, "--seed", "7"]);
        finished.expect_status(0);
        let result = &finished.results["scenario"];
        assert_eq!(result["repetitions"], 10, "{result}");
        assert_eq!(finished.violations().len(), 0);
    }
}

/// A fault handler that is held when it has found a page, and the page goes: what the handler then does is the driver's doing
/// alone, so a driver that does not ask whether it may still map it does it in all ten.
#[test]
fn a_driver_that_ignores_the_sequence_is_caught_ten_times_of_ten() {
    let _one = machine();
    let out = tempfile::tempdir().expect("a temporary folder");
    let diagram = out.path().join("diagram.md");
    let finished = run_in(
        out.path(),
        [
            "fault-under-invalidate",
            "--patch",
            &mutant("retry-ignored"),
            "--seed",
            "7",
            "--keep-going",
            "--diagram",
            diagram.to_str().expect("a UTF-8 path"),
        ],
    );
    finished.expect_status(1);
    let mut contexts: Vec<u64> = finished.violations().iter().filter_map(|v| v["context"].as_u64()).collect();
    contexts.sort_unstable();
    contexts.dedup();
    // A host that is too busy for a gate's patience loses a repetition now and then; all ten are seen on one that is not.
    assert!(contexts.len() >= 8, "{:?}", finished.violations());
    // The interleaving is drawn: the handler goes on after the page has gone.
    let text = std::fs::read_to_string(&diagram).expect("a diagram");
    let at = |what: &str| text.find(what).unwrap_or_else(|| panic!("no {what:?} in\n{text}"));
    assert!(at("waits at found") < at("open drop@D"));
    assert!(at("waits at dropped") < at("open found@fault"));
}

/// The same without a scenario, in the default suite's own workload.
#[test]
fn the_default_suite_holds_it_at_that_moment_too() {
    let _one = machine();
    let finished = run(["races", "--patch", &mutant("retry-ignored"), "--seed", "7", "--iterations", "1"]);
    finished.expect_status(1);
}

/// An order that chance found is found again from the list that the replay command has.
#[test]
fn an_order_is_had_again() {
    let _one = machine();
    let finished = run([
        "fault-under-invalidate",
        "--patch",
        &mutant("retry-ignored"),
        "--seed",
        "7",
        "--iterations",
        "30",
        "--gate-order",
        "1",
    ]);
    finished.expect_status(1);
    let order = finished.results["scenario"]["order"].as_str().expect("an order").to_owned();
    let replay = finished.violations()[0]["replay"].as_str().expect("a replay command").to_owned();
    assert!(replay.contains(&format!("--gate-order {order}")), "{replay}");
    let again = run([
        "fault-under-invalidate",
        "--patch",
        &mutant("retry-ignored"),
        "--seed",
        "7",
        "--iterations",
        "1",
        "--gate-order",
        &order,
    ]);
    again.expect_status(1);
    assert_eq!(again.results["scenario"]["order"], order.as_str());
}

#[test]
fn a_gate_that_does_not_exist_is_no_clean_run() {
    let _one = machine();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("mine.toml");
    let text = "name = \"mine\"\nabout = \"\"\ncast = \"fault-and-drop\"\nrepetitions = 1\n\
        [[gate]]\nname = \"a\"\nat = \"entry:no_such_function\"\n[[step]]\nopen = \"a\"\n";
    std::fs::write(&file, text).expect("written");
    let file = file.to_str().expect("a UTF-8 path");
    run(["--scenario", file]).expect_status(3).expect_said("no such function");
}

#[test]
fn a_step_that_is_not_come_by_is_no_clean_run() {
    let _one = machine();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("mine.toml");
    let text = "name = \"mine\"\nabout = \"\"\ncast = \"fault-and-drop\"\nrepetitions = 1\nlimit = 5\n\
        [[gate]]\nname = \"a\"\nat = \"user:drop\"\n[[step]]\nwait = \"reached a@nobody\"\n[[step]]\nopen = \"a\"\n";
    std::fs::write(&file, text).expect("written");
    let file = file.to_str().expect("a UTF-8 path");
    run(["--scenario", file]).expect_status(3).expect_said("was not come by");
}

/// The oldest kernel has other probes on the same functions, and other ways to hook them.
#[test]
fn the_oldest_kernel_holds_tasks_as_well() {
    let _one = machine();
    let finished = run(["races", "--kernel", "bookworm", "--seed", "7", "--iterations", "1"]);
    finished.expect_status(0);
    let races = &finished.results["workloads"][0];
    // That kernel has no device-private memory, so nobody finds a page there, nor asks for one to be taken there.
    assert_eq!((&races["cases"], &races["skipped"]), (&47.into(), &9.into()), "{races}");
}
