// SPDX-License-Identifier: MIT OR Apache-2.0
//! `khugepaged`: small pages become large ones under the device, by the kernel's thread and by MADV_COLLAPSE, and are split again.

use std::path::Path;
use std::time::Duration;

use super::super::Round;
use super::{Scene, grew, happened, known, some_pages};
use crate::client::Context;
use crate::device::Device;
use crate::kernel::{Settings, only_in_a_guest, read, vmstat, within};
use crate::memory::{Backing, HUGE, Mapping, PAGE, Pattern, advice};
use crate::outcome::{Checked, Doing, Failure};
use crate::rng::Rng;
use nix::sys::mman::MmapAdvise;

const THP: &str = "/sys/kernel/mm/transparent_hugepage";

pub(super) fn round(round: &mut Round<'_, '_>) {
    let device = round.ground.device;
    round.case("thread", |rng| by_thread(device, rng, None));
    // From 7.x on khugepaged also makes pages that are larger than small and smaller than huge, where these are allowed.
    for size in ["hugepages-64kB", "hugepages-512kB"] {
        round.case(&format!("thread/{size}"), |rng| by_thread(device, rng, Some(size)));
    }
    round.case("collapse", |rng| collapse(device, rng, false));
    round.case("collapse/shared", |rng| collapse(device, rng, true));
}

/// Has khugepaged look at everything every so many milliseconds, and make pages of this size, or huge ones.
pub(in crate::workload) fn eager(settings: &mut Settings, pause_ms: u64, size: Option<&str>) -> Checked {
    let tunable = |name: &str| Path::new(THP).join("khugepaged").join(name);
    settings.set(tunable("scan_sleep_millisecs"), &pause_ms.to_string())?;
    settings.set(tunable("alloc_sleep_millisecs"), "0")?;
    settings.set(tunable("pages_to_scan"), "65536")?;
    if let Some(size) = size {
        settings.set(Path::new(THP).join(size).join("enabled"), "always")?;
        settings.set(Path::new(THP).join("hugepages-2048kB/enabled"), "never")?;
        settings.set(tunable("max_ptes_none"), "0")?;
    }
    Ok(())
}

/// Small pages that khugepaged is allowed, and sooner or later does, make large.
fn by_thread(device: &dyn Device, rng: &mut Rng, size: Option<&str>) -> Checked {
    only_in_a_guest()?;
    let mut settings = Settings::default();
    eager(&mut settings, 0, size)?;
    let mut scene = Scene::new(device, rng, Mapping::new(2 * HUGE, HUGE, Backing::Anonymous).doing("mmap")?)?;
    // Made of small pages before it may be of large ones.
    let before = collapsed();
    scene.map.advise(0, 2 * HUGE, MmapAdvise::MADV_HUGEPAGE).doing("madvise")?;
    let mut seen = false;
    for _ in 0..8 {
        scene.under_load(rng, |_| {
            seen = seen || within(Duration::from_millis(200), || Ok(collapsed() > before))?;
            Ok(())
        })?;
        if seen {
            break;
        }
    }
    // A large page is split where a part of it changes.
    let (at, bytes) = some_pages(rng, HUGE);
    scene.read_only(at, bytes)?;
    scene.agrees().doing("after the split")?;
    scene.rewrite(rng)?;
    scene.hole(rng)?;
    happened(seen, "khugepaged made no page large")
}

/// Huge pages that were made of small ones, and those in between where the kernel counts them.
pub(in crate::workload) fn collapsed() -> u64 {
    let sizes = std::fs::read_dir(THP).into_iter().flatten().flatten();
    let count = |dir: std::path::PathBuf| {
        // The counters of 7.x for each size.
        ["collapse_alloc", "collapse"]
            .iter()
            .find_map(|name| read(dir.join("stats").join(name)).ok()?.parse::<u64>().ok())
    };
    vmstat("thp_collapse_alloc") + sizes.filter_map(|entry| count(entry.path())).sum::<u64>()
}

/// At once, by advice, of anonymous and of shared memory.
fn collapse(device: &dyn Device, rng: &mut Rng, shared: bool) -> Checked {
    let backing = if shared { Backing::AnonymousShared } else { Backing::Anonymous };
    let map = Mapping::new(2 * HUGE, HUGE, backing).doing("mmap")?;
    let mut scene = Scene::new(device, rng, map)?;
    let before = vmstat("thp_collapse_alloc");
    for _ in 0..4 {
        let half = rng.index(2) * HUGE;
        scene.under_load(rng, |_| match scene.map.advise_by_number(half, HUGE, advice::COLLAPSE) {
            // No such page to be had, or somebody holds one of the small ones at this moment.
            Err(nix::errno::Errno::ENOMEM | nix::errno::Errno::EAGAIN | nix::errno::Errno::EBUSY) => Ok(()),
            other => known(other, "MADV_COLLAPSE"),
        })?;
        let (at, bytes) = some_pages(rng, HUGE);
        scene.read_only(half + at, bytes)?;
    }
    scene.rewrite(rng)?;
    if !shared {
        scene.hole(rng)?;
    }
    zero_filled(&scene.context, rng)?;
    happened(grew("thp_collapse_alloc", before), "MADV_COLLAPSE made no page huge")
}

/// Of a range with few pages present, the others are zeros afterwards, not what lay there before.
fn zero_filled(context: &Context, rng: &mut Rng) -> Checked {
    let map = Mapping::new(HUGE, HUGE, Backing::Anonymous).doing("mmap")?;
    let page = rng.index(HUGE / PAGE) * PAGE;
    map.store(page, 0);
    match map.advise_by_number(0, HUGE, advice::COLLAPSE) {
        Ok(()) => {}
        Err(errno) => return Err(Failure::Skip(format!("MADV_COLLAPSE of a sparse range: {errno}"))),
    }
    context.check(&map, 0, HUGE, Pattern::ZERO).doing("a sparse range that was made huge")
}
