// SPDX-License-Identifier: MIT OR Apache-2.0
//! Our native machine against QEMU with KVM, side by side in one outer guest (`--nested`): what both cost where the hardware is
//! the same, emulated as it is.

mod exits;
pub(crate) mod inside;
mod program;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use guest_protocol::{Message, Plan};
use parking_lot::Mutex;

use super::figure::{Figure, Goal, median, paired_ratio};
use super::guest;
use crate::cli::MachineName;
use crate::event::{Event, EventSink};
use crate::failure::{Failure, Result};
use crate::nested::Errand;
use crate::nested::outside::Outside;
use crate::runner::{self, RunConfig, parts};

/// The metric that says that a start begins.
const BEGIN: &str = "begin";
/// Memory of the guests that boot Linux.
const MEMORY: u64 = 512 << 20;

/// Values by name, in the order in which they came.
type Values = HashMap<String, Vec<f64>>;

/// Boots the outer guest, which measures.
pub(super) fn nested(
    kernel: &str,
    events: Arc<dyn EventSink>,
    interrupted: &AtomicBool,
) -> Result<Vec<Figure>> {
    let config = RunConfig {
        machine: MachineName::Qemu,
        nested: true,
        cpus: 1,
        memory_bytes: MEMORY,
        ..guest::config(kernel, Vec::new(), 1, true)
    };
    let parts = parts::gather(&config, Arc::clone(&events), interrupted)?;
    // The guest's PID 1 says that it runs, which is all that is waited for.
    let plan = Plan {
        workloads: Vec::new(),
        exec: None,
        shell: false,
        load_driver: false,
        driver_parameters: String::new(),
    };
    let initramfs = parts::initramfs(&config, &parts, &plan)?;
    let values = Arc::new(Mutex::new(Values::new()));
    let outer = Arc::new(AtomicU32::new(0));
    let sink: Arc<dyn EventSink> = Arc::new({
        let values = Arc::clone(&values);
        let (outer, began) = (Arc::clone(&outer), Mutex::new(None));
        move |event: Event| {
            let Event::Nested { inner } = &event else { return events.event(event) };
            let Event::Guest { message: Message::Metric { name, value, unit } } = &**inner else {
                return events.event(event);
            };
            let now = processor_seconds(outer.load(Ordering::SeqCst));
            if name == BEGIN {
                *began.lock() = now;
                return;
            }
            let mut values = values.lock();
            values.entry(name.clone()).or_default().push(*value);
            let mut text = format!("{name}: {value:.2} {unit}");
            if let (Some(kind), Some(began), Some(now)) = (name.strip_prefix("boot/"), *began.lock(), now) {
                values.entry(format!("boot-cpu/{kind}")).or_default().push(now - began);
                text = format!("{text}, {:.2} s of the host's processors", now - began);
            }
            events.event(Event::Note { text });
        }
    });
    let outside = Outside {
        config: &config,
        parts: &parts,
        plan: &plan,
        events: &sink,
        interrupted,
        out: None,
        errand: Errand::Measure,
        outer: &outer,
    };
    let mut results = runner::blank(&config);
    outside.run(initramfs, &mut results)?;
    let values = values.lock();
    figures(&values).ok_or_else(|| Failure::inconclusive("not everything was measured (a defect)"))
}

/// The processor time that a process has used.
fn processor_seconds(pid: u32) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Behind the program's name, which may have blanks: the 12th and 13th are ticks in user mode and in the kernel.
    let mut words = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let ticks = words.next()?.parse::<u64>().ok()? + words.next()?.parse::<u64>().ok()?;
    let rate = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok()??;
    Some(ticks as f64 / rate as f64)
}

/// The figures that stand alone: name, value, unit, what was measured.
const ALONE: &[(&str, &str, &str, &str)] = &[
    ("boot-microvm", "boot/microvm", "s", "from the start of QEMU's microvm machine with KVM to PID 1"),
    ("boot-q35", "boot/q35", "s", "the same with QEMU's q35 machine"),
    (
        "boot-cpu-microvm",
        "boot-cpu/microvm",
        "s",
        "processor time of the host's that microvm's start took: what other work on a shared host distorts less",
    ),
    ("boot-cpu-q35", "boot-cpu/q35", "s", "the same with q35"),
    (
        "exit-edu-read",
        "exit/edu-read",
        "us",
        "a read of a register of QEMU's device edu, by a guest that does nothing else; the fastest of many rounds of 100",
    ),
    ("exit-edu-write", "exit/edu-write", "us", "the same, a write"),
    ("doorbell-handler", "doorbell/handler", "us", "a write of CMD_TAIL, which our handler takes"),
    (
        "kernel-ours",
        "kernel/ours",
        "s",
        "how long the guest's kernel had run when PID 1 came, by its own clock: mostly its own instructions",
    ),
    ("kernel-microvm", "kernel/microvm", "s", "the same on microvm"),
    ("kernel-q35", "kernel/q35", "s", "the same on q35"),
    (
        "exits-microvm",
        "exits/microvm",
        "",
        "how often the guest left its processor until PID 1, as KVM counts",
    ),
    ("exits-q35", "exits/q35", "", "the same on q35"),
    ("exits-ours-device", "exits-device/ours", "", "of our guest's, accesses to devices' memory"),
    ("exits-ours-port", "exits-port/ours", "", "of our guest's, accesses to ports"),
    ("exits-ours-interrupt", "exits-interrupt/ours", "", "of our guest's, interrupts of the host's"),
    ("memory-microvm", "memory/microvm", "MiB", "memory of QEMU's process at PID 1, without the guest's"),
    ("memory-q35", "memory/q35", "MiB", "the same with q35"),
];
/// Those that are held against others: name, value, unit, against what, goal, what was measured.
const HELD: &[(&str, &str, &str, &str, f64, &str)] = &[
    (
        "boot-ours",
        "boot/ours",
        "s",
        "boot/microvm",
        0.7,
        "from the making of device and oracle to PID 1 on our machine: the same kernel, files, memory, one processor; ratio to microvm",
    ),
    ("boot-ours-q35", "boot/ours", "s", "boot/q35", 0.4, "the same, ratio to q35"),
    (
        "boot-cpu-ours",
        "boot-cpu/ours",
        "s",
        "boot-cpu/microvm",
        0.7,
        "processor time of our start, ratio to microvm's",
    ),
    ("boot-cpu-ours-q35", "boot-cpu/ours", "s", "boot-cpu/q35", 0.4, "the same, ratio to q35's"),
    ("exit-ours-read", "exit/ours-read", "us", "exit/edu-read", 0.7, "a read of the GPU's ID, ratio to edu"),
    (
        "exit-ours-write",
        "exit/ours-write",
        "us",
        "exit/edu-write",
        0.7,
        "a write of WINDOW_PAGE, ratio to edu",
    ),
];
/// MiB that our machine may add to its guest's.
const MOST_MIB: f64 = 8.0;

/// None if something is missing.
fn figures(values: &Values) -> Option<Vec<Figure>> {
    let of = |name: &str| values.get(name).map(Vec::as_slice);
    let mut figures = Vec::new();
    for &(name, value, unit, about) in ALONE {
        figures.push(Figure::new("nested", name, median(of(value)?)?, unit, about));
    }
    for &(name, value, unit, against, goal, about) in HELD {
        let about = format!("{about}; the median of {} rounds, and of their ratios", of(value)?.len());
        figures.push(
            Figure::new("nested", name, median(of(value)?)?, unit, about)
                .ratio(paired_ratio(of(value)?, of(against)?)?)
                .goal(Goal::AtMost(goal)),
        );
    }
    let about =
        "a write of CMD_TAIL that the kernel takes (ioeventfd), with nobody woken; ratio to the handler's";
    let kernels = median(of("doorbell/ioeventfd")?)?;
    figures.push(
        Figure::new("nested", "doorbell-ioeventfd", kernels, "us", about)
            .ratio(paired_ratio(of("doorbell/ioeventfd")?, of("doorbell/handler")?)?),
    );
    let exits = of("exits/ours")?;
    let about = "how often our guest left its processor until PID 1; ratio to microvm's";
    figures.push(
        Figure::new("nested", "exits-ours", median(exits)?, "", about)
            .ratio(paired_ratio(exits, of("exits/microvm")?)?),
    );
    let memory = median(of("memory/ours")?)?;
    let about = format!(
        "memory of our process at PID 1, device and oracle included, without the guest's RAM and VRAM; ratio to {MOST_MIB} MiB"
    );
    figures.push(
        Figure::new("nested", "memory-ours", memory, "MiB", about)
            .ratio(memory / MOST_MIB)
            .goal(Goal::AtMost(1.0)),
    );
    Some(figures)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_of_a_process() {
        assert!(processor_seconds(std::process::id()).is_some_and(|seconds| (0.0..1e6).contains(&seconds)));
        assert_eq!(processor_seconds(0), None);
    }

    #[test]
    fn all_or_nothing() {
        let mut values = Values::new();
        let names = ALONE.iter().map(|figure| figure.1).chain(HELD.iter().map(|figure| figure.1));
        for name in names {
            values.insert(name.to_owned(), vec![2.0, 2.0]);
        }
        assert!(figures(&values).is_none(), "the memory is missing");
        values.insert("memory/ours".into(), vec![4.0]);
        values.insert("doorbell/ioeventfd".into(), vec![1.0]);
        values.insert("exits/ours".into(), vec![1.0]);
        values.insert("boot/ours".into(), vec![1.0, 2.0]);
        let figures = figures(&values).unwrap();
        let ours = figures.iter().find(|figure| figure.name == "boot-ours").unwrap();
        assert_eq!((ours.value, ours.ratio, ours.met), (1.5, Some(0.75), Some(false)));
        let memory = figures.iter().find(|figure| figure.name == "memory-ours").unwrap();
        assert_eq!((memory.ratio, memory.met), (Some(0.5), Some(true)));
    }
}
