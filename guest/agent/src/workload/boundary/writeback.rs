// SPDX-License-Identifier: MIT OR Apache-2.0
//! `writeback`: shared memory of a file that lives elsewhere. What the device wrote must reach the file, whichever way the page
//! goes: by msync, by reclaim, by the cache being dropped, by unmapping.
//!
//! The file is a block device, whose cache is written back as any file's is, without a file system in between.

use std::fs::File;
use std::os::fd::AsFd;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::super::Round;
use super::swap::{remove_zram, zram};
use super::{grew, happened, known, some_pages, some_pattern};
use crate::client::{Context, Job};
use crate::device::{Device, Stable};
use crate::kernel::{read, vmstat, write};
use crate::memory::{Backing, Mapping, PAGE, Pattern, WINDOW, advice};
use crate::outcome::{Checked, Doing, Failure};
use crate::rng::Rng;

const BYTES: usize = 4 * WINDOW;

pub(super) fn round(round: &mut Round<'_, '_>) {
    let device = round.ground.device;
    for (name, way) in [
        ("msync", Way::Msync),
        ("pageout", Way::PageOut),
        ("drop-caches", Way::DropCaches),
        ("unmap", Way::Unmap),
        ("sync-again", Way::SyncAgain),
    ] {
        round.case(name, |rng| on_disk(|path| keeps(device, rng, path, way)));
    }
    round.case("msync/running", |rng| on_disk(|path| under_load(device, rng, path)));
}

/// How pages go to the file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Msync,
    PageOut,
    DropCaches,
    Unmap,
    SyncAgain,
}

/// Does something with a fresh disk.
fn on_disk(body: impl FnOnce(&str) -> Checked) -> Checked {
    let number = zram(BYTES)?;
    let path = format!("/dev/zram{number}");
    let result = crate::boot::wait_for_node(&path).and_then(|()| body(&path));
    remove_zram(&number);
    result
}

fn open(path: &str) -> Checked<File> {
    let file = File::options().read(true).write(true).open(path);
    file.map_err(|error| Failure::wrong(format!("{path}: {error}")))
}

fn map(file: &File) -> Checked<Mapping> {
    Mapping::new(BYTES, WINDOW, Backing::FileShared(file.as_fd(), 0)).doing("mmap")
}

/// Pages without users go from the cache, so that the next look is at the disk.
fn drop_cache(file: &File) -> Checked {
    posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).doing("posix_fadvise")
}

/// What the disk holds, seen by a fresh mapping of CPU and device.
fn holds(context: &Context, path: &str, pattern: impl Fn(usize) -> Pattern) -> Checked {
    let file = open(path)?;
    let fresh = map(&file)?;
    for at in (0..BYTES).step_by(PAGE) {
        context.cpu_check(&fresh, at, PAGE, pattern(at)).doing("in a fresh mapping")?;
        context.check(&fresh, at, PAGE, pattern(at)).doing("in a fresh mapping")?;
    }
    Ok(())
}

fn keeps(device: &dyn Device, rng: &mut Rng, path: &str, way: Way) -> Checked {
    let context = Context::bind(device)?;
    let file = open(path)?;
    for _ in 0..3 {
        let written = map(&file)?;
        let pattern = some_pattern(rng);
        // Read first: the device's leaves are there before it may write, and the CPU's entries are clean.
        context.run(Job::random_read(written.at(0), BYTES, 2000, rng.next()))?.ok()?;
        context.fill(&written, 0, BYTES, pattern).doing("the device writes a file")?;
        let (at, bytes) = some_pages(rng, BYTES);
        let mut again = None;
        match way {
            Way::Msync => written.write_back(0, BYTES).doing("msync")?,
            Way::PageOut => {
                known(written.advise_by_number(0, BYTES, advice::PAGEOUT), "MADV_PAGEOUT")?;
                // What was dirty is written and stays once; the second time it may go.
                file.sync_data().map_err(|error| Failure::wrong(format!("fdatasync: {error}")))?;
                known(written.advise_by_number(0, BYTES, advice::PAGEOUT), "MADV_PAGEOUT")?;
            }
            Way::DropCaches => {
                written.write_back(0, BYTES).doing("msync")?;
                write("/proc/sys/vm/drop_caches", "1")?;
                // Mapped as they are they stay; and clean, as they are, they may not be written by the device unseen.
                let new = some_pattern(rng);
                context.fill(&written, at, bytes, new)?;
                again = Some(new);
            }
            Way::SyncAgain => {
                // Written back, written again by the device, written back again: the second time counts.
                written.write_back(0, BYTES).doing("msync")?;
                let new = some_pattern(rng);
                context.fill(&written, at, bytes, new)?;
                written.write_back(0, BYTES).doing("msync")?;
                again = Some(new);
            }
            Way::Unmap => {}
        }
        drop(written);
        file.sync_data().map_err(|error| Failure::wrong(format!("fdatasync: {error}")))?;
        drop_cache(&file)?;
        holds(&context, path, |page| match again {
            Some(new) if (at..at + bytes).contains(&page) => new.from(page - at),
            _ => pattern.from(page),
        })?;
    }
    Ok(())
}

/// Written back again and again while the device writes; what it wrote last is what the disk has in the end.
fn under_load(device: &dyn Device, rng: &mut Rng, path: &str) -> Checked {
    let context = Context::bind(device)?;
    let file = open(path)?;
    let before = vmstat("nr_written");
    for _ in 0..3 {
        let written = map(&file)?;
        let stable = Stable::declare(device, &written, 0, BYTES)?;
        let patterns: Vec<_> = (0..4).map(|_| some_pattern(rng)).collect();
        let tickets = patterns
            .iter()
            .map(|&pattern| context.submit(Job::fill(written.at(0), BYTES, pattern)))
            .collect::<Checked<Vec<_>>>()?;
        for _ in 0..4 {
            let (at, bytes) = some_pages(rng, BYTES);
            written.write_back(at, bytes).doing("msync")?;
            known(written.advise_by_number(at, bytes, advice::PAGEOUT), "MADV_PAGEOUT")?;
        }
        for ticket in tickets {
            context.wait(ticket)?.ok().doing("load")?;
        }
        stable.end()?;
        let last = patterns[patterns.len() - 1];
        context.cpu_check(&written, 0, BYTES, last)?;
        drop(written);
        file.sync_data().map_err(|error| Failure::wrong(format!("fdatasync: {error}")))?;
        drop_cache(&file)?;
        holds(&context, path, |page| last.from(page))?;
    }
    // The counter is of the whole system; what matters is above.
    read("/proc/vmstat")?;
    happened(grew("nr_written", before), "nothing was written back")
}
