// SPDX-License-Identifier: MIT OR Apache-2.0
//! `hugetlb`: memory of the pool of huge pages, private and shared: its copy on write, its holes, its moves.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::MmapAdvise;
use nix::unistd::ftruncate;

use super::super::Round;
use super::{Scene, some_pattern};
use crate::client::Context;
use crate::device::Device;
use crate::kernel::{Settings, only_in_a_guest, read};
use crate::memory::{Backing, HUGE, Mapping, PAGE, Pattern};
use crate::outcome::{Checked, Doing, Failure};
use crate::process::Child;
use crate::rng::Rng;

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
/// Huge pages of a case: the mapping's, and copies of them.
const PAGES: usize = 3;

pub(super) fn round(round: &mut Round<'_, '_>) {
    let device = round.ground.device;
    round.case("private", |rng| with_pool(|| private(device, rng)));
    round.case("shared", |rng| with_pool(|| shared(device, rng)));
    round.case("fork", |rng| with_pool(|| fork(device, rng)));
}

/// Does something while the pool has pages.
fn with_pool(body: impl FnOnce() -> Checked) -> Checked {
    only_in_a_guest()?;
    let mut settings = Settings::default();
    let pool = Path::new(POOL);
    settings.set(pool.join("nr_hugepages"), &(2 * PAGES).to_string())?;
    let free = read(pool.join("free_hugepages"))?;
    if free.parse::<usize>().unwrap_or(0) < 2 * PAGES {
        return Err(Failure::Skip(format!("memory is too scattered: {free} of {} huge pages", 2 * PAGES)));
    }
    let result = body();
    drop(settings);
    result
}

/// The device is the first to touch pages of the pool, in their middle.
pub(in super::super) fn first_touch(device: &dyn Device, rng: &mut Rng) -> Checked {
    with_pool(|| {
        let map = Mapping::new(PAGES * HUGE, HUGE, Backing::HugePool).doing("mmap")?;
        let context = Context::bind(device)?;
        (0..PAGES).try_for_each(|page| {
            let (at, pattern) = (page * HUGE + (1 + rng.index(HUGE / PAGE - 1)) * PAGE, some_pattern(rng));
            context.fill(&map, at, PAGE, pattern)?;
            context.cpu_check(&map, at, PAGE, pattern)?;
            context.check(&map, page * HUGE, PAGE, Pattern::ZERO)
        })
    })
}

fn private(device: &dyn Device, rng: &mut Rng) -> Checked {
    let map = Mapping::new(PAGES * HUGE, HUGE, Backing::HugePool).doing("mmap")?;
    let mut scene = Scene::new(device, rng, map)?;
    for _ in 0..3 {
        let page = rng.index(PAGES) * HUGE;
        scene.under_load(rng, |_| Ok(()))?;
        scene.read_only(page, HUGE)?;
        // Dropped under the device's hands: zeros. (Reading cannot bring back what was there.)
        let load = scene.context.submit(crate::client::Job::random_read(
            scene.map.at(0),
            scene.bytes(),
            20_000,
            rng.next(),
        ))?;
        scene.map.advise(page, HUGE, MmapAdvise::MADV_DONTNEED).doing("madvise")?;
        scene.context.wait(load)?.ok().doing("load")?;
        scene.context.check(&scene.map, page, HUGE, Pattern::ZERO).doing("dropped")?;
        scene.rewrite(rng)?;
    }
    let page = rng.index(PAGES) * HUGE;
    scene.map.unmap(page, HUGE).doing("munmap")?;
    scene.context.must_not_reach(&scene.map, page + rng.index(HUGE / PAGE) * PAGE).doing("a hole")
}

fn file(pages: usize) -> Checked<OwnedFd> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    let file = memfd_create(c"testbench-huge", flags).doing("memfd_create")?;
    ftruncate(&file, (pages * HUGE) as i64).doing("ftruncate")?;
    Ok(file)
}

fn shared(device: &dyn Device, rng: &mut Rng) -> Checked {
    let file = file(PAGES)?;
    let map = Mapping::new(PAGES * HUGE, HUGE, Backing::FileShared(file.as_fd(), 0)).doing("mmap")?;
    let mut scene = Scene::new(device, rng, map)?;
    for _ in 0..3 {
        scene.under_load(rng, |_| Ok(()))?;
        let page = rng.index(PAGES) * HUGE;
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&file, mode, page as i64, HUGE as i64).doing("fallocate")?;
        scene.context.check(&scene.map, page, HUGE, Pattern::ZERO).doing("punched")?;
        scene.rewrite(rng)?;
        // Another mapping of the file has what the device wrote.
        let other = Mapping::new(PAGES * HUGE, HUGE, Backing::FileShared(file.as_fd(), 0)).doing("mmap")?;
        scene.context.cpu_check(&other, page, PAGE, scene.pattern.from(page)).doing("another mapping")?;
        scene.context.check(&other, page, HUGE, scene.pattern.from(page)).doing("another mapping")?;
    }
    ftruncate(&file, ((PAGES - 1) * HUGE) as i64).doing("ftruncate")?;
    scene.context.must_not_reach(&scene.map, (PAGES - 1) * HUGE).doing("beyond the end")
}

/// A child keeps the old data, whoever writes in the parent.
fn fork(device: &dyn Device, rng: &mut Rng) -> Checked {
    let map = Mapping::new(HUGE, HUGE, Backing::HugePool).doing("mmap")?;
    let scene = Scene::new(device, rng, map)?;
    let written = Mapping::new(PAGE, PAGE, Backing::AnonymousShared).doing("mmap")?;
    let mut child = Child::spawn(|parent| {
        parent.ready(0);
        let until = std::time::Instant::now() + crate::process::BOUND;
        while written.load(0) == 0 && std::time::Instant::now() < until {
            std::thread::sleep(std::time::Duration::from_micros(500));
        }
        scene.cpu_agrees().doing("in the child")
    })?;
    child.wait_ready()?;
    scene.context.check(&scene.map, 0, HUGE, scene.pattern).doing("after the fork")?;
    let new = some_pattern(rng);
    scene.context.fill(&scene.map, 0, HUGE, new).doing("after the fork")?;
    scene.context.cpu_check(&scene.map, 0, PAGE, new).doing("after the fork")?;
    written.store(0, 1);
    child.join()
}
