// SPDX-License-Identifier: MIT OR Apache-2.0
//! The oracle: judges, from the device's side, how a driver keeps the device's view of an address space.
//!
//! It is fed by the device ([`Oracle::event`], [`Oracle::access`]) and by the guest's witness module ([`Oracle::witness`]).
//! The rules and their reasons are in docs/rules.
//!
//! Judging is a function of one stream of inputs ([`input`]), which the trace keeps: `check` comes to the same verdict from a file.
//!
//! Locks: the state's first, then those of what was found and of the trace; all others are held for moments and never while
//! another is taken. None is held while the device is asked ([`Inspect`]) or a sink is called, so the device may call in with its
//! own locks held. But for one: what was written is asked of the device with the lock of [`dirt`] held, and it takes only the locks of its
//! TLBs for that, with none of which it calls in.

mod check;
mod dirt;
mod doubt;
mod event;
mod input;
mod livelock;
mod mirror;
mod moments;
mod private;
mod range;
mod rule;
mod stable;
mod state;
mod trace;
mod violation;

#[cfg(test)]
mod livelock_test;
#[cfg(test)]
mod model_test;
#[cfg(test)]
mod oracle_test;
#[cfg(test)]
mod range_test;
#[cfg(test)]
mod release_test;
#[cfg(test)]
mod stable_test;

pub use check::{Checked, check};
pub use event::{ContextView, DeviceEvent, Inspect, Leak, RangeView, RingUse, RingView, Unusable, Written};
pub use mirror::Compare;
pub use rule::Rule;
#[cfg(any(test, feature = "testing"))]
pub use trace::file_of_records;
pub use trace::{DEFAULT_BYTES, LEAST_BYTES, MOST_BYTES, TraceError, TraceFile, describe, file_bytes};
pub use violation::{OracleCounters, Violation};

use std::collections::HashMap;
use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, OnceLock, Weak};

use arc_swap::ArcSwapOption;
use parking_lot::{Mutex, MutexGuard};
use vgpu_spec::handle::Handle;
use vgpu_spec::pte;
use vgpu_spec::witness::{self, Record};

use dirt::{Dirt, Fate, Mark};
use input::{Asked, Input};
use mirror::{Mirrors, Verdict};
use moments::Moment;
use private::Sight;
use range::{Demand, Range};
use state::{Finding, State, Watched};
use trace::Trace;

use crate::cpu::{Format, Kind, Space};
use crate::memory::{Snapshot, SystemMemory};

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
    /// Bytes of the trace, [`LEAST_BYTES`] to [`MOST_BYTES`]: a ring, the oldest events give way.
    pub trace_bytes: u64,
}

impl Default for OracleConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            fault_heartbeats: 100,
            max_violations: 100,
            contexts: 64,
            coherent_atomics: true,
            trace_bytes: DEFAULT_BYTES,
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

/// Where questions about invalidations go, in the guest's memory.
struct Places {
    slots: Slots,
    memory: Snapshot,
}

impl Places {
    /// That of the invalidation in a slot.
    fn of(&self, slot: u32) -> Option<u64> {
        let Slots { count, questions, .. } = self.slots;
        let offset = u64::from(slot).checked_mul(8 * witness::QUESTION_WORDS)?;
        questions.checked_add(offset).filter(|_| questions != 0 && u64::from(slot) < count)
    }

    fn load(&self, slot: u32) -> Option<u64> {
        Some(self.memory.atomic_u64(self.of(slot)?, false).ok()?.load(SeqCst))
    }

    /// Puts questions there, or none. If the guest has no memory there, it asks in vain.
    fn put(&self, slot: u32, words: Option<dirt::Words>) {
        let Some(place) = self.of(slot) else { return };
        let _ = match words {
            Some(words) => self.memory.write_object(place, &words),
            None => self.memory.store_u64(place, 0),
        };
    }
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

    fn add(&mut self, key: Key, violation: Violation) {
        self.index.insert(key, self.list.len());
        self.list.push(violation);
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
    /// Pages written that nobody has been told of.
    dirt: Mutex<Dirt>,
    /// Steps held against the CPU's tables.
    compared: AtomicU64,
    /// Some page of VRAM was given back, and the CPU's tables still named it.
    outliving: AtomicBool,
    trace: Trace,
    state: Mutex<State>,
    kept: Mutex<Kept>,
    witness_records: AtomicU64,
    device: Mutex<Option<Weak<dyn Inspect>>>,
    sinks: Mutex<Vec<Arc<SinkFn>>>,
}

impl Oracle {
    /// An oracle that has seen nothing. Its trace is in memory.
    #[must_use]
    pub fn new(config: OracleConfig) -> Arc<Self> {
        Self::with(config, Trace::new(&config))
    }

    /// One whose trace is in `file`: zeroes, [`file_bytes`] long, with all its blocks there. `about` says what is run.
    ///
    /// # Errors
    /// If the file is shorter or cannot be mapped.
    pub fn with_trace(config: OracleConfig, file: File, about: &str) -> std::io::Result<Arc<Self>> {
        Ok(Self::with(config, Trace::create(&config, file, about)?))
    }

    fn with(config: OracleConfig, trace: Trace) -> Arc<Self> {
        Arc::new(Self {
            config,
            watched: Watched::new(if config.enabled { config.contexts } else { 0 }),
            mirrors: Mirrors::new(if config.enabled { config.contexts } else { 0 }),
            memory: OnceLock::new(),
            format: ArcSwapOption::empty(),
            slots: Mutex::default(),
            dirt: Mutex::default(),
            compared: AtomicU64::new(0),
            outliving: AtomicBool::new(false),
            trace,
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

    /// Judges an input, which so gets its place in the order of events.
    fn judge(&self, input: &Input) -> Asked {
        self.judge_in(self.state.lock(), input)
    }

    /// The same where invalidations under way matter: those that are over are found out before.
    fn judge_settled(&self, input: &Input, mm: impl FnOnce(&State) -> Option<u64>) -> Asked {
        self.with_live(|live| {
            let mut state = self.state.lock();
            if let Some(mm) = mm(&state) {
                let mut over = |slot, number| self.trace.push(&Input::Over { mm, slot, number });
                state.settle(mm, live, &mut over);
            }
            self.judge_in(state, input)
        })
    }

    fn judge_in(&self, mut state: MutexGuard<'_, State>, input: &Input) -> Asked {
        let mut found = Vec::new();
        let asked = state.apply(input, &self.watched, &self.mirrors, &mut found);
        let worth = !input.repeats() || asked.changed || found.iter().any(|finding| self.is_new(finding));
        if worth {
            self.trace.push(input);
        }
        let new = self.keep_found(found);
        drop(state);
        self.tell(&new);
        asked
    }

    /// Something happened on the device.
    ///
    /// To be called before the guest can learn of it, and for one context or fault in the order in which things happened.
    pub fn event(&self, event: DeviceEvent) {
        use DeviceEvent as E;
        let (mut told, mut attended) = (true, false);
        if self.config.enabled {
            match event {
                E::LeafCleared { .. }
                | E::Invalidate { .. }
                | E::InvalidateDone { .. }
                | E::JobDone { .. }
                | E::DataGranted { .. } => told = false,
                E::LeafSet { ctx, va, .. } => {
                    attended = va.is_some() && self.mirrors.wants(ctx);
                    told = self.watched.contains(ctx);
                }
                E::ContextReleased { ctx } | E::ContextUnbound { ctx, .. } => self.mirrors.clear(ctx),
                E::Reset => {
                    self.mirrors.clear_all();
                    self.dirt.lock().clear();
                }
                _ => {}
            }
        } else if !matches!(event, E::ContextBound { .. } | E::ContextUnbound { .. } | E::Reset) {
            return;
        }
        let input = Input::Device { event, told, attended };
        match event {
            E::DataReturned { ctx, page } => self.data_returned(ctx, page, &input),
            E::LeafSet { ctx, .. } if attended => drop(self.judge_settled(&input, |state| state.mm_of(ctx))),
            E::FaultRaised { ctx, again, .. } if told && again >= livelock::REPLAYS => {
                self.judge_settled(&input, |state| state.mm_of(ctx));
            }
            _ if told => drop(self.judge(&input)),
            _ => self.trace.push(&input),
        }
        if let E::DataGranted { page, .. } | E::DataReturned { page, .. } = event {
            self.look_at_outliving(Sight::Again, |one| one.page != page && one.page.index() == page.index());
        }
        if let E::LeafSet { ctx, va: Some(va), pte } = event {
            if let Some(compare) = self.compare(ctx) {
                compare.leaf(va, pte);
            }
        }
    }

    /// Calls `with` with a function that says whether an invalidation has not ended.
    fn with_live<T>(&self, with: impl FnOnce(range::Live<'_>) -> T) -> T {
        let Slots { base, count, .. } = *self.slots.lock();
        let snapshot = self.memory.get().map(|memory| memory.snapshot());
        with(&|slot, number| {
            let slot = u64::from(slot);
            let word = snapshot
                .as_ref()
                .filter(|_| slot < count)
                .and_then(|snapshot| snapshot.atomic_u64(base.checked_add(8 * slot)?, false).ok());
            word.is_some_and(|word| word.load(SeqCst) == number)
        })
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
        self.judge(&Input::Access { ctx, va, frame, access });
    }

    /// The witness reports. Returns when the record has been judged.
    pub fn witness(&self, record: &Record) {
        self.witness_records.fetch_add(1, Relaxed);
        let input = Input::Witness(*record);
        match record.kind {
            witness::HELLO => {
                self.mirrors.clear_all();
                self.format.store(None);
                *self.slots.lock() = Slots::default();
                self.dirt.lock().clear();
                self.judge(&input);
            }
            witness::CPU_FORMAT => {
                self.judge(&input);
                if let Some(format) = Format::from_record(record.arg) {
                    self.format.store(Some(Arc::new(format)));
                }
            }
            witness::RANGE_SLOTS => {
                self.judge(&input);
                let [base, count, questions, _] = record.arg;
                *self.slots.lock() = Slots { base, count, questions };
            }
            witness::RANGE_START => self.range_start(record, &input),
            witness::RANGE_END => self.range_end(record, &input),
            witness::HEARTBEAT => self.heartbeat(record, &input),
            witness::ASSOCIATE => self.associate(record),
            witness::PAGE_CLEAN => self.page_clean(record, &input),
            witness::DMA_FREED => self.freed(record, &input),
            // What is in it is no business of the oracle's.
            witness::MESSAGE => {}
            kind => match Moment::of(kind) {
                Some(moment) => {
                    self.look(record.mm, moment, &input);
                    if moment == Moment::End {
                        self.judge(&Input::Ended { mm: record.mm });
                    }
                }
                None => drop(self.judge(&input)),
            },
        }
    }

    /// The witness announced a record that cannot be read or is none.
    pub(crate) fn bad_record(&self) {
        self.judge(&Input::BadRecord);
    }

    fn device(&self) -> Option<Arc<dyn Inspect>> {
        self.device.lock().as_ref().and_then(Weak::upgrade)
    }

    fn inspect(&self, ctx: Handle) -> Option<ContextView> {
        self.device()?.context(ctx)
    }

    fn associate(&self, record: &Record) {
        let ctx = Handle(record.arg[0]);
        let known = self.state.lock().knows(ctx);
        let live = known || self.inspect(ctx).is_some();
        if let Some(root) = self.judge(&Input::Associate { record: *record, live }).root {
            self.mirrors.set(ctx, root);
        }
    }

    /// The start of an invalidation has returned 0: what must not be there any more is looked for while its caller waits.
    fn range_start(&self, record: &Record, input: &Input) {
        if let Some(range) = Range::read(record).filter(Range::unmaps) {
            self.look_at_absent(record.mm, (range.start, range.last));
        }
        let concerned = self.judge_settled(input, |_| Some(record.mm)).contexts;
        let (Some(range), Some(device)) = (Range::read(record), self.device()) else { return };
        if !self.config.enabled {
            return;
        }
        for &ctx in &concerned {
            let no_write = range.demand() == Demand::NoWrite;
            let Some(view) = device.range(ctx, (range.start, range.last), no_write, 1) else { continue };
            self.judge(&Input::RangeView { mm: record.mm, range, ctx, view });
        }
        self.ask_for_dirt(device.as_ref(), record.mm, &range);
    }

    /// Asks the witness whether pages that the device has written are dirty, now that the driver has let go of them. Where the
    /// CPU's entry is dirty by itself, or is another page's, there is nothing to ask.
    fn ask_for_dirt(&self, device: &dyn Inspect, mm: u64, range: &Range) {
        let fate = range.fate();
        let (Some(places), false) = (self.places(), fate == Fate::Untouched) else { return };
        // Whoever has no notifier any more, or is Released, may have written before.
        let contexts = self.state.lock().contexts_of(mm);
        let mut marks = Vec::new();
        {
            // A context that ends meanwhile hands over what it has written under this lock, so it is in one place or the other.
            let mut dirt = self.dirt.lock();
            dirt.fetch(|slot| places.load(slot));
            for ctx in contexts {
                let written = device.take_written(ctx, (range.start, range.last));
                marks.extend(written.into_iter().map(|written| Mark::new(ctx, written)));
            }
            dirt.begin(mm, range, &mut marks);
        }
        self.only_clean(mm, &mut marks);
        // Under the lock: whoever fetches answers finds the questions there.
        let mut dirt = self.dirt.lock();
        places.put(range.slot, dirt.ask(range, &marks));
    }

    /// Leaves those whose pages the CPU has, and has not written. Of where the driver moves pages by itself nothing is said: one may have
    /// gone and come home.
    fn only_clean(&self, mm: u64, marks: &mut Vec<Mark>) {
        let root = {
            let state = self.state.lock();
            marks.retain(|mark| !state.moved_by_owner(mm, mark.va));
            state.root_of(mm)
        };
        let (Some(root), Some((format, memory))) = (root, self.tables()) else { return marks.clear() };
        let space = Space { root, format };
        marks.retain(|mark| {
            let page = space.walk(&memory, mark.va);
            matches!(page.kind, Kind::Present | Kind::ProtNone) && !page.dirty && page.frame == mark.frame
        });
    }

    /// An answer: a page is clean.
    fn page_clean(&self, record: &Record, input: &Input) {
        let [va, frame, ctx, number] = record.arg;
        let mark = Mark { va, frame, ctx: Handle(ctx) };
        // It is not in the trace if it counts for nothing.
        if !self.dirt.lock().answered(record.mm, number, mark) {
            return;
        }
        let mut still = vec![mark];
        self.only_clean(record.mm, &mut still);
        if !still.is_empty() {
            self.judge(input);
        }
    }

    /// Memory of the device's is given back. Only what the device has still is worth a place in the trace.
    fn freed(&self, record: &Record, input: &Input) {
        let [start, bytes, ..] = record.arg;
        let last = bytes.checked_sub(1).and_then(|more| start.checked_add(more));
        let (Some(last), Some(device)) = (last, self.device().filter(|_| self.config.enabled)) else {
            return;
        };
        let rings = device.rings((start, last));
        if !rings.is_empty() {
            self.judge(input);
        }
        for ring in rings {
            self.event(DeviceEvent::RingFreed { ring, start, last });
        }
    }

    fn places(&self) -> Option<Places> {
        let slots = *self.slots.lock();
        Some(Places { slots, memory: self.memory.get()?.snapshot() })
    }

    /// A context ends, or is Released: nobody asks the device any more what it has written for it, which `written` takes out. To be
    /// called before [`DeviceEvent::ContextReleased`]; the device may hold its own locks, but those of its TLBs.
    pub fn ends_having_written(&self, ctx: Handle, written: &dyn Fn() -> Vec<Written>) {
        if !self.config.enabled {
            return;
        }
        let mm = self.state.lock().living_mm_of(ctx);
        let mut dirt = self.dirt.lock();
        let written = written();
        if let Some(mm) = mm {
            written.into_iter().for_each(|written| dirt.owe(mm, Mark::new(ctx, written)));
        }
    }

    /// The end of a change of rights: no translation may allow more than the CPU's now.
    fn range_end(&self, record: &Record, input: &Input) {
        let concerned = self.judge(input).contexts;
        let (Some(range), Some(device)) = (Range::read(record), self.device()) else { return };
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
                    self.judge(&Input::Excess { mm: record.mm, range, ctx, va, leaf, in_tlb, page });
                }
            }
        }
    }

    /// Looks at what the contexts of an address space still have.
    fn look(&self, mm: u64, moment: Moment, input: &Input) {
        if moment == Moment::Released {
            // Its tables are as the last task left them.
            self.look_at_absent(mm, (0, u64::MAX));
            self.look_at_outliving(Sight::Last, |one| one.place.mm == mm);
        }
        // From here on the contexts' accesses are watched, so none slips through between the look and the watch.
        let concerned = self.judge(input).contexts;
        // And nothing is owed for it any more, for it has ended.
        self.dirt.lock().forget(mm);
        // The kernel is about to free the tables that accesses are held against.
        concerned.iter().for_each(|&ctx| self.mirrors.clear(ctx));
        if !self.config.enabled {
            return;
        }
        for ctx in concerned {
            let view = self.inspect(ctx);
            self.judge(&Input::View { mm, moment, ctx, view });
        }
    }

    fn heartbeat(&self, record: &Record, input: &Input) {
        let missed = self.dirt.lock().missed(record.arg[1]);
        if let Some(device) = self.device().filter(|_| missed) {
            let contexts = self.state.lock().contexts();
            contexts.into_iter().for_each(|ctx| drop(device.take_written(ctx, (0, u64::MAX))));
        }
        self.look_at_doubts();
        self.look_at_outliving(Sight::Beat, |_| true);
        for ctx in self.judge(input).contexts {
            // Without a device to ask, its events have to do.
            let asked = self.device.lock().is_some();
            let parked = !asked || self.inspect(ctx).is_some_and(|view| view.parked_faults > 0);
            self.judge(&Input::Parked { ctx, parked });
        }
    }

    fn is_new(&self, finding: &Finding) -> bool {
        !self.kept.lock().index.contains_key(&key(finding))
    }

    /// Keeps what is new of what was found. Called with the state's lock held: what is found first is what was told first.
    fn keep_found(&self, found: Vec<Finding>) -> Vec<Violation> {
        let mut new = Vec::new();
        for finding in found.into_iter().filter(|_| self.config.enabled) {
            let key = key(&finding);
            let mut kept = self.kept.lock();
            if !kept.is_new(&key, self.config.max_violations) {
                continue;
            }
            let page = finding.va.map(|va| va >> pte::PAGE_SHIFT << pte::PAGE_SHIFT);
            let mut violation = Violation::new(finding.rule, finding.summary).at(finding.va, finding.frame);
            violation.events = self.trace.last(finding.ctx, finding.mm, page);
            if let Some(ctx) = finding.ctx {
                violation = violation.on(ctx);
            }
            kept.add(key, violation.clone());
            new.push(violation);
        }
        new
    }

    fn tell(&self, new: &[Violation]) {
        if new.is_empty() {
            return;
        }
        let sinks = self.sinks.lock().clone();
        for violation in new {
            sinks.iter().for_each(|sink| sink(violation));
        }
    }

    /// Takes a violation found elsewhere: by the console's reader, a workload or a watchdog.
    ///
    /// Taken even if the oracle is not enabled: a kernel that oopses is no matter of taste. If it names a context and has no
    /// events, the last ones are added.
    pub fn report(&self, mut violation: Violation) {
        let state = self.state.lock();
        self.trace.push(&Input::Report(Box::new(violation.clone())));
        if violation.events.is_empty() {
            if let Some(ctx) = violation.context.map(Handle) {
                violation.events = self.trace.last(Some(ctx), state.mm_of(ctx), violation.address);
            }
        }
        let key = (violation.rule, violation.context, Some(violation.summary.clone()));
        {
            let mut kept = self.kept.lock();
            if !kept.is_new(&key, self.config.max_violations) {
                return;
            }
            kept.add(key, violation.clone());
        }
        drop(state);
        self.tell(std::slice::from_ref(&violation));
    }

    /// The run is over: `gaps` says why it proves nothing, if nothing was found. A trace in a file is closed.
    ///
    /// # Errors
    /// Those of the trace's file.
    pub fn finish(&self, gaps: &[String]) -> std::io::Result<()> {
        for gap in gaps {
            self.trace.push(&Input::Gap(gap.clone()));
        }
        self.trace.close()
    }

    /// What the trace's file would hold, were it closed now.
    #[must_use]
    pub fn trace(&self) -> Vec<u8> {
        self.trace.snapshot()
    }

    /// Events in the trace so far, those that gave way included, and the bytes they take.
    #[must_use]
    pub fn trace_size(&self) -> (u64, u64) {
        self.trace.size()
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
        let events = self.trace.activity();
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
