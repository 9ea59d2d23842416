// SPDX-License-Identifier: MIT OR Apache-2.0
//! Seconds to PID 1: our machine with its functions against the same QEMU, kernel, files, processors and memory, started as one
//! would by hand: with the kernel as its package has it. A third kind, by hand with the kernel that we unpack, tells how much of the
//! difference is the unpacking and how much the functions.

use std::io::Seek;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use guest_protocol::{CONSOLE_PREFIX, Plan};
use vgpu::gpu::GpuConfig;
use vgpu::witness::Deaf;

use super::figure::{Figure, Goal, median};
use super::guest::{self, MEMORY};
use super::start::{Running, listen};
use crate::cli::DEFAULT_CPUS;
use crate::event::EventSink;
use crate::failure::{Failure, Result};
use crate::machine::{Accel, MachineConfig, qemu};
use crate::runner::device::Device;
use crate::runner::parts::{self, Parts};
use crate::runner::{RunConfig, accel, plan};

/// Starts of each kind.
const ROUNDS: usize = 5;

/// Both, in turns.
pub(super) fn boot(
    kernel: &str,
    events: Arc<dyn EventSink>,
    note: &dyn Fn(String),
    interrupted: &AtomicBool,
) -> Result<Vec<Figure>> {
    let config = guest::config(kernel, Vec::new(), 1, true);
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
        let (mouth, mut ear) = listen();
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
                nodes: 1,
                accel: self.accel,
                functions: device.functions(),
                console: mouth.sink(),
                interactive: false,
            },
        )?;
        let booted = ear.wait_for(CONSOLE_PREFIX.as_bytes(), self.interrupted);
        machine.kill();
        Ok(booted?.saturating_duration_since(began).as_secs_f64())
    }

    fn by_hand(&self, kernel: &Path) -> Result<f64> {
        let environment = |error: std::io::Error| Failure::environment(format!("cannot start QEMU: {error}"));
        let mut archive = self.initramfs()?;
        archive.rewind().map_err(environment)?;
        let mut file = tempfile::NamedTempFile::new().map_err(environment)?;
        std::io::copy(&mut archive, &mut file).map_err(environment)?;
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
        let (mouth, mut ear) = listen();
        let began = Instant::now();
        let _running = Running::start(command, mouth)?;
        let booted = ear.wait_for(CONSOLE_PREFIX.as_bytes(), self.interrupted)?;
        Ok(booted.saturating_duration_since(began).as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_is_that_of_the_medians() {
        let figures = figures(&[3.0, 2.2, 2.0], &[2.0, 1.0, 2.0], &[1.0, 0.5, 3.0]).unwrap();
        assert_eq!((figures[0].value, figures[1].value, figures[2].value), (2.0, 2.2, 1.0));
        assert!((figures[1].ratio.unwrap() - 1.1).abs() < 1e-9);
        assert!(super::figures(&[], &[], &[]).is_none());
    }
}
