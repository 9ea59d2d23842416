// SPDX-License-Identifier: MIT OR Apache-2.0
//! The native machine with guests of a few instructions: they run even where KVM cannot run Linux. Without /dev/kvm there is
//! nothing to test, which is said.
//!
//! One test in a process of its own, so that what is left of a machine can be counted.
#![allow(clippy::expect_used, clippy::panic, clippy::print_stdout)] // The lints' exception for tests does not cover helpers.

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hmm_testbench::machine::kvm::{self, KvmOptions};
use hmm_testbench::machine::{Accel, FunctionSlot, Machine, MachineConfig, MachineExit, small};
use hmm_testbench::runner::device::{Device, GPU};
use vgpu::gpu::GpuConfig;
use vgpu::witness::Deaf;

const PATIENCE: Duration = Duration::from_secs(60);

type Console = Arc<Mutex<Vec<u8>>>;

/// A file with `code` as a kernel.
fn image(code: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(&small::image(code)).expect("room for the image");
    file
}

/// `mov edx, port; mov al, value; out dx, al`
fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0xba, low, high, 0, 0, 0xb0, value, 0xee]
}

fn say(text: &str) -> Vec<u8> {
    text.bytes().flat_map(|byte| out(0x3f8, byte)).collect()
}

fn start(code: &[u8], cpus: u32) -> (Box<dyn Machine>, Console) {
    start_with(code, cpus, Vec::new())
}

fn start_with(code: &[u8], cpus: u32, functions: Vec<FunctionSlot>) -> (Box<dyn Machine>, Console) {
    let kernel = image(code);
    let console = Console::default();
    let sink = Arc::clone(&console);
    let config = MachineConfig {
        kernel: kernel.path().to_owned(),
        initramfs: tempfile::tempfile().expect("a temporary file"),
        cmdline: "quiet".into(),
        cpus,
        memory_bytes: 64 << 20,
        nodes: 1,
        accel: Accel::Kvm,
        functions,
        console: Box::new(move |bytes| sink.lock().expect("the console").extend_from_slice(bytes)),
        interactive: false,
    };
    let machine = kvm::start(KvmOptions::default(), config).unwrap_or_else(|failure| panic!("{failure}"));
    (machine, console)
}

fn heard(console: &Console) -> String {
    String::from_utf8_lossy(&console.lock().expect("the console")).into_owned()
}

/// Looks at the first function's identity for ever, and says `i` when it comes, `o` when it goes.
#[rustfmt::skip]
const LOOKS: &[u8] = &[
    0xb8, 0x00, 0x20, 0x00, 0x80, // mov eax, 0x80002000     slot 4
    0xba, 0xf8, 0x0c, 0x00, 0x00, // mov edx, 0xcf8
    0xef,                         // out dx, eax
    0xba, 0xfc, 0x0c, 0x00, 0x00, // mov edx, 0xcfc
    0xed,                         // in eax, dx
    0x39, 0xd8,                   // cmp eax, ebx
    0x74, 0xeb,                   // je, to the start
    0x89, 0xc3,                   // mov ebx, eax
    0x83, 0xf8, 0xff,             // cmp eax, -1
    0xb0, b'i',                   // mov al, 'i'
    0x75, 0x02,                   // jne +2
    0xb0, b'o',                   // mov al, 'o'
    0xba, 0xf8, 0x03, 0x00, 0x00, // mov edx, 0x3f8
    0xee,                         // out dx, al
    0xb0, 0x0a,                   // mov al, 10
    0xee,                         // out dx, al
    0xeb, 0xd5,                   // jmp, to the start
];

/// A function is pulled out and put back in.
fn plugging() {
    let size = GpuConfig::default();
    let device = Device::new(Device::oracle(true, &size), size, Arc::new(Deaf)).expect("a device");
    let (mut machine, console) = start_with(LOOKS, 1, device.functions());
    let wait_for = |said: &str| {
        let until = Instant::now() + PATIENCE;
        while heard(&console) != said {
            assert!(Instant::now() < until, "{:?} instead of {said:?}", heard(&console));
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    let refused = |result: hmm_testbench::failure::Result<()>, why: &str| {
        let failure = result.expect_err(why);
        assert!(failure.to_string().contains(why), "{failure}");
    };
    wait_for("i\n");
    refused(machine.plug(GPU), "is there already");
    refused(machine.unplug("other"), "no function other");
    let memory = device.functions()[0].memory.clone();
    assert!(memory.snapshot().check(0x10_0000, 4096, true).is_ok());
    machine.unplug(GPU).unwrap_or_else(|failure| panic!("{failure}"));
    assert!(memory.snapshot().check(0x10_0000, 4096, true).is_err(), "it still reaches memory");
    wait_for("i\no\n");
    refused(machine.unplug(GPU), "not in the machine");
    machine.plug(GPU).unwrap_or_else(|failure| panic!("{failure}"));
    assert!(memory.snapshot().check(0x10_0000, 4096, true).is_ok());
    wait_for("i\no\ni\n");
    machine.unplug(GPU).unwrap_or_else(|failure| panic!("{failure}"));
    machine.kill();
    refused(machine.plug(GPU), "has ended");
}

fn died(exit: Option<MachineExit>) -> String {
    match exit {
        Some(MachineExit::Died { status, .. }) => status,
        other => panic!("{other:?}"),
    }
}

/// Threads of machines, and descriptors of KVM and of guests' memory, that this process still has.
fn left() -> Vec<String> {
    let mut found = Vec::new();
    for task in std::fs::read_dir("/proc/self/task").expect("threads").flatten() {
        let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        found.extend(["vcpu-", "kvm-"].iter().any(|start| name.starts_with(start)).then_some(name));
    }
    for fd in std::fs::read_dir("/proc/self/fd").expect("descriptors").flatten() {
        let target = std::fs::read_link(fd.path()).unwrap_or_default().display().to_string();
        found.extend(
            ["anon_inode:kvm", "/dev/kvm", "memfd:", "eventfd"]
                .iter()
                .any(|part| target.contains(part))
                .then_some(target),
        );
    }
    let maps = std::fs::read_to_string("/proc/self/maps").expect("mappings");
    found.extend(
        maps.lines()
            .filter(|line| line.contains("memfd:") || line.contains("anon_inode:kvm"))
            .map(str::to_owned),
    );
    found
}

#[test]
fn small_guests() {
    if std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
        println!("no usable /dev/kvm: the native machine is not tested here");
        return;
    }
    // Power-off, with all of the console.
    let code = [say("hello\n"), say("no end"), out(0x600, 5 << 2 | 1 << 5), vec![0xf4]].concat();
    let (mut machine, console) = start(&code, 1);
    assert_eq!(machine.wait(PATIENCE), Some(MachineExit::PoweredOff));
    assert_eq!(heard(&console), "hello\nno end");
    machine.kill();
    assert_eq!(
        machine.wait(Duration::ZERO),
        Some(MachineExit::PoweredOff),
        "killing what has ended changes nothing"
    );
    drop(machine);

    // The ways to reset.
    for (code, what) in [
        (out(0xcf9, 6), "reset itself"),
        (out(0x64, 0xfe), "reset itself"),
        // `ud2`, without anything that would handle it.
        (vec![0x0f, 0x0b], "triple fault"),
    ] {
        let (mut machine, _) = start(&[code, vec![0xf4]].concat(), 1);
        let status = died(machine.wait(PATIENCE));
        assert!(status.contains(what), "{status}");
    }

    // A guest that hangs: its registers are shown. With as many processors as there can be.
    for cpus in [1, 8] {
        let (mut machine, console) = start(&[0xeb, 0xfe], cpus);
        assert_eq!(machine.wait(Duration::from_millis(100)), None);
        machine.nmi().unwrap_or_else(|failure| panic!("{failure}"));
        machine.kill();
        let Some(MachineExit::Died { status, stderr_tail }) = machine.wait(Duration::ZERO) else {
            panic!("alive")
        };
        // It has no handler for the interrupt, nor for the faults that follow from that, and may be faster than we are.
        assert!(status == "killed" || status.contains("triple fault"), "{status}");
        assert!(
            stderr_tail.contains("vCPU 0: RIP") && heard(&console).contains("vCPU 0: RIP"),
            "{stderr_tail}"
        );
    }

    // And it can be ended at once.
    for cpus in [1, 8] {
        let (mut machine, _) = start(&[0xeb, 0xfe], cpus);
        assert_eq!(machine.wait(Duration::from_millis(100)), None);
        let begin = Instant::now();
        machine.kill();
        assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
        assert_eq!(died(machine.wait(Duration::ZERO)), "killed");
    }

    plugging();

    // Dropping a machine ends it.
    drop(start(&[0xeb, 0xfe], 2));
    // The kernel lets go of what its interrupts use a moment later.
    let until = Instant::now() + PATIENCE;
    while !left().is_empty() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(left(), Vec::<String>::new());

    // What cannot be started says so.
    for (cpus, memory_bytes, nodes, accel) in [
        (0, 1 << 26, 1, Accel::Kvm),
        (9, 1 << 26, 1, Accel::Kvm),
        (1, 0, 1, Accel::Kvm),
        (1, 1 << 28, 2, Accel::Kvm),
        (1, 1 << 26, 1, Accel::Tcg),
    ] {
        let config = MachineConfig {
            kernel: image(&[0xf4]).path().to_owned(),
            initramfs: tempfile::tempfile().expect("a temporary file"),
            cmdline: String::new(),
            cpus,
            memory_bytes,
            nodes,
            accel,
            functions: Vec::new(),
            console: Box::new(|_| {}),
            interactive: false,
        };
        let failure = kvm::start(KvmOptions::default(), config).err().expect("a failure");
        assert_eq!(failure.kind.exit_status(), 2, "{failure}");
    }
    assert_eq!(left(), Vec::<String>::new());
}
