// SPDX-License-Identifier: MIT OR Apache-2.0
//! Contexts: one per mirrored address space.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

use parking_lot::Mutex;
use vgpu_spec::handle::{Handle, Kind};

use super::tlb::PageHash;

/// Where a context slot is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum State {
    /// Nobody's.
    Free = 0,
    /// Translating.
    Bound = 1,
    /// Stopped for good; its resources are being returned.
    Released = 2,
    /// UNBIND was taken from the ring and waits for what is still under way; its handle is stale already.
    Closing = 3,
}

/// Leaves of one context that are remembered, for counting distinct pages.
const SEEN_MAX: usize = 1 << 18;
/// Ranges of cleared leaves remembered until they are invalidated; older ones are forgotten.
const CLEARED_MAX: usize = 64;

/// One context slot. `word`, `root` and the counts are changed by the holder of the command core's lock only.
#[derive(Debug)]
pub(crate) struct Context {
    index: u32,
    /// Generation in the upper half, state in the lower.
    word: AtomicU64,
    /// Index of the root table page plus one, or 0.
    pub(crate) root: AtomicU64,
    /// Moves with each invalidation: a translation made before may not be kept after.
    pub(crate) sequence: AtomicU64,
    pub(crate) table_pages: AtomicU32,
    pub(crate) data_pages: AtomicU32,
    pub(crate) queues: AtomicU32,
    seen: Mutex<HashSet<u64, PageHash>>,
    cleared: Mutex<Vec<(u64, u64)>>,
}

impl Context {
    pub(crate) fn new(index: u32) -> Self {
        Self {
            index,
            word: AtomicU64::new(0),
            root: AtomicU64::new(0),
            sequence: AtomicU64::new(0),
            table_pages: AtomicU32::new(0),
            data_pages: AtomicU32::new(0),
            queues: AtomicU32::new(0),
            seen: Mutex::default(),
            cleared: Mutex::default(),
        }
    }

    fn unpack(&self, word: u64) -> (Handle, State) {
        let state = match word as u32 {
            0 => State::Free,
            1 => State::Bound,
            2 => State::Released,
            _ => State::Closing,
        };
        (Handle::new(Kind::Context, self.index, (word >> 32) as u32), state)
    }

    /// The handle last given out, and the state.
    pub(crate) fn now(&self) -> (Handle, State) {
        self.unpack(self.word.load(SeqCst))
    }

    /// The state, if `handle` is the live one.
    pub(crate) fn state_of(&self, handle: Handle) -> Option<State> {
        let (live, state) = self.now();
        (live == handle && matches!(state, State::Bound | State::Released)).then_some(state)
    }

    /// Whether the context called `handle` translates.
    #[inline]
    pub(crate) fn is_bound(&self, handle: Handle) -> bool {
        self.word.load(SeqCst) == u64::from(handle.generation()) << 32 | State::Bound as u64
    }

    /// Whether this handle was given out at some time and is not live now.
    pub(crate) fn issued_before(&self, handle: Handle) -> bool {
        let (last, _) = self.now();
        handle.kind() == Some(Kind::Context)
            && (1..=last.generation()).contains(&handle.generation())
            && self.state_of(handle).is_none()
    }

    /// Free -> Bound; `None` if it is not free or its generations are used up.
    pub(crate) fn bind(&self) -> Option<Handle> {
        let (last, state) = self.now();
        if state != State::Free || last.generation() == u32::MAX {
            return None;
        }
        let generation = last.generation() + 1;
        self.word.store(u64::from(generation) << 32 | State::Bound as u64, SeqCst);
        Some(Handle::new(Kind::Context, self.index, generation))
    }

    pub(crate) fn set_state(&self, state: State) {
        let generation = self.word.load(SeqCst) >> 32;
        self.word.store(generation << 32 | state as u64, SeqCst);
    }

    /// Forgets all but generation and sequence; how many distinct leaves it had seen.
    pub(crate) fn free(&self) -> u64 {
        let Self { index: _, word: _, root, sequence: _, table_pages, data_pages, queues, seen, cleared } =
            self;
        self.set_state(State::Free);
        root.store(0, SeqCst);
        for count in [table_pages, data_pages, queues] {
            count.store(0, SeqCst);
        }
        cleared.lock().clear();
        let seen = std::mem::take(&mut *seen.lock());
        seen.len() as u64
    }

    /// A leaf was translated.
    pub(crate) fn saw(&self, leaf: u64) {
        let mut seen = self.seen.lock();
        if seen.len() < SEEN_MAX {
            seen.insert(leaf);
        }
    }

    pub(crate) fn seen(&self) -> u64 {
        self.seen.lock().len() as u64
    }

    /// Valid leaves were cleared at `[start, last]`.
    pub(crate) fn note_cleared(&self, start: u64, last: u64) {
        let mut cleared = self.cleared.lock();
        if let Some(newest) = cleared.last_mut() {
            if newest.1.checked_add(1) == Some(start) {
                newest.1 = last;
                return;
            }
        }
        if cleared.len() == CLEARED_MAX {
            cleared.remove(0);
        }
        cleared.push((start, last));
    }

    /// Whether leaves were cleared in the range since it was last invalidated; forgets them.
    pub(crate) fn take_cleared(&self, start: u64, last: u64) -> bool {
        let mut cleared = self.cleared.lock();
        let before = cleared.len();
        cleared.retain(|range| range.0 > last || range.1 < start);
        cleared.len() != before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_live_from_bind_to_unbind() {
        let context = Context::new(3);
        assert!(!context.is_bound(context.now().0));
        let first = context.bind().unwrap();
        assert_eq!((first.index(), first.generation()), (3, 1));
        assert!(context.bind().is_none());
        assert!(context.is_bound(first) && !context.issued_before(first));
        context.set_state(State::Released);
        assert!(!context.is_bound(first));
        assert_eq!(context.state_of(first), Some(State::Released));
        context.set_state(State::Closing);
        assert!(context.issued_before(first) && context.bind().is_none());
        context.free();
        let second = context.bind().unwrap();
        assert!(context.issued_before(first) && !context.issued_before(second));
        assert!(!context.issued_before(Handle::new(Kind::Context, 3, 9)));
    }

    #[test]
    fn cleared_ranges_count_once() {
        let context = Context::new(0);
        context.note_cleared(0x1000, 0x1fff);
        context.note_cleared(0x2000, 0x2fff);
        assert!(!context.take_cleared(0x3000, u64::MAX));
        assert!(context.take_cleared(0x2800, 0x2800));
        assert!(!context.take_cleared(0, u64::MAX));
        for i in 0..1000 {
            context.note_cleared(i * 0x2000, i * 0x2000);
        }
        assert!(context.cleared.lock().len() <= CLEARED_MAX);
    }
}
