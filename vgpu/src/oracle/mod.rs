// SPDX-License-Identifier: MIT OR Apache-2.0
//! The oracle: judges, from the device's side, how a driver keeps the device's view of an address space.
//!
//! It is fed by the device ([`Oracle::event`], [`Oracle::access`]) and by the guest's witness module ([`Oracle::witness`]).
//! The rules and their reasons are in docs/rules.md.
//!
//! Locks: each is held for moments and never while another is taken. None is held while the device is asked ([`Inspect`]) or a sink is called, so the device may call in with its own
//! locks held.

mod doubt;
mod event;
mod mirror;
mod moments;
mod private;
mod range;
mod rule;
mod state;
mod trace;
mod violation;

#[cfg(test)]
mod model_test;
#[cfg(test)]
mod oracle_test;
#[cfg(test)]
mod range_test;
#[cfg(test)]
mod release_test;

pub use event::{ContextView, DeviceEvent, Inspect, Leak, RangeView};
pub use mirror::Compare;
pub use rule::Rule;
pub use trace::describe;
pub use violation::{OracleCounters, Violation};

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock, Weak};

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;
use vgpu_spec::handle::Handle;
use vgpu_spec::pte;
use vgpu_spec::witness::{self, Record};

use doubt::{Cause, Outcome};
use mirror::{Mirrors, Verdict};
use moments::Moment;
use range::{Demand, Range};
use state::{Finding, State, Watched};
use trace::{Trace, What};

use crate::cpu::Format;
use crate::memory::SystemMemory;

/// How the oracle judges.
#[derive(Clone, Copy, Debug)]
pub struct OracleConfig {
    /// Judge; else only contexts, address spaces and the witness's records are counted.
    pub enabled: bool,
    /// Guest heartbeats (a tenth of a second each) within which a fault must be answered.
    pub fault_heartbeats: u64,
    /// Violations kept at most.
    pub max_violations: usize,
    /// Contexts that the device has.
    pub contexts: u32,
    /// The platform declares device atomics on system memory coherent with the CPU's; else they need a device-exclusive page.
    pub coherent_atomics: bool,
}

impl Default for OracleConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            fault_heartbeats: 100,
            max_violations: 100,
            contexts: 64,
            coherent_atomics: true,
        }
    }
}

/// Called with each violation, the first time it is seen.
pub type ViolationSink = Box<SinkFn>;
type SinkFn = dyn Fn(&Violation) + Send + Sync;

/// Leaves, and TLB entries, of a context in one range looked at.
const LOOKED_AT: usize = 1024;

/// What makes two violations the same one: rule and context, and for those reported from outside the sentence as well.
type Key = (Rule, Option<u64>, Option<String>);

/// What RANGE_SLOTS says: bus addresses, and how many there are.
#[derive(Clone, Copy, Default)]
struct Slots {
    base: u64,
    count: u64,
    questions: u64,
}

#[derive(Default)]
struct Kept {
    list: Vec<Violation>,
    index: HashMap<Key, usize>,
    suppressed: u64,
}

impl Kept {
    /// Whether it is a new one, and there is room. Counts it otherwise.
    fn is_new(&mut self, key: &Key, max: usize) -> bool {
        if let Some(old) = self.index.get(key).and_then(|&at| self.list.get_mut(at)) {
            old.count += 1;
            return false;
        }
        if self.list.len() >= max {
            self.suppressed += 1;
            return false;
        }
        true
    }
}

/// Judges the device's and the witness's events.
pub struct Oracle {
    config: OracleConfig,
    watched: Watched,
    mirrors: Mirrors,
    /// The guest's memory, by its physical addresses.
    memory: OnceLock<Arc<SystemMemory>>,
    /// How the guest's kernel writes its page tables, once it is known.
    format: ArcSwapOption<Format>,
    /// Where it shows whether an invalidation has ended, and where questions about it go.
    slots: Mutex<Slots>,
    /// Steps held against the CPU's tables.
    compared: AtomicU64,
    trace: Trace,
    state: Mutex<State>,
    kept: Mutex<Kept>,
    witness_records: AtomicU64,
    device: Mutex<Option<Weak<dyn Inspect>>>,
    sinks: Mutex<Vec<Arc<SinkFn>>>,
}

impl Oracle {
    /// An oracle that has seen nothing.
    #[must_use]
    pub fn new(config: OracleConfig) -> Arc<Self> {
        Arc::new(Self {
            config,
            watched: Watched::new(if config.enabled { config.contexts } else { 0 }),
            mirrors: Mirrors::new(if config.enabled { config.contexts } else { 0 }),
            memory: OnceLock::new(),
            format: ArcSwapOption::empty(),
            slots: Mutex::default(),
            compared: AtomicU64::new(0),
            trace: Trace::new(config.enabled),
            state: Mutex::new(State::new(config.fault_heartbeats)),
            kept: Mutex::new(Kept::default()),
            witness_records: AtomicU64::new(0),
            device: Mutex::new(None),
            sinks: Mutex::new(Vec::new()),
        })
    }

    /// Tells it which device to ask.
    pub fn attach(&self, device: Weak<dyn Inspect>) {
        *self.device.lock() = Some(device);
    }

    /// Gives it the guest's memory, where the device's bus addresses are physical addresses of the guest. Without it nothing is
    /// held against the CPU's page tables. Once only: what is given later is not taken.
    pub fn attach_memory(&self, memory: Arc<SystemMemory>) {
        let _ = self.memory.set(memory);
    }

    /// Something happened on the device.
    ///
    /// To be called before the guest can learn of it, and for one context or fault in the order in which things happened.
    pub fn event(&self, event: DeviceEvent) {
        use DeviceEvent as E;
        if self.config.enabled {
            self.trace.push(What::Device(event));
            match event {
                E::LeafCleared { .. }
                | E::Invalidate { .. }
                | E::InvalidateDone { .. }
                | E::JobDone { .. } => return,
                E::LeafSet { ctx, va, pte } => {
                    if let Some(va) = va {
                        self.leaf_set(ctx, va, pte);
                    }
                    if !self.watched.contains(ctx) {
                        return;
                    }
                }
                E::DataReturned { ctx, page } => return self.data_returned(ctx, page),
                E::ContextReleased { ctx } | E::ContextUnbound { ctx, .. } => self.mirrors.clear(ctx),
                E::Reset => self.mirrors.clear_all(),
                _ => {}
            }
        } else if !matches!(event, E::ContextBound { .. } | E::ContextUnbound { .. } | E::Reset) {
            return;
        }
        let mut found = Vec::new();
        self.state.lock().device(&event, &self.watched, &mut found);
        self.raise(found);
    }

    /// A leaf was set in the tables of a context.
    #[inline]
    fn leaf_set(&self, ctx: Handle, va: u64, leaf: u64) {
        if self.mirrors.wants(ctx) {
            let mut found = Vec::new();
            self.with_live(|live| {
                self.state.lock().leaf_attended((ctx, va, leaf), live, &self.mirrors, &mut found);
            });
            self.raise(found);
        }
        if let Some(compare) = self.compare(ctx) {
            compare.leaf(va, leaf);
        }
    }

    /// Calls `with` with a function that says whether an invalidation has not ended.
    fn with_live(&self, with: impl FnOnce(range::Live<'_>)) {
        let Slots { base, count, .. } = *self.slots.lock();
        let snapshot = self.memory.get().map(|memory| memory.snapshot());
        with(&|slot, number| {
            let slot = u64::from(slot);
            let word = snapshot
                .as_ref()
                .filter(|_| slot < count)
                .and_then(|snapshot| snapshot.atomic_u64(base.checked_add(8 * slot)?, false).ok());
            word.is_some_and(|word| word.load(std::sync::atomic::Ordering::SeqCst) == number)
        });
    }

    /// An access is about to touch memory: its translation is done, and [`Inspect`] shows it as in flight.
    ///
    /// One load when nothing is wrong.
    #[inline]
    pub fn access(&self, ctx: Handle, va: u64, frame: u64, access: u32) {
        if self.watched.contains(ctx) {
            self.access_watched(ctx, va, frame, access);
        }
    }

    #[cold]
    fn access_watched(&self, ctx: Handle, va: u64, frame: u64, access: u32) {
        let mut found = Vec::new();
        self.state.lock().access(ctx, va, frame, &mut found);
        let new = |finding: &Finding| !self.kept.lock().index.contains_key(&key(finding));
        if found.iter().any(new) {
            self.trace.push(What::Access { ctx, va, frame, access });
        }
        self.raise(found);
    }

    /// The witness reports. Returns when the record has been judged.
    pub fn witness(&self, record: &Record) {
        self.witness_records.fetch_add(1, Relaxed);
        let traced = !matches!(record.kind, witness::HEARTBEAT | witness::MESSAGE);
        if self.config.enabled && traced {
            self.trace.push(What::Witness(*record));
        }
        let arg = record.arg[0];
        match record.kind {
            witness::HELLO => {
                self.mirrors.clear_all();
                self.format.store(None);
                *self.slots.lock() = Slots::default();
                self.state.lock().hello();
            }
            witness::CPU_FORMAT => match Format::from_record(record.arg) {
                Some(format) => self.format.store(Some(Arc::new(format))),
                None => self.bad_record(),
            },
            witness::RANGE_SLOTS => {
                let [base, count, questions, _] = record.arg;
                *self.slots.lock() = Slots { base, count, questions };
            }
            witness::PAGE_CLEAN => self.page_clean(record),
            witness::RANGE_START => self.range_start(record),
            witness::RANGE_END => self.range_end(record),
            witness::HEARTBEAT => self.heartbeat(record.arg[1]),
            witness::MM_BEGIN => {
                self.state.lock().begin(record.mm, record.tgid, record.arg[1], &self.watched);
            }
            witness::NOTIFIER_ADDED => self.state.lock().notifier(record.mm, 1, &self.watched),
            witness::NOTIFIER_REMOVED => self.state.lock().notifier(record.mm, -1, &self.watched),
            witness::ASSOCIATE => self.associate(record.mm, Handle(arg)),
            witness::MM_RELEASED => self.look(record.mm, Moment::Released),
            witness::MM_UNMAPPED => self.look(record.mm, Moment::Unmapped),
            witness::MM_END => {
                self.look(record.mm, Moment::End);
                self.state.lock().end(record.mm);
            }
            witness::MM_STRANDED => self.left(|state, found| state.stranded(record.mm, found)),
            witness::BYE => self.left(|state, found| state.bye(arg, found)),
            // Which frames are device-private is for the walk of the CPU's tables to know.
            witness::MESSAGE | witness::DEVICE_PRIVATE_ADDED | witness::DEVICE_PRIVATE_REMOVED => {}
            // Gates are for whoever conducts the scenario; here they have their place in the order of events.
            kind if vgpu_spec::gate::RECORDS.contains(&kind) => {}
            _ => self.state.lock().bad_records += 1,
        }
    }

    /// The witness announced a record that cannot be read or is none.
    pub(crate) fn bad_record(&self) {
        self.state.lock().bad_records += 1;
    }

    /// The witness goes: what is still there is judged.
    fn left(&self, judge: impl FnOnce(&mut State, &mut Vec<Finding>)) {
        let mut found = Vec::new();
        judge(&mut self.state.lock(), &mut found);
        self.raise(found);
    }

    fn device(&self) -> Option<Arc<dyn Inspect>> {
        self.device.lock().as_ref().and_then(Weak::upgrade)
    }

    fn inspect(&self, ctx: Handle) -> Option<ContextView> {
        self.device()?.context(ctx)
    }

    fn associate(&self, mm: u64, ctx: Handle) {
        let known = self.state.lock().knows(ctx);
        let live = known || self.inspect(ctx).is_some();
        if let Some(root) = self.state.lock().associate(mm, ctx, live, &self.watched) {
            self.mirrors.set(ctx, root);
        }
    }

    /// The start of an invalidation has returned 0: what must not be there any more is looked for while its caller waits.
    fn range_start(&self, record: &Record) {
        let Some(range) = Range::read(record) else { return self.bad_record() };
        let mut concerned = Vec::new();
        self.with_live(|live| {
            concerned = self.state.lock().range_started(record.mm, range, live, &self.mirrors);
        });
        let Some(device) = self.device() else { return };
        if !self.config.enabled {
            return;
        }
        for &ctx in &concerned {
            let no_write = range.demand() == Demand::NoWrite;
            let Some(view) = device.range(ctx, (range.start, range.last), no_write, 1) else { continue };
            let mut found = Vec::new();
            self.state.lock().range_looked(record.mm, &range, ctx, &view, &mut found);
            self.raise(found);
        }
        self.ask_for_dirt(device.as_ref(), &range, &concerned);
    }

    /// Asks the witness whether pages that the device has written are dirty, now that the driver has let go of them. Where the
    /// CPU's entry is dirty by itself, there is nothing to ask.
    fn ask_for_dirt(&self, device: &dyn Inspect, range: &Range, concerned: &[Handle]) {
        let Slots { count, questions, .. } = *self.slots.lock();
        let mut words = [0; witness::QUESTION_WORDS as usize];
        let mut asked = 0;
        for &ctx in concerned {
            let written = device.take_written(ctx, (range.start, range.last), witness::QUESTIONS_MOST);
            let Some(compare) = self.compare(ctx).filter(|_| !written.is_empty()) else { continue };
            for va in written {
                if let Some(page) = compare.clean(va).filter(|_| asked < witness::QUESTIONS_MOST) {
                    words[1 + 3 * asked..4 + 3 * asked].copy_from_slice(&[va, page.frame, ctx.0]);
                    asked += 1;
                }
            }
        }
        let place = u64::from(range.slot).checked_mul(8 * witness::QUESTION_WORDS);
        let place = place.and_then(|offset| questions.checked_add(offset));
        let (Some(place), Some(memory)) = (place, self.memory.get()) else { return };
        if asked > 0 && questions != 0 && u64::from(range.slot) < count {
            words[0] = asked as u64;
            // If the guest has no memory there, it asks in vain.
            let _ = memory.snapshot().write_object(place, &words);
        }
    }

    /// An answer: a page that the device has written is clean.
    fn page_clean(&self, record: &Record) {
        let [va, frame, ctx, _] = record.arg;
        let finding = self.state.lock().dirty_lost(record.mm, Handle(ctx), va, frame);
        self.raise(finding.into_iter().collect());
    }

    /// The end of a change of rights: no translation may allow more than the CPU's now.
    fn range_end(&self, record: &Record) {
        let Some(range) = Range::read(record) else { return self.bad_record() };
        let concerned = self.state.lock().range_ends(record.mm);
        let Some(device) = self.device() else { return };
        for ctx in concerned {
            let view = device.range(ctx, (range.start, range.last), false, LOOKED_AT);
            let (Some(view), Some(compare)) = (view, self.compare(ctx)) else { continue };
            if view.released || view.queueless {
                continue;
            }
            let leaves = view.leaves.iter().map(|&leaf| (leaf, false));
            let entries = view.tlb_entries.iter().map(|&entry| (entry, true));
            for ((va, leaf), in_tlb) in leaves.chain(entries) {
                let va = va.max(range.start);
                let (page, verdict) = compare.judged(va, leaf, mirror::leaf_access(leaf));
                if verdict == Verdict::Wrong(Rule::MirrorExcessRights) {
                    let finding =
                        self.state.lock().range_excess(record.mm, &range, (ctx, va, leaf), in_tlb, &page);
                    self.raise(finding.into_iter().collect());
                }
            }
        }
    }

    /// Looks again at translations that were in doubt.
    fn look_at_doubts(&self) {
        let doubts = self.state.lock().doubts();
        let Some(device) = self.device().filter(|_| !doubts.is_empty()) else { return };
        for (ctx, doubt) in doubts {
            let view = device.range(ctx, (doubt.va, doubt.va), false, LOOKED_AT);
            let there = view.filter(|view| !view.released && !view.queueless).is_some_and(|view| {
                view.leaves.iter().chain(&view.tlb_entries).any(|&(_, leaf)| leaf == doubt.leaf)
            });
            let outcome = match (&doubt.cause, there, self.compare(ctx)) {
                (_, false, _) => Outcome::Settled,
                (Cause::Stale(_), true, _) => Outcome::Lasting,
                (Cause::Absent, true, None) => Outcome::Settled,
                (Cause::Absent, true, Some(compare)) => {
                    match compare.judged(doubt.va, doubt.leaf, vgpu_spec::fault::ACCESS_READ) {
                        (_, Verdict::Good) => Outcome::Settled,
                        (_, Verdict::Absent | Verdict::Moving) => Outcome::Lasting,
                        (page, Verdict::Wrong(rule)) => Outcome::Wrong(rule, page),
                    }
                }
            };
            let mut found = Vec::new();
            self.state.lock().doubted(ctx, &doubt, outcome, &mut found);
            self.raise(found);
        }
    }

    /// Looks at what the contexts of an address space still have.
    fn look(&self, mm: u64, moment: Moment) {
        // From here on the contexts' accesses are watched, so none slips through between the look and the watch.
        let concerned = self.state.lock().moment(mm, moment, &self.watched);
        // The kernel is about to free the tables that accesses are held against.
        concerned.iter().for_each(|&ctx| self.mirrors.clear(ctx));
        if !self.config.enabled {
            return;
        }
        for ctx in concerned {
            let view = self.inspect(ctx);
            let mut found = Vec::new();
            self.state.lock().looked(mm, moment, ctx, view, &mut found);
            self.raise(found);
        }
    }

    fn heartbeat(&self, missed: u64) {
        if self.config.enabled {
            self.trace.heartbeat();
        }
        self.look_at_doubts();
        let overdue = self.state.lock().heartbeat(missed);
        for ctx in overdue {
            // Without a device to ask, its events have to do.
            let asked = self.device.lock().is_some();
            let parked = !asked || self.inspect(ctx).is_some_and(|view| view.parked_faults > 0);
            let mut found = Vec::new();
            self.state.lock().looked_for_faults(ctx, parked, &mut found);
            self.raise(found);
        }
    }

    fn raise(&self, found: Vec<Finding>) {
        if !self.config.enabled {
            return;
        }
        for finding in found {
            let key = key(&finding);
            if !self.kept.lock().is_new(&key, self.config.max_violations) {
                continue;
            }
            let page = finding.va.map(|va| va >> pte::PAGE_SHIFT << pte::PAGE_SHIFT);
            let mut violation = Violation::new(finding.rule, finding.summary).at(finding.va, finding.frame);
            violation.events = self.trace.last(finding.ctx, finding.mm, page);
            if let Some(ctx) = finding.ctx {
                violation = violation.on(ctx);
            }
            self.keep(key, violation);
        }
    }

    /// Adds it, unless another thread was faster, and tells the sinks.
    fn keep(&self, key: Key, violation: Violation) {
        {
            let mut kept = self.kept.lock();
            if !kept.is_new(&key, self.config.max_violations) {
                return;
            }
            let at = kept.list.len();
            kept.index.insert(key, at);
            kept.list.push(violation.clone());
        }
        let sinks = self.sinks.lock().clone();
        for sink in &sinks {
            sink(&violation);
        }
    }

    /// Takes a violation found elsewhere: by the console's reader, a workload or a watchdog.
    ///
    /// Taken even if the oracle is not enabled: a kernel that oopses is no matter of taste. If it names a context and has no
    /// events, the last ones are added.
    pub fn report(&self, mut violation: Violation) {
        if violation.events.is_empty() {
            if let Some(ctx) = violation.context.map(Handle) {
                let mm = self.state.lock().mm_of(ctx);
                violation.events = self.trace.last(Some(ctx), mm, violation.address);
            }
        }
        let key = (violation.rule, violation.context, Some(violation.summary.clone()));
        self.keep(key, violation);
    }

    /// Calls `sink` with each violation from now on. It may be called on a device's thread: it must not block or call the device.
    pub fn on_violation(&self, sink: ViolationSink) {
        self.sinks.lock().push(Arc::from(sink));
    }

    /// What was broken so far.
    #[must_use]
    pub fn violations(&self) -> Vec<Violation> {
        self.kept.lock().list.clone()
    }

    /// What was seen so far.
    #[must_use]
    pub fn counters(&self) -> OracleCounters {
        let suppressed = self.kept.lock().suppressed;
        let events = self.trace.len();
        let state = self.state.lock();
        OracleCounters {
            contexts: state.bound,
            address_spaces: state.address_spaces,
            releases: state.releases,
            unregisters: state.unbound,
            heartbeats: state.heartbeats,
            probes_missed: state.probes_missed,
            unassociated_contexts: state.unassociated(),
            witness_records: self.witness_records.load(Relaxed),
            bad_records: state.bad_records,
            bad_associations: state.bad_associations,
            stale_answers: state.stale_answers,
            witness_starts: state.hellos,
            contexts_lost: state.contexts_lost,
            ranges_judged: state.ranges,
            steps_compared: self.compared.load(Relaxed),
            events,
            suppressed,
        }
    }
}

fn key(finding: &Finding) -> Key {
    (finding.rule, finding.ctx.map(|ctx| ctx.0), None)
}
