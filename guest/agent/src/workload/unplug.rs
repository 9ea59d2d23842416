// SPDX-License-Identifier: MIT OR Apache-2.0
//! `unplug`: the device is pulled out, without a warning, while files are open and engines run; then it is put back in.
//!
//! Files that were open must answer with an error from then on and close well, memory must be the process's as before, and the
//! driver must find the device again when it is back. The host pulls and puts; what the kernel thinks of it stands on the console.

use std::path::Path;
use std::time::{Duration, Instant};

use guest_protocol::{Message, Wish};
use nix::errno::Errno;
use nix::sys::mman::MmapAdvise;
use vgpu_spec::uapi::DRIVER_DEVICE;

use super::Round;
use super::release::{LONG, Occupied};
use super::removal::{refused, soon_exiting, works};
use crate::client::Job;
use crate::device::Device;
use crate::memory::WINDOW;
use crate::outcome::{Checked, Doing, Failure, require};
use crate::process::{BOUND, Child, Pause};
use crate::report::Sink;
use crate::rng::Rng;

/// Rounds where nobody says how many.
pub(super) const ROUNDS: u64 = 2;

/// One round.
pub(super) fn round(round: &mut Round<'_, '_>) {
    type Body = fn(&dyn Device, &dyn Sink, &mut Rng) -> Checked;
    let bodies: [(&str, Body); 5] = [
        ("idle", |device, host, rng| pulled(device, host, rng, false)),
        ("running", |device, host, rng| pulled(device, host, rng, true)),
        ("waiting", pulled_under_waiter),
        ("exiting", pulled_while_exiting),
        ("changing", pulled_under_changes),
    ];
    let (device, host) = (round.ground.device, round.ground.sink);
    for (name, body) in bodies {
        round.case(name, |rng| {
            if !is_there() {
                return Err(Failure::Skip(format!("there is no {DRIVER_DEVICE}")));
            }
            let result = body(device, host, rng);
            // Whatever came of it, the next case finds a device that works.
            let again = put_back(host).and_then(|()| works(device, rng).doing("after it was put back in"));
            result.and(again)
        });
    }
}

fn ask(host: &dyn Sink, wish: Wish) {
    host.send(&Message::Ask { wish });
}

fn is_there() -> bool {
    Path::new(DRIVER_DEVICE).exists()
}

/// Has the device pulled out, and waits until the driver is rid of it: only then does the function leave sysfs.
fn pull(host: &dyn Sink) -> Checked {
    let name = Path::new(DRIVER_DEVICE).file_name().unwrap_or_default();
    let function = std::fs::canonicalize(Path::new("/sys/class/misc").join(name).join("device"))
        .map_err(|error| Failure::wrong(format!("the device's function: {error}")))?;
    ask(host, Wish::Unplug);
    wait(|| !function.exists() && !is_there(), "the driver still has the device that was pulled out")
}

/// Has it put back in, if it is out, and waits until the driver has it.
fn put_back(host: &dyn Sink) -> Checked {
    if !is_there() {
        ask(host, Wish::Plug);
    }
    // Before the driver gets it the kernel finds it, places its BARs and makes its interrupts.
    wait(is_there, "the driver does not have the device that was put back in")
}

fn wait(so: impl Fn() -> bool, otherwise: &str) -> Checked {
    let until = Instant::now() + 2 * BOUND;
    let mut pause = Pause::default();
    while !so() {
        require(Instant::now() < until, || otherwise.to_owned())?;
        pause.take();
    }
    Ok(())
}

/// Pulled out, with files open that are closed while it is out and after it is back.
fn pulled(device: &dyn Device, host: &dyn Sink, rng: &mut Rng, running: bool) -> Checked {
    let occupied = Occupied::new(device, rng, 6)?;
    if running {
        occupied.set_running(rng)?;
    }
    pull(host)?;
    refused(&occupied, &[Errno::ENODEV])?;
    occupied.map.advise(0, WINDOW / 2, MmapAdvise::MADV_DONTNEED).doing("madvise")?;
    let mut contexts = occupied.contexts;
    contexts.truncate(3);
    put_back(host)?;
    works(device, rng).doing("with files of before still open")?;
    contexts.clear();
    Ok(())
}

/// A thread waits for a job when the device goes.
fn pulled_under_waiter(device: &dyn Device, host: &dyn Sink, rng: &mut Rng) -> Checked {
    let occupied = Occupied::new(device, rng, 2)?;
    let context = &occupied.contexts[0];
    let ticket = context.submit(Job::random_read(occupied.map.at(0), WINDOW, 16 * LONG, rng.next()))?;
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            let began = Instant::now();
            // Refused or done: any answer will do, but soon.
            let _ = context.wait(ticket);
            began.elapsed()
        });
        std::thread::sleep(Duration::from_micros(rng.below(2000)));
        let pulled = pull(host);
        let waited = waiter.join().map_err(|_| Failure::wrong("the waiting thread panicked"))?;
        pulled?;
        require(waited < BOUND, || format!("the wait took {waited:?}"))
    })
}

/// Processes exit, which tears down what they have on the device, while it goes.
fn pulled_while_exiting(device: &dyn Device, host: &dyn Sink, rng: &mut Rng) -> Checked {
    let mut children = soon_exiting(device, rng)?;
    pull(host)?;
    children.iter_mut().try_for_each(Child::join)
}

/// Memory that the device has mapped changes, which the device has to be told of, while it goes.
fn pulled_under_changes(device: &dyn Device, host: &dyn Sink, rng: &mut Rng) -> Checked {
    let occupied = Occupied::new(device, rng, 2)?;
    occupied.set_running(rng)?;
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let changer = scope.spawn(|| {
            let mut longest = Duration::ZERO;
            while !over.load(std::sync::atomic::Ordering::SeqCst) {
                let began = Instant::now();
                occupied.map.advise(0, WINDOW / 2, MmapAdvise::MADV_DONTNEED).doing("madvise")?;
                longest = longest.max(began.elapsed());
                occupied.map.store(0, 1);
            }
            Ok(longest)
        });
        std::thread::sleep(Duration::from_micros(rng.below(5000)));
        let pulled = pull(host);
        over.store(true, std::sync::atomic::Ordering::SeqCst);
        let longest = changer.join().map_err(|_| Failure::wrong("the changing thread panicked"))??;
        pulled?;
        require(longest < BOUND, || format!("taking memory away took {longest:?}"))
    })
}
