// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ksm`: pages that are alike become one page that nobody may write, and part again where one is written.

use std::path::Path;
use std::time::Duration;

use nix::sys::mman::MmapAdvise;

use super::super::Round;
use super::happened;
use crate::client::{Context, Job};
use crate::device::{Device, Stable};
use crate::kernel::{Settings, only_in_a_guest, read, within};
use crate::memory::{Mapping, PAGE, Pattern};
use crate::outcome::{Checked, Doing};
use crate::rng::Rng;

const KSM: &str = "/sys/kernel/mm/ksm";
const PAGES: usize = 64;

pub(super) fn round(round: &mut Round<'_, '_>) {
    let device = round.ground.device;
    round.case("merge", |rng| merge(device, rng, false));
    // The shared zero page in place of pages of zeros.
    round.case("merge/zeros", |rng| merge(device, rng, true));
}

/// Switches ksmd on, with so many milliseconds between two looks; pages of zeros become the zero page if so wished.
pub(in crate::workload) fn eager(settings: &mut Settings, pause_ms: u64, zeros: bool) -> Checked {
    let tunable = |name: &str| Path::new(KSM).join(name);
    settings.set(tunable("pages_to_scan"), "10000")?;
    settings.set(tunable("sleep_millisecs"), &pause_ms.to_string())?;
    if zeros {
        settings.set(tunable("use_zero_pages"), "1")?;
    }
    if tunable("smart_scan").exists() {
        // It would leave pages out that did not merge at once.
        settings.set(tunable("smart_scan"), "0")?;
    }
    settings.set(tunable("run"), "1")
}

fn merge(device: &dyn Device, rng: &mut Rng, zeros: bool) -> Checked {
    only_in_a_guest()?;
    let mut settings = Settings::default();
    eager(&mut settings, 5, zeros)?;

    let map = Mapping::small(PAGES * PAGE).doing("mmap")?;
    let context = Context::bind(device)?;
    // Every page alike.
    let pattern = if zeros { Pattern::ZERO } else { Pattern { first: rng.next(), step: 0 } };
    let all = PAGES * PAGE;
    context.fill(&map, 0, all, pattern)?;
    map.advise(0, all, MmapAdvise::MADV_MERGEABLE).doing("MADV_MERGEABLE")?;
    let mut seen = false;
    for _ in 0..4 {
        let stable = Stable::declare(device, &map, 0, all)?;
        let load = context.submit(Job::random_read(map.at(0), all, 20_000, rng.next()).queue(1))?;
        // Writes what is there already, and parts what has just been merged.
        let write = context.submit(Job::fill(map.at(0), all, pattern))?;
        context.wait(write)?.ok().doing("load")?;
        context.wait(load)?.ok().doing("load")?;
        seen |= within(Duration::from_secs(1), || Ok(shared()? > 0))?;
        context.check(&map, 0, all, pattern).doing("merged")?;
        context.cpu_check(&map, 0, all, pattern).doing("merged")?;
        // One page is written by the device, another by the CPU; they alone change.
        let (first, second) = (rng.index(PAGES / 2) * PAGE, (PAGES / 2 + rng.index(PAGES / 2)) * PAGE);
        let other = Pattern { first: rng.next(), step: 1 };
        context.fill(&map, first, PAGE, other).doing("a merged page is written")?;
        map.fill(second, PAGE, other);
        for page in (0..all).step_by(PAGE) {
            let expected = if page == first || page == second { other } else { pattern };
            context.check(&map, page, PAGE, expected).doing("one page has parted")?;
            context.cpu_check(&map, page, PAGE, expected).doing("one page has parted")?;
        }
        context.fill(&map, first, PAGE, pattern)?;
        map.fill(second, PAGE, pattern);
        stable.end()?;
    }
    map.advise(0, all, MmapAdvise::MADV_UNMERGEABLE).doing("MADV_UNMERGEABLE")?;
    context.check(&map, 0, all, pattern).doing("unmerged")?;
    map.unmap(PAGE, PAGE).doing("munmap")?;
    context.must_not_reach(&map, PAGE)?;
    happened(seen, "ksmd merged nothing")
}

/// Pages that share another's, by the kernel's count; those that became the zero page are counted apart.
pub(in crate::workload) fn shared() -> Checked<u64> {
    let number = |name: &str| -> Checked<u64> { Ok(read(Path::new(KSM).join(name))?.parse().unwrap_or(0)) };
    Ok(number("pages_sharing")? + number("ksm_zero_pages").unwrap_or(0))
}
