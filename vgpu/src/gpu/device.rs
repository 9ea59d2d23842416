// SPDX-License-Identifier: MIT OR Apache-2.0
//! The device's state, shared by its threads and the register handlers.

use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};
use std::thread::Thread;

use parking_lot::Mutex;
use vgpu_spec::handle::{Handle, Kind};
use vgpu_spec::pte::leaf_shift;
use vgpu_spec::regs::gpu::{
    CAP_COHERENT_ATOMICS, CAPS, CONTEXTS, CTRL, CTRL_ENABLE, DATA_PAGES, ENGINES, ERROR_CMD_RING,
    ERROR_FAULT_BUFFER, ERROR_QUEUE, QUEUES, TABLE_PAGES,
};

use super::GpuConfig;
use super::command::{Core, RingRequest};
use super::context::{Context, State};
use super::counters::{DeviceCounters, EngineCounters, GpuCounters, count};
use super::fault::Faults;
use super::inflight::InFlight;
use super::irq::Interrupts;
use super::jitter::Jitter;
use super::pages::Pages;
use super::queue::{self, Queue};
use super::registers::Registers;
use super::sched::Scheduler;
use super::tables::{Change, Tables};
use super::tlb::{Micro, Tlb};
use crate::memory::{Region, SystemMemory};
use crate::oracle::{DeviceEvent, Leak, Oracle, Unusable};
use crate::pci::ConfigSpace;

/// The part of an engine that others see.
pub(crate) struct EngineSide {
    pub(crate) in_flight: InFlight,
    pub(crate) micro: Micro,
    /// By context index.
    pub(crate) tlbs: Box<[Mutex<Tlb>]>,
    pub(crate) counters: EngineCounters,
}

/// Wakes the command processor.
#[derive(Default)]
pub(crate) struct Signal {
    pending: AtomicBool,
    thread: OnceLock<Thread>,
}

impl Signal {
    pub(crate) fn notify(&self) {
        if !self.pending.swap(true, SeqCst) {
            if let Some(thread) = self.thread.get() {
                thread.unpark();
            }
        }
    }
    /// Called by the thread that will wait, before its first look at what there is to do.
    pub(crate) fn attach(&self) {
        let _ = self.thread.set(std::thread::current());
    }
    pub(crate) fn wait(&self) {
        while !self.pending.swap(false, SeqCst) {
            std::thread::park();
        }
    }
}

/// Everything the device is.
pub(crate) struct Device {
    pub(crate) config: GpuConfig,
    pub(crate) memory: Arc<SystemMemory>,
    pub(crate) oracle: Arc<Oracle>,
    pub(crate) vram: Region,
    pub(crate) vram_file: File,
    pub(crate) interrupts: Interrupts,
    pub(crate) counters: DeviceCounters,
    pub(crate) registers: Registers,
    pub(crate) pci: Mutex<ConfigSpace>,
    pub(crate) bus_master: AtomicBool,
    pub(crate) tables: Tables,
    pub(crate) data: Pages,
    pub(crate) contexts: Box<[Context]>,
    pub(crate) queues: Box<[Queue]>,
    pub(crate) engines: Box<[EngineSide]>,
    pub(crate) faults: Faults,
    pub(crate) sched: Scheduler,
    pub(crate) core: Mutex<Core>,
    pub(crate) ring_request: Mutex<Option<RingRequest>>,
    pub(crate) signal: Signal,
    pub(crate) jitter: Jitter,
    /// Held for an atomic on system memory that is not coherent with the CPUs'; the last lock.
    pub(crate) atomics: Mutex<()>,
    /// A command waits for engines: they tell when a step or a queue's end is over.
    pub(crate) draining: AtomicBool,
    /// An interrupt for jobs that were killed has not been raised yet.
    pub(crate) owed: AtomicBool,
    /// Some engine holds the interrupt for a fault back, and owes it.
    pub(crate) holding_back: AtomicBool,
    /// So many jobs yet that would write to VRAM fail instead.
    pub(crate) copies_fail: AtomicU32,
    pub(crate) stop: AtomicBool,
}

impl Device {
    pub(crate) fn new(
        config: GpuConfig,
        memory: Arc<SystemMemory>,
        oracle: Arc<Oracle>,
        (vram, vram_file): (Region, File),
        interrupts: Interrupts,
        pci: ConfigSpace,
    ) -> Self {
        let data_pages = (vram.bytes() >> 12) as u32;
        let fixed = vec![
            (CAPS, if config.coherent_atomics { CAP_COHERENT_ATOMICS } else { 0 }),
            (CONTEXTS, config.contexts),
            (ENGINES, config.engines),
            (QUEUES, config.queues),
            (TABLE_PAGES, config.table_pages),
            (DATA_PAGES, data_pages),
        ];
        let engine = || EngineSide {
            in_flight: InFlight::new(),
            micro: Micro::new(),
            tlbs: (0..config.contexts).map(|_| Mutex::default()).collect(),
            counters: EngineCounters::default(),
        };
        Self {
            config,
            memory,
            oracle,
            vram,
            vram_file,
            interrupts,
            counters: DeviceCounters::default(),
            registers: Registers::new(fixed),
            pci: Mutex::new(pci),
            bus_master: AtomicBool::new(false),
            tables: Tables::new(config.table_pages),
            data: Pages::new(Kind::DataPage, data_pages),
            contexts: (0..config.contexts).map(Context::new).collect(),
            queues: (0..config.queues).map(Queue::new).collect(),
            engines: (0..config.engines).map(|_| engine()).collect(),
            faults: Faults::new(config.queues),
            sched: Scheduler::new(config.queues),
            core: Mutex::new(Core::default()),
            ring_request: Mutex::new(None),
            signal: Signal::default(),
            jitter: Jitter::new(config.jitter),
            atomics: Mutex::new(()),
            draining: AtomicBool::new(false),
            owed: AtomicBool::new(false),
            holding_back: AtomicBool::new(false),
            copies_fail: AtomicU32::new(0),
            stop: AtomicBool::new(false),
        }
    }

    /// Enabled, and allowed to reach memory.
    pub(crate) fn powered(&self) -> bool {
        self.registers.get(CTRL) & CTRL_ENABLE != 0 && self.bus_master.load(SeqCst)
    }

    /// CTRL or the bus-master bit has changed.
    pub(crate) fn power_changed(&self) {
        self.sched.set_go(|| self.powered());
        self.signal.notify();
    }

    /// A ring or buffer cannot be used: says so to the driver by ERROR, and why to the oracle. `of` is context and queue.
    pub(crate) fn unusable(&self, why: Unusable, of: Option<(Handle, Handle)>) {
        let (ctx, queue) = of.unwrap_or((Handle::NONE, Handle::NONE));
        self.oracle.event(DeviceEvent::Unusable { ctx, queue, why });
        let bit = match why {
            Unusable::CommandArea | Unusable::CommandTail | Unusable::CommandMemory => ERROR_CMD_RING,
            Unusable::FaultArea | Unusable::FaultMemory => ERROR_FAULT_BUFFER,
            Unusable::QueueTail | Unusable::QueueMemory => ERROR_QUEUE,
        };
        self.interrupts.error(bit, &self.registers);
    }

    /// To be called when something a drain may wait for has happened.
    #[inline]
    pub(crate) fn wake_drains(&self) {
        if self.draining.load(SeqCst) {
            self.signal.notify();
        }
    }

    /// A handle that is not live was named, `by` a context that is.
    pub(crate) fn bad_handle(
        &self,
        op: &'static str,
        handle: Handle,
        issued_before: bool,
        by: Option<Handle>,
        va: Option<u64>,
    ) {
        count(&self.counters.bad_handles, 1);
        self.oracle.event(DeviceEvent::BadHandle { op, handle, issued_before, by, va });
    }

    /// Keeps the books on a change of a table, and tells the oracle.
    pub(crate) fn table_changed(&self, context: &Context, ctx: Handle, change: Change) {
        match change {
            Change::Set { va, raw, replaced } => {
                if let (Some(va), true) = (va, replaced) {
                    context.note_cleared(va, va + ((1 << leaf_shift(raw)) - 1));
                }
                self.oracle.event(DeviceEvent::LeafSet { ctx, va, pte: raw });
            }
            Change::Cleared { va, count, shift } => {
                if let Some(va) = va {
                    context.note_cleared(va, va + ((u64::from(count) << shift) - 1));
                }
                self.oracle.event(DeviceEvent::LeafCleared { ctx, va, count });
            }
        }
    }

    /// Drops TLB entries in all engines; how many there were.
    pub(crate) fn flush_tlbs(&self, context: &Context, index: u32, start: u64, last: u64) -> u64 {
        // Before the entries go: what was walked before is not inserted after (`Engine::miss`).
        context.sequence.fetch_add(1, SeqCst);
        let dropped = self
            .engines
            .iter()
            .map(|engine| engine.tlbs[index as usize].lock().invalidate(start, last))
            .sum();
        // And after: a step that began in between may have hit an entry that is gone now, and has it in its `Micro`.
        context.sequence.fetch_add(1, SeqCst);
        dropped
    }

    /// What all contexts together hold, and how many there are.
    fn leftovers(&self) -> (Leak, u32) {
        let mut leak = Leak { faults: self.faults.parked(None), ..Leak::default() };
        let mut live = 0;
        for context in &self.contexts {
            let (_, state) = context.now();
            if state == State::Free {
                continue;
            }
            live += 1;
            leak.table_pages += context.table_pages.load(SeqCst);
            leak.data_pages += context.data_pages.load(SeqCst);
            leak.queues += context.queues.load(SeqCst);
        }
        if leak.table_pages > 0 {
            if let Some(page) = self.tables.pages.owned().next() {
                leak.page = self.tables.pages.handle(page);
                leak.va = self.tables.position(page).map(|at| at.1);
            }
        } else if leak.data_pages > 0 {
            if let Some(page) = self.data.owned().next() {
                leak.page = self.data.handle(page);
            }
        }
        (leak, live)
    }

    /// CTRL_ENABLE went from one to zero.
    pub(crate) fn disabled(&self) {
        self.power_changed();
        let (leak, contexts_live) = self.leftovers();
        self.oracle.event(DeviceEvent::Disabled { leak, contexts_live });
    }

    /// Function-level reset, but for configuration space.
    ///
    /// The one register handler that waits: for the command at hand and for one step of each engine at most, since no DMA may
    /// land after a reset. Both are bounded and depend on nothing but this process.
    pub(crate) fn reset(&self) {
        let mut core = self.core.lock();
        // Off first: nothing may start the engines again in between.
        self.registers.set(CTRL, 0);
        self.sched.reset();
        // Every field is named, so that a new one cannot be forgotten here.
        let Self {
            config: _,
            memory: _,
            oracle,
            vram: _,
            vram_file: _,
            interrupts: _,
            counters,
            registers,
            pci: _,
            bus_master: _,
            tables,
            data,
            contexts,
            queues,
            engines,
            faults,
            sched: _,
            core: _,
            ring_request,
            signal: _,
            jitter: _,
            atomics: _,
            draining,
            owed,
            holding_back,
            copies_fail,
            stop: _,
        } = self;
        *core = Core::default();
        *ring_request.lock() = None;
        draining.store(false, SeqCst);
        owed.store(false, SeqCst);
        holding_back.store(false, SeqCst);
        copies_fail.store(0, SeqCst);
        registers.reset();
        faults.reset();
        for queue in queues {
            if queue.now().1 != queue::State::Free {
                queue.free();
            }
        }
        for engine in engines {
            let EngineSide { in_flight: _, micro: _, tlbs, counters: _ } = engine;
            for tlb in tlbs {
                *tlb.lock() = Tlb::default();
            }
        }
        for context in contexts {
            context.sequence.fetch_add(1, SeqCst);
            if context.now().1 != State::Free {
                count(&counters.distinct_pages, context.free());
            }
        }
        tables.reset();
        for page in 0..data.len() {
            data.take_back(page);
        }
        oracle.event(DeviceEvent::Reset);
        // Another CPU may have enabled the device meanwhile, which the registers do not know any more.
        self.power_changed();
    }

    pub(crate) fn counted(&self) -> GpuCounters {
        use std::sync::atomic::Ordering::Relaxed;
        let of = |counter: &std::sync::atomic::AtomicU64| counter.load(Relaxed);
        let mut sum = GpuCounters {
            distinct_pages: of(&self.counters.distinct_pages)
                + self.contexts.iter().map(Context::seen).sum::<u64>(),
            invalidations: of(&self.counters.invalidations),
            faults: of(&self.counters.faults),
            fault_overflows: self.faults.overflows(),
            contexts: of(&self.counters.contexts),
            jobs: of(&self.counters.jobs),
            jobs_cut_off: of(&self.counters.jobs_cut_off),
            commands: of(&self.counters.commands),
            bad_accesses: of(&self.counters.bad_accesses),
            bad_handles: of(&self.counters.bad_handles),
            interrupts: of(&self.interrupts.raised),
            ..GpuCounters::default()
        };
        for engine in &self.engines {
            sum.accesses += of(&engine.counters.accesses);
            sum.tlb_misses += of(&engine.counters.tlb_misses);
            sum.walks += of(&engine.counters.walks);
            sum.bytes_moved += of(&engine.counters.bytes_moved);
        }
        sum
    }
}
