// SPDX-License-Identifier: MIT OR Apache-2.0
//! `migrate`: pages of the process go to the device's memory and come back, by ioctl, by the CPU's access, and because their
//! context, their process or the driver goes; what is in them is held against what was written.
//!
//! Skipped where the kernel has no device-private memory, which is built in or not: Debian's 6.1 and 6.12 lack it.

mod crowd;
mod ends;
mod exclusive;
mod failing;
mod placed;

use nix::errno::Errno;

use super::Round;
use crate::client::{Context, Job};
use crate::device::Device;
use crate::memory::{Mapping, PAGE, Pattern, WINDOW};
use crate::outcome::{Checked, Doing, Failure, require};
use crate::rng::Rng;

/// Rounds in the default suite. Every second round, and so none of these, is short of memory too.
pub(super) const ROUNDS: u64 = 1;

/// Which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum To {
    Device,
    System,
}

/// One round.
pub(super) fn round(round: &mut Round<'_, '_>) {
    placed::round(round);
    ends::round(round);
    crowd::round(round);
    exclusive::round(round);
    failing::round(round);
}

/// Migrates a part of a mapping; how many pages have gone.
pub(super) fn migrate(context: &Context, map: &Mapping, at: usize, bytes: usize, to: To) -> Checked<usize> {
    let way = if to == To::Device { "migrate to the device" } else { "migrate to the system" };
    match context.file().migrate(map.at(at), bytes as u64, to == To::Device) {
        Err(Errno::EOPNOTSUPP) => Err(Failure::Skip("the kernel has no device-private memory".to_owned())),
        other => Ok(other.map_err(|errno| context.refusal(errno)).doing(way)? as usize),
    }
}

/// Migrates a part until so many pages of it have gone: a page that somebody just looks at (reclaim, a fault around) stays,
/// and goes the next time.
pub(super) fn migrate_all(context: &Context, map: &Mapping, at: usize, bytes: usize, to: To) -> Checked {
    let mut left = bytes / PAGE;
    for _ in 0..20 {
        left -= migrate(context, map, at, bytes, to)?.min(left);
        if left == 0 {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    Err(Failure::Wrong(format!("{left} of {} pages did not go {to:?}wards", bytes / PAGE)))
}

/// Pages of VRAM that the context has.
pub(super) fn on_device(context: &Context) -> Checked<u64> {
    Ok(context.file().query().doing("query")?.device_pages)
}

/// Small pages with a pattern, a context on them, and some of them on the device.
pub(super) struct Placed {
    pub(super) context: Context,
    pub(super) map: Mapping,
    pub(super) pattern: Pattern,
}

impl Placed {
    /// A window of memory that the device has read, all of it migrated.
    pub(super) fn new(device: &dyn Device, rng: &mut Rng) -> Checked<Self> {
        let placed = Self::unmoved(device, rng, WINDOW)?;
        migrate_all(&placed.context, &placed.map, 0, WINDOW, To::Device)?;
        Ok(placed)
    }

    /// The same, of so many bytes and still in system memory.
    pub(super) fn unmoved(device: &dyn Device, rng: &mut Rng, bytes: usize) -> Checked<Self> {
        let map = Mapping::small(bytes).doing("mmap")?;
        let context = Context::bind(device)?;
        let pattern = Pattern { first: rng.next(), step: rng.next() | 1 };
        map.fill(0, bytes, pattern);
        let placed = Self { context, map, pattern };
        placed.device_sees(0, bytes)?;
        Ok(placed)
    }

    pub(super) fn device_sees(&self, at: usize, bytes: usize) -> Checked {
        self.context.check(&self.map, at, bytes, self.pattern.from(at))
    }

    pub(super) fn cpu_sees(&self, at: usize, bytes: usize) -> Checked {
        self.context.cpu_check(&self.map, at, bytes, self.pattern.from(at))
    }

    /// The device writes another pattern to all of it.
    pub(super) fn rewrite(&mut self, rng: &mut Rng) -> Checked {
        self.pattern = Pattern { first: rng.next(), step: rng.next() | 1 };
        self.context.fill(&self.map, 0, self.map.bytes(), self.pattern)
    }

    /// Sets both queues to work on it, for so many accesses: xors that cancel out, and reads.
    pub(super) fn set_running(&self, accesses: u64, rng: &mut Rng) -> Checked {
        let (start, bytes, seed) = (self.map.at(0), self.map.bytes(), rng.next());
        self.context.submit(Job::random_write(start, bytes, accesses, seed, 1))?;
        self.context.submit(Job::random_read(start, bytes, accesses, seed).queue(1)).map(drop)
    }

    pub(super) fn expect_on_device(&self, pages: u64) -> Checked {
        let has = on_device(&self.context)?;
        require(has == pages, || format!("the context has {has} pages of VRAM instead of {pages}"))
    }
}
