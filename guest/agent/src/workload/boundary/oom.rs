// SPDX-License-Identifier: MIT OR Apache-2.0
//! `oom`: a process is killed for the memory it uses, and the reaper takes that while its device still runs.

use nix::sys::signal::Signal;

use super::super::Round;
use super::{Narrow, Scene, happened, same};
use crate::client::{Context, Job};
use crate::device::Device;
use crate::kernel::only_in_a_guest;
use crate::memory::{Mapping, Pattern, WINDOW};
use crate::outcome::{Checked, Doing, Failure};
use crate::process::{Child, exit_now};
use crate::rng::Rng;

/// What the victim's group may have.
const LIMIT: usize = 8 << 20;

pub(super) fn round(round: &mut Round<'_, '_>) {
    let device = round.ground.device;
    round.case("by-device", |rng| kill(device, rng, true));
    round.case("by-cpu", |rng| kill(device, rng, false));
    round.case("group", |rng| group(device, rng));
}

/// Uses more and more memory by device or CPU until it is killed for it.
fn grow(context: &Context, by_device: bool) -> Checked {
    let much = Mapping::small(4 * LIMIT).doing("mmap")?;
    for at in (0..much.bytes()).step_by(WINDOW) {
        if by_device {
            // Refused, where the fault is not served; then the CPU has to do it.
            let _ = context.run(Job::fill(much.at(at), WINDOW, Pattern::ZERO));
        } else {
            much.touch(at, WINDOW);
        }
    }
    much.touch(0, much.bytes());
    Err(Failure::wrong("the process outlived its group's limit"))
}

/// Somebody else's memory is untouched meanwhile.
fn kill(device: &dyn Device, rng: &mut Rng, by_device: bool) -> Checked {
    only_in_a_guest()?;
    let bystander = Scene::small(device, rng, 64)?;
    let narrow = Narrow::new(LIMIT)?;
    let mut child = Child::spawn(|parent| {
        narrow.join()?;
        let scene = Scene::small(device, rng, 64)?;
        let _load = scene.load(rng)?;
        let context = Context::bind(device)?;
        parent.ready(0);
        grow(&context, by_device)
    })?;
    child.wait_ready()?;
    bystander.under_load(rng, |_| child.join_killed(Signal::SIGKILL))?;
    happened(narrow.count("memory.events", "oom_kill")? > 0, "the group's counter tells of no kill")
}

/// A group that goes as a whole: a process with a device that has done nothing wrong goes with the other.
fn group(device: &dyn Device, rng: &mut Rng) -> Checked {
    only_in_a_guest()?;
    let narrow = Narrow::new(LIMIT)?;
    narrow.set("memory.oom.group", "1")?;
    let mut quiet = Child::spawn(|parent| {
        narrow.join()?;
        let scene = Scene::small(device, rng, 64)?;
        parent.ready(0);
        loop {
            // Until it is killed.
            let load = scene.load(rng)?;
            scene.end(load)?;
        }
    })?;
    quiet.wait_ready()?;
    let mut greedy = Child::spawn(|_| {
        narrow.join()?;
        grow(&Context::bind(device)?, false)?;
        exit_now(0)
    })?;
    greedy.join_killed(Signal::SIGKILL)?;
    quiet.join_killed(Signal::SIGKILL)?;
    same("groups killed as a whole", narrow.count("memory.events", "oom_group_kill")?.min(1), 1)
}
