// SPDX-License-Identifier: MIT OR Apache-2.0
//! A cancelled fault in a stable range is found, and what is like it is not.

use vgpu_spec::fault::{ACCESS_ATOMIC, ACCESS_WRITE};
use vgpu_spec::handle::{Handle, Kind};
use vgpu_spec::witness::{self, Record};

use super::DeviceEvent as E;
use super::oracle_test::{Bench, VA, bench, ctx};

const START: u64 = VA & !0xfff;
const LAST: u64 = START + 0x3fff;

fn fault(index: u32) -> Handle {
    Handle::new(Kind::Fault, index, 1)
}

impl Bench {
    fn promise(&self, mm: u64, begin: bool, kept: bool) {
        let kind = if begin { witness::STABLE_BEGIN } else { witness::STABLE_END };
        self.oracle.witness(&Record { kind, mm, arg: [START, LAST, kept.into(), 0], ..Record::default() });
    }
    fn fault_raised(&self, index: u32, ctx: Handle, va: u64, access: u32) {
        self.oracle.event(E::FaultRaised { fault: fault(index), ctx, va, access, again: 0 });
    }
    fn cancel(&self, index: u32, ctx: Handle, va: u64) {
        self.oracle.event(E::FaultCancelled { fault: fault(index), ctx, va });
    }
    fn found(&self) -> Vec<(&'static str, Option<u64>, Option<u64>)> {
        self.oracle.violations().iter().map(|v| (v.rule.name(), v.context, v.address)).collect()
    }
}

#[test]
fn a_cancelled_fault_is_found_when_the_promise_was_kept() {
    let b = bench();
    let c = ctx(1, 1);
    b.mirror(1, c);
    b.promise(1, true, false);
    b.fault_raised(1, c, VA, ACCESS_WRITE);
    b.cancel(1, c, VA);
    // Not before: the process may be dying.
    assert_eq!(b.found(), []);
    b.promise(1, false, true);
    assert_eq!(b.found(), [("fault/spurious-fatal", Some(c.0), Some(VA))]);
    assert_eq!(b.oracle.counters().bad_records, 0);
}

#[test]
fn what_is_like_it_is_spared() {
    type Play = fn(&Bench, Handle);
    let plays: [(&str, Play); 8] = [
        ("served", |b, c| {
            b.promise(1, true, false);
            b.fault_raised(1, c, VA, 0);
            b.oracle.event(E::FaultReplayed { fault: fault(1), ctx: c, va: VA });
            b.promise(1, false, true);
        }),
        ("raised before", |b, c| {
            b.fault_raised(1, c, VA, 0);
            b.promise(1, true, false);
            b.cancel(1, c, VA);
            b.promise(1, false, true);
        }),
        ("cancelled after", |b, c| {
            b.promise(1, true, false);
            b.fault_raised(1, c, VA, 0);
            b.promise(1, false, true);
            b.cancel(1, c, VA);
        }),
        ("taken back", |b, c| {
            b.promise(1, true, false);
            b.fault_raised(1, c, VA, 0);
            b.cancel(1, c, VA);
            b.promise(1, false, false);
        }),
        ("beside it", |b, c| {
            b.promise(1, true, false);
            for (index, va) in [(1, START - 1), (2, LAST + 1)] {
                b.fault_raised(index, c, va, 0);
                b.cancel(index, c, va);
            }
            b.promise(1, false, true);
        }),
        ("an atomic", |b, c| {
            b.promise(1, true, false);
            b.fault_raised(1, c, VA, ACCESS_ATOMIC);
            b.cancel(1, c, VA);
            b.promise(1, false, true);
        }),
        ("dropped with its context", |b, c| {
            b.promise(1, true, false);
            b.fault_raised(1, c, VA, 0);
            b.oracle.event(E::FaultDropped { fault: fault(1), ctx: c, va: VA });
            b.stop(c);
            b.unbind(c);
            b.promise(1, false, true);
        }),
        ("the process dies", |b, c| {
            b.promise(1, true, false);
            b.fault_raised(1, c, VA, 0);
            b.cancel(1, c, VA);
            b.stop(c);
            b.exit(1);
        }),
    ];
    for (name, play) in plays {
        let b = bench();
        let c = ctx(1, 1);
        b.mirror(1, c);
        play(&b, c);
        assert_eq!(b.found(), [], "{name}");
    }
}

#[test]
fn another_address_space_is_not_meant_and_promises_nest() {
    let b = bench();
    let (mine, other) = (ctx(1, 1), ctx(2, 1));
    b.mirror(1, mine);
    b.mirror(2, other);
    b.promise(1, true, false);
    b.fault_raised(1, other, VA, 0);
    b.cancel(1, other, VA);
    b.promise(1, true, false);
    b.promise(1, false, true);
    assert_eq!(b.found(), []);
    // The outer one still holds.
    b.fault_raised(2, mine, VA, 0);
    b.cancel(2, mine, VA);
    b.promise(1, false, true);
    assert_eq!(b.found(), [("fault/spurious-fatal", Some(mine.0), Some(VA))]);
}

#[test]
fn a_promise_that_makes_no_sense_is_a_bad_record() {
    let b = bench();
    b.mirror(1, ctx(1, 1));
    b.promise(2, true, false);
    let wrong = Record { kind: witness::STABLE_BEGIN, mm: 1, arg: [LAST, START, 0, 0], ..Record::default() };
    b.oracle.witness(&wrong);
    assert_eq!(b.oracle.counters().bad_records, 2);
    // An end without a beginning is not: too many may have been given.
    b.promise(1, false, true);
    assert_eq!(b.oracle.counters().bad_records, 2);
}
