// SPDX-License-Identifier: MIT OR Apache-2.0
//! A fault of the device, and a page that goes meanwhile.

use std::sync::Barrier;
use std::time::Duration;

use nix::sys::mman::MmapAdvise;

use super::Stage;
use crate::client::{Context, Job};
use crate::memory::{Mapping, PAGE, Pattern};
use crate::outcome::{Checked, Doing, Failure};

/// A thread of a cast, with its role. A thread that panicked has failed.
pub(super) fn join(thread: std::thread::ScopedJoinHandle<'_, Checked>) -> Checked {
    thread.join().unwrap_or_else(|_| Err(Failure::wrong("a thread of the cast panicked; see the console")))
}

/// Memory of which the device has nothing yet.
fn scene(stage: &Stage<'_>) -> Checked<(Context, Mapping)> {
    let context = Context::bind(stage.device)?;
    let map = Mapping::small(PAGE).doing("mmap")?;
    map.touch(0, PAGE);
    Ok((context, map))
}

/// The access that faults: a read, or a write in every other repetition.
fn access(stage: &Stage<'_>, map: &Mapping) -> Job {
    if stage.iteration % 2 == 0 {
        Job::strided_read(map.at(0), 1, 8)
    } else {
        Job::strided_write(map.at(0), 1, 8, stage.rng().next())
    }
}

/// What CPU and device see in the end: a page that came after what was dropped, and nothing of the one before.
fn judge(stage: &Stage<'_>, context: &Context, map: &Mapping) -> Checked {
    let mut rng = stage.rng();
    let new = Pattern { first: rng.next(), step: rng.next() | 1 };
    map.fill(0, PAGE, new);
    context.check(map, 0, PAGE, new).doing("written after the drop")?;
    let newer = Pattern { first: rng.next(), step: rng.next() | 1 };
    context.fill(map, 0, PAGE, newer)?;
    context.cpu_check(map, 0, PAGE, newer).doing("written by the device after the drop")
}

/// `fault-and-drop`: the device faults on a page, and while its handler has found the page, thread D drops it.
pub(super) fn and_drop(stage: &Stage<'_>) -> Checked {
    let (context, map) = scene(stage)?;
    // The handler holds the mmap lock at its gate: by then the thread must be all there.
    let ready = Barrier::new(2);
    std::thread::scope(|scope| {
        let drop = scope.spawn(|| {
            let named = stage.gates.role("D");
            ready.wait();
            named?;
            stage.gates.point("drop")?;
            map.advise(0, PAGE, MmapAdvise::MADV_DONTNEED).doing("madvise")?;
            stage.gates.point("dropped")
        });
        ready.wait();
        let done = context.run(access(stage, &map));
        join(drop)?;
        done?.ok().map(|_| ())
    })?;
    judge(stage, &context, &map)
}

/// `drop-and-fault`: thread D drops a page that the device has mapped, and in the middle of that the device faults on it.
pub(super) fn after_drop(stage: &Stage<'_>) -> Checked {
    let (context, map) = scene(stage)?;
    context.run(Job::strided_read(map.at(0), 1, 8))?.ok()?;
    std::thread::scope(|scope| {
        let drop = scope.spawn(|| {
            stage.gates.role("D")?;
            map.advise(0, PAGE, MmapAdvise::MADV_DONTNEED).doing("madvise")?;
            stage.gates.role("")
        });
        stage.gates.role("F")?;
        stage.gates.point("fault")?;
        let ticket = context.submit(access(stage, &map))?;
        // A handler that does not wait for the drop to end has mapped something by now.
        std::thread::sleep(Duration::from_millis(20));
        stage.gates.point("faulting")?;
        let done = context.wait(ticket);
        stage.gates.role("")?;
        join(drop)?;
        done?.ok().map(|_| ())
    })?;
    judge(stage, &context, &map)
}
