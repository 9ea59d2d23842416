// SPDX-License-Identifier: MIT OR Apache-2.0
//! Invalidations of a living address space: what a driver must be done with when the start has returned, what it must not do
//! before the end, and what its rights must be at the end.

use vgpu_spec::handle::{Handle, Kind};
use vgpu_spec::witness::Record;
use vgpu_spec::{pte, range as spec};

use super::Rule;
use super::doubt::{Cause, Doubt};
use super::event::RangeView;
use super::mirror::Mirrors;
use super::state::{After, Finding, Mm, State};
use super::trace::leaf_last;

/// Invalidations under way in one address space that are remembered.
const ACTIVE_MOST: usize = 1024;
/// Ranges of the driver's own migrations that are remembered.
const MIGRATIONS_MOST: usize = 256;

/// Whether an invalidation (slot, number) has not come to its end.
pub(super) type Live<'l> = &'l dyn Fn(u32, u64) -> bool;

/// An invalidation, as the witness reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) start: u64,
    /// Inclusive.
    pub(super) last: u64,
    /// A constant of [`vgpu_spec::range`].
    pub(super) event: u32,
    pub(super) owned: bool,
    /// A notifier was on its way out.
    pub(super) leaving: bool,
    pub(super) slot: u32,
    pub(super) number: u64,
}

/// What must hold when the start of an invalidation has returned 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Demand {
    /// Nothing yet.
    Nothing,
    /// No right to write is left.
    NoWrite,
    /// Nothing at all is left.
    Gone,
}

impl Range {
    /// `None` if the record makes no sense.
    pub(super) fn read(record: &Record) -> Option<Self> {
        let [start, last, what, number] = record.arg;
        let range = Self {
            start,
            last,
            event: what as u32 & 0xff,
            owned: what as u32 & spec::OWNED != 0,
            leaving: what as u32 & spec::LEAVING != 0,
            slot: (what >> 32) as u32,
            number,
        };
        (start <= last && number != 0 && range.name().is_some()).then_some(range)
    }

    /// munmap, or what takes its place: nobody but its caller changes entries there, see [`super::doubt`]. Not a reaper.
    pub(super) fn unmaps(&self) -> bool {
        self.event == spec::UNMAP && !self.leaving
    }

    fn name(&self) -> Option<&'static str> {
        spec::CONSTANTS.iter().find(|(_, value, _)| *value == u64::from(self.event)).map(|(name, ..)| *name)
    }

    pub(super) fn demand(&self) -> Demand {
        match self.event {
            spec::UNMAP | spec::CLEAR | spec::OTHER => Demand::Gone,
            // Only who knows that it is its own may let it pass: it unmaps by itself.
            spec::MIGRATE | spec::EXCLUSIVE => {
                if self.owned {
                    Demand::Nothing
                } else {
                    Demand::Gone
                }
            }
            spec::PROTECTION_PAGE => Demand::NoWrite,
            // Rights are changed, to what is not known before the end; or nothing is, but books that are no device's business.
            _ => Demand::Nothing,
        }
    }

    /// Whether it has something of [`start`, `last`].
    pub(super) fn covers(&self, start: u64, last: u64) -> bool {
        self.start <= last && start <= self.last
    }
}

impl std::fmt::Display for Range {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:#x}-{:#x}", self.name().unwrap_or("?"), self.start, self.last)
    }
}

impl Mm {
    /// Whether rights over `va` are being changed now.
    pub(super) fn changing_rights(&self, va: u64) -> bool {
        self.active.iter().any(|range| range.event == spec::PROTECTION_VMA && range.covers(va, va))
    }

    /// Whether the driver has begun to move `va` by itself.
    pub(super) fn moved_by_owner(&self, va: u64) -> bool {
        self.migrations.iter().any(|&(start, last)| start <= va && va <= last)
    }

    fn closed(&self) -> bool {
        self.active.iter().any(|range| range.demand() != Demand::Nothing)
    }

    fn started(&mut self, range: Range) {
        if self.active.len() < ACTIVE_MOST {
            self.active.push(range);
        }
        self.soft_dirty |= range.event == spec::SOFT_DIRTY;
        if matches!(range.event, spec::MIGRATE | spec::EXCLUSIVE) && range.owned {
            if self.migrations.len() == MIGRATIONS_MOST {
                self.migrations.pop_front();
            }
            self.migrations.push_back((range.start, range.last));
        }
    }
}

impl State {
    /// Forgets the invalidations of an address space that have come to their end, as `live` says, and tells `over` of each: to
    /// be called before what is judged by those under way.
    pub(super) fn settle(&mut self, id: u64, live: Live<'_>, over: &mut dyn FnMut(u32, u64)) {
        let Some(mm) = self.mms.get_mut(&id) else { return };
        mm.active.retain(|range| {
            let live = live(range.slot, range.number);
            if !live {
                over(range.slot, range.number);
            }
            live
        });
    }

    /// One has come to its end.
    pub(super) fn range_over(&mut self, id: u64, slot: u32, number: u64) {
        if let Some(mm) = self.mms.get_mut(&id) {
            mm.active.retain(|range| (range.slot, range.number) != (slot, number));
        }
    }

    /// Contexts of a living address space that can translate, as far as is known.
    fn translating(&self, id: u64) -> Vec<Handle> {
        let can = |(_, context): &(&u64, &super::state::Context)| {
            context.mm == Some(id)
                && matches!(context.after, After::Alive)
                && !context.released
                && !context.unnotified
        };
        self.contexts.iter().filter(can).map(|(&handle, _)| Handle(handle)).collect()
    }

    /// The start of an invalidation has returned 0. Returns the contexts to look at.
    pub(super) fn range_started(&mut self, id: u64, range: Range, mirrors: &Mirrors) -> Vec<Handle> {
        let Some(mm) = self.mms.get_mut(&id) else {
            self.bad_records += 1;
            return Vec::new();
        };
        if mm.released {
            return Vec::new();
        }
        self.ranges += 1;
        mm.started(range);
        self.doubts_over(id, &range);
        self.accesses_disturbed(id, &range);
        let contexts = self.translating(id);
        if range.demand() == Demand::Nothing {
            return Vec::new();
        }
        for &ctx in &contexts {
            mirrors.attend(ctx, true);
        }
        contexts
    }

    /// The device has been asked what it has in a range whose invalidation's start has returned.
    pub(super) fn range_looked(
        &mut self,
        id: u64,
        range: &Range,
        ctx: Handle,
        view: &RangeView,
        found: &mut Vec<Finding>,
    ) {
        // Where no queue is left nothing can be translated: of several contexts on an address space one may be on its way out,
        // its notifier gone and the others' not.
        if view.released || view.queueless {
            return;
        }
        let (rule, what, (va, leaf)) = match (view.leaves.first(), view.tlb_entries.first(), view.in_flight) {
            (Some(&leaf), ..) => (Rule::InvalidateStalePte, "a leaf is valid", leaf),
            (_, Some(&entry), _) => (Rule::InvalidateStaleTlb, "a TLB entry is left", entry),
            (.., Some(entry)) => (Rule::InvalidateInFlight, "an access is in flight", entry),
            _ => return,
        };
        let may = if range.demand() == Demand::NoWrite { " that may write" } else { "" };
        let mm = self.mm_name(Some(id));
        let summary = format!(
            "the start of an invalidation ({range}) has returned for {mm}, but for {ctx} {what}{may}: {va:#x} -> {:#x}",
            leaf & pte::ADDRESS
        );
        let finding = Finding {
            rule,
            ctx: Some(ctx),
            mm: Some(id),
            va: Some(va.max(range.start)),
            frame: Some(leaf & pte::ADDRESS),
            summary,
        };
        let removed = self.mms.get(&id).map(|mm| mm.removed);
        let Some(context) = self.contexts.get_mut(&ctx.0) else { return };
        let notified = removed == Some(context.removed) && !range.leaving;
        if view.busy || view.in_flight.is_some() || notified {
            found.push(finding);
        } else {
            // Nobody uses it, and some notifier has been removed. That may be a driver that is about to take its tables down,
            // while another context's notifier is the one that was called. It is stale once it is used, or if it stays.
            context.doubts.add(Doubt::new(va, leaf, Cause::Stale(finding)));
        }
    }

    /// Contexts to be held against the CPU's rights at the end of a change of rights.
    pub(super) fn range_ends(&mut self, id: u64) -> Vec<Handle> {
        match self.mms.get(&id) {
            Some(mm) if !mm.released => self.translating(id),
            Some(_) => Vec::new(),
            None => {
                self.bad_records += 1;
                Vec::new()
            }
        }
    }

    /// At the end of a change of rights a translation allows more than the CPU's.
    pub(super) fn range_excess(
        &self,
        id: u64,
        range: &Range,
        (ctx, va, leaf): (Handle, u64, u64),
        in_tlb: bool,
        page: &crate::cpu::Page,
    ) -> Option<Finding> {
        if self.excused(id, page) {
            return None;
        }
        let (rule, what) =
            if in_tlb { (Rule::InvalidateStaleTlb, "TLB entry") } else { (Rule::InvalidateStalePte, "leaf") };
        let mm = self.mm_name(Some(id));
        let summary = format!(
            "an invalidation ({range}) of {mm} ends, but for {ctx} a {what} at {va:#x} (entry {leaf:#x}) allows more than the CPU's ({:#x})",
            page.raw
        );
        let frame = Some(leaf & pte::ADDRESS);
        Some(Finding { rule, ctx: Some(ctx), mm: Some(id), va: Some(va), frame, summary })
    }

    /// A page that the device has written is clean when the driver has let go of it.
    pub(super) fn dirty_lost(&mut self, id: u64, ctx: Handle, va: u64, frame: u64) -> Option<Finding> {
        let mirrors = match self.contexts.get(&ctx.0) {
            Some(context) => context.mm == Some(id),
            // One that has ended, and still owed somebody the word.
            None => ctx.kind() == Some(Kind::Context) && self.mms.contains_key(&id),
        };
        if !mirrors {
            self.bad_records += 1;
            return None;
        }
        let mm = self.mm_name(Some(id));
        let summary = format!(
            "{ctx} has written {va:#x} of {mm} (page {frame:#x}) and lost it, but neither the page nor the CPU's entry is dirty"
        );
        Some(Finding {
            rule: Rule::MirrorDirtyLost,
            ctx: Some(ctx),
            mm: Some(id),
            va: Some(va),
            frame: Some(frame),
            summary,
        })
    }

    /// Whether a missing right of the CPU's may be due to soft-dirty books, which take rights away and tell nobody to.
    pub(super) fn excused(&self, id: u64, page: &crate::cpu::Page) -> bool {
        self.mms.get(&id).is_some_and(|mm| mm.soft_dirty && page.soft_clean)
    }

    /// A table of a context that wants attention was changed: a leaf was set.
    pub(super) fn leaf_attended(
        &mut self,
        (ctx, va, leaf): (Handle, u64, u64),
        mirrors: &Mirrors,
        found: &mut Vec<Finding>,
    ) {
        let last = leaf_last(va, leaf);
        let Some(context) = self.contexts.get_mut(&ctx.0) else { return };
        context.doubts.forget(va, last);
        let quiet = context.doubts.is_empty();
        let alive = matches!(context.after, After::Alive) && !context.released && !context.unnotified;
        let Some(id) = context.mm else { return };
        let Some(mm) = self.mms.get_mut(&id) else { return };
        mirrors.attend(ctx, !quiet || mm.closed());
        if !alive || mm.released {
            return;
        }
        let writes = leaf & (pte::WRITE | pte::ATOMIC) != 0;
        let forbidden = |range: &&Range| {
            range.covers(va, last)
                && match range.demand() {
                    Demand::Gone => true,
                    Demand::NoWrite => writes,
                    Demand::Nothing => false,
                }
        };
        if let Some(&range) = mm.active.iter().find(forbidden) {
            let mm = self.mm_name(Some(id));
            found.push(Finding {
                rule: Rule::InvalidateReestablished,
                ctx: Some(ctx),
                mm: Some(id),
                va: Some(va.max(range.start)),
                frame: Some(leaf & pte::ADDRESS),
                summary: format!(
                    "an invalidation ({range}) of {mm} has started and not ended, but for {ctx} a leaf was set at {va:#x}: {leaf:#x}"
                ),
            });
        }
    }
}
