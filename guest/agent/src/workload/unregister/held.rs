// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whether a context that has gone has left references to pages: the kernel cannot take a page out of use that somebody holds.

use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::client::Context;
use crate::device::Device;
use crate::kernel::only_in_a_guest;
use crate::memory::{Mapping, PAGE, Pattern, Prot, advice};
use crate::outcome::{Checked, Doing, Failure};
use crate::process::Pause;
use crate::rng::Rng;

/// Pages that the device has.
const PAGES: usize = 16;
/// Pages of these that are taken out of use: they are lost until the guest goes.
const TAKEN: usize = 3;
/// How long a driver may take to let go of pages after its context has: a worker of it may have to come by.
const PATIENCE: Duration = Duration::from_secs(20);

/// Pages that a context has read, written, lost and got back, before it goes. If what no device has had can be taken out of use, and these
/// cannot, it is for what the context has left.
pub(super) fn held(device: &dyn Device, rng: &mut Rng) -> Checked {
    only_in_a_guest()?;
    let pattern = Pattern { first: rng.next(), step: rng.next() | 1 };
    let other = Mapping::small(PAGE).doing("mmap")?;
    other.fill(0, PAGE, pattern);
    if let Err(errno) | Ok(Err((errno, _))) = taken(&other, 0, PATIENCE) {
        return Err(Failure::Skip(format!("MADV_SOFT_OFFLINE of a page that no device has had: {errno}")));
    }
    let map = Mapping::small(PAGES * PAGE).doing("mmap")?;
    map.fill(0, PAGES * PAGE, pattern);
    let context = Context::bind(device)?;
    context.check(&map, 0, PAGES * PAGE, pattern)?;
    context.fill(&map, 0, PAGES / 2 * PAGE, pattern)?;
    for _ in 0..4 {
        let pages = 1 + rng.index(4);
        let at = rng.index(PAGES - pages) * PAGE;
        map.protect(at, pages * PAGE, Prot::Read).doing("mprotect")?;
        context.check(&map, 0, PAGES * PAGE, pattern)?;
        map.protect(at, pages * PAGE, Prot::Write).doing("mprotect")?;
        context.fill(&map, at, pages * PAGE, pattern.from(at))?;
    }
    let gone = context.handle();
    context.file().unbind().doing("unbind")?;

    let first = rng.index(PAGES);
    for page in 0..TAKEN {
        let at = (first + page * 5) % PAGES * PAGE;
        if let Err((errno, tries)) = taken(&map, at, PATIENCE).doing("MADV_SOFT_OFFLINE")? {
            let detail = format!(
                "MADV_SOFT_OFFLINE of what no device has had was done, and of this {tries} times not: {errno}"
            );
            return Err(Failure::held(gone, map.at(at), detail));
        }
    }
    context.cpu_check(&map, 0, PAGES * PAGE, pattern)
}

/// Takes a page out of use; another one gets its place and its data. Somebody may look at it just then, so it is tried for some time:
/// inside, with what error it could not be done and how often that was so. Any other error says nothing of who holds the page.
fn taken(map: &Mapping, at: usize, patience: Duration) -> Result<Result<(), (Errno, u32)>, Errno> {
    let (until, mut pause) = (Instant::now() + patience, Pause::default());
    let mut tries = 0;
    loop {
        tries += 1;
        match map.advise_by_number(at, PAGE, advice::SOFT_OFFLINE) {
            Ok(()) => return Ok(Ok(())),
            Err(errno @ (Errno::EBUSY | Errno::EIO | Errno::EAGAIN)) if Instant::now() >= until => {
                return Ok(Err((errno, tries)));
            }
            Err(Errno::EBUSY | Errno::EIO | Errno::EAGAIN) => pause.take(),
            Err(errno) => return Err(errno),
        }
    }
}
