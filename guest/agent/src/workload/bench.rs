// SPDX-License-Identifier: MIT OR Apache-2.0
//! `bench`: what the driver and the device cost, by the guest's clock. It says how long things took and judges nothing but that
//! they happened.

use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use guest_protocol::Message;
use nix::sys::mman::MmapAdvise;
use vgpu_spec::regs::gpu;
use vgpu_spec::uapi::DRIVER_DEVICE;

use super::{Ground, Round};
use crate::boot;
use crate::client::{Context, Job};
use crate::memory::{Backing, Mapping, PAGE, WINDOW};
use crate::outcome::{Checked, Doing, Failure, require};

/// Rounds if the plan does not say.
pub(super) const ROUNDS: u64 = 1;

/// Where the driver's functions are bound and unbound.
const DRIVER: &str = "/sys/bus/pci/drivers/hmm_vgpu";
/// Pages touched by one fault lie this far apart: the driver maps an aligned [`WINDOW`] around a fault.
const APART: usize = 2 * WINDOW;
/// Register accesses timed as one.
const BATCH: usize = 200;

/// How much is measured.
struct Sizes {
    /// Samples of each figure.
    samples: usize,
    /// Pages that are mapped, and given back one by one.
    pages: usize,
    /// Faults.
    faults: usize,
}

const FULL: Sizes = Sizes { samples: 9, pages: 2048, faults: 512 };

/// One round.
pub(super) fn round(round: &mut Round<'_, '_>) {
    measure(round, &FULL);
}

fn measure(round: &mut Round<'_, '_>, sizes: &Sizes) {
    let ground = round.ground;
    round.case("registers", |_| registers(ground, sizes));
    // First of those that bind: once this address space has been mirrored, it has notifiers for good.
    round.case("invalidate", |_| invalidate(ground, sizes));
    round.case("tables", |_| tables(ground, sizes));
    round.case("faults", |_| faults(ground, sizes));
}

/// Tells the host the middle one of some samples.
fn tell(ground: &Ground<'_>, name: &str, unit: &str, samples: &mut [f64]) -> Checked {
    let value = middle(samples).ok_or_else(|| Failure::wrong(format!("{name}: no samples")))?;
    ground.sink.send(&Message::Metric { name: name.to_owned(), value, unit: unit.to_owned() });
    Ok(())
}

fn middle(samples: &mut [f64]) -> Option<f64> {
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied()
}

fn micros(time: Duration, calls: usize) -> f64 {
    time.as_secs_f64() * 1e6 / calls as f64
}

fn rate(count: u64, time: Duration) -> f64 {
    count as f64 / time.as_secs_f64()
}

/// Reads and writes of registers from user space. The driver is unbound for that, since a kernel may not let its registers be
/// mapped while they are in use.
fn registers(ground: &Ground<'_>, sizes: &Sizes) -> Checked {
    let Some(address) = bound_function() else {
        return Err(Failure::Skip("the driver has no PCI function here".to_owned()));
    };
    write(&Path::new(DRIVER).join("unbind"), &address)?;
    let measured = time_registers(ground, sizes, &Path::new("/sys/bus/pci/devices").join(&address));
    // Given back whatever happened: the other cases need it.
    write(&Path::new(DRIVER).join("bind"), &address)?;
    boot::wait_for_node(DRIVER_DEVICE)?;
    measured
}

fn time_registers(ground: &Ground<'_>, sizes: &Sizes, function: &Path) -> Checked {
    write(&function.join("enable"), "1")?;
    let path = function.join("resource0");
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(|error| Failure::wrong(format!("{}: {error}", path.display())))?;
    let window = Window(
        Mapping::new(gpu::BAR_BYTES as usize, PAGE, Backing::FileShared(file.as_fd(), 0))
            .doing("mmap of the registers")?,
    );
    require(window.read(gpu::ID) == gpu::ID_VALUE, || {
        "the registers do not show the device's ID".to_owned()
    })?;
    let (mut reads, mut writes) = (Vec::new(), Vec::new());
    for _ in 0..sizes.samples {
        let began = Instant::now();
        for _ in 0..BATCH {
            window.read(gpu::ID);
        }
        reads.push(micros(began.elapsed(), BATCH));
        let began = Instant::now();
        for page in 0..BATCH {
            window.write(gpu::WINDOW_PAGE, page as u32);
        }
        writes.push(micros(began.elapsed(), BATCH));
    }
    require(window.read(gpu::WINDOW_PAGE) == BATCH as u32 - 1, || "writes did not arrive".to_owned())?;
    window.write(gpu::WINDOW_PAGE, 0);
    tell(ground, "registers/read", "us", &mut reads)?;
    tell(ground, "registers/write", "us", &mut writes)
}

/// The PCI address of the function that the driver has.
fn bound_function() -> Option<String> {
    let entries = std::fs::read_dir(DRIVER).ok()?;
    let mut names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    // Domain, bus, slot, function, as in 0000:00:04.0; the folder's other entries are files.
    names.find(|name| name.contains(':') && name.contains('.'))
}

fn write(path: &Path, text: &str) -> Checked {
    std::fs::write(path, text).map_err(|error| Failure::wrong(format!("{}: {error}", path.display())))
}

/// The device's registers in this process.
struct Window(Mapping);

impl Window {
    #[allow(unsafe_code)] // device registers can only be reached through a pointer
    fn read(&self, register: u32) -> u32 {
        // SAFETY: a register's offset is aligned and lies inside the BAR, which is mapped as long as `self` lives.
        unsafe { std::ptr::read_volatile(self.0.at(register as usize) as *const u32) }
    }

    #[allow(unsafe_code)] // as above
    fn write(&self, register: u32, value: u32) {
        // SAFETY: as above; no Rust object lives there.
        unsafe { std::ptr::write_volatile(self.0.at(register as usize) as *mut u32, value) }
    }
}

/// MADV_DONTNEED of one page that is present: before this address space is mirrored, once it is but without the device having
/// the page, and with the device having it.
fn invalidate(ground: &Ground<'_>, sizes: &Sizes) -> Checked {
    let bytes = sizes.pages * PAGE;
    let map = Mapping::small(bytes).doing("mmap")?;
    let one_by_one = || -> Checked<f64> {
        let began = Instant::now();
        for offset in (0..bytes).step_by(PAGE) {
            map.advise(offset, PAGE, MmapAdvise::MADV_DONTNEED).doing("MADV_DONTNEED")?;
        }
        Ok(micros(began.elapsed(), sizes.pages))
    };
    let (mut alone, mut absent, mut present) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..sizes.samples {
        map.touch(0, bytes);
        alone.push(one_by_one()?);
    }
    let context = Context::bind(ground.device)?;
    for _ in 0..sizes.samples {
        map.touch(0, bytes);
        absent.push(one_by_one()?);
        map.touch(0, bytes);
        reach(&context, &map, sizes.pages as u64, PAGE)?;
        present.push(one_by_one()?);
    }
    let left = context.file().query().doing("query")?.mapped_pages;
    require(left == 0, || format!("{left} pages are still mapped"))?;
    tell(ground, "invalidate/unmirrored", "us", &mut alone)?;
    tell(ground, "invalidate/not-on-device", "us", &mut absent)?;
    tell(ground, "invalidate/on-device", "us", &mut present)
}

/// The device reads one word of each of `count` pages that lie `apart`.
fn reach(context: &Context, map: &Mapping, count: u64, apart: usize) -> Checked {
    context.run(Job::strided_read(map.at(0), count, apart))?.ok().map(drop)
}

/// Present pages in a row, mapped through faults, a window each: leaves written a second, faults included.
fn tables(ground: &Ground<'_>, sizes: &Sizes) -> Checked {
    let bytes = 4 * sizes.pages * PAGE;
    let map = Mapping::small(bytes).doing("mmap")?;
    let context = Context::bind(ground.device)?;
    let mut rates = Vec::new();
    for _ in 0..sizes.samples {
        map.touch(0, bytes);
        let began = Instant::now();
        reach(&context, &map, (bytes / PAGE) as u64, PAGE)?;
        let took = began.elapsed();
        let mapped = context.file().query().doing("query")?.mapped_pages;
        require(mapped >= (bytes / PAGE) as u64, || format!("only {mapped} pages were mapped"))?;
        rates.push(rate(mapped, took));
        map.advise(0, bytes, MmapAdvise::MADV_DONTNEED).doing("MADV_DONTNEED")?;
    }
    tell(ground, "tables/driver", "leaves/s", &mut rates)
}

/// Present pages far apart, so that each costs a fault: one queue, which waits for each, and four at once.
fn faults(ground: &Ground<'_>, sizes: &Sizes) -> Checked {
    let bytes = sizes.faults * APART;
    let map = Mapping::small(bytes).doing("mmap")?;
    let contexts = [Context::bind(ground.device)?, Context::bind(ground.device)?];
    let served = || -> Checked<u64> {
        let mut sum = 0;
        for context in &contexts {
            sum += context.file().query().doing("query")?.faults_served;
        }
        Ok(sum)
    };
    let (mut one, mut four) = (Vec::new(), Vec::new());
    for _ in 0..sizes.samples {
        for (parts, rates) in [(1, &mut one), (4, &mut four)] {
            for offset in (0..bytes).step_by(APART) {
                map.store(offset, 1);
            }
            let before = served()?;
            let each = sizes.faults / parts;
            let began = Instant::now();
            let mut tickets = Vec::new();
            for part in 0..parts {
                let context = &contexts[part % 2];
                let job = Job::strided_read(map.at(part * each * APART), each as u64, APART);
                tickets.push((context, context.submit(job.queue((part / 2) as u32))?));
            }
            for (context, ticket) in tickets {
                let done = context.wait(ticket)?.ok()?;
                require(done.result == each as u64, || format!("{} instead of {each} pages", done.result))?;
            }
            let took = began.elapsed();
            let count = served()?.wrapping_sub(before);
            require(count >= (each * parts) as u64, || format!("only {count} faults were served"))?;
            rates.push(rate(count, took));
            map.advise(0, bytes, MmapAdvise::MADV_DONTNEED).doing("MADV_DONTNEED")?;
        }
    }
    tell(ground, "faults/one-queue", "faults/s", &mut one)?;
    tell(ground, "faults/four-queues", "faults/s", &mut four)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic() {
        assert_eq!(middle(&mut []), None);
        assert_eq!(middle(&mut [3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(middle(&mut [9.0, 1.0, 2.0, 3.0, 100.0]), Some(3.0));
        assert!((micros(Duration::from_millis(3), 1000) - 3.0).abs() < 1e-9);
        assert!((rate(500, Duration::from_millis(250)) - 2000.0).abs() < 1e-9);
    }
}
