// SPDX-License-Identifier: MIT OR Apache-2.0
//! `uprobes`: a breakpoint is put into a file that the process has mapped, so that its page is replaced by a private copy, and is
//! taken out again.

use std::ffi::CString;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use super::super::Round;
use crate::client::{Context, Job};
use crate::device::Device;
use crate::kernel::{only_in_a_guest, uprobe, within};
use crate::memory::{Backing, Mapping, PAGE, Pattern, Prot};
use crate::outcome::{Checked, Doing, Failure, require};
use crate::process::BOUND;
use crate::rng::Rng;

/// The instruction that does nothing, in every byte: a probe may be anywhere.
const NOP: u8 = 0x90;
/// The breakpoint.
const INT3: u8 = 0xcc;
const NOPS: Pattern = Pattern { first: u64::from_ne_bytes([NOP; 8]), step: 0 };
const PAGES: usize = 16;

pub(super) fn round(round: &mut Round<'_, '_>) {
    let device = round.ground.device;
    round.case("file", |rng| probes(device, rng));
}

fn probes(device: &dyn Device, rng: &mut Rng) -> Checked {
    let text = Text::new()?;
    let context = Context::bind(device)?;
    text.holds(&context)?;
    for _ in 0..6 {
        text.probe(&context, rng)?;
        text.holds(&context).doing("without the probe")?;
    }
    text.map.unmap(0, PAGE).doing("munmap")?;
    context.must_not_reach(&text.map, 0)
}

/// A file of nothing but code, which this process has mapped. Gone when dropped.
pub(in crate::workload) struct Text {
    path: CString,
    map: Mapping,
}

impl Text {
    /// All NOPs.
    pub(in crate::workload) fn new() -> Checked<Self> {
        only_in_a_guest()?;
        let path = format!("/tmp/uprobes-{}", std::process::id());
        let wrong = |error: std::io::Error| Failure::wrong(format!("{path}: {error}"));
        let file = std::fs::File::options().read(true).write(true).create(true).truncate(true).open(&path);
        let file = file.map_err(wrong)?;
        let map = Mapping::reserve(PAGES * PAGE, PAGE).doing("mmap")?;
        let name = CString::new(path.as_str()).map_err(|_| Failure::wrong("a path with a NUL byte"))?;
        let text = Self { path: name, map };
        file.write_all_at(&[NOP; PAGES * PAGE], 0).map_err(wrong)?;
        let private = Backing::FilePrivate(file.as_fd(), 0);
        text.map.renew(0, PAGES * PAGE, Prot::Read, private).doing("mmap")?;
        Ok(text)
    }

    /// The device finds it as it is without probes.
    fn holds(&self, context: &Context) -> Checked {
        context.check(&self.map, 0, self.map.bytes(), NOPS)
    }

    /// Puts a probe somewhere, has CPU and device look at it, and takes it out again: under a device that reads all of it.
    pub(in crate::workload) fn probe(&self, context: &Context, rng: &mut Rng) -> Checked {
        let map = &self.map;
        let offset = rng.index(PAGES * PAGE);
        let word = offset / 8 * 8;
        let mut bytes = [NOP; 8];
        bytes[offset % 8] = INT3;
        let probed = Pattern { first: u64::from_ne_bytes(bytes), step: 0 };
        let load = context.submit(Job::random_read(map.at(0), map.bytes(), 20_000, rng.next()).queue(1))?;
        let probe = uprobe(&self.path, offset as u64)?;
        context.wait(load)?.ok().doing("load")?;
        let found = map.load(word);
        require(found == probed.first, || {
            format!("with a probe at {offset:#x} the CPU finds {found:#x} instead of {:#x}", probed.first)
        })?;
        context.check(map, word, 8, probed).doing("with a probe")?;
        let load = context.submit(Job::random_read(map.at(0), map.bytes(), 20_000, rng.next()).queue(1))?;
        drop(probe);
        context.wait(load)?.ok().doing("load")?;
        // A child that another thread has made meanwhile has the probe open too, until it ends.
        within(BOUND, || Ok(map.load(word) == NOPS.first))?;
        context.cpu_check(map, word, 8, NOPS).doing("without the probe")?;
        context.check(map, word, 8, NOPS).doing("without the probe")?;
        // Text is read only, for the device too.
        context.must_not_write(map, word)
    }
}

impl Drop for Text {
    fn drop(&mut self) {
        let _ = nix::unistd::unlink(self.path.as_c_str());
    }
}
