// SPDX-License-Identifier: MIT OR Apache-2.0
//! `invalidate`: memory is taken away or changed while the device has it mapped and works on it; then the device touches the
//! place, and must fault or see what is there now.
//!
//! Case names say what is done, where engines run meanwhile (on the range itself, or beside it in the same mapping), on what
//! pages, and on how much of them. What is wide or far is a range over many tables.

mod wide;

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::mman::MmapAdvise;
use nix::unistd::ftruncate;

use super::Round;
use super::access::memory_file;
use crate::client::{Context, Job, Ticket};
use crate::device::Device;
use crate::memory::{Backing, HUGE, Mapping, PAGE, Pattern, Prot, WINDOW, advice};
use crate::outcome::{Checked, Doing, Failure, require};
use crate::process::{BOUND, Child};
use crate::rng::Rng;

/// Rounds in the default suite.
pub(super) const ROUNDS: u64 = 2;
/// Accesses of a job that runs while memory is changed.
const LOAD: u64 = 50_000;
/// Pages that are filled again where nothing is present: each costs a fault of its own.
const FEW: usize = 12 * PAGE;

/// What is done to the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Munmap,
    Mremap,
    ProtectRead,
    ProtectNone,
    DontNeed,
    Free,
    Fork,
    PunchHole,
    Truncate,
}

impl Op {
    const ALL: [(Self, &'static str); 9] = [
        (Self::Munmap, "munmap"),
        (Self::Mremap, "mremap"),
        (Self::ProtectRead, "mprotect-read"),
        (Self::ProtectNone, "mprotect-none"),
        (Self::DontNeed, "dontneed"),
        (Self::Free, "free"),
        (Self::Fork, "fork"),
        (Self::PunchHole, "punch-hole"),
        (Self::Truncate, "truncate"),
    ];

    /// Works on a file.
    fn of_file(self) -> bool {
        matches!(self, Self::PunchHole | Self::Truncate)
    }

    /// A job on the range may meet memory that is not there.
    fn may_fault(self) -> bool {
        !matches!(self, Self::DontNeed | Self::Free | Self::Fork | Self::PunchHole)
    }

    /// A job that writes meanwhile may bring back what was dropped.
    fn drops(self) -> bool {
        matches!(self, Self::DontNeed | Self::PunchHole)
    }
}

/// Memory that the device has mapped, and the part of it that something is to happen to.
struct Scene {
    context: Context,
    map: Mapping,
    file: Option<OwnedFd>,
    pattern: Pattern,
    /// Offset and bytes of what engines may work on when they run on the range.
    target: (usize, usize),
    /// Offset and bytes of what is changed.
    hole: (usize, usize),
}

/// One round.
pub(super) fn round(round: &mut Round<'_, '_>) {
    let device = round.ground.device;
    for (op, op_name) in Op::ALL {
        for (on_it, load) in [(true, "running"), (false, "beside")] {
            let kinds: &[(bool, &str)] =
                if op.of_file() { &[(false, "file")] } else { &[(false, "4k"), (true, "thp")] };
            for &(huge, kind) in kinds {
                for (whole, part) in [(true, "whole"), (false, "partial")] {
                    round.case(&format!("{op_name}/{load}/{kind}/{part}"), |rng| {
                        Scene::new(device, rng, op, huge, whole)?.play(op, on_it, rng)
                    });
                }
            }
        }
    }
    round.case("fork/written", |rng| written(device, rng, |_| Child::spawn(|_| Ok(()))?.join()));
    // Each block is 64 pages that the device has mapped, and so 64 invalidations.
    for (name, blocks, op) in
        [("dontneed", 12, Op::DontNeed), ("mprotect-none", 6, Op::ProtectNone), ("munmap", 6, Op::Munmap)]
    {
        round.case(&format!("{name}/each-page"), |rng| each_page(device, rng, op, blocks));
    }
    if round.iteration == 0 {
        for (op, huge, name) in wide::CASES {
            round.case(name, |rng| wide::wide(device, rng, op, huge));
        }
    }
    round.case("munmap/far", |rng| wide::far(device, rng));
}

/// A child waits until its parent, which shares this page with it, says that it has written.
fn until_written(written: &Mapping) -> Checked {
    let until = Instant::now() + BOUND;
    while written.load(0) == 0 {
        require(Instant::now() < until, || "the parent did not write".to_owned())?;
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}

impl Scene {
    fn new(device: &dyn Device, rng: &mut Rng, op: Op, huge: bool, whole: bool) -> Checked<Self> {
        let unit = if huge { HUGE } else { WINDOW };
        // A file ends with the target, so that truncation takes nothing else; small memory has neighbours on both sides.
        let bytes = if huge || op.of_file() { 2 * unit } else { 3 * unit };
        let target = (unit, unit);
        let hole = match (whole, op) {
            (true, _) => target,
            (false, Op::Truncate) => (unit + 20 * PAGE, unit - 20 * PAGE),
            (false, _) => (unit + 20 * PAGE, 24 * PAGE),
        };
        let file = if op.of_file() { Some(memory_file(bytes)?) } else { None };
        let map = match &file {
            Some(file) => Mapping::new(bytes, unit, Backing::FileShared(file.as_fd(), 0)),
            None if huge => Mapping::huge(bytes),
            None => Mapping::small(bytes),
        }
        .doing("mmap")?;
        let context = Context::bind(device)?;
        map.touch(0, bytes);
        let pattern = Pattern { first: rng.next(), step: rng.next() | 1 };
        let scene = Self { context, map, file, pattern, target, hole };
        scene.context.fill(&scene.map, 0, bytes, pattern)?;
        scene.cpu_sees(0, bytes, pattern)?;
        Ok(scene)
    }

    fn play(&self, op: Op, on_it: bool, rng: &mut Rng) -> Checked {
        let busy = if on_it { self.target } else { (0, self.target.0) };
        let writing = rng.once_in(2);
        let load = self.set_running(busy, writing, rng)?;
        std::thread::sleep(Duration::from_micros(rng.below(400)));
        if op == Op::Fork {
            self.fork(load)?;
        } else {
            let moved = self.apply(op)?;
            for ticket in load {
                let done = self.context.wait(ticket)?;
                if on_it && op.may_fault() { done.ok_or_fault() } else { done.ok() }.doing("load")?;
            }
            if writing && on_it && op.drops() {
                self.apply(op)?;
            }
            self.judge(op, moved.as_ref(), rng)?;
        }
        // Everything else is as it was.
        let end = self.hole.0 + self.hole.1;
        for (at, bytes) in [(0, self.hole.0), (end, self.map.bytes() - end)] {
            self.sees(at, bytes, self.pattern.from(at)).doing("around the range")?;
            self.cpu_sees(at, bytes, self.pattern.from(at)).doing("around the range")?;
        }
        Ok(())
    }

    /// Engines on a range, reading, or writing what is there already.
    fn set_running(&self, (at, bytes): (usize, usize), writing: bool, rng: &mut Rng) -> Checked<Vec<Ticket>> {
        let start = self.map.at(at);
        let count = if writing { 6 } else { 1 };
        (0..count)
            .map(|_| {
                let job = if writing {
                    Job::fill(start, bytes, self.pattern.from(at))
                } else {
                    Job::random_read(start, bytes, LOAD, rng.next())
                };
                self.context.submit(job.queue(1))
            })
            .collect()
    }

    fn sees(&self, at: usize, bytes: usize, pattern: Pattern) -> Checked {
        if bytes == 0 { Ok(()) } else { self.context.check(&self.map, at, bytes, pattern) }
    }

    /// The CPU looks at some pages; all of them would take long under emulation.
    fn cpu_sees(&self, at: usize, bytes: usize, pattern: Pattern) -> Checked {
        let stride = (bytes / 8 / PAGE * PAGE).max(PAGE);
        (0..bytes)
            .step_by(stride)
            .try_for_each(|part| self.context.cpu_check(&self.map, at + part, PAGE, pattern.from(part)))
    }

    fn file(&self) -> Checked<&OwnedFd> {
        self.file.as_ref().ok_or_else(|| Failure::wrong("the scene has no file"))
    }

    /// Does it. A moved part is returned.
    fn apply(&self, op: Op) -> Checked<Option<Mapping>> {
        let (at, bytes) = self.hole;
        match op {
            Op::Munmap => self.map.unmap(at, bytes).doing("munmap")?,
            Op::Mremap => {
                let align = if bytes % HUGE == 0 { HUGE } else { PAGE };
                let target = Mapping::reserve(bytes, align).doing("mmap")?;
                self.map.move_to(at, bytes, &target, 0).doing("mremap")?;
                return Ok(Some(target));
            }
            Op::ProtectRead => self.map.protect(at, bytes, Prot::Read).doing("mprotect")?,
            Op::ProtectNone => self.map.protect(at, bytes, Prot::None).doing("mprotect")?,
            Op::DontNeed => self.map.advise(at, bytes, MmapAdvise::MADV_DONTNEED).doing("madvise")?,
            Op::Free => self.map.advise(at, bytes, MmapAdvise::MADV_FREE).doing("madvise")?,
            Op::PunchHole => {
                let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                fallocate(self.file()?, mode, at as i64, bytes as i64).doing("fallocate")?;
            }
            Op::Truncate => ftruncate(self.file()?, at as i64).doing("ftruncate")?,
            Op::Fork => {}
        }
        Ok(None)
    }

    /// What the device finds there now.
    fn judge(&self, op: Op, moved: Option<&Mapping>, rng: &mut Rng) -> Checked {
        let (context, map, (at, bytes)) = (&self.context, &self.map, self.hole);
        let pages = bytes / PAGE;
        let some_pages = [at, at + bytes - PAGE, at + rng.index(pages) * PAGE];
        let new = Pattern { first: rng.next(), step: rng.next() | 1 };
        match op {
            Op::Munmap | Op::Mremap => {
                some_pages.into_iter().try_for_each(|page| context.must_not_reach(map, page))?;
                if let Some(moved) = moved {
                    context.check(moved, 0, bytes, self.pattern.from(at)).doing("at the new address")?;
                    context.fill(moved, 0, bytes, new).doing("at the new address")?;
                    context.cpu_check(moved, 0, PAGE, new)?;
                }
                map.refill(at, bytes, Backing::Anonymous).doing("mmap into the hole")?;
                self.is_fresh(new)
            }
            Op::ProtectRead => {
                self.sees(at, bytes, self.pattern.from(at))?;
                some_pages.into_iter().try_for_each(|page| context.must_not_write(map, page))?;
                map.protect(at, bytes, Prot::Write).doing("mprotect")?;
                self.sees(at, bytes, self.pattern.from(at))?;
                context.fill(map, at, bytes, new)?;
                self.cpu_sees(at, bytes, new)
            }
            Op::ProtectNone => {
                some_pages.into_iter().try_for_each(|page| context.must_not_reach(map, page))?;
                map.protect(at, bytes, Prot::Write).doing("mprotect")?;
                self.sees(at, bytes, self.pattern.from(at))
            }
            Op::DontNeed | Op::PunchHole => self.is_fresh(new),
            Op::Free => self.may_be_freed(new),
            Op::Truncate => {
                some_pages.into_iter().try_for_each(|page| context.must_not_reach(map, page))?;
                ftruncate(self.file()?, map.bytes() as i64).doing("ftruncate")?;
                self.is_fresh(new)
            }
            Op::Fork => Ok(()),
        }
    }

    /// The hole holds zeros, and can be written.
    fn is_fresh(&self, new: Pattern) -> Checked {
        let (at, bytes) = (self.hole.0, self.hole.1.min(FEW));
        // What is forgotten is likely to lie where two parts meet. Before the rest: what was freed is soon zeros again.
        for page in [self.hole.1 / 2 / PAGE * PAGE, self.hole.1 - PAGE] {
            self.sees(at + page, PAGE, Pattern::ZERO).doing("fresh memory")?;
        }
        self.sees(at, bytes, Pattern::ZERO).doing("fresh memory")?;
        self.context.fill(&self.map, at, bytes, new).doing("fresh memory")?;
        self.context.cpu_check(&self.map, at, bytes, new).doing("fresh memory")
    }

    /// After MADV_FREE each page holds its old data or zeros; what the device writes then must stay.
    fn may_be_freed(&self, new: Pattern) -> Checked {
        let (at, bytes) = self.hole;
        for page in (at..at + bytes).step_by((bytes / 8 / PAGE * PAGE).max(PAGE)) {
            let old = Job::check(self.map.at(page), PAGE, self.pattern.from(page));
            if self.context.run(old)?.ok()?.result != 0 {
                self.sees(page, PAGE, Pattern::ZERO).doing("neither the old data nor zeros")?;
            }
        }
        self.context.fill(&self.map, at, bytes, new)?;
        // The CPU has not written it since, so that only the driver can say that it is not to be dropped.
        self.map.advise_by_number(at, bytes, advice::PAGEOUT).doing("MADV_PAGEOUT")?;
        self.cpu_sees(at, bytes, new).doing("after reclaim")
    }

    /// After a fork the child keeps the old data, whoever writes in the parent.
    fn fork(&self, load: Vec<Ticket>) -> Checked {
        let (at, bytes) = self.hole;
        let written = Mapping::new(PAGE, PAGE, Backing::AnonymousShared).doing("mmap")?;
        let mut child = Child::spawn(|parent| {
            parent.ready(0);
            until_written(&written)?;
            self.cpu_sees(0, self.map.bytes(), self.pattern).doing("in the child")
        })?;
        child.wait_ready()?;
        for ticket in load {
            self.context.wait(ticket)?.ok().doing("load")?;
        }
        self.sees(at, bytes, self.pattern.from(at)).doing("after the fork")?;
        // The first pages are written by the CPU and read by the device, the others the other way round.
        let new = Pattern { first: !self.pattern.word(at), step: self.pattern.step };
        let by_cpu = 4 * PAGE;
        self.map.fill(at, by_cpu, new);
        self.sees(at, by_cpu, new).doing("written by the CPU after the fork")?;
        self.context.fill(&self.map, at + by_cpu, bytes - by_cpu, new.from(by_cpu))?;
        self.cpu_sees(at, bytes, new).doing("written by the device after the fork")?;
        written.store(0, 1);
        child.join()
    }
}

/// What the device wrote to pages that were clean stays when something takes its right to write and leaves the pages: reclaim drops those that
/// nobody has called dirty.
pub(super) fn written(device: &dyn Device, rng: &mut Rng, then: impl FnOnce(&Context) -> Checked) -> Checked {
    let context = Context::bind(device)?;
    let map = Mapping::small(WINDOW).doing("mmap")?;
    map.fill(0, WINDOW, Pattern { first: rng.next(), step: rng.next() | 1 });
    map.advise(0, WINDOW, MmapAdvise::MADV_FREE).doing("madvise")?;
    let new = Pattern { first: rng.next(), step: rng.next() | 1 };
    context.fill(&map, 0, WINDOW, new)?;
    then(&context)?;
    map.advise_by_number(0, WINDOW, advice::PAGEOUT).doing("MADV_PAGEOUT")?;
    context.cpu_check(&map, 0, WINDOW, new).doing("after reclaim")
}

/// Takes away block after block, page by page in an order of chance, after the device has mapped all of it.
fn each_page(device: &dyn Device, rng: &mut Rng, op: Op, blocks: usize) -> Checked {
    let context = Context::bind(device)?;
    let map = Mapping::small(WINDOW).doing("mmap")?;
    let pages = WINDOW / PAGE;
    for block in 0..blocks {
        map.touch(0, WINDOW);
        context.fill(&map, 0, WINDOW, Pattern { first: rng.next(), step: 1 })?;
        let (first, stride) = (rng.index(pages), rng.index(pages) | 1);
        for index in 0..pages {
            // An odd stride visits every page of a power of two.
            let at = (first + index * stride) % pages * PAGE;
            match op {
                Op::DontNeed => map.advise(at, PAGE, MmapAdvise::MADV_DONTNEED).doing("madvise")?,
                Op::Munmap => map.unmap(at, PAGE).doing("munmap")?,
                _ => map.protect(at, PAGE, Prot::None).doing("mprotect")?,
            }
        }
        let probe = rng.index(pages) * PAGE;
        match op {
            Op::DontNeed if block % 4 == 0 => context.check(&map, probe, PAGE, Pattern::ZERO)?,
            Op::DontNeed => {}
            Op::Munmap => {
                context.must_not_reach(&map, probe)?;
                map.refill(0, WINDOW, Backing::Anonymous).doing("mmap into the hole")?;
            }
            _ => {
                context.must_not_reach(&map, probe)?;
                map.protect(0, WINDOW, Prot::Write).doing("mprotect")?;
            }
        }
    }
    Ok(())
}
