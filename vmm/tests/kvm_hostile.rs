// SPDX-License-Identifier: MIT OR Apache-2.0
//! The native machine with a guest that writes random values to random configuration registers, BARs, ports and MSRs: the VMM neither
//! dies nor leaks. On any /dev/kvm; without one there is nothing to test, which is said.
//!
//! Some seconds, or as many as `HMM_TESTBENCH_HOSTILE_SECONDS` says. A guest that does such things to itself does not live long: then
//! the next one begins, with another seed.
//!
//! One test in a process of its own, so that what is left of a machine can be counted.
#![allow(clippy::expect_used, clippy::panic, clippy::print_stdout)] // The lints' exception for tests does not cover helpers.
#![allow(unsafe_code, reason = "assembly, and the labels in it")]

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use hmm_testbench::machine::kvm::{self, KvmOptions};
use hmm_testbench::machine::small::{self, CODE};
use hmm_testbench::machine::{Accel, MachineConfig, MachineExit};
use hmm_testbench::runner::device::Device;
use vgpu::gpu::GpuConfig;
use vgpu::witness::Deaf;

/// How long, without a word about it.
const SECONDS: u64 = 5;
const VARIABLE: &str = "HMM_TESTBENCH_HOSTILE_SECONDS";
/// A guest says a letter after so many deeds.
const DEEDS: u64 = 0x40;
/// What may be used more at the end than after the first guests: pages that an allocator keeps.
const SLACK: u64 = 16 << 20;
/// Lives after which memory is looked at for the first time.
const FIRST: usize = 3;

// It is entered at CODE, so addresses of labels are their distances from the start, plus that. EBP counts deeds; the random number
// generator is Marsaglia's xorshift of 32 bits. An exception ends the deed at hand and nothing else.
std::arch::global_asm!(
    ".pushsection .rodata.hmm_testbench_hostile, \"a\", @progbits",
    ".globl hmm_testbench_hostile_start, hmm_testbench_hostile_end",
    ".code32",
    "hmm_testbench_hostile_start:",
    "    jmp 2f",
    "    .balign 4",
    "1:  .long 0", // the seed
    "20: .word 0x7ff",
    "    .long {code} + 0x4000",
    "    .balign 4",
    "2:  movl ${code} + 0x4000, %edi", // the table of 256 gates, all to one handler
    "    movl $256, %ecx",
    "3:  movl ${code} + (4f - hmm_testbench_hostile_start), %eax",
    "    movw %ax, (%edi)",
    "    movw $0x10, 2(%edi)",
    "    movw $0x8e00, 4(%edi)",
    "    shrl $16, %eax",
    "    movw %ax, 6(%edi)",
    "    addl $8, %edi",
    "    decl %ecx",
    "    jnz 3b",
    "    lidt {code} + (20b - hmm_testbench_hostile_start)",
    "    xorl %ebp, %ebp",
    "4:  movl ${code} + 0x8000, %esp",
    "    incl %ebp",
    "    testl $({deeds} - 1), %ebp",
    "    jnz 5f",
    "    movl $0x3f8, %edx",
    "    movb $'.', %al",
    "    outb %al, %dx",
    "    movb $10, %al",
    "    outb %al, %dx",
    // Now and then the GPU is where it can be hit.
    "5:  testl $0x3f, %ebp",
    "    jnz 6f",
    "    movl $0x80002010, %eax",
    "    movl $0xc8000000, %ecx",
    "    call 90f",
    "    movl $0x80002014, %eax",
    "    xorl %ecx, %ecx",
    "    call 90f",
    "    movl $0x80002004, %eax",
    "    movl $6, %ecx",
    "    call 90f",
    // Three random numbers: EDI what to do and how wide, EBX where, ESI what.
    "6:  call 80f",
    "    movl %eax, %edi",
    "    call 80f",
    "    movl %eax, %ebx",
    "    call 80f",
    "    movl %eax, %esi",
    "    movl %edi, %eax",
    "    shrl $8, %eax",
    "    andl $7, %eax",
    "    cmpl $2, %eax",
    "    jb 10f",
    "    je 30f",
    "    cmpl $5, %eax",
    "    jb 40f",
    "    je 50f",
    "    cmpl $6, %eax",
    "    je 60f",
    "    jmp 70f",
    // Configuration space through ports: mostly of the two functions.
    "10: movl %ebx, %eax",
    "    testl $0x70000, %edi",
    "    jz 11f",
    "    andl $0x8fc, %eax",
    "    orl $0x2000, %eax",
    "11: orl $0x80000000, %eax",
    "    movl $0xcf8, %edx",
    "    outl %eax, %dx",
    "    movl $0xcfc, %edx",
    "    jmp 52f",
    // Memory-mapped configuration space.
    "30: andl $0xfffff, %ebx",
    "    testl $0x70000, %edi",
    "    jz 31f",
    "    andl $0xffff, %ebx",
    "    orl $0x20000, %ebx",
    "31: orl $0xe0000000, %ebx",
    "    jmp 42f",
    // Where BARs may be.
    "40: andl $0x1fffffff, %ebx",
    "    testl $0x70000, %edi",
    "    jz 41f",
    "    andl $0xffff, %ebx",
    "    orl $0x08000000, %ebx",
    "41: orl $0xc0000000, %ebx",
    "42: movl %esi, %eax",
    "    testl $1, %edi",
    "    jz 45f",
    "    testl $2, %edi",
    "    jz 43f",
    "    andl $~3, %ebx",
    "43: testl $12, %edi",
    "    jz 44f",
    "    movl %eax, (%ebx)",
    "    jmp 4b",
    "44: movb %al, (%ebx)",
    "    movw %ax, (%ebx)",
    "    jmp 4b",
    "45: movl (%ebx), %eax",
    "    movw (%ebx), %ax",
    "    jmp 4b",
    // Ports, but for those that end the machine: 0x64, 0x600 and 0xcf9, and what reaches over into them.
    "50: movl %ebx, %edx",
    "    andl $0xffff, %edx",
    "    testl $0x30000, %edi",
    "    jnz 51f",
    "    andl $7, %edx",
    "    orl $0x3f8, %edx",
    "51: movl %edx, %eax",
    "    andl $0xfff8, %eax",
    "    cmpl $0x60, %eax",
    "    je 4b",
    "    cmpl $0x5f8, %eax",
    "    je 4b",
    "    cmpl $0x600, %eax",
    "    je 4b",
    "    cmpl $0xcf0, %eax",
    "    je 4b",
    "    cmpl $0xcf8, %eax",
    "    je 4b",
    "52: movl %esi, %eax",
    "    testl $1, %edi",
    "    jz 55f",
    "    testl $2, %edi",
    "    jz 53f",
    "    outl %eax, %dx",
    "    jmp 4b",
    "53: testl $4, %edi",
    "    jz 54f",
    "    outw %ax, %dx",
    "    jmp 4b",
    "54: outb %al, %dx",
    "    jmp 4b",
    "55: inl %dx, %eax",
    "    inw %dx, %ax",
    "    inb %dx, %al",
    "    jmp 4b",
    // MSRs: architectural, AMD's, KVM's, the interrupt controller's.
    "60: call 65f",
    "    movl %esi, %eax",
    "    call 80f",
    "    testl $0x70, %edi",
    "    jnz 61f",
    "    movl %eax, %edx",
    "    jmp 62f",
    "61: xorl %edx, %edx", // more values are allowed without an upper half
    "62: movl %esi, %eax",
    "    wrmsr",
    "    jmp 4b",
    "70: call 65f",
    "    rdmsr",
    "    jmp 4b",
    "65: movl %ebx, %ecx",
    "    shrl $8, %ecx",
    "    andl $0x1fff, %ecx",
    "    andl $3, %ebx",
    "    jz 68f",
    "    decl %ebx",
    "    jz 66f",
    "    decl %ebx",
    "    jz 67f",
    "    andl $0xff, %ecx",
    "    orl $0x800, %ecx",
    "    ret",
    "66: orl $0xc0000000, %ecx",
    "    ret",
    "67: andl $0x1f, %ecx",
    "    orl $0x4b564d00, %ecx",
    "68: ret",
    // A random number in EAX; EDX goes.
    "80: movl {code} + (1b - hmm_testbench_hostile_start), %eax",
    "    movl %eax, %edx",
    "    shll $13, %edx",
    "    xorl %edx, %eax",
    "    movl %eax, %edx",
    "    shrl $17, %edx",
    "    xorl %edx, %eax",
    "    movl %eax, %edx",
    "    shll $5, %edx",
    "    xorl %edx, %eax",
    "    movl %eax, {code} + (1b - hmm_testbench_hostile_start)",
    "    ret",
    // Writes ECX to configuration space at EAX.
    "90: movl $0xcf8, %edx",
    "    outl %eax, %dx",
    "    movl $0xcfc, %edx",
    "    movl %ecx, %eax",
    "    outl %eax, %dx",
    "    ret",
    "hmm_testbench_hostile_end:",
    ".popsection",
    code = const CODE,
    deeds = const DEEDS,
    options(att_syntax)
);

unsafe extern "C" {
    static hmm_testbench_hostile_start: u8;
    static hmm_testbench_hostile_end: u8;
}

/// An image of the guest with this seed, which must not be zero.
fn image(seed: u32) -> tempfile::NamedTempFile {
    let (start, end) = (&raw const hmm_testbench_hostile_start, &raw const hmm_testbench_hostile_end);
    // SAFETY: the two labels lie in this order in one section that is never written, and what is between them are bytes.
    let mut code = unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }.to_vec();
    code[4..8].copy_from_slice(&seed.to_le_bytes());
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(&small::image(&code)).expect("room for the image");
    file
}

/// One guest's life: how it ended. `letters` counts what it says.
fn live(seed: u32, longest: Duration, letters: &Arc<AtomicU64>) -> String {
    let size = GpuConfig::default();
    let device = Device::new(Device::oracle(true, &size), size, Arc::new(Deaf)).expect("a device");
    let kernel = image(seed);
    let counter = Arc::clone(letters);
    let config = MachineConfig {
        kernel: kernel.path().to_owned(),
        initramfs: tempfile::tempfile().expect("a temporary file"),
        cmdline: "quiet".into(),
        cpus: 2,
        memory_bytes: 64 << 20,
        nodes: 1,
        accel: Accel::Kvm,
        functions: device.functions(),
        console: Box::new(move |bytes| {
            counter.fetch_add(bytes.iter().filter(|byte| **byte == b'.').count() as u64, SeqCst);
        }),
        interactive: false,
    };
    let mut machine = kvm::start(KvmOptions::default(), config).unwrap_or_else(|failure| panic!("{failure}"));
    let exit = machine.wait(longest).or_else(|| {
        machine.kill();
        machine.wait(Duration::ZERO)
    });
    match exit {
        Some(MachineExit::PoweredOff) => "switched itself off".into(),
        Some(MachineExit::Died { status, .. }) => {
            status.split([',', '(']).next().unwrap_or_default().to_owned()
        }
        None => panic!("it was killed and has not ended"),
    }
}

/// What this process uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Used {
    threads: usize,
    descriptors: usize,
    bytes: u64,
}

fn used() -> Used {
    let count = |folder: &str| std::fs::read_dir(folder).expect("this process").count();
    let status = std::fs::read_to_string("/proc/self/status").expect("this process");
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a size");
    let kib: u64 = resident.trim().trim_end_matches(" kB").parse().expect("a number");
    Used { threads: count("/proc/self/task"), descriptors: count("/proc/self/fd"), bytes: kib * 1024 }
}

/// The same when the kernel has let go of what interrupts use, which takes a moment.
fn settled(descriptors: usize) -> Used {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        let now = used();
        if now.descriptors <= descriptors || Instant::now() >= until {
            return now;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_guest_that_writes_anything_anywhere() {
    if std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
        println!("no usable /dev/kvm: the native machine is not tested here");
        return;
    }
    let seconds = std::env::var(VARIABLE).map_or(SECONDS, |text| text.parse().expect("a number of seconds"));
    let (begin, whole) = (Instant::now(), Duration::from_secs(seconds));
    let longest = (whole / 10).clamp(Duration::from_millis(300), Duration::from_secs(20));
    let letters = Arc::new(AtomicU64::new(0));
    let before = used();
    let (mut first, mut most) = (None, 0);
    let mut ends = BTreeMap::<String, u64>::new();
    let mut lives = 0;
    while begin.elapsed() < whole || lives <= FIRST {
        let end = live(0x9e37_79b9_u32.wrapping_mul(lives as u32 + 1) | 1, longest, &letters);
        *ends.entry(end).or_default() += 1;
        lives += 1;
        let now = settled(before.descriptors);
        assert_eq!(
            (now.threads, now.descriptors),
            (before.threads, before.descriptors),
            "after {lives} guests"
        );
        most = most.max(now.bytes);
        if lives == FIRST {
            first = Some(now.bytes);
        }
    }
    let (first, last) = (first.expect("some lives"), settled(before.descriptors).bytes);
    let deeds = letters.load(SeqCst) * DEEDS;
    println!(
        "{lives} guests in {:.0} s, at least {deeds} deeds; they ended: {ends:?}; threads {}, descriptors {} as before; memory {} KiB \
         after {FIRST} guests, {} KiB at the end, {} KiB at the most between guests",
        begin.elapsed().as_secs_f64(),
        before.threads,
        before.descriptors,
        first >> 10,
        last >> 10,
        most >> 10,
    );
    assert!(deeds >= DEEDS, "the guests did nothing");
    assert!(last <= first + SLACK, "memory: {first} bytes after the first guests, {last} at the end");
}
