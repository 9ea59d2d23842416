// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which pages go, and what is in them wherever they are.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::{Placed, Round, To, migrate, migrate_all, on_device};
use crate::client::Context;
use crate::device::Device;
use crate::memory::{Backing, HUGE, Mapping, PAGE, Pattern, Prot, WINDOW};
use crate::outcome::{Checked, Doing, require};
use crate::process::{BOUND, Pause};
use crate::rng::Rng;
use crate::workload::access::memory_file;

const PAGES: usize = WINDOW / PAGE;
/// Bytes of the device's own memory.
const VRAM: usize = 8 * HUGE;
/// Pages of it that another context has, at the most.
const FEW: usize = 7;

pub(super) fn round(round: &mut Round<'_, '_>) {
    type Body = fn(&dyn Device, &mut Rng) -> Checked;
    let bodies: [(&str, Body); 9] = [
        ("back/ioctl", by_ioctl),
        ("back/cpu", by_cpu),
        ("back/partial", partial),
        ("thp/back", huge),
        ("mixed", mixed),
        ("read-only", read_only),
        ("not-private", not_private),
        ("private-file", private_file),
        ("vram-full", vram_full),
    ];
    let device = round.ground.device;
    for (name, body) in bodies {
        round.case(name, |rng| body(device, rng));
    }
}

fn by_ioctl(device: &dyn Device, rng: &mut Rng) -> Checked {
    let mut placed = Placed::new(device, rng)?;
    placed.expect_on_device(PAGES as u64)?;
    placed.device_sees(0, WINDOW).doing("on the device")?;
    placed.rewrite(rng)?;
    let again = migrate(&placed.context, &placed.map, 0, WINDOW, To::Device)?;
    require(again == 0, || format!("{again} pages went to where they were"))?;
    migrate_all(&placed.context, &placed.map, 0, WINDOW, To::System)?;
    vram_returned(&placed.context)?;
    placed.cpu_sees(0, WINDOW).doing("back in system memory")?;
    placed.device_sees(0, WINDOW).doing("back in system memory")?;
    let faults = placed.context.file().query().doing("query")?.cpu_faults;
    require(faults == 0, || format!("{faults} pages were still on the device"))
}

/// The device gets pages back a little after the kernel has freed them.
fn vram_returned(context: &Context) -> Checked {
    let until = Instant::now() + BOUND;
    let mut pause = Pause::default();
    while on_device(context)? != 0 {
        require(Instant::now() < until, || "the device does not get its pages back".to_owned())?;
        pause.take();
    }
    Ok(())
}

fn by_cpu(device: &dyn Device, rng: &mut Rng) -> Checked {
    let mut placed = Placed::new(device, rng)?;
    placed.rewrite(rng)?;
    // Reads of one half, writes of the other.
    placed.cpu_sees(0, WINDOW / 2)?;
    let new = Pattern { first: rng.next(), step: 3 };
    placed.map.fill(WINDOW / 2, WINDOW / 2, new);
    let faults = placed.context.file().query().doing("query")?.cpu_faults;
    require(faults == PAGES as u64, || format!("{faults} pages came back instead of {PAGES}"))?;
    vram_returned(&placed.context)?;
    placed.device_sees(0, WINDOW / 2)?;
    placed.context.check(&placed.map, WINDOW / 2, WINDOW / 2, new)
}

fn partial(device: &dyn Device, rng: &mut Rng) -> Checked {
    let mut placed = Placed::unmoved(device, rng, 2 * WINDOW)?;
    for step in 0..12 {
        let first = rng.index(2 * PAGES);
        let pages = 1 + rng.index((2 * PAGES - first).min(20));
        let (at, bytes) = (first * PAGE, pages * PAGE);
        match rng.below(4) {
            0 | 1 => drop(migrate(&placed.context, &placed.map, at, bytes, To::Device)?),
            2 => drop(migrate(&placed.context, &placed.map, at, bytes, To::System)?),
            _ => placed.cpu_sees(at, bytes).doing("touched by the CPU")?,
        }
        if step == 6 {
            placed.rewrite(rng)?;
        }
        let probe = rng.index(2 * PAGES) * PAGE;
        placed.device_sees(probe, PAGE)?;
    }
    placed.device_sees(0, 2 * WINDOW)?;
    placed.cpu_sees(0, 2 * WINDOW)
}

/// A huge page is split, and goes page by page.
fn huge(device: &dyn Device, rng: &mut Rng) -> Checked {
    let map = Mapping::huge(HUGE).doing("mmap")?;
    let context = Context::bind(device)?;
    let pattern = Pattern { first: rng.next(), step: rng.next() | 1 };
    map.touch(0, PAGE);
    context.fill(&map, 0, HUGE, pattern)?;
    let (at, pages) = (rng.index(HUGE / WINDOW - 1) * WINDOW, 2 * PAGES);
    migrate_all(&context, &map, at, pages * PAGE, To::Device)?;
    context.check(&map, 0, HUGE, pattern)?;
    for page in [0, at, at + pages * PAGE - PAGE, HUGE - PAGE] {
        context.cpu_check(&map, page, PAGE, pattern.from(page))?;
    }
    context.check(&map, 0, HUGE, pattern)
}

/// Pages that were never touched, zero pages, pages without rights, and a hole, in one range.
fn mixed(device: &dyn Device, rng: &mut Rng) -> Checked {
    const PART: usize = 8 * PAGE;
    let context = Context::bind(device)?;
    let map = Mapping::small(6 * PART).doing("mmap")?;
    let pattern = Pattern { first: rng.next(), step: rng.next() | 1 };
    let part = |index: usize| index * PART;
    // 0: never touched. 1: zero pages. 2: written. 3: read-only. 4: no rights. 5: not mapped.
    (part(1)..part(2)).step_by(PAGE).for_each(|at| {
        map.load(at);
    });
    map.fill(part(2), 3 * PART, pattern);
    map.protect(part(3), PART, Prot::Read).doing("mprotect")?;
    map.protect(part(4), PART, Prot::None).doing("mprotect")?;
    map.unmap(part(5), PART).doing("munmap")?;
    let moved = migrate(&context, &map, 0, 6 * PART, To::Device)?;
    let most = 5 * PART / PAGE;
    require(moved > 0 && moved <= most, || format!("{moved} pages went, of {most} that could"))?;
    context.check(&map, 0, 2 * PART, Pattern::ZERO).doing("never written")?;
    context.check(&map, part(2), 2 * PART, pattern).doing("written")?;
    context.must_not_write(&map, part(3) + rng.index(8) * PAGE).doing("read-only")?;
    context.must_not_reach(&map, part(4) + rng.index(8) * PAGE).doing("no rights")?;
    context.must_not_reach(&map, part(5)).doing("not mapped")?;
    map.protect(part(4), PART, Prot::Read).doing("mprotect")?;
    context.check(&map, part(4), PART, pattern.from(2 * PART)).doing("rights given back")?;
    context.cpu_check(&map, part(2), 3 * PART, pattern)?;
    context.cpu_check(&map, 0, 2 * PART, Pattern::ZERO)?;
    let new = Pattern { first: rng.next(), step: 5 };
    context.fill(&map, 0, 3 * PART, new)?;
    context.cpu_check(&map, 0, 3 * PART, new)
}

/// Rights change while the pages are on the device.
fn read_only(device: &dyn Device, rng: &mut Rng) -> Checked {
    let mut placed = Placed::new(device, rng)?;
    placed.map.protect(0, WINDOW, Prot::Read).doing("mprotect")?;
    placed.device_sees(0, WINDOW)?;
    placed.context.must_not_write(&placed.map, rng.index(PAGES) * PAGE)?;
    placed.map.protect(0, WINDOW, Prot::None).doing("mprotect")?;
    placed.context.must_not_reach(&placed.map, rng.index(PAGES) * PAGE)?;
    placed.map.protect(0, WINDOW, Prot::Write).doing("mprotect")?;
    placed.device_sees(0, WINDOW)?;
    placed.rewrite(rng)?;
    placed.cpu_sees(0, WINDOW)
}

/// Only private anonymous memory can go; asking for the rest does no harm.
fn not_private(device: &dyn Device, rng: &mut Rng) -> Checked {
    let file = memory_file(WINDOW)?;
    for backing in [Backing::AnonymousShared, Backing::FileShared(file.as_fd(), 0)] {
        let map = Mapping::new(WINDOW, WINDOW, backing).doing("mmap")?;
        let context = Context::bind(device)?;
        let pattern = Pattern { first: rng.next(), step: rng.next() | 1 };
        context.fill(&map, 0, WINDOW, pattern)?;
        let moved = migrate(&context, &map, 0, WINDOW, To::Device)?;
        require(moved == 0, || format!("{moved} shared pages went to the device"))?;
        context.check(&map, 0, WINDOW, pattern)?;
        context.cpu_check(&map, 0, WINDOW, pattern)?;
    }
    Ok(())
}

/// Of a private mapping of a file only what was written is the process's own.
fn private_file(device: &dyn Device, rng: &mut Rng) -> Checked {
    let file = memory_file(WINDOW)?;
    let whole = Mapping::new(WINDOW, WINDOW, Backing::FileShared(file.as_fd(), 0)).doing("mmap")?;
    let old = Pattern { first: rng.next(), step: 7 };
    whole.fill(0, WINDOW, old);
    let map = Mapping::new(WINDOW, WINDOW, Backing::FilePrivate(file.as_fd(), 0)).doing("mmap")?;
    let context = Context::bind(device)?;
    let new = Pattern { first: rng.next(), step: 9 };
    map.fill(0, WINDOW / 2, new);
    // By the CPU: a driver may make a page the process's own when it only reads.
    context.cpu_check(&map, WINDOW / 2, WINDOW / 2, old.from(WINDOW / 2))?;
    migrate_all(&context, &map, 0, WINDOW / 2, To::Device)?;
    let moved = migrate(&context, &map, WINDOW / 2, WINDOW / 2, To::Device)?;
    require(moved == 0, || format!("{moved} pages of a file went to the device"))?;
    context.check(&map, 0, WINDOW / 2, new)?;
    context.check(&map, WINDOW / 2, WINDOW / 2, old.from(WINDOW / 2))?;
    context.cpu_check(&map, 0, WINDOW / 2, new)?;
    context.cpu_check(&whole, 0, WINDOW, old).doing("in the file")
}

/// More memory than the device has: what finds no room stays. Another context has a few pages, so that the device is full in the
/// middle of whatever its driver moves at a time: what was begun must be brought to an end.
fn vram_full(device: &dyn Device, rng: &mut Rng) -> Checked {
    const BYTES: usize = VRAM + HUGE;
    let few = (1 + rng.index(FEW)) * PAGE;
    let other = Placed::unmoved(device, rng, few)?;
    migrate_all(&other.context, &other.map, 0, few, To::Device)?;
    let context = Context::bind(device)?;
    let map = Mapping::huge(BYTES).doing("mmap")?;
    let pattern = Pattern { first: rng.next(), step: rng.next() | 1 };
    context.fill(&map, 0, map.bytes(), pattern)?;
    let moved = migrate(&context, &map, 0, map.bytes(), To::Device)?;
    let has = on_device(&context)?;
    require(moved as u64 == has && moved <= (VRAM - few) / PAGE, || {
        format!("{moved} of {} pages went, and the device has {has}", map.bytes() / PAGE)
    })?;
    context.check(&map, 0, map.bytes(), pattern)?;
    // There is room again, whoever goes first.
    let back = migrate(&context, &map, 0, HUGE, To::System)?;
    let until = Instant::now() + BOUND;
    let mut again = 0;
    while again == 0 && back > 0 {
        again = migrate(&context, &map, map.bytes() - HUGE, HUGE, To::Device)?;
        require(Instant::now() < until, || "VRAM that was given up is not used again".to_owned())?;
        std::thread::sleep(Duration::from_millis(1));
    }
    context.check(&map, 0, map.bytes(), pattern)?;
    for page in [0, HUGE - PAGE, HUGE, map.bytes() - PAGE] {
        context.cpu_check(&map, page, PAGE, pattern.from(page))?;
    }
    other.device_sees(0, few)?;
    other.cpu_sees(0, few)
}
