// SPDX-License-Identifier: MIT OR Apache-2.0
//! `mremap`: mapped memory moves to another address, with or without a mapping left behind, whole and in parts.

use super::super::Round;
use super::{Scene, known, some_pages};
use crate::client::Job;
use crate::device::Device;
use crate::memory::{HUGE, Mapping, PAGE, Pattern, WINDOW};
use crate::outcome::{Checked, Doing};
use crate::rng::Rng;

pub(super) fn round(round: &mut Round<'_, '_>) {
    let device = round.ground.device;
    for (kind, huge) in [("4k", false), ("thp", true)] {
        round.case(&format!("away-and-back/{kind}"), |rng| away_and_back(device, rng, huge));
        round.case(&format!("dontunmap/{kind}"), |rng| dontunmap(device, rng, huge));
    }
}

fn scene<'d>(device: &'d dyn Device, rng: &mut Rng, huge: bool) -> Checked<Scene<'d>> {
    let map = if huge { Mapping::huge(2 * HUGE) } else { Mapping::small(2 * WINDOW) };
    Scene::new(device, rng, map.doing("mmap")?)
}

/// A part goes away under a device at work, and comes back.
fn away_and_back(device: &dyn Device, rng: &mut Rng, huge: bool) -> Checked {
    let mut scene = scene(device, rng, huge)?;
    for _ in 0..4 {
        let (at, bytes) = some_pages(rng, scene.bytes());
        let away = Mapping::reserve(bytes, if huge { HUGE } else { PAGE }).doing("mmap")?;
        let load = scene.load(rng)?;
        scene.map.move_to(at, bytes, &away, 0).doing("mremap")?;
        for ticket in load.0 {
            scene.context.wait(ticket)?.ok_or_fault().doing("load")?;
        }
        scene.context.must_not_reach(&scene.map, at)?;
        scene.context.must_not_reach(&scene.map, at + bytes - PAGE)?;
        scene.context.check(&away, 0, bytes, scene.pattern.from(at)).doing("at the new address")?;
        // Written there, and found here.
        let new = super::some_pattern(rng);
        scene.context.fill(&away, 0, bytes, new).doing("at the new address")?;
        let busy = scene.context.submit(Job::random_read(away.at(0), bytes, 20_000, rng.next()))?;
        away.move_to(0, bytes, &scene.map, at).doing("mremap back")?;
        scene.context.wait(busy)?.ok_or_fault().doing("load")?;
        scene.context.must_not_reach(&away, 0)?;
        scene.context.check(&scene.map, at, bytes, new).doing("back again")?;
        scene.context.cpu_check(&scene.map, at, PAGE, new).doing("back again")?;
        scene.context.fill(&scene.map, at, bytes, scene.pattern.from(at))?;
        scene.agrees()?;
    }
    scene.hole(rng)
}

/// The pages go and the mapping stays: here are fresh zeros afterwards.
fn dontunmap(device: &dyn Device, rng: &mut Rng, huge: bool) -> Checked {
    let mut scene = scene(device, rng, huge)?;
    for _ in 0..4 {
        let (at, bytes) = some_pages(rng, scene.bytes());
        let away = Mapping::reserve(bytes, if huge { HUGE } else { PAGE }).doing("mmap")?;
        let load =
            scene.context.submit(Job::random_read(scene.map.at(0), scene.bytes(), 20_000, rng.next()))?;
        known(scene.map.move_pages_to(at, bytes, &away, 0), "MREMAP_DONTUNMAP")?;
        scene.context.wait(load)?.ok().doing("load")?;
        // The last first: what is read becomes a page, and hides what was forgotten beside it.
        for page in [at + bytes - PAGE, at] {
            scene.context.check(&scene.map, page, PAGE, Pattern::ZERO).doing("where pages moved away")?;
        }
        scene.context.check(&away, 0, bytes, scene.pattern.from(at)).doing("at the new address")?;
        scene.context.cpu_check(&away, bytes - PAGE, PAGE, scene.pattern.from(at + bytes - PAGE))?;
        scene.rewrite(rng)?;
    }
    scene.hole(rng)
}
