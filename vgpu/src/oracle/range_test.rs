// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rules of invalidations, and of what the CPU's page tables say.

use std::sync::Arc;

use vgpu_spec::fault::{ACCESS_READ, ACCESS_WRITE};
use vgpu_spec::handle::Handle;
use vgpu_spec::pte::{HUGE, VALID, VRAM, WRITE};
use vgpu_spec::witness::{self, Record};
use vgpu_spec::{pte, range as spec};

use super::DeviceEvent as E;
use super::oracle_test::{Bench, PTE, VA, bench_with, ctx};
use super::*;
use crate::testing::anonymous_file;

const RAM: u64 = 0x10_0000;
const SLOTS: u64 = RAM + 0xf000;
const QUESTIONS: u64 = RAM + 0xc000;
const BOTH: u32 = ACCESS_READ | ACCESS_WRITE;
/// The CPU's entries for the page that [`PTE`] leads to.
const HERE: u64 = 0x8000_0000_1234_5867;
const HERE_READ: u64 = HERE & !2;
const ELSEWHERE: u64 = 0x8000_0000_2222_2867;

pub(super) struct Guest {
    b: Bench,
    memory: Arc<SystemMemory>,
    pub(super) ctx: Handle,
}

impl std::ops::Deref for Guest {
    type Target = Bench;
    fn deref(&self) -> &Bench {
        &self.b
    }
}

/// A process of address space 1 that is mirrored, with tables at `RAM` in which nothing is mapped.
pub(super) fn guest() -> Guest {
    let b = bench_with(OracleConfig {
        fault_heartbeats: 10,
        trace_bytes: LEAST_BYTES,
        ..OracleConfig::default()
    });
    let memory = Arc::new(SystemMemory::new());
    memory.map(RAM, 0x10_000, &anonymous_file(0x10_000), 0, true).unwrap();
    b.oracle.attach_memory(memory.clone());
    let g = Guest { b, memory, ctx: ctx(3, 7) };
    g.tell(witness::HELLO, 0, [0; 4]);
    let first = u64::from_le_bytes([28, 29, 30, 26, 27, 25, 0xff, 0xff]);
    g.tell(witness::CPU_FORMAT, 0, [4 | 40 << 8 | 5 << 16 | 9 << 24, 0x000f_ffff_ffff_f000, first, u64::MAX]);
    g.tell(witness::RANGE_SLOTS, 0, [SLOTS, 8, QUESTIONS, 0]);
    g.tell(witness::MM_BEGIN, 1, [2, RAM, 0, 0]);
    g.tell(witness::NOTIFIER_ADDED, 1, [2, 0, 0, 0]);
    g.bind(g.ctx);
    g.tell(witness::ASSOCIATE, 1, [g.ctx.0, 0, 0, 0]);
    for level in 1..4 {
        let table = RAM + 0x1000 * (3 - level);
        g.put(table, level as u32, (table + 0x1000) | 0x67);
    }
    g
}

impl Guest {
    pub(super) fn tell(&self, kind: u32, mm: u64, arg: [u64; 4]) {
        self.oracle.witness(&Record { kind, mm, arg, tgid: 40, pid: 41, ..Record::default() });
    }
    fn put(&self, table: u64, level: u32, raw: u64) {
        let at = table + ((VA >> (12 + 9 * level)) & 0x1ff) * 8;
        self.memory.snapshot().store_u64(at, raw).unwrap();
    }
    /// The CPU's entry for [`VA`].
    pub(super) fn cpu(&self, raw: u64) {
        self.put(RAM + 0x3000, 0, raw);
    }
    fn access(&self, leaf: u64, access: u32) {
        self.oracle.compare(self.ctx).expect("it is mirrored").page(VA, leaf, access);
    }
    pub(super) fn device(&self, view: RangeView) {
        self.fake.1.lock().insert(self.ctx.0, view);
    }
    pub(super) fn start(&self, event: u32, slot: u64) {
        self.memory.snapshot().store_u64(SLOTS + 8 * slot, 100 + slot).unwrap();
        self.tell(witness::RANGE_START, 1, [VA, VA + 0xfff, u64::from(event) | slot << 32, 100 + slot]);
    }
    pub(super) fn end(&self, slot: u64) {
        self.memory.snapshot().store_u64(SLOTS + 8 * slot, 0).unwrap();
    }
    /// One of two, of which nobody knows whose it was.
    fn a_notifier_goes(&self) {
        self.tell(witness::NOTIFIER_ADDED, 1, [2, 0, 0, 0]);
        self.tell(witness::NOTIFIER_REMOVED, 1, [2, 0, 0, 0]);
    }
    pub(super) fn leaf(&self, leaf: u64) {
        self.oracle.event(E::LeafSet { ctx: self.ctx, va: Some(VA), pte: leaf });
    }
}

fn busy(leaves: &[(u64, u64)]) -> RangeView {
    RangeView { busy: true, leaves: leaves.to_vec(), ..RangeView::default() }
}

#[test]
fn what_is_left_when_the_start_has_returned() {
    let tlb = RangeView { busy: true, tlb_entries: vec![(VA, PTE)], ..RangeView::default() };
    let flight = RangeView { in_flight: Some((VA, PTE)), ..RangeView::default() };
    for (view, rule, what) in [
        (busy(&[(VA, PTE)]), "invalidate/stale-pte", "a leaf is valid"),
        (tlb, "invalidate/stale-tlb", "a TLB entry is left"),
        (flight, "invalidate/in-flight", "an access is in flight"),
    ] {
        let g = guest();
        g.cpu(HERE);
        g.device(view);
        g.start(spec::PROTECTION_VMA, 0);
        g.start(spec::SOFT_DIRTY, 1);
        g.start(spec::MIGRATE | spec::OWNED, 2);
        g.clean();
        g.start(spec::CLEAR, 3);
        assert_eq!(g.rules(), [rule]);
        let v = &g.oracle.violations()[0];
        assert!(
            v.summary.contains(what) && v.summary.contains("CLEAR 0x7f0000001000-0x7f0000001fff"),
            "{}",
            v.summary
        );
        assert_eq!((v.context, v.address, v.frame), (Some(g.ctx.0), Some(VA), Some(0x1234_5000)));
        assert_eq!(g.oracle.counters().ranges_judged, 4);
    }
}

#[test]
fn a_migration_by_nobody_known_takes_the_page_away() {
    let g = guest();
    g.device(busy(&[(VA, PTE)]));
    g.start(spec::MIGRATE, 0);
    assert_eq!(g.rules(), ["invalidate/stale-pte"]);
}

#[test]
fn contexts_that_cannot_translate_are_spared() {
    for view in [
        RangeView { released: true, ..busy(&[]) },
        RangeView { queueless: true, ..busy(&[(VA, PTE)]) },
        RangeView::default(),
    ] {
        let g = guest();
        g.device(view);
        g.start(spec::UNMAP, 0);
        g.clean();
    }
    let g = guest();
    g.device(busy(&[(VA, PTE)]));
    g.stop(g.ctx);
    g.start(spec::UNMAP, 0);
    g.clean();
}

#[test]
fn what_nobody_uses_is_stale_at_once_if_its_notifier_was_there() {
    let idle = RangeView { busy: false, ..busy(&[(VA, PTE)]) };
    let g = guest();
    g.device(idle.clone());
    g.start(spec::UNMAP | spec::LEAVING, 0);
    g.clean();
    g.start(spec::UNMAP, 1);
    assert_eq!(g.rules(), ["invalidate/stale-pte"]);
    // Another context of the process comes and goes, with a notifier of its own.
    let g = guest();
    g.tell(witness::NOTIFIER_ADDED, 1, [2, 0, 0, 0]);
    g.bind(ctx(4, 1));
    g.tell(witness::ASSOCIATE, 1, [ctx(4, 1).0, 0, 0, 0]);
    g.tell(witness::NOTIFIER_REMOVED, 1, [2, 0, 0, 0]);
    g.device(idle);
    g.start(spec::UNMAP, 0);
    g.clean();
    g.unbind(ctx(4, 1));
    g.start(spec::UNMAP, 1);
    assert_eq!(g.rules(), ["invalidate/stale-pte"]);
}

#[test]
fn what_nobody_uses_is_stale_when_it_is_used() {
    let g = guest();
    g.a_notifier_goes();
    g.cpu(HERE);
    g.device(RangeView { busy: false, ..busy(&[(VA, PTE)]) });
    g.start(spec::UNMAP, 0);
    g.clean();
    g.cpu(0);
    g.end(0);
    g.access(PTE, BOTH);
    assert_eq!(g.rules(), ["invalidate/stale-pte"]);
    assert!(g.oracle.violations()[0].summary.ends_with("and now it is used"));
}

#[test]
fn what_nobody_uses_is_stale_when_it_stays() {
    let g = guest();
    g.a_notifier_goes();
    g.device(RangeView { busy: false, ..busy(&[(VA, PTE)]) });
    g.start(spec::UNMAP, 0);
    g.beat(9);
    g.clean();
    g.beat(1);
    assert_eq!(g.rules(), ["invalidate/stale-pte"]);
    // It was on its way out.
    let g = guest();
    g.a_notifier_goes();
    g.device(RangeView { busy: false, ..busy(&[(VA, PTE)]) });
    g.start(spec::UNMAP, 0);
    g.beat(5);
    g.device(RangeView::default());
    g.beat(20);
    g.clean();
    // It is the same page, mapped again when that was allowed.
    let g = guest();
    g.a_notifier_goes();
    g.cpu(HERE);
    g.device(RangeView { busy: false, ..busy(&[(VA, PTE)]) });
    g.start(spec::CLEAR, 0);
    g.end(0);
    g.leaf(PTE);
    g.beat(20);
    g.clean();
}

#[test]
fn nothing_is_mapped_between_start_and_end() {
    let g = guest();
    g.cpu(HERE);
    g.leaf(PTE);
    g.start(spec::CLEAR, 0);
    g.end(0);
    g.leaf(PTE);
    g.clean();
    g.start(spec::PROTECTION_PAGE, 1);
    g.leaf(PTE & !WRITE);
    g.clean();
    g.start(spec::CLEAR, 2);
    g.leaf(PTE);
    assert_eq!(g.rules(), ["invalidate/reestablished"]);
    let g = guest();
    g.cpu(HERE);
    g.start(spec::PROTECTION_PAGE, 1);
    g.leaf(PTE);
    assert_eq!(g.rules(), ["invalidate/reestablished"]);
}

#[test]
fn a_page_that_is_another_is_wrong_at_once() {
    let g = guest();
    g.cpu(HERE);
    g.access(PTE, BOTH);
    g.leaf(PTE);
    g.clean();
    g.cpu(ELSEWHERE);
    g.access(PTE, ACCESS_READ);
    assert_eq!(g.rules(), ["mirror/wrong-page"]);
    assert!(g.oracle.violations()[0].summary.contains("reads 0x7f0000001000 at 0x12345000"));
    let g = guest();
    g.cpu(ELSEWHERE);
    g.leaf(PTE);
    assert_eq!(g.rules(), ["mirror/wrong-page"]);
}

#[test]
fn every_page_of_a_large_leaf_is_held_against_the_cpus() {
    let g = guest();
    let base = VA & !0x1f_ffff;
    let leaf = VALID | WRITE | HUGE | 0x4000_0000;
    for page in 0..512_u64 {
        let at = RAM + 0x3000 + page * 8;
        g.memory.snapshot().store_u64(at, (0x4000_0000 + (page << 12)) | 0x867).unwrap();
    }
    let compare = g.oracle.compare(g.ctx).unwrap();
    compare.range(base, 2 << 20, leaf, BOTH);
    g.clean();
    g.memory.snapshot().store_u64(RAM + 0x3000 + 511 * 8, ELSEWHERE).unwrap();
    compare.range(base, 0x1f_f000, leaf, BOTH);
    g.clean();
    compare.range(base, 0x1f_f008, leaf, BOTH);
    assert_eq!(g.rules(), ["mirror/wrong-page"]);
    assert_eq!(g.oracle.violations()[0].address, Some(base + 0x1f_f000));
    // And where the CPU has it in one piece.
    let g = guest();
    g.put(RAM + 0x2000, 1, 0x4000_08e7);
    g.oracle.compare(g.ctx).unwrap().range(base, 2 << 20, leaf, BOTH);
    g.clean();
    g.put(RAM + 0x2000, 1, 0x4000_08e5);
    g.oracle.compare(g.ctx).unwrap().range(base, 2 << 20, leaf, ACCESS_READ);
    g.clean();
    g.oracle.compare(g.ctx).unwrap().range(base, 2 << 20, leaf, BOTH);
    assert_eq!(g.rules(), ["mirror/excess-rights"]);
}

#[test]
fn rights_are_the_cpus() {
    let g = guest();
    g.cpu(HERE_READ);
    g.access(PTE, ACCESS_READ);
    g.leaf(PTE & !WRITE);
    g.clean();
    // While they are being changed, and because of soft-dirty books.
    g.start(spec::PROTECTION_VMA, 0);
    g.access(PTE, BOTH);
    g.end(0);
    g.start(spec::SOFT_DIRTY, 0);
    g.end(0);
    g.cpu(HERE_READ & !0x800);
    g.access(PTE, BOTH);
    g.clean();
    g.cpu(HERE_READ);
    g.access(PTE, BOTH);
    assert_eq!(g.rules(), ["mirror/excess-rights"]);
}

#[test]
fn rights_at_the_end_of_their_change() {
    let g = guest();
    g.cpu(HERE_READ);
    g.device(busy(&[(VA, PTE & !WRITE)]));
    g.start(spec::PROTECTION_VMA, 0);
    g.tell(witness::RANGE_END, 1, [VA, VA + 0xfff, u64::from(spec::PROTECTION_VMA), 100]);
    g.clean();
    g.device(busy(&[(VA, PTE)]));
    g.tell(witness::RANGE_END, 1, [VA, VA + 0xfff, u64::from(spec::PROTECTION_VMA), 100]);
    assert_eq!(g.rules(), ["invalidate/stale-pte"]);
    let g = guest();
    g.cpu(0x000f_ffff_edcb_a100);
    g.device(RangeView { tlb_entries: vec![(VA, PTE)], ..RangeView::default() });
    g.start(spec::PROTECTION_VMA, 0);
    g.tell(witness::RANGE_END, 1, [VA, VA + 0xfff, u64::from(spec::PROTECTION_VMA), 100]);
    assert_eq!(g.rules(), ["invalidate/stale-tlb"]);
}

#[test]
fn nothing_is_wrong_only_if_it_lasts() {
    let g = guest();
    g.access(PTE, BOTH);
    g.device(busy(&[(VA, PTE)]));
    g.beat(2);
    g.clean();
    g.cpu(HERE);
    g.beat(5);
    g.clean();
    g.cpu(0);
    g.leaf(PTE);
    g.beat(2);
    g.clean();
    g.beat(1);
    assert_eq!(g.rules(), ["mirror/wrong-page"]);
    assert!(g.oracle.violations()[0].summary.contains("nothing there for 3 heartbeats"));
    // Another page came, and the translation has stayed.
    let g = guest();
    g.access(PTE, BOTH);
    g.device(busy(&[(VA, PTE)]));
    g.cpu(ELSEWHERE);
    g.beat(1);
    assert_eq!(g.rules(), ["mirror/wrong-page"]);
    // The translation went.
    let g = guest();
    g.access(PTE, BOTH);
    g.device(RangeView::default());
    g.beat(9);
    g.clean();
}

#[test]
fn pages_that_are_moved() {
    let migration = |kind: u64| (!0x1_2345_u64 << 14 >> 5) | kind << 59;
    // By the driver itself: the old page may be read, the new one be there already.
    let g = guest();
    g.start(spec::MIGRATE | spec::OWNED, 0);
    g.end(0);
    g.cpu(migration(30));
    g.device(busy(&[(VA, PTE)]));
    g.access(PTE, ACCESS_READ);
    g.access(VALID | WRITE | VRAM | 0x3000, BOTH);
    g.beat(9);
    g.clean();
    g.access(PTE, BOTH);
    assert_eq!(g.rules(), ["mirror/excess-rights"]);
    // By the kernel: the driver has been told.
    let g = guest();
    g.cpu(migration(28));
    g.device(busy(&[(VA, PTE)]));
    g.access(PTE, ACCESS_READ);
    g.beat(3);
    assert_eq!(g.rules(), ["mirror/wrong-page"]);
}

#[test]
fn ends_are_judged_by_their_own_rules() {
    let g = guest();
    g.cpu(ELSEWHERE);
    g.stop(g.ctx);
    assert!(g.oracle.compare(g.ctx).is_none());
    g.leaf(PTE);
    g.clean();
    let g = guest();
    let compare = g.oracle.compare(g.ctx).unwrap();
    g.tell(witness::MM_RELEASED, 1, [0; 4]);
    g.cpu(ELSEWHERE);
    compare.page(VA, PTE, BOTH);
    assert!(g.oracle.compare(g.ctx).is_none());
    g.start(spec::UNMAP, 0);
    g.clean();
}

const WRITTEN: Written = Written { va: VA, frame: 0x1234_5000 };
/// One that the CPU has not written.
pub(super) const CLEAN: u64 = HERE & !0x40;

impl Guest {
    fn question(&self, slot: u64, word: u64) -> u64 {
        let at = QUESTIONS + 8 * (witness::QUESTION_WORDS * slot + word);
        self.memory.snapshot().atomic_u64(at, false).unwrap().load(SeqCst)
    }
    /// The witness has answered, and said of the pages of `clean` that they are.
    fn answer(&self, slot: u64, clean: u64) {
        let at = QUESTIONS + 8 * witness::QUESTION_WORDS * slot;
        self.memory.snapshot().store_u64(at, witness::QUESTIONS_ANSWERED | clean).unwrap();
    }
    /// Nothing is asked in the course of this.
    fn asks_nothing(&self, event: u32, slot: u64) {
        self.start(event, slot);
        assert_eq!(self.question(slot, 0) & !witness::QUESTIONS_ANSWERED, 0);
    }
    fn asked(&self, slot: u64) -> [u64; 4] {
        [0, 1, 2, 3].map(|word| self.question(slot, word))
    }
    pub(super) fn writes(&self) {
        *self.fake.2.lock() = vec![WRITTEN];
    }
    /// The witness says so about the invalidation in a slot.
    pub(super) fn says_clean(&self, slot: u64) {
        self.tell(witness::PAGE_CLEAN, 1, [VA, 0x1234_5000, self.ctx.0, 100 + slot]);
    }
    fn ends(&self) {
        self.oracle.ends_having_written(self.ctx, &|| std::mem::take(&mut self.fake.2.lock()));
        self.oracle.event(E::ContextReleased { ctx: self.ctx });
    }
}

/// A guest whose device has written, the CPU having not.
fn written() -> Guest {
    let g = guest();
    g.device(RangeView::default());
    g.cpu(CLEAN);
    g.writes();
    g
}

#[test]
fn what_the_device_has_written_is_dirty_when_it_goes() {
    let g = written();
    let question = [1, VA, 0x1234_5000, g.ctx.0];
    g.cpu(HERE);
    g.asks_nothing(spec::CLEAR, 1);
    g.writes();
    g.cpu(ELSEWHERE & !0x40);
    g.asks_nothing(spec::CLEAR, 1);
    g.writes();
    g.cpu(CLEAN);
    // Nothing is taken away.
    g.asks_nothing(spec::SOFT_DIRTY, 1);
    g.asks_nothing(spec::PROTECTION_VMA, 1);
    g.says_clean(1);
    g.clean();
    g.start(spec::CLEAR, 1);
    assert_eq!(g.asked(1), question);
    // Nobody has asked this.
    g.tell(witness::PAGE_CLEAN, 1, [VA, 0x1234_5000, 77, 101]);
    g.says_clean(2);
    g.clean();
    g.says_clean(1);
    assert_eq!(g.rules(), ["mirror/dirty-lost"]);
    g.answer(1, 1);
    g.asks_nothing(spec::CLEAR, 1);
}

#[test]
fn what_was_invalidated_since_it_was_asked_about_says_nothing() {
    let g = written();
    g.start(spec::CLEAR, 1);
    g.asks_nothing(spec::PROTECTION_PAGE, 2);
    g.says_clean(1);
    g.clean();
    // Or is another page by now, or dirty.
    for entry in [ELSEWHERE & !0x40, HERE, 0] {
        let g = written();
        g.start(spec::CLEAR, 1);
        g.cpu(entry);
        g.says_clean(1);
        g.clean();
    }
    // Or if something was missed.
    let g = written();
    g.start(spec::CLEAR, 1);
    g.tell(witness::HEARTBEAT, 0, [1, 1, 0, 0]);
    g.says_clean(1);
    g.clean();
}

#[test]
fn what_is_clean_when_rights_go_is_asked_of_once_more() {
    for (answer, again) in [(0, false), (1, true)] {
        let g = written();
        g.start(spec::PROTECTION_PAGE, 2);
        let question = [VA, 0x1234_5000, g.ctx.0];
        assert_eq!(g.asked(2), [&[1 | witness::QUESTIONS_STAYS], &question[..]].concat()[..]);
        g.says_clean(2);
        g.clean();
        // The context has ended since.
        g.ends();
        g.oracle.event(E::ContextUnbound { ctx: g.ctx, leak: Leak::default() });
        g.answer(2, answer);
        // The same slot serves once more.
        if again {
            g.start(spec::CLEAR, 2);
            assert_eq!(g.asked(2), [&[1], &question[..]].concat()[..]);
            g.says_clean(2);
            assert_eq!(g.rules(), ["mirror/dirty-lost"]);
            g.answer(2, 1);
        }
        g.asks_nothing(spec::CLEAR, 2);
    }
}

#[test]
fn what_an_ended_context_has_written_is_asked_of_when_it_goes() {
    let g = written();
    g.ends();
    g.start(spec::CLEAR, 1);
    assert_eq!(g.asked(1), [1, VA, 0x1234_5000, g.ctx.0]);
    type Act<'a> = &'a dyn Fn(&Guest);
    let turned_off: Act<'_> = &|g| g.oracle.event(E::Reset);
    // The driver's own doing: it may come home to the same place.
    let moves: Act<'_> = &|g| g.start(spec::MIGRATE | spec::OWNED, 2);
    let moves_and_writes: Act<'_> = &|g| {
        g.start(spec::MIGRATE | spec::OWNED, 2);
        g.writes();
    };
    for (act, ends) in [(turned_off, true), (moves, true), (moves, false), (moves_and_writes, false)] {
        let g = written();
        if ends {
            g.ends();
        }
        act(&g);
        g.asks_nothing(spec::CLEAR, 1);
    }
    let g = written();
    g.ends();
    g.tell(witness::MM_RELEASED, 1, [0; 4]);
    assert!(g.oracle.dirt.lock().is_empty());
    g.writes();
    g.ends();
    assert!(g.oracle.dirt.lock().is_empty(), "it has ended");
}

#[test]
fn who_has_no_notifier_any_more_may_have_written_before() {
    let g = written();
    g.tell(witness::NOTIFIER_REMOVED, 1, [2, 0, 0, 0]);
    g.start(spec::PROTECTION_PAGE, 1);
    assert_eq!(g.asked(1)[1..], [VA, 0x1234_5000, g.ctx.0]);
    // The page was dirty, and is clean now: the context has told of it in time.
    g.answer(1, 0);
    g.ends();
    g.asks_nothing(spec::CLEAR, 1);
}

#[test]
fn a_translation_to_nothing_is_wrong_when_its_place_goes() {
    let unbound = |g: &Guest| {
        g.oracle.event(E::ContextReleased { ctx: g.ctx });
        g.oracle.event(E::ContextUnbound { ctx: g.ctx, leak: Leak::default() });
    };
    let beat = |g: &Guest| g.tell(witness::HEARTBEAT, 0, [0; 4]);
    type Act<'a> = &'a dyn Fn(&Guest);
    let unmap: Act<'_> = &|g| g.start(spec::UNMAP, 0);
    let exit: Act<'_> = &|g| g.tell(witness::MM_RELEASED, 1, [0; 4]);
    let reap: Act<'_> = &|g| g.start(spec::UNMAP | spec::LEAVING, 0);
    let nothing: Act<'_> = &|_| {};
    for (before, act, wrong) in [
        (nothing, unmap, true),
        (nothing, exit, true),
        // The leaf is gone, and then the context.
        (&beat, unmap, true),
        (&unbound, unmap, true),
        (&unbound, exit, true),
        // The page has been taken away in between, so it may have been there.
        (&|g| g.start(spec::CLEAR, 1), unmap, false),
        (&|g| g.start(spec::MIGRATE | spec::OWNED, 1), exit, false),
        (&|g| g.start(spec::PROTECTION_VMA, 1), exit, true),
        // A reaper is not alone.
        (nothing, reap, false),
        // It had been gone for a moment only.
        (&|g| g.cpu(HERE), unmap, false),
        (&|g| g.cpu(HERE), exit, false),
        (
            &|g| {
                unbound(g);
                g.cpu(HERE_READ)
            },
            exit,
            false,
        ),
        // A new leaf stands there, and is right.
        (
            &|g| {
                g.cpu(HERE);
                g.leaf(PTE);
                g.cpu(0)
            },
            exit,
            false,
        ),
    ] as [(Act<'_>, Act<'_>, bool); 13]
    {
        let g = guest();
        g.cpu(0);
        g.leaf(PTE);
        g.clean();
        before(&g);
        g.clean();
        act(&g);
        assert_eq!(g.rules(), if wrong { &["mirror/wrong-page"][..] } else { &[] });
        // Once.
        g.tell(witness::MM_RELEASED, 1, [0; 4]);
        assert_eq!(g.rules().len(), usize::from(wrong));
    }
}

/// A device-private entry.
fn private(frame: u64) -> u64 {
    (!(frame >> 12) << 14 >> 5) | 27 << 59
}

#[test]
fn a_page_of_vram_is_nobodys_when_it_is_given_back() {
    use vgpu_spec::handle::Kind::DataPage;
    let page = Handle::new(DataPage, 3, 1);
    let again = Handle::new(DataPage, 3, 2);
    let was = private(0x9_9999_9000);
    let beats = |g: &Guest, n| (0..n).for_each(|_| g.tell(witness::HEARTBEAT, 0, [0; 4]));
    type Act<'a> = &'a dyn Fn(&Guest);
    let lasts: Act<'_> = &|g| beats(g, 3);
    let exits: Act<'_> = &|g| g.tell(witness::MM_RELEASED, 1, [0; 4]);
    let granted: Act<'_> = &|g| {
        g.oracle.event(E::DataGranted { ctx: g.ctx, page: again });
        g.cpu(was);
        beats(g, 5);
    };
    for (then, act, wrong) in [
        (was, lasts, true),
        (was, exits, true),
        (was, granted, true),
        (was, &|g| beats(g, 2), false),
        // It was about to be cleared.
        (
            was,
            &|g| {
                g.cpu(0);
                beats(g, 5)
            },
            false,
        ),
        (
            was,
            &|g| {
                g.cpu(0);
                g.tell(witness::MM_RELEASED, 1, [0; 4])
            },
            false,
        ),
        // And the page is soon there again, in a new life.
        (
            was,
            &|g| {
                g.cpu(0);
                granted(g)
            },
            false,
        ),
        (
            was,
            &|g| {
                g.cpu(0);
                g.oracle.event(E::DataReturned { ctx: g.ctx, page: again });
                g.cpu(was);
                beats(g, 5)
            },
            false,
        ),
        // A reaper clears it while the address space is released.
        (
            was,
            &|g| {
                g.start(spec::UNMAP | spec::LEAVING, 1);
                exits(g)
            },
            false,
        ),
        (private(0x9_8888_8000), lasts, false),
        (HERE, lasts, false),
        (0, exits, false),
    ] as [(u64, Act<'_>, bool); 12]
    {
        let g = guest();
        g.cpu(was);
        g.leaf(VALID | WRITE | VRAM | 0x3000);
        g.cpu(then);
        g.oracle.event(E::DataReturned { ctx: g.ctx, page });
        g.clean();
        act(&g);
        assert_eq!(g.rules(), if wrong { &["memory/device-page-outlives-owner"][..] } else { &[] });
        beats(&g, 5);
        g.oracle.event(E::DataReturned { ctx: g.ctx, page });
        assert!(g.rules().len() <= 1);
    }
    let g = guest();
    g.cpu(was);
    g.leaf(VALID | WRITE | VRAM | 0x3000);
    g.exit(1);
    g.oracle.event(E::DataReturned { ctx: g.ctx, page });
    beats(&g, 5);
    g.clean();
}

#[test]
fn records_that_make_no_sense() {
    let g = guest();
    for arg in [[2, 1, 0, 5], [1, 2, 99, 5], [1, 2, 0, 0]] {
        g.tell(witness::RANGE_START, 1, arg);
        g.tell(witness::RANGE_END, 1, arg);
    }
    g.tell(witness::RANGE_START, 9, [0, u64::MAX, u64::MAX << 32, 1]);
    g.tell(witness::RANGE_END, 9, [0, u64::MAX, 2, 1]);
    g.tell(witness::CPU_FORMAT, 0, [0; 4]);
    assert_eq!(g.oracle.counters().bad_records, 9);
    g.tell(witness::RANGE_SLOTS, 0, [u64::MAX - 3, u64::MAX, 0, 0]);
    g.tell(witness::RANGE_START, 1, [0, u64::MAX, u64::MAX << 32, 1]);
    g.leaf(PTE & pte::ADDRESS);
    assert!(g.oracle.violations().is_empty());
}
