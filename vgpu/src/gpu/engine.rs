// SPDX-License-Identifier: MIT OR Apache-2.0
//! An engine: a thread that runs queues, and how it translates.

use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use vgpu_spec::fault::{ACCESS_ATOMIC, ACCESS_WRITE, FaultEntry, REASON_MALFORMED, REASON_RIGHTS};
use vgpu_spec::handle::Handle;
use vgpu_spec::job::{JOB_BAD, JOB_BUS_ERROR, JOB_FAULT, JOB_OK, Job, OP_COPY, OP_FILL};
use vgpu_spec::pte::{self, PAGE_SHIFT, leaf_shift};
use vgpu_spec::regs::gpu::VECTOR_COMPLETION;

use super::checked::Checked;
use super::context::{Context, State};
use super::counters::count;
use super::device::{Device, EngineSide};
use super::fault::Parked;
use super::inflight::Range;
use super::queue::{End, Queue, Run};
use super::work::Work;
use crate::oracle::{DeviceEvent, Unusable};

/// How long the interrupt for a fault is held back while its context lives.
const HELD_BACK_ALIVE: Duration = Duration::from_micros(2_500);
/// How long at most while the context's place has no successor.
const HELD_BACK_GONE: Duration = Duration::from_millis(20);
/// How often it is looked.
const HELD_BACK_STEP: Duration = Duration::from_micros(50);

/// Steps of one turn, before another queue gets the engine.
const TURN: u32 = 16;
/// Words of the buffers that patterns are made and compared in; two of them fit a first-level cache.
pub(crate) const SCRATCH: usize = 1024;

/// How a step ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// It did something.
    More,
    /// The job ends with this status; the address is in the work.
    End(u32),
    /// The access at hand is not permitted.
    Fault(Fault),
    /// The context does not translate any more.
    Gone,
}

/// An access that is to be parked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) va: u64,
    pub(crate) access: u32,
    pub(crate) reason: u32,
    pub(crate) bytes: u64,
}

/// One engine, on its own thread.
pub(crate) struct Engine<'d> {
    pub(crate) device: &'d Device,
    pub(crate) side: &'d EngineSide,
    pub(crate) checked: Checked,
    pub(crate) words: Box<[u64; SCRATCH]>,
    pub(crate) others: Box<[u64; SCRATCH]>,
    /// A completion's interrupt waits for the next one's, or for the end of the turn.
    owed: bool,
    /// A fault of this context has been recorded, and its interrupt is held back.
    held_back: Option<Handle>,
}

/// A published step; over when dropped.
pub(crate) struct Published<'d> {
    device: &'d Device,
    pub(crate) side: &'d EngineSide,
    /// The context's invalidation sequence, read after publishing.
    pub(crate) sequence: u64,
}

impl Drop for Published<'_> {
    fn drop(&mut self) {
        if self.device.draining.load(SeqCst) {
            self.device.jitter.before_a_step_ends();
        }
        self.side.in_flight.clear();
        self.device.wake_drains();
    }
}

impl<'d> Engine<'d> {
    pub(crate) fn new(device: &'d Device, index: usize) -> Self {
        Self {
            device,
            side: &device.engines[index],
            checked: Checked::default(),
            words: Box::new([0; SCRATCH]),
            others: Box::new([0; SCRATCH]),
            owed: false,
            held_back: None,
        }
    }

    /// Runs queues until the device is shut down.
    pub(crate) fn run(mut self) {
        while let Some(index) = self.device.sched.next() {
            let queue = &self.device.queues[index as usize];
            let again = self.turn(index, queue, &mut queue.run.lock());
            if std::mem::take(&mut self.owed) {
                self.interrupt();
            }
            self.device.sched.done(index, again);
            if let Some(ctx) = self.held_back.take() {
                self.late_fault(ctx);
            }
        }
    }

    /// Works on a queue for a bounded number of steps; whether there is more to do.
    fn turn(&mut self, index: u32, queue: &Queue, run: &mut Run) -> bool {
        let device = self.device;
        for _ in 0..TURN {
            if device.sched.halted() {
                return true;
            }
            let Some(setup) = run.setup else { return false };
            let Some(context) = device.contexts.get(setup.ctx.index() as usize) else { return false };
            // A doorbell that came with the queue's end may wake it once more: what it asks for is not begun.
            let over = !queue.is_live(setup.handle) || !context.is_bound(setup.ctx);
            if over || queue.kill.load(SeqCst) != run.kill_seen {
                device.flush_queue(queue, run);
                return false;
            }
            if run.stopped {
                return false;
            }
            if run.parked {
                match device.faults.look(index) {
                    Parked::Waiting => return false,
                    Parked::Replay => run.parked = false,
                    Parked::Cancel => {
                        run.parked = false;
                        self.end(queue, run, JOB_FAULT);
                        continue;
                    }
                }
            }
            // A job has its place until it has completed: what is at work counts.
            match queue.waiting(run) {
                Some(0) if run.work.is_none() => return false,
                Some(_) => {}
                None => {
                    device.stop_queue(run, Unusable::QueueTail);
                    return false;
                }
            }
            if run.work.is_none() {
                let Ok(job) = device.fetch_job(run) else {
                    device.stop_queue(run, Unusable::QueueMemory);
                    return false;
                };
                let Some(work) = Work::new(job) else {
                    self.finish(queue, run, job, End { status: JOB_BAD, result: 0, address: 0 });
                    continue;
                };
                if device.copies_fail.load(SeqCst) != 0 && self.fails(context, setup.ctx, &job) {
                    self.finish(queue, run, job, End { status: JOB_BUS_ERROR, result: 0, address: job.dst });
                    continue;
                }
                run.work = Some(work);
            }
            let Some(work) = &mut run.work else { return false };
            let step = if work.is_done() { Step::End(JOB_OK) } else { self.step(context, setup.ctx, work) };
            match step {
                Step::More => {}
                Step::End(status) => self.end(queue, run, status),
                Step::Fault(fault) => {
                    self.park(index, run, fault);
                    return false;
                }
                Step::Gone => {
                    device.flush_queue(queue, run);
                    return false;
                }
            }
        }
        true
    }

    /// Whether a job is one of those that are to fail: it would write to VRAM.
    #[cold]
    fn fails(&self, context: &Context, ctx: Handle, job: &Job) -> bool {
        if !matches!(job.op, OP_COPY | OP_FILL) {
            return false;
        }
        let device = self.device;
        let leaf = device.tables.walk(ctx, context.root.load(SeqCst), job.dst);
        leaf.is_ok_and(|raw| raw & pte::VRAM != 0)
            && device.copies_fail.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok()
    }

    fn end(&mut self, queue: &Queue, run: &mut Run, status: u32) {
        if let Some(work) = run.work {
            let address = if status == JOB_FAULT { work.fault_va } else { work.address };
            let end = End { status, result: work.result, address };
            self.finish(queue, run, work.job, end);
        }
    }

    /// An interrupt may stand for any number of completions. One that another is soon to follow is kept back in every second case: a
    /// driver that counts interrupts is wrong every time then, and not by luck.
    fn finish(&mut self, queue: &Queue, run: &mut Run, job: Job, end: End) {
        self.owed |= self.device.complete(run, job.fence, job.flags, end);
        let soon = queue.waiting(run).is_some_and(|jobs| jobs > 0);
        if self.owed && !(soon && self.device.jitter.coalesces()) {
            self.owed = false;
            self.interrupt();
        }
    }

    fn interrupt(&self) {
        self.device.interrupts.raise(VECTOR_COMPLETION, &self.device.registers);
    }

    /// Raises the interrupt for a fault of `ctx` late. A message takes its time, and the fault that it tells of may be of a context that is
    /// gone by then, and whose place another has: so if the context is on its way out, it comes when that one is there.
    ///
    /// No lock is held, and the engine does nothing else meanwhile: the others do.
    #[cold]
    fn late_fault(&self, ctx: Handle) {
        let device = self.device;
        let Some(context) = device.contexts.get(ctx.index() as usize) else { return };
        let start = Instant::now();
        let wait = |until: Duration, over: &dyn Fn() -> bool| {
            while start.elapsed() < until && !over() && !device.sched.halted() {
                std::thread::sleep(HELD_BACK_STEP);
            }
        };
        wait(HELD_BACK_ALIVE, &|| !context.is_bound(ctx));
        if !context.is_bound(ctx) {
            let successor = || {
                let (now, state) = context.now();
                now != ctx && state == State::Bound
            };
            wait(HELD_BACK_GONE, &successor);
            if successor() {
                // The driver has to learn of it first.
                std::thread::sleep(HELD_BACK_ALIVE);
            }
        }
        device.raise_held_back();
    }

    fn park(&mut self, index: u32, run: &mut Run, fault: Fault) {
        let device = self.device;
        let (Some(setup), Some(work)) = (run.setup, &mut run.work) else { return };
        let Fault { va, access, reason, bytes } = fault;
        let again = work.retries;
        let entry = FaultEntry {
            fault: 0,
            ctx: setup.ctx.0,
            va,
            access,
            reason,
            queue: setup.handle.0,
            fence: work.job.fence,
            bytes,
            retries: again,
            reserved: 0,
        };
        work.retries = again.saturating_add(1);
        work.fault_va = va;
        run.parked = true;
        count(&device.counters.faults, 1);
        let handle = device.faults.raise(index, entry);
        device.oracle.event(DeviceEvent::FaultRaised { fault: handle, ctx: setup.ctx, va, access, again });
        // Somebody else has to end the jobs of a context that goes.
        let hold_back = device.engines.len() > 1 && device.jitter.holds_back();
        if device.faults.park(index, device, hold_back) {
            self.held_back = Some(setup.ctx);
        }
    }

    /// Publishes a step that touches `ranges`; `None` if the context does not translate any more.
    #[inline]
    pub(crate) fn publish(
        &mut self,
        context: &Context,
        ctx: Handle,
        ranges: [Range; 2],
    ) -> Option<Published<'d>> {
        self.side.in_flight.publish(ctx, ranges);
        let sequence = context.sequence.load(SeqCst);
        let published = Published { device: self.device, side: self.side, sequence };
        if !context.is_bound(ctx) {
            return None;
        }
        self.side.micro.begin(ctx, sequence);
        Some(published)
    }

    /// Finds the leaf for an access inside a published step, or the reason for a fault.
    #[inline]
    pub(crate) fn translate(
        &mut self,
        context: &Context,
        ctx: Handle,
        (va, access): (u64, u32),
        published: &Published<'_>,
    ) -> Result<u64, u32> {
        if let Some(raw) = self.side.micro.get(va) {
            if permits(raw, access) {
                return Ok(raw);
            }
        }
        let tlb = &self.side.tlbs[ctx.index() as usize];
        let found = tlb.lock().lookup(va);
        if let Some(raw) = found {
            if permits(raw, access) {
                self.side.micro.put(va, raw);
                return Ok(raw);
            }
        }
        // Not there, or not enough: rights may be added without an invalidation.
        self.miss(context, ctx, (va, access), published)
    }

    #[cold]
    fn miss(
        &mut self,
        context: &Context,
        ctx: Handle,
        (va, access): (u64, u32),
        published: &Published<'_>,
    ) -> Result<u64, u32> {
        let device = self.device;
        count(&self.side.counters.tlb_misses, 1);
        count(&self.side.counters.walks, 1);
        let raw = match device.tables.walk(ctx, context.root.load(SeqCst), va) {
            Ok(raw) => raw,
            Err(fault) => {
                if let Some(page) = fault.foreign {
                    let handle = device.tables.pages.handle(page);
                    let issued = handle.generation() != 0;
                    device.bad_handle("walk", handle, issued, Some(ctx), Some(va));
                }
                return Err(fault.reason);
            }
        };
        if raw & pte::VRAM != 0 {
            self.check_vram(ctx, va, raw)?;
        }
        if !permits(raw, access) {
            return Err(REASON_RIGHTS);
        }
        {
            let mut tlb = self.side.tlbs[ctx.index() as usize].lock();
            // An invalidation moves the sequence before it takes this lock: what was walked before it is not kept after it.
            if context.sequence.load(SeqCst) == published.sequence {
                tlb.insert(va, raw, device.config.tlb_entries);
            }
        }
        let shift = leaf_shift(raw);
        context.saw((va >> shift) << 1 | u64::from(shift != PAGE_SHIFT));
        self.side.micro.put(va, raw);
        Ok(raw)
    }

    /// A leaf of VRAM must lie on data pages that the context has been granted.
    fn check_vram(&self, ctx: Handle, va: u64, raw: u64) -> Result<(), u32> {
        let first = (raw & pte::ADDRESS) >> PAGE_SHIFT;
        for page in first..first + (1 << (leaf_shift(raw) - PAGE_SHIFT)) {
            let index = u32::try_from(page).map_err(|_| REASON_MALFORMED)?;
            if self.device.data.owner(index) != ctx {
                let handle = self.device.data.handle(index);
                let issued = handle.generation() != 0;
                self.device.bad_handle("leaf", handle, issued, Some(ctx), Some(va));
                return Err(REASON_MALFORMED);
            }
        }
        Ok(())
    }
}

/// Whether a leaf allows an access.
#[inline]
fn permits(raw: u64, access: u32) -> bool {
    (access & ACCESS_WRITE == 0 || raw & pte::WRITE != 0)
        && (access & ACCESS_ATOMIC == 0 || raw & pte::ATOMIC != 0)
}
