// SPDX-License-Identifier: MIT OR Apache-2.0
//! `process-madvise`: another process says what is to become of this one's memory.

use nix::errno::Errno;

use super::super::Round;
use super::swap::Swap;
use super::{Scene, known, some_pages};
use crate::device::Device;
use crate::kernel::process_madvise;
use crate::memory::{Backing, HUGE, Mapping, PAGE, advice};
use crate::outcome::{Checked, Doing, Failure, require};
use crate::process::Child;
use crate::rng::Rng;

pub(super) fn round(round: &mut Round<'_, '_>) {
    let device = round.ground.device;
    for (name, advice) in
        [("cold", advice::COLD), ("pageout", advice::PAGEOUT), ("collapse", advice::COLLAPSE)]
    {
        round.case(name, |rng| advised(device, rng, advice));
    }
}

fn advised(device: &dyn Device, rng: &mut Rng, advice: i32) -> Checked {
    // Reclaim has nowhere to put anonymous memory otherwise, and is still tried.
    let swap = Swap::new();
    let mut rng_of_child = rng.clone();
    let done = Mapping::new(PAGE, PAGE, Backing::AnonymousShared).doing("mmap")?;
    let mut child = Child::spawn(|parent| {
        let rng = &mut rng_of_child;
        let mut scene = Scene::new(device, rng, Mapping::huge(2 * HUGE).doing("mmap")?)?;
        parent.ready(scene.map.at(0));
        while done.load(0) == 0 {
            scene.under_load(rng, |_| Ok(()))?;
            scene.rewrite(rng)?;
        }
        scene.hole(rng)
    })?;
    let start = child.wait_ready()?;
    let mut result = Ok(());
    for _ in 0..8 {
        let (at, bytes) = match advice {
            advice::COLLAPSE => (rng.index(2) * HUGE, HUGE),
            _ => some_pages(rng, 2 * HUGE),
        };
        result = match process_madvise(child.fd(), start + at as u64, bytes, advice) {
            // As for MADV_COLLAPSE of its own memory: no page, or not at this moment.
            Err(Errno::ENOMEM | Errno::EAGAIN | Errno::EBUSY) => Ok(()),
            // In the guest everybody may.
            Err(Errno::EPERM) if !nix::unistd::geteuid().is_root() => {
                Err(Failure::Skip("only who has CAP_SYS_NICE may".to_owned()))
            }
            other => known(other, "process_madvise with this advice")
                .and_then(|done| require(done <= bytes, || format!("{done} of {bytes} bytes were advised"))),
        };
        if result.is_err() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    done.store(0, 1);
    child.join()?;
    drop(swap);
    result
}
