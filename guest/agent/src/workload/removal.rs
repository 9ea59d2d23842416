// SPDX-License-Identifier: MIT OR Apache-2.0
//! `removal`: the device is taken from the driver, or reset, while files are open and engines run.
//!
//! Files that were open must answer with an error from then on and close well, memory must be the process's as before, and when
//! the driver has the device again it must work. What the kernel thinks of all that is read from the console.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::Signal;
use vgpu_spec::uapi::{DRIVER_DEVICE, POISON};

use super::Round;
use super::migrate::Placed;
use super::release::{LONG, Occupied};
use crate::boot::wait_for_node;
use crate::client::{Context, Job};
use crate::device::Device;
use crate::memory::{Backing, Mapping, PAGE, Pattern, WINDOW};
use crate::outcome::{Checked, Doing, Failure, describe, require};
use crate::process::{BOUND, Child, Pause, exit_now};
use crate::rng::Rng;

/// Rounds where nobody says how many.
pub(super) const ROUNDS: u64 = 2;

/// One round.
pub(super) fn round(round: &mut Round<'_, '_>) {
    type Body = fn(&dyn Device, &Function, &mut Rng) -> Checked;
    let bodies: [(&str, Body); 8] = [
        ("unbind/idle", |device, function, rng| unbind(device, function, rng, false)),
        ("unbind/running", |device, function, rng| unbind(device, function, rng, true)),
        ("unbind/waiting", unbind_under_waiter),
        ("unbind/exiting", unbind_while_exiting),
        ("reset/idle", |device, function, rng| reset(device, function, rng, false)),
        ("reset/running", |device, function, rng| reset(device, function, rng, true)),
        ("unbind/device-memory", |device, function, rng| device_memory(device, rng, || function.unbind())),
        ("reset/device-memory", |device, function, rng| device_memory(device, rng, || function.reset())),
    ];
    let device = round.ground.device;
    let mut bodies = bodies.to_vec();
    // Waits until the driver gives the device up, which takes it ten seconds.
    if round.iteration == 0 {
        bodies.push(("lost/device-memory", lost));
    }
    for (name, body) in bodies {
        round.case(name, |rng| {
            let function = Function::find()?;
            let result = body(device, &function, rng);
            // Whatever came of it, the next case finds a device that works.
            let again =
                function.rebind().and_then(|()| works(device, rng).doing("after the driver has it again"));
            result.and(again)
        });
    }
}

/// The PCI function behind the device node, in sysfs.
struct Function {
    device: PathBuf,
    driver: PathBuf,
    address: String,
}

fn write(path: &Path, text: &str) -> Checked {
    std::fs::write(path, text).map_err(|error| Failure::wrong(format!("{}: {error}", path.display())))
}

impl Function {
    fn find() -> Checked<Self> {
        let name = Path::new(DRIVER_DEVICE).file_name().unwrap_or_default();
        let node = Path::new("/sys/class/misc").join(name).join("device");
        let resolve = |path: &Path| {
            std::fs::canonicalize(path).map_err(|error| Failure::Skip(format!("{}: {error}", path.display())))
        };
        let device = resolve(&node)?;
        let driver = resolve(&device.join("driver"))?;
        let address = device.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { device, driver, address })
    }

    fn bound(&self) -> bool {
        self.device.join("driver").exists()
    }

    fn unbind(&self) -> Checked {
        write(&self.driver.join("unbind"), &self.address)
    }

    /// Takes the device from the driver, if it has it, and gives it back.
    fn rebind(&self) -> Checked {
        if self.bound() {
            self.unbind()?;
        }
        write(&self.driver.join("bind"), &self.address)?;
        wait_for_node(DRIVER_DEVICE)
    }

    /// Takes its access to memory from the device behind the driver's back: it answers no more commands.
    fn cut_off(&self) -> Checked {
        const COMMAND: u64 = 4;
        const MASTER: u8 = 1 << 2;
        let path = self.device.join("config");
        let cut = || {
            let file = std::fs::File::options().read(true).write(true).open(&path)?;
            let mut command = [0];
            file.read_exact_at(&mut command, COMMAND)?;
            file.write_all_at(&[command[0] & !MASTER], COMMAND)
        };
        cut().map_err(|error| Failure::wrong(format!("{}: {error}", path.display())))
    }

    fn reset(&self) -> Checked {
        let path = self.device.join("reset");
        if !path.exists() {
            return Err(Failure::Skip("the function cannot be reset".to_owned()));
        }
        write(&path, "1")
    }
}

/// The device does what it should.
pub(super) fn works(device: &dyn Device, rng: &mut Rng) -> Checked {
    let context = Context::bind(device)?;
    let map = Mapping::small(WINDOW).doing("mmap")?;
    let pattern = Pattern { first: rng.next(), step: rng.next() };
    context.fill(&map, 0, WINDOW, pattern)?;
    context.cpu_check(&map, 0, WINDOW, pattern)
}

/// An open file of a device that is gone answers everything with an error, at once, and memory is as it was.
pub(super) fn refused(occupied: &Occupied, allowed: &[Errno]) -> Checked {
    let began = Instant::now();
    for context in &occupied.contexts {
        let file = context.file();
        let submitted = file.submit(&Job::strided_read(occupied.map.at(0), 1, 8).raw());
        let waited = file.wait(0, 1, BOUND).map(|_| 0);
        let bound = file.bind();
        // A job that ended before may still be asked about.
        for (what, result) in [("submit", submitted), ("bind", bound)] {
            match result {
                Err(errno) if allowed.contains(&errno) => {}
                Err(errno) => {
                    return Err(Failure::wrong(format!(
                        "{what} of a device that is gone: {}",
                        describe(errno)
                    )));
                }
                Ok(_) => return Err(Failure::wrong(format!("{what} of a device that is gone is taken"))),
            }
        }
        require(!matches!(waited, Err(Errno::ETIME)), || {
            "a wait for a device that is gone lasts to its time limit".to_owned()
        })?;
    }
    require(began.elapsed() < BOUND, || format!("the answers took {:?}", began.elapsed()))?;
    // Each word can be read; what the device has written of a job that was cut off is nobody's business.
    (0..WINDOW).step_by(8).for_each(|at| {
        occupied.map.load(at);
    });
    Ok(())
}

/// Taken away through sysfs.
fn unbind(device: &dyn Device, function: &Function, rng: &mut Rng, running: bool) -> Checked {
    let occupied = Occupied::new(device, rng, 6)?;
    if running {
        occupied.set_running(rng)?;
    }
    function.unbind()?;
    refused(&occupied, &[Errno::ENODEV])?;
    // Closed before the driver has the device again, and after.
    let mut contexts = occupied.contexts;
    contexts.truncate(3);
    function.rebind()?;
    works(device, rng).doing("with files of before still open")?;
    contexts.clear();
    Ok(())
}

/// A thread waits for a job when the device goes.
fn unbind_under_waiter(device: &dyn Device, function: &Function, rng: &mut Rng) -> Checked {
    let occupied = Occupied::new(device, rng, 2)?;
    let context = &occupied.contexts[0];
    let ticket = context.submit(Job::random_read(occupied.map.at(0), WINDOW, 16 * LONG, rng.next()))?;
    let delay = Duration::from_micros(rng.below(2000));
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            let began = Instant::now();
            // Killed, refused or done: any answer will do, but soon.
            let _ = context.wait(ticket);
            began.elapsed()
        });
        std::thread::sleep(delay);
        let unbound = function.unbind();
        let waited = waiter.join().map_err(|_| Failure::wrong("the waiting thread panicked"))?;
        unbound?;
        require(waited < BOUND, || format!("the wait took {waited:?}"))
    })
}

/// Processes with the device at work for them that exit within milliseconds.
pub(super) fn soon_exiting(device: &dyn Device, rng: &mut Rng) -> Checked<Vec<Child>> {
    let mut children = Vec::new();
    for _ in 0..4 {
        let delay = Duration::from_micros(rng.below(3000));
        let mut child = Child::spawn(|parent| {
            let occupied = Occupied::new(device, rng, 3)?;
            occupied.set_running(rng)?;
            parent.ready(0);
            std::thread::sleep(delay);
            exit_now(0)
        })?;
        child.wait_ready()?;
        children.push(child);
    }
    Ok(children)
}

/// Processes exit while the device goes.
fn unbind_while_exiting(device: &dyn Device, function: &Function, rng: &mut Rng) -> Checked {
    let mut children = soon_exiting(device, rng)?;
    function.unbind()?;
    children.iter_mut().try_for_each(Child::join)
}

/// The device goes, or forgets all it was told, while pages of the process are in its memory: they must have come home before.
fn device_memory(device: &dyn Device, rng: &mut Rng, goes: impl FnOnce() -> Checked) -> Checked {
    let mut placed = Placed::new(device, rng)?;
    placed.rewrite(rng)?;
    let job = Job::random_read(placed.map.at(0), WINDOW, LONG, rng.next());
    placed.context.submit(job.queue(1))?;
    goes()?;
    placed.cpu_sees(0, WINDOW)
}

/// The device dies with pages of two processes in its memory. What was in them is lost, and nobody may be given something else
/// for it: one touches them and is told by a signal, the other closes and finds poison.
fn lost(device: &dyn Device, function: &Function, rng: &mut Rng) -> Checked {
    let placed = Placed::new(device, rng)?;
    let dead = Mapping::new(PAGE, PAGE, Backing::AnonymousShared).doing("mmap")?;
    let mut child = Child::spawn(|parent| {
        let placed = Placed::new(device, rng)?;
        parent.ready(0);
        while dead.load(0) == 0 {
            std::thread::yield_now();
        }
        let found = placed.map.load(0);
        Err(Failure::wrong(format!("a page that is lost reads {found:#x}")))
    })?;
    child.wait_ready()?;
    function.cut_off()?;
    dead.store(0, 1);
    child.join_killed(Signal::SIGBUS)?;
    placed.context.file().close();
    let poison = Pattern { first: u64::from_ne_bytes([POISON; 8]), step: 0 };
    match placed.map.differs(0, WINDOW, poison) {
        None => Ok(()),
        Some((at, found)) => Err(Failure::wrong(format!("a page that is lost has {found:#x} at {at:#x}"))),
    }
}

/// Reset through sysfs, which is a function-level reset: the device forgets everything it was told.
fn reset(device: &dyn Device, function: &Function, rng: &mut Rng, running: bool) -> Checked {
    let occupied = Occupied::new(device, rng, 6)?;
    if running {
        occupied.set_running(rng)?;
    }
    function.reset()?;
    // A driver may notice by itself, or when the device does not answer.
    let until = Instant::now() + BOUND;
    let mut pause = Pause::default();
    let job = Job::strided_read(occupied.map.at(0), 1, 8);
    while occupied.contexts[0].file().submit(&job.raw()).is_ok() && Instant::now() < until {
        // Changes that the driver must tell the device of.
        occupied.map.advise(0, WINDOW / 2, nix::sys::mman::MmapAdvise::MADV_DONTNEED).doing("madvise")?;
        pause.take();
    }
    refused(&occupied, &[Errno::EIO, Errno::ENODEV, Errno::ESRCH, Errno::EBUSY])?;
    occupied.map.advise(0, WINDOW, nix::sys::mman::MmapAdvise::MADV_DONTNEED).doing("madvise")?;
    drop(occupied);
    function.rebind()?;
    works(device, rng)
}
