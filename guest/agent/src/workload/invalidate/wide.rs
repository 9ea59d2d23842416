// SPDX-License-Identifier: MIT OR Apache-2.0
//! Ranges that many tables lie in: what a driver does for the first few of them it must do for the last.

use nix::sys::mman::MmapAdvise;

use super::{Op, until_written};
use crate::client::{Context, Job};
use crate::device::Device;
use crate::memory::{Backing, HUGE, Mapping, PAGE, Prot, WINDOW};
use crate::outcome::{Checked, Doing, Failure};
use crate::process::Child;
use crate::rng::Rng;

/// Places that the device has mapped, each in a table of its own: more than a driver has room for at once.
const PLACES: usize = 40;
/// Jobs that are under way when the range is changed, each over all places.
const LOAD: usize = 8;
/// Bytes of a range that ends two tables of the next level behind its beginning.
const FAR: usize = 2 << 30;

/// What is done to the whole range, and on what pages.
pub(super) const CASES: [(Op, bool, &str); 4] = [
    (Op::Munmap, false, "munmap/wide/4k"),
    (Op::DontNeed, false, "dontneed/wide/4k"),
    (Op::ProtectRead, false, "mprotect-read/wide/4k"),
    (Op::Fork, true, "fork/wide/thp"),
];

/// One word in each 2 MiB, written by the device, which reads them while the range is changed.
struct Wide {
    context: Context,
    map: Mapping,
    /// Offset of the word in its 2 MiB.
    at: usize,
    /// The word at the first place; the next ones follow.
    first: u64,
}

impl Wide {
    fn new(device: &dyn Device, rng: &mut Rng, huge: bool) -> Checked<Self> {
        let bytes = PLACES * HUGE;
        let map = if huge { Mapping::huge(bytes) } else { Mapping::small(bytes) }.doing("mmap")?;
        let context = Context::bind(device)?;
        let wide = Self { context, map, at: rng.index(HUGE / PAGE) * PAGE, first: rng.next() };
        wide.write(wide.first)?;
        Ok(wide)
    }

    fn place(&self, index: usize) -> usize {
        index * HUGE + self.at
    }

    fn write(&self, first: u64) -> Checked {
        let job = Job::strided_write(self.map.at(self.at), PLACES as u64, HUGE, first);
        self.context.run(job)?.ok().doing("device writes").map(drop)
    }

    fn read(&self) -> Job {
        Job::strided_read(self.map.at(self.at), PLACES as u64, HUGE)
    }

    /// The device must find consecutive words.
    fn sees(&self, first: u64) -> Checked {
        let found = self.context.run(self.read())?.ok()?.result;
        self.is_sum(found, (0..PLACES as u64).map(|index| first.wrapping_add(index)))
    }

    fn is_sum(&self, found: u64, words: impl Iterator<Item = u64>) -> Checked {
        let expected = words.fold(0, u64::wrapping_add);
        if found == expected {
            return Ok(());
        }
        Err(Failure::device(self.context.handle(), self.map.at(self.at), expected, found)
            .at(&format!("sum of {PLACES} words, one in each 2 MiB from here")))
    }

    /// The CPU must find consecutive words.
    fn cpu_sees(&self, first: u64) -> Checked {
        for index in 0..PLACES {
            let (at, expected) = (self.place(index), first.wrapping_add(index as u64));
            let found = self.map.load(at);
            if found != expected {
                return Err(Failure::cpu(self.context.handle(), self.map.at(at), expected, found));
            }
        }
        Ok(())
    }

    fn change(&self, op: Op, rng: &mut Rng) -> Checked {
        let (context, map, bytes) = (&self.context, &self.map, self.map.bytes());
        let load = (0..LOAD).map(|_| context.submit(self.read().queue(1))).collect::<Checked<Vec<_>>>()?;
        match op {
            Op::Munmap => map.unmap(0, bytes).doing("munmap")?,
            Op::DontNeed => map.advise(0, bytes, MmapAdvise::MADV_DONTNEED).doing("madvise")?,
            Op::ProtectRead => map.protect(0, bytes, Prot::Read).doing("mprotect")?,
            _ => self.fork(rng.next())?,
        }
        for ticket in load {
            let done = context.wait(ticket)?;
            if op == Op::Munmap { done.ok_or_fault() } else { done.ok() }.doing("load")?;
        }
        let mut some = [PLACES - 1, PLACES / 2, rng.index(PLACES)].into_iter().map(|index| self.place(index));
        match op {
            Op::Munmap => some.try_for_each(|at| context.must_not_reach(map, at)),
            Op::DontNeed => {
                let found = context.run(self.read())?.ok()?.result;
                self.is_sum(found, std::iter::empty()).doing("fresh memory")
            }
            Op::ProtectRead => {
                some.try_for_each(|at| context.must_not_write(map, at))?;
                self.sees(self.first)
            }
            _ => Ok(()),
        }
    }

    /// The child keeps the old words, whatever the parent's device writes.
    fn fork(&self, new: u64) -> Checked {
        let written = Mapping::new(PAGE, PAGE, Backing::AnonymousShared).doing("mmap")?;
        let mut child = Child::spawn(|parent| {
            parent.ready(0);
            until_written(&written)?;
            self.cpu_sees(self.first).doing("in the child")
        })?;
        child.wait_ready()?;
        self.write(new)?;
        written.store(0, 1);
        self.sees(new)?;
        child.join()
    }
}

/// A range of many tables is changed at once.
pub(super) fn wide(device: &dyn Device, rng: &mut Rng, op: Op, huge: bool) -> Checked {
    Wide::new(device, rng, huge)?.change(op, rng)
}

/// A range that begins in one table of the second level and ends in another is unmapped, with little in it.
pub(super) fn far(device: &dyn Device, rng: &mut Rng) -> Checked {
    let context = Context::bind(device)?;
    let map = Mapping::reserve(FAR, WINDOW).doing("mmap")?;
    // The ends, and where a table of the second level ends, which is at a multiple of 1 GiB.
    let edge = (FAR / 2) - (map.at(0) as usize & (FAR / 2 - 1));
    for at in [0, edge - WINDOW, edge, FAR - WINDOW] {
        map.renew(at, WINDOW, Prot::Write, Backing::Anonymous).doing("mmap")?;
        context.run(Job::strided_write(map.at(at), (WINDOW / PAGE) as u64, PAGE, rng.next()))?.ok()?;
    }
    map.unmap(0, FAR).doing("munmap")?;
    [0, edge - PAGE, edge, FAR - PAGE].into_iter().try_for_each(|at| context.must_not_reach(&map, at))
}
