// SPDX-License-Identifier: MIT OR Apache-2.0
//! Each rule fires on the broken sequence and keeps silent on the correct ones.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use vgpu_spec::handle::{Handle, Kind};
use vgpu_spec::pte::{HUGE, VALID, WRITE};
use vgpu_spec::witness::{self, Record};

use super::DeviceEvent as E;
use super::*;

/// A device that says what it was told to say.
#[derive(Default)]
pub(super) struct Fake(
    pub(super) Mutex<BTreeMap<u64, ContextView>>,
    pub(super) Mutex<BTreeMap<u64, RangeView>>,
    pub(super) Mutex<Vec<Written>>,
    /// Rings by one address of theirs.
    pub(super) Mutex<Vec<(u64, RingView)>>,
);

impl Inspect for Fake {
    fn context(&self, ctx: Handle) -> Option<ContextView> {
        self.0.lock().get(&ctx.0).copied()
    }
    fn range(&self, ctx: Handle, _: (u64, u64), _: bool, _: usize) -> Option<RangeView> {
        self.1.lock().get(&ctx.0).cloned()
    }
    fn rings(&self, (start, last): (u64, u64)) -> Vec<RingView> {
        let touching = self.3.lock().clone().into_iter().filter(|(at, _)| (start..=last).contains(at));
        touching.map(|(_, ring)| ring).collect()
    }
    fn take_written(&self, _: Handle, _: (u64, u64)) -> Vec<Written> {
        std::mem::take(&mut self.2.lock())
    }
}

pub(super) struct Bench {
    pub(super) oracle: Arc<Oracle>,
    pub(super) fake: Arc<Fake>,
}

pub(super) const VA: u64 = 0x7f00_0000_1000;
pub(super) const PTE: u64 = VALID | WRITE | 0x1234_5000;
pub(super) const NOT_CLEAN: Leak =
    Leak { table_pages: 2, data_pages: 0, queues: 0, faults: 0, page: Handle(0), va: Some(VA) };

pub(super) fn ctx(index: u32, generation: u32) -> Handle {
    Handle::new(Kind::Context, index, generation)
}
fn fault(index: u32) -> Handle {
    Handle::new(Kind::Fault, index, 1)
}

pub(super) fn bench() -> Bench {
    bench_with(OracleConfig { fault_heartbeats: 10, ..OracleConfig::default() })
}

pub(super) fn bench_with(config: OracleConfig) -> Bench {
    let oracle = Oracle::new(config);
    let fake = Arc::new(Fake::default());
    let weak: Weak<dyn Inspect> = Arc::<Fake>::downgrade(&fake);
    oracle.attach(weak);
    Bench { oracle, fake }
}

/// Whatever a test did, a check of the trace says the same.
impl Drop for Bench {
    fn drop(&mut self) {
        let bytes = self.oracle.trace();
        let whole = TraceFile::from_bytes(&bytes).is_ok_and(|file| file.missing() == 0);
        if !std::thread::panicking() && self.oracle.config.enabled && whole {
            trace::same_offline(&self.oracle);
        }
    }
}

impl Bench {
    pub(super) fn say(&self, kind: u32, mm: u64, arg: u64) {
        self.oracle.witness(&Record {
            kind,
            mm,
            arg: [arg, 0, 0, 0],
            tgid: 40,
            pid: 41,
            ..Record::default()
        });
    }
    pub(super) fn set(&self, ctx: Handle, view: ContextView) {
        self.fake.0.lock().insert(ctx.0, view);
    }
    pub(super) fn bind(&self, ctx: Handle) {
        self.set(ctx, ContextView::default());
        self.oracle.event(E::ContextBound { ctx, tag: 7 });
    }
    pub(super) fn begin(&self, mm: u64) {
        self.say(witness::MM_BEGIN, mm, 2);
        self.say(witness::NOTIFIER_ADDED, mm, 2);
    }
    /// A process mirrored by a context, as the workloads do it.
    pub(super) fn mirror(&self, mm: u64, ctx: Handle) {
        self.begin(mm);
        self.bind(ctx);
        self.say(witness::ASSOCIATE, mm, ctx.0);
    }
    pub(super) fn map(&self, ctx: Handle, va: u64) {
        self.oracle.event(E::LeafSet { ctx, va: Some(va), pte: PTE });
        let mut fake = self.fake.0.lock();
        let view = fake.entry(ctx.0).or_default();
        view.live_leaves += 1;
        view.first_leaf.get_or_insert((va, PTE));
    }
    pub(super) fn access(&self, ctx: Handle) {
        self.oracle.access(ctx, VA, 0x1234_5000, 1);
    }
    /// The driver's RELEASE command.
    pub(super) fn stop(&self, ctx: Handle) {
        self.set(ctx, ContextView { released: true, ..ContextView::default() });
        self.oracle.event(E::ContextReleased { ctx });
    }
    pub(super) fn clear(&self, ctx: Handle) {
        self.oracle.event(E::LeafCleared { ctx, va: Some(VA), count: 1 });
        self.oracle.event(E::Invalidate { ctx, start: 0, last: u64::MAX });
        self.set(ctx, ContextView::default());
        self.oracle.event(E::InvalidateDone { ctx, start: 0, last: u64::MAX });
    }
    pub(super) fn unbind(&self, ctx: Handle) {
        self.fake.0.lock().remove(&ctx.0);
        self.oracle.event(E::ContextUnbound { ctx, leak: Leak::default() });
    }
    pub(super) fn exit(&self, mm: u64) {
        self.say(witness::MM_RELEASED, mm, 0);
        self.say(witness::MM_UNMAPPED, mm, 0);
    }
    pub(super) fn end(&self, mm: u64) {
        self.say(witness::NOTIFIER_REMOVED, mm, 2);
        self.say(witness::MM_END, mm, 0);
    }
    pub(super) fn beat(&self, times: u32) {
        for _ in 0..times {
            self.say(witness::HEARTBEAT, 0, 0);
        }
    }
    pub(super) fn raise(&self, ctx: Handle, number: u32) {
        self.fake.0.lock().entry(ctx.0).or_default().parked_faults += 1;
        self.oracle.event(E::FaultRaised { fault: fault(number), ctx, va: VA, access: 1, again: 0 });
    }
    pub(super) fn rules(&self) -> Vec<&'static str> {
        self.oracle.violations().iter().map(|v| v.rule.name()).collect()
    }
    #[track_caller]
    pub(super) fn clean(&self) {
        assert!(self.oracle.violations().is_empty(), "{:#?}", self.oracle.violations());
        assert_eq!(self.oracle.counters().bad_records, 0);
    }
}

// ----- unregister -----

#[test]
fn a_fault_of_another_is_not_answered() {
    let (a, b) = (ctx(1, 1), ctx(1, 2));
    for (of, by, generation, wrong) in [(a, a, 1, false), (a, b, 1, true), (a, b, 2, false)] {
        let g = bench();
        g.oracle.event(E::FaultRaised { fault: fault(5), ctx: of, va: VA, access: 1, again: 0 });
        g.oracle.event(E::FaultDropped { fault: fault(5), ctx: of, va: VA });
        let handle = Handle::new(Kind::Fault, 5, generation);
        g.oracle.event(E::BadHandle {
            op: "FAULT_REPLAY",
            handle,
            issued_before: true,
            by: Some(by),
            va: None,
        });
        assert_eq!(g.rules(), if wrong { &["context/unknown-handle"][..] } else { &[] });
        assert_eq!(g.oracle.counters().stale_answers, u64::from(!wrong));
    }
}

#[test]
fn a_stale_context_is_touched_and_a_made_up_one_unknown() {
    let b = bench();
    let bad = |op, handle, issued_before| {
        b.oracle.event(E::BadHandle { op, handle, issued_before, by: None, va: Some(VA) });
        b.oracle.violations().last().map(|v| (v.rule.name(), v.context, v.address))
    };
    assert_eq!(bad("FAULT_REPLAY", fault(1), true), None, "somebody else was faster");
    assert_eq!(b.oracle.counters().stale_answers, 1);
    let c = ctx(3, 7);
    assert_eq!(bad("INVALIDATE", c, true), Some(("unregister/touch", Some(c.0), Some(VA))));
    assert!(b.oracle.violations()[0].summary.contains("INVALIDATE named context 3#7"));
    let d = ctx(4, 9);
    assert_eq!(bad("INVALIDATE", d, false), Some(("context/unknown-handle", Some(d.0), Some(VA))));
    let queue = Handle::new(Kind::Queue, 1, 1);
    assert_eq!(bad("DOORBELL", queue, true), Some(("context/unknown-handle", None, Some(VA))));
    bad("WRITE_PTE", Handle::new(Kind::TablePage, 1, 1), true);
    bad("FAULT_CANCEL", fault(2), false);
    bad("FAULT_CANCEL", Handle(0xffff), false);
    assert_eq!(b.oracle.violations().len(), 3);
    assert_eq!(b.oracle.violations()[2].count, 4);
}

fn off() -> E {
    E::Disabled { leak: Leak::default(), contexts_live: 0 }
}

#[test]
fn accesses_through_the_drivers_own_context_are_not_looked_at() {
    let b = bench();
    b.bind(ctx(0, 1));
    assert!(b.oracle.watched.contains(ctx(0, 1)), "for its first leaf");
    b.oracle.event(E::LeafSet { ctx: ctx(0, 1), va: Some(VA), pte: PTE });
    assert!(!b.oracle.watched.contains(ctx(0, 1)), "it would cost a lock for each access, for ever");
    b.bind(ctx(1, 1));
    b.begin(1);
    assert!(!b.oracle.watched.contains(ctx(1, 1)));
    b.clean();
}

#[test]
fn a_notifier_left_by_a_driver_that_is_gone_is_a_leak() {
    let left = |removed: bool, gone: bool, missed: u64| {
        let b = bench();
        b.mirror(1, ctx(0, 1));
        b.stop(ctx(0, 1));
        b.exit(1);
        if removed {
            b.say(witness::NOTIFIER_REMOVED, 1, 2);
        }
        b.unbind(ctx(0, 1));
        if gone {
            b.oracle.event(off());
        }
        b.say(witness::BYE, 0, missed);
        b
    };
    // Somebody else may hold the mm itself for as long as he likes: no end, and no leak.
    left(true, true, 0).clean();
    left(false, false, 0).clean();
    left(false, true, 1).clean();
    let b = left(false, true, 0);
    assert_eq!(b.rules(), ["unregister/leak"]);
    let summary = &b.oracle.violations()[0].summary;
    assert!(summary.contains("address space 1 (process 40) 1 were never removed"), "{summary}");
}

#[test]
fn an_address_space_that_nobody_uses_and_nobody_releases_is_a_leak() {
    let stranded = |context: bool, gone: bool, missed: u64| {
        let b = bench();
        b.begin(1);
        if context {
            b.bind(ctx(0, 1));
            b.say(witness::ASSOCIATE, 1, ctx(0, 1).0);
            b.stop(ctx(0, 1));
            b.unbind(ctx(0, 1));
        }
        b.say(witness::NOTIFIER_REMOVED, 1, 2);
        if gone {
            b.oracle.event(off());
        }
        b.oracle.witness(&Record { kind: witness::HEARTBEAT, arg: [1, missed, 0, 0], ..Record::default() });
        b.say(witness::MM_STRANDED, 1, 0);
        b.say(witness::BYE, 0, 0);
        b
    };
    stranded(false, true, 0).clean();
    stranded(true, false, 0).clean();
    stranded(true, true, 1).clean();
    let b = stranded(true, true, 0);
    assert_eq!(b.rules(), ["unregister/leak"]);
    assert!(b.oracle.violations()[0].summary.contains("was never released"));
    b.say(witness::MM_STRANDED, 7, 0);
    assert_eq!(b.oracle.counters().bad_records, 1);
}

#[test]
fn what_is_left_behind_is_a_leak() {
    let b = bench();
    b.mirror(1, ctx(0, 1));
    b.stop(ctx(0, 1));
    b.oracle.event(E::ContextUnbound { ctx: ctx(0, 1), leak: NOT_CLEAN });
    let v = &b.oracle.violations()[0];
    assert_eq!((v.rule.name(), v.address, v.context), ("unregister/leak", Some(VA), Some(ctx(0, 1).0)));
    assert!(v.summary.contains("2 table pages"), "{}", v.summary);
    let b = bench();
    b.oracle.event(E::Disabled { leak: Leak::default(), contexts_live: 0 });
    b.clean();
    b.bind(ctx(1, 1));
    b.oracle.event(E::Disabled { leak: Leak::default(), contexts_live: 1 });
    assert_eq!(b.oracle.violations()[0].context, Some(ctx(1, 1).0));
    b.oracle.event(E::Disabled { leak: NOT_CLEAN, contexts_live: 0 });
    assert_eq!(b.rules(), ["unregister/leak"; 2]);
}

#[test]
fn what_is_mapped_for_the_device_when_its_driver_has_gone_is_a_leak() {
    let left = |missed: u64| {
        let b = bench();
        b.oracle.witness(&Record { kind: witness::HEARTBEAT, arg: [1, missed, 0, 0], ..Record::default() });
        b.say(witness::DMA_LEFT, 0, 14);
        b
    };
    // What was missed may have been what took it back.
    left(1).clean();
    let b = left(0);
    assert_eq!(b.rules(), ["unregister/leak"]);
    let violation = &b.oracle.violations()[0];
    assert_eq!((violation.context, violation.address), (None, None));
    assert!(violation.summary.contains("mapped memory 14 times more"), "{}", violation.summary);
}

#[test]
fn memory_is_given_back_that_the_device_still_has() {
    let freed = |b: &Bench, start: u64, bytes: u64| {
        let arg = [start, bytes, 0, 0];
        b.oracle.witness(&Record { kind: witness::DMA_FREED, arg, ..Record::default() });
    };
    let b = bench();
    let (of, queue) = (ctx(3, 1), Handle::new(Kind::Queue, 1, 1));
    b.bind(of);
    b.fake.3.lock().extend([
        (0x5000, RingView { used: RingUse::Queue, ctx: of, queue }),
        (0x9000, RingView { used: RingUse::Faults, ctx: Handle::NONE, queue: Handle::NONE }),
    ]);
    for (start, bytes) in [(0x4000, 0x1000), (0x5001, 0x1000), (0x5000, 0), (u64::MAX, 2)] {
        freed(&b, start, bytes);
        b.clean();
    }
    freed(&b, 0x4000, 0x1001);
    freed(&b, 0x9000, 0x1000);
    assert_eq!(b.rules(), ["ring/freed"; 2]);
    let [queue, buffer] = &b.oracle.violations()[..] else { unreachable!() };
    assert_eq!((queue.context, queue.frame), (Some(of.0), Some(0x4000)));
    assert_eq!((buffer.context, buffer.frame), (None, Some(0x9000)));

    // An oracle that is off asks nobody.
    let b = bench_with(OracleConfig { enabled: false, ..OracleConfig::default() });
    let ring = RingView { used: RingUse::Commands, ctx: Handle::NONE, queue: Handle::NONE };
    b.fake.3.lock().push((0x5000, ring));
    let before = b.oracle.trace_size();
    freed(&b, 0x5000, 0x1000);
    b.clean();
    assert_eq!(b.oracle.trace_size(), before);
}

#[test]
fn turning_the_device_off_after_the_witness_left_may_be_a_shutdown() {
    let b = bench();
    b.bind(ctx(0, 1));
    b.say(witness::BYE, 0, 0);
    b.oracle.event(E::Disabled { leak: NOT_CLEAN, contexts_live: 1 });
    b.clean();
}

#[test]
fn an_access_without_any_notifier_is_a_touch() {
    let b = bench();
    b.mirror(1, ctx(0, 1));
    b.map(ctx(0, 1), VA);
    b.say(witness::NOTIFIER_ADDED, 1, 2);
    b.say(witness::NOTIFIER_REMOVED, 1, 2);
    b.access(ctx(0, 1));
    b.clean();
    b.say(witness::NOTIFIER_REMOVED, 1, 2);
    b.clean();
    b.access(ctx(0, 1));
    assert_eq!(b.rules(), ["unregister/touch"]);
    assert!(b.oracle.violations()[0].summary.contains("has no notifier any more"));
}

#[test]
fn a_quiet_context_may_outlive_its_notifier() {
    // Queues destroyed, notifier removed, tables freed some time later by a worker: nobody can use the leaves.
    let b = bench();
    b.mirror(1, ctx(0, 1));
    b.map(ctx(0, 1), VA);
    b.say(witness::NOTIFIER_REMOVED, 1, 2);
    b.exit(1);
    b.say(witness::MM_END, 1, 0);
    b.stop(ctx(0, 1));
    b.unbind(ctx(0, 1));
    b.clean();
    // Notifiers of single ranges, that come and go with what is mapped.
    b.mirror(2, ctx(0, 2));
    for _ in 0..3 {
        b.access(ctx(0, 2));
        b.say(witness::NOTIFIER_REMOVED, 2, 2);
        b.say(witness::NOTIFIER_ADDED, 2, 2);
    }
    b.access(ctx(0, 2));
    b.clean();
}

#[test]
fn notifiers_not_seen_to_come_are_not_counted_when_they_go() {
    let b = bench();
    b.say(witness::MM_BEGIN, 1, 1);
    b.bind(ctx(0, 1));
    b.say(witness::ASSOCIATE, 1, ctx(0, 1).0);
    b.say(witness::NOTIFIER_REMOVED, 1, 1);
    b.say(witness::NOTIFIER_ADDED, 1, 1);
    b.access(ctx(0, 1));
    // A missed probe makes the number worthless.
    b.mirror(2, ctx(1, 1));
    b.oracle.witness(&Record { kind: witness::HEARTBEAT, arg: [1, 1, 0, 0], ..Record::default() });
    b.say(witness::NOTIFIER_REMOVED, 2, 2);
    b.access(ctx(1, 1));
    b.clean();
}

// ----- faults -----

#[test]
fn a_fault_must_be_answered() {
    let b = bench();
    let c = ctx(0, 1);
    b.bind(c);
    b.raise(c, 1);
    b.beat(10);
    b.clean();
    b.beat(5);
    assert_eq!(b.rules(), ["fault/unanswered"]);
    let v = &b.oracle.violations()[0];
    assert_eq!((v.address, v.count, v.context), (Some(VA), 1, Some(c.0)));
    assert!(v.events.iter().any(|event| event.contains("raised at")), "{:?}", v.events);
}

#[test]
fn a_late_answer_in_time_is_an_answer() {
    let b = bench();
    let c = ctx(0, 1);
    b.bind(c);
    for (number, answer) in [
        (1, E::FaultReplayed { fault: fault(1), ctx: c, va: VA }),
        (2, E::FaultCancelled { fault: fault(2), ctx: c, va: VA }),
        (3, E::FaultDropped { fault: fault(3), ctx: c, va: VA }),
    ] {
        b.raise(c, number);
        b.beat(10);
        b.oracle.event(answer);
        b.beat(20);
    }
    // Told in the wrong order by two threads.
    b.oracle.event(E::FaultCancelled { fault: fault(4), ctx: c, va: VA });
    b.raise(c, 4);
    b.beat(20);
    // Never told, but the device has none parked.
    b.raise(c, 5);
    b.set(c, ContextView::default());
    b.beat(20);
    b.raise(c, 6);
    b.unbind(c);
    b.beat(20);
    b.clean();
}

#[test]
fn a_fault_is_not_served_after_release() {
    for (pte, va) in [(PTE, VA), (VALID | HUGE, VA & !0x1f_ffff)] {
        let b = bench();
        let c = ctx(0, 1);
        b.mirror(1, c);
        b.raise(c, 1);
        b.exit(1);
        b.clean();
        b.oracle.event(E::LeafSet { ctx: c, va: Some(va), pte });
        assert_eq!(b.rules(), ["fault/after-release"]);
        assert_eq!(b.oracle.violations()[0].address, Some(VA));
    }
}

#[test]
fn an_answer_that_was_under_way_at_release_is_none() {
    let b = bench();
    let c = ctx(0, 1);
    b.mirror(1, c);
    b.raise(c, 1);
    b.map(c, VA);
    b.clear(c);
    b.exit(1);
    // The driver's fault thread wakes up and sends what it had decided before; the access faults again.
    b.oracle.event(E::FaultReplayed { fault: fault(1), ctx: c, va: VA });
    b.raise(c, 2);
    b.oracle.event(E::FaultReplayed { fault: fault(2), ctx: c, va: VA });
    b.raise(c, 3);
    b.oracle.event(E::FaultCancelled { fault: fault(3), ctx: c, va: VA });
    b.clean();
}

#[test]
fn replaying_for_ever_after_release_is_no_answer() {
    let b = bench();
    let c = ctx(0, 1);
    b.mirror(1, c);
    b.exit(1);
    for number in 0..40 {
        b.raise(c, number);
        b.oracle.event(E::FaultReplayed { fault: fault(number), ctx: c, va: VA });
    }
    assert_eq!(b.rules(), ["fault/after-release"]);
}

// ----- everything else -----

#[test]
fn outside_reports_are_kept_apart_by_their_text() {
    let b = bench();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sink = seen.clone();
    b.oracle.on_violation(Box::new(move |v| sink.lock().push(v.summary.clone())));
    for text in ["a", "b", "a"] {
        b.oracle.report(Violation::new(Rule::KernelWarn, text));
    }
    assert_eq!(*seen.lock(), ["a", "b"]);
    assert_eq!(b.oracle.violations()[0].count, 2);
    b.bind(ctx(0, 1));
    b.oracle.report(Violation::new(Rule::DataMismatch, "c").on(ctx(0, 1)).at(Some(VA), None));
    assert!(b.oracle.violations()[2].events[0].contains("bound"));
}

#[test]
fn the_list_is_bounded() {
    let b = bench_with(OracleConfig { max_violations: 3, ..OracleConfig::default() });
    for i in 0..10 {
        b.oracle.event(E::BadHandle {
            op: "CTX_RELEASE",
            handle: ctx(i, 1),
            issued_before: true,
            by: None,
            va: None,
        });
    }
    assert_eq!((b.oracle.violations().len(), b.oracle.counters().suppressed), (3, 7));
}

#[test]
fn a_reset_forgets_the_device_and_hello_the_address_spaces() {
    let b = bench();
    b.mirror(1, ctx(0, 1));
    b.raise(ctx(0, 1), 1);
    b.oracle.event(E::Reset);
    b.fake.0.lock().clear();
    b.beat(50);
    b.exit(1);
    b.say(witness::HELLO, 0, 1);
    b.mirror(1, ctx(0, 1));
    b.access(ctx(0, 1));
    b.clear(ctx(0, 1));
    b.exit(1);
    b.clean();
}

#[test]
fn what_nobody_watched_is_counted() {
    let b = bench();
    let gaps = || {
        let counters = b.oracle.counters();
        (counters.witness_starts, counters.contexts_lost)
    };
    b.oracle.event(E::Reset);
    b.say(witness::HELLO, 0, 1);
    assert_eq!(gaps(), (1, 0));
    b.mirror(1, ctx(0, 1));
    // A driver that resets the device instead of letting go, or a program that does it through sysfs.
    b.oracle.event(E::Reset);
    b.exit(1);
    b.say(witness::BYE, 0, 0);
    b.say(witness::HELLO, 0, 1);
    assert_eq!(gaps(), (2, 1));
    b.bind(ctx(0, 2));
    b.say(witness::BYE, 0, 0);
    b.oracle.event(E::Reset);
    assert_eq!(gaps(), (2, 1), "the machine is turned off");
}

#[test]
fn turned_off_it_only_counts() {
    let b = bench_with(OracleConfig { enabled: false, ..OracleConfig::default() });
    b.mirror(1, ctx(0, 1));
    b.map(ctx(0, 1), VA);
    b.exit(1);
    b.access(ctx(0, 1));
    b.oracle.event(E::ContextUnbound { ctx: ctx(0, 1), leak: NOT_CLEAN });
    b.beat(3);
    b.clean();
    let counters = b.oracle.counters();
    assert_eq!((counters.contexts, counters.unregisters, counters.address_spaces), (1, 1, 1));
    assert_eq!((counters.releases, counters.heartbeats, counters.events), (1, 3, 0));
    b.oracle.report(Violation::new(Rule::KernelOops, "BUG"));
    assert_eq!(b.rules(), ["kernel/oops"]);
}
