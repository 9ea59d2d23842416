// SPDX-License-Identifier: MIT OR Apache-2.0
//! Workloads that shake the boundary between the mm core and a mirror: each has one part of the kernel move, replace, take or
//! write-protect pages under a device at work, by itself and not because the process asked for it.
//!
//! Each checks what device and CPU read against a model, while and after it happens, and touches a hole that must fault. What a
//! kernel lacks is a skipped case with the reason.

pub(super) mod compaction;
pub(super) mod damon;
pub(super) mod hugetlb;
pub(super) mod khugepaged;
pub(super) mod ksm;
mod memory_failure;
mod mremap;
mod narrow;
pub(super) mod numa;
mod oom;
mod process_madvise;
mod ptrace;
pub(super) mod soft_dirty;
pub(super) mod swap;
pub(super) mod uprobes;
mod userfaultfd;
mod writeback;

use super::{Round, Workload};
use crate::client::{Context, Job, Ticket};
use crate::device::{Device, Stable};
use crate::memory::{Backing, Mapping, PAGE, Pattern, Prot, WINDOW};
use crate::outcome::{Checked, Doing, require};
use crate::rng::Rng;

pub(super) use narrow::Narrow;

/// Rounds where nobody says how many: a few seconds each.
const ROUNDS: u64 = 2;

const fn workload(name: &'static str, round: fn(&mut Round<'_, '_>)) -> Workload {
    // One after the other: what they switch on in the kernel is the whole system's.
    Workload { name, rounds: ROUNDS, lanes: false, round }
}

/// All of them, in the protocol's order.
pub(super) const ALL: &[Workload] = &[
    workload("khugepaged", khugepaged::round),
    workload("damon", damon::round),
    workload("soft-dirty", soft_dirty::round),
    workload("uprobes", uprobes::round),
    workload("ksm", ksm::round),
    workload("swap", swap::round),
    workload("writeback", writeback::round),
    workload("compaction", compaction::round),
    workload(guest_protocol::NUMA_WORKLOAD, numa::round),
    workload("userfaultfd", userfaultfd::round),
    workload("memory-failure", memory_failure::round),
    workload("oom", oom::round),
    workload("process-madvise", process_madvise::round),
    workload("ptrace", ptrace::round),
    workload("mremap", mremap::round),
    workload("hugetlb", hugetlb::round),
];

/// Memory that the device has written, all of it with one pattern.
struct Scene<'d> {
    device: &'d dyn Device,
    context: Context,
    map: Mapping,
    pattern: Pattern,
}

/// Jobs under way.
struct Load(Vec<Ticket>);

impl<'d> Scene<'d> {
    /// The device writes the memory, and CPU and device see it.
    fn new(device: &'d dyn Device, rng: &mut Rng, map: Mapping) -> Checked<Self> {
        let context = Context::bind(device)?;
        map.touch(0, map.bytes());
        let mut scene = Self { device, context, map, pattern: Pattern::ZERO };
        scene.rewrite(rng)?;
        Ok(scene)
    }

    /// On so many small pages.
    fn small(device: &'d dyn Device, rng: &mut Rng, pages: usize) -> Checked<Self> {
        Self::new(device, rng, Mapping::small(pages * PAGE).doing("mmap")?)
    }

    fn bytes(&self) -> usize {
        self.map.bytes()
    }

    /// The device writes a new pattern everywhere, and both see it.
    fn rewrite(&mut self, rng: &mut Rng) -> Checked {
        self.pattern = some_pattern(rng);
        self.context.fill(&self.map, 0, self.bytes(), self.pattern).doing("the device writes anew")?;
        self.agrees()
    }

    /// Device and CPU find the pattern everywhere.
    fn agrees(&self) -> Checked {
        self.context.check(&self.map, 0, self.bytes(), self.pattern)?;
        self.cpu_agrees()
    }

    /// The CPU does; where there is much, on every eighth page and the last.
    fn cpu_agrees(&self) -> Checked {
        let stride = if self.bytes() > 2 * WINDOW { 8 * PAGE } else { PAGE };
        (0..self.bytes())
            .step_by(stride)
            .chain([self.bytes() - PAGE])
            .try_for_each(|at| self.context.cpu_check(&self.map, at, PAGE, self.pattern.from(at)))
    }

    /// Sets the device to work on all of it: reading in random order, and on the other queue writing what is there already.
    fn load(&self, rng: &mut Rng) -> Checked<Load> {
        let (start, bytes) = (self.map.at(0), self.bytes());
        let mut tickets = vec![self.context.submit(Job::random_read(start, bytes, 20_000, rng.next()))?];
        for _ in 0..1 + rng.below(3) {
            tickets.push(self.context.submit(Job::fill(start, bytes, self.pattern).queue(1))?);
        }
        Ok(Load(tickets))
    }

    /// Waits for jobs that must all have been carried out.
    fn end(&self, load: Load) -> Checked {
        load.0.into_iter().try_for_each(|ticket| self.context.wait(ticket)?.ok().doing("load").map(drop))
    }

    /// Says that all of it can be read and written until the guard goes: a fault of the device in there must not be fatal.
    fn stable(&self) -> Checked<Stable<'_>> {
        Stable::declare(self.device, &self.map, 0, self.bytes())
    }

    /// Does something under a device at work, which must not notice, and looks at everything afterwards.
    fn under_load(&self, rng: &mut Rng, mut act: impl FnMut(&mut Rng) -> Checked) -> Checked {
        let stable = self.stable()?;
        let load = self.load(rng)?;
        let acted = act(rng);
        // Whatever came of it, no job is left behind.
        self.end(load)?;
        acted?;
        self.agrees()?;
        stable.end()
    }

    /// Some pages are taken away, and the device must not reach them any more; fresh ones come in their place.
    fn hole(&mut self, rng: &mut Rng) -> Checked {
        let pages = self.bytes() / PAGE;
        let count = 1 + rng.index(8.min(pages));
        let at = rng.index(pages - count + 1) * PAGE;
        self.map.unmap(at, count * PAGE).doing("munmap")?;
        self.context.must_not_reach(&self.map, at).doing("a hole")?;
        self.context.must_not_reach(&self.map, at + (count - 1) * PAGE).doing("a hole")?;
        self.map.refill(at, count * PAGE, Backing::Anonymous).doing("mmap into the hole")?;
        self.context.check(&self.map, at, count * PAGE, Pattern::ZERO).doing("fresh memory in the hole")?;
        self.context.fill(&self.map, at, count * PAGE, self.pattern.from(at))?;
        self.agrees().doing("with the hole filled")
    }

    /// What is read only can be read and not written, and then written again.
    fn read_only(&self, at: usize, bytes: usize) -> Checked {
        self.map.protect(at, bytes, Prot::Read).doing("mprotect")?;
        self.context.must_not_write(&self.map, at)?;
        self.context.check(&self.map, at, bytes, self.pattern.from(at))?;
        self.map.protect(at, bytes, Prot::Write).doing("mprotect")
    }
}

fn some_pattern(rng: &mut Rng) -> Pattern {
    Pattern { first: rng.next(), step: rng.next() | 1 }
}

/// Some whole pages of so many bytes: offset and length.
fn some_pages(rng: &mut Rng, bytes: usize) -> (usize, usize) {
    let pages = bytes / PAGE;
    let first = rng.index(pages);
    (first * PAGE, (1 + rng.index(pages - first)) * PAGE)
}

/// Something that the kernel does in its own time was seen to happen.
fn happened(seen: bool, what: &str) -> Checked {
    // Not a failure: how soon it comes is nobody's promise.
    if seen { Ok(()) } else { Err(crate::outcome::Failure::Skip(format!("{what} in time"))) }
}

/// A counter of /proc/vmstat has grown.
fn grew(name: &str, before: u64) -> bool {
    crate::kernel::vmstat(name) > before
}

/// The advice is one that this kernel knows.
fn known<T>(result: Result<T, nix::errno::Errno>, what: &str) -> Checked<T> {
    match result {
        Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOSYS) => {
            Err(crate::outcome::Failure::Skip(format!("this kernel does not have {what}")))
        }
        other => other.doing(what),
    }
}

/// All counts agree.
fn same(what: &str, left: u64, right: u64) -> Checked {
    require(left == right, || format!("{what}: {left} instead of {right}"))
}
