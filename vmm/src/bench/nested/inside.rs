// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is measured in the outer guest, on the KVM there: our machine and QEMU's, in turns.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use guest_protocol::{CONSOLE_PREFIX, Message};
use kvm_ioctls::Kvm;
use tempfile::NamedTempFile;
use vgpu::gpu::GpuConfig;
use vgpu::witness::Deaf;
use vgpu_spec::regs::gpu as regs;

use super::exits;
use super::program::{self, Access};
use crate::bench::start::{Ear, Running, listen};
use crate::event::{Event, EventSink};
use crate::failure::{Failure, Result};
use crate::machine::kvm::{self, KvmOptions};
use crate::machine::{Accel, Machine, MachineConfig};
use crate::nested::place;
use crate::runner::RunConfig;
use crate::runner::device::{Device, memfd};
use crate::runner::parts::Parts;
use crate::runner::plan;

/// Starts of each kind, and measurements of each register.
const ROUNDS: usize = 3;
/// Accesses in a round: few, so that most rounds are not interrupted by whatever else the host does.
const ACCESSES: u32 = 100;
/// Rounds in a measurement, of which the fastest counts.
const TRIES: usize = 40;
/// Memory of the guests of a few instructions.
const SMALL: u64 = 64 << 20;
/// PCI slot of our first function, and of the device that QEMU is given.
const SLOT: u32 = 4;

/// Measures everything, and tells `events` each value as a metric.
pub(crate) fn measure(
    config: &RunConfig,
    parts: &Parts,
    events: &dyn EventSink,
    interrupted: &AtomicBool,
) -> Result<()> {
    let bench = Inside { config, parts, events, interrupted };
    exits::show()?;
    // The first start of ours comes before everything else: the allocator keeps some of what later ones give back.
    bench.boots(0)?;
    bench.registers()?;
    (1..ROUNDS).try_for_each(|round| bench.boots(round))
}

struct Inside<'a> {
    config: &'a RunConfig,
    parts: &'a Parts,
    events: &'a dyn EventSink,
    interrupted: &'a AtomicBool,
}

/// Who takes an access.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Whose {
    /// QEMU's device.
    Edu,
    /// Our device's handler.
    Ours,
    /// The kernel, which signals an event file descriptor.
    Kernels,
}

/// Our machine under way: the functions go after it.
struct Ours {
    machine: Box<dyn Machine>,
    _device: Device,
    ear: Ear,
}

impl Drop for Ours {
    fn drop(&mut self) {
        self.machine.kill();
    }
}

impl Inside<'_> {
    fn tell(&self, name: &str, value: f64, unit: &str) {
        let message = Message::Metric { name: name.to_owned(), value, unit: unit.to_owned() };
        self.events.event(Event::Guest { message });
    }

    fn ours(&self, kernel: &Path, initramfs: fs::File, memory_bytes: u64, sink: Option<u64>) -> Result<Ours> {
        let (mouth, ear) = listen();
        let size = GpuConfig::default();
        let device = Device::new(Device::oracle(true, &size), size, Arc::new(Deaf))?;
        let machine = MachineConfig {
            kernel: kernel.to_owned(),
            initramfs,
            cmdline: plan::cmdline(self.config.append.as_deref()),
            cpus: self.config.cpus,
            memory_bytes,
            nodes: 1,
            accel: Accel::Kvm,
            functions: device.functions(),
            console: mouth.sink(),
            interactive: false,
        };
        let options = KvmOptions { emulated_svm: true, sink, ..KvmOptions::default() };
        Ok(Ours { machine: kvm::start(options, machine)?, _device: device, ear })
    }

    /// QEMU as one starts it by hand for a kernel of one's own, with KVM.
    fn qemu(&self, machine: &str, memory_bytes: u64, more: &[&str]) -> Result<(Running, Ear)> {
        let mut command: Command = self.parts.qemu()?.command();
        command.args(["-machine", machine, "-accel", "kvm", "-cpu", "host", "-display", "none"]);
        command.args(["-serial", "stdio", "-nodefaults", "-no-user-config", "-no-reboot"]);
        command.arg("-m").arg(format!("{memory_bytes}b")).arg("-smp").arg(self.config.cpus.to_string());
        command.args(more);
        let (mouth, ear) = listen();
        Ok((Running::start(command, mouth)?, ear))
    }

    /// From the start to PID 1, once for each machine.
    fn boots(&self, round: usize) -> Result<()> {
        let kernel = self.parts.kernel.image.clone();
        let memory = self.config.memory_bytes;
        let cmdline = plan::cmdline(self.config.append.as_deref());
        let path = kernel.display().to_string();
        let linux = ["-kernel", &path, "-initrd", place::INITRAMFS, "-append", &cmdline];
        for turn in 0..3 {
            self.tell(super::BEGIN, 0.0, "");
            let began = Instant::now();
            let (name, booted, resident) = match (round + turn) % 3 {
                0 => {
                    let initramfs = fs::File::open(place::INITRAMFS)
                        .map_err(|error| Failure::environment(format!("no initramfs: {error}")))?;
                    let mut ours = self.ours(&kernel, initramfs, memory, None)?;
                    let booted = self.booted(&mut ours.ear, "ours")?;
                    let resident = if round == 0 { Some(resident("self", &is_our_guests)?) } else { None };
                    ("ours", booted, resident)
                }
                which => {
                    let machine = ["q35", "microvm"][which - 1];
                    // Without a clock chip, which it leaves out with KVM, Linux looks for one for seconds.
                    let shape = ["q35", "microvm,rtc=on"][which - 1];
                    let (running, mut ear) = self.qemu(shape, memory, &linux)?;
                    let booted = self.booted(&mut ear, machine)?;
                    let pid = running.pid().to_string();
                    (machine, booted, Some(resident(&pid, &|size, _| size == memory)?))
                }
            };
            self.tell(&format!("boot/{name}"), booted.saturating_duration_since(began).as_secs_f64(), "s");
            if let Some(bytes) = resident {
                self.tell(&format!("memory/{name}"), bytes as f64 / f64::from(1 << 20), "MiB");
            }
        }
        Ok(())
    }

    /// Waits for PID 1; when it came. Tells how often the guest left its processor until then, and how long its kernel ran.
    fn booted(&self, ear: &mut Ear, name: &str) -> Result<Instant> {
        let at = ear.wait_for(CONSOLE_PREFIX.as_bytes(), self.interrupted)?;
        for ((counter, _), value) in exits::COUNTERS.iter().zip(exits::count()?) {
            self.tell(&format!("{counter}/{name}"), value, "");
        }
        let line = ear.rest_of_line(self.interrupted)?;
        match serde_json::from_str(&line) {
            Ok(Message::Booted { uptime_ms, .. }) => {
                self.tell(&format!("kernel/{name}"), uptime_ms as f64 / 1000.0, "s");
                Ok(at)
            }
            _ => Err(Failure::inconclusive(format!("a guest's PID 1 says `{line}`"))),
        }
    }

    /// What an access costs that leaves the guest.
    fn registers(&self) -> Result<()> {
        let khz = ticks_per_millisecond()?;
        let read = |register| Access { slot: SLOT, register, write: false, count: ACCESSES };
        let write = |register| Access { write: true, ..read(register) };
        let kinds = [
            // The register that says what the device is, on both.
            ("exit/edu-read", read(0), Whose::Edu),
            ("exit/ours-read", read(regs::ID), Whose::Ours),
            // One that only keeps what is written.
            ("exit/edu-write", write(0x20), Whose::Edu),
            ("exit/ours-write", write(regs::WINDOW_PAGE), Whose::Ours),
            // The command ring's doorbell, with nothing new in the ring: it wakes the command processor all the same.
            ("doorbell/handler", write(regs::CMD_TAIL), Whose::Ours),
            ("doorbell/ioeventfd", write(regs::CMD_TAIL), Whose::Kernels),
        ];
        for _ in 0..ROUNDS {
            for (name, access, whose) in kinds {
                let image = file(&program::image(access))?;
                let path = image.path().display().to_string();
                let ticks = if whose == Whose::Edu {
                    let more = ["-device", "edu,addr=4", "-kernel", &path];
                    let (_running, mut ear) = self.qemu("q35", SMALL, &more)?;
                    self.ticks(&mut ear)?
                } else {
                    let sink = (whose == Whose::Kernels).then(|| access.place());
                    let mut ours = self.ours(image.path(), memfd("nothing", 0)?, SMALL, sink)?;
                    self.ticks(&mut ours.ear)?
                };
                self.tell(name, ticks / f64::from(ACCESSES) / khz * 1000.0, "us");
            }
        }
        Ok(())
    }

    /// The ticks of the fastest round of accesses.
    fn ticks(&self, ear: &mut Ear) -> Result<f64> {
        let mut least = u64::MAX;
        for _ in 0..TRIES {
            let line = ear.line(program::WORD, self.interrupted)?;
            let ticks = u64::from_str_radix(&line, 16)
                .map_err(|_| Failure::inconclusive(format!("a guest says `{line}`, which is no number")))?;
            least = least.min(ticks);
        }
        Ok(least as f64)
    }
}

fn file(bytes: &[u8]) -> Result<NamedTempFile> {
    let fail = |error: std::io::Error| Failure::environment(format!("no temporary file: {error}"));
    let mut file = NamedTempFile::new().map_err(fail)?;
    file.write_all(bytes).map_err(fail)?;
    Ok(file)
}

/// The rate of the processors' time stamp counter, as KVM knows it.
fn ticks_per_millisecond() -> Result<f64> {
    let ask = || Kvm::new()?.create_vm()?.create_vcpu(0)?.get_tsc_khz();
    let khz =
        ask().map_err(|error| Failure::environment(format!("KVM does not say its clock's rate: {error}")))?;
    Ok(f64::from(khz))
}

/// The mappings of our guests' RAM and VRAM.
fn is_our_guests(_: u64, name: &str) -> bool {
    name.contains("memfd:hmm-testbench-ram") || name.contains("memfd:hmm-testbench-vram")
}

/// Bytes of a process that are in memory, without its guest's: `is_guests` is given a mapping's size and name.
fn resident(process: &str, is_guests: &dyn Fn(u64, &str) -> bool) -> Result<u64> {
    let path = format!("/proc/{process}/smaps");
    let text = fs::read_to_string(&path)
        .map_err(|error| Failure::environment(format!("cannot read {path}: {error}")))?;
    resident_of(&text, is_guests)
        .ok_or_else(|| Failure::inconclusive(format!("{path} shows no memory of a guest")))
}

/// The same of a text; none if nothing is the guest's.
fn resident_of(smaps: &str, is_guests: &dyn Fn(u64, &str) -> bool) -> Option<u64> {
    let (mut bytes, mut guests, mut counts) = (0, false, true);
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let first = words.next()?;
        if let Some(rest) = first.strip_suffix(':') {
            if rest == "Rss" && counts {
                bytes += words.next()?.parse::<u64>().ok()? * 1024;
            }
            continue;
        }
        let (from, to) = first.split_once('-')?;
        let address = |text| u64::from_str_radix(text, 16).ok();
        let is = is_guests(address(to)? - address(from)?, words.nth(4).unwrap_or_default());
        guests |= is;
        counts = !is;
    }
    guests.then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
7f0000000000-7f0020000000 rw-s 00000000 00:01 5 /memfd:hmm-testbench-ram (deleted)
Size:             524288 kB
Rss:              300000 kB
Pss:              300000 kB
VmFlags: rd wr sh
7f0030000000-7f0030003000 rw-p 00000000 00:00 0
Rss:                  12 kB
7f0040000000-7f0040001000 r-xp 00000000 00:02 7 /init
Rss:                   4 kB
";

    #[test]
    fn the_guests_memory_is_not_the_machines() {
        assert_eq!(resident_of(SMAPS, &is_our_guests), Some(16 << 10));
        assert_eq!(resident_of(SMAPS, &|size, _| size == 512 << 20), Some(16 << 10));
        assert_eq!(resident_of(SMAPS, &|_, _| false), None, "it was not found");
        assert!(resident("self", &|size, _| size > 0).is_ok_and(|bytes| bytes == 0));
    }
}
