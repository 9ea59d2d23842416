// SPDX-License-Identifier: MIT OR Apache-2.0
//! `memory-failure`: a frame is broken, or is given up before it breaks.

use nix::errno::Errno;
use nix::sys::signal::Signal;

use super::super::Round;
use super::{Scene, happened, known};
use crate::device::Device;
use crate::kernel::{only_in_a_guest, pass_over};
use crate::memory::{Backing, HUGE, Mapping, PAGE, WINDOW, advice};
use crate::outcome::{Checked, Doing};
use crate::process::Child;
use crate::rng::Rng;

pub(super) fn round(round: &mut Round<'_, '_>) {
    let device = round.ground.device;
    round.case("poison/4k", |rng| poison(device, rng, false));
    round.case("poison/thp", |rng| poison(device, rng, true));
    round.case("soft-offline/4k", |rng| soft_offline(device, rng, Mapping::small(WINDOW).doing("mmap")?));
    round.case("soft-offline/thp", |rng| soft_offline(device, rng, Mapping::huge(HUGE).doing("mmap")?));
}

/// A page is gone for good: nobody reaches it, and its neighbours are as before.
fn poison(device: &dyn Device, rng: &mut Rng, huge: bool) -> Checked {
    only_in_a_guest()?;
    // In a process of its own, should the signal be its end.
    let mut child = Child::spawn(|_| {
        pass_over(Signal::SIGBUS)?;
        let map = if huge { Mapping::huge(HUGE) } else { Mapping::small(WINDOW) }.doing("mmap")?;
        let scene = Scene::new(device, rng, map)?;
        let pages = scene.bytes() / PAGE;
        let broken = rng.index(pages) * PAGE;
        let load = scene.load(rng)?;
        let result = scene.map.advise_by_number(broken, PAGE, advice::HWPOISON);
        for ticket in load.0 {
            // What comes to the page afterwards is stopped there.
            scene.context.wait(ticket)?.ok_or_fault().doing("load")?;
        }
        match result {
            // Somebody held the page at that moment.
            Err(Errno::EBUSY) => return Err(crate::outcome::Failure::Skip("the page was busy".to_owned())),
            other => known(other, "MADV_HWPOISON")?,
        }
        scene.context.must_not_reach(&scene.map, broken).doing("the broken page")?;
        for (at, end) in [(0, broken), (broken + PAGE, scene.bytes())] {
            if at < end {
                scene.context.check(&scene.map, at, end - at, scene.pattern.from(at)).doing("beside it")?;
                scene.context.cpu_check(&scene.map, at, PAGE, scene.pattern.from(at)).doing("beside it")?;
            }
        }
        scene.map.unmap(broken, PAGE).doing("munmap")?;
        scene.map.refill(broken, PAGE, Backing::Anonymous).doing("mmap in its place")?;
        scene.context.fill(&scene.map, broken, PAGE, scene.pattern.from(broken))?;
        scene.agrees().doing("with another page in its place")
    })?;
    child.join()
}

/// Contents move to another frame, under a device at work.
fn soft_offline(device: &dyn Device, rng: &mut Rng, map: Mapping) -> Checked {
    only_in_a_guest()?;
    let mut scene = Scene::new(device, rng, map)?;
    let mut moved = false;
    for _ in 0..4 {
        let at = rng.index(scene.bytes() / PAGE) * PAGE;
        scene.under_load(rng, |_| match scene.map.advise_by_number(at, PAGE, advice::SOFT_OFFLINE) {
            // It could not be isolated at this moment.
            Err(Errno::EBUSY | Errno::EAGAIN | Errno::EIO) => Ok(()),
            other => {
                known(other, "MADV_SOFT_OFFLINE")?;
                moved = true;
                Ok(())
            }
        })?;
        scene.rewrite(rng)?;
    }
    scene.hole(rng)?;
    happened(moved, "no page could be given up")
}
