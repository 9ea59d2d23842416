// SPDX-License-Identifier: MIT OR Apache-2.0
//! The QEMU machine itself, with a guest of a hundred bytes instead of a kernel: what it promises the runner, within a second.

use std::io::Write;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use hmm_testbench::machine::{Accel, ConsoleSink, FunctionSlot, Machine, MachineConfig, MachineExit, qemu};
use hmm_testbench::provision::{Cache, Provisioner, QemuProgram};
use parking_lot::Mutex;
use vgpu::function::{Backing, Bar, Effects, Function, InterruptSwitch};
use vgpu::memory::SystemMemory;
use vgpu::pci::{BarShape, CLASS_WITNESS, ConfigSpace, Identity};

use crate::support::machine;

/// Where the guest is loaded and begins, in 32-bit protected mode.
const LOAD: u32 = 0x10_0000;

/// Finds BAR0 of the first function and turns memory and bus mastering on, then goes through the registers of [`Script`],
/// writing a byte to the serial port after each.
#[rustfmt::skip]
const GUEST: &[u8] = &[
    0xb8, 0x04, 0x20, 0x00, 0x80,             // mov eax, 0x80002004     slot 4, command register
    0x66, 0xba, 0xf8, 0x0c,                   // mov dx, 0xcf8
    0xef,                                     // out dx, eax
    0x66, 0xba, 0xfc, 0x0c,                   // mov dx, 0xcfc
    0xb0, 0x06,                               // mov al, 6
    0xee,                                     // out dx, al
    0xb8, 0x10, 0x20, 0x00, 0x80,             // mov eax, 0x80002010     slot 4, BAR0
    0x66, 0xba, 0xf8, 0x0c,                   // mov dx, 0xcf8
    0xef,                                     // out dx, eax
    0x66, 0xba, 0xfc, 0x0c,                   // mov dx, 0xcfc
    0xed,                                     // in eax, dx
    0x24, 0xf0,                               // and al, 0xf0
    0x89, 0xc3,                               // mov ebx, eax
    0x66, 0xba, 0xf8, 0x03,                   // mov dx, 0x3f8
    0xb0, b'a',                               // mov al, 'a'
    0xee,                                     // out dx, al
    0xc7, 0x03, 0xe8, 0x03, 0x00, 0x00,       // mov dword [ebx + STALL], 1000
    0xb0, b'b',                               // mov al, 'b'
    0xee,                                     // out dx, al
    0xc7, 0x43, 0x08, 0x00, 0x00, 0x30, 0x00, // mov dword [ebx + DMA], 0x300000
    0xa0, 0x00, 0x00, 0x30, 0x00,             // mov al, [0x300000]
    0xee,                                     // out dx, al
    0x8b, 0x43, 0x04,                         // mov eax, [ebx + LETTER]
    0xee,                                     // out dx, al
    0x8a, 0x43, 0x0c,                         // mov al, [ebx + END]
    0x3c, 0x01,                               // cmp al, 1
    0x74, 0x0e,                               // je reset
    0x77, 0x0a,                               // ja hang
    0x66, 0xba, 0x04, 0x06,                   // mov dx, 0x604           ACPI power management
    0x66, 0xb8, 0x00, 0x20,                   // mov ax, 0x2000          soft off
    0x66, 0xef,                               // out dx, ax
    0xeb, 0xfe,                               // hang: jmp hang
    0x66, 0xba, 0xf9, 0x0c,                   // reset: mov dx, 0xcf9
    0xb0, 0x06,                               // mov al, 6
    0xee,                                     // out dx, al
    0xeb, 0xf5,                               // jmp hang
];

const STALL: u64 = 0;
const LETTER: u64 = 4;
const DMA: u64 = 8;
const END: u64 = 12;

#[derive(Clone, Copy)]
enum End {
    PowerOff = 0,
    Reset = 1,
    Hang = 2,
}

/// The device's side of it.
struct Script {
    config: Mutex<ConfigSpace>,
    memory: Arc<SystemMemory>,
    end: End,
    /// When the stalled write was over.
    stalled: Mutex<Option<Instant>>,
}

impl Function for Script {
    fn bars(&self) -> Vec<Bar<'_>> {
        vec![Bar { index: 0, size: 4096, prefetchable: false, backing: Backing::Trapped }]
    }
    fn vectors(&self) -> u16 {
        1
    }
    fn has_msix(&self) -> bool {
        false
    }
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.config.lock().read(offset, data);
    }
    fn config_write(&self, offset: u16, data: &[u8]) -> Effects {
        let _ = self.config.lock().write(offset, data);
        Effects::default()
    }
    fn bar_read(&self, _bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        data[0] = match offset {
            LETTER => b'd',
            END => self.end as u8,
            _ => 0,
        };
    }
    fn bar_write(&self, _bar: u8, offset: u64, data: &[u8]) -> Effects {
        let value = data.try_into().map_or(0, u32::from_le_bytes);
        match offset {
            STALL => {
                std::thread::sleep(Duration::from_millis(value.into()));
                *self.stalled.lock() = Some(Instant::now());
            }
            DMA => self.memory.snapshot().write(value.into(), b"c").expect("guest memory"),
            _ => {}
        }
        Effects::default()
    }
    fn reset(&self) -> Effects {
        self.config.lock().reset();
        Effects::default()
    }
}

/// As a multiboot image, loaded where it says.
fn image() -> tempfile::NamedTempFile {
    let (magic, flags) = (0x1bad_b002u32, 1 << 16);
    let checksum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
    let entry = LOAD + 32;
    let end = entry + u32::try_from(GUEST.len()).expect("small");
    let header = [magic, flags, checksum, LOAD, LOAD, end, end, entry];
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    let header: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
    file.write_all(&[&header, GUEST].concat()).expect("a small file");
    file
}

struct Started {
    machine: Box<dyn Machine>,
    script: Arc<Script>,
    /// Bytes of the console and when they came.
    console: Receiver<(u8, Instant)>,
    _image: tempfile::NamedTempFile,
}

fn start(end: End) -> Started {
    let shape = BarShape { index: 0, size: 4096, prefetchable: false };
    let identity = Identity { vendor: 0x1234, device: 0x5678, class: CLASS_WITNESS, revision: 0 };
    let memory = Arc::new(SystemMemory::new());
    let script = Arc::new(Script {
        config: Mutex::new(ConfigSpace::new(identity, &[shape], 1, None)),
        memory: memory.clone(),
        end,
        stalled: Mutex::default(),
    });
    let interrupts = Arc::new(InterruptSwitch::new());
    let (sender, console) = channel();
    let image = image();
    let slot = FunctionSlot { name: "script", function: script.clone(), memory, interrupts };
    let send = move |bytes: &[u8]| {
        for byte in bytes {
            let _ = sender.send((*byte, Instant::now()));
        }
    };
    let config = config(&image, vec![slot], Box::new(send));
    Started { machine: qemu::start(&program(), config).expect("a machine"), script, console, _image: image }
}

fn config(
    image: &tempfile::NamedTempFile,
    functions: Vec<FunctionSlot>,
    console: ConsoleSink,
) -> MachineConfig {
    let mut initramfs = tempfile::tempfile().expect("a temporary file");
    initramfs.write_all(b"unused").expect("a small file");
    MachineConfig {
        kernel: image.path().to_owned(),
        initramfs,
        cmdline: String::new(),
        cpus: 1,
        memory_bytes: 64 << 20,
        nodes: 1,
        accel: Accel::Tcg,
        functions,
        console,
        interactive: false,
    }
}

fn program() -> QemuProgram {
    let cache = Cache::from_env().expect("a cache");
    Provisioner::new(cache, Arc::new(|_| {})).qemu().expect("QEMU")
}

impl Started {
    fn letter(&self, letter: u8) -> Instant {
        let patience = Duration::from_secs(60);
        loop {
            let (byte, when) = self.console.recv_timeout(patience).expect("the guest's next letter");
            if byte == letter {
                return when;
            }
        }
    }
}

#[test]
fn a_register_write_has_arrived_before_the_processor_goes_on() {
    let _one = machine();
    let mut started = start(End::PowerOff);
    let before = started.letter(b'a');
    let after = started.letter(b'b');
    let stalled = *started.script.stalled.lock();
    let stalled = stalled.expect("the write was posted");
    assert!(after >= stalled && after - before >= Duration::from_millis(900), "the write was posted");
    // So has what the device wrote to memory, and a read goes all the way.
    started.letter(b'c');
    started.letter(b'd');
    assert_eq!(started.machine.wait(Duration::from_secs(60)), Some(MachineExit::PoweredOff));
    assert!(
        started.script.memory.snapshot().read(0x30_0000, &mut [0]).is_err(),
        "memory outlived the machine"
    );
}

#[test]
fn a_guest_that_resets_itself_is_lost() {
    let _one = machine();
    let exit = start(End::Reset).machine.wait(Duration::from_secs(60));
    let Some(MachineExit::Died { status, .. }) = exit else { panic!("{exit:?}") };
    assert!(status.contains("reset"), "{status}");
}

#[test]
fn a_guest_that_hangs_can_be_ended() {
    let _one = machine();
    let mut started = start(End::Hang);
    started.letter(b'd');
    let pid = started.machine.pid().expect("a process");
    assert_eq!(started.machine.wait(Duration::from_millis(10)), None);
    started.machine.kill();
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "not reaped");
    let exit = started.machine.wait(Duration::ZERO);
    assert!(
        matches!(&exit, Some(MachineExit::Died { status, .. }) if status.contains("SIGKILL")),
        "{exit:?}"
    );
}

/// It has no handler, so the interrupt is its end.
#[test]
fn an_interrupt_that_cannot_be_masked_reaches_a_guest_that_hangs() {
    let _one = machine();
    let mut started = start(End::Hang);
    started.letter(b'd');
    started.machine.nmi().expect("an interrupt");
    let exit = started.machine.wait(Duration::from_secs(60));
    assert!(matches!(&exit, Some(MachineExit::Died { status, .. }) if status.contains("reset")), "{exit:?}");
}

#[test]
fn a_machine_that_cannot_start_says_why() {
    let _one = machine();
    let nothing = tempfile::NamedTempFile::new().expect("a temporary file");
    let mut started =
        qemu::start(&program(), config(&nothing, Vec::new(), Box::new(|_| {}))).expect("a process");
    let exit = started.wait(Duration::from_secs(60));
    let Some(MachineExit::Died { status, stderr_tail }) = exit else { panic!("{exit:?}") };
    assert!(status.contains("status 1") && !stderr_tail.is_empty(), "{status}: {stderr_tail}");
}
