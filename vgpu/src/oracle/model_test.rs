// SPDX-License-Identifier: MIT OR Apache-2.0
//! A model of a correct driver, driven at random, breaks no rule; garbage neither panics nor grows without bound.

use std::sync::{Arc, Weak};

use proptest::prelude::*;
use vgpu_spec::handle::{Handle, Kind};
use vgpu_spec::pte::{VALID, WRITE};
use vgpu_spec::witness::{self, Record};

use super::oracle_test::Fake;
use super::*;

const LIMIT: u64 = 20;

#[derive(Clone, Debug)]
pub(super) enum Step {
    Fork,
    Open { process: usize, say_so: bool, style: Style },
    Fault { file: usize, page: u64 },
    Serve { file: usize },
    Access { file: usize },
    Invalidate { file: usize },
    StaleAnswer { file: usize },
    Close { file: usize },
    Exit { process: usize },
    Beat,
}

/// How a driver tears down on release.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Style {
    /// RELEASE the context; leaves stay in unreachable tables.
    Stop,
    /// Clear and invalidate; RELEASE at close.
    Clear,
    /// Both.
    Both,
}

pub(super) fn step() -> impl Strategy<Value = Step> {
    let at = 0..16usize;
    let style = prop_oneof![Just(Style::Stop), Just(Style::Clear), Just(Style::Both)];
    prop_oneof![
        1 => Just(Step::Fork),
        3 => (at.clone(), prop::bool::weighted(0.8), style)
            .prop_map(|(process, say_so, style)| Step::Open { process, say_so, style }),
        4 => (at.clone(), 0..8u64).prop_map(|(file, page)| Step::Fault { file, page }),
        4 => at.clone().prop_map(|file| Step::Serve { file }),
        6 => at.clone().prop_map(|file| Step::Access { file }),
        2 => at.clone().prop_map(|file| Step::Invalidate { file }),
        1 => at.clone().prop_map(|file| Step::StaleAnswer { file }),
        2 => at.clone().prop_map(|file| Step::Close { file }),
        1 => at.prop_map(|process| Step::Exit { process }),
        2 => Just(Step::Beat),
    ]
}

struct File {
    ctx: Handle,
    mm: u64,
    style: Style,
    /// The address space is gone; nothing may be mapped.
    frozen: bool,
    stopped: bool,
    fault: Option<(Handle, u64, u64)>,
}

struct Process {
    mm: u64,
    notifiers: u32,
    begun: bool,
    alive: bool,
}

pub(super) struct Model {
    pub(super) oracle: Arc<Oracle>,
    fake: Arc<Fake>,
    processes: Vec<Process>,
    files: Vec<File>,
    generations: [u32; 16],
    next_mm: u64,
    next_fault: u32,
    beats: u64,
}

impl Model {
    pub(super) fn new() -> Self {
        Self::with(OracleConfig::default())
    }
    /// With the smallest trace.
    pub(super) fn small() -> Self {
        Self::with(OracleConfig { trace_bytes: LEAST_BYTES, ..OracleConfig::default() })
    }
    fn with(config: OracleConfig) -> Self {
        let oracle = Oracle::new(OracleConfig { fault_heartbeats: LIMIT, ..config });
        let fake = Arc::new(Fake::default());
        let weak: Weak<dyn Inspect> = Arc::<Fake>::downgrade(&fake);
        oracle.attach(weak);
        Self {
            oracle,
            fake,
            processes: Vec::new(),
            files: Vec::new(),
            generations: [0; 16],
            next_mm: 1,
            next_fault: 0,
            beats: 0,
        }
    }
    fn say(&self, kind: u32, mm: u64, arg: u64) {
        self.oracle.witness(&Record { kind, mm, arg: [arg, 0, 0, 0], ..Record::default() });
    }
    pub(super) fn view(&self, ctx: Handle, change: impl FnOnce(&mut ContextView)) {
        change(self.fake.0.lock().entry(ctx.0).or_default());
    }

    fn open(&mut self, process: usize, say_so: bool, style: Style) {
        let count = self.processes.len();
        let Some(process) = self.processes.get_mut(process % count.max(1)).filter(|p| p.alive) else {
            return;
        };
        let used: Vec<u32> = self.files.iter().map(|file| file.ctx.index()).collect();
        let Some(index) = (0..16).find(|index| !used.contains(index)) else { return };
        if !process.begun {
            process.begun = true;
            self.oracle.witness(&Record { kind: witness::MM_BEGIN, mm: process.mm, ..Record::default() });
        }
        process.notifiers += 1;
        let mm = process.mm;
        self.generations[index as usize] += 1;
        let ctx = Handle::new(Kind::Context, index, self.generations[index as usize]);
        self.say(witness::NOTIFIER_ADDED, mm, 2);
        self.view(ctx, |_| ());
        self.oracle.event(DeviceEvent::ContextBound { ctx, tag: mm });
        if say_so {
            self.say(witness::ASSOCIATE, mm, ctx.0);
        }
        self.files.push(File { ctx, mm, style, frozen: false, stopped: false, fault: None });
    }

    fn map(&self, ctx: Handle, va: u64) {
        let pte = VALID | WRITE | va;
        self.view(ctx, |view| {
            view.live_leaves += 1;
            view.first_leaf = Some((va, pte));
        });
        self.oracle.event(DeviceEvent::LeafSet { ctx, va: Some(va), pte });
    }
    fn access(&self, ctx: Handle, va: u64) {
        self.view(ctx, |view| {
            view.tlb_entries = 1;
            view.in_flight = Some(va);
        });
        self.oracle.access(ctx, va, va, 1);
        self.view(ctx, |view| view.in_flight = None);
    }
    fn clear(&self, ctx: Handle) {
        self.oracle.event(DeviceEvent::LeafCleared { ctx, va: None, count: 1 });
        self.oracle.event(DeviceEvent::Invalidate { ctx, start: 0, last: u64::MAX });
        self.view(ctx, |view| {
            *view = ContextView { parked_faults: view.parked_faults, ..ContextView::default() };
        });
        self.oracle.event(DeviceEvent::InvalidateDone { ctx, start: 0, last: u64::MAX });
    }
    fn stop(&mut self, file: usize) {
        let Some(file) = self.files.get_mut(file) else { return };
        if std::mem::replace(&mut file.stopped, true) {
            return;
        }
        let ctx = file.ctx;
        if let Some((fault, va, _)) = file.fault.take() {
            self.oracle.event(DeviceEvent::FaultDropped { fault, ctx, va });
        }
        self.view(ctx, |view| *view = ContextView { released: true, ..ContextView::default() });
        self.oracle.event(DeviceEvent::ContextReleased { ctx });
    }
    fn raise(&mut self, file: usize, va: u64, again: u32) {
        self.next_fault += 1;
        let fault = Handle::new(Kind::Fault, self.next_fault % 64, self.next_fault);
        let file = &mut self.files[file];
        file.fault = Some((fault, va, self.beats));
        let ctx = file.ctx;
        self.view(ctx, |view| view.parked_faults = 1);
        self.oracle.event(DeviceEvent::FaultRaised { fault, ctx, va, access: 1, again });
    }
    fn serve(&mut self, at: usize) {
        let Some(file) = self.files.get_mut(at) else { return };
        let Some((fault, va, _)) = file.fault.take() else { return };
        let (ctx, frozen) = (file.ctx, file.frozen);
        self.view(ctx, |view| view.parked_faults = 0);
        if frozen {
            self.oracle.event(DeviceEvent::FaultCancelled { fault, ctx, va });
        } else {
            self.map(ctx, va);
            self.oracle.event(DeviceEvent::FaultReplayed { fault, ctx, va });
            self.access(ctx, va);
        }
    }
    fn close(&mut self, at: usize) {
        if at >= self.files.len() {
            return;
        }
        self.stop(at);
        let file = self.files.remove(at);
        self.fake.0.lock().remove(&file.ctx.0);
        self.oracle.event(DeviceEvent::ContextUnbound { ctx: file.ctx, leak: Leak::default() });
        self.say(witness::NOTIFIER_REMOVED, file.mm, 2);
        let Some(process) = self.processes.iter_mut().find(|p| p.mm == file.mm) else { return };
        process.notifiers -= 1;
        if !process.alive && process.notifiers == 0 {
            let mm = process.mm;
            self.processes.retain(|p| p.mm != mm);
            self.say(witness::MM_END, mm, 0);
        }
    }
    fn exit(&mut self, process: usize) {
        let count = self.processes.len();
        let Some(process) = self.processes.get_mut(process % count.max(1)) else { return };
        if !std::mem::replace(&mut process.alive, false) || !process.begun {
            return;
        }
        let (mm, ended) = (process.mm, process.notifiers == 0);
        for at in 0..self.files.len() {
            let file = &mut self.files[at];
            if file.mm != mm {
                continue;
            }
            file.frozen = true;
            let (ctx, style) = (file.ctx, file.style);
            if style != Style::Stop {
                self.clear(ctx);
            }
            if style != Style::Clear {
                self.stop(at);
            }
        }
        self.say(witness::MM_RELEASED, mm, 0);
        self.say(witness::MM_UNMAPPED, mm, 0);
        // An answer decided before release, sent only now: the access faults again.
        for at in 0..self.files.len() {
            if let (true, Some((fault, va, _))) = (self.files[at].mm == mm, self.files[at].fault.take()) {
                self.oracle.event(DeviceEvent::FaultReplayed { fault, ctx: self.files[at].ctx, va });
                self.raise(at, va, 1);
            }
        }
        if ended {
            self.processes.retain(|p| p.mm != mm);
            self.say(witness::MM_END, mm, 0);
        }
    }

    pub(super) fn run(&mut self, step: &Step) {
        let files = self.files.len().max(1);
        match *step {
            Step::Fork => {
                self.processes.push(Process { mm: self.next_mm, notifiers: 0, begun: false, alive: true });
                self.next_mm += 1;
            }
            Step::Open { process, say_so, style } => self.open(process, say_so, style),
            Step::Fault { file, page } => {
                if self.files.get(file % files).is_some_and(|f| !f.stopped && f.fault.is_none()) {
                    self.raise(file % files, 0x1000 * (page + 1), 0);
                }
            }
            Step::Serve { file } => self.serve(file % files),
            Step::Access { file } => {
                let Some(file) = self.files.get(file % files) else { return };
                let mapped = self.fake.0.lock().get(&file.ctx.0).and_then(|view| view.first_leaf);
                if let (false, Some((va, _))) = (file.stopped, mapped) {
                    self.access(file.ctx, va);
                }
            }
            Step::Invalidate { file } => {
                if let Some(file) = self.files.get(file % files).filter(|f| !f.stopped) {
                    self.clear(file.ctx);
                }
            }
            Step::StaleAnswer { file } => {
                if self.files.get(file % files).is_some() {
                    let handle = Handle::new(Kind::Fault, 1, 1);
                    let event = DeviceEvent::BadHandle {
                        op: "FAULT_CANCEL",
                        handle,
                        issued_before: true,
                        by: None,
                        va: None,
                    };
                    self.oracle.event(event);
                }
            }
            Step::Close { file } => self.close(file % files),
            Step::Exit { process } => self.exit(process),
            Step::Beat => {
                // A correct driver answers in time, if only just.
                for at in 0..self.files.len() {
                    if self.files[at].fault.is_some_and(|(.., since)| self.beats - since >= LIMIT) {
                        self.serve(at);
                    }
                }
                self.beats += 1;
                self.say(witness::HEARTBEAT, 0, self.beats);
            }
        }
    }
}

pub(super) fn any_event() -> impl Strategy<Value = DeviceEvent> {
    let handle = || {
        prop_oneof![
            (0..6u32, 0..4u32, 0..4u32).prop_map(|(kind, index, generation)| Handle(
                u64::from(generation) << 32 | u64::from(kind) << 24 | u64::from(index)
            )),
            any::<u64>().prop_map(Handle),
        ]
    };
    let va = || prop_oneof![0..0x8000u64, any::<u64>()];
    let leak = (any::<u32>(), any::<u32>()).prop_map(|(table_pages, faults)| Leak {
        table_pages,
        faults,
        ..Leak::default()
    });
    prop_oneof![
        handle().prop_map(|ctx| DeviceEvent::ContextBound { ctx, tag: 0 }),
        handle().prop_map(|ctx| DeviceEvent::ContextReleased { ctx }),
        handle().prop_map(|ctx| DeviceEvent::ReleaseAgain { ctx }),
        (handle(), leak).prop_map(|(ctx, leak)| DeviceEvent::ContextUnbound { ctx, leak }),
        (handle(), any::<bool>(), any::<Option<u64>>()).prop_map(|(handle, issued_before, va)| {
            DeviceEvent::BadHandle { op: "walk", handle, issued_before, by: None, va }
        }),
        (handle(), any::<Option<u64>>(), any::<u64>()).prop_map(|(ctx, va, pte)| DeviceEvent::LeafSet {
            ctx,
            va,
            pte
        }),
        (handle(), any::<Option<u64>>(), any::<u32>())
            .prop_map(|(ctx, va, count)| DeviceEvent::LeafCleared { ctx, va, count }),
        (handle(), va(), va()).prop_map(|(ctx, start, last)| DeviceEvent::Invalidate { ctx, start, last }),
        (handle(), handle(), va(), prop_oneof![0..3u32, any::<u32>()]).prop_map(|(fault, ctx, va, again)| {
            DeviceEvent::FaultRaised { fault, ctx, va, access: 7, again }
        }),
        (handle(), handle(), va()).prop_map(|(fault, ctx, va)| DeviceEvent::FaultReplayed { fault, ctx, va }),
        (handle(), handle(), va(), va()).prop_map(|(ctx, queue, start, last)| DeviceEvent::RingFreed {
            ring: RingView { used: RingUse::Queue, ctx, queue },
            start,
            last
        }),
        any::<u32>().prop_map(|contexts_live| DeviceEvent::Disabled { leak: Leak::default(), contexts_live }),
        Just(DeviceEvent::Reset),
    ]
}

pub(super) fn any_record() -> impl Strategy<Value = Record> {
    let handle = prop_oneof![
        (0..4u64, 0..4u64).prop_map(|(g, i)| g << 32 | 1 << 24 | i),
        any::<u64>(),
        Just(u64::MAX)
    ];
    (0..18u32, prop_oneof![0..6u64, any::<u64>()], handle, any::<u64>()).prop_map(|(kind, mm, a, b)| Record {
        kind,
        mm,
        arg: [a, b, 0, 0],
        ..Record::default()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn a_correct_driver_breaks_nothing(steps in prop::collection::vec(step(), 0..200)) {
        let mut model = Model::new();
        model.run(&Step::Fork);
        for step in &steps {
            model.run(step);
            let found = model.oracle.violations();
            prop_assert!(found.is_empty(), "{step:?}: {found:#?}");
        }
        while !model.files.is_empty() {
            model.close(0);
        }
        model.oracle.event(DeviceEvent::Disabled { leak: Leak::default(), contexts_live: 0 });
        let counters = model.oracle.counters();
        prop_assert!(model.oracle.violations().is_empty());
        prop_assert_eq!((counters.bad_records, counters.bad_associations), (0, 0));
        prop_assert_eq!(counters.contexts, counters.unregisters);
        let (contexts, _, faults) = model.oracle.state.lock().sizes();
        prop_assert_eq!((contexts, faults), (0, 0));
    }

    #[test]
    fn the_same_driver_without_teardown_is_found(steps in prop::collection::vec(step(), 0..60), leaf in 1..9u64) {
        let mut model = Model::new();
        model.run(&Step::Fork);
        for step in &steps {
            model.run(step);
        }
        // One more process, whose exit does nothing.
        model.run(&Step::Fork);
        let last = model.processes.len() - 1;
        if model.files.len() >= 16 {
            model.close(0);
        }
        model.open(last.min(model.processes.len() - 1), true, Style::Clear);
        let file = model.files.last().map(|file| (file.ctx, file.mm)).unwrap_or_default();
        prop_assert!(model.processes.iter().any(|p| p.mm == file.1));
        model.map(file.0, leaf << 12);
        model.say(witness::MM_RELEASED, file.1, 0);
        let found = model.oracle.violations();
        prop_assert_eq!(found.len(), 1);
        prop_assert_eq!((found[0].rule, found[0].context), (Rule::ReleaseLate, Some(file.0.0)));
        prop_assert_eq!(found[0].address, Some(leaf << 12));
    }

    #[test]
    fn garbage_is_harmless(
        ops in prop::collection::vec(prop_oneof![any_event().prop_map(Ok), any_record().prop_map(Err)], 0..300),
        live in prop::collection::vec((0..4u32, 0..4u32, any::<bool>(), any::<u64>()), 0..8),
    ) {
        let model = Model::new();
        for (index, generation, released, n) in live {
            let view = ContextView { released, live_leaves: n, tlb_entries: n, parked_faults: n as u32, in_flight: (n % 3 == 0).then_some(n), ..ContextView::default() };
            model.view(Handle::new(Kind::Context, index, generation), |v| *v = view);
        }
        for op in ops {
            match op {
                Ok(event) => {
                    model.oracle.event(event);
                    if let DeviceEvent::LeafSet { ctx, va, pte } = event {
                        model.oracle.access(ctx, va.unwrap_or(pte), pte, pte as u32);
                    }
                }
                Err(record) => model.oracle.witness(&record),
            }
        }
        let found = model.oracle.violations();
        prop_assert!(found.len() <= 100);
        for violation in &found {
            prop_assert!(violation.events.len() <= 20 && !violation.summary.is_empty());
        }
        let _ = model.oracle.counters();
    }
}
