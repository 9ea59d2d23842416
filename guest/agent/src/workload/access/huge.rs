// SPDX-License-Identifier: MIT OR Apache-2.0
//! 2 MiB leaves: where the CPU maps memory by a huge page the driver must do so too, and split where only a part goes.
//!
//! The kernel's own word, smaps, says whether there are huge pages to begin with.

use crate::client::Context;
use crate::device::Device;
use crate::memory::{Backing, HUGE, Mapping, PAGE, Pattern, Prot};
use crate::outcome::{Checked, Doing, Failure, require};
use crate::rng::Rng;

/// How often memory is asked for before it counts as too fragmented for huge pages.
const TRIES: usize = 4;

/// Memory that the CPU maps by huge pages only, and a context on it.
struct Scene {
    context: Context,
    map: Mapping,
    pattern: Pattern,
}

/// Whether the kernel hands out huge pages at all.
fn enabled() -> bool {
    std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled")
        .is_ok_and(|modes| modes.contains("[always]") || modes.contains("[madvise]"))
}

/// KiB of anonymous huge pages in the mappings that overlap with `bytes` from `start`, by smaps.
fn huge_kib(start: u64, bytes: usize) -> Checked<u64> {
    let smaps = std::fs::read_to_string("/proc/self/smaps")
        .map_err(|error| Failure::Skip(format!("/proc/self/smaps: {error}")))?;
    let mut inside = false;
    let mut sum = 0;
    for line in smaps.lines() {
        if let Some((first, last)) = addresses(line) {
            inside = first < start + bytes as u64 && last > start;
        } else if let Some(value) = line.strip_prefix("AnonHugePages:").filter(|_| inside) {
            sum += value.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap_or_default();
        }
    }
    Ok(sum)
}

/// The addresses that a mapping's first line begins with.
fn addresses(line: &str) -> Option<(u64, u64)> {
    let (first, last) = line.split_whitespace().next()?.split_once('-')?;
    Some((u64::from_str_radix(first, 16).ok()?, u64::from_str_radix(last, 16).ok()?))
}

impl Scene {
    /// `pages` huge pages, filled by the device, which must have needed so many 2 MiB leaves.
    fn new(device: &dyn Device, rng: &mut Rng, pages: usize) -> Checked<Self> {
        if !enabled() {
            return Err(Failure::Skip("this kernel hands out no transparent huge pages".to_owned()));
        }
        let bytes = pages * HUGE;
        let mut found = Err(Failure::wrong("never tried"));
        for _ in 0..TRIES {
            let map = Mapping::huge(bytes).doing("mmap")?;
            map.touch(0, bytes);
            let kib = huge_kib(map.at(0), bytes)?;
            if kib as usize == bytes >> 10 {
                found = Ok(map);
                break;
            }
            found = Err(Failure::Skip(format!(
                "the kernel gave {kib} KiB of huge pages instead of {}",
                bytes >> 10
            )));
        }
        let map = found?;
        let context = Context::bind(device)?;
        let pattern = Pattern { first: rng.next(), step: rng.next() | 1 };
        let scene = Self { context, map, pattern };
        scene.context.fill(&scene.map, 0, bytes, pattern)?;
        scene.context.cpu_check(&scene.map, 0, bytes, pattern)?;
        Ok(scene)
    }

    /// Skips where the driver has no large leaves, as it may.
    fn is_huge(&self) -> Checked {
        let (maps, pages) = (self.huge_maps()?, self.map.bytes() / HUGE);
        if maps == 0 {
            return Err(Failure::Skip("this driver has no leaves of 2 MiB".to_owned()));
        }
        if huge_kib(self.map.at(0), self.map.bytes())? as usize != self.map.bytes() >> 10 {
            // Reclaim does that, and a driver that migrates by itself.
            return Err(Failure::Skip("the huge pages have been split meanwhile".to_owned()));
        }
        require(maps >= pages as u64, || {
            format!("the CPU maps {pages} huge pages here, but the driver has written {maps} leaves of 2 MiB")
        })
    }

    fn huge_maps(&self) -> Checked<u64> {
        Ok(self.context.file().query().doing("query")?.huge_maps)
    }

    /// The device finds the pattern in a part.
    fn sees(&self, offset: usize, bytes: usize) -> Checked {
        self.context.check(&self.map, offset, bytes, self.pattern.from(offset))
    }
}

/// Each huge page of the CPU is one leaf of the device.
pub(super) fn leaves(device: &dyn Device, rng: &mut Rng) -> Checked {
    let scene = Scene::new(device, rng, 2)?;
    let state = || scene.context.file().query().doing("query");
    let before = state()?;
    scene.sees(0, 2 * HUGE)?;
    let after = state()?;
    scene.is_huge()?;
    // Something else in the address space may have changed, and a driver may take more away than it must.
    require(after.huge_maps == before.huge_maps || after.invalidations != before.invalidations, || {
        "leaves were made again though nothing has changed".to_owned()
    })
}

/// A part of a huge page is unmapped: the rest stays, by small leaves.
pub(super) fn split_by_unmap(device: &dyn Device, rng: &mut Rng) -> Checked {
    let scene = Scene::new(device, rng, 1)?;
    let (at, bytes) = ((1 + rng.index(400)) * PAGE, 16 * PAGE);
    scene.map.unmap(at, bytes).doing("munmap")?;
    let before = scene.huge_maps()?;
    for page in [at, at + bytes / 2, at + bytes - PAGE] {
        scene.context.must_not_reach(&scene.map, page)?;
    }
    scene.sees(0, at).doing("before the hole")?;
    scene.sees(at + bytes, HUGE - at - bytes).doing("behind the hole")?;
    scene.map.refill(at, bytes, Backing::Anonymous).doing("mmap into the hole")?;
    scene.context.check(&scene.map, at, PAGE, Pattern::ZERO).doing("in the hole")?;
    scene.sees(0, at).doing("before the hole")?;
    small_only(&scene, before)
}

/// A part of a huge page is made read-only: the device may write the rest, and read all.
pub(super) fn split_by_protect(device: &dyn Device, rng: &mut Rng) -> Checked {
    let scene = Scene::new(device, rng, 1)?;
    let (at, bytes) = ((1 + rng.index(400)) * PAGE, 32 * PAGE);
    scene.map.protect(at, bytes, Prot::Read).doing("mprotect")?;
    let before = scene.huge_maps()?;
    scene.sees(0, HUGE)?;
    for page in [at, at + bytes - PAGE] {
        scene.context.must_not_write(&scene.map, page)?;
    }
    let new = Pattern { first: !scene.pattern.first, step: scene.pattern.step };
    for page in [at - PAGE, at + bytes] {
        scene.context.fill(&scene.map, page, PAGE, new).doing("beside the read-only part")?;
        scene.context.cpu_check(&scene.map, page, PAGE, new)?;
    }
    scene.sees(at, bytes)?;
    small_only(&scene, before)?;
    scene.map.protect(at, bytes, Prot::Write).doing("mprotect")?;
    scene.context.fill(&scene.map, at, bytes, new)?;
    scene.context.cpu_check(&scene.map, at, bytes, new)
}

/// Where the CPU has split a huge page the device must not have a 2 MiB leaf.
fn small_only(scene: &Scene, before: u64) -> Checked {
    let maps = scene.huge_maps()?;
    require(maps == before, || {
        format!("the CPU maps small pages here, but the driver has written {} leaves of 2 MiB", maps - before)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smaps_lines_are_read() {
        assert_eq!(addresses("7f00-7f10 rw-p 00000000 00:00 0"), Some((0x7f00, 0x7f10)));
        assert_eq!(addresses("AnonHugePages:      2048 kB"), None);
        assert_eq!(huge_kib(0, 1), Ok(0));
    }
}
