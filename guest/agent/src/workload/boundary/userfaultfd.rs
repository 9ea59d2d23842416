// SPDX-License-Identifier: MIT OR Apache-2.0
//! `userfaultfd`: pages that a thread of the process supplies, and pages that it protects from writing.
//!
//! hmm_range_fault() cannot wait for that thread, so a device's fault may be refused where the CPU's is served. What it must not
//! do is see something else than the thread supplies, or write to what it protects.

use super::super::Round;
use super::{Scene, some_pages, some_pattern};
use crate::client::{Context, Job};
use crate::device::Device;
use crate::memory::{Mapping, PAGE, Pattern};
use crate::outcome::{Checked, Doing, Failure};
use crate::rng::Rng;
use crate::uffd::{Mode, Server};
use vgpu_spec::job::JOB_OK;

const PAGES: usize = 32;

pub(super) fn round(round: &mut Round<'_, '_>) {
    let device = round.ground.device;
    round.case("missing", |rng| missing(device, rng));
    round.case("missing/dropped", |rng| dropped(device, rng));
    round.case("write-protect", |rng| protected(device, rng));
}

/// Runs `body` while the server serves.
fn while_served(server: &Server<'_>, body: impl FnOnce() -> Checked) -> Checked {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| server.run());
        let result = body();
        server.stop();
        let served = thread.join().unwrap_or_else(|_| Err(Failure::wrong("the serving thread panicked")));
        result.and(served)
    })
}

/// The device finds what the thread supplies, or is refused; after the CPU has had the page it finds it.
fn supplied(context: &Context, map: &Mapping, at: usize, pattern: Pattern) -> Checked {
    let done = context.run(Job::check(map.at(at), PAGE, pattern))?;
    if done.status == JOB_OK {
        return context.check(map, at, PAGE, pattern).and(if done.result == 0 {
            Ok(())
        } else {
            Err(Failure::device(context.handle(), done.address, pattern.first, 0)
                .at("the device found something else than the thread supplies"))
        });
    }
    done.faulted_at(map.at(at))?;
    context.cpu_check(map, at, PAGE, pattern)?;
    context.check(map, at, PAGE, pattern)
}

fn missing(device: &dyn Device, rng: &mut Rng) -> Checked {
    let map = Mapping::small(PAGES * PAGE).doing("mmap")?;
    let context = Context::bind(device)?;
    let pattern = some_pattern(rng);
    let server = Server::new(&map, Mode::Missing, pattern)?;
    while_served(&server, || {
        for _ in 0..PAGES {
            let at = rng.index(PAGES) * PAGE;
            supplied(&context, &map, at, pattern.from(at))?;
        }
        context.cpu_check(&map, 0, map.bytes(), pattern)?;
        context.check(&map, 0, map.bytes(), pattern)
    })?;
    drop(server);
    map.unmap(PAGE, PAGE).doing("munmap")?;
    context.must_not_reach(&map, PAGE)
}

/// What is dropped is supplied anew, and never zeros.
fn dropped(device: &dyn Device, rng: &mut Rng) -> Checked {
    let map = Mapping::small(PAGES * PAGE).doing("mmap")?;
    let context = Context::bind(device)?;
    let pattern = some_pattern(rng);
    let server = Server::new(&map, Mode::Missing, pattern)?;
    while_served(&server, || {
        context.cpu_check(&map, 0, map.bytes(), pattern)?;
        for _ in 0..6 {
            context.fill(&map, 0, map.bytes(), pattern)?;
            let (at, bytes) = some_pages(rng, map.bytes());
            let load =
                context.submit(Job::random_read(map.at(0), map.bytes(), 20_000, rng.next()).queue(1))?;
            map.advise(at, bytes, nix::sys::mman::MmapAdvise::MADV_DONTNEED).doing("madvise")?;
            context.wait(load)?.ok_or_fault().doing("load")?;
            supplied(&context, &map, at, pattern.from(at))?;
            supplied(&context, &map, at + bytes - PAGE, pattern.from(at + bytes - PAGE))?;
            context.cpu_check(&map, 0, map.bytes(), pattern)?;
        }
        Ok(())
    })
}

/// A page that is protected does not change unless the thread has let it.
fn protected(device: &dyn Device, rng: &mut Rng) -> Checked {
    let mut scene = Scene::small(device, rng, PAGES)?;
    {
        let server = Server::new(&scene.map, Mode::WriteProtect, Pattern::ZERO)?;
        while_served(&server, || {
            for _ in 0..6 {
                let (at, bytes) = some_pages(rng, scene.bytes());
                let load = scene.context.submit(Job::random_read(
                    scene.map.at(0),
                    scene.bytes(),
                    20_000,
                    rng.next(),
                ))?;
                server.protect(at, bytes, true)?;
                scene.context.wait(load)?.ok().doing("load")?;
                scene.context.check(&scene.map, at, bytes, scene.pattern.from(at)).doing("protected")?;
                let page = at + rng.index(bytes / PAGE) * PAGE;
                let written = Pattern { first: rng.next(), step: 1 };
                let served = server.has_served(page);
                let done = scene.context.run(Job::fill(scene.map.at(page), PAGE, written))?;
                if done.status == JOB_OK {
                    if !served && !server.has_served(page) {
                        return Err(Failure::reached(
                            scene.context.handle(),
                            scene.map.at(page),
                            "the device wrote to a page that userfaultfd protects".to_owned(),
                        ));
                    }
                    scene.context.cpu_check(&scene.map, page, PAGE, written).doing("written by leave")?;
                } else {
                    done.faulted_at(scene.map.at(page))?;
                    let before = scene.pattern.from(page);
                    scene.context.cpu_check(&scene.map, page, PAGE, before).doing("refused")?;
                }
                server.protect(0, scene.bytes(), false)?;
                scene.context.fill(&scene.map, 0, scene.bytes(), scene.pattern)?;
                scene.agrees()?;
            }
            Ok(())
        })?;
    }
    scene.hole(rng)
}
