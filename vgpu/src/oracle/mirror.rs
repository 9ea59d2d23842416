// SPDX-License-Identifier: MIT OR Apache-2.0
//! Holding the device's translations against the CPU's page tables.
//!
//! An engine asks [`Oracle::compare`] once a step, and holds each page that the step touches against the CPU's tables before
//! and after it has touched it, both inside the bracket that a drain waits for. As long as the driver keeps its promise, the
//! CPU cannot change the entry in that time: who wants to change it first has the driver invalidate, and that waits for the
//! drain. What goes on behind the kernel's back for a moment is told apart by [`super::suspect`].

use std::cell::Cell;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};

use vgpu_spec::fault::{ACCESS_ATOMIC, ACCESS_READ, ACCESS_WRITE};
use vgpu_spec::handle::Handle;
use vgpu_spec::pte::{self, leaf_address, leaf_shift};

use super::input::Input;
use super::{Oracle, Rule};
use crate::cpu::{Format, Hint, Kind, Page, Space};
use crate::memory::Snapshot;

/// Pages of one range held against the CPU's at most: those of a 2 MiB leaf.
const PAGES_MOST: u32 = 512;

/// Which address space a context mirrors, readable without a lock.
#[derive(Default)]
struct Slot {
    /// The context's handle, or 0.
    ctx: AtomicU64,
    /// Address of the top table.
    root: AtomicU64,
    /// There is something about the context that its table changes are to be told for: [`Mirrors::attend`].
    attention: AtomicU32,
}

/// By context index.
pub(super) struct Mirrors(Box<[Slot]>);

impl Mirrors {
    pub(super) fn new(contexts: u32) -> Self {
        Self((0..contexts.min(Handle::MAX_INDEX)).map(|_| Slot::default()).collect())
    }

    fn slot(&self, ctx: Handle) -> Option<&Slot> {
        self.0.get(ctx.index() as usize)
    }

    /// From now on accesses of `ctx` are held against the tables at `root`.
    pub(super) fn set(&self, ctx: Handle, root: u64) {
        if let Some(slot) = self.slot(ctx) {
            slot.root.store(root, SeqCst);
            slot.ctx.store(ctx.0, SeqCst);
        }
    }

    /// Nothing is held against anything for `ctx` any more.
    pub(super) fn clear(&self, ctx: Handle) {
        if let Some(slot) = self.slot(ctx) {
            if slot.ctx.compare_exchange(ctx.0, 0, SeqCst, SeqCst).is_ok() {
                slot.attention.store(0, SeqCst);
            }
        }
    }

    pub(super) fn clear_all(&self) {
        for slot in &self.0 {
            slot.ctx.store(0, SeqCst);
            slot.attention.store(0, SeqCst);
        }
    }

    #[inline]
    fn root(&self, ctx: Handle) -> Option<u64> {
        let slot = self.slot(ctx)?;
        let root = slot.root.load(SeqCst);
        (slot.ctx.load(SeqCst) == ctx.0 && root != 0).then_some(root)
    }

    /// Whether table changes of `ctx` are to be told to the state.
    #[inline]
    pub(super) fn wants(&self, ctx: Handle) -> bool {
        self.slot(ctx).is_some_and(|slot| slot.attention.load(SeqCst) != 0)
    }

    pub(super) fn attend(&self, ctx: Handle, wanted: bool) {
        if let Some(slot) = self.slot(ctx) {
            slot.attention.store(wanted.into(), SeqCst);
        }
    }
}

/// What a page that the device translates to is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The CPU says the same.
    Good,
    /// The CPU has nothing there at this moment.
    Absent,
    /// The page is being moved.
    Moving,
    /// A rule is broken, if the entry stays so.
    Wrong(Rule),
}

/// Holds a device's leaf, used for `access` at `va`, against the CPU's entry.
#[inline]
pub(super) fn judge(leaf: u64, va: u64, access: u32, page: &Page, coherent_atomics: bool) -> Verdict {
    let write = access & (ACCESS_WRITE | ACCESS_ATOMIC) != 0;
    let frame = leaf_address(leaf, va) & pte::ADDRESS;
    if leaf & pte::VRAM == 0 && page.kind == Kind::Present && page.frame == frame {
        return match (write && !page.write, access & ACCESS_ATOMIC != 0 && !coherent_atomics) {
            (true, _) => Verdict::Wrong(Rule::MirrorExcessRights),
            (_, true) => Verdict::Wrong(Rule::MirrorAtomic),
            _ => Verdict::Good,
        };
    }
    unusual(leaf, frame, write, page)
}

#[cold]
fn unusual(leaf: u64, frame: u64, write: bool, page: &Page) -> Verdict {
    use Kind as K;
    let vram = leaf & pte::VRAM != 0;
    match page.kind {
        K::None | K::Swap | K::Unsettled => Verdict::Absent,
        // Nothing can be said of tables that cannot be read.
        K::Unreadable => Verdict::Good,
        K::Migration | K::MigrationWrite => Verdict::Moving,
        K::DevicePrivateWrite if vram => Verdict::Good,
        K::DevicePrivate if vram => {
            if write {
                Verdict::Wrong(Rule::MirrorExcessRights)
            } else {
                Verdict::Good
            }
        }
        K::DeviceExclusive if !vram && page.frame == frame => Verdict::Good,
        K::ProtNone if !vram && page.frame == frame => Verdict::Wrong(Rule::MirrorExcessRights),
        _ => Verdict::Wrong(Rule::MirrorWrongPage),
    }
}

/// What a leaf itself allows, as if it were used so.
pub(super) fn leaf_access(leaf: u64) -> u32 {
    if leaf & (pte::WRITE | pte::ATOMIC) != 0 { ACCESS_READ | ACCESS_WRITE } else { ACCESS_READ }
}

/// What is found wrong with a translation, for the state to judge.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mismatch {
    pub(super) ctx: Handle,
    pub(super) va: u64,
    pub(super) leaf: u64,
    pub(super) access: u32,
    /// It is a leaf that was set, and not yet used.
    pub(super) unused: bool,
    pub(super) page: Page,
    pub(super) verdict: Verdict,
}

/// Holds the accesses of one step against the CPU's tables.
pub struct Compare<'o> {
    oracle: &'o Oracle,
    ctx: Handle,
    space: Space,
    memory: Snapshot,
    near: Cell<Hint>,
}

impl Compare<'_> {
    /// The step has touched its pages: they are walked once more, from the top.
    #[inline]
    pub fn again(&self) {
        self.near.take();
    }

    #[inline]
    fn walk(&self, va: u64) -> Page {
        let mut hint = self.near.get();
        let page = self.space.walk_near(&self.memory, va, &mut hint);
        self.near.set(hint);
        page
    }

    /// Holds an access to the page of `va` through `leaf` against the CPU's. To be called inside the bracket that a drain
    /// waits for.
    #[inline]
    pub fn page(&self, va: u64, leaf: u64, access: u32) {
        let page = self.walk(va);
        if judge(leaf, va, access, &page, self.oracle.config.coherent_atomics) != Verdict::Good {
            self.look_again(va, leaf, access, false);
        }
    }

    /// The same for all pages of `[va, va + bytes)`, which lie in one leaf.
    #[inline]
    pub fn range(&self, va: u64, bytes: u64, leaf: u64, access: u32) {
        self.each(va, bytes, leaf, access, false);
    }

    fn each(&self, va: u64, bytes: u64, leaf: u64, access: u32, unused: bool) {
        let Some(last) = bytes.checked_sub(1).and_then(|more| va.checked_add(more)) else { return };
        let mut at = va;
        for _ in 0..PAGES_MOST {
            let page = self.walk(at);
            if judge(leaf, at, access, &page, self.oracle.config.coherent_atomics) != Verdict::Good {
                // A leaf that was set is in doubt as a whole: not each of its pages by itself, for a command waits here.
                if self.look_again(at, leaf, access, unused) == Verdict::Absent && unused {
                    return;
                }
            } else if unused && leaf & pte::VRAM != 0 {
                self.oracle.learn_private(self.ctx, at, leaf_address(leaf, at), &page);
            }
            // What follows in the same entry of the CPU's follows in the same leaf of the device's.
            match (at | ((1 << page.shift.min(leaf_shift(leaf))) - 1)).checked_add(1) {
                Some(next) if next <= last => at = next,
                _ => return,
            }
        }
    }

    /// It did not agree: walks until the CPU's entry stands still, and has it judged if it still does not.
    #[cold]
    fn look_again(&self, va: u64, leaf: u64, access: u32, unused: bool) -> Verdict {
        let page = self.space.settled(&self.memory, va);
        let verdict = judge(leaf, va, access, &page, self.oracle.config.coherent_atomics);
        if verdict != Verdict::Good {
            self.oracle.mismatch(Mismatch { ctx: self.ctx, va, leaf, access, unused, page, verdict });
        }
        verdict
    }

    /// A leaf was set: it must be right before it is used.
    pub(super) fn leaf(&self, va: u64, leaf: u64) {
        self.each(va, 1 << leaf_shift(leaf), leaf, leaf_access(leaf), true);
    }

    /// What the CPU has for `va`, when it stands still, and what a translation is worth.
    pub(super) fn judged(&self, va: u64, leaf: u64, access: u32) -> (Page, Verdict) {
        let page = self.space.settled(&self.memory, va);
        (page, judge(leaf, va, access, &page, self.oracle.config.coherent_atomics))
    }
}

impl Oracle {
    /// For a step of `ctx`: what its accesses are to be held against. `None` if it is not known which address space the context
    /// mirrors, or the oracle is not enabled.
    ///
    /// No lock, no allocation.
    #[inline]
    #[must_use]
    pub fn compare(&self, ctx: Handle) -> Option<Compare<'_>> {
        let root = self.mirrors.root(ctx)?;
        let (format, memory) = self.tables()?;
        self.compared.fetch_add(1, Relaxed);
        Some(Compare { oracle: self, ctx, space: Space { root, format }, memory, near: Cell::default() })
    }

    #[inline]
    pub(super) fn tables(&self) -> Option<(Format, Snapshot)> {
        let format = **self.format.load().as_ref()?;
        Some((format, self.memory.get()?.snapshot()))
    }

    #[cold]
    fn mismatch(&self, mismatch: Mismatch) {
        let ctx = mismatch.ctx;
        self.judge_settled(&Input::Mismatch(mismatch), |state| state.mm_of(ctx));
    }
}

#[cfg(test)]
mod tests {
    use vgpu_spec::pte::{HUGE, VALID, VRAM, WRITE};

    use super::*;

    fn page(kind: Kind, frame: u64, write: bool) -> Page {
        Page { kind, frame, write, dirty: false, soft_clean: false, raw: 1, shift: 12 }
    }

    #[test]
    fn what_a_translation_is_worth() {
        use Verdict::{Absent, Good, Moving, Wrong};
        const READ: u32 = ACCESS_READ;
        const BOTH: u32 = ACCESS_READ | ACCESS_WRITE;
        let rights = Wrong(Rule::MirrorExcessRights);
        let elsewhere = Wrong(Rule::MirrorWrongPage);
        let leaf = VALID | WRITE | 0x5000;
        let huge = VALID | WRITE | HUGE | 0x20_0000;
        let vram = VALID | WRITE | VRAM | 0x5000;
        for (leaf, access, is, verdict) in [
            (leaf, BOTH, page(Kind::Present, 0x5000, true), Good),
            (leaf, READ, page(Kind::Present, 0x5000, false), Good),
            (leaf, BOTH, page(Kind::Present, 0x5000, false), rights),
            (leaf, READ, page(Kind::Present, 0x6000, true), elsewhere),
            (huge, BOTH, page(Kind::Present, 0x20_3000, true), Good),
            (huge, BOTH, page(Kind::Present, 0x20_0000, true), elsewhere),
            (leaf, READ, page(Kind::None, 0, false), Absent),
            (leaf, READ, page(Kind::Swap, 0, false), Absent),
            (leaf, READ, page(Kind::MigrationWrite, 0x5000, true), Moving),
            (leaf, READ, page(Kind::ProtNone, 0x5000, false), rights),
            (leaf, READ, page(Kind::ProtNone, 0x6000, false), elsewhere),
            (leaf, BOTH, page(Kind::DeviceExclusive, 0x5000, false), Good),
            (leaf, BOTH, page(Kind::DeviceExclusive, 0x6000, false), elsewhere),
            (leaf, READ, page(Kind::DevicePrivate, 0x5000, false), elsewhere),
            (vram, READ, page(Kind::DevicePrivate, 0x9000, false), Good),
            (vram, BOTH, page(Kind::DevicePrivate, 0x9000, false), rights),
            (vram, BOTH, page(Kind::DevicePrivateWrite, 0x9000, true), Good),
            (vram, READ, page(Kind::Present, 0x5000, true), elsewhere),
            (leaf, READ, page(Kind::Unreadable, 0, false), Good),
        ] {
            assert_eq!(
                judge(leaf, 0x7f00_0000_3123, access, &is, true),
                verdict,
                "{leaf:#x} {access} {is:?}"
            );
        }
        let here = page(Kind::Present, 0x5000, true);
        assert_eq!(judge(leaf, 0, BOTH | ACCESS_ATOMIC, &here, true), Good);
        assert_eq!(judge(leaf, 0, BOTH | ACCESS_ATOMIC, &here, false), Wrong(Rule::MirrorAtomic));
        assert_eq!(judge(leaf, 0, BOTH, &here, false), Good);
    }

    #[test]
    fn a_context_is_compared_while_it_is_known() {
        let mirrors = Mirrors::new(4);
        let (old, new) = (Handle(1 << 32 | 2), Handle(2 << 32 | 2));
        mirrors.set(old, 0x1000);
        assert_eq!((mirrors.root(old), mirrors.root(new)), (Some(0x1000), None));
        mirrors.attend(old, true);
        mirrors.set(new, 0x2000);
        mirrors.clear(old);
        assert_eq!((mirrors.root(old), mirrors.root(new)), (None, Some(0x2000)));
        mirrors.clear(new);
        assert!(mirrors.root(new).is_none() && !mirrors.wants(new));
        assert!(mirrors.root(Handle(9)).is_none());
    }
}
