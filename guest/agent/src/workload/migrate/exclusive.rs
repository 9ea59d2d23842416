// SPDX-License-Identifier: MIT OR Apache-2.0
//! Atomics of the device on pages that the CPUs are kept away from meanwhile (device-exclusive entries).

use std::path::Path;
use std::time::Duration;

use nix::sys::mman::MmapAdvise;

use super::crowd::{meanwhile, sums_are_right};
use super::{Round, To, migrate};
use crate::client::{Context, Job};
use crate::device::Device;
use crate::gates::Gates;
use crate::memory::{Backing, Mapping, PAGE, Pattern, Prot, WINDOW};
use crate::outcome::{Checked, Doing, Failure, require};
use crate::process::Child;
use crate::rng::Rng;

/// The driver's parameter: how the atomics of contexts work that are bound from then on.
const PARAMETER: &str = "/sys/module/hmm_vgpu/parameters/atomics";
/// Where a driver has its page.
const MADE: &str = "return:make_device_exclusive";
/// How long it gets to come there.
const PATIENCE: Duration = Duration::from_secs(2);
/// Words that are added to, one in each page.
const WORDS: usize = 8;

pub(super) fn round(round: &mut Round<'_, '_>) {
    let device = round.ground.device;
    round.case("exclusive/sums", |rng| sums(device, rng));
    round.case("exclusive/changes", |rng| changes(device, rng));
    round.case("exclusive/fork", |rng| fork(device, rng));
    round.case("exclusive/not-private", |_| not_private(device));
    let gates = round.gates();
    round.case("exclusive/made", |rng| made(device, gates, rng));
}

/// Binds a context whose atomics are exclusive.
fn bind(device: &dyn Device) -> Checked<Context> {
    let set = |value: &str| {
        std::fs::write(Path::new(PARAMETER), value)
            .map_err(|error| Failure::Skip(format!("{PARAMETER}: {error}")))
    };
    let before =
        std::fs::read_to_string(PARAMETER).map_err(|error| Failure::Skip(format!("{PARAMETER}: {error}")))?;
    set("exclusive")?;
    let context = Context::bind(device);
    set(before.trim_end())?;
    context
}

/// The page goes while the driver has it locked and has not yet mapped it: that it is locked keeps it from no munmap or madvise.
fn made(device: &dyn Device, gates: Gates<'_>, rng: &mut Rng) -> Checked {
    let context = bind(device)?;
    let map = Mapping::small(WINDOW).doing("mmap")?;
    map.fill(0, WINDOW, Pattern::ZERO);
    let at = rng.index(WINDOW / PAGE) * PAGE;
    map.store(at, 7);
    let Some(hold) = gates.hold(MADE, "")? else {
        return Err(Failure::Skip(format!("nobody can be held at {MADE} here")));
    };
    hold.close()?;
    let ticket = context.submit(Job::atomic_add(map.at(at), 1, 8, 1))?;
    let came = hold.wait(PATIENCE)?;
    let dropped = map.advise(at, PAGE, MmapAdvise::MADV_DONTNEED).doing("madvise");
    hold.open()?;
    dropped?;
    context.wait(ticket)?.ok()?;
    if !came {
        return Err(Failure::Skip("this driver does not come there".to_owned()));
    }
    let found = map.load(at);
    require(found == 1, || format!("fresh memory to which one was added holds {found}"))
}

/// CPU and device add to the same words: the sums of both must be right.
fn sums(device: &dyn Device, rng: &mut Rng) -> Checked {
    const JOBS: u64 = 6;
    const ADDS: u64 = 200;
    let context = bind(device)?;
    let map = Mapping::small(WORDS * PAGE).doing("mmap")?;
    map.fill(0, WORDS * PAGE, Pattern::ZERO);
    // A plain read of the neighbours meanwhile: they are mapped around the exclusive ones.
    let reading = || context.run(Job::strided_read(map.at(8), WORDS as u64, PAGE))?.ok().map(drop);
    meanwhile(reading, || {
        let tickets = (0..JOBS)
            .map(|_| context.submit(Job::atomic_add(map.at(0), WORDS as u64, PAGE, 1).queue(1)))
            .collect::<Checked<Vec<_>>>()?;
        for _ in 0..ADDS {
            map.add(rng.index(WORDS) * PAGE, 1 << 32);
        }
        tickets.into_iter().try_for_each(|ticket| context.wait(ticket)?.ok().map(drop))
    })?;
    sums_are_right(&map, WORDS, JOBS, ADDS)
}

/// The page is taken away, changed or migrated while it is exclusive.
fn changes(device: &dyn Device, rng: &mut Rng) -> Checked {
    let context = bind(device)?;
    let map = Mapping::small(WINDOW).doing("mmap")?;
    map.fill(0, WINDOW, Pattern::ZERO);
    let add = |page: usize| context.run(Job::atomic_add(map.at(page * PAGE), 1, 8, 1));
    let first = rng.index(8);
    let [a, b, c, d] = [first, first + 8, first + 16, first + 24];
    for page in [a, b, c, d] {
        add(page)?.ok()?;
    }
    // The device's plain accesses go on beside.
    context.run(Job::strided_read(map.at(0), 32, PAGE))?.ok()?;
    map.protect(a * PAGE, PAGE, Prot::Read).doing("mprotect")?;
    add(a)?.faulted_at(map.at(a * PAGE)).doing("read-only")?;
    map.protect(a * PAGE, PAGE, Prot::Write).doing("mprotect")?;
    add(a)?.ok()?;
    map.advise(b * PAGE, PAGE, MmapAdvise::MADV_DONTNEED).doing("madvise")?;
    add(b)?.ok()?;
    map.unmap(c * PAGE, PAGE).doing("munmap")?;
    add(c)?.faulted_at(map.at(c * PAGE)).doing("not mapped")?;
    migrate(&context, &map, d * PAGE, PAGE, To::Device)?;
    add(d)?.ok()?;
    let sums = [a, b, d].map(|page| map.load(page * PAGE));
    require(sums == [2, 1, 2], || format!("the sums are {sums:?} instead of [2, 1, 2]"))
}

/// A fork while pages are exclusive: both have what was there, and add to their own.
fn fork(device: &dyn Device, rng: &mut Rng) -> Checked {
    let context = bind(device)?;
    let map = Mapping::small(WORDS * PAGE).doing("mmap")?;
    let base = rng.next() >> 8;
    (0..WORDS).for_each(|word| map.store(word * PAGE, base));
    let add = Job::atomic_add(map.at(0), WORDS as u64, PAGE, 1);
    context.run(add)?.ok()?;
    let mut child = Child::spawn(|parent| {
        let right = (0..WORDS).all(|word| map.load(word * PAGE) == base.wrapping_add(1));
        require(right, || "the child has other sums than the parent had".to_owned())?;
        map.add(0, 100);
        parent.ready(0);
        let own = map.load(0);
        require(own == base.wrapping_add(101), || format!("the child's sum is {own:#x}"))
    })?;
    child.wait_ready()?;
    context.run(add)?.ok()?;
    child.join()?;
    let right = (0..WORDS).all(|word| map.load(word * PAGE) == base.wrapping_add(2));
    require(right, || "the parent's sums are not its own".to_owned())
}

/// Shared memory cannot be exclusive: an atomic there must fail and not go through all the same.
fn not_private(device: &dyn Device) -> Checked {
    let context = bind(device)?;
    let map = Mapping::new(PAGE, PAGE, Backing::AnonymousShared).doing("mmap")?;
    map.store(0, 7);
    context.run(Job::atomic_add(map.at(0), 1, 8, 1))?.faulted_at(map.at(0))?;
    require(map.load(0) == 7, || "the word was changed".to_owned())
}
