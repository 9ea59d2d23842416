// SPDX-License-Identifier: MIT OR Apache-2.0
//! `uprobes`: a breakpoint is put into a file that the process has mapped, so that its page is replaced by a private copy, and is
//! taken out again.

use std::ffi::CString;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use super::super::Round;
use crate::client::{Context, Job};
use crate::device::Device;
use crate::kernel::{only_in_a_guest, uprobe};
use crate::memory::{Backing, Mapping, PAGE, Pattern, Prot};
use crate::outcome::{Checked, Doing, Failure, require};
use crate::rng::Rng;

/// The instruction that does nothing, in every byte: a probe may be anywhere.
const NOP: u8 = 0x90;
/// The breakpoint.
const INT3: u8 = 0xcc;
const PAGES: usize = 16;

pub(super) fn round(round: &mut Round<'_, '_>) {
    let device = round.ground.device;
    round.case("file", |rng| probes(device, rng));
}

fn probes(device: &dyn Device, rng: &mut Rng) -> Checked {
    only_in_a_guest()?;
    let path = format!("/tmp/uprobes-{}", std::process::id());
    let result = on_file(device, rng, &path);
    let _ = std::fs::remove_file(&path);
    result
}

fn on_file(device: &dyn Device, rng: &mut Rng, path: &str) -> Checked {
    let wrong = |error: std::io::Error| Failure::wrong(format!("{path}: {error}"));
    let file = std::fs::File::options().read(true).write(true).create(true).truncate(true).open(path);
    let file = file.map_err(wrong)?;
    file.write_all_at(&[NOP; PAGES * PAGE], 0).map_err(wrong)?;
    let name = CString::new(path).map_err(|_| Failure::wrong("a path with a NUL byte"))?;
    let map = Mapping::reserve(PAGES * PAGE, PAGE).doing("mmap")?;
    map.renew(0, PAGES * PAGE, Prot::Read, Backing::FilePrivate(file.as_fd(), 0)).doing("mmap")?;
    let context = Context::bind(device)?;
    let nops = Pattern { first: u64::from_ne_bytes([NOP; 8]), step: 0 };
    context.check(&map, 0, map.bytes(), nops)?;
    for _ in 0..6 {
        let offset = rng.index(PAGES * PAGE);
        let word = offset / 8 * 8;
        let mut bytes = [NOP; 8];
        bytes[offset % 8] = INT3;
        let probed = Pattern { first: u64::from_ne_bytes(bytes), step: 0 };
        let load = context.submit(Job::random_read(map.at(0), map.bytes(), 20_000, rng.next()).queue(1))?;
        let probe = uprobe(&name, offset as u64)?;
        context.wait(load)?.ok().doing("load")?;
        let found = map.load(word);
        require(found == probed.first, || {
            format!("with a probe at {offset:#x} the CPU finds {found:#x} instead of {:#x}", probed.first)
        })?;
        context.check(&map, word, 8, probed).doing("with a probe")?;
        let load = context.submit(Job::random_read(map.at(0), map.bytes(), 20_000, rng.next()).queue(1))?;
        drop(probe);
        context.wait(load)?.ok().doing("load")?;
        context.cpu_check(&map, word, 8, nops).doing("without the probe")?;
        context.check(&map, 0, map.bytes(), nops).doing("without the probe")?;
        // Text is read only, for the device too.
        context.must_not_write(&map, word)?;
    }
    map.unmap(0, PAGE).doing("munmap")?;
    context.must_not_reach(&map, 0)
}
