// SPDX-License-Identifier: MIT OR Apache-2.0
//! `release`: an address space ends in every way there is, with idle mappings and with engines running on them.
//!
//! Each case is a process that binds some contexts, lets the device read through each, and ends; the parent sees that it ends
//! in bounded time. What the device does meanwhile and afterwards is the oracle's to judge.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::mman::MmapAdvise;
use nix::sys::signal::{Signal, raise};
use nix::unistd::Pid;
use vgpu_spec::uapi;

use super::boundary::Narrow;
use super::{EXIT_ARGUMENT, Round};
use crate::client::{Context, Job};
use crate::device::Device;
use crate::exec;
use crate::kernel::only_in_a_guest;
use crate::memory::{Mapping, PAGE, Pattern, Prot, WINDOW};
use crate::outcome::{Checked, Doing, Failure, require};
use crate::process::{BOUND, Child, Pause, exit_now, reap_memory, undisturbed, wait_adopted};
use crate::rng::Rng;

/// Rounds in the default suite.
pub(super) const ROUNDS: u64 = 16;
/// Contexts of most processes.
const FEW: usize = 3;
/// Contexts of the process that has many. The device has 64 in all.
const MANY: usize = 12;
/// Accesses of a job that is meant to outlive its process.
pub(super) const LONG: u64 = 1 << 16;
/// Accesses of a job that somebody waits for while something happens to it.
pub(super) const MEDIUM: u64 = 1 << 15;
/// Microseconds within which engines take up what they are given.
const BEGUN: u64 = 1000;
/// Words that the device reads through each context, four to a page, to prove that it mirrors the process.
const READS: u64 = 1024;

/// A process's memory and the contexts on it.
pub(super) struct Occupied {
    pub(super) contexts: Vec<Context>,
    pub(super) map: Mapping,
}

impl Occupied {
    /// Binds contexts and lets each read a window of memory, whose sum the CPU knows.
    pub(super) fn new(device: &dyn Device, rng: &mut Rng, count: usize) -> Checked<Self> {
        let map = Mapping::small(WINDOW).doing("mmap")?;
        let contexts = (0..count).map(|_| Context::bind(device)).collect::<Checked<Vec<_>>>()?;
        let stride = WINDOW / READS as usize;
        let pattern = Pattern { first: rng.next(), step: rng.next() };
        let mut sum = 0_u64;
        for index in 0..READS as usize {
            map.store(index * stride, pattern.word(index * 8));
            sum = sum.wrapping_add(pattern.word(index * 8));
        }
        let occupied = Self { contexts, map };
        for context in &occupied.contexts {
            let done = context.run(Job::strided_read(occupied.map.at(0), READS, stride))?.ok()?;
            require(done.result == sum, || format!("the device should have summed {sum:#x}: {done}"))?;
        }
        Ok(occupied)
    }

    /// Sets both queues of every context to work on the memory, for long.
    pub(super) fn set_running(&self, rng: &mut Rng) -> Checked {
        for context in &self.contexts {
            let start = self.map.at(0);
            context.submit(Job::random_write(start, WINDOW, LONG, rng.next(), rng.next()))?;
            context.submit(Job::random_read(start, WINDOW, LONG, rng.next()).queue(1))?;
        }
        // What comes next is to meet them at work: on a busy host it would often be over before they have begun.
        std::thread::sleep(Duration::from_micros(rng.below(BEGUN)));
        Ok(())
    }

    /// Sets every context to work on memory that it must fault in page by page, and part of which it never may.
    fn set_faulting(&self, rng: &mut Rng) -> Checked<Mapping> {
        let fresh = Mapping::small(4 * WINDOW).doing("mmap")?;
        fresh.protect(WINDOW, PAGE, Prot::Read).doing("mprotect")?;
        for context in &self.contexts {
            context.submit(Job::random_write(fresh.at(0), 4 * WINDOW, LONG, rng.next(), 1))?;
            context.submit(Job::random_read(fresh.at(0), 4 * WINDOW, LONG, rng.next()).queue(1))?;
        }
        Ok(fresh)
    }
}

fn forever() -> ! {
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

/// One round.
pub(super) fn round(round: &mut Round<'_, '_>) {
    let device = round.ground.device;
    let program = round.program().to_owned();
    ends_itself(round, "exit/idle", FEW, |_, _| {
        std::process::exit(0);
    });
    ends_itself(round, "exit/running", FEW, |occupied, rng| {
        occupied.set_running(rng)?;
        exit_now(0)
    });
    ends_itself(round, "exit/thread", FEW, |occupied, rng| {
        occupied.set_running(rng)?;
        // exit_group while the first thread waits for a job.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(1));
                exit_now(0)
            });
            let ticket =
                occupied.contexts[0].submit(Job::random_read(occupied.map.at(0), WINDOW, LONG, 1))?;
            occupied.contexts[0].wait(ticket)?;
            forever()
        })
    });
    ends_itself(round, "exit/many-contexts", MANY, |occupied, rng| {
        if rng.once_in(2) {
            occupied.set_running(rng)?;
        }
        exit_now(0)
    });
    is_killed(round, "kill/idle", Signal::SIGKILL, |_, _| Ok(None));
    is_killed(round, "kill/running", Signal::SIGKILL, |occupied, rng| {
        occupied.set_running(rng)?;
        Ok(None)
    });
    is_killed(round, "kill/faulting", Signal::SIGKILL, |occupied, rng| occupied.set_faulting(rng).map(Some));
    if round.iteration % 4 == 0 {
        round.case("kill/changing", |rng| killed_changing(device, rng));
    }
    round.case("abort/running", |rng| {
        let mut child = Child::spawn(|_| {
            let occupied = Occupied::new(device, rng, FEW)?;
            occupied.set_running(rng)?;
            raise(Signal::SIGABRT).doing("raise")
        })?;
        child.join_killed(Signal::SIGABRT)
    });
    for (name, keep) in [("exec/closed", false), ("exec/kept", true)] {
        ends_itself(round, name, FEW, |occupied, rng| {
            for context in &occupied.contexts {
                context.file().keep_across_exec(keep).doing("fcntl")?;
            }
            occupied.set_running(rng)?;
            exec::replace(&program, EXIT_ARGUMENT)
        });
    }
    round.case("inherited", |rng| inherited(device, rng));
    round.case("kill/reaped", |rng| reaped(device, rng));
    // It takes a second; now and then will do.
    if round.iteration % 10 == 0 {
        round.case("kill/out-of-memory", |rng| out_of_memory(device, rng));
    }
}

/// A process that ends by itself, with status 0.
fn ends_itself(
    round: &mut Round<'_, '_>,
    name: &str,
    contexts: usize,
    end: impl FnOnce(&Occupied, &mut Rng) -> Checked,
) {
    let device = round.ground.device;
    round.case(name, |rng| {
        let mut child = Child::spawn(|_| end(&Occupied::new(device, rng, contexts)?, rng))?;
        child.join()
    });
}

/// A process that is killed by `signal` at a moment of chance.
fn is_killed(
    round: &mut Round<'_, '_>,
    name: &str,
    signal: Signal,
    work: impl FnOnce(&Occupied, &mut Rng) -> Checked<Option<Mapping>>,
) {
    let device = round.ground.device;
    round.case(name, |rng| {
        let delay = Duration::from_micros(rng.below(1500));
        let mut child = Child::spawn(|parent| {
            let occupied = Occupied::new(device, rng, FEW)?;
            let more = work(&occupied, rng)?;
            parent.ready(0);
            // Kept until the end, which comes from outside.
            let _kept = (occupied, more);
            forever()
        })?;
        child.wait_ready()?;
        std::thread::sleep(delay);
        child.signal(signal)?;
        child.join_killed(signal)
    });
}

/// Killed while it takes memory away from engines at work: a task that is about to die waits for the device like any other.
fn killed_changing(device: &dyn Device, rng: &mut Rng) -> Checked {
    let delay = Duration::from_micros(rng.below(1500));
    let mut child = Child::spawn(|parent| {
        let occupied = Occupied::new(device, rng, FEW)?;
        occupied.set_running(rng)?;
        parent.ready(0);
        loop {
            occupied.map.advise(0, WINDOW, MmapAdvise::MADV_DONTNEED).doing("madvise")?;
        }
    })?;
    child.wait_ready()?;
    std::thread::sleep(delay);
    child.signal(Signal::SIGKILL)?;
    child.join_killed(Signal::SIGKILL)
}

/// Killed, and its memory taken away by somebody else while its engines run: invalidations that must not sleep.
fn reaped(device: &dyn Device, rng: &mut Rng) -> Checked {
    only_in_a_guest()?;
    // Both on one CPU, so that the victim cannot end before its memory is taken.
    let before = sched_getaffinity(Pid::this()).doing("sched_getaffinity")?;
    let mut one = CpuSet::new();
    one.set(0).and_then(|()| sched_setaffinity(Pid::this(), &one)).doing("sched_setaffinity")?;
    let result = reaped_here(device, rng);
    sched_setaffinity(Pid::this(), &before).doing("sched_setaffinity")?;
    result
}

fn reaped_here(device: &dyn Device, rng: &mut Rng) -> Checked {
    let mut caught = 0;
    for _ in 0..3 {
        let mut child = Child::spawn(|parent| {
            let occupied = Occupied::new(device, rng, FEW)?;
            occupied.set_running(rng)?;
            let _more = occupied.set_faulting(rng)?;
            parent.ready(0);
            forever()
        })?;
        child.wait_ready()?;
        let result = undisturbed(|| child.signal(Signal::SIGKILL).map(|()| reap_memory(&child)))??;
        match result {
            // EAGAIN: the driver was busy and said so, as it may.
            Ok(()) | Err(Errno::EAGAIN) => caught += 1,
            // It was faster.
            Err(Errno::ESRCH) => {}
            Err(Errno::ENOSYS) => {
                return Err(Failure::Skip("this kernel has no process_mrelease".to_owned()));
            }
            Err(errno) => return Err(errno).doing("process_mrelease"),
        }
        child.join_killed(Signal::SIGKILL)?;
    }
    if caught > 0 {
        Ok(())
    } else {
        Err(Failure::Skip("every process was gone before its memory was taken".to_owned()))
    }
}

/// The device faults in more memory than its process may have, and the process is killed for it.
fn out_of_memory(device: &dyn Device, rng: &mut Rng) -> Checked {
    const LIMIT: usize = 4 << 20;
    only_in_a_guest()?;
    let narrow = Narrow::new(LIMIT)?;
    let mut child = Child::spawn(|_| {
        narrow.join()?;
        let occupied = Occupied::new(device, rng, FEW)?;
        occupied.set_running(rng)?;
        let much = Mapping::small(4 * LIMIT).doing("mmap")?;
        // Either the device's faults have the process killed, or they are refused and its own do it.
        let _ = occupied.contexts[0].run(Job::fill(much.at(0), much.bytes(), Pattern::ZERO));
        much.touch(0, much.bytes());
        Err(Failure::wrong("the process outlived its limit"))
    })?;
    child.join_killed(Signal::SIGKILL)
}

/// A child inherits the file; its parent, whose address space is mirrored, exits. The child must be refused, and its exit is
/// the last close.
fn inherited(device: &dyn Device, rng: &mut Rng) -> Checked {
    let mut child = Child::spawn(|parent| {
        let occupied = Occupied::new(device, rng, FEW)?;
        let own = Pid::this();
        let grandchild = Child::spawn(|_| {
            // Its parent will be gone when it has something to say.
            outlive(&occupied, own).inspect_err(|failure| parent.failed(failure))
        })?;
        // Only now, so that engines still run when the address space ends; the heir keeps the file open far beyond that.
        occupied.set_running(rng)?;
        parent.ready(grandchild.pid().as_raw() as u64);
        exit_now(0)
    })?;
    let grandchild = Pid::from_raw(child.wait_ready()? as i32);
    child.join()?;
    let ended = wait_adopted(grandchild);
    child.next_failure().map_or(ended, Err)
}

/// The heir's part: waits until its parent is gone, then tries to use what it has inherited.
fn outlive(occupied: &Occupied, parent: Pid) -> Checked {
    while nix::unistd::getppid() == parent {
        std::thread::sleep(Duration::from_micros(200));
    }
    for context in &occupied.contexts {
        let job = Job::strided_read(occupied.map.at(0), 1, 8);
        require(!context.accepts(job), || "a job for an address space that has ended was taken".to_owned())?;
        // Whoever serves a fault at that moment holds the address space, so its release may come a little later.
        let until = Instant::now() + BOUND;
        let mut pause = Pause::default();
        while context.file().query().doing("query")?.state == uapi::STATE_BOUND {
            require(Instant::now() < until, || "the context of an ended process stays bound".to_owned())?;
            pause.take();
        }
    }
    Ok(())
}
