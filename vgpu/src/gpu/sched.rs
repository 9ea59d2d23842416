// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which queue an engine runs next.
//!
//! A queue is in the ready list once at most and is run by one engine at a time. An engine gives a queue back after a bounded
//! number of steps, so that every queue gets its turn.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::SeqCst};

use parking_lot::{Condvar, Mutex};

const IDLE: u8 = 0;
const QUEUED: u8 = 1;
const RUNNING: u8 = 2;
/// Being run, and there is news since the run began.
const RERUN: u8 = 3;

#[derive(Debug, Default)]
struct Inner {
    ready: VecDeque<u32>,
    running: u32,
    go: bool,
    stop: bool,
}

/// The ready list and the queues' states.
#[derive(Debug)]
pub(crate) struct Scheduler {
    inner: Mutex<Inner>,
    work: Condvar,
    quiet: Condvar,
    states: Box<[AtomicU8]>,
    halted: AtomicBool,
}

impl Scheduler {
    pub(crate) fn new(queues: u32) -> Self {
        let inner = Inner { ready: VecDeque::with_capacity(queues as usize), ..Inner::default() };
        Self {
            inner: Mutex::new(inner),
            work: Condvar::new(),
            quiet: Condvar::new(),
            states: (0..queues).map(|_| AtomicU8::new(IDLE)).collect(),
            halted: AtomicBool::new(true),
        }
    }

    fn push(&self, queue: u32) {
        self.inner.lock().ready.push_back(queue);
        self.work.notify_one();
    }

    /// There may be something to do for the queue.
    pub(crate) fn schedule(&self, queue: u32) {
        let Some(state) = self.states.get(queue as usize) else { return };
        let moved = state.fetch_update(SeqCst, SeqCst, |state| match state {
            IDLE => Some(QUEUED),
            RUNNING => Some(RERUN),
            _ => None,
        });
        if moved == Ok(IDLE) {
            self.push(queue);
        }
    }

    /// Waits for a queue to run; `None` when the device is shut down.
    pub(crate) fn next(&self) -> Option<u32> {
        let mut inner = self.inner.lock();
        loop {
            if inner.stop {
                return None;
            }
            if inner.go {
                if let Some(queue) = inner.ready.pop_front() {
                    inner.running += 1;
                    self.states[queue as usize].store(RUNNING, SeqCst);
                    return Some(queue);
                }
            }
            self.work.wait(&mut inner);
        }
    }

    /// Takes an idle queue to work on it in the place of an engine. [`Self::give_back`] must follow.
    pub(crate) fn claim(&self, queue: u32) -> bool {
        self.states[queue as usize].compare_exchange(IDLE, RUNNING, SeqCst, SeqCst).is_ok()
    }

    /// Ends a claim, or an engine's turn; `again` if there is more to do.
    pub(crate) fn give_back(&self, queue: u32, again: bool) {
        let state = &self.states[queue as usize];
        if again || state.compare_exchange(RUNNING, IDLE, SeqCst, SeqCst).is_err() {
            state.store(QUEUED, SeqCst);
            self.push(queue);
        }
    }

    /// An engine's turn is over.
    pub(crate) fn done(&self, queue: u32, again: bool) {
        self.give_back(queue, again);
        let mut inner = self.inner.lock();
        inner.running -= 1;
        if inner.running == 0 {
            self.quiet.notify_all();
        }
    }

    /// An engine in a turn has to end it.
    pub(crate) fn halted(&self) -> bool {
        self.halted.load(SeqCst)
    }

    /// Lets engines run, or not; `go` is asked under the lock, so that the last change wins.
    pub(crate) fn set_go(&self, go: impl FnOnce() -> bool) {
        let mut inner = self.inner.lock();
        inner.go = go();
        self.halted.store(!inner.go || inner.stop, SeqCst);
        self.work.notify_all();
    }

    /// Stops the engines, waits until none is in a step, and forgets what was ready. Bounded by one step.
    pub(crate) fn reset(&self) {
        let Self { inner, work: _, quiet, states, halted } = self;
        let mut inner = inner.lock();
        inner.go = false;
        halted.store(true, SeqCst);
        while inner.running > 0 {
            quiet.wait(&mut inner);
        }
        inner.ready.clear();
        for state in states {
            state.store(IDLE, SeqCst);
        }
    }

    /// Ends every engine.
    pub(crate) fn stop(&self) {
        let mut inner = self.inner.lock();
        inner.stop = true;
        self.halted.store(true, SeqCst);
        self.work.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_is_listed_once_and_news_during_a_turn_are_not_lost() {
        let sched = Scheduler::new(4);
        sched.set_go(|| true);
        sched.schedule(2);
        sched.schedule(2);
        sched.schedule(1);
        assert_eq!(sched.next(), Some(2));
        assert!(!sched.claim(2) && !sched.claim(1) && sched.claim(3));
        sched.give_back(3, false);
        sched.schedule(2);
        sched.done(2, false);
        assert_eq!(sched.next(), Some(1));
        sched.done(1, false);
        assert_eq!(sched.next(), Some(2));
        sched.done(2, true);
        assert_eq!(sched.next(), Some(2));
        sched.done(2, false);
        sched.schedule(0);
        sched.reset();
        assert!(sched.halted() && sched.claim(0));
        sched.stop();
        assert_eq!(sched.next(), None);
    }
}
