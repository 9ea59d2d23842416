// SPDX-License-Identifier: MIT OR Apache-2.0
//! `compaction`: pages move within memory to make room for larger ones.

use super::super::Round;
use super::{Scene, grew, happened};
use crate::device::Device;
use crate::kernel::{only_in_a_guest, vmstat, write};
use crate::memory::{Backing, Mapping, PAGE, WINDOW};
use crate::outcome::{Checked, Doing};
use crate::rng::Rng;

/// Writing to it compacts all of memory.
pub(in crate::workload) const COMPACT: &str = "/proc/sys/vm/compact_memory";

pub(super) fn round(round: &mut Round<'_, '_>) {
    let device = round.ground.device;
    round.case("anonymous", |rng| compact(device, rng, Backing::Anonymous));
    round.case("shared", |rng| compact(device, rng, Backing::AnonymousShared));
}

fn compact(device: &dyn Device, rng: &mut Rng, backing: Backing<'_>) -> Checked {
    only_in_a_guest()?;
    let before = vmstat("pgmigrate_success");
    // Every other page of much memory is given back: what stays is scattered, and moves.
    let much = Mapping::small(8192 * PAGE).doing("mmap")?;
    much.touch(0, much.bytes());
    let mut scene = Scene::new(device, rng, Mapping::new(8 * WINDOW, WINDOW, backing).doing("mmap")?)?;
    for at in (0..much.bytes()).step_by(2 * PAGE) {
        much.advise(at, PAGE, nix::sys::mman::MmapAdvise::MADV_DONTNEED).doing("madvise")?;
    }
    for part in 1..=3 {
        scene.under_load(rng, |_| write(COMPACT, "1"))?;
        scene.rewrite(rng)?;
        // What was tidied up is scattered anew.
        for at in (0..much.bytes()).step_by(8 * PAGE) {
            much.advise(at + 2 * part * PAGE, PAGE, nix::sys::mman::MmapAdvise::MADV_DONTNEED)
                .doing("madvise")?;
        }
    }
    if matches!(backing, Backing::Anonymous) {
        scene.hole(rng)?;
    }
    happened(grew("pgmigrate_success", before), "compaction moved no page")
}
