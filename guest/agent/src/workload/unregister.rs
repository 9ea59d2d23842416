// SPDX-License-Identifier: MIT OR Apache-2.0
//! `unregister`: a context is unbound or its file closed while the address space lives on, in every way there is.
//!
//! Afterwards the process's memory must be as before and every other context of it must still work.

mod held;

use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::mman::MmapAdvise;
use vgpu_spec::uapi;

use super::Round;
use super::access::memory_file;
use super::invalidate::written;
use super::release::{LONG, MEDIUM, Occupied};
use crate::client::{Context, Job};
use crate::device::{Device, DeviceFile};
use crate::memory::{Backing, HUGE, Mapping, PAGE, Pattern, Prot, WINDOW};
use crate::outcome::{Checked, Doing, Failure, describe, require};
use crate::process::{BOUND, Child, close_files_in_vfork, exit_now};
use crate::rng::Rng;

/// Rounds in the default suite.
pub(super) const ROUNDS: u64 = 5;
/// Contexts that go while somebody waits, one after the other: the interrupt for the job that goes with each may come before or after.
const WAITERS: usize = 8;
/// Contexts that go as soon as they have faulted, one after the other.
const PREDECESSORS: usize = 40;
/// Contexts that go while somebody migrates, one after the other.
const MIGRATING: usize = 5;
/// Views of 2 MiB whose rights change meanwhile, with `mmap_lock` held.
const VIEWS: usize = 32;
/// Microseconds for which that lasts, or more.
const LONGEST_CHANGE: u64 = 20_000;
/// Contexts that no device of ours has.
const MOST_CONTEXTS: usize = 256;
/// Binds of the rebind loop.
const REBINDS: usize = 24;

/// One round.
pub(super) fn round(round: &mut Round<'_, '_>) {
    type Body = fn(&dyn Device, &mut Rng) -> Checked;
    let bodies: [(&str, Body); 24] = [
        ("close/idle", |device, rng| close(device, rng, false)),
        ("close/running", |device, rng| close(device, rng, true)),
        ("close/thread", close_from_thread),
        ("close/duplicate", close_duplicates),
        ("close/child", close_in_child),
        ("close/vfork", close_in_vfork),
        ("close/last-in-child", close_last_in_child),
        ("close/exit-race", close_races_exit),
        ("close/any-order", close_in_any_order),
        ("unbind/idle", |device, rng| unbind(device, rng, false)),
        ("unbind/running", |device, rng| unbind(device, rng, true)),
        ("unbind/waiting", unbind_under_waiter),
        ("close/faulting", |device, rng| end_faulting(device, rng, closing)),
        ("unbind/faulting", |device, rng| end_faulting(device, rng, |file| file.unbind())),
        ("unbind/predecessors", unbind_before_another),
        ("close/written", |device, rng| end_written(device, rng, closing)),
        ("unbind/written", |device, rng| end_written(device, rng, |file| file.unbind())),
        ("unbind/migrating", unbind_while_migrating),
        ("close/changing", |device, rng| end_changing(device, rng, closing)),
        ("unbind/changing", |device, rng| end_changing(device, rng, |file| file.unbind())),
        ("bind-inherited", bind_inherited),
        ("rebind", rebind),
        ("unbound", never_bound),
        ("bind-twice", bind_twice),
    ];
    let device = round.ground.device;
    for (name, body) in bodies {
        round.case(name, |rng| body(device, rng));
    }
    // What is certain need not be done again, and it takes all that others may want.
    if round.iteration == 0 {
        round.case("held", |rng| held::held(device, rng));
        round.case("no-context-left", |rng| no_context_left(device, rng));
    }
}

/// A pattern in fresh memory that a device has read and written.
struct Used {
    map: Mapping,
    pattern: Pattern,
}

impl Used {
    fn new(context: &Context, rng: &mut Rng) -> Checked<Self> {
        let map = Mapping::small(WINDOW).doing("mmap")?;
        map.touch(0, WINDOW);
        let used = Self { map, pattern: Pattern { first: rng.next(), step: rng.next() } };
        context.fill(&used.map, 0, WINDOW, used.pattern)?;
        Ok(used)
    }

    /// Sets both queues to reading, the second for long.
    fn read_for_long(&self, context: &Context, rng: &mut Rng) -> Checked {
        for (queue, count) in [(0, MEDIUM), (1, LONG)] {
            context.submit(Job::random_read(self.map.at(0), WINDOW, count, rng.next()).queue(queue))?;
        }
        Ok(())
    }

    fn unharmed(&self, context: &Context) -> Checked {
        context.cpu_check(&self.map, 0, WINDOW, self.pattern)
    }
}

fn close(device: &dyn Device, rng: &mut Rng, running: bool) -> Checked {
    let context = Context::bind(device)?;
    let used = Used::new(&context, rng)?;
    if running {
        used.read_for_long(&context, rng)?;
    }
    context.file().close();
    used.unharmed(&context)?;
    // Nothing of the old context hinders a new one on the same memory.
    let next = Context::bind(device)?;
    next.check(&used.map, 0, WINDOW, used.pattern)
}

/// Closed by one thread while another waits for a job on it.
fn close_from_thread(device: &dyn Device, rng: &mut Rng) -> Checked {
    let context = Context::bind(device)?;
    let used = Used::new(&context, rng)?;
    // Of medium length: the wait holds the file open, so the close takes effect after it.
    let ticket = context.submit(Job::random_read(used.map.at(0), WINDOW, MEDIUM, rng.next()))?;
    let delay = Duration::from_micros(rng.below(1000));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(delay);
            context.file().close();
        });
        bounded_wait(&context, ticket)
    })?;
    used.unharmed(&context)
}

/// A wait under which the file or the context goes away: whatever it says, it must end.
fn bounded_wait(context: &Context, ticket: crate::client::Ticket) -> Checked {
    let began = Instant::now();
    // An error is as good as an answer here.
    let result = context.wait(ticket);
    require(began.elapsed() < BOUND, || match result {
        Ok(done) => format!("the wait took {:?} and ended with {done}", began.elapsed()),
        Err(failure) => format!("the wait took {:?}: {failure}", began.elapsed()),
    })
}

fn close_duplicates(device: &dyn Device, rng: &mut Rng) -> Checked {
    let context = Context::bind(device)?;
    let used = Used::new(&context, rng)?;
    let second = context.duplicate()?;
    used.read_for_long(&context, rng)?;
    context.file().close();
    // The file is still open: nothing was unregistered.
    second.check(&used.map, 0, WINDOW, used.pattern)?;
    drop(second);
    used.unharmed(&context)
}

/// A child that inherited the file may not use it, and its close means nothing to the parent.
fn close_in_child(device: &dyn Device, rng: &mut Rng) -> Checked {
    let context = Context::bind(device)?;
    let used = Used::new(&context, rng)?;
    used.read_for_long(&context, rng)?;
    let mut child = Child::spawn(|parent| {
        // To the child's own memory, at an address at which the parent has some too.
        let job = Job::strided_write(used.map.at(0), 1, 8, !used.pattern.word(0));
        let taken = context.accepts(job);
        parent.ready(u64::from(taken));
        context.file().close();
        used.unharmed(&context)
    })?;
    let taken = child.wait_ready()? != 0;
    child.join()?;
    if taken {
        // It is behind the others.
        context.run(Job::strided_read(used.map.at(0), 1, 8))?.ok()?;
    }
    used.unharmed(&context)?;
    require(!taken, || "a job from another address space was taken".to_owned())?;
    context.check(&used.map, 0, WINDOW, used.pattern)
}

/// A child of vfork() has the parent's memory, and so looks like it; that it closes what it has inherited means nothing to the
/// parent all the same.
fn close_in_vfork(device: &dyn Device, rng: &mut Rng) -> Checked {
    let context = Context::bind(device)?;
    let used = Used::new(&context, rng)?;
    close_files_in_vfork()?;
    context.check(&used.map, 0, WINDOW, used.pattern).doing("when its memory's other user had closed it")?;
    used.read_for_long(&context, rng)?;
    close_files_in_vfork()?;
    context.check(&used.map, 0, WINDOW, used.pattern).doing("the same at work")
}

/// The parent closes first; the child's exit is the last close, from an address space that was never mirrored.
fn close_last_in_child(device: &dyn Device, rng: &mut Rng) -> Checked {
    let context = Context::bind(device)?;
    let used = Used::new(&context, rng)?;
    used.read_for_long(&context, rng)?;
    let mut child = Child::spawn(|parent| {
        parent.ready(0);
        std::thread::sleep(Duration::from_millis(2));
        Ok(())
    })?;
    child.wait_ready()?;
    context.file().close();
    child.join()?;
    used.unharmed(&context)
}

/// A thread closes while the process exits.
fn close_races_exit(device: &dyn Device, rng: &mut Rng) -> Checked {
    let mut child = Child::spawn(|_| {
        let occupied = Occupied::new(device, rng, 3)?;
        occupied.set_running(rng)?;
        let delay = Duration::from_micros(rng.below(200));
        std::thread::scope(|scope| {
            scope.spawn(|| occupied.contexts.iter().for_each(|context| context.file().close()));
            std::thread::sleep(delay);
            exit_now(0)
        })
    })?;
    child.join()
}

fn close_in_any_order(device: &dyn Device, rng: &mut Rng) -> Checked {
    let Occupied { mut contexts, map } = Occupied::new(device, rng, 6)?;
    let pattern = Pattern { first: rng.next(), step: 1 };
    map.fill(0, WINDOW, pattern);
    while !contexts.is_empty() {
        let context = contexts.swap_remove(rng.index(contexts.len()));
        context.submit(Job::random_read(map.at(0), WINDOW, LONG, rng.next()).queue(1))?;
        drop(context);
        for other in &contexts {
            other.check(&map, 0, WINDOW, pattern)?;
        }
    }
    Ok(())
}

fn unbind(device: &dyn Device, rng: &mut Rng, running: bool) -> Checked {
    let context = Context::bind(device)?;
    let used = Used::new(&context, rng)?;
    if running {
        used.read_for_long(&context, rng)?;
    }
    context.file().unbind().doing("unbind")?;
    let state = context.file().query().doing("query")?.state;
    require(state != uapi::STATE_BOUND, || "an unbound context says that it is bound".to_owned())?;
    require(!context.accepts(Job::strided_read(used.map.at(0), 1, 8)), || {
        "a job on an unbound context was taken".to_owned()
    })?;
    match context.file().unbind() {
        Err(Errno::ENXIO) => {}
        other => {
            let found = other.map_or_else(describe, |()| "done".to_owned());
            return Err(Failure::wrong(format!("unbind of the unbound: {found}")));
        }
    }
    used.unharmed(&context)
}

/// UNBIND from one thread while another waits for a job.
fn unbind_under_waiter(device: &dyn Device, rng: &mut Rng) -> Checked {
    for _ in 0..WAITERS {
        let context = Context::bind(device)?;
        let used = Used::new(&context, rng)?;
        let ticket = context.submit(Job::random_read(used.map.at(0), WINDOW, LONG, rng.next()))?;
        let delay = Duration::from_micros(rng.below(1000));
        std::thread::scope(|scope| {
            let unbinder = scope.spawn(|| {
                std::thread::sleep(delay);
                context.file().unbind()
            });
            let waited = bounded_wait(&context, ticket);
            // A panic of the thread would be one of this program; it ends the case as a crash.
            unbinder.join().unwrap_or(Err(Errno::EFAULT)).doing("unbind")?;
            waited
        })?;
        used.unharmed(&context)?;
    }
    Ok(())
}

/// As UNBIND is called.
fn closing(file: &dyn DeviceFile) -> Result<(), Errno> {
    file.close();
    Ok(())
}

/// Ends while its faults are being served, each of which needs page tables that are not there yet.
fn end_faulting(
    device: &dyn Device,
    rng: &mut Rng,
    end: impl Fn(&dyn DeviceFile) -> Result<(), Errno>,
) -> Checked {
    const BLOCKS: usize = 24;
    let context = Context::bind(device)?;
    let map = Mapping::new(BLOCKS * HUGE, HUGE, Backing::Anonymous).doing("mmap")?;
    for queue in 0..2 {
        let half = BLOCKS / 2;
        let start = map.at(queue * half * HUGE);
        context.submit(Job::strided_write(start, half as u64, HUGE, rng.next()).queue(queue as u32))?;
    }
    std::thread::sleep(Duration::from_micros(rng.below(4000)));
    end(context.file()).doing("end")?;
    // Its memory is there still, and another context has it all.
    let next = Context::bind(device)?;
    next.run(Job::strided_write(map.at(0), BLOCKS as u64, HUGE, 7))?.ok()?;
    for block in 0..BLOCKS {
        next.cpu_check(&map, block * HUGE, 8, Pattern { first: 7 + block as u64, step: 0 })?;
    }
    Ok(())
}

/// Contexts that go as soon as they have faulted, each in the place of the one before: the interrupt for the fault may come when the
/// next one is there, and what is answered then is not that one's.
fn unbind_before_another(device: &dyn Device, rng: &mut Rng) -> Checked {
    let map = Mapping::small((1 + PREDECESSORS) * PAGE).doing("mmap")?;
    map.touch(0, PAGE);
    let mut context = Context::bind(device)?;
    for page in 1..=PREDECESSORS {
        context.submit(Job::strided_write(map.at(page * PAGE), 1, 8, rng.next()))?;
        context.file().unbind().doing("unbind")?;
        context = Context::bind(device)?;
        context.check(&map, 0, 8, Pattern::ZERO)?;
    }
    Ok(())
}

/// Ends while another thread takes away and changes what it has mapped.
fn end_changing(
    device: &dyn Device,
    rng: &mut Rng,
    end: impl Fn(&dyn DeviceFile) -> Result<(), Errno>,
) -> Checked {
    let context = Context::bind(device)?;
    let used = Used::new(&context, rng)?;
    let other = Mapping::small(WINDOW).doing("mmap")?;
    other.touch(0, WINDOW);
    context.fill(&other, 0, WINDOW, Pattern::ZERO)?;
    used.read_for_long(&context, rng)?;
    let seed = rng.next();
    let over = AtomicBool::new(false);
    let delay = Duration::from_micros(rng.below(1500));
    std::thread::scope(|scope| {
        let changing = scope.spawn(|| {
            let mut rng = Rng::derived(seed, 0);
            while !over.load(Ordering::Acquire) {
                let at = rng.index(WINDOW / PAGE) * PAGE;
                other.advise(at, PAGE, MmapAdvise::MADV_DONTNEED).doing("madvise")?;
                other.store(at, 1);
            }
            Ok(())
        });
        std::thread::sleep(delay);
        let ended = end(context.file()).doing("end");
        over.store(true, Ordering::Release);
        // A panic of the thread would be one of this program; it ends the case as a crash.
        changing.join().unwrap_or(Ok(())).and(ended)
    })?;
    used.unharmed(&context)
}

/// A file that the parent opened is bound by its child, whose memory has gone its own way since.
fn bind_inherited(device: &dyn Device, rng: &mut Rng) -> Checked {
    let map = Mapping::small(WINDOW).doing("mmap")?;
    let (parents, childs) =
        (Pattern { first: rng.next(), step: 1 }, Pattern { first: rng.next(), step: rng.next() | 1 });
    map.fill(0, WINDOW, parents);
    let file = device.open().doing("open")?;
    let mut child = Child::spawn(|_| {
        map.fill(0, WINDOW, childs);
        let own = Context::on(file.duplicate().doing("dup")?)?;
        own.check(&map, 0, WINDOW, childs).doing("the binder's memory")?;
        own.associate(device)?;
        own.fill(&map, 0, WINDOW, Pattern::ZERO)?;
        own.cpu_check(&map, 0, WINDOW, Pattern::ZERO).doing("the binder's memory")
    })?;
    child.join()?;
    match map.differs(0, WINDOW, parents) {
        None => Ok(()),
        Some((at, found)) => Err(Failure::cpu(0, map.at(at), parents.word(at), found)),
    }
}

/// The device's contexts are used again at once, some while their engines were running.
fn rebind(device: &dyn Device, rng: &mut Rng) -> Checked {
    let map = Mapping::small(WINDOW).doing("mmap")?;
    let pattern = Pattern { first: rng.next(), step: rng.next() };
    map.fill(0, WINDOW, pattern);
    for _ in 0..REBINDS {
        let context = Context::bind(device)?;
        context.check(&map, 0, WINDOW, pattern)?;
        if rng.once_in(2) {
            context.submit(Job::random_read(map.at(0), WINDOW, LONG, rng.next()).queue(1))?;
        }
        if rng.once_in(4) {
            context.file().unbind().doing("unbind")?;
        }
    }
    Ok(())
}

fn never_bound(device: &dyn Device, _: &mut Rng) -> Checked {
    let file = device.open().doing("open")?;
    let state = file.query().doing("query")?.state;
    require(state == 0, || format!("a file that was never bound is in state {state}"))?;
    require(file.unbind() == Err(Errno::ENXIO), || "unbind of the never bound is not ENXIO".to_owned())?;
    let wait = file.wait(0, 1, Duration::ZERO);
    require(wait.is_err(), || "a wait on an unbound file was answered".to_owned())?;
    file.close();
    Ok(())
}

fn bind_twice(device: &dyn Device, rng: &mut Rng) -> Checked {
    let context = Context::bind(device)?;
    require(context.file().bind() == Err(Errno::EBUSY), || "a second bind is not EBUSY".to_owned())?;
    let used = Used::new(&context, rng)?;
    used.unharmed(&context)
}

/// That the device has written must be told when its context ends: the pages are the process's own still.
fn end_written(
    device: &dyn Device,
    rng: &mut Rng,
    end: impl FnOnce(&dyn DeviceFile) -> Result<(), Errno>,
) -> Checked {
    written(device, rng, |context| end(context.file()).doing("end"))
}

/// UNBIND while another thread migrates to the device and back: whatever has been copied, nothing is given to a context that has gone.
///
/// A third thread holds `mmap_lock` for longer than a context takes to go, again and again: so a migration has often been asked for when
/// the context goes, and begins when it has gone.
fn unbind_while_migrating(device: &dyn Device, rng: &mut Rng) -> Checked {
    let views = many_views()?;
    for _ in 0..MIGRATING {
        let context = Context::bind(device)?;
        let used = Used::new(&context, rng)?;
        if context.file().migrate(used.map.at(0), PAGE as u64, true) == Err(Errno::EOPNOTSUPP) {
            return Err(Failure::Skip("the kernel has no device-private memory".to_owned()));
        }
        unbind_one_migrating(&context, &used, &views, Duration::from_micros(rng.below(LONGEST_CHANGE)))?;
        used.unharmed(&context)?;
    }
    Ok(())
}

fn unbind_one_migrating(context: &Context, used: &Used, views: &Mapping, delay: Duration) -> Checked {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let at = used.map.at(0);
        scope.spawn(move || {
            let migrate = |to_device| context.file().migrate(at, WINDOW as u64, to_device).is_ok();
            while migrate(true) && migrate(false) {}
        });
        let changing = scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                for prot in [Prot::Read, Prot::Write] {
                    views.protect(0, views.bytes(), prot).doing("mprotect")?;
                }
            }
            Ok(())
        });
        std::thread::sleep(delay);
        let unbound = context.file().unbind().doing("unbind");
        over.store(true, Ordering::SeqCst);
        changing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        unbound
    })
}

/// Memory whose rights take long to change, and that costs little: the same pages again and again.
fn many_views() -> Checked<Mapping> {
    let file = memory_file(HUGE)?;
    let views = Mapping::reserve(VIEWS * HUGE, HUGE).doing("mmap")?;
    for at in (0..views.bytes()).step_by(HUGE) {
        views.renew(at, HUGE, Prot::Write, Backing::FileShared(file.as_fd(), 0)).doing("mmap")?;
    }
    // A read maps several pages around it.
    (0..views.bytes()).step_by(PAGE).for_each(|at| _ = views.load(at));
    Ok(views)
}

/// More contexts are wanted than the device has: those that there are go on.
fn no_context_left(device: &dyn Device, rng: &mut Rng) -> Checked {
    let first = Context::bind(device)?;
    let used = Used::new(&first, rng)?;
    used.read_for_long(&first, rng)?;
    let mut others = Vec::new();
    while let Some(other) = Context::bind_if_any(device)? {
        others.push(other);
        if others.len() > MOST_CONTEXTS {
            return Err(Failure::Skip("this device has no end of contexts".to_owned()));
        }
    }
    // Asked once more, with all of them there.
    others.extend(Context::bind_if_any(device)?);
    first.check(&used.map, 0, WINDOW, used.pattern).doing("beside all others")?;
    if let Some(last) = others.last() {
        last.check(&used.map, 0, WINDOW, used.pattern).doing("by the last of all")?;
    }
    drop(others);
    first.check(&used.map, 0, WINDOW, used.pattern)
}
