// SPDX-License-Identifier: MIT OR Apache-2.0
//! `soft-dirty`: the bits by which checkpointing finds what was written are cleared, which write-protects everything.

use super::super::Round;
use super::{Scene, some_pages};
use crate::device::Device;
use crate::kernel::{PAGEMAP_SOFT_DIRTY, pagemap, write};
use crate::memory::{HUGE, Mapping, PAGE, WINDOW};
use crate::outcome::{Checked, Doing, Failure, require};
use crate::rng::Rng;

/// What clear_refs takes: the soft-dirty bits (Documentation/filesystems/proc.rst).
pub(in crate::workload) const CLEAR_SOFT_DIRTY: &str = "4";
/// The accessed bits.
pub(in crate::workload) const CLEAR_ACCESSED: &str = "1";

pub(super) fn round(round: &mut Round<'_, '_>) {
    let device = round.ground.device;
    round.case("4k", |rng| clear(device, rng, Mapping::small(WINDOW).doing("mmap")?));
    round.case("thp", |rng| clear(device, rng, Mapping::huge(2 * HUGE).doing("mmap")?));
    round.case("accessed", |rng| {
        let scene = Scene::small(device, rng, 64)?;
        (0..4).try_for_each(|_| scene.under_load(rng, |_| write("/proc/self/clear_refs", CLEAR_ACCESSED)))
    });
}

/// Whether the bits are kept at all: without them nothing is ever dirty.
fn has_soft_dirty() -> Checked<bool> {
    let map = Mapping::small(PAGE).doing("mmap")?;
    map.touch(0, PAGE);
    Ok(pagemap(map.at(0), 1)?.iter().all(|entry| entry & PAGEMAP_SOFT_DIRTY != 0))
}

fn clear(device: &dyn Device, rng: &mut Rng, map: Mapping) -> Checked {
    if !has_soft_dirty()? {
        return Err(Failure::Skip("this kernel has no soft-dirty bits".to_owned()));
    }
    let mut scene = Scene::new(device, rng, map)?;
    for _ in 0..4 {
        scene.under_load(rng, |_| write("/proc/self/clear_refs", CLEAR_SOFT_DIRTY))?;
        write("/proc/self/clear_refs", CLEAR_SOFT_DIRTY)?;
        // What the CPU writes is soft-dirty, and the device sees it.
        let (at, bytes) = some_pages(rng, scene.bytes().min(WINDOW));
        scene.map.fill(at, bytes, scene.pattern.from(at));
        scene.context.check(&scene.map, at, bytes, scene.pattern.from(at))?;
        let entries = pagemap(scene.map.at(at), bytes / PAGE)?;
        require(entries.iter().all(|entry| entry & PAGEMAP_SOFT_DIRTY != 0), || {
            format!("of {} pages that the CPU has written some are not soft-dirty", entries.len())
        })?;
        scene.agrees()?;
    }
    scene.rewrite(rng)?;
    scene.hole(rng)
}
