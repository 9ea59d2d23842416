// SPDX-License-Identifier: MIT OR Apache-2.0
//! A device that takes its time, now and then.
//!
//! A driver that does not wait for its invalidation to complete is right by luck on a device that is always faster than the
//! driver. This one lets commands wait in the ring, and accesses linger while a drain waits for them, each once in a while and
//! for a moment: as a real one may at any time. What the driver must wait for is then still there when it has not waited.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use vgpu_spec::job::random_index;

/// Once in so many times that commands are about to be taken, and for how long at most.
const COMMANDS: (u64, u64) = (160, 3_000);
/// Once in so many INVALIDATEs that another command follows, and for how long at most: what is cleared only then may be walked anew.
const BETWEEN: (u64, u64) = (64, 1_000);
/// Once in so many steps that end while a drain waits, and for how long at most, in microseconds.
const STEPS: (u64, u64) = (16, 1_500);
/// Once in so many interrupts for jobs that were killed, and for how long at most.
const LATE: (u64, u64) = (3, 1_500);
/// Once in so many faults that are alone, the interrupt is held back.
const FAULTS: u64 = 8;
/// Chances are drawn in spells of so many, of which one in so many is slow: every second chance is taken. Threads of a driver that
/// wait for each other meet only where several waits come together.
const SPELL: (u64, u64) = (64, 16);
/// Keeps the spells apart from the chances.
const SPELLS: u64 = 0x5ca1_ab1e;
/// Keeps what is drawn for completions apart from both.
const COALESCED: u64 = 0x0dd_ba11;
/// And what is drawn for faults.
const HELD_BACK: u64 = 0xfa_117e5;

/// Where the moments come from. Without a seed there are none.
pub(crate) struct Jitter {
    seed: Option<u64>,
    drawn: AtomicU64,
    completions: AtomicU64,
    faults: AtomicU64,
}

impl Jitter {
    pub(crate) fn new(seed: Option<u64>) -> Self {
        Self { seed, drawn: AtomicU64::new(0), completions: AtomicU64::new(0), faults: AtomicU64::new(0) }
    }

    /// To be called with no lock held, before commands are taken.
    pub(crate) fn before_commands(&self) {
        self.pause(COMMANDS);
    }

    /// To be called with no lock held, after an INVALIDATE and before the command behind it.
    pub(crate) fn after_an_invalidation(&self) {
        self.pause(BETWEEN);
    }

    /// Whether the interrupt for a completion waits for the next one's.
    pub(crate) fn coalesces(&self) -> bool {
        let Some(seed) = self.seed else { return false };
        random_index(seed ^ COALESCED, self.completions.fetch_add(1, Relaxed), 2) == 0
    }

    /// Whether the interrupt for a fault comes late: see [`super::engine`].
    pub(crate) fn holds_back(&self) -> bool {
        let Some(seed) = self.seed else { return false };
        random_index(seed ^ HELD_BACK, self.faults.fetch_add(1, Relaxed), FAULTS) == 0
    }

    /// To be called with no lock held, when the command that an interrupt comes from has been reported.
    pub(crate) fn before_a_late_interrupt(&self) {
        self.pause(LATE);
    }

    /// To be called at the end of a step, while it is still published and a drain waits.
    #[cold]
    pub(crate) fn before_a_step_ends(&self) {
        self.pause(STEPS);
    }

    fn pause(&self, (one_in, most): (u64, u64)) {
        let Some(seed) = self.seed else { return };
        let number = self.drawn.fetch_add(2, Relaxed);
        let slow = random_index(seed ^ SPELLS, number / (2 * SPELL.0), SPELL.1) == 0;
        if random_index(seed, number, if slow { 2 } else { one_in }) == 0 {
            std::thread::sleep(Duration::from_micros(
                most / 4 + random_index(seed, number + 1, most * 3 / 4),
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_makes_pauses_and_none_makes_none() {
        let time = |seed| {
            let jitter = Jitter::new(seed);
            let start = std::time::Instant::now();
            (0..256).for_each(|_| jitter.after_an_invalidation());
            start.elapsed()
        };
        assert!(time(Some(5)) >= Duration::from_micros(250));
        let jitter = Jitter::new(None);
        jitter.before_commands();
        assert_eq!(jitter.drawn.load(Relaxed), 0);
    }
}
