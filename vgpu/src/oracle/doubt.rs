// SPDX-License-Identifier: MIT OR Apache-2.0
//! Translations that look wrong and may be right, until time tells.
//!
//! Some paths of the kernel make an entry none for a moment and tell nobody: khugepaged's collapse of a part of a PMD, uprobes,
//! DAMON on hugetlb, MADV_COLD before 2024. They have the entry back within microseconds of their own time. So a translation to
//! a page that the CPU does not have is wrong if it is still there, and the page still not, after some guest heartbeats.
//!
//! And it is wrong, at once, if the place is unmapped or its address space released while the CPU still has nothing there, be
//! the translation gone by then or its context too. An entry only goes for good after an invalidation, and each one ends the
//! doubts in its range: so the CPU has had nothing since before the doubt arose. Who makes entries none for a moment is not at
//! work then: munmap and mremap come with mmap_lock held for writing, or have just had it so, and __mmput() has seen khugepaged
//! and all others off before it calls release (khugepaged_exit(), ksm_exit(), exit_mmap() in kernel/fork.c and mm/mmap.c).

use vgpu_spec::handle::Handle;
use vgpu_spec::{pte, range as spec};

use super::input::Input;
use super::mirror::{Mirrors, Mismatch, Verdict};
use super::range::Range;
use super::state::{After, Finding, State};
use super::trace::leaf_last;
use super::{LOOKED_AT, Oracle, Rule, state};
use crate::cpu::{Kind, Page, Space};

/// Doubts of one context kept at most, and of all contexts that are no more.
const MOST: usize = 64;
/// Heartbeats for which the CPU must have had nothing.
const ABSENT_BEATS: u32 = 3;
/// Heartbeats for which a translation that nobody uses may outlive an invalidation.
const STALE_BEATS: u32 = 10;

/// Why a translation is in doubt.
#[derive(Clone, Debug)]
pub(super) enum Cause {
    /// An invalidation's start has returned with it still there, and nobody uses it. With what is to be reported then.
    Stale(Finding),
    /// The CPU has nothing there.
    Absent,
}

/// A translation in doubt.
#[derive(Clone, Debug)]
pub(super) struct Doubt {
    pub(super) va: u64,
    pub(super) leaf: u64,
    pub(super) cause: Cause,
    /// Heartbeats that it has lasted.
    pub(super) beats: u32,
    /// The translation is gone. What the CPU had there when it was in use will show.
    pub(super) past: bool,
}

impl Doubt {
    pub(super) fn new(va: u64, leaf: u64, cause: Cause) -> Self {
        Self { va, leaf, cause, beats: 0, past: false }
    }

    fn is_absent_in(&self, start: u64, last: u64) -> bool {
        matches!(self.cause, Cause::Absent) && start <= self.va && self.va <= last
    }
}

/// A context's.
#[derive(Debug, Default)]
pub(super) struct Doubts(Vec<Doubt>);

/// Of contexts that are no more, with their address spaces.
#[derive(Debug, Default)]
pub(super) struct Orphans(Vec<(u64, Handle, Doubt)>);

impl Doubts {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
    /// Whether it is a new one.
    pub(super) fn add(&mut self, doubt: Doubt) -> bool {
        let same = |other: &Doubt| {
            other.va >> pte::PAGE_SHIFT == doubt.va >> pte::PAGE_SHIFT
                && other.leaf == doubt.leaf
                && matches!(
                    (&other.cause, &doubt.cause),
                    (Cause::Absent, Cause::Absent) | (Cause::Stale(_), Cause::Stale(_))
                )
        };
        if self.0.len() >= MOST {
            if let Some(past) = self.0.iter().position(|other| other.past) {
                self.0.remove(past);
            }
        }
        let new = self.0.len() < MOST && !self.0.iter().any(same);
        if new {
            self.0.push(doubt);
        }
        new
    }
    /// A new leaf stands there.
    pub(super) fn forget(&mut self, va: u64, last: u64) {
        self.0.retain(|doubt| doubt.va > last || leaf_last(doubt.va, doubt.leaf) < va);
    }
    /// The report of a translation that outlived an invalidation.
    fn stale(&self, va: u64, leaf: u64) -> Option<&Finding> {
        self.0.iter().find_map(|doubt| match &doubt.cause {
            Cause::Stale(finding)
                if doubt.leaf == leaf && doubt.va <= va && va <= leaf_last(doubt.va, leaf) =>
            {
                Some(finding)
            }
            _ => None,
        })
    }
}

/// What a look at a doubt has shown.
#[derive(Clone, Copy, Debug)]
pub(super) enum Outcome {
    /// It is settled: translation and page agree, or the translation is gone.
    Settled,
    /// Nothing has changed.
    Lasting,
    /// The translation is gone, and the CPU still has nothing.
    Past,
    /// The place goes, and the CPU has had nothing there all along.
    Never,
    /// The CPU has another page there, or less rights.
    Wrong(Rule, Page),
}

fn verb(access: u32) -> &'static str {
    use vgpu_spec::fault::{ACCESS_ATOMIC, ACCESS_WRITE};
    match (access & ACCESS_ATOMIC != 0, access & ACCESS_WRITE != 0) {
        (true, _) => "updates atomically",
        (_, true) => "writes",
        _ => "reads",
    }
}

impl State {
    /// A translation and the CPU's tables, when they stood still, did not agree. Whether it left a new doubt.
    pub(super) fn mismatch(&mut self, m: &Mismatch, mirrors: &Mirrors, found: &mut Vec<Finding>) -> bool {
        let Some(context) = self.contexts.get(&m.ctx.0) else { return false };
        // The ends of address spaces have rules of their own; and their tables may have been freed while we walked.
        let judged = matches!(context.after, After::Alive) && !context.released && !context.unnotified;
        let Some(id) = context.mm.filter(|_| judged) else { return false };
        let stale = context.doubts.stale(m.va, m.leaf).filter(|_| !m.unused).cloned();
        let Some(mm) = self.mms.get_mut(&id).filter(|mm| !mm.released) else { return false };
        if let Some(mut finding) = stale {
            finding.summary += "; and now it is used";
            found.push(finding);
            return false;
        }
        let writes = m.access & !vgpu_spec::fault::ACCESS_READ != 0;
        let vram = m.leaf & pte::VRAM != 0;
        match m.verdict {
            Verdict::Good => {}
            Verdict::Wrong(Rule::MirrorExcessRights) => {
                if !mm.changing_rights(m.va) && !self.excused(id, &m.page) {
                    found.push(self.wrong(id, m, Rule::MirrorExcessRights));
                }
            }
            Verdict::Wrong(rule) => found.push(self.wrong(id, m, rule)),
            // The driver moves the page itself: where it goes may be mapped already, where it was may be read until it is there.
            Verdict::Moving if mm.moved_by_owner(m.va) => {
                if writes && !vram && m.page.frame == pte::leaf_address(m.leaf, m.va) & pte::ADDRESS {
                    found.push(self.wrong(id, m, Rule::MirrorExcessRights));
                }
            }
            Verdict::Moving if vram => {}
            Verdict::Moving | Verdict::Absent => return self.doubt(m, mirrors),
        }
        false
    }

    fn doubt(&mut self, m: &Mismatch, mirrors: &Mirrors) -> bool {
        let Some(context) = self.contexts.get_mut(&m.ctx.0) else { return false };
        mirrors.attend(m.ctx, true);
        context.doubts.add(Doubt::new(m.va, m.leaf, Cause::Absent))
    }

    fn wrong(&self, id: u64, m: &Mismatch, rule: Rule) -> Finding {
        let (ctx, va) = (m.ctx, m.va);
        let mm = self.mm_name(Some(id));
        let frame = pte::leaf_address(m.leaf, va) & pte::ADDRESS;
        let memory = if m.leaf & pte::VRAM != 0 { "VRAM " } else { "" };
        let who = if m.unused {
            format!("for {ctx} a leaf was set at {va:#x} that leads to {memory}{frame:#x}")
        } else {
            format!("{ctx} {} {va:#x} at {memory}{frame:#x}", verb(m.access))
        };
        let cpu = match rule {
            Rule::MirrorExcessRights => format!("the CPU has no such right (entry {:#x})", m.page.raw),
            Rule::MirrorAtomic => "that page is not taken for the device's atomics alone".to_owned(),
            _ => format!("the CPU has {:#x} (entry {:#x}, {:?})", m.page.frame, m.page.raw, m.page.kind),
        };
        Finding {
            rule,
            ctx: Some(ctx),
            mm: Some(id),
            va: Some(va),
            frame: Some(frame),
            summary: format!("{who}, but in {mm} {cpu}"),
        }
    }

    /// Doubts to look at, at a heartbeat.
    pub(super) fn doubts(&self) -> Vec<(Handle, Doubt)> {
        let of = |(&handle, context): (&u64, &state::Context)| {
            let lasting = context.doubts.0.iter().filter(|doubt| !doubt.past);
            lasting.map(|doubt| (Handle(handle), doubt.clone())).collect::<Vec<_>>()
        };
        self.contexts.iter().filter(|(_, context)| !context.doubts.is_empty()).flat_map(of).collect()
    }

    /// Doubts about a range that goes, or about all of an address space, for want of a page of the CPU's; and its top table.
    fn absent(&self, id: u64, (start, last): (u64, u64)) -> (u64, Vec<(Handle, Doubt)>) {
        let Some(mm) = self.mms.get(&id).filter(|mm| !mm.released) else { return (0, Vec::new()) };
        let mut doubts = Vec::new();
        for (&handle, context) in self.contexts.iter().filter(|(_, context)| context.mm == Some(id)) {
            let here = context.doubts.0.iter().filter(|doubt| doubt.is_absent_in(start, last));
            doubts.extend(here.map(|doubt| (Handle(handle), doubt.clone())));
        }
        let orphans =
            self.orphans.0.iter().filter(|(of, _, doubt)| *of == id && doubt.is_absent_in(start, last));
        doubts.extend(orphans.map(|(_, ctx, doubt)| (*ctx, doubt.clone())));
        (mm.root, doubts)
    }

    /// An invalidation after which entries may be gone for good: what was in doubt there is so no more.
    pub(super) fn doubts_over(&mut self, id: u64, range: &Range) {
        if matches!(range.event, spec::PROTECTION_VMA | spec::PROTECTION_PAGE | spec::SOFT_DIRTY) {
            return;
        }
        for context in self.contexts.values_mut().filter(|context| context.mm == Some(id)) {
            context.doubts.0.retain(|doubt| !doubt.is_absent_in(range.start, range.last));
        }
        self.orphans.0.retain(|(of, _, doubt)| *of != id || !doubt.is_absent_in(range.start, range.last));
    }

    /// A context is no more. The doubts that are left may still be settled.
    pub(super) fn doubts_orphaned(&mut self, ctx: Handle, context: &mut state::Context) {
        let Some(id) = context.mm.filter(|_| !context.doubts.is_empty()) else { return };
        for doubt in context.doubts.0.drain(..).filter(|doubt| doubt.is_absent_in(0, u64::MAX)) {
            if self.orphans.0.len() >= MOST {
                self.orphans.0.remove(0);
            }
            self.orphans.0.push((id, ctx, Doubt { past: true, ..doubt }));
        }
    }

    /// Nothing in an address space can be in doubt any more.
    pub(super) fn doubts_end(&mut self, id: u64) {
        self.orphans.0.retain(|(of, ..)| *of != id);
    }

    /// The place of a doubt goes, and the CPU has nothing there.
    fn never(&mut self, ctx: Handle, doubt: &Doubt, found: &mut Vec<Finding>) {
        let same = |other: &Doubt| {
            (other.va, other.leaf) == (doubt.va, doubt.leaf) && matches!(other.cause, Cause::Absent)
        };
        let context = self.contexts.get_mut(&ctx.0).and_then(|context| {
            let place = context.doubts.0.iter().position(same)?;
            context.doubts.0.swap_remove(place);
            context.mm
        });
        let id = context.or_else(|| {
            let place = self.orphans.0.iter().position(|(_, of, doubt)| *of == ctx && same(doubt))?;
            Some(self.orphans.0.swap_remove(place).0)
        });
        let Some(id) = id.filter(|id| self.mms.get(id).is_some_and(|mm| !mm.released)) else { return };
        let (va, frame) = (doubt.va, pte::leaf_address(doubt.leaf, doubt.va) & pte::ADDRESS);
        let mm = self.mm_name(Some(id));
        let summary = format!(
            "{ctx} was given a translation of {va:#x} to {frame:#x}, but in {mm} the CPU had nothing there, then or until the place went"
        );
        let (va, frame) = (Some(va), Some(frame));
        found.push(Finding { rule: Rule::MirrorWrongPage, ctx: Some(ctx), mm: Some(id), va, frame, summary });
    }

    /// A doubt was looked at.
    pub(super) fn doubted(&mut self, ctx: Handle, doubt: &Doubt, outcome: Outcome, found: &mut Vec<Finding>) {
        if matches!(outcome, Outcome::Never) {
            self.never(ctx, doubt, found);
            return;
        }
        let Some(context) = self.contexts.get_mut(&ctx.0) else { return };
        let mm = context.mm.and_then(|id| Some((id, self.mms.get(&id)?)));
        let Some((id, _)) = mm.filter(|(_, mm)| !mm.released) else {
            context.doubts.0.clear();
            return;
        };
        let judged = matches!(context.after, After::Alive) && !context.released && !context.unnotified;
        let place =
            context.doubts.0.iter().position(|other| {
                other.va == doubt.va && other.leaf == doubt.leaf && other.beats == doubt.beats
            });
        // A leaf was set anew meanwhile.
        let Some(place) = place else { return };
        if matches!(outcome, Outcome::Past) {
            context.doubts.0[place].past = true;
            return;
        }
        if !judged || matches!(outcome, Outcome::Settled) {
            context.doubts.0.swap_remove(place);
            return;
        }
        let kept = &mut context.doubts.0[place];
        kept.beats += 1;
        let beats = kept.beats;
        let finding = match (&kept.cause, outcome) {
            (Cause::Stale(finding), _) if beats >= STALE_BEATS => Some(finding.clone()),
            (Cause::Absent, Outcome::Lasting) if beats >= ABSENT_BEATS => None,
            (Cause::Absent, Outcome::Wrong(..)) => None,
            _ => return,
        };
        context.doubts.0.swap_remove(place);
        found.push(finding.unwrap_or_else(|| {
            let (va, leaf) = (doubt.va, doubt.leaf);
            let frame = pte::leaf_address(leaf, va) & pte::ADDRESS;
            let (rule, cpu) = match outcome {
                Outcome::Wrong(rule, page) => {
                    (rule, format!("has {:#x} there (entry {:#x})", page.frame, page.raw))
                }
                _ => (Rule::MirrorWrongPage, format!("has had nothing there for {beats} heartbeats")),
            };
            let mm = self.mm_name(Some(id));
            let summary = format!("{ctx} translates {va:#x} to {frame:#x}, but in {mm} the CPU {cpu}");
            Finding { rule, ctx: Some(ctx), mm: Some(id), va: Some(va), frame: Some(frame), summary }
        }));
    }
}

impl Oracle {
    /// Looks again at translations that were in doubt.
    pub(super) fn look_at_doubts(&self) {
        let doubts = self.state.lock().doubts();
        let Some(device) = self.device().filter(|_| !doubts.is_empty()) else { return };
        for (ctx, doubt) in doubts {
            let view = device.range(ctx, (doubt.va, doubt.va), false, LOOKED_AT);
            let there = view.filter(|view| !view.released && !view.queueless).is_some_and(|view| {
                view.leaves.iter().chain(&view.tlb_entries).any(|&(_, leaf)| leaf == doubt.leaf)
            });
            let outcome = match (&doubt.cause, there, self.compare(ctx)) {
                (Cause::Stale(_), true, _) => Outcome::Lasting,
                (Cause::Stale(_), false, _) | (Cause::Absent, _, None) => Outcome::Settled,
                (Cause::Absent, there, Some(compare)) => {
                    match compare.judged(doubt.va, doubt.leaf, vgpu_spec::fault::ACCESS_READ) {
                        (_, Verdict::Absent | Verdict::Moving) if there => Outcome::Lasting,
                        (_, Verdict::Absent) => Outcome::Past,
                        (page, Verdict::Wrong(rule)) if there => Outcome::Wrong(rule, page),
                        _ => Outcome::Settled,
                    }
                }
            };
            self.judge(&Input::Doubted { ctx, doubt, outcome });
        }
    }

    /// A range of an address space is about to go, or all of it: what was in doubt there, and is still not there.
    pub(super) fn look_at_absent(&self, mm: u64, range: (u64, u64)) {
        let (root, doubts) = self.state.lock().absent(mm, range);
        let Some((format, memory)) = self.tables().filter(|_| root != 0 && !doubts.is_empty()) else {
            return;
        };
        for (ctx, doubt) in doubts {
            let page = Space { root, format }.settled(&memory, doubt.va);
            if matches!(page.kind, Kind::None | Kind::Swap) {
                self.judge(&Input::Doubted { ctx, doubt, outcome: Outcome::Never });
            }
        }
    }
}
