// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pages that are on the device when their mapping, their context or their process goes, or is copied.

use std::sync::Barrier;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::mman::MmapAdvise;
use nix::sys::signal::Signal;

use super::{Placed, Round, To, migrate, migrate_all};
use crate::client::{Context, Job};
use crate::device::Device;
use crate::kernel::pass_over;
use crate::memory::{Backing, Mapping, PAGE, Pattern, WINDOW};
use crate::outcome::{Checked, Doing, require};
use crate::process::{Child, exit_now};
use crate::rng::Rng;

const PAGES: usize = WINDOW / PAGE;
/// Accesses of a job that is still at work when something happens.
const LOAD: u64 = 30_000;

/// Processes that are killed while they migrate.
const KILLS: usize = 6;

/// Processes whose context goes while signals come.
const DISTURBED: usize = 4;
/// How often they come.
const SIGNALS: Duration = Duration::from_micros(100);

/// What is done to the memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Op {
    Munmap,
    Mremap,
    DontNeed,
}

pub(super) fn round(round: &mut Round<'_, '_>) {
    let device = round.ground.device;
    for (op, name) in [(Op::Munmap, "munmap"), (Op::Mremap, "mremap"), (Op::DontNeed, "dontneed")] {
        for (running, load) in [(false, "idle"), (true, "running")] {
            round.case(&format!("{name}/{load}"), |rng| change(device, rng, op, running));
        }
    }
    round.case("kill/migrating", |rng| killed_migrating(device, rng));
    round.case("fork/cpu", |rng| fork(device, rng, false));
    round.case("fork/device", |rng| fork(device, rng, true));
    round.case("fork/parent-closes", |rng| parent_closes(device, rng));
    round.case("close/touched", |rng| closed_and_touched(device, rng));
    round.case("unbind/under-signals", |rng| unbind_under_signals(device, rng));
    for (running, load) in [(false, "idle"), (true, "running")] {
        round.case(&format!("close/{load}"), |rng| close(device, rng, running));
        round.case(&format!("exit/{load}"), |rng| exit(device, rng, running));
        round.case(&format!("kill/{load}"), |rng| killed(device, rng, running));
    }
}

fn change(device: &dyn Device, rng: &mut Rng, op: Op, running: bool) -> Checked {
    let placed = Placed::new(device, rng)?;
    let (context, map) = (&placed.context, &placed.map);
    let (at, bytes) = (8 * PAGE, 16 * PAGE);
    let load = Job::random_read(map.at(0), WINDOW, LOAD, rng.next());
    let ticket = running.then(|| context.submit(load.queue(1))).transpose()?;
    let moved = match op {
        Op::Munmap => {
            map.unmap(at, bytes).doing("munmap")?;
            None
        }
        Op::Mremap => {
            let target = Mapping::reserve(bytes, PAGE).doing("mmap")?;
            map.move_to(at, bytes, &target, 0).doing("mremap")?;
            Some(target)
        }
        Op::DontNeed => {
            map.advise(at, bytes, MmapAdvise::MADV_DONTNEED).doing("madvise")?;
            None
        }
    };
    if let Some(ticket) = ticket {
        context.wait(ticket)?.ok_or_fault().doing("load")?;
    }
    let probe = at + rng.index(bytes / PAGE) * PAGE;
    match op {
        Op::DontNeed => context.check(map, at, bytes, Pattern::ZERO)?,
        _ => context.must_not_reach(map, probe)?,
    }
    if let Some(moved) = moved {
        context.check(&moved, 0, bytes, placed.pattern.from(at)).doing("at the new address")?;
        context.cpu_check(&moved, 0, bytes, placed.pattern.from(at)).doing("at the new address")?;
    }
    placed.device_sees(0, at)?;
    placed.device_sees(at + bytes, WINDOW - at - bytes)?;
    placed.cpu_sees(0, at)?;
    placed.cpu_sees(at + bytes, WINDOW - at - bytes)
}

/// Parent and child have the same pages on the device until one of them writes.
fn fork(device: &dyn Device, rng: &mut Rng, by_device: bool) -> Checked {
    let placed = Placed::new(device, rng)?;
    let old = placed.pattern;
    let new = Pattern { first: rng.next(), step: 11 };
    let done = Mapping::new(PAGE, PAGE, Backing::AnonymousShared).doing("mmap")?;
    let mut child = Child::spawn(|parent| {
        // A context of the child's own: the parent's mirrors the parent.
        let context = Context::bind(device)?;
        if by_device {
            context.check(&placed.map, 0, WINDOW / 2, old).doing("in the child")?;
            context.fill(&placed.map, 0, PAGE, new).doing("in the child")?;
        } else {
            context.cpu_check(&placed.map, 0, WINDOW / 2, old).doing("in the child")?;
            placed.map.fill(0, PAGE, new);
        }
        parent.ready(0);
        while done.load(0) == 0 {
            std::thread::yield_now();
        }
        context.check(&placed.map, 0, PAGE, new).doing("in the child, its own")?;
        context.check(&placed.map, PAGE, WINDOW - PAGE, old.from(PAGE)).doing("in the child, at the end")?;
        context.cpu_check(&placed.map, PAGE, WINDOW - PAGE, old.from(PAGE)).doing("in the child, at the end")
    })?;
    child.wait_ready()?;
    placed.device_sees(0, WINDOW).doing("in the parent")?;
    // What the parent writes is its own, on the device or not.
    let by_cpu = 4 * PAGE;
    placed.map.fill(0, by_cpu, new);
    placed.context.fill(&placed.map, by_cpu, WINDOW - by_cpu, new.from(by_cpu))?;
    done.store(0, 1);
    child.join()?;
    placed.context.check(&placed.map, 0, WINDOW, new)?;
    placed.context.cpu_check(&placed.map, 0, WINDOW, new)
}

/// The context whose pages they are goes, the child still has them mapped.
fn parent_closes(device: &dyn Device, rng: &mut Rng) -> Checked {
    let Placed { context, map, pattern } = Placed::new(device, rng)?;
    let done = Mapping::new(PAGE, PAGE, Backing::AnonymousShared).doing("mmap")?;
    let mut child = Child::spawn(|parent| {
        context.file().close();
        parent.ready(0);
        while done.load(0) == 0 {
            std::thread::yield_now();
        }
        require(map.differs(0, WINDOW, pattern).is_none(), || "the child's pages have changed".to_owned())
    })?;
    child.wait_ready()?;
    let handle = context.handle();
    context.file().close();
    done.store(0, 1);
    child.join()?;
    match map.differs(0, WINDOW, pattern) {
        None => Ok(()),
        Some((at, found)) => Err(crate::outcome::Failure::cpu(handle, map.at(at), pattern.word(at), found)),
    }
}

/// The context goes; the pages are the process's as before, and another context can have them.
fn close(device: &dyn Device, rng: &mut Rng, running: bool) -> Checked {
    let mut placed = Placed::new(device, rng)?;
    placed.rewrite(rng)?;
    let second = Context::bind(device)?;
    if running {
        // Only reads: what a write leaves that is cut off is nobody's business.
        let job = Job::random_read(placed.map.at(0), WINDOW, 100 * LOAD, rng.next());
        placed.context.submit(job.queue(1))?;
    } else {
        // The second context cannot map the first one's pages: they come back for it.
        second.check(&placed.map, 0, WINDOW / 4, placed.pattern)?;
    }
    placed.context.file().close();
    second.cpu_check(&placed.map, 0, WINDOW, placed.pattern)?;
    migrate_all(&second, &placed.map, 0, WINDOW, To::Device)?;
    second.check(&placed.map, 0, WINDOW, placed.pattern)
}

/// The context goes while its last pages are all on their way to a CPU each: they must be waited for.
fn closed_and_touched(device: &dyn Device, rng: &mut Rng) -> Checked {
    const TOUCHED: usize = 8;
    for _ in 0..16 {
        let placed = Placed::unmoved(device, rng, TOUCHED * PAGE)?;
        migrate_all(&placed.context, &placed.map, 0, TOUCHED * PAGE, To::Device)?;
        let pause = Duration::from_micros(rng.below(1_000));
        let barrier = Barrier::new(TOUCHED + 1);
        std::thread::scope(|scope| {
            for page in 0..TOUCHED {
                let (map, barrier) = (&placed.map, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    map.load(page * PAGE);
                });
            }
            barrier.wait();
            std::thread::sleep(pause);
            placed.context.file().close();
        });
        placed.cpu_sees(0, placed.map.bytes())?;
    }
    Ok(())
}

fn leave(device: &dyn Device, rng: &mut Rng, running: bool) -> Checked<Placed> {
    let placed = Placed::unmoved(device, rng, 4 * WINDOW)?;
    migrate(&placed.context, &placed.map, 0, 3 * WINDOW, To::Device)?;
    placed.device_sees(0, PAGES / 2 * PAGE)?;
    if running {
        placed.set_running(100 * LOAD, rng)?;
    }
    Ok(placed)
}

fn exit(device: &dyn Device, rng: &mut Rng, running: bool) -> Checked {
    let mut child = Child::spawn(|_| {
        let _placed = leave(device, rng, running)?;
        exit_now(0)
    })?;
    child.join()
}

fn killed(device: &dyn Device, rng: &mut Rng, running: bool) -> Checked {
    let mut child = Child::spawn(|parent| {
        let placed = leave(device, rng, running)?;
        parent.ready(0);
        // Faults back and forth until the end.
        loop {
            migrate(&placed.context, &placed.map, 0, WINDOW, To::Device)?;
            placed.map.load(0);
        }
    })?;
    child.wait_ready()?;
    child.signal(Signal::SIGKILL)?;
    child.join_killed(Signal::SIGKILL)
}

/// The context goes while signals with a handler come: its pages come home all the same.
fn unbind_under_signals(device: &dyn Device, rng: &mut Rng) -> Checked {
    for _ in 0..DISTURBED {
        let mut child = Child::spawn(|parent| {
            pass_over(Signal::SIGUSR1)?;
            let placed = Placed::new(device, rng)?;
            parent.ready(0);
            // The first of them come.
            std::thread::sleep(10 * SIGNALS);
            loop {
                match placed.context.file().unbind() {
                    Err(Errno::EINTR) => {}
                    other => break other.doing("unbind")?,
                }
            }
            placed.cpu_sees(0, WINDOW)
        })?;
        child.join_disturbed(Signal::SIGUSR1, SIGNALS)?;
    }
    Ok(())
}

/// Killed in the middle of migrations both ways, at some moment or other.
fn killed_migrating(device: &dyn Device, rng: &mut Rng) -> Checked {
    const BYTES: usize = 4 * WINDOW;
    for _ in 0..KILLS {
        let mut child = Child::spawn(|parent| {
            let placed = Placed::unmoved(device, rng, BYTES)?;
            // Once before it is killed: what cannot be migrated here is not tried.
            migrate(&placed.context, &placed.map, 0, BYTES, To::Device)?;
            parent.ready(0);
            loop {
                migrate(&placed.context, &placed.map, 0, BYTES, To::System)?;
                migrate(&placed.context, &placed.map, 0, BYTES, To::Device)?;
            }
        })?;
        child.wait_ready()?;
        std::thread::sleep(Duration::from_micros(rng.below(8_000)));
        child.signal(Signal::SIGKILL)?;
        child.join_killed(Signal::SIGKILL)?;
    }
    Ok(())
}
