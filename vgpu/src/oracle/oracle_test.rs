// SPDX-License-Identifier: MIT OR Apache-2.0
//! Each rule fires on the broken sequence and keeps silent on the correct ones.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use vgpu_spec::handle::{Handle, Kind};
use vgpu_spec::pte::{ADDRESS, HUGE, VALID, WRITE};
use vgpu_spec::witness::{self, Record};

use super::DeviceEvent as E;
use super::*;

/// A device that says what it was told to say.
#[derive(Default)]
pub(super) struct Fake(pub(super) Mutex<BTreeMap<u64, ContextView>>);

impl Inspect for Fake {
    fn context(&self, ctx: Handle) -> Option<ContextView> {
        self.0.lock().get(&ctx.0).copied()
    }
}

struct Bench {
    oracle: Arc<Oracle>,
    fake: Arc<Fake>,
}

const VA: u64 = 0x7f00_0000_1000;
const PTE: u64 = VALID | WRITE | 0x1234_5000;
const NOT_CLEAN: Leak =
    Leak { table_pages: 2, data_pages: 0, queues: 0, faults: 0, page: Handle(0), va: Some(VA) };

fn ctx(index: u32, generation: u32) -> Handle {
    Handle::new(Kind::Context, index, generation)
}
fn fault(index: u32) -> Handle {
    Handle::new(Kind::Fault, index, 1)
}

fn bench() -> Bench {
    bench_with(OracleConfig { fault_heartbeats: 10, ..OracleConfig::default() })
}

fn bench_with(config: OracleConfig) -> Bench {
    let oracle = Oracle::new(config);
    let fake = Arc::new(Fake::default());
    let weak: Weak<dyn Inspect> = Arc::<Fake>::downgrade(&fake);
    oracle.attach(weak);
    Bench { oracle, fake }
}

impl Bench {
    fn say(&self, kind: u32, mm: u64, arg: u64) {
        self.oracle.witness(&Record {
            kind,
            mm,
            arg: [arg, 0, 0, 0],
            tgid: 40,
            pid: 41,
            ..Record::default()
        });
    }
    fn set(&self, ctx: Handle, view: ContextView) {
        self.fake.0.lock().insert(ctx.0, view);
    }
    fn bind(&self, ctx: Handle) {
        self.set(ctx, ContextView::default());
        self.oracle.event(E::ContextBound { ctx, tag: 7 });
    }
    fn begin(&self, mm: u64) {
        self.say(witness::MM_BEGIN, mm, 2);
        self.say(witness::NOTIFIER_ADDED, mm, 2);
    }
    /// A process mirrored by a context, as the workloads do it.
    fn mirror(&self, mm: u64, ctx: Handle) {
        self.begin(mm);
        self.bind(ctx);
        self.say(witness::ASSOCIATE, mm, ctx.0);
    }
    fn map(&self, ctx: Handle, va: u64) {
        self.oracle.event(E::LeafSet { ctx, va: Some(va), pte: PTE });
        let mut fake = self.fake.0.lock();
        let view = fake.entry(ctx.0).or_default();
        view.live_leaves += 1;
        view.first_leaf.get_or_insert((va, PTE));
    }
    fn access(&self, ctx: Handle) {
        self.oracle.access(ctx, VA, 0x1234_5000, 1);
    }
    /// The driver's RELEASE command.
    fn stop(&self, ctx: Handle) {
        self.set(ctx, ContextView { released: true, ..ContextView::default() });
        self.oracle.event(E::ContextReleased { ctx });
    }
    fn clear(&self, ctx: Handle) {
        self.oracle.event(E::LeafCleared { ctx, va: Some(VA), count: 1 });
        self.oracle.event(E::Invalidate { ctx, start: 0, last: u64::MAX });
        self.set(ctx, ContextView::default());
        self.oracle.event(E::InvalidateDone { ctx, start: 0, last: u64::MAX });
    }
    fn unbind(&self, ctx: Handle) {
        self.fake.0.lock().remove(&ctx.0);
        self.oracle.event(E::ContextUnbound { ctx, leak: Leak::default() });
    }
    fn exit(&self, mm: u64) {
        self.say(witness::MM_RELEASED, mm, 0);
        self.say(witness::MM_UNMAPPED, mm, 0);
    }
    fn end(&self, mm: u64) {
        self.say(witness::NOTIFIER_REMOVED, mm, 2);
        self.say(witness::MM_END, mm, 0);
    }
    fn beat(&self, times: u32) {
        for _ in 0..times {
            self.say(witness::HEARTBEAT, 0, 0);
        }
    }
    fn raise(&self, ctx: Handle, number: u32) {
        self.fake.0.lock().entry(ctx.0).or_default().parked_faults += 1;
        self.oracle.event(E::FaultRaised { fault: fault(number), ctx, va: VA, access: 1 });
    }
    fn rules(&self) -> Vec<&'static str> {
        self.oracle.violations().iter().map(|v| v.rule.name()).collect()
    }
    #[track_caller]
    fn clean(&self) {
        assert!(self.oracle.violations().is_empty(), "{:#?}", self.oracle.violations());
        assert_eq!(self.oracle.counters().bad_records, 0);
    }
}

// ----- release -----

#[test]
fn a_leaf_left_at_release_is_late_and_then_mapped() {
    let b = bench();
    let c = ctx(3, 7);
    b.mirror(1, c);
    b.map(c, VA);
    b.access(c);
    b.clean();
    b.say(witness::MM_RELEASED, 1, 0);
    assert_eq!(b.rules(), ["release/late"]);
    b.access(c);
    assert_eq!(b.rules(), ["release/late"], "an access through it is the same fault");
    assert_eq!(b.oracle.violations()[0].count, 2);
    b.say(witness::MM_UNMAPPED, 1, 0);
    assert_eq!(b.rules(), ["release/late", "release/mapped"]);
    let v = &b.oracle.violations()[0];
    assert_eq!((v.context, v.address, v.frame), (Some(c.0), Some(VA), Some(PTE & ADDRESS)));
    assert_eq!(v.context_name.as_deref(), Some("context 3#7"));
    assert!(v.summary.contains("address space 1 (process 40)"), "{}", v.summary);
    assert!(v.summary.contains("1 leaves are valid (first: 0x7f0000001000 -> 0x12345000)"), "{}", v.summary);
    let has = |text: &str| v.events.iter().any(|event| event.contains(text));
    assert!(has("context 3#7 bound") && has("leaf set at 0x7f0000001000"), "{:#?}", v.events);
    assert!(has("witness: release has returned for address space 1 (task 40/41"), "{:#?}", v.events);
}

#[test]
fn a_tlb_entry_or_an_access_in_flight_is_late() {
    let b = bench();
    b.mirror(1, ctx(0, 1));
    b.set(ctx(0, 1), ContextView { tlb_entries: 3, first_tlb: Some((VA, PTE)), ..ContextView::default() });
    b.say(witness::MM_RELEASED, 1, 0);
    assert!(b.oracle.violations()[0].summary.contains("3 TLB entries are left"));
    b.mirror(2, ctx(1, 1));
    b.set(ctx(1, 1), ContextView { released: true, in_flight: Some(VA), ..ContextView::default() });
    b.say(witness::MM_RELEASED, 2, 0);
    let v = &b.oracle.violations()[1];
    assert!(v.summary.contains("an access at 0x7f0000001000 is in flight"), "{}", v.summary);
    assert_eq!(v.address, Some(VA));
    assert_eq!(b.rules(), ["release/late"; 2]);
}

/// Asks for a context and lets an access of it through in that very moment.
struct Racer(Mutex<Option<Arc<Oracle>>>, ContextView);
impl Inspect for Racer {
    fn context(&self, ctx: Handle) -> Option<ContextView> {
        if let Some(oracle) = &*self.0.lock() {
            oracle.access(ctx, VA, 0x5000, 1);
        }
        Some(self.1)
    }
}

#[test]
fn an_access_between_the_watch_and_the_look_is_late() {
    for (leaves, what) in [(0, "still under way"), (1, "leaves are valid")] {
        let b = bench();
        b.mirror(1, ctx(0, 1));
        let racer: Arc<dyn Inspect> = Arc::new(Racer(
            Mutex::new(Some(b.oracle.clone())),
            ContextView { live_leaves: leaves, ..ContextView::default() },
        ));
        b.oracle.attach(Arc::downgrade(&racer));
        b.say(witness::MM_RELEASED, 1, 0);
        assert_eq!(b.rules(), ["release/late"]);
        assert!(b.oracle.violations()[0].summary.contains(what));
    }
}

#[test]
fn every_context_of_an_address_space_is_looked_at() {
    let b = bench();
    b.mirror(1, ctx(0, 1));
    for i in 1..4 {
        b.say(witness::NOTIFIER_ADDED, 1, 2);
        b.bind(ctx(i, 1));
        b.say(witness::ASSOCIATE, 1, ctx(i, 1).0);
    }
    b.map(ctx(1, 1), VA);
    b.map(ctx(3, 1), VA);
    b.stop(ctx(3, 1));
    b.exit(1);
    let found: Vec<_> = b.oracle.violations().iter().map(|v| (v.rule.name(), v.context)).collect();
    assert_eq!(found, [("release/late", Some(ctx(1, 1).0)), ("release/mapped", Some(ctx(1, 1).0))]);
    assert_eq!(b.oracle.counters().address_spaces, 1);
}

#[test]
fn correct_ends_are_clean() {
    // Lazy: RELEASE only, the leaves stay in tables that nobody can reach; close after exit.
    let b = bench();
    b.mirror(1, ctx(0, 1));
    b.map(ctx(0, 1), VA);
    b.stop(ctx(0, 1));
    b.exit(1);
    b.unbind(ctx(0, 1));
    b.end(1);
    // Eager: leaves cleared and invalidated, RELEASE only at close; the slot is used again.
    b.mirror(2, ctx(0, 2));
    b.map(ctx(0, 2), VA);
    b.clear(ctx(0, 2));
    b.exit(2);
    b.stop(ctx(0, 2));
    b.unbind(ctx(0, 2));
    b.end(2);
    // Close before exit, then exit.
    b.mirror(3, ctx(0, 3));
    b.map(ctx(0, 3), VA);
    b.stop(ctx(0, 3));
    b.unbind(ctx(0, 3));
    b.say(witness::NOTIFIER_REMOVED, 3, 2);
    b.bind(ctx(0, 4));
    b.map(ctx(0, 4), VA);
    b.access(ctx(0, 4));
    b.exit(3);
    b.say(witness::MM_END, 3, 0);
    b.clean();
    let counters = b.oracle.counters();
    assert_eq!((counters.contexts, counters.unregisters, counters.address_spaces), (4, 3, 3));
    assert_eq!((counters.releases, counters.unassociated_contexts), (3, 1));
}

#[test]
fn a_file_inherited_by_a_child_outlives_its_opener() {
    let b = bench();
    b.mirror(1, ctx(0, 1));
    b.map(ctx(0, 1), VA);
    b.begin(2);
    b.stop(ctx(0, 1));
    b.exit(1);
    b.bind(ctx(1, 1));
    b.say(witness::ASSOCIATE, 2, ctx(1, 1).0);
    b.map(ctx(1, 1), VA);
    b.access(ctx(1, 1));
    b.unbind(ctx(0, 1));
    b.end(1);
    b.clear(ctx(1, 1));
    b.exit(2);
    b.clean();
}

#[test]
fn nothing_is_revived() {
    let b = bench();
    let (c, d) = (ctx(0, 1), ctx(1, 1));
    b.mirror(1, c);
    b.clear(c);
    b.exit(1);
    b.access(c);
    b.access(c);
    let v = &b.oracle.violations()[0];
    assert_eq!(
        (v.rule.name(), v.address, v.frame, v.count),
        ("release/revived", Some(VA), Some(0x1234_5000), 2)
    );
    assert!(v.events.iter().any(|event| event.contains("accesses 0x7f0000001000")), "{:?}", v.events);

    b.mirror(2, d);
    b.exit(2);
    b.oracle.event(E::LeafSet { ctx: d, va: None, pte: PTE });
    b.oracle.event(E::LeafSet { ctx: d, va: Some(VA), pte: 0 });
    assert_eq!(b.rules(), ["release/revived"], "an unlinked table and an empty entry map nothing");
    b.oracle.event(E::LeafSet { ctx: d, va: Some(VA), pte: PTE });
    let v = &b.oracle.violations()[1];
    assert_eq!((v.rule.name(), v.context, v.frame), ("release/revived", Some(d.0), Some(0x1234_5000)));
}

#[test]
fn a_driver_that_was_late_but_done_at_the_unmap_can_still_revive() {
    let b = bench();
    b.mirror(1, ctx(0, 1));
    b.map(ctx(0, 1), VA);
    b.say(witness::MM_RELEASED, 1, 0);
    b.clear(ctx(0, 1));
    b.say(witness::MM_UNMAPPED, 1, 0);
    assert_eq!(b.rules(), ["release/late"]);
    b.say(witness::MM_END, 1, 0);
    b.access(ctx(0, 1));
    assert_eq!(b.rules(), ["release/late", "release/revived"]);
}

#[test]
fn leaves_written_to_a_released_context_revive_nothing() {
    let b = bench();
    b.mirror(1, ctx(0, 1));
    b.stop(ctx(0, 1));
    b.exit(1);
    b.oracle.event(E::LeafSet { ctx: ctx(0, 1), va: Some(VA), pte: PTE });
    b.clean();
}

#[test]
fn a_context_with_leaves_when_its_address_space_has_ended_is_mapped() {
    let b = bench();
    b.mirror(1, ctx(0, 1));
    b.exit(1);
    b.set(ctx(0, 1), ContextView { live_leaves: 1, first_leaf: Some((VA, PTE)), ..ContextView::default() });
    b.end(1);
    assert_eq!(b.rules(), ["release/mapped"]);
}

#[test]
fn released_twice() {
    let b = bench();
    b.bind(ctx(0, 1));
    b.stop(ctx(0, 1));
    b.clean();
    b.oracle.event(E::ReleaseAgain { ctx: ctx(0, 1) });
    assert_eq!(b.rules(), ["release/twice"]);
}

// ----- whose context it is -----

#[test]
fn a_lone_context_is_paired_without_a_word() {
    for bind_first in [false, true] {
        let b = bench();
        if bind_first {
            b.bind(ctx(0, 1));
            b.begin(1);
        } else {
            b.begin(1);
            b.bind(ctx(0, 1));
        }
        b.map(ctx(0, 1), VA);
        b.say(witness::MM_RELEASED, 1, 0);
        assert_eq!(b.rules(), ["release/late"]);
        assert_eq!(b.oracle.counters().unassociated_contexts, 0);
        assert_eq!(b.oracle.counters().address_spaces, 1);
    }
}

#[test]
fn one_after_the_other_are_all_paired() {
    let b = bench();
    for i in 1..6 {
        b.begin(i);
        b.bind(ctx(0, i as u32));
        b.map(ctx(0, i as u32), VA);
        b.stop(ctx(0, i as u32));
        b.exit(i);
        b.unbind(ctx(0, i as u32));
        if i % 2 == 0 {
            b.end(i);
        }
    }
    b.clean();
    assert_eq!((b.oracle.counters().address_spaces, b.oracle.counters().unassociated_contexts), (5, 0));
}

#[test]
fn what_could_be_anybodys_is_nobodys() {
    // Two address spaces alive at once.
    let b = bench();
    b.begin(1);
    b.begin(2);
    b.bind(ctx(0, 1));
    b.map(ctx(0, 1), VA);
    b.exit(1);
    b.exit(2);
    // Two contexts for one.
    let b2 = bench();
    b2.begin(1);
    b2.bind(ctx(0, 1));
    b2.bind(ctx(1, 1));
    b2.map(ctx(0, 1), VA);
    b2.exit(1);
    // The second context of one that has had its own: it may be that of somebody who has no notifier yet.
    let b3 = bench();
    b3.mirror(1, ctx(0, 1));
    b3.bind(ctx(1, 1));
    b3.map(ctx(1, 1), VA);
    b3.exit(1);
    for (b, open) in [(b, 1), (b2, 2), (b3, 1)] {
        b.clean();
        assert_eq!(b.oracle.counters().unassociated_contexts, open);
    }
}

#[test]
fn the_word_stands_and_nonsense_is_refused() {
    let b = bench();
    b.begin(1);
    b.begin(2);
    b.bind(ctx(0, 1));
    b.say(witness::ASSOCIATE, 2, ctx(0, 1).0);
    b.say(witness::ASSOCIATE, 1, ctx(0, 1).0);
    b.say(witness::ASSOCIATE, 1, ctx(9, 9).0);
    b.say(witness::ASSOCIATE, 8, ctx(0, 1).0);
    b.say(witness::ASSOCIATE, 2, ctx(0, 1).0);
    assert_eq!(b.oracle.counters().bad_associations, 3);
    b.map(ctx(0, 1), VA);
    b.exit(1);
    b.clean();
    b.say(witness::MM_RELEASED, 2, 0);
    assert_eq!(b.rules(), ["release/late"]);
}

#[test]
fn a_context_only_the_device_knows_yet_can_be_associated() {
    let b = bench();
    b.begin(1);
    b.set(ctx(0, 1), ContextView { live_leaves: 1, ..ContextView::default() });
    b.say(witness::ASSOCIATE, 1, ctx(0, 1).0);
    b.oracle.event(E::ContextBound { ctx: ctx(0, 1), tag: 0 });
    b.say(witness::MM_RELEASED, 1, 0);
    assert_eq!(b.rules(), ["release/late"]);
}

// ----- unregister -----

#[test]
fn a_stale_context_is_touched_and_a_made_up_one_unknown() {
    let b = bench();
    let bad = |op, handle, issued_before| {
        b.oracle.event(E::BadHandle { op, handle, issued_before, va: Some(VA) });
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
    assert_eq!(bad("doorbell", queue, true), Some(("context/unknown-handle", None, Some(VA))));
    bad("WRITE_PTE", Handle::new(Kind::TablePage, 1, 1), true);
    bad("FAULT_CANCEL", fault(2), false);
    bad("FAULT_CANCEL", Handle(0xffff), false);
    assert_eq!(b.oracle.violations().len(), 3);
    assert_eq!(b.oracle.violations()[2].count, 4);
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
        b.oracle.event(E::BadHandle { op: "RELEASE", handle: ctx(i, 1), issued_before: true, va: None });
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
