// SPDX-License-Identifier: MIT OR Apache-2.0
//! Queues: rings of jobs in guest memory.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

use parking_lot::Mutex;
use vgpu_spec::fault::FaultEntry;
use vgpu_spec::handle::{Handle, Kind};
use vgpu_spec::job::{COMPLETION_BYTES, Completion, FLAG_NO_IRQ, JOB_BYTES, JOB_KILLED, Job};

use super::counters::count;
use super::device::Device;
use super::work::Work;
use crate::memory::MemoryError;
use crate::oracle::{DeviceEvent, Unusable};

/// Where a queue slot is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum State {
    /// Nobody's.
    Free = 0,
    /// Takes jobs.
    Live = 1,
    /// Its handle is stale; what is under way is being ended.
    Destroying = 2,
}

/// One queue slot. `word` and `ctx` are changed by the holder of the command core's lock only.
#[derive(Debug)]
pub(crate) struct Queue {
    index: u32,
    /// Generation in the upper half, state in the lower.
    word: AtomicU64,
    ctx: AtomicU64,
    /// The last doorbell value.
    pub(crate) doorbell: AtomicU32,
    /// Counts the orders to end every job. An engine has carried out those up to `killed`.
    pub(crate) kill: AtomicU64,
    pub(crate) killed: AtomicU64,
    pub(crate) run: Mutex<Run>,
    /// `run.setup`, for who must not wait for an engine; the last lock.
    pub(crate) memory: Mutex<Option<Setup>>,
}

/// What the guest gave at QUEUE_CREATE.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    pub(crate) handle: Handle,
    pub(crate) ctx: Handle,
    pub(crate) ring: u64,
    pub(crate) log2: u32,
    pub(crate) completions: u64,
    pub(crate) fence: u64,
}

/// What the engine that runs the queue knows; locked for a whole turn by who has the queue from the scheduler.
#[derive(Debug, Default)]
pub(crate) struct Run {
    pub(crate) setup: Option<Setup>,
    /// Index of the job at work or next, not wrapped.
    pub(crate) head: u64,
    pub(crate) work: Option<Work>,
    pub(crate) parked: bool,
    /// The ring is not usable.
    pub(crate) stopped: bool,
    pub(crate) kill_seen: u64,
}

impl Queue {
    pub(crate) fn new(index: u32) -> Self {
        Self {
            index,
            word: AtomicU64::new(0),
            ctx: AtomicU64::new(0),
            doorbell: AtomicU32::new(0),
            kill: AtomicU64::new(0),
            killed: AtomicU64::new(0),
            run: Mutex::default(),
            memory: Mutex::default(),
        }
    }

    /// The handle last given out, and the state.
    pub(crate) fn now(&self) -> (Handle, State) {
        let word = self.word.load(SeqCst);
        let state = match word as u32 {
            0 => State::Free,
            1 => State::Live,
            _ => State::Destroying,
        };
        (Handle::new(Kind::Queue, self.index, (word >> 32) as u32), state)
    }

    /// The context it belongs to, also while it is being destroyed.
    pub(crate) fn ctx(&self) -> Handle {
        Handle(self.ctx.load(SeqCst))
    }

    /// Whether `handle` is the live one.
    pub(crate) fn is_live(&self, handle: Handle) -> bool {
        self.now() == (handle, State::Live)
    }

    /// Whether this handle was given out at some time and is not live now.
    pub(crate) fn issued_before(&self, handle: Handle) -> bool {
        let (last, _) = self.now();
        handle.kind() == Some(Kind::Queue)
            && (1..=last.generation()).contains(&handle.generation())
            && !self.is_live(handle)
    }

    /// The handle that will be given out next; `None` if the slot is not free.
    pub(crate) fn next_handle(&self) -> Option<Handle> {
        let (last, state) = self.now();
        let generation = last.generation().checked_add(1)?;
        (state == State::Free).then(|| Handle::new(Kind::Queue, self.index, generation))
    }

    /// Free -> Live.
    pub(crate) fn create(&self, setup: Setup) {
        let mut run = self.run.lock();
        *self.memory.lock() = Some(setup);
        *run = Run { setup: Some(setup), kill_seen: self.kill.load(SeqCst), ..Run::default() };
        self.killed.store(run.kill_seen, SeqCst);
        self.doorbell.store((setup.handle.generation() & 0xffff) << 16, SeqCst);
        self.ctx.store(setup.ctx.0, SeqCst);
        self.word.store(u64::from(setup.handle.generation()) << 32 | State::Live as u64, SeqCst);
    }

    /// Live -> Destroying.
    pub(crate) fn close(&self) {
        self.set_state(State::Destroying);
    }

    /// Destroying -> Free, when nothing is under way any more.
    pub(crate) fn free(&self) {
        let mut run = self.run.lock();
        let Run { setup, head, work, parked, stopped, kill_seen } = &mut *run;
        // No job is left, so every order to end them has been carried out: no engine would come to say so any more, and UNBIND
        // may be waiting for the one that it gave after the queue's own destruction was under way.
        *kill_seen = self.kill.load(SeqCst);
        self.killed.store(*kill_seen, SeqCst);
        *setup = None;
        *self.memory.lock() = None;
        *head = 0;
        *work = None;
        *parked = false;
        *stopped = false;
        self.ctx.store(0, SeqCst);
        self.set_state(State::Free);
    }

    fn set_state(&self, state: State) {
        let generation = self.word.load(SeqCst) >> 32;
        self.word.store(generation << 32 | state as u64, SeqCst);
    }

    /// Jobs between the doorbell and `run.head`; `None` if that is more than the ring holds.
    pub(crate) fn waiting(&self, run: &Run) -> Option<u16> {
        let Some(setup) = run.setup else { return Some(0) };
        let bell = self.doorbell.load(SeqCst);
        if bell >> 16 != setup.handle.generation() & 0xffff {
            return Some(0);
        }
        let waiting = (bell as u16).wrapping_sub(run.head as u16);
        (u32::from(waiting) <= 1 << setup.log2).then_some(waiting)
    }
}

/// How a job ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct End {
    pub(crate) status: u32,
    pub(crate) result: u64,
    pub(crate) address: u64,
}

impl Device {
    /// Copies the next job out of the ring.
    pub(crate) fn fetch_job(&self, run: &Run) -> Result<Job, MemoryError> {
        let Some(setup) = run.setup else { return Ok(Job::default()) };
        let at = run.head & ((1 << setup.log2) - 1);
        self.memory.snapshot().read_object(setup.ring + at * JOB_BYTES as u64)
    }

    /// The queue's memory is not usable: nothing more is taken from it.
    pub(crate) fn stop_queue(&self, run: &mut Run, why: Unusable) {
        run.stopped = true;
        run.work = None;
        self.unusable(why, run.setup.map(|setup| (setup.ctx, setup.handle)));
    }

    /// Writes the completion of the job at the head, then the fence. Whether an interrupt is due.
    pub(crate) fn complete(&self, run: &mut Run, fence: u64, flags: u16, end: End) -> bool {
        let Some(setup) = run.setup else { return false };
        run.work = None;
        count(&self.counters.jobs, 1);
        self.oracle.event(DeviceEvent::JobDone { ctx: setup.ctx, queue: setup.handle, status: end.status });
        let at = setup.completions + (run.head & ((1 << setup.log2) - 1)) * COMPLETION_BYTES as u64;
        run.head += 1;
        let completion = Completion {
            fence,
            status: 0,
            sequence: run.head as u32,
            result: end.result,
            address: end.address,
        };
        let snapshot = self.memory.snapshot();
        let written = snapshot
            .write_object(at, &completion)
            .and_then(|()| snapshot.store_u32(at + 8, end.status))
            .and_then(|()| if setup.fence == 0 { Ok(()) } else { snapshot.store_u64(setup.fence, fence) });
        if written.is_err() {
            self.stop_queue(run, Unusable::QueueMemory);
        }
        flags & FLAG_NO_IRQ == 0
    }

    /// Ends what is under way and what waits with JOB_KILLED, for every order given so far.
    ///
    /// The caller has the queue from the scheduler.
    pub(crate) fn flush_queue(&self, queue: &Queue, run: &mut Run) {
        let order = queue.kill.load(SeqCst);
        if run.parked {
            run.parked = false;
            if let Some(entry) = self.faults.withdraw(queue.index) {
                self.fault_dropped(&entry);
            }
        }
        let killed = End { status: JOB_KILLED, result: 0, address: 0 };
        let mut interrupt = false;
        if let Some(work) = run.work.take() {
            count(&self.counters.jobs_cut_off, 1);
            interrupt |= self.complete(run, work.job.fence, work.job.flags, killed);
        }
        let waiting = queue.waiting(run);
        if waiting.is_none() && !run.stopped {
            self.stop_queue(run, Unusable::QueueTail);
        }
        // The ring's size bounds this.
        for _ in 0..waiting.unwrap_or(0) {
            if run.stopped {
                break;
            }
            match self.fetch_job(run) {
                Ok(job) => interrupt |= self.complete(run, job.fence, job.flags, killed),
                Err(_) => self.stop_queue(run, Unusable::QueueMemory),
            }
        }
        run.kill_seen = order;
        queue.killed.store(order, SeqCst);
        if interrupt {
            // Later: see `Device::raise_owed`.
            self.owed.store(true, SeqCst);
            self.signal.notify();
        }
        self.wake_drains();
    }

    fn fault_dropped(&self, entry: &FaultEntry) {
        self.oracle.event(DeviceEvent::FaultDropped {
            fault: Handle(entry.fault),
            ctx: Handle(entry.ctx),
            va: entry.va,
        });
    }

    /// Orders the end of every job of a queue; the number to wait for in `killed`.
    pub(crate) fn kill_queue(&self, index: u32) -> u64 {
        let queue = &self.queues[index as usize];
        let order = queue.kill.fetch_add(1, SeqCst) + 1;
        if self.sched.claim(index) {
            // Nobody runs it: no need to wait for an engine's turn.
            self.flush_queue(queue, &mut queue.run.lock());
            self.sched.give_back(index, false);
        } else {
            self.sched.schedule(index);
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freed_queue_owes_nobody_an_answer() {
        let queue = Queue::new(0);
        let handle = queue.next_handle().unwrap();
        let ctx = Handle::new(Kind::Context, 0, 1);
        queue.create(Setup { handle, ctx, ring: 0, log2: 2, completions: 0, fence: 0 });
        queue.close();
        // UNBIND orders the end of its jobs while its own destruction, whose order was carried out, is being completed.
        let order = queue.kill.fetch_add(1, SeqCst) + 1;
        assert!(queue.killed.load(SeqCst) < order);
        queue.free();
        assert!(queue.killed.load(SeqCst) >= order, "UNBIND would wait for ever");
    }
}
