// SPDX-License-Identifier: MIT OR Apache-2.0
//! A process that is killed in the middle of something: of a fault, of an unregister.

use nix::errno::Errno;
use nix::sys::signal::Signal;
use vgpu_spec::uapi::{Act, act as op};

use super::super::{Stage, fault::join};
use super::{act, bind, layer, mirror, open};
use crate::client::Job;
use crate::memory::{Mapping, PAGE};
use crate::outcome::{Checked, Doing, Failure, require};
use crate::process::{Child, Pause, reap_memory};

/// `range-unheld`: a process is killed while the driver looks at its memory for a fault, and the driver has let the process's
/// users go too early. The parent comes to `user:kill`, and to `user:killed` when the process has ended.
pub(crate) fn range_unheld(stage: &Stage<'_>) -> Checked {
    range(stage, true)
}

/// `range-held`: the same, and the driver holds them.
pub(crate) fn range_held(stage: &Stage<'_>) -> Checked {
    range(stage, false)
}

fn range(stage: &Stage<'_>, unheld: bool) -> Checked {
    let files = open(stage, 1)?;
    layer(&*files[0])?;
    let mut child = Child::spawn(|parent| {
        // The gate stands in the way of every fault: there is none before the one that is meant.
        let contexts = bind(stage, &files)?;
        let context = &contexts[0];
        if unheld {
            act(context.file(), Act { op: op::RANGE_UNHELD, ..Act::default() })?;
        }
        let fresh = Mapping::small(PAGE).doing("mmap")?;
        fresh.touch(0, PAGE);
        parent.ready(0);
        stage.gates.point("fault")?;
        let ticket = context.submit(Job::strided_read(fresh.at(0), 1, 8))?;
        context.wait(ticket)?;
        loop {
            std::thread::sleep(std::time::Duration::from_secs(60));
        }
    })?;
    child.wait_ready()?;
    stage.gates.role("K")?;
    stage.gates.point("kill")?;
    child.signal(Signal::SIGKILL)?;
    // The file is this process's too: its end does not wait for the driver's worker.
    child.join_killed(Signal::SIGKILL)?;
    stage.gates.point("killed")?;
    stage.gates.role("")
}

/// `reclaim`: T, a thread of a process, unregisters one of its mirrors, and the process is killed meanwhile; K takes its memory
/// away as the OOM reaper does. K comes to `user:kill`, `user:reaped` and, when all of it is gone, `user:over`.
pub(crate) fn reclaim(stage: &Stage<'_>) -> Checked {
    let files = open(stage, 2)?;
    let mut child = Child::spawn(|parent| {
        let (contexts, _map) = mirror(stage, &files)?;
        let memory = Mapping::small(16 * PAGE).doing("mmap")?;
        memory.touch(0, 16 * PAGE);
        contexts[1].run(Job::strided_read(memory.at(0), 16, PAGE))?.ok()?;
        parent.ready(0);
        std::thread::scope(|scope| {
            let unregister = scope.spawn(|| {
                stage.gates.role("T")?;
                stage.gates.point("unregister")?;
                contexts[0].file().unbind().doing("unbind")
            });
            join(unregister)?;
            loop {
                std::thread::sleep(std::time::Duration::from_secs(60));
            }
        })
    })?;
    child.wait_ready()?;
    stage.gates.role("K")?;
    stage.gates.point("kill")?;
    let before = layer(&*files[0])?;
    child.signal(Signal::SIGKILL)?;
    let first = reap_memory(&child);
    let refused = layer(&*files[0])?.refused - before.refused;
    stage.gates.point("reaped")?;
    judge_reaped(first, refused)?;
    // It is tried again until there is nothing left to take.
    let mut pause = Pause::default();
    while reap_memory(&child) == Err(Errno::EAGAIN) {
        pause.take();
    }
    child.join_killed(Signal::SIGKILL)?;
    stage.gates.point("over")?;
    stage.gates.role("")
}

/// A refusal is told to the reaper, and nothing else is.
fn judge_reaped(result: Result<(), Errno>, refused: u64) -> Checked {
    match result {
        Ok(()) => require(refused == 0, || {
            format!("the layer refused {refused} invalidations, and the kernel was not told")
        }),
        Err(Errno::EAGAIN) => require(refused > 0, || {
            "the kernel was refused an invalidation, and the layer has refused none".to_owned()
        }),
        // The process has ended first.
        Err(Errno::ESRCH) => Ok(()),
        Err(errno) => Err(Failure::wrong(format!("process_mrelease: {}", errno.desc()))),
    }
}
