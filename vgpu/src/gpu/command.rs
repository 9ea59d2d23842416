// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command processor: takes commands from the ring in order and reports their completion in order.
//!
//! Taking a command never waits for an engine. What must drain first stays in `pending` with everything behind it, until the
//! steps and queues it waits for have ended.

use std::collections::VecDeque;
use std::sync::atomic::{Ordering::SeqCst, fence};

use parking_lot::MutexGuard;
use vgpu_spec::command::{COMMAND_BYTES, Command, OP_INVALIDATE, STATUS_OK};
use vgpu_spec::handle::Handle;
use vgpu_spec::regs::gpu::{CMD_DONE_LO, CMD_HEAD, CMD_TAIL, VECTOR_COMPLETION, VECTOR_EVENT, VECTOR_FAULT};

use super::context::State;
use super::counters::count;
use super::device::Device;
use super::inflight::Range;
use super::ops::ALL;
use crate::memory::MemoryError;
use crate::oracle::{DeviceEvent, Leak, Unusable};

/// Commands taken before what has come meanwhile is looked at. Who waits for the core's lock, a reset, gets it after each of
/// them.
const BATCH: u32 = 64;

/// A ring that the guest has set up with CMD_SIZE; `None` turns the ring off.
pub(crate) type RingRequest = Option<Ring>;

/// Where the ring is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ring {
    pub(crate) base: u64,
    pub(crate) log2: u32,
}

impl Ring {
    fn size(self) -> u32 {
        1 << self.log2
    }
    fn slot(self, index: u32) -> u64 {
        self.base + u64::from(index & (self.size() - 1)) * COMMAND_BYTES as u64
    }
}

/// What is done when a command completes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Finish {
    Nothing,
    Interrupt,
    Released(Handle),
    Unbound { ctx: Handle, leak: Leak },
    Invalidated { ctx: Handle, start: u64, last: u64 },
}

/// What a command waits for before it completes.
#[derive(Debug)]
pub(crate) struct Drain {
    /// (engine, epoch of the step).
    steps: Vec<(usize, u64)>,
    /// (queue, number of the order to end its jobs).
    queues: Vec<(u32, u64)>,
    /// Queues that are nobody's afterwards.
    free: Vec<u32>,
    finish: Finish,
}

impl Drain {
    pub(crate) fn new(finish: Finish) -> Self {
        Self { steps: Vec::new(), queues: Vec::new(), free: Vec::new(), finish }
    }

    /// Waits for every published step of `ctx` that touches the range. To be called after the change that steps must not miss.
    pub(crate) fn steps(mut self, device: &Device, ctx: Handle, range: Range) -> Self {
        fence(SeqCst);
        let overlapping = |(i, engine): (usize, &super::device::EngineSide)| {
            Some((i, engine.in_flight.overlapping(ctx, range)?))
        };
        self.steps.extend(device.engines.iter().enumerate().filter_map(overlapping));
        self
    }

    /// Ends every job of a queue and waits for that.
    pub(crate) fn kill(mut self, device: &Device, queue: u32) -> Self {
        self.queues.push((queue, device.kill_queue(queue)));
        self
    }

    /// Frees queues that are being destroyed once their jobs have ended.
    pub(crate) fn then_free(mut self, queues: Vec<u32>) -> Self {
        self.free = queues;
        self
    }

    fn is_over(&self, device: &Device) -> bool {
        self.steps.iter().all(|&(engine, epoch)| device.engines[engine].in_flight.is_past(epoch))
            && self
                .queues
                .iter()
                .all(|&(queue, order)| device.queues[queue as usize].killed.load(SeqCst) >= order)
    }
}

/// What a command came to.
pub(crate) struct Outcome {
    pub(crate) status: u32,
    pub(crate) result: u64,
    pub(crate) drain: Option<Drain>,
}

impl Outcome {
    pub(crate) fn ok(result: u64) -> Self {
        Self { status: STATUS_OK, result, drain: None }
    }
    pub(crate) fn status(status: u32) -> Self {
        Self { status, result: 0, drain: None }
    }
    pub(crate) fn after(drain: Drain) -> Self {
        Self { status: STATUS_OK, result: 0, drain: Some(drain) }
    }
}

/// A command taken and not yet reported.
struct Pending {
    /// Where to report it; `None` if its ring is gone.
    slot: Option<u64>,
    outcome: Outcome,
}

/// The command processor's own state.
#[derive(Default)]
pub(crate) struct Core {
    ring: Option<Ring>,
    /// Index behind the last command taken, and behind the last one completed.
    head: u32,
    done: u32,
    /// What stands in guest memory.
    reported: u32,
    /// In ring order; never more than the ring holds.
    pending: VecDeque<Pending>,
    interrupt: bool,
}

impl Device {
    /// The command processor's thread.
    pub(crate) fn command_thread(&self) {
        self.signal.attach();
        while !self.stop.load(SeqCst) {
            self.jitter.before_commands();
            let more = self.run_commands();
            self.raise_owed();
            if !more {
                self.signal.wait();
            }
        }
    }

    /// Raises the interrupt for jobs that were killed. It comes when the command that killed them has been reported, and now and then some
    /// time later: an interrupt is on its way for as long as it likes, and a driver that has waited for the command may have
    /// forgotten the context by then. So whoever waits for such a job must not depend on it.
    fn raise_owed(&self) {
        // Who still drains has not reported; the end of a drain wakes this thread.
        if self.draining.load(SeqCst) || !self.owed.load(SeqCst) {
            return;
        }
        self.jitter.before_a_late_interrupt();
        // A reset forgets it, and holds this lock meanwhile.
        let _core = self.core.lock();
        if self.powered() && self.owed.swap(false, SeqCst) {
            self.interrupts.raise(VECTOR_COMPLETION, &self.registers);
        }
    }

    /// Raises the interrupt for a fault that was held back, if no reset has come in between. Called with no lock held.
    pub(crate) fn raise_held_back(&self) {
        let _core = self.core.lock();
        if self.holding_back.swap(false, SeqCst) {
            self.interrupts.raise(VECTOR_FAULT, &self.registers);
        }
    }

    /// Does what there is to do, within bounds; whether there is more.
    fn run_commands(&self) -> bool {
        let mut core = self.core.lock();
        if !self.powered() {
            return false;
        }
        self.faults.pump(self);
        self.progress(&mut core);
        let more = self.take_batch(&mut core);
        self.progress(&mut core);
        self.report(&mut core);
        more
    }

    fn take_batch(&self, core: &mut MutexGuard<'_, Core>) -> bool {
        let (ring, tail) = {
            let mut request = self.ring_request.lock();
            if let Some(ring) = request.take() {
                core.start(ring);
            }
            // Read under the lock: who sets up a ring zeroes TAIL under it.
            (core.ring, self.registers.get(CMD_TAIL))
        };
        let Some(ring) = ring else { return false };
        // A command has its place until it has completed.
        if tail.wrapping_sub(core.done) > ring.size() {
            self.stop_ring(core, Unusable::CommandTail);
            return false;
        }
        let snapshot = self.memory.snapshot();
        let mut taken = 0;
        // Reporting may stop the ring in between, and a reset take it away.
        while core.ring == Some(ring)
            && !self.stop.load(SeqCst)
            && core.head != tail
            && taken < BATCH
            && core.pending.len() < ring.size() as usize
        {
            let slot = ring.slot(core.head);
            let Ok(command) = snapshot.read_object::<Command>(slot) else {
                self.stop_ring(core, Unusable::CommandMemory);
                return false;
            };
            core.head = core.head.wrapping_add(1);
            taken += 1;
            let outcome = self.execute(&command);
            core.pending.push_back(Pending { slot: Some(slot), outcome });
            if core.pending.front().is_some_and(|first| first.outcome.drain.is_none()) {
                self.progress(core);
            }
            if command.op == OP_INVALIDATE && core.head != tail {
                MutexGuard::unlocked(core, || self.jitter.after_an_invalidation());
            }
            MutexGuard::bump(core);
        }
        count(&self.counters.commands, taken.into());
        let request = self.ring_request.lock();
        if request.is_none() {
            self.registers.set(CMD_HEAD, core.head);
        }
        request.is_some() || core.head != tail && core.pending.len() < ring.size() as usize
    }

    /// Completes, in order, what need not be waited for any more.
    fn progress(&self, core: &mut Core) {
        if core.pending.is_empty() {
            return;
        }
        // Engines look at this after their epoch has moved; we look at the epochs after it is set.
        self.draining.store(true, SeqCst);
        while let Some(first) = core.pending.front() {
            if first.outcome.drain.as_ref().is_some_and(|drain| !drain.is_over(self)) {
                return;
            }
            let Some(Pending { slot, outcome }) = core.pending.pop_front() else { return };
            if let Some(drain) = &outcome.drain {
                self.finish(core, drain);
            }
            if let Some(slot) = slot {
                core.done = core.done.wrapping_add(1);
                if self.write_status(slot, &outcome).is_err() {
                    self.stop_ring(core, Unusable::CommandMemory);
                }
            }
        }
        self.draining.store(false, SeqCst);
    }

    fn finish(&self, core: &mut Core, drain: &Drain) {
        for &queue in &drain.free {
            self.queues[queue as usize].free();
        }
        match drain.finish {
            Finish::Nothing => {}
            Finish::Interrupt => core.interrupt = true,
            Finish::Released(ctx) => {
                // Before the guest can know that it may let go of the pages.
                self.oracle.ends_having_written(ctx, &|| self.take_written(ctx, ALL));
                self.oracle.event(DeviceEvent::ContextReleased { ctx });
            }
            Finish::Unbound { ctx, leak } => {
                if let Some(context) = self.contexts.get(ctx.index() as usize) {
                    debug_assert_eq!(context.now(), (ctx, State::Closing));
                    count(&self.counters.distinct_pages, context.free());
                }
                self.oracle.event(DeviceEvent::ContextUnbound { ctx, leak });
            }
            Finish::Invalidated { ctx, start, last } => {
                self.oracle.event(DeviceEvent::InvalidateDone { ctx, start, last });
            }
        }
    }

    fn write_status(&self, slot: u64, outcome: &Outcome) -> Result<(), MemoryError> {
        let snapshot = self.memory.snapshot();
        snapshot.store_u64(slot + 56, outcome.result)?;
        snapshot.store_u32(slot + 4, outcome.status)
    }

    /// Writes CMD_DONE back if it has moved, and only then raises what INTERRUPT commands asked for.
    fn report(&self, core: &mut Core) {
        if core.reported != core.done {
            core.reported = core.done;
            fence(SeqCst);
            let address = self.registers.pair(CMD_DONE_LO);
            if address != 0 && self.memory.snapshot().store_u32(address, core.done).is_err() {
                self.stop_ring(core, Unusable::CommandMemory);
            }
        }
        if std::mem::take(&mut core.interrupt) {
            self.interrupts.raise(VECTOR_EVENT, &self.registers);
        }
    }

    /// The ring is not usable: nothing more is taken from it until the guest sets it up anew.
    fn stop_ring(&self, core: &mut Core, why: Unusable) {
        core.ring = None;
        for pending in &mut core.pending {
            pending.slot = None;
        }
        self.unusable(why, None);
    }
}

impl Core {
    /// Begins with a new ring (or none). What is pending still happens, but is reported nowhere.
    fn start(&mut self, ring: Option<Ring>) {
        self.ring = ring;
        self.head = 0;
        self.done = 0;
        self.reported = 0;
        for pending in &mut self.pending {
            pending.slot = None;
        }
    }
}
