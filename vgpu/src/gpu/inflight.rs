// SPDX-License-Identifier: MIT OR Apache-2.0
//! What an engine is about to touch, for those who must wait until it has.
//!
//! An engine *publishes* an access before it reads the context's state and invalidation sequence. Whoever invalidates moves
//! the sequence and drops the TLB entries before it looks at the slots. Both sides are sequentially consistent, so either the
//! engine sees the new sequence, or the other side sees the slot and waits for its epoch to change. An engine publishes one
//! step at a time and a step is bounded, so such a wait is too. A parked fault publishes nothing.

use std::sync::atomic::{AtomicU64, Ordering};

use vgpu_spec::handle::Handle;
use vgpu_spec::pte::PAGE_SHIFT;

/// Addresses that a step may touch: first and last, inclusive.
pub(crate) type Range = (u64, u64);
/// A range that overlaps nothing.
pub(crate) const EMPTY: Range = (u64::MAX, 0);

/// One engine's slot. Only that engine's thread writes it.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct InFlight {
    /// Odd while a step is published.
    epoch: AtomicU64,
    ctx: AtomicU64,
    ranges: [AtomicU64; 4],
    /// The address being accessed plus one, or 0 while the step is still translating.
    accessing: AtomicU64,
}

impl InFlight {
    pub(crate) fn new() -> Self {
        Self {
            epoch: AtomicU64::new(0),
            ctx: AtomicU64::new(0),
            ranges: Default::default(),
            accessing: AtomicU64::new(0),
        }
    }

    /// Publishes a step. Ranges are stored with release, so that who sees a new range also sees that the old epoch is over.
    #[inline]
    pub(crate) fn publish(&self, ctx: Handle, ranges: [Range; 2]) {
        let epoch = self.epoch.load(Ordering::Relaxed);
        self.ctx.store(ctx.0, Ordering::Release);
        for (i, (start, last)) in ranges.into_iter().enumerate() {
            self.ranges[2 * i].store(start, Ordering::Release);
            self.ranges[2 * i + 1].store(last, Ordering::Release);
        }
        self.accessing.store(0, Ordering::Release);
        self.epoch.store(epoch + 1, Ordering::SeqCst);
        std::sync::atomic::fence(Ordering::SeqCst);
    }

    /// The translation is done and memory is about to be touched.
    #[inline]
    pub(crate) fn accessing(&self, va: u64) {
        self.accessing.store(va + 1, Ordering::SeqCst);
    }

    /// The step is over.
    #[inline]
    pub(crate) fn clear(&self) {
        let epoch = self.epoch.load(Ordering::Relaxed);
        self.epoch.store(epoch + 1, Ordering::SeqCst);
    }

    /// The epoch to be waited for if a step of `ctx` that touches `[start, last]` is published.
    pub(crate) fn overlapping(&self, ctx: Handle, (start, last): Range) -> Option<u64> {
        let epoch = self.epoch.load(Ordering::SeqCst);
        if epoch % 2 == 0 {
            return None;
        }
        let named = self.ctx.load(Ordering::Acquire);
        let touches = |i: usize| {
            self.ranges[i].load(Ordering::Acquire) <= last
                && self.ranges[i + 1].load(Ordering::Acquire) >= start
        };
        let touched = touches(0) || touches(2);
        // If the epoch has moved while we read, what we read may belong to the next step: wait for this one all the same,
        // it is over already.
        let torn = self.epoch.load(Ordering::SeqCst) != epoch;
        (torn || named == ctx.0 && touched).then_some(epoch)
    }

    /// Whether the step that is or was published last is one of `ctx`.
    pub(crate) fn is_of(&self, ctx: Handle) -> bool {
        self.ctx.load(Ordering::Acquire) == ctx.0
    }

    /// Whether the step that is or was published last may touch the page at `va`.
    pub(crate) fn may_touch(&self, va: u64) -> bool {
        let page = va >> PAGE_SHIFT;
        let touches = |i: usize| {
            let (start, last) =
                (self.ranges[i].load(Ordering::Acquire), self.ranges[i + 1].load(Ordering::Acquire));
            start <= last && start >> PAGE_SHIFT <= page && page <= last >> PAGE_SHIFT
        };
        touches(0) || touches(2)
    }

    /// Whether the step published as `epoch` is over.
    pub(crate) fn is_past(&self, epoch: u64) -> bool {
        self.epoch.load(Ordering::SeqCst) != epoch
    }

    /// The address that an access of `ctx` is touching now.
    pub(crate) fn address(&self, ctx: Handle) -> Option<u64> {
        let epoch = self.epoch.load(Ordering::SeqCst);
        if epoch % 2 == 0 || self.ctx.load(Ordering::Acquire) != ctx.0 {
            return None;
        }
        let accessing = self.accessing.load(Ordering::SeqCst);
        if self.epoch.load(Ordering::SeqCst) != epoch {
            return None;
        }
        accessing.checked_sub(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_overlapping_steps_are_waited_for() {
        let slot = InFlight::new();
        let (a, b) = (Handle(1), Handle(2));
        assert_eq!(slot.overlapping(a, (0, u64::MAX)), None);
        slot.publish(a, [(0x1000, 0x1fff), (0x9000, 0x9fff)]);
        assert_eq!(slot.overlapping(b, (0, u64::MAX)), None);
        assert_eq!(slot.overlapping(a, (0x2000, 0x8fff)), None);
        let epoch = slot.overlapping(a, (0x9800, 0x9800)).unwrap();
        assert!(!slot.is_past(epoch));
        assert_eq!(slot.address(a), None);
        slot.accessing(0);
        assert_eq!(slot.address(a), Some(0));
        assert_eq!(slot.address(b), None);
        slot.clear();
        assert!(slot.is_past(epoch));
        slot.publish(a, [(0, 7), EMPTY]);
        assert_eq!(slot.overlapping(a, (8, u64::MAX)), None);
        assert!(slot.overlapping(a, (0, 0)).is_some());
    }
}
