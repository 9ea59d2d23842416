// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the oracle remembers of contexts, address spaces and faults, and the device's side of the rules.
//!
//! Pure: it is told events and hands out [`Finding`]s and lists of contexts to look at. It never calls anybody.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use vgpu_spec::command::TAG_NONE;
use vgpu_spec::handle::{Handle, Kind};
use vgpu_spec::pte;

use super::Rule;
use super::doubt::{Doubts, Orphans};
use super::event::DeviceEvent;
use super::private::Private;
use super::range::Range;
use super::trace::leaf_last;

/// Address spaces, contexts or faults remembered at most; a guest that reports more loses the oldest.
pub(super) const MAX_KEPT: usize = 1 << 16;
/// Replays of one page's faults, raised after release, that a driver may have had under way. See docs/rules.
const REPLAYS_AFTER_RELEASE: u32 = 16;
/// Faults of which it is remembered whose they were.
const OWNERS_MAX: usize = 1 << 12;
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

impl Finding {
    /// One about an address space as a whole.
    pub(super) fn of_mm(rule: Rule, id: u64, summary: String) -> Self {
        Self { rule, ctx: None, mm: Some(id), va: None, frame: None, summary }
    }
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
    pub(super) fn set(&self, ctx: Handle) {
        if let Some(word) = self.0.get(ctx.index() as usize) {
            word.store(ctx.0, SeqCst);
        }
    }
    pub(super) fn clear(&self, ctx: Handle) {
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
pub(super) enum Seen {
    None,
    One(u64),
    Many,
}

/// How far the end of a context's address space has come.
#[derive(Clone, Copy)]
pub(super) enum After {
    /// It lives, as far as is known.
    Alive,
    /// Release has returned, the device is being asked; an access came meanwhile.
    Judging { access: Option<(u64, u64)> },
    /// Nothing was left.
    Clean,
    /// Something was left, and reported by this rule: accesses through it are the same fault.
    Dirty(Rule),
}

pub(super) struct Context {
    pub(super) mm: Option<u64>,
    /// The workload said so.
    pub(super) by_word: bool,
    /// It has been counted as some address space's, or as nobody's.
    pub(super) associated: bool,
    pub(super) seen: Seen,
    pub(super) released: bool,
    pub(super) after: After,
    /// When last heard of alive, its address space had no notifier left.
    pub(super) unnotified: bool,
    /// Replays of faults raised after release, by page.
    pub(super) replays: BTreeMap<u64, u32>,
    pub(super) doubts: Doubts,
    /// Notifiers that had been removed from its address space when all of its own were known to be there.
    pub(super) removed: u64,
}

#[derive(Default)]
pub(super) struct Mm {
    pub(super) tgid: u32,
    pub(super) released: bool,
    pub(super) unmapped: bool,
    pub(super) had_context: bool,
    /// Notifiers inserted and not removed.
    pub(super) notifiers: i64,
    /// Notifiers removed.
    pub(super) removed: u64,
    /// Some insertion was seen, and no removal without one.
    pub(super) counted: bool,
    /// Address of the top page table, or 0.
    pub(super) root: u64,
    /// Invalidations that have started, and had not ended when last looked at.
    pub(super) active: Vec<Range>,
    /// Where the driver has moved pages by itself.
    pub(super) migrations: VecDeque<(u64, u64)>,
    /// Soft-dirty bits have been cleared.
    pub(super) soft_dirty: bool,
}

pub(super) struct Fault {
    pub(super) ctx: Handle,
    pub(super) va: u64,
    pub(super) heartbeat: u64,
    pub(super) after_release: bool,
    pub(super) reported: bool,
}

/// Everything remembered.
pub(super) struct State {
    pub(super) fault_heartbeats: u64,
    pub(super) contexts: BTreeMap<u64, Context>,
    pub(super) mms: BTreeMap<u64, Mm>,
    /// Address spaces not released.
    pub(super) alive: BTreeSet<u64>,
    pub(super) faults: BTreeMap<u64, Fault>,
    /// Whose the newest faults were: for late answers in another's name.
    pub(super) owners: VecDeque<(Handle, Handle)>,
    /// Faults whose answer was heard of before they were.
    pub(super) answered: BTreeSet<u64>,
    /// Accesses that have faulted, until they get on.
    pub(super) livelocks: super::livelock::Livelocks,
    /// What the workload has declared stable.
    pub(super) stable: super::stable::Stable,
    /// The witness has said goodbye.
    pub(super) gone: bool,
    /// The driver has turned the device off, and has not bound a context since.
    pub(super) off: bool,
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
    /// Times that the witness began.
    pub(super) hellos: u64,
    /// Contexts that a reset took away before anybody unregistered them.
    pub(super) contexts_lost: u64,
    /// Invalidations reported.
    pub(super) ranges: u64,
    pub(super) private: Private,
    pub(super) orphans: Orphans,
    /// It does not know what was before its first event.
    pub(super) late: bool,
}

impl State {
    pub(super) fn new(fault_heartbeats: u64) -> Self {
        Self {
            fault_heartbeats,
            contexts: BTreeMap::new(),
            mms: BTreeMap::new(),
            alive: BTreeSet::new(),
            faults: BTreeMap::new(),
            owners: VecDeque::new(),
            answered: BTreeSet::new(),
            livelocks: Default::default(),
            stable: Default::default(),
            gone: false,
            off: false,
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
            hellos: 0,
            contexts_lost: 0,
            ranges: 0,
            private: Private::default(),
            orphans: Orphans::default(),
            late: false,
        }
    }

    /// From now on it is taken for one that does not know what was before: what can only be judged from the beginning is not.
    pub(super) fn came_late(&mut self) {
        self.late = true;
        self.gone = true;
    }

    pub(super) fn mm_of(&self, ctx: Handle) -> Option<u64> {
        self.contexts.get(&ctx.0)?.mm
    }

    /// Address space of a context, if it has not been released.
    pub(super) fn living_mm_of(&self, ctx: Handle) -> Option<u64> {
        self.mm_of(ctx).filter(|id| self.mms.get(id).is_some_and(|mm| !mm.released))
    }

    /// The contexts that are known to mirror an address space, whatever has become of them.
    pub(super) fn contexts_of(&self, id: u64) -> Vec<Handle> {
        let its = self.contexts.iter().filter(|(_, context)| context.mm == Some(id));
        its.map(|(&handle, _)| Handle(handle)).collect()
    }

    /// All contexts.
    pub(super) fn contexts(&self) -> Vec<Handle> {
        self.contexts.keys().map(|&handle| Handle(handle)).collect()
    }

    /// Address of the top table of an address space that lives.
    pub(super) fn root_of(&self, mm: u64) -> Option<u64> {
        self.mms.get(&mm).filter(|mm| !mm.released && mm.root != 0).map(|mm| mm.root)
    }

    /// Whether the driver has begun to move `va` by itself.
    pub(super) fn moved_by_owner(&self, mm: u64, va: u64) -> bool {
        self.mms.get(&mm).is_some_and(|mm| mm.moved_by_owner(va))
    }

    pub(super) fn mm_name(&self, mm: Option<u64>) -> String {
        match mm.map(|id| (id, self.mms.get(&id))) {
            Some((id, Some(mm))) => format!("address space {id} (process {})", mm.tgid),
            Some((id, None)) => format!("address space {id}"),
            None => "its address space".to_owned(),
        }
    }

    pub(super) fn finding(&self, rule: Rule, ctx: Handle, va: Option<u64>, summary: String) -> Finding {
        self.finding_of(rule, Some(ctx), va, summary)
    }

    /// One that may be about the whole device: without a context, or with [`Handle::NONE`].
    pub(super) fn finding_of(
        &self,
        rule: Rule,
        ctx: Option<Handle>,
        va: Option<u64>,
        summary: String,
    ) -> Finding {
        let ctx = ctx.filter(|&ctx| ctx != Handle::NONE);
        Finding { rule, ctx, mm: ctx.and_then(|ctx| self.mm_of(ctx)), va, frame: None, summary }
    }

    /// Applies an event of the device.
    pub(super) fn device(&mut self, event: &DeviceEvent, watched: &Watched, found: &mut Vec<Finding>) {
        use DeviceEvent as E;
        self.stable_event(event);
        match *event {
            E::ContextBound { ctx, tag } => {
                self.bind(ctx, watched);
                if tag == TAG_NONE {
                    self.nobodys(ctx);
                }
            }
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
                let gone = self.contexts.remove(&ctx.0);
                self.unbound += u64::from(gone.is_some());
                if let Some(mut context) = gone {
                    self.doubts_orphaned(ctx, &mut context);
                    if let Some(id) = context.mm {
                        self.settle_notifiers(id);
                    }
                }
                self.faults.retain(|_, fault| fault.ctx != ctx);
                self.livelocks.forget(ctx);
                watched.clear(ctx);
            }
            E::BadHandle { op, handle, issued_before, by, va } => {
                self.bad_handle(op, handle, issued_before, by, va, found);
            }
            // A device that was pulled out has no memory any more.
            E::Unusable { why, .. } if why.is_memory() => {}
            E::Unusable { ctx, queue, why } => {
                let ctx = Some(ctx).filter(|&ctx| ctx != Handle::NONE);
                let whose = ctx.map_or_else(|| "the device".to_owned(), |ctx| format!("{queue} of {ctx}"));
                let text = format!("{whose} has stopped: {why}");
                found.push(self.finding_of(Rule::RingUnusable, ctx, None, text));
            }
            E::RingFreed { ring, start, last } => {
                let text = format!(
                    "memory {start:#x} to {last:#x} is given back, and the device has it still: of {ring}"
                );
                let finding = self.finding_of(Rule::RingFreed, Some(ring.ctx), None, text);
                found.push(Finding { frame: Some(start), ..finding });
            }
            E::LeafSet { ctx, va: Some(va), pte } => self.leaf_set(ctx, va, pte, watched, found),
            E::FaultRaised { fault, ctx, va, again, .. } => {
                self.faulted_again(fault, (ctx, va), again, found);
                self.fault_raised(fault, ctx, va);
            }
            E::FaultReplayed { fault, ctx, va } => {
                if self.answered(fault).is_some_and(|fault| fault.after_release) {
                    self.replayed_after_release(ctx, va, found);
                }
            }
            E::FaultCancelled { fault, .. } | E::FaultDropped { fault, .. } => {
                self.answered(fault);
            }
            E::Disabled { leak, contexts_live } => {
                self.off = true;
                self.faults.clear();
                self.answered.clear();
                self.livelocks.clear();
                if !self.gone && (contexts_live > 0 || !leak.is_clean()) {
                    let first = self.contexts.keys().next().filter(|_| contexts_live > 0);
                    let ctx = first.map(|&handle| Handle(handle));
                    let text = format!(
                        "the driver turned the device off with {contexts_live} contexts not unbound; left behind: {leak}"
                    );
                    found.push(self.finding_of(Rule::UnregisterLeak, ctx, leak.va, text));
                }
            }
            E::Reset => {
                self.off = true;
                // With the witness gone the machine is being turned off.
                if !self.gone {
                    self.contexts_lost += self.contexts.len() as u64;
                }
                self.contexts.clear();
                self.faults.clear();
                self.answered.clear();
                self.livelocks.clear();
                watched.clear_all();
            }
            E::LeafSet { .. }
            | E::LeafCleared { .. }
            | E::DataGranted { .. }
            | E::DataReturned { .. }
            | E::Invalidate { .. }
            | E::InvalidateDone { .. }
            | E::JobDone { .. } => {}
        }
    }

    pub(super) fn bind(&mut self, ctx: Handle, watched: &Watched) {
        if self.contexts.contains_key(&ctx.0) {
            return; // an association was faster than the event
        }
        if self.contexts.len() >= MAX_KEPT {
            self.contexts.pop_first();
        }
        let seen = match (self.alive.first(), self.alive.len()) {
            _ if self.late => Seen::Many,
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
            doubts: Doubts::default(),
            removed: 0,
        };
        self.contexts.insert(ctx.0, fresh);
        self.bound += 1;
        self.off = false;
        if seen == Seen::None {
            watched.set(ctx); // for its leaves, see leaf_set()
        }
    }

    /// A context of an address space is gone, and its notifiers with it: if there are now as many as contexts, they are theirs.
    fn settle_notifiers(&mut self, id: u64) {
        let Some(mm) = self.mms.get(&id) else { return };
        let its = |context: &&mut Context| context.mm == Some(id);
        let live = self.contexts.values_mut().filter(its).count();
        if mm.counted && u64::try_from(mm.notifiers) == Ok(live as u64) {
            self.contexts.values_mut().filter(its).for_each(|context| context.removed = mm.removed);
        }
    }

    /// The driver says that the context mirrors no address space. The workload's word still decides.
    fn nobodys(&mut self, ctx: Handle) {
        if let Some(context) = self.contexts.get_mut(&ctx.0) {
            self.associated += u64::from(!context.associated);
            context.associated = true;
        }
    }

    fn bad_handle(
        &mut self,
        op: &str,
        handle: Handle,
        issued_before: bool,
        by: Option<Handle>,
        va: Option<u64>,
        found: &mut Vec<Finding>,
    ) {
        let who = by.map_or_else(|| "no context".to_owned(), |ctx| ctx.to_string());
        let foreign = || {
            let (_, owner) = self.owners.iter().rev().find(|(fault, _)| *fault == handle)?;
            (by? != *owner).then_some(*owner)
        };
        let owner = if handle.kind() == Some(Kind::Fault) { foreign() } else { None };
        if let Some(owner) = owner {
            let text = format!("{op} of {who} named {handle}, which was {owner}'s");
            found.push(Finding {
                rule: Rule::UnknownHandle,
                ctx: by,
                mm: by.and_then(|by| self.mm_of(by)),
                va,
                frame: None,
                summary: text,
            });
            return;
        }
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
            (_, true) => (Rule::UnknownHandle, by, format!("{op} of {who} named {handle}, which is stale")),
            (_, false) => {
                (Rule::UnknownHandle, by, format!("{op} of {who} named {handle}, which was never given out"))
            }
        };
        let mm = ctx.and_then(|ctx| self.mm_of(ctx));
        found.push(Finding { rule, ctx, mm, va, frame: None, summary: text });
    }

    fn leaf_set(&mut self, ctx: Handle, va: u64, entry: u64, watched: &Watched, found: &mut Vec<Finding>) {
        if let Some(context) = self.contexts.get_mut(&ctx.0) {
            if entry & pte::VALID != 0 && context.seen == Seen::None {
                // It maps something while no address space is mirrored: it is the driver's own, for copies or page tables.
                context.seen = Seen::Many;
                // That was what it was watched for: its accesses are nobody's business.
                watched.clear(ctx);
            }
        }
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
        if self.owners.len() >= OWNERS_MAX {
            self.owners.pop_front();
        }
        self.owners.push_back((fault, ctx));
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

    /// An access of a watched context. Whether it is the first while the device is being asked.
    pub(super) fn access(&mut self, ctx: Handle, va: u64, frame: u64, found: &mut Vec<Finding>) -> bool {
        if let Some(Context { after: After::Judging { access }, .. }) = self.contexts.get_mut(&ctx.0) {
            let first = access.is_none();
            access.get_or_insert((va, frame & pte::ADDRESS));
            return first;
        }
        let Some(context) = self.contexts.get(&ctx.0) else { return false };
        let (rule, text) = match context.after {
            After::Alive | After::Clean if context.unnotified => {
                (Rule::UnregisterTouch, "has no notifier any more, so that nobody tells of invalidations")
            }
            After::Alive | After::Judging { .. } => return false,
            After::Clean => (Rule::ReleaseRevived, "was released with nothing left"),
            After::Dirty(rule) => (rule, "was released"),
        };
        let mm = self.mm_name(context.mm);
        let mut finding =
            self.finding(rule, ctx, Some(va), format!("{mm} {text}, but {ctx} accesses {va:#x}"));
        finding.frame = Some(frame & pte::ADDRESS);
        found.push(finding);
        false
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
