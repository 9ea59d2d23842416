// SPDX-License-Identifier: MIT OR Apache-2.0
//! Seconds to PID 1: our machine with its functions against the same QEMU, kernel, files, processors and memory, started as one
//! would by hand: with the kernel as its package has it. A third kind, by hand with the kernel that we unpack, tells how much of the
//! difference is the unpacking and how much the functions.

use std::io::{Read, Seek};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use guest_protocol::{CONSOLE_PREFIX, Plan};
use vgpu::gpu::GpuConfig;
use vgpu::witness::GuestSink;
use vgpu_spec::witness::Record;

use super::figure::{Figure, Goal, median};
use super::guest::{self, MEMORY};
use crate::cli::DEFAULT_CPUS;
use crate::event::EventSink;
use crate::failure::{Failure, Result};
use crate::machine::{Accel, MachineConfig, qemu};
use crate::process::{die_with_parent, last_lines};
use crate::runner::device::Device;
use crate::runner::parts::{self, Parts};
use crate::runner::{RunConfig, accel, plan};

/// Starts of each kind.
const ROUNDS: usize = 5;
/// A guest that has not come to PID 1 by now is lost, on any machine.
const PATIENCE: Duration = Duration::from_secs(300);

/// Both, in turns.
pub(super) fn boot(
    events: Arc<dyn EventSink>,
    note: &dyn Fn(String),
    interrupted: &AtomicBool,
) -> Result<Vec<Figure>> {
    let config = guest::config(Vec::new(), 1, true);
    let accel = accel::choose(None)?.accel;
    let parts = parts::gather(&config, events, interrupted)?;
    let start = Start { config, parts, accel, interrupted };
    let kernel = &start.parts.kernel;
    let mut seconds = [const { Vec::new() }; 3];
    for round in 0..ROUNDS {
        for turn in 0..seconds.len() {
            let kind = (round + turn) % seconds.len();
            let (name, taken) = match kind {
                0 => ("ours", start.ours()?),
                1 => ("by hand", start.by_hand(&kernel.packed)?),
                _ => ("by hand, unpacked", start.by_hand(&kernel.image)?),
            };
            note(format!("boot {name}: {taken:.2} s"));
            seconds[kind].push(taken);
        }
    }
    let [ours, by_hand, unpacked] = &seconds;
    figures(ours, by_hand, unpacked).ok_or_else(|| Failure::inconclusive("nothing was measured (a defect)"))
}

fn figures(ours: &[f64], by_hand: &[f64], unpacked: &[f64]) -> Option<Vec<Figure>> {
    let (here, there, bare) = (median(ours)?, median(by_hand)?, median(unpacked)?);
    let runs = ours.len();
    Some(vec![
        Figure::new(
            "boot",
            "by-hand",
            there,
            "s",
            format!("from the start of the same QEMU, kernel and initramfs, without our devices, to PID 1; median of {runs}"),
        ),
        Figure::new(
            "boot",
            "ours",
            here,
            "s",
            format!("from the making of the device to PID 1, in turns with by-hand; median of {runs}, ratio of the medians"),
        )
        .ratio(here / there)
        .goal(Goal::AtMost(1.1)),
        Figure::new(
            "boot",
            "by-hand-unpacked",
            bare,
            "s",
            format!("by-hand with the kernel that ours boots, unpacked at provisioning; median of {runs}, ratio to by-hand"),
        )
        .ratio(bare / there),
    ])
}

/// What both starts have in common.
struct Start<'a> {
    config: RunConfig,
    parts: Parts,
    accel: Accel,
    interrupted: &'a AtomicBool,
}

impl Start<'_> {
    /// The guest's files: PID 1 says that it runs, which is all that is waited for.
    fn initramfs(&self) -> Result<std::fs::File> {
        let plan = Plan {
            workloads: Vec::new(),
            exec: None,
            shell: false,
            load_driver: false,
            driver_parameters: String::new(),
        };
        parts::initramfs(&self.config, &self.parts, &plan)
    }

    fn ours(&self) -> Result<f64> {
        let initramfs = self.initramfs()?;
        let (sender, receiver) = channel();
        let mut console = Console::default();
        let began = Instant::now();
        let size = GpuConfig::default();
        let device = Device::new(Device::oracle(true, &size), size, Arc::new(Deaf))?;
        let mut machine = qemu::start(
            self.parts.qemu()?,
            MachineConfig {
                kernel: self.parts.kernel.image.clone(),
                initramfs,
                cmdline: plan::CMDLINE.to_owned(),
                cpus: DEFAULT_CPUS,
                memory_bytes: MEMORY,
                accel: self.accel,
                functions: device.functions(),
                console: Box::new(move |bytes| console.feed(bytes, &sender)),
                interactive: false,
            },
        )?;
        let booted = self.wait(&receiver, began);
        machine.kill();
        booted
    }

    fn by_hand(&self, kernel: &Path) -> Result<f64> {
        let environment = |error: std::io::Error| Failure::environment(format!("cannot start QEMU: {error}"));
        let mut archive = self.initramfs()?;
        archive.rewind().map_err(environment)?;
        let mut file = tempfile::NamedTempFile::new().map_err(environment)?;
        std::io::copy(&mut archive, &mut file).map_err(environment)?;
        let (sender, receiver) = channel();
        let mut command = self.parts.qemu()?.command();
        let (accel, cpu, extra) = match self.accel {
            Accel::Kvm => ("kvm", "host", ""),
            Accel::Tcg => ("tcg,thread=multi", "max", " no_timer_check"),
        };
        command
            .args(["-machine", "q35", "-accel", accel, "-cpu", cpu, "-display", "none", "-serial", "stdio"]);
        command.args(["-nodefaults", "-no-user-config", "-no-reboot"]);
        command.arg("-m").arg(format!("{MEMORY}b")).arg("-smp").arg(DEFAULT_CPUS.to_string());
        command.arg("-kernel").arg(kernel).arg("-initrd").arg(file.path());
        command.arg("-append").arg(format!("{}{extra}", plan::CMDLINE));
        let began = Instant::now();
        let (_running, output) = Running::start(&mut command).map_err(environment)?;
        std::thread::spawn(move || follow(output, &sender));
        self.wait(&receiver, began)
    }

    /// Seconds until PID 1 was heard.
    fn wait(&self, heard: &Receiver<Heard>, began: Instant) -> Result<f64> {
        let lost = |console: String| {
            let mut failure = Failure::inconclusive("the guest was lost before PID 1 ran");
            failure.console_tail = last_lines(&console, 30);
            Err(failure)
        };
        loop {
            match heard.recv_timeout(Duration::from_millis(100)) {
                Ok(Heard::Booted(at)) => return Ok(at.saturating_duration_since(began).as_secs_f64()),
                Ok(Heard::Ended(console)) => return lost(console),
                Err(RecvTimeoutError::Disconnected) => return lost(String::new()),
                Err(RecvTimeoutError::Timeout) if self.interrupted.load(Ordering::Relaxed) => {
                    return Err(Failure::inconclusive("interrupted"));
                }
                Err(RecvTimeoutError::Timeout) if began.elapsed() > PATIENCE => return lost(String::new()),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

/// What was heard on a console.
enum Heard {
    Booted(Instant),
    Ended(String),
}

/// Looks for PID 1's first words.
#[derive(Default)]
struct Console {
    seen: Vec<u8>,
    booted: bool,
}

impl Console {
    fn feed(&mut self, bytes: &[u8], heard: &Sender<Heard>) {
        if self.booted {
            return;
        }
        // The words may come in two pieces.
        let from = self.seen.len().saturating_sub(CONSOLE_PREFIX.len());
        self.seen.extend_from_slice(bytes);
        let words = CONSOLE_PREFIX.as_bytes();
        if self.seen[from..].windows(words.len()).any(|window| window == words) {
            self.booted = true;
            let _ = heard.send(Heard::Booted(Instant::now()));
        }
    }
}

/// Follows the console of the QEMU started by hand.
fn follow(mut output: ChildStdout, heard: &Sender<Heard>) {
    let mut console = Console::default();
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = output.read(&mut buffer) {
        console.feed(&buffer[..count], heard);
    }
    let _ = heard.send(Heard::Ended(String::from_utf8_lossy(&console.seen).into_owned()));
}

/// The QEMU started by hand; ended when dropped.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> std::io::Result<(Self, ChildStdout)> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut running = Self(die_with_parent(command).spawn()?);
        let output = running.0.stdout.take().ok_or_else(|| std::io::Error::other("no output"))?;
        Ok((running, output))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Nothing that the witness says is of interest here.
struct Deaf;

impl GuestSink for Deaf {
    fn message(&self, _: &[u8]) {}
    fn heartbeat(&self, _: u64, _: u64) {}
    fn hello(&self, _: &Record) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pid_1_is_heard_once_and_in_pieces() {
        let (sender, receiver) = channel();
        let mut console = Console::default();
        let (first, second) = CONSOLE_PREFIX.split_at(5);
        console.feed(b"[    0.1] Linux hmm-test version\r\n", &sender);
        console.feed(first.as_bytes(), &sender);
        assert!(receiver.try_recv().is_err());
        console.feed(second.as_bytes(), &sender);
        assert!(matches!(receiver.try_recv(), Ok(Heard::Booted(_))));
        console.feed(CONSOLE_PREFIX.as_bytes(), &sender);
        assert!(receiver.try_recv().is_err());
    }

    #[test]
    fn the_ratio_is_that_of_the_medians() {
        let figures = figures(&[3.0, 2.2, 2.0], &[2.0, 1.0, 2.0], &[1.0, 0.5, 3.0]).unwrap();
        assert_eq!((figures[0].value, figures[1].value, figures[2].value), (2.0, 2.2, 1.0));
        assert!((figures[1].ratio.unwrap() - 1.1).abs() < 1e-9);
        assert!(super::figures(&[], &[], &[]).is_none());
    }
}
