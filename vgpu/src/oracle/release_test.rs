// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rules of release, and whose context is whose.

use std::sync::Arc;

use parking_lot::Mutex;
use vgpu_spec::command::TAG_NONE;
use vgpu_spec::handle::Handle;
use vgpu_spec::pte::ADDRESS;
use vgpu_spec::witness;

use super::DeviceEvent as E;
use super::oracle_test::{PTE, VA, bench, ctx};
use super::*;

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
    fn range(&self, _: Handle, _: (u64, u64), _: bool, _: usize) -> Option<RangeView> {
        None
    }
    fn rings(&self, _: (u64, u64)) -> Vec<RingView> {
        Vec::new()
    }
    fn take_written(&self, _: Handle, _: (u64, u64)) -> Vec<Written> {
        Vec::new()
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
fn a_context_on_its_way_to_free_is_clean() {
    let b = bench();
    b.mirror(1, ctx(0, 1));
    b.stop(ctx(0, 1));
    b.set(ctx(0, 1), ContextView { live_leaves: 1, first_leaf: Some((VA, PTE)), ..ContextView::default() });
    b.exit(1);
    b.clean();
}

#[test]
fn a_context_without_queues_does_no_harm_until_it_is_used() {
    let b = bench();
    let (closed, open) = (ctx(0, 1), ctx(1, 1));
    b.mirror(1, closed);
    b.say(witness::NOTIFIER_ADDED, 1, 2);
    b.bind(open);
    b.say(witness::ASSOCIATE, 1, open.0);
    b.map(closed, VA);
    b.map(open, VA);
    // One is closed: queues gone, notifier gone, tables still to be returned by a worker when the process exits.
    let quiet =
        |queueless| ContextView { queueless, live_leaves: 1, tlb_entries: 1, ..ContextView::default() };
    b.set(closed, quiet(true));
    b.say(witness::NOTIFIER_REMOVED, 1, 2);
    b.stop(open);
    b.exit(1);
    b.clean();
    b.access(closed);
    assert_eq!(b.rules(), ["release/revived"]);
    // With a queue the same is late.
    let b = bench();
    b.mirror(1, closed);
    b.set(closed, quiet(false));
    b.say(witness::MM_RELEASED, 1, 0);
    assert_eq!(b.rules(), ["release/late"]);
    // And so is an access that is not over when its queue has gone.
    let b = bench();
    b.mirror(1, closed);
    b.set(closed, ContextView { in_flight: Some(VA), ..quiet(true) });
    b.say(witness::MM_RELEASED, 1, 0);
    assert_eq!(b.rules(), ["release/late"]);
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
fn a_context_of_the_drivers_own_is_nobodys() {
    let b = bench();
    // For copies, say: it maps VRAM before anybody is mirrored, and stays. The process never gets as far as a context.
    b.bind(ctx(0, 1));
    b.map(ctx(0, 1), VA);
    b.begin(1);
    b.exit(1);
    b.clean();
    assert_eq!(b.oracle.counters().unassociated_contexts, 1);
}

#[test]
fn a_context_that_is_said_to_be_the_drivers_own_is_nobodys() {
    let b = bench();
    b.begin(1);
    b.oracle.event(E::ContextBound { ctx: ctx(0, 1), tag: TAG_NONE });
    b.map(ctx(0, 1), VA);
    // The one that is left is that address space's.
    b.bind(ctx(1, 1));
    b.map(ctx(1, 1), VA);
    b.say(witness::MM_RELEASED, 1, 0);
    assert_eq!(b.rules(), ["release/late"]);
    assert_eq!(b.oracle.counters().unassociated_contexts, 0);
    // What a workload says counts for more.
    let b = bench();
    b.begin(1);
    b.oracle.event(E::ContextBound { ctx: ctx(0, 1), tag: TAG_NONE });
    b.say(witness::ASSOCIATE, 1, ctx(0, 1).0);
    b.map(ctx(0, 1), VA);
    b.say(witness::MM_RELEASED, 1, 0);
    assert_eq!(b.rules(), ["release/late"]);
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
