// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the oracle remembers of contexts, address spaces and faults, and the rules that need nothing else.
//!
//! Pure: it is told events and hands out [`Finding`]s and lists of contexts to look at. It never calls anybody.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use vgpu_spec::handle::{Handle, Kind};
use vgpu_spec::pte;

use super::Rule;
use super::event::{ContextView, DeviceEvent};
use super::trace::leaf_last;

/// Address spaces, contexts or faults remembered at most; a guest that reports more loses the oldest.
const MAX_KEPT: usize = 1 << 16;
/// Replays of one page's faults, raised after release, that a driver may have had under way. See docs/rules.md.
const REPLAYS_AFTER_RELEASE: u32 = 16;
/// Pages of a context for which those replays are counted.
const MAX_REPLAY_PAGES: usize = 1024;

/// A rule found broken, before it has a text for its last events.
#[derive(Clone, Debug)]
pub(super) struct Finding {
    pub(super) rule: Rule,
    pub(super) ctx: Option<Handle>,
    pub(super) mm: Option<u64>,
    pub(super) va: Option<u64>,
    pub(super) frame: Option<u64>,
    pub(super) summary: String,
}

/// Contexts whose accesses have to be looked at, readable without a lock.
///
/// One word a context index: the handle, or 0. An engine publishes its access as in flight and then reads the word; the
/// witness's record writes the word and then asks what is in flight. With both sequentially consistent, one sees the other.
pub(super) struct Watched(Box<[AtomicU64]>);

impl Watched {
    pub(super) fn new(contexts: u32) -> Self {
        Self((0..contexts.min(Handle::MAX_INDEX)).map(|_| AtomicU64::new(0)).collect())
    }
    #[inline]
    pub(super) fn contains(&self, ctx: Handle) -> bool {
        self.0.get(ctx.index() as usize).is_some_and(|word| word.load(SeqCst) == ctx.0)
    }
    fn set(&self, ctx: Handle) {
        if let Some(word) = self.0.get(ctx.index() as usize) {
            word.store(ctx.0, SeqCst);
        }
    }
    fn clear(&self, ctx: Handle) {
        if let Some(word) = self.0.get(ctx.index() as usize) {
            let _ = word.compare_exchange(ctx.0, 0, SeqCst, SeqCst);
        }
    }
    fn clear_all(&self) {
        self.0.iter().for_each(|word| word.store(0, SeqCst));
    }
}

/// Which mirrored address spaces were alive at any time of a context's life so far.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Seen {
    None,
    One(u64),
    Many,
}

/// How far the end of a context's address space has come.
#[derive(Clone, Copy)]
enum After {
    /// It lives, as far as is known.
    Alive,
    /// Release has returned, the device is being asked; an access came meanwhile.
    Judging { access: Option<(u64, u64)> },
    /// Nothing was left.
    Clean,
    /// Something was left, and reported by this rule: accesses through it are the same fault.
    Dirty(Rule),
}

struct Context {
    mm: Option<u64>,
    /// The workload said so.
    by_word: bool,
    /// It has been counted as some address space's.
    associated: bool,
    seen: Seen,
    released: bool,
    after: After,
    /// When last heard of alive, its address space had no notifier left.
    unnotified: bool,
    /// Replays of faults raised after release, by page.
    replays: BTreeMap<u64, u32>,
}

#[derive(Default)]
struct Mm {
    tgid: u32,
    released: bool,
    unmapped: bool,
    had_context: bool,
    /// Notifiers inserted and not removed.
    notifiers: i64,
    /// Some insertion was seen, and no removal without one.
    counted: bool,
}

struct Fault {
    ctx: Handle,
    va: u64,
    heartbeat: u64,
    after_release: bool,
    reported: bool,
}

/// When contexts are looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Moment {
    Released,
    Unmapped,
    End,
}

/// Everything remembered.
pub(super) struct State {
    fault_heartbeats: u64,
    contexts: BTreeMap<u64, Context>,
    mms: BTreeMap<u64, Mm>,
    /// Address spaces not released.
    alive: BTreeSet<u64>,
    faults: BTreeMap<u64, Fault>,
    /// Faults whose answer was heard of before they were.
    answered: BTreeSet<u64>,
    /// The witness has said goodbye.
    gone: bool,
    pub(super) heartbeats: u64,
    pub(super) probes_missed: u64,
    pub(super) bound: u64,
    pub(super) unbound: u64,
    pub(super) associated: u64,
    pub(super) address_spaces: u64,
    pub(super) releases: u64,
    pub(super) bad_records: u64,
    pub(super) bad_associations: u64,
    pub(super) stale_answers: u64,
}

impl State {
    pub(super) fn new(fault_heartbeats: u64) -> Self {
        Self {
            fault_heartbeats,
            contexts: BTreeMap::new(),
            mms: BTreeMap::new(),
            alive: BTreeSet::new(),
            faults: BTreeMap::new(),
            answered: BTreeSet::new(),
            gone: false,
            heartbeats: 0,
            probes_missed: 0,
            bound: 0,
            unbound: 0,
            associated: 0,
            address_spaces: 0,
            releases: 0,
            bad_records: 0,
            bad_associations: 0,
            stale_answers: 0,
        }
    }

    pub(super) fn mm_of(&self, ctx: Handle) -> Option<u64> {
        self.contexts.get(&ctx.0)?.mm
    }

    fn mm_name(&self, mm: Option<u64>) -> String {
        match mm.map(|id| (id, self.mms.get(&id))) {
            Some((id, Some(mm))) => format!("address space {id} (process {})", mm.tgid),
            Some((id, None)) => format!("address space {id}"),
            None => "its address space".to_owned(),
        }
    }

    fn finding(&self, rule: Rule, ctx: Handle, va: Option<u64>, summary: String) -> Finding {
        Finding { rule, ctx: Some(ctx), mm: self.mm_of(ctx), va, frame: None, summary }
    }

    // ----- the device's side -----

    /// Applies an event of the device.
    pub(super) fn device(&mut self, event: &DeviceEvent, watched: &Watched, found: &mut Vec<Finding>) {
        use DeviceEvent as E;
        match *event {
            E::ContextBound { ctx, .. } => self.bind(ctx),
            E::ContextReleased { ctx } => {
                if let Some(context) = self.contexts.get_mut(&ctx.0) {
                    context.released = true;
                }
            }
            E::ReleaseAgain { ctx } => found.push(self.finding(
                Rule::ReleaseTwice,
                ctx,
                None,
                format!("{ctx} was released, and RELEASE was sent for it again"),
            )),
            E::ContextUnbound { ctx, leak } => {
                if !leak.is_clean() {
                    let text = format!("{ctx} was unbound and left behind: {leak}");
                    found.push(self.finding(Rule::UnregisterLeak, ctx, leak.va, text));
                }
                self.unbound += u64::from(self.contexts.remove(&ctx.0).is_some());
                self.faults.retain(|_, fault| fault.ctx != ctx);
                watched.clear(ctx);
            }
            E::BadHandle { op, handle, issued_before, va } => {
                self.bad_handle(op, handle, issued_before, va, found);
            }
            E::LeafSet { ctx, va: Some(va), pte } => self.leaf_set(ctx, va, pte, found),
            E::FaultRaised { fault, ctx, va, .. } => self.fault_raised(fault, ctx, va),
            E::FaultReplayed { fault, ctx, va } => {
                if self.answered(fault).is_some_and(|fault| fault.after_release) {
                    self.replayed_after_release(ctx, va, found);
                }
            }
            E::FaultCancelled { fault, .. } | E::FaultDropped { fault, .. } => {
                self.answered(fault);
            }
            E::Disabled { leak, contexts_live } => {
                self.faults.clear();
                self.answered.clear();
                if !self.gone && (contexts_live > 0 || !leak.is_clean()) {
                    let first = self.contexts.keys().next().filter(|_| contexts_live > 0);
                    let ctx = first.map(|&handle| Handle(handle));
                    found.push(Finding {
                        rule: Rule::UnregisterLeak,
                        ctx,
                        mm: ctx.and_then(|ctx| self.mm_of(ctx)),
                        va: leak.va,
                        frame: None,
                        summary: format!(
                            "the driver turned the device off with {contexts_live} contexts not unbound; left behind: {leak}"
                        ),
                    });
                }
            }
            E::Reset => {
                self.contexts.clear();
                self.faults.clear();
                self.answered.clear();
                watched.clear_all();
            }
            E::LeafSet { .. }
            | E::LeafCleared { .. }
            | E::Invalidate { .. }
            | E::InvalidateDone { .. }
            | E::JobDone { .. } => {}
        }
    }

    fn bind(&mut self, ctx: Handle) {
        if self.contexts.contains_key(&ctx.0) {
            return; // an association was faster than the event
        }
        if self.contexts.len() >= MAX_KEPT {
            self.contexts.pop_first();
        }
        let seen = match (self.alive.first(), self.alive.len()) {
            (None, _) => Seen::None,
            (Some(&mm), 1) => Seen::One(mm),
            _ => Seen::Many,
        };
        let fresh = Context {
            mm: None,
            by_word: false,
            associated: false,
            seen,
            released: false,
            after: After::Alive,
            unnotified: false,
            replays: BTreeMap::new(),
        };
        self.contexts.insert(ctx.0, fresh);
        self.bound += 1;
    }

    fn bad_handle(
        &mut self,
        op: &str,
        handle: Handle,
        issued_before: bool,
        va: Option<u64>,
        found: &mut Vec<Finding>,
    ) {
        let (rule, ctx, text) = match (handle.kind(), issued_before) {
            (Some(Kind::Context), true) => {
                let text = format!("{op} named {handle}, which had been unregistered before");
                (Rule::UnregisterTouch, Some(handle), text)
            }
            // Another path (kill, release, "all of the context") may have answered it in between.
            (Some(Kind::Fault), true) => {
                self.stale_answers += 1;
                return;
            }
            (Some(Kind::Context), false) => {
                (Rule::UnknownHandle, Some(handle), format!("{op} named {handle}, which was never given out"))
            }
            (_, true) => (Rule::UnknownHandle, None, format!("{op} named {handle}, which is stale")),
            (_, false) => {
                (Rule::UnknownHandle, None, format!("{op} named {handle}, which was never given out"))
            }
        };
        found.push(Finding { rule, ctx, mm: None, va, frame: None, summary: text });
    }

    fn leaf_set(&mut self, ctx: Handle, va: u64, entry: u64, found: &mut Vec<Finding>) {
        let Some(context) = self.contexts.get(&ctx.0) else { return };
        // What is written into the tables of a context that the device has Released maps nothing.
        if entry & pte::VALID == 0 || context.released || matches!(context.after, After::Alive) {
            return;
        }
        let covered = va..=leaf_last(va, entry);
        let fault = self.faults.values().find(|fault| fault.ctx == ctx && covered.contains(&fault.va));
        let mm = self.mm_name(context.mm);
        let (rule, va, text) = match fault {
            Some(fault) => (
                Rule::FaultAfterRelease,
                fault.va,
                format!("release has returned for {mm}, but a fault of {ctx} at {:#x} was served", fault.va),
            ),
            None => (
                Rule::ReleaseRevived,
                va,
                format!("release has returned for {mm}, but {ctx} was given a new leaf at {va:#x}"),
            ),
        };
        let mut finding = self.finding(rule, ctx, Some(va), text);
        finding.frame = Some(entry & pte::ADDRESS);
        found.push(finding);
    }

    /// Takes a fault off the list. Engines and the command ring are different threads, so the answer may be told first.
    fn answered(&mut self, fault: Handle) -> Option<Fault> {
        let known = self.faults.remove(&fault.0);
        if known.is_none() {
            if self.answered.len() >= MAX_KEPT {
                self.answered.pop_first();
            }
            self.answered.insert(fault.0);
        }
        known
    }

    fn fault_raised(&mut self, fault: Handle, ctx: Handle, va: u64) {
        if self.answered.remove(&fault.0) {
            return;
        }
        if self.faults.len() >= MAX_KEPT {
            self.faults.pop_first();
        }
        let after_release =
            self.contexts.get(&ctx.0).is_some_and(|context| !matches!(context.after, After::Alive));
        let heartbeat = self.heartbeats;
        self.faults.insert(fault.0, Fault { ctx, va, heartbeat, after_release, reported: false });
    }

    fn replayed_after_release(&mut self, ctx: Handle, va: u64, found: &mut Vec<Finding>) {
        let Some(context) = self.contexts.get_mut(&ctx.0) else { return };
        let page = va >> pte::PAGE_SHIFT;
        if context.replays.len() >= MAX_REPLAY_PAGES && !context.replays.contains_key(&page) {
            return;
        }
        let count = context.replays.entry(page).or_default();
        *count = count.saturating_add(1);
        if *count > REPLAYS_AFTER_RELEASE {
            let mm = self.mm_name(self.mm_of(ctx));
            let text = format!(
                "release has returned for {mm}, but faults of {ctx} at {va:#x} are replayed again and again, not cancelled"
            );
            found.push(self.finding(Rule::FaultAfterRelease, ctx, Some(va), text));
        }
    }

    /// An access of a watched context.
    pub(super) fn access(&mut self, ctx: Handle, va: u64, frame: u64, found: &mut Vec<Finding>) {
        if let Some(Context { after: After::Judging { access }, .. }) = self.contexts.get_mut(&ctx.0) {
            access.get_or_insert((va, frame));
            return;
        }
        let Some(context) = self.contexts.get(&ctx.0) else { return };
        let (rule, text) = match context.after {
            After::Alive | After::Clean if context.unnotified => {
                (Rule::UnregisterTouch, "has no notifier any more, so that nobody tells of invalidations")
            }
            After::Alive | After::Judging { .. } => return,
            After::Clean => (Rule::ReleaseRevived, "was released with nothing left"),
            After::Dirty(rule) => (rule, "was released"),
        };
        let mm = self.mm_name(context.mm);
        let mut finding =
            self.finding(rule, ctx, Some(va), format!("{mm} {text}, but {ctx} accesses {va:#x}"));
        finding.frame = Some(frame);
        found.push(finding);
    }

    // ----- the witness's side -----

    /// The witness module is loaded: its ids begin anew.
    pub(super) fn hello(&mut self) {
        self.mms.clear();
        self.alive.clear();
        self.gone = false;
        for context in self.contexts.values_mut() {
            context.mm = None;
            context.seen = Seen::Many;
        }
    }

    /// The witness module is unloaded: a device turned off from now on may just as well be a machine that is.
    pub(super) fn bye(&mut self, missed: u64) {
        self.probes_missed = self.probes_missed.max(missed);
        self.gone = true;
    }

    /// An address space has its first notifier.
    pub(super) fn begin(&mut self, mm: u64, tgid: u32) {
        if mm == 0 || self.mms.contains_key(&mm) {
            self.bad_records += 1;
            return;
        }
        if self.mms.len() >= MAX_KEPT {
            if let Some((old, _)) = self.mms.pop_first() {
                self.alive.remove(&old);
            }
        }
        self.mms.insert(mm, Mm { tgid, ..Mm::default() });
        self.alive.insert(mm);
        for context in self.contexts.values_mut().filter(|context| !context.associated) {
            context.seen = match context.seen {
                Seen::None => Seen::One(mm),
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

    /// A workload says whose the context is; `live` if the device knows a context that this state does not.
    pub(super) fn associate(&mut self, id: u64, ctx: Handle, live: bool, watched: &Watched) {
        if live && !self.knows(ctx) {
            self.bind(ctx);
        }
        let alive = self.alive.contains(&id);
        match self.contexts.get(&ctx.0) {
            Some(context) if alive && !(context.by_word && context.mm != Some(id)) => {}
            _ => {
                self.bad_associations += 1;
                return;
            }
        }
        self.pair(id, ctx, true, watched);
    }

    fn pair(&mut self, id: u64, ctx: Handle, by_word: bool, watched: &Watched) {
        let unnotified = self.without_notifier(id);
        let Some(context) = self.contexts.get_mut(&ctx.0) else { return };
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
        let left = view.and_then(|view| Left::of(&view, context.unnotified));
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

    /// Contexts of which nobody knows whose they are or were.
    pub(super) fn unassociated(&self) -> u64 {
        self.bound.saturating_sub(self.associated)
    }

    #[cfg(test)]
    pub(super) fn sizes(&self) -> (usize, usize, usize) {
        (self.contexts.len(), self.mms.len(), self.faults.len())
    }
}

/// What a context still has at a moment when it must have nothing.
struct Left {
    va: Option<u64>,
    frame: Option<u64>,
    what: String,
}

impl Left {
    /// `only_accesses`: the driver has no notifier, so release was not meant for it, and leaves by themselves do no harm.
    fn of(view: &ContextView, only_accesses: bool) -> Option<Self> {
        let mappings = !view.released && !only_accesses;
        let mut what = Vec::new();
        let (mut va, mut frame) = (None, None);
        let mut place = |at: Option<(u64, u64)>| {
            if let (None, Some((address, entry))) = (va, at) {
                (va, frame) = (Some(address), Some(entry & pte::ADDRESS));
            }
        };
        let spot = |at: Option<(u64, u64)>| {
            at.map_or(String::new(), |(va, entry)| {
                format!(" (first: {va:#x} -> {:#x})", entry & pte::ADDRESS)
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
