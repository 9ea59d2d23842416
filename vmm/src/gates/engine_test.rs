// SPDX-License-Identifier: MIT OR Apache-2.0
//! The engine, played by a guest that is made up.

use std::sync::Arc;

use proptest::prelude::*;
use vgpu::gates::{Conductor, Doors};
use vgpu_spec::gate::{ARMED, BLOCKED, DISARMED, LEFT, NO_SLOT, PASSED, REACHED, ROLE, SLOTS};
use vgpu_spec::witness::{HEARTBEAT, MM_RELEASED, Record};

use super::engine::Engine;
use super::order::Order;
use super::script::Scenario;

struct Guest {
    engine: Arc<Engine>,
    doors: Doors,
}

fn words(role: &str) -> [u64; 2] {
    let mut bytes = [0; 16];
    bytes[..role.len()].copy_from_slice(role.as_bytes());
    let word = |part: &[u8]| part.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
    [word(&bytes[..8]), word(&bytes[8..])]
}

impl Guest {
    fn new(scenario: &Scenario, order: Option<Order>) -> Self {
        let engine = Engine::new(&scenario.name, scenario.compile(&[]).unwrap(), order);
        let doors = Doors::default();
        let guest = Self { engine, doors };
        guest.say(ARMED, 0, "", u64::MAX);
        guest
    }
    fn say(&self, kind: u32, what: u64, role: &str, value: u64) {
        let [first, second] = if kind == ARMED { [value, 0] } else { words(role) };
        let record = Record { kind, arg: [what, first, second, value], ..Record::default() };
        self.engine.record(&record, &self.doors);
    }
    /// Comes to a gate; as in the witness its door is closed before.
    fn come(&self, gate: u64, slot: usize, role: &str) {
        self.doors.close(slot);
        self.say(REACHED, gate | (slot as u64) << 16, role, 0);
    }
    fn may_go(&self, slot: usize) -> bool {
        self.doors.is_open(slot)
    }
    fn go(&self, gate: u64, slot: usize, role: &str) {
        assert!(self.may_go(slot));
        self.say(PASSED, gate | (slot as u64) << 16, role, 0);
    }
    fn beat(&self) {
        self.say(HEARTBEAT, 0, "", 0);
    }
    fn look(&self, slots: &[usize], times: u32) {
        for _ in 0..times {
            for slot in slots.iter().filter(|slot| !self.doors.is_open(**slot)) {
                self.engine.looked(*slot, &self.doors);
            }
        }
    }
}

fn two_gates() -> Scenario {
    Scenario::new("two", "fault-and-drop")
        .gate("a", "user:a")
        .gate("b", "user:b")
        .wait("reached a@A")
        .open("b@B")
        .wait("passed b@B")
        .open("a")
}

#[test]
fn a_script_is_followed_in_its_order_and_clean() {
    let guest = Guest::new(&two_gates(), None);
    guest.come(1, 0, "B");
    assert!(!guest.may_go(0), "B waits until A has come");
    guest.come(0, 1, "A");
    assert!(guest.may_go(0) && !guest.may_go(1));
    guest.go(1, 0, "B");
    assert!(guest.may_go(1));
    guest.go(0, 1, "A");
    // Nothing is decided on any more.
    let moves = guest.engine.moves();
    assert_eq!(moves, 3, "it began, and both went on");
    guest.come(1, 0, "B");
    assert!(guest.may_go(0));
    guest.go(1, 0, "B");
    assert_eq!(guest.engine.moves(), moves, "whoever comes by again may do so without end");
    guest.say(DISARMED, 0, "", 0);
    assert_eq!(guest.engine.doubts(), Vec::<String>::new());
    let result = guest.engine.result();
    assert_eq!((result.repetitions, result.violated_in, result.order), (1, None, None));
    let story: Vec<String> = result.story.iter().map(|line| format!("{}: {}", line.who, line.what)).collect();
    assert_eq!(
        story[..6],
        [
            "B: waits at b",
            "A: waits at a",
            "scenario: open b@B",
            "B: goes on from b",
            "scenario: open a",
            "A: goes on from a"
        ]
    );
}

#[test]
fn those_whom_no_step_is_about_are_not_held() {
    let guest = Guest::new(&two_gates(), None);
    guest.come(1, 0, "someone");
    assert!(guest.may_go(0), "b is only about B");
    guest.come(0, 1, "someone");
    assert!(!guest.may_go(1), "a is about everybody");
}

#[test]
fn only_those_who_are_named_are_held_in_any_order() {
    let mut scenario = two_gates();
    scenario.gates[0].only = Some(super::script::Words::One("A".into()));
    for order in [None, Some(Order::Seed(1))] {
        let guest = Guest::new(&scenario, order);
        guest.come(0, 0, "");
        guest.come(0, 1, "B");
        assert!(guest.may_go(0) && guest.may_go(1));
        guest.come(0, 2, "A");
        assert!(!guest.may_go(2));
    }
}

#[test]
fn what_a_workload_holds_itself_is_no_repetition() {
    let scenario = two_gates();
    let engine = Engine::new("two", scenario.compile(&[]).unwrap(), None);
    let guest = Guest { engine, doors: Doors::default() };
    let armed = Record { kind: ARMED, arg: [0, 1, 1, 0], ..Record::default() };
    guest.engine.record(&armed, &guest.doors);
    guest.come(1, 0, "B");
    assert!(guest.may_go(0));
    guest.say(DISARMED, 0, "", 0);
    assert_eq!(guest.engine.doubts(), ["two did not begin"]);
    assert_eq!(guest.engine.result().repetitions, 0);
}

#[test]
fn what_does_not_come_by_is_said() {
    let guest = Guest::new(&two_gates(), None);
    guest.come(0, 1, "A");
    guest.say(DISARMED, 0, "", 0);
    let doubts = guest.engine.doubts();
    assert_eq!(doubts, ["two, repetition 0: step 3 (`wait passed b@B`) was not come by"]);
    // A repetition that does not end.
    guest.say(ARMED, 1, "", u64::MAX);
    assert!(guest.engine.doubts()[1].contains("repetition 1 of two did not end; it was at step 1"));
    let never = Engine::new("never", two_gates().compile(&[]).unwrap(), None);
    assert_eq!(never.doubts(), ["never did not begin"]);
}

#[test]
fn a_gate_that_lets_go_by_itself_is_a_doubt() {
    for (why, said) in [(1, "as long as a gate may be"), (2, "spins"), (3, "no CPU")] {
        let guest = Guest::new(&two_gates(), None);
        guest.come(1, 0, "B");
        guest.say(PASSED, 1 | why << 32, "B", 0);
        assert!(guest.engine.doubts()[0].contains(said), "{:?}", guest.engine.doubts());
    }
    // Not where nobody was to be held.
    let guest = Guest::new(&two_gates(), None);
    guest.come(1, 0, "x");
    guest.say(PASSED, 1 | 2 << 32, "x", 0);
    assert!(!guest.engine.doubts().iter().any(|doubt| doubt.contains("spins")));
}

#[test]
fn admit_lets_one_through_and_pause_counts_heartbeats() {
    let scenario = Scenario::new("x", "fault-and-drop")
        .gate("a", "user:a")
        .pause(2)
        .admit("a")
        .wait("passed a")
        .admit("a@B");
    let guest = Guest::new(&scenario, None);
    guest.come(0, 0, "A");
    guest.come(0, 1, "B");
    guest.come(0, 2, "B");
    guest.beat();
    assert!(!guest.may_go(0));
    guest.beat();
    assert_eq!([0, 1, 2].map(|slot| guest.may_go(slot)), [true, false, false]);
    guest.go(0, 0, "A");
    // The last step is done: all go on.
    assert_eq!([1, 2].map(|slot| guest.may_go(slot)), [true, true]);
}

#[test]
fn blocked_gone_and_expect() {
    let scenario = Scenario::new("x", "fault-and-drop")
        .gate("a", "user:a")
        .wait("blocked B in down_write")
        .expect("not passed a")
        .expect("passed a")
        .wait("gone B")
        .open("a");
    let guest = Guest::new(&scenario, None);
    guest.say(ROLE, 0, "B", 77);
    guest.say(BLOCKED, 1, "A", 78);
    guest.come(0, 0, "A");
    assert!(guest.engine.doubts()[0].contains("at step 1"));
    guest.say(BLOCKED, 1, "B", 77);
    assert!(guest.engine.doubts()[0].contains("step 3 (`expect passed a`) does not hold"));
    assert_eq!(guest.engine.roles(), [(77, "B".to_owned())]);
    guest.say(LEFT, 1, "B", 77);
    assert!(!guest.may_go(0));
    guest.say(ROLE, 1, "B", 77);
    assert!(guest.may_go(0));
}

#[test]
fn steps_about_what_is_not_there_count_as_done() {
    let mut scenario = two_gates();
    scenario.gates[1].optional = true;
    let guest = Guest::new(&scenario, None);
    guest.say(ARMED, 0, "", 0b01);
    guest.come(0, 1, "A");
    assert!(guest.may_go(1));
    guest.say(DISARMED, 0, "", 0);
    assert!(guest.engine.doubts().is_empty(), "{:?}", guest.engine.doubts());
}

#[test]
fn who_only_comes_by_is_waited_for_once() {
    let mut scenario = Scenario::new("x", "fault-and-drop").gate("r", "entry:f").gate("a", "user:a");
    scenario.gates[0].record = true;
    let scenario = scenario.wait("reached r").wait("reached r").open("a");
    let guest = Guest::new(&scenario, None);
    guest.come(1, 0, "A");
    guest.say(REACHED, NO_SLOT << 16, "", 0);
    assert!(!guest.may_go(0));
    guest.say(REACHED, NO_SLOT << 16, "", 0);
    assert!(guest.may_go(0));
}

/// Three threads, each through gate a and then b, in whatever order the engine lets them; the order that came of it.
fn explore(order: Order) -> (String, Vec<String>) {
    let guest = Guest::new(&two_gates(), Some(order));
    let roles = ["A", "B", "C"];
    let mut at = [0_u64; 3];
    (0..3).for_each(|slot| guest.come(0, slot, roles[slot]));
    for _ in 0..10_000 {
        guest.look(&[0, 1, 2], 1);
        for slot in 0..3 {
            if at[slot] < 2 && guest.may_go(slot) {
                guest.go(at[slot], slot, roles[slot]);
                at[slot] += 1;
                if at[slot] < 2 {
                    guest.come(at[slot], slot, roles[slot]);
                }
            }
        }
        if at == [2; 3] {
            break;
        }
    }
    assert_eq!(at, [2; 3], "all come to their end");
    guest.say(DISARMED, 0, "", 0);
    (guest.engine.order().unwrap_or_default(), guest.engine.doubts())
}

#[test]
fn orders_differ_by_seed_and_are_had_again() {
    let orders: Vec<String> = (0..20).map(|seed| explore(Order::Seed(seed)).0).collect();
    assert_eq!(orders[3], explore(Order::Seed(3)).0);
    let mut distinct = orders.clone();
    distinct.sort();
    distinct.dedup();
    assert!(distinct.len() > 10, "{distinct:?}");
    for order in &orders {
        let (again, doubts) = explore(order.parse().unwrap());
        assert_eq!((&again, doubts.len()), (order, 0), "{doubts:?}");
    }
}

#[test]
fn an_order_that_does_not_come_is_given_up_and_said() {
    let (_, doubts) = explore("b@A,a@A".parse().unwrap());
    assert!(
        doubts[0].contains("b@A, number 1 of the order, does not come; there are a@A,a@B,a@C"),
        "{doubts:?}"
    );
    let guest = Guest::new(&two_gates(), Some("a@A,b@A".parse().unwrap()));
    guest.come(0, 0, "A");
    guest.look(&[0], 100);
    guest.go(0, 0, "A");
    guest.say(DISARMED, 0, "", 0);
    assert!(guest.engine.doubts()[0].contains("b@A, number 2 of the order, did not come"));
}

#[test]
fn the_repetition_in_which_something_was_found_is_kept() {
    let guest = Guest::new(&two_gates(), Some(Order::Seed(1)));
    guest.come(0, 0, "A");
    guest.look(&[0], 100);
    guest.go(0, 0, "A");
    let record = Record { kind: MM_RELEASED, mm: 3, ..Record::default() };
    guest.engine.record(&record, &guest.doors);
    guest.say(DISARMED, 0, "", 0);
    guest.engine.found("release/late");
    guest.say(ARMED, 1, "", u64::MAX);
    guest.engine.found("release/late");
    let result = guest.engine.result();
    assert_eq!((result.violated_in, result.order.as_deref()), (Some(0), Some("a@A")));
    let last: Vec<&str> = result.story.iter().map(|line| line.what.as_str()).collect();
    assert_eq!(last[last.len() - 2..], ["release has returned for address space 3", "release/late"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    /// Whatever a guest says, nobody is held once the scenario is over, and nothing breaks.
    #[test]
    fn any_records(records in proptest::collection::vec((0x3f..0x48_u32, any::<[u8; 4]>(), 0..4_u64), 0..200), seed in any::<Option<u64>>()) {
        let guest = Guest::new(&two_gates(), seed.map(Order::Seed));
        for (kind, [a, b, c, d], role) in records {
            let slot = usize::from(b) % SLOTS;
            let what = u64::from(a % 66) | (slot as u64) << 16 | u64::from(c % 8) << 32;
            if kind == REACHED {
                guest.doors.close(slot);
            }
            guest.say(kind, what, ["", "A", "B", "C"][role as usize], u64::from(d));
            guest.look(&[slot], 60);
        }
        let _ = (guest.engine.doubts(), guest.engine.result(), guest.engine.order());
        guest.say(ARMED, 1000, "", u64::MAX);
        guest.come(0, 5, "A");
        guest.say(DISARMED, 1000, "", 0);
        prop_assert!(guest.may_go(5));
    }
}
