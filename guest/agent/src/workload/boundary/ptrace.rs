// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ptrace`: another process writes to this one's memory: as a debugger does, which breaks the sharing of pages that nobody may
//! write; through /proc; and by process_vm_writev.

use std::io::IoSlice;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use nix::sys::ptrace;
use nix::sys::uio::{RemoteIoVec, process_vm_writev};
use nix::sys::wait::{WaitStatus, waitpid};

use super::super::Round;
use super::super::access::memory_file;
use super::some_pattern;
use crate::client::{Context, Job};
use crate::device::Device;
use crate::kernel::poke;
use crate::memory::{Backing, Mapping, PAGE, Pattern, Prot};
use crate::outcome::{Checked, Doing, Failure, require};
use crate::process::{BOUND, Child};
use crate::rng::Rng;

const PAGES: usize = 32;

pub(super) fn round(round: &mut Round<'_, '_>) {
    let device = round.ground.device;
    // Read only and private: the write breaks the sharing with the file.
    round.case("poke/file-private", |rng| written(device, rng, By::Debugger, true));
    round.case("poke/anonymous", |rng| written(device, rng, By::Debugger, false));
    round.case("proc-mem", |rng| written(device, rng, By::Proc, false));
    round.case("process-vm-writev", |rng| written(device, rng, By::Vector, false));
}

#[derive(Clone, Copy)]
enum By {
    Debugger,
    Proc,
    Vector,
}

/// The two processes' page: which word was written, and what the other has seen.
const WRITTEN: usize = 0;
const SEEN: usize = 8;
const WHERE: usize = 16;
const WHAT: usize = 24;

fn written(device: &dyn Device, rng: &mut Rng, by: By, file: bool) -> Checked {
    let page = Mapping::new(PAGE, PAGE, Backing::AnonymousShared).doing("mmap")?;
    let pattern = some_pattern(rng);
    let mut rng_of_child = rng.clone();
    let mut child = Child::spawn(|parent| {
        let memory = memory_file(PAGES * PAGE)?;
        let shared =
            Mapping::new(PAGES * PAGE, PAGE, Backing::FileShared(memory.as_fd(), 0)).doing("mmap")?;
        shared.fill(0, PAGES * PAGE, pattern);
        let map = Mapping::reserve(PAGES * PAGE, PAGE).doing("mmap")?;
        if file {
            let private = Backing::FilePrivate(memory.as_fd(), 0);
            map.renew(0, PAGES * PAGE, Prot::Read, private).doing("mmap")?;
        } else {
            map.renew(0, PAGES * PAGE, Prot::Write, Backing::Anonymous).doing("mmap")?;
            map.fill(0, PAGES * PAGE, pattern);
        }
        watch(device, &mut rng_of_child, &map, &page, pattern, parent)?;
        // The file has not changed.
        require(!file || shared.differs(0, PAGES * PAGE, pattern).is_none(), || {
            "what was written to a private mapping is in the file".to_owned()
        })?;
        // Bound first, and a page with neighbours: what a thread maps to begin with would come to lie in a larger hole.
        let context = Context::bind(device)?;
        map.unmap(PAGE, PAGE).doing("munmap")?;
        context.must_not_reach(&map, PAGE)
    })?;
    let start = child.wait_ready()?;
    for round in 1..=8 {
        let (at, word) = (rng.index(PAGES * PAGE / 8) * 8, rng.next());
        write_word(&child, by, start + at as u64, word)?;
        page.store(WHERE, at as u64);
        page.store(WHAT, word);
        page.store(WRITTEN, round);
        let until = std::time::Instant::now() + BOUND;
        while page.load(SEEN) < round {
            if std::time::Instant::now() > until || child.has_ended()? {
                break;
            }
            std::thread::sleep(std::time::Duration::from_micros(500));
        }
    }
    page.store(WRITTEN, u64::MAX);
    child.join()
}

/// The written-to process: its device works on the memory all the time, and finds each word.
fn watch(
    device: &dyn Device,
    rng: &mut Rng,
    map: &Mapping,
    page: &Mapping,
    pattern: Pattern,
    parent: &crate::process::Parent,
) -> Checked {
    let context = Context::bind(device)?;
    context.check(map, 0, map.bytes(), pattern)?;
    parent.ready(map.at(0));
    let until = std::time::Instant::now() + BOUND;
    while page.load(WRITTEN) != u64::MAX {
        require(std::time::Instant::now() < until, || "the other process does not write".to_owned())?;
        let load = context.submit(Job::random_read(map.at(0), map.bytes(), 10_000, rng.next()).queue(1))?;
        let round = page.load(WRITTEN);
        if round != u64::MAX && round > page.load(SEEN) {
            let (at, word) = (page.load(WHERE) as usize, page.load(WHAT));
            let expected = Pattern { first: word, step: 0 };
            context.check(map, at, 8, expected).doing("written by another process")?;
            context.cpu_check(map, at, 8, expected).doing("written by another process")?;
            page.store(SEEN, round);
        }
        context.wait(load)?.ok().doing("load")?;
    }
    Ok(())
}

fn write_word(child: &Child, by: By, address: u64, word: u64) -> Checked {
    let pid = child.pid();
    match by {
        By::Debugger => {
            ptrace::attach(pid).doing("ptrace attach")?;
            match waitpid(pid, None) {
                Ok(WaitStatus::Stopped(..)) => {}
                other => return Err(Failure::wrong(format!("the process did not stop: {other:?}"))),
            }
            let poked = poke(pid, address, word);
            ptrace::detach(pid, None).doing("ptrace detach")?;
            poked.doing("ptrace poke")
        }
        By::Proc => {
            let path = format!("/proc/{pid}/mem");
            let file = std::fs::File::options().write(true).open(&path);
            file.and_then(|file| file.write_all_at(&word.to_ne_bytes(), address))
                .map_err(|error| Failure::wrong(format!("{path}: {error}")))
        }
        By::Vector => {
            let bytes = word.to_ne_bytes();
            let remote = RemoteIoVec { base: address as usize, len: bytes.len() };
            let done =
                process_vm_writev(pid, &[IoSlice::new(&bytes)], &[remote]).doing("process_vm_writev")?;
            require(done == bytes.len(), || format!("{done} bytes were written"))
        }
    }
}
