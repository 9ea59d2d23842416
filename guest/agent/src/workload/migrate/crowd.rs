// SPDX-License-Identifier: MIT OR Apache-2.0
//! Several at once: CPUs and engines on pages that go back and forth, and a machine short of memory.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::{Placed, Round, To, migrate};
use crate::client::{Context, Job};
use crate::device::Device;
use crate::memory::{HUGE, Mapping, PAGE, WINDOW};
use crate::outcome::{Checked, Doing, Failure, require};
use crate::rng::Rng;

/// Words that both sides add to.
const WORDS: usize = 32;

pub(super) fn round(round: &mut Round<'_, '_>) {
    let device = round.ground.device;
    round.case("race/sums", |rng| sums(device, rng));
    round.case("race/data", |rng| data(device, rng));
    // Takes all of the machine's memory, and so its time.
    if round.iteration % 2 == 1 {
        round.case("pressure", |rng| pressure(device, rng));
    }
}

/// Runs `side` again and again on a thread while `body` runs.
pub(super) fn meanwhile<T>(
    side: impl Fn() -> Checked + Sync + Send,
    body: impl FnOnce() -> Checked<T>,
) -> Checked<T> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let mut rounds = 0;
            while !stop.load(Ordering::Relaxed) || rounds == 0 {
                side()?;
                rounds += 1;
            }
            Ok(())
        });
        let result = body();
        stop.store(true, Ordering::Relaxed);
        thread.join().map_err(|_| Failure::wrong("the other thread panicked"))??;
        result
    })
}

/// Adds by the CPU and by engines to the same words, which migrate meanwhile: none may be lost.
fn sums(device: &dyn Device, rng: &mut Rng) -> Checked {
    const JOBS: u64 = 4;
    const ADDS: u64 = 24;
    let context = Context::bind(device)?;
    let map = Mapping::small(WORDS * PAGE).doing("mmap")?;
    map.fill(0, map.bytes(), crate::memory::Pattern::ZERO);
    migrate(&context, &map, 0, map.bytes(), To::Device)?;
    let migrating = || {
        migrate(&context, &map, 0, map.bytes(), To::Device)?;
        std::thread::sleep(Duration::from_micros(300));
        migrate(&context, &map, 0, map.bytes() / 2, To::System).map(drop)
    };
    meanwhile(migrating, || {
        let tickets = (0..JOBS)
            .map(|job| {
                let add = Job::atomic_add(map.at(0), WORDS as u64, PAGE, 1);
                context.submit(add.queue((job % 2) as u32))
            })
            .collect::<Checked<Vec<_>>>()?;
        for _ in 0..ADDS {
            map.add(rng.index(WORDS) * PAGE, 1 << 32);
        }
        tickets.into_iter().try_for_each(|ticket| context.wait(ticket)?.ok().map(drop))
    })?;
    sums_are_right(&map, WORDS, JOBS, ADDS)
}

/// A word a page: the device has added 1 to each `jobs` times, the CPU 2^32 to some `adds` times in all, and nothing was lost.
pub(super) fn sums_are_right(map: &Mapping, words: usize, jobs: u64, adds: u64) -> Checked {
    let mut total = 0;
    for word in 0..words {
        let found = map.load(word * PAGE);
        require(found & 0xffff_ffff == jobs, || {
            format!("word {word} was added to {jobs} times by the device, and is {found:#x}")
        })?;
        total += found >> 32;
    }
    require(total == adds, || format!("the CPU has added {adds} times, and {total} are there"))
}

/// The device checks, the CPU reads, a third migrates: nobody may ever see anything but the pattern.
fn data(device: &dyn Device, rng: &mut Rng) -> Checked {
    let placed = Placed::new(device, rng)?;
    let part = |rng: &mut Rng| (rng.index(WINDOW / PAGE / 2) * PAGE, (1 + rng.index(16)) * PAGE);
    let (at, bytes) = part(rng);
    let migrating = || {
        migrate(&placed.context, &placed.map, 0, WINDOW, To::Device)?;
        migrate(&placed.context, &placed.map, at, bytes, To::System).map(drop)
    };
    meanwhile(migrating, || {
        for _ in 0..4 {
            let (at, bytes) = part(rng);
            let (from, to) = (placed.map.at(at), placed.pattern.from(at));
            let ticket = placed.context.submit(Job::check(from, bytes, to).queue(1))?;
            let page = rng.index(WINDOW / PAGE) * PAGE;
            placed.cpu_sees(page, PAGE)?;
            let done = placed.context.wait(ticket)?.ok()?;
            require(done.result == 0, || format!("the device saw {} words that differ", done.result))?;
        }
        Ok(())
    })
}

/// The CPU wants its pages back when there is hardly any memory left.
fn pressure(device: &dyn Device, rng: &mut Rng) -> Checked {
    /// What is left to the machine: enough to go on, too little to hand pages out at once.
    const LEFT: usize = 48 << 20;
    let placed = Placed::unmoved(device, rng, 8 * WINDOW)?;
    migrate(&placed.context, &placed.map, 0, 8 * WINDOW, To::Device)?;
    let info = std::fs::read_to_string("/proc/meminfo")
        .map_err(|error| Failure::Skip(format!("/proc/meminfo: {error}")))?;
    let available = info
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:")?.split_whitespace().next()?.parse::<usize>().ok())
        .ok_or_else(|| Failure::Skip("MemAvailable is not told".to_owned()))?
        << 10;
    let taken = available.saturating_sub(LEFT) / HUGE * HUGE;
    if taken == 0 || taken > 2 << 30 {
        return Err(Failure::Skip(format!("{} MiB are available", available >> 20)));
    }
    let hog = Mapping::huge(taken).doing("mmap")?;
    hog.touch(0, taken.min(HUGE));
    let compacting = || {
        // Free pages are gathered, and caches dropped (4: without a word each time), while the pages come back.
        let _ = std::fs::write("/proc/sys/vm/compact_memory", "1");
        let _ = std::fs::write("/proc/sys/vm/drop_caches", "5");
        Ok(())
    };
    meanwhile(compacting, || {
        for at in (0..taken).step_by(HUGE) {
            hog.store(at, 1);
        }
        placed.cpu_sees(0, 8 * WINDOW).doing("short of memory")
    })?;
    drop(hog);
    placed.device_sees(0, 8 * WINDOW)
}
