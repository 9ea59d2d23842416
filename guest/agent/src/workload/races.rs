// SPDX-License-Identifier: MIT OR Apache-2.0
//! `races`: memory is taken away at the moment at which that is hardest for a driver, made certain by holding a task there: a fault handler
//! that has found a page and not yet mapped it, and an invalidation of which the driver has been told and which has not yet
//! come to the page.
//!
//! Both are returns of the kernel's functions, so that nothing of the driver need be known. A third moment is the one in which a
//! fault handler, with what it has found, is about to take a lock: one that has asked before whether it may still map that asks in
//! vain; so does whoever has asked for something while its context goes ([`asking`]). A fourth is the one in which the handler makes
//! the page known to the device's bus, as most do when they have asked and hold the lock: a callback that does not wait for it comes
//! too early. Where the kernel cannot hold tasks, or a driver comes to none of them, the cases are skipped.

mod asking;

use std::cell::Cell;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::mman::MmapAdvise;
use nix::unistd::ftruncate;

use crate::client::{Context, Job, Ticket};
use crate::device::Device;
use crate::gates::{Gates, Hold};
use crate::memory::{Backing, HUGE, Mapping, PAGE, Pattern};
use crate::outcome::{Checked, Doing, Failure};
use crate::rng::Rng;

use super::Round;
use super::access::memory_file;
use super::migrate::{To, migrate_all};

/// Rounds in the default suite.
pub(super) const ROUNDS: u64 = 2;
/// How long a task gets to come to where it is held.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often nobody comes there before it is taken that nobody ever does.
const ABSENT: usize = 2;
/// How long a handler gets to map what it should not while an invalidation is held.
const TEMPTATION: Duration = Duration::from_millis(20);
/// Pages that are taken, so that what was freed does not come back to where it was.
const TAKEN: usize = 96;
/// Pages of a small mapping: as many as are mapped around a fault.
const PAGES: usize = 64;

/// Role of the thread that takes memory away.
const DROPPER: &str = "dropper";

/// Role of whoever has come back from there.
const HANDLER: &str = "handler";
/// Where a fault handler has found its page.
const FOUND: &str = "return:hmm_range_fault";
/// Locks on a handler's way before which it is held, one a case.
const LOCKS: usize = 3;
/// Where it takes one.
const LOCKING: &str = "entry:mutex_lock";
/// The same in a kernel that proves its locks.
const LOCKING_PROVEN: &str = "entry:mutex_lock_nested";
/// Where the kernel gives a page an address for a device.
const MAPPING: &str = "entry:dma_map_page_attrs";
/// How long a handler gets to come to another place, in times of what it took to come to the first: often it never does.
const NEXT: u32 = 8;
/// The same, at the least and at the most.
const NEXT_BOUNDS: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(500));

/// A moment at which tasks are held, and what is tried there.
struct Moment {
    name: &'static str,
    play: Play,
    drops: &'static [(Drop, &'static str)],
    /// How often each is tried; the play is told the how-manieth time it is.
    times: usize,
}

/// Where tasks are held, who is, and what for.
struct Place {
    at: &'static str,
    whom: &'static str,
    moments: &'static [Moment],
}

/// How a moment is made and used; the number says before which of its locks a handler is held.
type Play = fn(&Scene, usize, Gates<'_>, &Hold<'_>, &mut Rng) -> Checked;

/// What takes the memory away. All of these can go on while somebody holds the mmap lock for read, as a fault handler does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Drop {
    DontNeed,
    /// All of the mapping, of which other cases drop a few pages.
    DontNeedAll,
    DontNeedHuge,
    PunchHole,
    Truncate,
    /// As PunchHole, of the only page of a file that is mapped as if it had more.
    PunchHoleOfOne,
}

const DROPS: [(Drop, &str); 4] = [
    (Drop::DontNeed, "dontneed/4k"),
    (Drop::DontNeedHuge, "dontneed/thp"),
    (Drop::PunchHole, "punch-hole/file"),
    (Drop::Truncate, "truncate/file"),
];

/// What can be on the device.
const MOVABLE: [(Drop, &str); 2] =
    [(Drop::DontNeed, "dontneed/4k"), (Drop::DontNeedAll, "dontneed/with-neighbours")];
/// Where a driver that asks for more than the page of the fault is refused, and has to ask again.
const REFUSED: [(Drop, &str); 1] = [(Drop::PunchHoleOfOne, "punch-hole/last-page")];

const PLACES: [Place; 4] = [
    Place {
        at: FOUND,
        whom: "",
        moments: &[
            Moment { name: "found", play: found, drops: &DROPS, times: 1 },
            Moment { name: "found-again", play: found_again, drops: &DROPS, times: 1 },
            Moment { name: "found-on-device", play: found_on_device, drops: &MOVABLE, times: 1 },
            Moment { name: "found-at-last", play: found_at_last, drops: &REFUSED, times: 1 },
        ],
    },
    Place {
        at: LOCKING,
        whom: HANDLER,
        moments: &[
            Moment { name: "locking", play: locking, drops: &DROPS, times: LOCKS },
            Moment { name: "locking-on-device", play: locking_on_device, drops: &MOVABLE, times: LOCKS },
        ],
    },
    Place {
        at: MAPPING,
        whom: HANDLER,
        moments: &[Moment { name: "mapping", play: mapping, drops: &DROPS, times: 1 }],
    },
    Place {
        at: "return:__mmu_notifier_invalidate_range_start",
        whom: DROPPER,
        moments: &[Moment { name: "told", play: told, drops: &DROPS, times: 1 }],
    },
];

/// Memory of which a part goes.
struct Scene {
    context: Context,
    map: Mapping,
    file: Option<OwnedFd>,
    drop: Drop,
    /// Offset and bytes of what goes, and the offset in it that the device accesses meanwhile.
    hole: (usize, usize),
    access: usize,
}

/// The cases of a round.
pub(super) fn round(round: &mut Round<'_, '_>) {
    for place in &PLACES {
        // What is certain need not be done twice, where others depend on chance.
        if place.at == MAPPING && round.iteration > 0 {
            continue;
        }
        // Once for all of them: hooking a function, and unhooking it, takes the kernel a while.
        let hold = hold_at(round.gates(), place);
        for moment in place.moments {
            play_moment(round, place.at, moment, &hold);
        }
    }
    if round.iteration == 0 {
        asking::round(round);
    }
}

fn hold_at<'a>(gates: Gates<'a>, place: &Place) -> Checked<Option<Hold<'a>>> {
    if place.whom != HANDLER {
        return gates.hold(place.at, place.whom);
    }
    let hold = |at: &str| gates.hold_after(FOUND, at, HANDLER);
    if place.at == LOCKING { at_a_lock(hold) } else { hold(place.at) }
}

/// Holds at a lock, by whichever name this kernel has for taking one.
fn at_a_lock<T>(hold: impl Fn(&str) -> Checked<Option<T>>) -> Checked<Option<T>> {
    match hold(LOCKING)? {
        None => hold(LOCKING_PROVEN),
        held => Ok(held),
    }
}

fn play_moment(round: &mut Round<'_, '_>, at: &str, moment: &Moment, hold: &Checked<Option<Hold<'_>>>) {
    let (device, gates) = (round.device(), round.gates());
    let absent = Cell::new(0);
    for (lock, &(drop, name)) in
        (0..moment.times).flat_map(|lock| moment.drops.iter().map(move |drop| (lock, drop)))
    {
        let number = if moment.times > 1 { format!("-{}", lock + 1) } else { String::new() };
        round.case(&format!("{}{number}/{name}", moment.name), |rng| {
            let hold = match hold {
                Ok(Some(hold)) => hold,
                Ok(None) => return Err(Failure::Skip(format!("nobody can be held at {at} here"))),
                Err(failure) => return Err(failure.clone()),
            };
            // Each that is waited for in vain takes long.
            if absent.get() >= ABSENT {
                return Err(nobody_came());
            }
            let scene = Scene::new(device, drop, rng)?;
            let played = (moment.play)(&scene, lock, gates, hold, rng);
            // Whatever happened, nobody is to be held when the next case prepares.
            hold.open()?;
            absent.set(if matches!(played, Err(Failure::Skip(_))) { absent.get() + 1 } else { 0 });
            played
        });
    }
}

impl Scene {
    fn new(device: &dyn Device, drop: Drop, rng: &mut Rng) -> Checked<Self> {
        let bytes = match drop {
            Drop::DontNeedHuge => HUGE,
            Drop::PunchHoleOfOne => 4 * PAGE,
            _ => PAGES * PAGE,
        };
        let file = match drop {
            Drop::PunchHole | Drop::Truncate => Some(memory_file(bytes)?),
            Drop::PunchHoleOfOne => Some(memory_file(PAGE)?),
            Drop::DontNeed | Drop::DontNeedAll | Drop::DontNeedHuge => None,
        };
        let map = match &file {
            Some(file) => Mapping::new(bytes, PAGE, Backing::FileShared(file.as_fd(), 0)),
            None if drop == Drop::DontNeedHuge => Mapping::huge(bytes),
            None => Mapping::small(bytes),
        }
        .doing("mmap")?;
        let context = Context::bind(device)?;
        let pages = bytes / PAGE;
        let first = if drop == Drop::PunchHoleOfOne { 0 } else { rng.index(pages) };
        let hole = match drop {
            Drop::DontNeedHuge if rng.once_in(2) => (0, bytes),
            Drop::DontNeedAll => (0, bytes),
            Drop::Truncate => (first * PAGE, bytes - first * PAGE),
            Drop::PunchHoleOfOne => (0, PAGE),
            _ => (first * PAGE, (1 + rng.index((pages - first).min(8))) * PAGE),
        };
        let access = hole.0 + rng.index(hole.1 / PAGE) * PAGE;
        Ok(Self { context, map, file, drop, hole, access })
    }

    /// A job that reads or writes one word in the hole; or all of two pages, of which there is but one.
    fn submit(&self, rng: &mut Rng) -> Checked<Ticket> {
        let at = self.map.at(self.access);
        let pattern = Pattern { first: rng.next(), step: 1 };
        let job = if self.drop == Drop::PunchHoleOfOne {
            if rng.once_in(2) { Job::fill(at, 2 * PAGE, pattern) } else { Job::check(at, 2 * PAGE, pattern) }
        } else if rng.once_in(2) {
            Job::strided_write(at, 1, 8, rng.next())
        } else {
            Job::strided_read(at, 1, 8)
        };
        self.context.submit(job)
    }

    fn apply(&self) -> Checked {
        let (at, bytes) = self.hole;
        let file = || self.file.as_ref().ok_or_else(|| Failure::wrong("the scene has no file"));
        match self.drop {
            Drop::DontNeed | Drop::DontNeedAll | Drop::DontNeedHuge => {
                self.map.advise(at, bytes, MmapAdvise::MADV_DONTNEED).doing("madvise")
            }
            Drop::PunchHole | Drop::PunchHoleOfOne => {
                let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                fallocate(file()?, mode, at as i64, bytes as i64).doing("fallocate")
            }
            Drop::Truncate => ftruncate(file()?, at as i64).doing("ftruncate"),
        }
    }

    /// What goes is there, and the device has read it.
    fn seen(&self) -> Checked {
        let (at, bytes) = self.hole;
        self.map.touch(at, bytes);
        self.context.run(Job::strided_read(self.map.at(at), (bytes / PAGE) as u64, PAGE))?.ok().map(drop)
    }

    /// What goes is on the device, or of all that goes the page that is accessed.
    fn move_to_device(&self) -> Checked {
        let (at, bytes) = if self.drop == Drop::DontNeedAll { (self.access, PAGE) } else { self.hole };
        migrate_all(&self.context, &self.map, at, bytes, To::Device)
    }

    /// The job ended as it may: what it was about may have gone before it came.
    fn ended(&self, ticket: Ticket) -> Checked {
        let done = self.context.wait(ticket)?;
        match self.drop {
            Drop::Truncate => done.ok_or_fault(),
            Drop::PunchHoleOfOne => return done.faulted_at(self.map.at(PAGE)).doing("behind the only page"),
            _ => done.ok(),
        }
        .map(|_| ())
    }

    /// What the device has there now is what the CPU has.
    fn judge(&self, rng: &mut Rng) -> Checked {
        let (context, map) = (&self.context, &self.map);
        // What has just been freed is the first to be given out again, and a page that comes back to its place is none that was missed.
        let taken = Mapping::small(TAKEN * PAGE).doing("mmap")?;
        taken.touch(0, taken.bytes());
        if self.drop == Drop::Truncate {
            context.must_not_reach(map, self.access).doing("behind the end of the file")?;
            ftruncate(self.file.as_ref().ok_or_else(|| Failure::wrong("no file"))?, map.bytes() as i64)
                .doing("ftruncate")?;
        }
        for page in [self.access, self.hole.0, self.hole.0 + self.hole.1 - PAGE] {
            // The CPU writes first, so that there is a page, and another than before.
            let by_cpu = Pattern { first: rng.next(), step: rng.next() | 1 };
            map.fill(page, PAGE, by_cpu);
            context.check(map, page, PAGE, by_cpu).doing("written by the CPU after the drop")?;
            let by_device = Pattern { first: rng.next(), step: rng.next() | 1 };
            context.fill(map, page, PAGE, by_device)?;
            context.cpu_check(map, page, PAGE, by_device).doing("written by the device after the drop")?;
        }
        Ok(())
    }
}

fn nobody_came() -> Failure {
    Failure::Skip("this driver does not come there".to_owned())
}

/// A job is submitted, its handler held, if it comes, and something done meanwhile; then all goes on, and the memory is judged.
///
/// What is done meanwhile is told whether it came, and how long to wait for it at the next place.
fn while_held(
    scene: &Scene,
    hold: &Hold<'_>,
    rng: &mut Rng,
    act: impl FnOnce(Option<Duration>) -> Checked,
) -> Checked {
    hold.close()?;
    let began = Instant::now();
    let ticket = scene.submit(rng)?;
    let came = hold.wait(PATIENCE)?;
    let next = (began.elapsed() * NEXT).clamp(NEXT_BOUNDS.0, NEXT_BOUNDS.1);
    let acted = act(came.then_some(next));
    hold.open()?;
    acted?;
    scene.ended(ticket)?;
    if !came {
        return Err(nobody_came());
    }
    scene.judge(rng)
}

/// The fault handler is held with what `hmm_range_fault()` has found for it, and the memory goes.
fn found(scene: &Scene, _: usize, _: Gates<'_>, hold: &Hold<'_>, rng: &mut Rng) -> Checked {
    let (at, bytes) = scene.hole;
    scene.map.touch(at, bytes);
    while_held(scene, hold, rng, |came| if came.is_some() { scene.apply() } else { Ok(()) })
}

/// The same, and once more when it has come back with what it has found then: that a driver has looked again once is no reason to
/// map what it found at last.
fn found_again(scene: &Scene, _: usize, _: Gates<'_>, hold: &Hold<'_>, rng: &mut Rng) -> Checked {
    let (at, bytes) = scene.hole;
    scene.map.touch(at, bytes);
    while_held(scene, hold, rng, |came| {
        let Some(next) = came else { return Ok(()) };
        scene.apply()?;
        if hold.admit(next)? { scene.apply() } else { Ok(()) }
    })
}

/// What the fault handler has found is a page that is on the device; it goes as any other does.
fn found_on_device(scene: &Scene, _: usize, _: Gates<'_>, hold: &Hold<'_>, rng: &mut Rng) -> Checked {
    let (at, bytes) = scene.hole;
    scene.map.touch(at, bytes);
    scene.move_to_device()?;
    while_held(scene, hold, rng, |came| if came.is_some() { scene.apply() } else { Ok(()) })
}

/// The fault handler was refused what it asked for, since not all of it is there, and is held with what it has found when it has asked for
/// less.
fn found_at_last(scene: &Scene, _: usize, _: Gates<'_>, hold: &Hold<'_>, rng: &mut Rng) -> Checked {
    let (at, bytes) = scene.hole;
    scene.map.touch(at, bytes);
    while_held(scene, hold, rng, |came| match came {
        Some(next) if hold.admit(next)? => scene.apply(),
        _ => Ok(()),
    })
}

/// The fault handler has found its page and is held when it is about to take a lock, the first or one of the next; the memory
/// goes.
fn locking(scene: &Scene, lock: usize, _: Gates<'_>, hold: &Hold<'_>, rng: &mut Rng) -> Checked {
    let (at, bytes) = scene.hole;
    // It has its tables already, for making them takes locks too.
    scene.seen()?;
    scene.map.advise(at, bytes, MmapAdvise::MADV_DONTNEED).doing("madvise")?;
    scene.map.touch(at, bytes);
    before_lock(scene, lock, hold, rng)
}

/// The same with a page that is on the device.
fn locking_on_device(scene: &Scene, lock: usize, _: Gates<'_>, hold: &Hold<'_>, rng: &mut Rng) -> Checked {
    scene.seen()?;
    scene.move_to_device()?;
    before_lock(scene, lock, hold, rng)
}

/// The handler is held before this lock of its, if it comes to so many, and the memory goes.
fn before_lock(scene: &Scene, lock: usize, hold: &Hold<'_>, rng: &mut Rng) -> Checked {
    while_held(scene, hold, rng, |mut came| {
        for _ in 0..lock {
            came = match came {
                Some(next) if hold.admit(next)? => Some(next),
                _ => None,
            };
        }
        scene.apply()
    })
}

/// The fault handler is held when it is about to map its page, the first that the context has; the memory goes meanwhile, if
/// the driver lets it.
fn mapping(scene: &Scene, _: usize, _: Gates<'_>, hold: &Hold<'_>, rng: &mut Rng) -> Checked {
    // No more than this page: the handler is held for each that it maps.
    scene.map.touch(scene.access, PAGE);
    // A thread that comes into being has invalidations of its own, which would wait for the handler.
    let both = Barrier::new(2);
    let (came, ticket) = std::thread::scope(|scope| {
        let dropping = scope.spawn(|| {
            both.wait();
            both.wait();
            scene.apply()
        });
        both.wait();
        let ticket = hold.close().and_then(|()| scene.submit(rng));
        let came = hold.wait(PATIENCE);
        both.wait();
        std::thread::sleep(TEMPTATION);
        let opened = hold.open();
        let dropped =
            dropping.join().unwrap_or_else(|_| Err(Failure::wrong("the thread that drops memory panicked")));
        opened.and(dropped).and(came.and_then(|came| Ok((came, ticket?))))
    })?;
    scene.ended(ticket)?;
    if !came {
        return Err(nobody_came());
    }
    scene.judge(rng)
}

/// Whoever drops the memory is held when the driver has been told, and the device accesses it.
fn told(scene: &Scene, _: usize, gates: Gates<'_>, hold: &Hold<'_>, rng: &mut Rng) -> Checked {
    scene.seen()?;
    // A thread that comes into being has invalidations of its own.
    let ready = Barrier::new(2);
    let (came, ticket) = std::thread::scope(|scope| {
        let dropping = scope.spawn(|| {
            let named = gates.role(DROPPER);
            ready.wait();
            named.and(scene.apply())
        });
        let closed = hold.close();
        ready.wait();
        let came = hold.wait(PATIENCE);
        let ticket = if matches!(came, Ok(true)) { scene.submit(rng).map(Some) } else { Ok(None) };
        std::thread::sleep(TEMPTATION);
        let opened = hold.open();
        let dropped =
            dropping.join().unwrap_or_else(|_| Err(Failure::wrong("the thread that drops memory panicked")));
        closed.and(opened).and(dropped).and(came.and_then(|came| Ok((came, ticket?))))
    })?;
    if let Some(ticket) = ticket {
        scene.ended(ticket)?;
    }
    if !came {
        return Err(nobody_came());
    }
    scene.judge(rng)
}
