// SPDX-License-Identifier: MIT OR Apache-2.0
//! `swap`: memory that the device uses goes out to swap space and comes back, by advice, by a group's limit, by reclaim.
//!
//! The space is a zram device, whose module the initramfs has if the kernel came with one.

use std::ffi::CString;
use std::path::Path;

use super::super::Round;
use super::{Narrow, Scene, happened, known};
use crate::client::{Context, Job};
use crate::device::Device;
use crate::kernel::{
    PAGEMAP_SWAPPED, load_modules, only_in_a_guest, pagemap, read, swap_off, swap_on, vmstat, write,
};
use crate::memory::{HUGE, Mapping, PAGE, Pattern, WINDOW, advice};
use crate::outcome::{Checked, Doing, Failure, require};
use crate::process::Child;
use crate::rng::Rng;

/// What zram is made of, in the order of loading; newer kernels have parts of it built in.
const ZRAM: &[&str] = &["zsmalloc", "lzo-rle", "lz4_compress", "lz4hc_compress", "zram"];
const BYTES: usize = 192 << 20;

pub(super) fn round(round: &mut Round<'_, '_>) {
    let device = round.ground.device;
    round.case("pageout/4k", |rng| {
        with_swap(|| page_out(device, rng, Mapping::small(2 * WINDOW).doing("mmap")?))
    });
    round.case("pageout/thp", |rng| {
        with_swap(|| page_out(device, rng, Mapping::huge(2 * HUGE).doing("mmap")?))
    });
    round.case("pageout/shared", |rng| {
        let shared = || Mapping::new(2 * WINDOW, WINDOW, crate::memory::Backing::AnonymousShared);
        with_swap(|| page_out(device, rng, shared().doing("mmap")?))
    });
    round.case("free-under-pressure", |rng| with_swap(|| freed(device, rng)));
    round.case("reclaim", |rng| with_swap(|| reclaim(device, rng)));
    round.case("limit", |rng| with_swap(|| limit(device, rng)));
    round.case("swapoff", |rng| swapped_in_by_swapoff(device, rng));
}

/// A block device of compressed memory.
pub(super) fn zram(bytes: usize) -> Checked<String> {
    only_in_a_guest()?;
    load_modules(ZRAM)?;
    // The first comes with the module.
    let number = read("/sys/class/zram-control/hot_add")?;
    write(format!("/sys/block/zram{number}/disksize"), &bytes.to_string())?;
    Ok(number)
}

/// Takes it away again.
pub(super) fn remove_zram(number: &str) {
    let _ = write("/sys/class/zram-control/hot_remove", number);
}

/// Swap space that lasts as long as this.
pub(in crate::workload) struct Swap {
    number: String,
    path: CString,
}

impl Swap {
    /// Adds some, or says why there can be none.
    pub(in crate::workload) fn new() -> Checked<Self> {
        let number = zram(BYTES)?;
        let path = format!("/dev/zram{number}");
        let result = Self::on(number.clone(), &path);
        if result.is_err() {
            remove_zram(&number);
        }
        result
    }

    /// Takes it out of use, so that all comes back, and puts it into use again.
    pub(in crate::workload) fn cycle(&self) -> Checked {
        swap_off(&self.path).doing("swapoff")?;
        swap_on(&self.path).doing("swapon")
    }

    fn on(number: String, path: &str) -> Checked<Self> {
        let wrong = |error: std::io::Error| Failure::wrong(format!("{path}: {error}"));
        crate::boot::wait_for_node(path)?;
        let file = std::fs::File::options().write(true).open(path).map_err(wrong)?;
        std::os::unix::fs::FileExt::write_all_at(&file, &header(BYTES), 0).map_err(wrong)?;
        file.sync_all().map_err(wrong)?;
        drop(file);
        let path = CString::new(path).map_err(|_| Failure::wrong("a path with a NUL byte"))?;
        match swap_on(&path) {
            Ok(()) => Ok(Self { number, path }),
            Err(nix::errno::Errno::ENOSYS) => Err(Failure::Skip("this kernel has no swap".to_owned())),
            Err(errno) => Err(errno).doing("swapon"),
        }
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        // Refused if it was switched off already.
        let _ = swap_off(&self.path);
        remove_zram(&self.number);
    }
}

/// The first page of a swap space (`union swap_header` of linux/swap.h, version 1).
fn header(bytes: usize) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    page[1024..1028].copy_from_slice(&1_u32.to_ne_bytes());
    let last = u32::try_from(bytes / PAGE - 1).unwrap_or(u32::MAX);
    page[1028..1032].copy_from_slice(&last.to_ne_bytes());
    page[PAGE - 10..].copy_from_slice(b"SWAPSPACE2");
    page
}

/// Does something while there is swap space.
pub(super) fn with_swap(body: impl FnOnce() -> Checked) -> Checked {
    let swap = Swap::new()?;
    let result = body();
    drop(swap);
    result
}

/// Pages of a range that are swapped out.
fn swapped(map: &Mapping) -> Checked<usize> {
    let entries = pagemap(map.at(0), map.bytes() / PAGE)?;
    Ok(entries.iter().filter(|&&entry| entry & PAGEMAP_SWAPPED != 0).count())
}

/// By advice, idle and under a device at work.
fn page_out(device: &dyn Device, rng: &mut Rng, map: Mapping) -> Checked {
    let mut scene = Scene::new(device, rng, map)?;
    let out = |scene: &Scene<'_>| {
        known(scene.map.advise_by_number(0, scene.bytes(), advice::PAGEOUT), "MADV_PAGEOUT")
    };
    let before = vmstat("pswpout");
    for _ in 0..3 {
        // The device alone has written it.
        scene.rewrite(rng)?;
        scene.context.fill(&scene.map, 0, scene.bytes(), scene.pattern)?;
        out(&scene)?;
        let gone = swapped(&scene.map)?;
        // The CPU is first half of the time.
        if rng.once_in(2) {
            scene.cpu_agrees().doing(&format!("{gone} pages were swapped out"))?;
        }
        scene.agrees().doing(&format!("{gone} pages were swapped out"))?;
        scene.under_load(rng, |rng| {
            for _ in 0..1 + rng.below(3) {
                out(&scene)?;
            }
            Ok(())
        })?;
    }
    scene.hole(rng)?;
    happened(super::grew("pswpout", before), "nothing was swapped out")
}

/// MADV_FREE: a page that is written again before it is reclaimed keeps what was written, whoever wrote it.
fn freed(device: &dyn Device, rng: &mut Rng) -> Checked {
    let mut scene = Scene::small(device, rng, 64)?;
    for _ in 0..4 {
        let bytes = scene.bytes();
        scene.map.advise(0, bytes, nix::sys::mman::MmapAdvise::MADV_FREE).doing("MADV_FREE")?;
        // Half of it is written by the device, before anybody could know whether the rest is kept.
        let new = super::some_pattern(rng);
        scene.context.fill(&scene.map, 0, bytes / 2, new)?;
        known(scene.map.advise_by_number(0, bytes, advice::PAGEOUT), "MADV_PAGEOUT")?;
        scene
            .context
            .cpu_check(&scene.map, 0, bytes / 2, new)
            .doing("written by the device after MADV_FREE")?;
        scene.context.check(&scene.map, 0, bytes / 2, new).doing("written by the device after MADV_FREE")?;
        for page in (bytes / 2..bytes).step_by(PAGE) {
            let old = Job::check(scene.map.at(page), PAGE, scene.pattern.from(page));
            if scene.context.run(old)?.ok()?.result != 0 {
                scene
                    .context
                    .check(&scene.map, page, PAGE, Pattern::ZERO)
                    .doing("neither old data nor zeros")?;
            }
        }
        scene.rewrite(rng)?;
    }
    Ok(())
}

/// memory.reclaim of a group in which the device works.
fn reclaim(device: &dyn Device, rng: &mut Rng) -> Checked {
    let narrow = Narrow::new(64 << 20)?;
    let before = vmstat("pswpout");
    let mut child = Child::spawn(|_| {
        narrow.join()?;
        let mut scene = Scene::small(device, rng, 256)?;
        for _ in 0..2 {
            scene.under_load(rng, |rng| narrow.reclaim((1 + rng.index(8)) << 18).map(drop))?;
            narrow.reclaim(4 << 20)?;
            scene.agrees().doing("reclaimed")?;
            scene.rewrite(rng)?;
        }
        scene.hole(rng)
    })?;
    child.join()?;
    happened(super::grew("pswpout", before), "nothing was swapped out")
}

/// A group that may have less memory than the device uses.
fn limit(device: &dyn Device, rng: &mut Rng) -> Checked {
    const LIMIT: usize = 6 << 20;
    let narrow = Narrow::new(LIMIT)?;
    let before = vmstat("pswpout");
    let mut child = Child::spawn(|_| {
        narrow.join()?;
        let map = Mapping::small(2 * LIMIT).doing("mmap")?;
        let context = Context::bind(device)?;
        let pattern = super::some_pattern(rng);
        // In parts, since a fault that no memory can be had for is rightly fatal.
        for at in (0..map.bytes()).step_by(4 * WINDOW) {
            context.fill(&map, at, 4 * WINDOW, pattern.from(at))?;
        }
        for at in (0..map.bytes()).step_by(4 * WINDOW) {
            context.check(&map, at, 4 * WINDOW, pattern.from(at))?;
            context.cpu_check(&map, at, PAGE, pattern.from(at))?;
        }
        Ok(())
    })?;
    child.join()?;
    require(narrow.count("memory.events", "oom_kill")? == 0, || {
        "a process was killed for memory".to_owned()
    })?;
    happened(super::grew("pswpout", before), "nothing was swapped out")
}

/// Swap space that is taken away gives everything back first.
fn swapped_in_by_swapoff(device: &dyn Device, rng: &mut Rng) -> Checked {
    let swap = Swap::new()?;
    let scene = Scene::small(device, rng, 256)?;
    known(scene.map.advise_by_number(0, scene.bytes(), advice::PAGEOUT), "MADV_PAGEOUT")?;
    let out = swapped(&scene.map)?;
    scene.under_load(rng, |_| swap_off(&swap.path).doing("swapoff"))?;
    require(swapped(&scene.map)? == 0, || "pages are swapped out after swapoff".to_owned())?;
    drop(swap);
    require(!Path::new("/proc/swaps").exists() || !read("/proc/swaps")?.contains("zram"), || {
        "the swap space is still in use".to_owned()
    })?;
    happened(out > 0, "nothing was swapped out")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_swap_header_says_its_last_page() {
        let page = header(1 << 20);
        assert_eq!(&page[4086..], b"SWAPSPACE2");
        assert_eq!(page[1024..1032], [1, 0, 0, 0, 255, 0, 0, 0]);
    }
}
