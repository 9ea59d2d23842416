// SPDX-License-Identifier: MIT OR Apache-2.0
//! A thread has asked the driver for something and is held when it is about to take a lock, and its context goes meanwhile: what it
//! looked at before it has the lock may not be so any more.
//!
//! It is let go on when the end of the context is at one unlock after the other: what is still there then need not be there after the
//! next.

use std::sync::{Barrier, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::{LOCKING, PATIENCE, at_a_lock, nobody_came};
use crate::client::{Context, Job};
use crate::device::Device;
use crate::gates::{Gates, Hold};
use crate::memory::{Mapping, PAGE, Pattern};
use crate::outcome::{Checked, Doing, Failure, require};
use crate::rng::Rng;
use crate::workload::Round;

/// Locks before which the thread that asks is held, one a case.
const LOCKS: u32 = 2;
/// Its role.
const CALLER: &str = "caller";
/// Role of the one that ends the context.
const ENDER: &str = "ender";
/// Where that is held.
const UNLOCKING: &str = "entry:mutex_unlock";
/// Unlocks of it at the most.
const UNLOCKS: u32 = 40;
/// Pages that the device has.
const PAGES: usize = 16;
/// Accesses of a job that is still at work when it is waited for.
const AT_WORK: u64 = 1 << 20;
/// How long the end gets to come to an unlock. If it does not, it waits for the thread that is held, as it may.
const ENDS: Duration = Duration::from_millis(100);
/// How long the thread that asks gets to come back while the end is held. It may wait for the lock that is to be given back.
const BACK: Duration = Duration::from_millis(6);
/// How often it is looked whether it has.
const LOOK: Duration = Duration::from_millis(1);

/// What is asked for, while UNBIND goes on; whatever the driver says to it is right.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Call {
    Submit,
    /// For a job that is at work.
    Wait,
    /// To the device. On the way back a thread holds pages that the end of the context waits for.
    Migrate,
    /// Once more: only one of both has it to end.
    Unbind,
    /// Twice at once, with no context before: only one of both gets one.
    Bind,
}

const CALLS: [(Call, &str); 5] = [
    (Call::Submit, "submit"),
    (Call::Wait, "wait"),
    (Call::Migrate, "migrate"),
    (Call::Unbind, "unbind"),
    (Call::Bind, "bind"),
];

/// How far the end came before the thread that asked was let go on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Came {
    /// That thread did not come to so many locks.
    NotAsked,
    /// The end waited for it.
    Waits,
    /// To the unlock.
    Unlock,
    /// Past the last.
    Over,
}

/// Where both are held.
struct Holds<'a> {
    gates: Gates<'a>,
    caller: Hold<'a>,
    ender: Hold<'a>,
}

impl Holds<'_> {
    fn open(&self) -> Checked {
        self.caller.open().and(self.ender.open())
    }
}

/// The cases of a round.
pub(super) fn round(round: &mut Round<'_, '_>) {
    let holds = hold_both(round.gates());
    for (call, name) in CALLS {
        for lock in 0..LOCKS {
            let device = round.device();
            round.case(&format!("asking-{}/{name}", lock + 1), |rng| match &holds {
                Ok(Some(holds)) => case(device, holds, call, lock, rng),
                Ok(None) => Err(Failure::Skip(format!("nobody can be held at {LOCKING} here"))),
                Err(failure) => Err(failure.clone()),
            });
        }
    }
}

fn hold_both(gates: Gates<'_>) -> Checked<Option<Holds<'_>>> {
    let held = at_a_lock(|locking| gates.hold_two((locking, CALLER), (UNLOCKING, ENDER)))?;
    Ok(held.map(|(caller, ender)| Holds { gates, caller, ender }))
}

fn case(device: &dyn Device, holds: &Holds<'_>, call: Call, lock: u32, rng: &mut Rng) -> Checked {
    let map = Mapping::small(PAGES * PAGE).doing("mmap")?;
    let pattern = Pattern { first: rng.next(), step: rng.next() | 1 };
    map.fill(0, map.bytes(), pattern);
    // Beside those that go.
    let stays = Context::bind(device)?;
    let mut came = Came::NotAsked;
    for unlock in 0..UNLOCKS {
        let once = if call == Call::Bind {
            both_bind(device, holds, (lock, unlock))
        } else {
            ask_at_end(device, holds, &map, call, (lock, unlock))
        };
        // Whatever happened, nobody is to be held when the next begins.
        holds.open()?;
        match once? {
            Came::NotAsked if came == Came::NotAsked => return Err(nobody_came()),
            // Now and then it is faster.
            Came::NotAsked => {}
            now => came = now,
        }
        if matches!(came, Came::Waits | Came::Over) {
            break;
        }
    }
    stays.cpu_check(&map, 0, map.bytes(), pattern)?;
    stays.check(&map, 0, map.bytes(), pattern)?;
    // Who has the place of those that went is left alone.
    Context::bind(device)?.check(&map, 0, map.bytes(), pattern)
}

/// A context is asked for something, and ends.
fn ask_at_end(
    device: &dyn Device,
    holds: &Holds<'_>,
    map: &Mapping,
    call: Call,
    at: (u32, u32),
) -> Checked<Came> {
    let context = Context::bind(device)?;
    let at_work = match call {
        Call::Wait => Some(context.submit(Job::random_read(map.at(0), map.bytes(), AT_WORK, 1))?),
        _ => None,
    };
    let ask = || match call {
        Call::Submit => drop(context.try_submit(Job::strided_read(map.at(0), 1, 8))),
        Call::Wait => drop(at_work.map(|job| context.wait(job))),
        Call::Migrate => drop(context.file().migrate(map.at(0), map.bytes() as u64, true)),
        Call::Unbind | Call::Bind => drop(context.file().unbind()),
    };
    let end = || match context.file().unbind() {
        // The other one has done it.
        Err(Errno::ENXIO) if call == Call::Unbind => Ok(()),
        other => other.doing("unbind"),
    };
    meanwhile(holds, at, &ask, &end)
}

/// A file is asked for a context by two threads.
fn both_bind(device: &dyn Device, holds: &Holds<'_>, at: (u32, u32)) -> Checked<Came> {
    let file = device.open().doing("open")?;
    let bound = Mutex::new(Vec::new());
    let bind = || match file.bind() {
        Ok(handle) => {
            bound.lock().unwrap_or_else(PoisonError::into_inner).push(handle);
            Ok(())
        }
        Err(Errno::EBUSY) => Ok(()),
        Err(errno) => Err(errno).doing("bind"),
    };
    let came = meanwhile(holds, at, &|| drop(bind()), &bind)?;
    let bound = bound.into_inner().unwrap_or_else(PoisonError::into_inner);
    for handle in &bound {
        device.associate(*handle).doing("associate")?;
    }
    file.unbind().doing("unbind")?;
    require(bound.len() == 1, || format!("{} of two BINDs on one file were done", bound.len()))?;
    Ok(came)
}

/// One thread asks and is held before its lock of a number; it is let go on when the one that ends is at its unlock of a number.
fn meanwhile(
    holds: &Holds<'_>,
    (lock, unlock): (u32, u32),
    ask: &(dyn Fn() + Sync),
    end: &(dyn Fn() -> Checked + Sync),
) -> Checked<Came> {
    // Threads that come into being take locks of their own.
    let (ready, go) = (Barrier::new(3), Barrier::new(2));
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let named = holds.gates.role(CALLER);
            ready.wait();
            ready.wait();
            ask();
            named.and(holds.gates.role(""))
        });
        let ending = scope.spawn(|| {
            let named = holds.gates.role(ENDER);
            ready.wait();
            ready.wait();
            go.wait();
            let ended = end();
            named.and(ended).and(holds.gates.role(""))
        });
        ready.wait();
        let caller = holds.caller.close_behind(lock);
        let ender = holds.ender.close_behind(unlock);
        ready.wait();
        let asked = caller.and_then(|behind| behind.wait(PATIENCE, &|| asking.is_finished()));
        go.wait();
        let came = match (asked, ender) {
            (Ok(true), Ok(ender)) => ender.wait(ENDS, &|| ending.is_finished()).map(|came| {
                if came {
                    Came::Unlock
                } else if ending.is_finished() {
                    Came::Over
                } else {
                    Came::Waits
                }
            }),
            (Ok(false), Ok(_)) => Ok(Came::NotAsked),
            (Err(failure), _) | (_, Err(failure)) => Err(failure),
        };
        let mut opened = holds.caller.open();
        let until = Instant::now() + BACK;
        while !asking.is_finished() && Instant::now() < until {
            std::thread::sleep(LOOK);
        }
        opened = opened.and(holds.ender.open());
        let asked = asking.join().unwrap_or_else(|_| Err(Failure::wrong("the thread that asks panicked")));
        let ended = ending.join().unwrap_or_else(|_| Err(Failure::wrong("the thread that ends panicked")));
        opened.and(asked).and(ended).and(came)
    })
}
