// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every workload on the model device: a correct device passes every case, and one that corrupts data does not.

use std::path::Path;
use std::sync::Mutex;

use guest_protocol::{CASTS, Case, Extent, Message, Outcome, Play, ScenarioPlan, WORKLOADS, WorkloadPlan};

use super::{Ground, run};
use crate::board::Board;
use crate::device::model::Model;
use crate::gates::Gates;
use crate::process::Child;
use crate::report::Sink;

#[derive(Default)]
struct Collected(Mutex<Vec<Message>>);

impl Sink for Collected {
    fn send(&self, message: &Message) {
        self.0.lock().unwrap().push(message.clone());
    }
}

/// The scenario that a cast's name stands for.
fn scenario_of(name: &str) -> Option<ScenarioPlan> {
    let known = CASTS.iter().any(|cast| cast.name == name);
    known.then(|| ScenarioPlan { play: Play::Cast(name.to_owned()), ..ScenarioPlan::default() })
}

/// Runs one round of a workload in this process.
fn round_of(name: &str, seed: u64, corrupt: bool) -> Vec<Case> {
    let (sink, board) = (Collected::default(), Board::new().unwrap());
    let device = Model { corrupt };
    let program = Path::new("/bin/true");
    let ground = Ground {
        device: &device,
        sink: &sink,
        board: &board,
        program,
        gates: Gates::new(None),
        coherent_atomics: true,
    };
    let plan = WorkloadPlan {
        name: name.to_owned(),
        seed,
        extent: Extent::Iterations(1),
        coherent_atomics: true,
        scenario: scenario_of(name),
    };
    assert!(run(&plan, &ground));
    let cases: Vec<Case> = sink
        .0
        .into_inner()
        .unwrap()
        .into_iter()
        .filter_map(|message| match message {
            Message::Case(case) => Some(case),
            _ => None,
        })
        .collect();
    assert_eq!(board.cases(), cases.len() as u64);
    cases
}

/// As a child of its own, like in the guest: the workloads fork, and orphans must come to them.
fn passes(name: &'static str) {
    let mut child = Child::spawn(|_| {
        nix::sys::prctl::set_child_subreaper(true).unwrap();
        for case in round_of(name, 1, false) {
            // Not every host hands out huge pages, or has the driver's device in its sysfs; none holds tasks. The model migrates nothing
            // and has any number of contexts.
            let may_skip = case.case.contains("thp/")
                || case.case.starts_with("hugetlb/")
                || matches!(&*case.workload, "removal" | "migrate" | "races" | "unplug")
                || case.case.starts_with("kill/")
                || matches!(&*case.case, "unbind/migrating" | "no-context-left" | "held")
                || guest_protocol::of_group(guest_protocol::BOUNDARY).any(|name| name == case.workload);
            assert!(case.outcome == Outcome::Pass || may_skip && case.outcome == Outcome::Skip, "{case:?}");
        }
        Ok(())
    })
    .unwrap();
    let ended = child.wait_long().unwrap();
    child.judge(ended).unwrap();
}

#[test]
fn access_passes() {
    passes("access");
}

#[test]
fn release_passes() {
    passes("release");
}

#[test]
fn unregister_passes() {
    passes("unregister");
}

#[test]
fn invalidate_passes() {
    passes("invalidate");
}

#[test]
fn races_are_skipped_where_nobody_can_be_held() {
    passes("races");
}

#[test]
fn stress_passes() {
    passes("stress");
}

/// Nearly all of them concern the whole system, and are for guests only. What is left must pass.
#[test]
fn the_boundary_is_shaken_in_guests_only() {
    for name in guest_protocol::of_group(guest_protocol::BOUNDARY) {
        passes(name);
    }
}

#[test]
fn migrate_is_skipped_where_nothing_can_be_migrated() {
    passes("migrate");
}

#[test]
fn removal_is_skipped_where_there_is_nothing_to_remove() {
    passes("removal");
}

#[test]
fn casts_pass_without_gates() {
    passes("fault-and-drop");
    passes("drop-and-fault");
}

#[test]
fn every_cast_of_the_protocol_is_here_and_no_other() {
    let known: Vec<_> = crate::cast::names().collect();
    let named: Vec<_> = CASTS.iter().map(|cast| cast.name).collect();
    assert_eq!(known, named);
}

#[test]
fn unplug_is_skipped_where_there_is_nothing_to_pull_out() {
    passes("unplug");
}

#[test]
fn wrong_data_is_found_and_told() {
    for name in ["access", "invalidate", "stress"] {
        let cases = round_of(name, 2, true);
        assert!(cases.iter().any(|case| case.mismatch.is_some_and(|m| m.expected != m.found)), "{name}");
    }
}

#[test]
fn names_are_those_of_the_protocol_and_cases_are_unique() {
    let known: Vec<_> = super::ALL.iter().chain(super::boundary::ALL).map(|workload| workload.name).collect();
    let named: Vec<_> = WORKLOADS.iter().map(|workload| workload.name).collect();
    assert_eq!(known, named);
    let mut names: Vec<_> = round_of("access", 3, false).into_iter().map(|case| case.case).collect();
    let count = names.len();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), count);
}
