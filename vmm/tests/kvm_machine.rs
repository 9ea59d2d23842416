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
use hmm_testbench::machine::{Accel, Machine, MachineConfig, MachineExit};

const PATIENCE: Duration = Duration::from_secs(60);
/// Where the guest's code is, and begins.
const CODE: u32 = 0x10_0000;

type Console = Arc<Mutex<Vec<u8>>>;

/// An ELF image with a PVH note and 32-bit `code`.
fn image(code: &[u8]) -> tempfile::NamedTempFile {
    const NOTE: u64 = 64 + 2 * 56;
    const NOTE_BYTES: u64 = 20;
    let begin = NOTE + NOTE_BYTES;
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(16, 0);
    let half = |bytes: &mut Vec<u8>, words: &[u16]| words.iter().for_each(|w| bytes.extend(w.to_le_bytes()));
    let word = |bytes: &mut Vec<u8>, words: &[u32]| words.iter().for_each(|w| bytes.extend(w.to_le_bytes()));
    let long = |bytes: &mut Vec<u8>, words: &[u64]| words.iter().for_each(|w| bytes.extend(w.to_le_bytes()));
    half(&mut bytes, &[2, 62]);
    word(&mut bytes, &[1]);
    long(&mut bytes, &[CODE.into(), 64, 0]);
    word(&mut bytes, &[0]);
    half(&mut bytes, &[64, 56, 2, 0, 0, 0]);
    for (kind, offset, at, length) in
        [(1, begin, u64::from(CODE), code.len() as u64), (4, NOTE, 0, NOTE_BYTES)]
    {
        word(&mut bytes, &[kind, 5]);
        long(&mut bytes, &[offset, at, at, length, length, 4]);
    }
    word(&mut bytes, &[4, 4, 18]);
    bytes.extend(b"Xen\0");
    word(&mut bytes, &[CODE]);
    bytes.extend(code);
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(&bytes).expect("room for the image");
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
    let kernel = image(code);
    let console = Console::default();
    let sink = Arc::clone(&console);
    let config = MachineConfig {
        kernel: kernel.path().to_owned(),
        initramfs: tempfile::tempfile().expect("a temporary file"),
        cmdline: "quiet".into(),
        cpus,
        memory_bytes: 64 << 20,
        accel: Accel::Kvm,
        functions: Vec::new(),
        console: Box::new(move |bytes| sink.lock().expect("the console").extend_from_slice(bytes)),
        interactive: false,
    };
    let machine = kvm::start(KvmOptions::default(), config).unwrap_or_else(|failure| panic!("{failure}"));
    (machine, console)
}

fn heard(console: &Console) -> String {
    String::from_utf8_lossy(&console.lock().expect("the console")).into_owned()
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

    // Dropping a machine ends it.
    drop(start(&[0xeb, 0xfe], 2));
    // The kernel lets go of what its interrupts use a moment later.
    let until = Instant::now() + PATIENCE;
    while !left().is_empty() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(left(), Vec::<String>::new());

    // What cannot be started says so.
    for (cpus, memory_bytes, accel) in
        [(0, 1 << 26, Accel::Kvm), (9, 1 << 26, Accel::Kvm), (1, 0, Accel::Kvm), (1, 1 << 26, Accel::Tcg)]
    {
        let config = MachineConfig {
            kernel: image(&[0xf4]).path().to_owned(),
            initramfs: tempfile::tempfile().expect("a temporary file"),
            cmdline: String::new(),
            cpus,
            memory_bytes,
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
