// SPDX-License-Identifier: MIT OR Apache-2.0
//! `access`: the device and the CPU read and write the same memory, of every kind, and must agree.

mod huge;
mod many;
mod threads;

use std::os::fd::{AsFd, OwnedFd};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::MmapAdvise;
use nix::unistd::ftruncate;
use vgpu_spec::job::random_index;

use super::Round;
use super::boundary::hugetlb;
use crate::client::{Context, Job};
use crate::device::Device;
use crate::memory::{Backing, HUGE, Mapping, PAGE, PAGE_WORDS, Pattern, Prot, WINDOW};
use crate::outcome::{Checked, Doing, Failure, require};
use crate::process::Child;
use crate::rng::Rng;

/// Rounds in the default suite.
pub(super) const ROUNDS: u64 = 1;

/// A kind of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Small,
    Huge,
    FilePrivate,
    FileShared,
    Shared,
}

impl Kind {
    const ALL: [(Self, &'static str); 5] = [
        (Self::Small, "anon-4k"),
        (Self::Huge, "anon-thp"),
        (Self::FilePrivate, "file-private"),
        (Self::FileShared, "file-shared"),
        (Self::Shared, "anon-shared"),
    ];

    fn bytes(self) -> usize {
        if self == Self::Huge { HUGE } else { 2 * WINDOW }
    }
}

/// Memory of a kind, with the file behind it.
struct Memory {
    map: Mapping,
    file: Option<OwnedFd>,
}

/// A file in memory of this length.
pub(super) fn memory_file(bytes: usize) -> Checked<OwnedFd> {
    let file = memfd_create(c"testbench", MFdFlags::MFD_CLOEXEC).doing("memfd_create")?;
    ftruncate(&file, bytes as i64).doing("ftruncate")?;
    Ok(file)
}

impl Memory {
    fn new(kind: Kind) -> Checked<Self> {
        let bytes = kind.bytes();
        let file = match kind {
            Kind::FilePrivate | Kind::FileShared => Some(memory_file(bytes)?),
            _ => None,
        };
        let map = match (kind, file.as_ref()) {
            (Kind::Huge, _) => Mapping::huge(bytes),
            (Kind::Shared, _) => Mapping::new(bytes, WINDOW, Backing::AnonymousShared),
            (Kind::FilePrivate, Some(file)) => {
                Mapping::new(bytes, WINDOW, Backing::FilePrivate(file.as_fd(), 0))
            }
            (Kind::FileShared, Some(file)) => {
                Mapping::new(bytes, WINDOW, Backing::FileShared(file.as_fd(), 0))
            }
            _ => Mapping::small(bytes),
        }
        .doing("mmap")?;
        Ok(Self { map, file })
    }
}

fn pattern(rng: &mut Rng) -> Pattern {
    Pattern { first: rng.next(), step: rng.next() | 1 }
}

/// One round.
pub(super) fn round(round: &mut Round<'_, '_>) {
    type Body = fn(&Context, &Memory, &mut Rng) -> Checked;
    let bodies: [(&str, Body); 9] = [
        ("cpu-then-device", cpu_then_device),
        ("device-then-cpu", device_then_cpu),
        ("device-first", device_first),
        ("copy", copy),
        ("compare", compare),
        ("atomic", atomic),
        ("strided", strided),
        ("random", random),
        ("rights", rights),
    ];
    for (kind, name) in Kind::ALL {
        // One context for all cases of a kind: what an earlier one left in its tables is part of the test.
        let context = Context::bind(round.device());
        for (body_name, body) in bodies {
            let anonymous = !matches!(kind, Kind::Shared | Kind::FileShared);
            let possible = anonymous || body_name != "atomic" || round.ground.coherent_atomics;
            round.case(&format!("{name}/{body_name}"), |rng| {
                if !possible {
                    return Err(Failure::Skip("only anonymous pages can be made exclusive".to_owned()));
                }
                let context = context.as_ref().map_err(Clone::clone)?;
                body(context, &Memory::new(kind)?, rng)
            });
        }
    }
    for (name, backing) in [("unmapped", None), ("beyond-end", Some(()))] {
        round_case_hole(round, name, backing.is_some());
    }
    let result = |device: &dyn Device, rng: &mut Rng| between_processes(device, rng);
    let device = round.ground.device;
    round.case("anon-shared/two-processes", |rng| result(device, rng));
    round.case("file-private/file-unchanged", |rng| private_file(device, rng));
    round.case("bad-jobs", |rng| bad_jobs(device, rng));
    round.case("anon-4k/emptied", |rng| emptied(device, rng));
    round.case("anon-thp/leaves", |rng| huge::leaves(device, rng));
    round.case("anon-thp/split-by-unmap", |rng| huge::split_by_unmap(device, rng));
    round.case("anon-thp/split-by-protect", |rng| huge::split_by_protect(device, rng));
    round.case("anon-4k/end-of-address-space", |rng| last(device, rng));
    round.case("burst", |rng| many::burst(device, rng.next()));
    round.case("queue-full", |rng| many::full(device, rng.next()));
    round.case("every-queue-faults", |rng| many::queues(device, rng.next()));
    round.case("anon-4k/more-than-tables", |rng| many::regions(device, rng.next()));
    round.case("anon-4k/under-signals", |rng| threads::signalled(device, rng));
    round.case("anon-4k/without-first-thread", |rng| threads::leaderless(device, rng));
    round.case("hugetlb/first-touch", |rng| hugetlb::first_touch(device, rng));
}

fn cpu_then_device(context: &Context, memory: &Memory, rng: &mut Rng) -> Checked {
    let (map, bytes) = (&memory.map, memory.map.bytes());
    let pattern = pattern(rng);
    map.fill(0, bytes, pattern);
    context.check(map, 0, bytes, pattern)?;
    // What the CPU changes after the device has mapped it is seen too.
    let at = rng.index(bytes / 8) * 8;
    map.store(at, !pattern.word(at));
    context.check(map, at, 8, Pattern { first: !pattern.word(at), step: 0 })
}

fn device_then_cpu(context: &Context, memory: &Memory, rng: &mut Rng) -> Checked {
    let (map, bytes) = (&memory.map, memory.map.bytes());
    let pattern = pattern(rng);
    map.touch(0, bytes);
    context.fill(map, 0, bytes, pattern)?;
    context.cpu_check(map, 0, bytes, pattern)
}

/// The device is the first to touch the memory: first it reads zeros, then it writes.
fn device_first(context: &Context, memory: &Memory, rng: &mut Rng) -> Checked {
    let bytes = memory.map.bytes().min(8 * PAGE);
    context.check(&memory.map, 0, bytes, Pattern::ZERO)?;
    let pattern = pattern(rng);
    context.fill(&memory.map, 0, bytes, pattern)?;
    context.cpu_check(&memory.map, 0, bytes, pattern)
}

fn copy(context: &Context, memory: &Memory, rng: &mut Rng) -> Checked {
    let map = &memory.map;
    let half = map.bytes() / 2;
    let pattern = pattern(rng);
    map.fill(0, half, pattern);
    map.touch(half, half);
    // A shift of some words, so that pages of source and destination do not go in step.
    let shift = rng.index(PAGE / 8) * 8;
    context.run(Job::copy(map.at(half + shift), map.at(0), half - PAGE))?.ok()?;
    context.cpu_check(map, half + shift, half - PAGE, pattern)
}

fn compare(context: &Context, memory: &Memory, rng: &mut Rng) -> Checked {
    let map = &memory.map;
    let half = map.bytes() / 2;
    let pattern = pattern(rng);
    map.fill(0, half, pattern);
    map.fill(half, half, pattern);
    let same = context.run(Job::compare(map.at(half), map.at(0), half))?.ok()?;
    require(same.result == 0, || format!("equal halves compare as different: {same}"))?;
    let at = rng.index(half / 8) * 8;
    map.store(half + at, !pattern.word(at));
    let other = context.run(Job::compare(map.at(half), map.at(0), half))?.ok()?;
    require(other.result == 1 && other.address == map.at(at), || {
        format!("one word differs at {:#x}, but compare says: {other}", map.at(at))
    })
}

/// The CPU and the device add to the same words at the same time.
fn atomic(context: &Context, memory: &Memory, rng: &mut Rng) -> Checked {
    const WORDS: u64 = 8;
    const ADDS: u64 = 4000;
    let map = &memory.map;
    let stride = PAGE + 8;
    let (device_adds, cpu_adds) = (rng.next(), rng.next());
    for index in 0..WORDS as usize {
        map.store(index * stride, 0);
    }
    let tickets = (0..ADDS / WORDS / 10)
        .map(|_| context.submit(Job::atomic_add(map.at(0), WORDS, stride, device_adds)))
        .collect::<Checked<Vec<_>>>()?;
    let own = context.submit(Job::atomic_add(map.at(0), ADDS, 0, device_adds).queue(1))?;
    for index in 0..ADDS as usize {
        map.add((index % WORDS as usize) * stride, cpu_adds);
    }
    let each = tickets.len() as u64;
    for ticket in tickets.into_iter().chain([own]) {
        context.wait(ticket)?.ok()?;
    }
    for index in 0..WORDS {
        let device = each + if index == 0 { ADDS } else { 0 };
        let expected = device.wrapping_mul(device_adds).wrapping_add((ADDS / WORDS).wrapping_mul(cpu_adds));
        let at = index as usize * stride;
        let found = map.load(at);
        if found != expected {
            return Err(Failure::cpu(context.handle(), map.at(at), expected, found));
        }
    }
    Ok(())
}

fn strided(context: &Context, memory: &Memory, rng: &mut Rng) -> Checked {
    let (map, bytes) = (&memory.map, memory.map.bytes());
    map.fill(0, bytes, Pattern::ZERO);
    let stride = 8 * (1 + rng.index(96));
    let count = (bytes / stride) as u64;
    let first = rng.next();
    context.run(Job::strided_write(map.at(0), count, stride, first))?.ok()?;
    for index in 0..count {
        let (at, expected) = (index as usize * stride, first.wrapping_add(index));
        let found = map.load(at);
        if found != expected {
            return Err(Failure::cpu(context.handle(), map.at(at), expected, found));
        }
    }
    let sum = (0..count).fold(0_u64, |sum, index| sum.wrapping_add(first.wrapping_add(index)));
    let read = context.run(Job::strided_read(map.at(0), count, stride))?.ok()?;
    require(read.result == sum, || format!("the device should have summed {sum:#x}: {read}"))
}

fn random(context: &Context, memory: &Memory, rng: &mut Rng) -> Checked {
    let (map, bytes) = (&memory.map, memory.map.bytes());
    let words = (bytes / 8) as u64;
    let pattern = pattern(rng);
    map.fill(0, bytes, pattern);
    let (seed, xor, count) = (rng.next(), rng.next(), 20_000);
    let sum = (0..count).fold(0_u64, |sum, index| {
        sum.wrapping_add(pattern.word(random_index(seed, index, words) as usize * 8))
    });
    let read = context.run(Job::random_read(map.at(0), bytes, count, seed))?.ok()?;
    require(read.result == sum, || format!("the device should have summed {sum:#x}: {read}"))?;
    context.run(Job::random_write(map.at(0), bytes, count, seed, xor))?.ok()?;
    // Undone by the CPU with the same sequence, everything is as before.
    for index in 0..count {
        let word = random_index(seed, index, words);
        let at = word as usize * 8;
        map.store(at, map.load(at) ^ xor ^ word);
    }
    context.cpu_check(map, 0, bytes, pattern)
}

/// The device keeps to what the mapping allows, page by page.
fn rights(context: &Context, memory: &Memory, rng: &mut Rng) -> Checked {
    let map = &memory.map;
    let pattern = pattern(rng);
    map.fill(0, 4 * PAGE, pattern);
    let readable = PAGE;
    let closed = 2 * PAGE;
    map.protect(readable, PAGE, Prot::Read).doing("mprotect")?;
    map.protect(closed, PAGE, Prot::None).doing("mprotect")?;
    context.check(map, readable, PAGE, pattern.from(readable))?;
    context.must_not_write(map, readable)?;
    context.must_not_reach(map, closed)?;
    // A job over all of it does what it may, up to the first page it may not.
    let next = Pattern { first: 1, step: PAGE_WORDS };
    context.run(Job::fill(map.at(0), 4 * PAGE, next))?.faulted_at(map.at(readable))?;
    context.cpu_check(map, 0, PAGE, next)?;
    context.cpu_check(map, readable, PAGE, pattern.from(readable))?;
    map.protect(0, 4 * PAGE, Prot::Write).doing("mprotect")?;
    context.cpu_check(map, closed, 2 * PAGE, pattern.from(closed))?;
    context.fill(map, readable, 3 * PAGE, next)?;
    context.cpu_check(map, readable, 3 * PAGE, next)
}

/// Addresses with nothing behind them.
fn round_case_hole(round: &mut Round<'_, '_>, name: &str, beyond_end: bool) {
    let device = round.ground.device;
    round.case(&format!("hole/{name}"), |_| {
        let context = Context::bind(device)?;
        if beyond_end {
            let file = memory_file(PAGE)?;
            let map = Mapping::new(4 * PAGE, WINDOW, Backing::FileShared(file.as_fd(), 0)).doing("mmap")?;
            // A job that goes on behind the end does what it may before.
            let pattern = Pattern { first: 5, step: PAGE_WORDS };
            let over = context.run(Job::fill(map.at(0), 2 * PAGE, pattern))?;
            if over.has_faulted_at(map.at(0)) {
                let detail = "refused because of what follows in the same access".to_owned();
                return Err(Failure::refused(context.handle(), map.at(0), detail));
            }
            over.faulted_at(map.at(PAGE))?;
            context.cpu_check(&map, 0, PAGE, pattern)?;
            map.store(0, 1);
            context.check(&map, 0, 8, Pattern { first: 1, step: 0 })?;
            context.must_not_reach(&map, PAGE)?;
            context.must_not_reach(&map, 3 * PAGE)
        } else {
            let map = Mapping::small(4 * PAGE).doing("mmap")?;
            map.touch(0, 4 * PAGE);
            map.unmap(PAGE, 2 * PAGE).doing("munmap")?;
            context.must_not_reach(&map, PAGE)?;
            context.must_not_reach(&map, 2 * PAGE)?;
            context.check(&map, 0, 8, Pattern::ZERO)?;
            context.check(&map, 3 * PAGE, 8, Pattern { first: 3 * PAGE as u64, step: 0 })
        }
    });
}

/// Memory is emptied: the device must find zeros on every page. Each is a job of its own, for a fault over all of them has the
/// driver look at all of them, and mend what it had forgotten.
fn emptied(device: &dyn Device, rng: &mut Rng) -> Checked {
    let pages = 8;
    let map = Mapping::small(pages * PAGE).doing("mmap")?;
    emptied_on(&Context::bind(device)?, &map, rng)
}

/// The same behind the stack, up to the last page that a process may have.
fn last(device: &dyn Device, rng: &mut Rng) -> Checked {
    let map = match Mapping::last(8 * PAGE) {
        Err(nix::errno::Errno::EEXIST) => {
            return Err(Failure::Skip("something else is mapped there".to_owned()));
        }
        other => other.doing("mmap")?,
    };
    emptied_on(&Context::bind(device)?, &map, rng)
}

fn emptied_on(context: &Context, map: &Mapping, rng: &mut Rng) -> Checked {
    let pages = map.bytes() / PAGE;
    map.touch(0, pages * PAGE);
    context.fill(map, 0, pages * PAGE, pattern(rng))?;
    map.advise(0, pages * PAGE, MmapAdvise::MADV_DONTNEED).doing("madvise")?;
    // The middle first, where two parts may have met: what was freed is soon another page, and zeros again.
    let mut order = std::iter::once(pages / 2).chain(0..pages);
    order.try_for_each(|page| context.check(map, page * PAGE, PAGE, Pattern::ZERO))
}

/// Two processes, each with a context, on the same shared pages.
fn between_processes(device: &dyn Device, rng: &mut Rng) -> Checked {
    let map = Mapping::new(WINDOW, WINDOW, Backing::AnonymousShared).doing("mmap")?;
    let context = Context::bind(device)?;
    let (first, second, third) = (pattern(rng), pattern(rng), pattern(rng));
    context.fill(&map, 0, WINDOW, first)?;
    let mut child = Child::spawn(|_| {
        let own = Context::bind(device)?;
        own.check(&map, 0, WINDOW, first).doing("child")?;
        own.fill(&map, 0, WINDOW, second).doing("child")?;
        own.cpu_check(&map, 0, WINDOW, second).doing("child")
    })?;
    child.join()?;
    context.check(&map, 0, WINDOW, second)?;
    context.cpu_check(&map, 0, WINDOW, second)?;
    context.fill(&map, 0, WINDOW, third)?;
    context.cpu_check(&map, 0, WINDOW, third)
}

/// What the device writes to a private file mapping stays out of the file, and what the file holds is seen until then.
fn private_file(device: &dyn Device, rng: &mut Rng) -> Checked {
    let memory = Memory::new(Kind::FilePrivate)?;
    let file = memory.file.as_ref().ok_or_else(|| Failure::wrong("no file"))?;
    let bytes = memory.map.bytes();
    let shared = Mapping::new(bytes, WINDOW, Backing::FileShared(file.as_fd(), 0)).doing("mmap")?;
    let (old, new) = (pattern(rng), pattern(rng));
    shared.fill(0, bytes, old);
    let context = Context::bind(device)?;
    context.check(&memory.map, 0, bytes, old)?;
    context.fill(&memory.map, 0, bytes / 2, new)?;
    context.cpu_check(&memory.map, 0, bytes / 2, new)?;
    context.check(&memory.map, bytes / 2, bytes / 2, old.from(bytes / 2))?;
    context.cpu_check(&shared, 0, bytes, old).doing("the file itself")
}

/// Jobs that are not well formed are refused, by the driver or by the device, and the queue goes on.
fn bad_jobs(device: &dyn Device, _: &mut Rng) -> Checked {
    let map = Mapping::small(PAGE).doing("mmap")?;
    map.store(0, 5);
    let context = Context::bind(device)?;
    let five = Pattern { first: 5, step: 0 };
    for job in [Job::fill(map.at(0) + 1, 8, Pattern::ZERO), Job::fill(map.at(0), 4, Pattern::ZERO)] {
        if let Ok(ticket) = context.submit(job) {
            let done = context.wait(ticket)?;
            require(done.status == vgpu_spec::job::JOB_BAD, || format!("a malformed job ended with {done}"))?;
        }
    }
    context.check(&map, 0, 8, five)
}
