// SPDX-License-Identifier: MIT OR Apache-2.0
//! Copies to the device's memory that fail: whatever becomes of the migration, what is in the pages stays.

use std::collections::HashSet;

use guest_protocol::{Message, Wish};
use nix::errno::Errno;
use nix::sys::mman::MmapAdvise;

use super::{Placed, Round, To, migrate_all};
use crate::device::Device;
use crate::memory::{PAGE, Pattern, WINDOW};
use crate::outcome::{Checked, Doing, Failure};
use crate::report::Sink;
use crate::rng::Rng;

/// Migrations of which some copies fail.
const TRIES: usize = 3;
/// Copies that fail in one of them at most.
const FAILURES: u64 = 3;

pub(super) fn round(round: &mut Round<'_, '_>) {
    let (device, host) = (round.ground.device, round.ground.sink);
    round.case("copy-fails", |rng| copy_fails(device, host, rng));
}

/// The pages of VRAM have had other data before, and pages that nobody has touched are asked for too.
fn copy_fails(device: &dyn Device, host: &dyn Sink, rng: &mut Rng) -> Checked {
    let before = Placed::new(device, rng)?;
    migrate_all(&before.context, &before.map, 0, WINDOW, To::System)?;
    for _ in 0..TRIES {
        let placed = Placed::unmoved(device, rng, WINDOW)?;
        let empty: HashSet<usize> = (0..4).map(|_| rng.index(WINDOW / PAGE) * PAGE).collect();
        for &at in &empty {
            placed.map.advise(at, PAGE, MmapAdvise::MADV_DONTNEED).doing("madvise")?;
        }
        let count = 1 + rng.below(FAILURES) as u32;
        host.send(&Message::Ask { wish: Wish::FailCopies { count } });
        let moved = placed.context.file().migrate(placed.map.at(0), WINDOW as u64, true);
        host.send(&Message::Ask { wish: Wish::FailCopies { count: 0 } });
        match moved {
            Err(Errno::EOPNOTSUPP) => {
                return Err(Failure::Skip("the kernel has no device-private memory".to_owned()));
            }
            Err(errno @ (Errno::ENXIO | Errno::ESRCH)) => {
                return Err(placed.context.refusal(errno)).doing("migrate to the device");
            }
            // What went, went; an error is as good.
            _ => {}
        }
        // Device and CPU look in turn: one of them moves what the other has seen.
        let seen = |at: usize, by_device: bool| {
            let pattern = if empty.contains(&at) { Pattern::ZERO } else { placed.pattern.from(at) };
            if by_device {
                placed.context.check(&placed.map, at, PAGE, pattern)
            } else {
                placed.context.cpu_check(&placed.map, at, PAGE, pattern)
            }
        };
        for by_device in [true, false, true] {
            (0..WINDOW)
                .step_by(PAGE)
                .try_for_each(|at| seen(at, by_device))
                .doing("after a copy has failed")?;
        }
    }
    Ok(())
}
