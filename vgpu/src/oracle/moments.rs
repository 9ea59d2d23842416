// SPDX-License-Identifier: MIT OR Apache-2.0
//! The witness's side of the rules: address spaces, whose contexts are whose, and the moments at which nothing may be left.

use vgpu_spec::handle::Handle;
use vgpu_spec::{pte, witness};

use super::Rule;
use super::event::ContextView;
use super::state::{After, Fault, Finding, MAX_KEPT, Mm, Seen, State, Watched};

/// When contexts are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moment {
    Released,
    Unmapped,
    End,
}

impl Moment {
    /// The moment that a kind of record tells of.
    pub(super) fn of(kind: u32) -> Option<Self> {
        Some(match kind {
            witness::MM_RELEASED => Self::Released,
            witness::MM_UNMAPPED => Self::Unmapped,
            witness::MM_END => Self::End,
            _ => return None,
        })
    }
}

impl State {
    /// The witness module is loaded: its ids begin anew.
    pub(super) fn hello(&mut self) {
        self.hellos += 1;
        self.mms.clear();
        self.alive.clear();
        self.stable = Default::default();
        self.livelocks.clear();
        self.orphans = Default::default();
        self.private = Default::default();
        self.gone = false;
        for context in self.contexts.values_mut() {
            context.mm = None;
            context.seen = Seen::Many;
        }
    }

    /// The witness module is unloaded: a device turned off from now on may just as well be a machine that is.
    ///
    /// If the driver went before, it has left nobody to be called.
    pub(super) fn bye(&mut self, missed: u64, found: &mut Vec<Finding>) {
        self.probes_missed = self.probes_missed.max(missed);
        self.gone = true;
        if !self.off || self.probes_missed > 0 {
            return;
        }
        for (&id, mm) in &self.mms {
            if mm.had_context && mm.released && mm.counted && mm.notifiers > 0 {
                let text = format!(
                    "the driver is gone, but of the notifiers it inserted for {} {} were never removed",
                    self.mm_name(Some(id)),
                    mm.notifiers
                );
                found.push(Finding::of_mm(Rule::UnregisterLeak, id, text));
            }
        }
    }

    /// The driver has let go of the device.
    pub(super) fn left_mapped(&self, left: u64, found: &mut Vec<Finding>) {
        if self.probes_missed > 0 {
            return;
        }
        let summary = format!(
            "the driver has let go of the device, for which it mapped memory {left} times more than it unmapped any (dma_map_page without dma_unmap_page)"
        );
        found.push(self.finding_of(Rule::UnregisterLeak, None, None, summary));
    }

    /// The witness is about to be unloaded and finds an address space that no task uses and that was never released.
    pub(super) fn stranded(&mut self, id: u64, found: &mut Vec<Finding>) {
        match self.mms.get(&id) {
            Some(mm) if mm.released => self.bad_records += 1,
            // Its release may be what was missed.
            Some(_) if self.probes_missed > 0 => {}
            Some(mm) if mm.had_context && self.off => {
                let text = format!(
                    "the driver is gone, and so are the tasks of {}, but it was never released: somebody has kept a reference (mmget without mmput)",
                    self.mm_name(Some(id))
                );
                found.push(Finding::of_mm(Rule::UnregisterLeak, id, text));
            }
            Some(_) => {}
            None => self.bad_records += 1,
        }
    }

    /// An address space has its first notifier.
    pub(super) fn begin(&mut self, mm: u64, tgid: u32, root: u64, watched: &Watched) {
        if mm == 0 || self.mms.contains_key(&mm) {
            self.bad_records += 1;
            return;
        }
        if self.mms.len() >= MAX_KEPT {
            if let Some((old, _)) = self.mms.pop_first() {
                self.alive.remove(&old);
            }
        }
        self.mms.insert(mm, Mm { tgid, root, ..Mm::default() });
        self.alive.insert(mm);
        for (&handle, context) in self.contexts.iter_mut().filter(|(_, context)| !context.associated) {
            context.seen = match context.seen {
                Seen::None => {
                    watched.clear(Handle(handle));
                    Seen::One(mm)
                }
                Seen::One(one) if one == mm => Seen::One(mm),
                _ => Seen::Many,
            };
        }
    }

    /// A notifier was inserted (`by` = 1) or removed (`by` = -1).
    pub(super) fn notifier(&mut self, id: u64, by: i64, watched: &Watched) {
        let Some(mm) = self.mms.get_mut(&id) else {
            self.bad_records += 1;
            return;
        };
        mm.notifiers = mm.notifiers.saturating_add(by);
        mm.removed += u64::from(by < 0);
        if by > 0 && mm.notifiers == 1 {
            mm.counted = true;
        }
        if mm.notifiers < 0 {
            mm.counted = false; // inserted before the witness came: the number means nothing
        }
        let none = self.without_notifier(id);
        for (&handle, context) in self.contexts.iter_mut().filter(|(_, context)| context.mm == Some(id)) {
            if !matches!(context.after, After::Alive) {
                continue;
            }
            context.unnotified = none;
            if none {
                watched.set(Handle(handle));
            } else {
                watched.clear(Handle(handle));
            }
        }
    }

    /// Every notifier that the address space had is removed, for certain.
    fn without_notifier(&self, id: u64) -> bool {
        self.probes_missed == 0 && self.mms.get(&id).is_some_and(|mm| mm.counted && mm.notifiers == 0)
    }

    /// Whether the context is known.
    pub(super) fn knows(&self, ctx: Handle) -> bool {
        self.contexts.contains_key(&ctx.0)
    }

    /// A workload says whose the context is; `live` if the device knows a context that this state does not. Returns the address
    /// of the top page table, if that is taken and known.
    pub(super) fn associate(&mut self, id: u64, ctx: Handle, live: bool, watched: &Watched) -> Option<u64> {
        if live && !self.knows(ctx) {
            self.bind(ctx, watched);
        }
        let alive = self.alive.contains(&id);
        match self.contexts.get(&ctx.0) {
            Some(context) if alive && !(context.by_word && context.mm != Some(id)) => {}
            _ => {
                self.bad_associations += 1;
                return None;
            }
        }
        self.pair(id, ctx, true, watched);
        let context = self.contexts.get(&ctx.0)?;
        let root = self.mms.get(&id)?.root;
        (root != 0 && !context.released && matches!(context.after, After::Alive)).then_some(root)
    }

    fn pair(&mut self, id: u64, ctx: Handle, by_word: bool, watched: &Watched) {
        let unnotified = self.without_notifier(id);
        let Some(context) = self.contexts.get_mut(&ctx.0) else { return };
        if context.mm != Some(id) {
            context.removed = self.mms.get(&id).map_or(0, |mm| mm.removed);
        }
        context.mm = Some(id);
        context.by_word |= by_word;
        context.unnotified = unnotified;
        if unnotified {
            watched.set(ctx);
        }
        self.associated += u64::from(!context.associated);
        context.associated = true;
        if let Some(mm) = self.mms.get_mut(&id) {
            self.address_spaces += u64::from(!mm.had_context);
            mm.had_context = true;
        }
    }

    /// The one context that can be meant by an address space which nobody has associated with any.
    fn only_candidate(&self, id: u64) -> Option<Handle> {
        if self.mms.get(&id)?.had_context {
            return None;
        }
        let mut open = self.contexts.iter().filter(|(_, context)| !context.associated);
        match (open.next(), open.next()) {
            (Some((&handle, context)), None) if context.seen == Seen::One(id) => Some(Handle(handle)),
            _ => None,
        }
    }

    /// A moment of an address space's end: from now on its contexts are watched. Returns those to look at.
    pub(super) fn moment(&mut self, id: u64, moment: Moment, watched: &Watched) -> Vec<Handle> {
        let legal = self.mms.get(&id).is_some_and(|mm| match moment {
            Moment::Released => !mm.released,
            Moment::Unmapped => mm.released && !mm.unmapped,
            Moment::End => true,
        });
        if !legal {
            self.bad_records += 1;
            return Vec::new();
        }
        if moment == Moment::Released {
            if let Some(ctx) = self.only_candidate(id) {
                self.pair(id, ctx, false, watched);
            }
            self.releases += 1;
            self.stable.released(id);
            self.doubts_end(id);
            self.outliving_end(id);
            self.alive.remove(&id);
        }
        if let Some(mm) = self.mms.get_mut(&id) {
            mm.released |= moment == Moment::Released;
            mm.unmapped |= moment == Moment::Unmapped;
        }
        let mut concerned = Vec::new();
        for (&handle, context) in self.contexts.iter_mut().filter(|(_, context)| context.mm == Some(id)) {
            if matches!(context.after, After::Alive) {
                context.after = After::Judging { access: None };
                watched.set(Handle(handle));
            }
            concerned.push(Handle(handle));
        }
        concerned
    }

    /// The device has been asked about a context at a moment: judges what is left.
    pub(super) fn looked(
        &mut self,
        id: u64,
        moment: Moment,
        ctx: Handle,
        view: Option<ContextView>,
        found: &mut Vec<Finding>,
    ) {
        let mm = self.mm_name(Some(id));
        let Some(context) = self.contexts.get_mut(&ctx.0) else { return };
        let left = view.and_then(|view| Left::of(&view, context.released || context.unnotified));
        let left = left.or(match (&context.after, view) {
            // It was over when the device was asked, but had not been when release returned.
            (&After::Judging { access: Some((va, frame)) }, _) => {
                let what = format!("an access at {va:#x} was still under way");
                Some(Left { va: Some(va), frame: Some(frame), what })
            }
            _ => None,
        });
        let Some(left) = left else {
            context.after = After::Clean;
            return;
        };
        let (rule, when) = match moment {
            Moment::Released => (Rule::ReleaseLate, "release has returned for"),
            Moment::Unmapped => (Rule::ReleaseMapped, "exit's full-range UNMAP has returned for"),
            Moment::End => (Rule::ReleaseMapped, "nothing is left of"),
        };
        context.after = After::Dirty(rule);
        let summary = format!("{when} {mm}, but for {ctx} {}", left.what);
        found.push(Finding { rule, ctx: Some(ctx), mm: Some(id), va: left.va, frame: left.frame, summary });
    }

    /// The id ends, after its contexts have been looked at.
    pub(super) fn end(&mut self, id: u64) {
        self.mms.remove(&id);
        self.alive.remove(&id);
        self.contexts.values_mut().filter(|c| c.mm == Some(id)).for_each(|c| c.mm = None);
    }

    /// A heartbeat: returns the contexts with faults that have waited too long.
    pub(super) fn heartbeat(&mut self, missed: u64) -> Vec<Handle> {
        self.heartbeats += 1;
        self.probes_missed = self.probes_missed.max(missed);
        let mut contexts: Vec<_> =
            self.faults.values().filter(|fault| self.overdue(fault)).map(|fault| fault.ctx).collect();
        contexts.sort_unstable();
        contexts.dedup();
        contexts
    }

    fn overdue(&self, fault: &Fault) -> bool {
        !fault.reported && self.heartbeats - fault.heartbeat > self.fault_heartbeats
    }

    /// The device has been asked about a context with overdue faults. `parked` if it still has some.
    pub(super) fn looked_for_faults(&mut self, ctx: Handle, parked: bool, found: &mut Vec<Finding>) {
        if !parked {
            // Answered while this was on its way; the events came in another order.
            let now = self.heartbeats;
            let limit = self.fault_heartbeats;
            self.faults.retain(|_, fault| fault.ctx != ctx || now - fault.heartbeat <= limit);
            return;
        }
        let overdue: Vec<u64> = self
            .faults
            .iter()
            .filter(|(_, fault)| fault.ctx == ctx && self.overdue(fault))
            .map(|(&handle, _)| handle)
            .collect();
        for handle in overdue {
            let Some(fault) = self.faults.get_mut(&handle) else { continue };
            fault.reported = true;
            let (va, waited) = (fault.va, self.heartbeats - fault.heartbeat);
            let text = format!(
                "{} of {ctx} at {va:#x} has waited {waited} heartbeats for an answer (in the fault buffer, or held back by its overflow)",
                Handle(handle)
            );
            found.push(self.finding(Rule::FaultUnanswered, ctx, Some(va), text));
        }
    }
}

/// What a context still has at a moment when it must have nothing.
struct Left {
    va: Option<u64>,
    frame: Option<u64>,
    what: String,
}

impl Left {
    /// `only_accesses`: leaves by themselves do no harm, for the context was released on the device (and may be on its way to
    /// Free), or the driver has no notifier any more, so that release was not meant for it. Neither do they where no queue is
    /// left that could use them: of several contexts on an address space one may have been closed before, its notifier gone and
    /// the others' not.
    fn of(view: &ContextView, only_accesses: bool) -> Option<Self> {
        let mappings = !view.released && !view.queueless && !only_accesses;
        let mut what = Vec::new();
        let (mut va, mut frame) = (None, None);
        let mut place = |at: Option<(u64, u64)>| {
            if let (None, Some((address, entry))) = (va, at) {
                (va, frame) = (Some(address), Some(entry & pte::ADDRESS));
            }
        };
        let spot = |at: Option<(u64, u64)>| {
            at.map_or(String::new(), |(va, entry)| {
                let vram = if entry & pte::VRAM != 0 { "VRAM " } else { "" };
                format!(" (first: {va:#x} -> {vram}{:#x})", entry & pte::ADDRESS)
            })
        };
        if mappings && view.live_leaves > 0 {
            place(view.first_leaf);
            what.push(format!("{} leaves are valid{}", view.live_leaves, spot(view.first_leaf)));
        }
        if mappings && view.tlb_entries > 0 {
            place(view.first_tlb);
            what.push(format!("{} TLB entries are left{}", view.tlb_entries, spot(view.first_tlb)));
        }
        if let Some(address) = view.in_flight {
            if va.is_none() {
                va = Some(address);
            }
            what.push(format!("an access at {address:#x} is in flight"));
        }
        (!what.is_empty()).then(|| Self { va, frame, what: what.join(", ") })
    }
}
