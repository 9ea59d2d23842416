// SPDX-License-Identifier: MIT OR Apache-2.0
//! Processes that are more than one undisturbed thread: one under signals, and one whose first thread has gone.

use std::time::{Duration, Instant};

use nix::sys::mman::MmapAdvise;
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::pattern;
use crate::client::Context;
use crate::device::Device;
use crate::kernel::pass_over;
use crate::memory::{HUGE, Mapping, Pattern};
use crate::outcome::{Checked, Doing, require};
use crate::process::{BOUND, Child, Parent, exit_now, leave_thread};
use crate::rng::Rng;

/// How often a process is disturbed.
const EVERY: Duration = Duration::from_micros(500);
/// Jobs in that.
const JOBS: usize = 4;

/// Signals with a handler come in the middle of all waits. A job that was waited for has ended all the same: what it wrote is there.
pub(super) fn signalled(device: &dyn Device, rng: &mut Rng) -> Checked {
    let mut child = Child::spawn(|parent| {
        pass_over(Signal::SIGUSR1)?;
        let map = Mapping::small(HUGE).doing("mmap")?;
        let context = Context::bind(device)?;
        parent.ready(0);
        (0..JOBS).try_for_each(|_| {
            let pattern = pattern(rng);
            context.fill(&map, 0, HUGE, pattern)?;
            context.cpu_check(&map, 0, HUGE, pattern)
        })
    })?;
    child.join_disturbed(Signal::SIGUSR1, EVERY)
}

/// The first thread ends by itself while another goes on: the process lives, and has its memory, and its device's faults are served.
/// (The first thread has no `mm` any more, so a driver must not look for the address space there.)
pub(super) fn leaderless(device: &dyn Device, rng: &mut Rng) -> Checked {
    let mut child = Child::spawn(|parent| {
        let map = Mapping::small(HUGE).doing("mmap")?;
        let context = Context::bind(device)?;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let done = goes_on(&context, &map, rng);
                end(parent, done)
            });
            // Its stack stays: the process goes on.
            leave_thread()
        })
    })?;
    child.join()
}

fn end(parent: &Parent, done: Checked) -> ! {
    if let Err(failure) = &done {
        parent.failed(failure);
    }
    exit_now(i32::from(done.is_err()))
}

fn goes_on(context: &Context, map: &Mapping, rng: &mut Rng) -> Checked {
    let until = Instant::now() + BOUND;
    while !is_gone(Pid::this()) {
        require(Instant::now() < until, || "the first thread does not end".to_owned())?;
        std::thread::sleep(EVERY);
    }
    for _ in 0..2 {
        let pattern = pattern(rng);
        context.fill(map, 0, HUGE, pattern)?;
        context.cpu_check(map, 0, HUGE, pattern)?;
        map.advise(0, HUGE, MmapAdvise::MADV_DONTNEED).doing("madvise")?;
    }
    context.check(map, 0, HUGE, Pattern::ZERO)
}

/// Whether the process's first thread has ended, while others may go on.
fn is_gone(process: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    // Behind the name, which may have anything in it.
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z'))
}
