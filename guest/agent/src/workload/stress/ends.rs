// SPDX-License-Identifier: MIT OR Apache-2.0
//! Rounds in which data are lost by design, each in a process of its own: frames break, or the process is killed for its memory
//! in the middle of it all.

use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::Signal;

use super::Stage;
use super::slot::{Mix, Slot};
use crate::client::{Context, Job};
use crate::device::Device;
use crate::kernel::{only_in_a_guest, pass_over};
use crate::memory::{Mapping, PAGE, Pattern, WINDOW, advice};
use crate::outcome::{Checked, Doing, Failure, require};
use crate::process::{Child, exit_now};
use crate::rng::Rng;
use crate::workload::boundary::Narrow;

/// What a group of slots may have besides its arena until one of it is killed.
const ROOM: usize = 12 << 20;

/// A round in which frames break under the slots.
pub(super) fn poison(device: &dyn Device, rng: &dyn Fn(&str) -> Rng) -> Checked<String> {
    only_in_a_guest()?;
    let page = Mapping::small(PAGE).doing("mmap")?;
    match page.advise_by_number(0, 0, advice::HWPOISON) {
        Err(Errno::EINVAL) => {
            return Err(Failure::Skip("this kernel does not have MADV_HWPOISON".to_owned()));
        }
        other => other.doing("MADV_HWPOISON of nothing")?,
    }
    let mut child = Child::spawn(|_| {
        // Whoever meets a broken frame is sent it, and there is nothing to be done.
        pass_over(Signal::SIGBUS)?;
        let mut stage = Stage::new(device, Mix { all: true, poison: true, ..Mix::default() })?;
        stage.run(None, rng).into_iter().try_for_each(|(name, result)| result.doing(&name))
    })?;
    let ended = child.wait_long()?;
    child.judge(ended)?;
    Ok("frames broke".to_owned())
}

/// A round that ends by the OOM killer, whose reaper comes while the device works. Until then everything is as the models say.
pub(super) fn oom(device: &dyn Device, rng: &dyn Fn(&str) -> Rng) -> Checked<String> {
    only_in_a_guest()?;
    let narrow = Narrow::new(super::arena_bytes() + ROOM)?;
    let mut child = Child::spawn(|parent| {
        let mut chance = rng("oom");
        let stage = Stage::new(device, Mix { doomed: true, ..Mix::default() })?;
        narrow.join()?;
        let much = Mapping::small(4 * (super::arena_bytes() + ROOM)).doing("mmap")?;
        let context = Context::bind(device)?;
        let by_device = chance.once_in(2);
        let delay = Duration::from_millis(20 + chance.below(200));
        std::thread::scope(|scope| {
            for index in 0..stage.workers {
                let mut slot = Slot::new(stage.tools(), index, rng(&format!("slot-{index}")));
                let parent = &parent;
                scope.spawn(move || {
                    // For as long as it lives.
                    let failure = match slot.work(usize::MAX) {
                        Err(failure) => failure,
                        Ok(()) => Failure::wrong("the slot came to its end"),
                    };
                    parent.failed(&failure.at(&format!("slot-{index}")));
                    exit_now(1);
                });
            }
            std::thread::sleep(delay);
            for at in (0..much.bytes()).step_by(WINDOW) {
                if by_device {
                    // Refused, where no memory is to be had for it; then the CPU has to do it.
                    let _ = context.run(Job::fill(much.at(at), WINDOW, Pattern::ZERO));
                }
                much.touch(at, WINDOW);
            }
            parent.failed(&Failure::wrong("the process outlived its group's limit"));
            exit_now(1)
        })
    })?;
    child.join_killed(Signal::SIGKILL)?;
    if let Some(failure) = child.next_failure() {
        return Err(failure.at("before the kill"));
    }
    let kills = narrow.count("memory.events", "oom_kill")?;
    require(kills > 0, || "the process was killed, and its group's counter tells of no kill".to_owned())?;
    Ok(format!("{kills} killed"))
}
