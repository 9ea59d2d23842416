// SPDX-License-Identifier: MIT OR Apache-2.0
//! Devices that are handed over, from a nested run's outer guest to the guest in it: QEMU's `edu`, and our own.
//!
//! With `edu` the program in the guest is this very test program, with its test `in_the_guest`: it talks to the device through sysfs alone.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous};

use crate::support::{Finished, machine, mutant, run, run_in};

const PAGE: usize = 4096;
/// Where the host's documentation of `edu` has its registers.
const IDENTITY: usize = 0x00;
const LIVENESS: usize = 0x04;
const FACTORIAL: usize = 0x08;
const STATUS: usize = 0x20;
const CAUSE: usize = 0x24;
const RAISE: usize = 0x60;
const ACKNOWLEDGE: usize = 0x64;
const SOURCE: usize = 0x80;
const DESTINATION: usize = 0x88;
const COUNT: usize = 0x90;
const COMMAND: usize = 0x98;
/// The device's own memory, as its DMA engine names it.
const BUFFER: u64 = 0x4_0000;
/// A processor's vector that Linux has no handler for: it says so by name when it gets one.
const VECTOR: u8 = 0xd3;

/// A run with our functions handed over.
const GPU: [&str; 13] = [
    "--machine",
    "kvm",
    "--nested",
    "--vfio",
    "gpu",
    "--cpus",
    "1",
    "--memory",
    "512M",
    "--seed",
    "1",
    "--iterations",
    "1",
];

/// An outer guest whose kernel hands devices over by iommufd alone; the others do so by their groups.
const IOMMUFD: [&str; 2] = ["--outer-kernel", "built:host"];

#[test]
fn a_device_is_handed_over() {
    hands_edu_over(&[]).expect_said("0000:00:04.0 is handed over through its IOMMU group");
}

#[test]
fn a_device_is_handed_over_through_iommufd() {
    hands_edu_over(&IOMMUFD).expect_said("0000:00:04.0 is handed over through iommufd");
}

fn hands_edu_over(more: &[&str]) -> Finished {
    let _one = machine();
    let this = std::env::current_exe().expect("this program");
    let this = this.to_str().expect("a UTF-8 path");
    let out = tempfile::tempdir().expect("a temporary folder");
    let finished = run_in(
        out.path(),
        more.iter().copied().chain([
            "release",
            "--seed",
            "1",
            "--iterations",
            "1",
            "--machine",
            "kvm",
            "--nested",
            "--vfio",
            "edu",
            "--cpus",
            "1",
            "--memory",
            "512M",
            "--add",
            &format!("{this}:/add/test"),
            "--exec",
            "/add/test --exact vfio::in_the_guest --ignored --nocapture --test-threads 1",
        ]),
    );
    let outer = fs::read_to_string(out.path().join("console-outer.log")).unwrap_or_default();
    let inner = fs::read_to_string(out.path().join("console.log")).unwrap_or_default();
    assert_eq!(finished.results["exec_status"], 0, "{inner}\n{outer}\n{}", finished.stderr);
    let printed = without_the_kernel(&inner);
    for said in ["edu: identity", "edu: factorial", "edu: DMA went through memory and back", "edu: done"] {
        assert!(printed.contains(&said.replace(' ', "")), "no {said:?} in\n{inner}");
    }
    // The messages of the device arrived as the vector that the guest had named, through KVM's routing.
    let stray =
        inner.lines().filter(|line| line.ends_with(&format!("No irq handler for 0.{VECTOR}"))).count();
    assert!(stray >= 2, "{stray} interrupts in\n{inner}");
    // What was not the guest's memory was refused, by the IOMMU and nobody else.
    assert!(outer.contains("DMAR") && outer.contains("fault addr 0xb0000000"), "{outer}");
    finished.expect_status(0);
    finished
}

/// What programs printed, without any white space: the kernel says that there is no handler in the middle of their lines.
fn without_the_kernel(console: &str) -> String {
    let stamp = |at: usize| {
        let (seconds, rest) = console[at + 1..].split_once('.')?;
        let seconds = seconds.trim_start();
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        (digits(seconds) && digits(rest.get(..6)?) && rest[6..].starts_with(']')).then_some(at)
    };
    let (mut text, mut from) = (String::new(), 0);
    for at in console.match_indices('[').filter_map(|(at, _)| stamp(at)) {
        text.push_str(&console[from..at.max(from)]);
        from = console[at..].find('\n').map_or(console.len(), |end| at + end);
    }
    text.push_str(&console[from..]);
    text.retain(|letter| !letter.is_whitespace());
    text
}

#[test]
fn the_kernel_does_not_hide_what_a_program_printed() {
    let console = "[    1.000001] a [b] c\nedu: \n[    5.205751] No irq handler for 0.211\n\nfactorial\nedu: d[   12.345678] x\none\n[1] [    9.";
    assert_eq!(without_the_kernel(console), "edu:factorialedu:done[1][9.");
}

/// The testbench's own GPU, and its witness, handed over: device and oracle are in this process, the guest two machines away.
#[test]
fn the_gpu_is_handed_over() {
    let _one = machine();
    let finished = run(GPU.iter().chain(&["access", "release", "unregister"]));
    finished.expect_status(0);
    assert_eq!((&finished.results["machine"], &finished.results["nested"]), (&"kvm".into(), &true.into()));
    assert_eq!(finished.counter("probes_missed"), 0);
    for (name, least) in [("contexts", 20), ("releases", 2), ("accesses", 10_000), ("faults", 50)] {
        assert!(finished.counter(name) >= least, "{name}: {}", finished.counter(name));
    }
}

#[test]
fn the_gpu_is_handed_over_through_iommufd() {
    let _one = machine();
    let finished = run(GPU.iter().chain(&IOMMUFD).chain(&["access", "release"]));
    finished.expect_status(0);
    for device in ["0000:00:04.0", "0000:00:05.0"] {
        finished.expect_said(&format!("{device} is handed over through iommufd"));
    }
    assert!(finished.counter("accesses") >= 10_000 && finished.counter("releases") >= 2);
}

#[test]
fn a_broken_driver_is_caught_on_a_gpu_that_is_handed_over() {
    let _one = machine();
    let patch = mutant("release-skip-teardown");
    let finished = run(GPU.iter().copied().chain(["release", "--patch", &patch]));
    finished.expect_status(1).expect_said("release/late");
    let violation = finished.violation("release/late");
    let replay = violation["replay"].as_str().expect("a replay command");
    assert!(replay.contains("--machine kvm --nested --vfio gpu"), "{replay}");
}

/// What the guest does. Not for the host.
#[test]
#[ignore = "runs in the guest of a_device_is_handed_over"]
fn in_the_guest() {
    let edu = find();
    let config =
        OpenOptions::new().read(true).write(true).open(edu.join("config")).expect("configuration space");
    set_up_messages(&config);
    let registers = Registers::map(&edu);
    assert_eq!(registers.read(IDENTITY) & 0xffff, 0xed, "{:#x}", registers.read(IDENTITY));
    say("identity");
    registers.write(LIVENESS, 0x1234_5678);
    assert_eq!(registers.read(LIVENESS), !0x1234_5678);
    // Five factorial, with a message at its end.
    registers.write(STATUS, 0x80);
    registers.write(FACTORIAL, 5);
    wait("the factorial", || registers.read(STATUS) & 1 == 0);
    assert_eq!(registers.read(FACTORIAL), 120);
    wait("its interrupt", || registers.read(CAUSE) & 1 != 0);
    registers.write(ACKNOWLEDGE, 1);
    registers.write(RAISE, 2);
    assert_eq!(registers.read(CAUSE), 2);
    registers.write(ACKNOWLEDGE, 2);
    say("factorial");
    let (memory, physical) = memory();
    // SAFETY: the page is this test's own, and the device writes it only between `copy` and its return.
    #[allow(unsafe_code, reason = "memory that a device writes")]
    let get = |at: usize| unsafe { memory.as_ptr().add(at).read_volatile() };
    #[allow(unsafe_code, reason = "as above")]
    // SAFETY: as above.
    let set = |at: usize, value: u8| unsafe { memory.as_ptr().add(at).write_volatile(value) };
    (0..PAGE).for_each(|at| set(at, at as u8 ^ 0x5a));
    registers.copy(physical, BUFFER, 2048, false);
    (0..PAGE).for_each(|at| set(at, 0));
    registers.copy(BUFFER, physical + 2048, 2048, true);
    assert!((0..2048).all(|at| get(at) == 0 && get(2048 + at) == at as u8 ^ 0x5a), "other bytes came back");
    say("DMA went through memory and back");
    // No RAM of this guest: the transfer ends, and has changed nothing.
    registers.copy(0xb000_0000, BUFFER, 64, false);
    registers.copy(BUFFER, 0xb000_0000, 64, true);
    assert!((0..2048).all(|at| get(2048 + at) == at as u8 ^ 0x5a));
    assert_eq!(registers.read(IDENTITY) & 0xffff, 0xed);
    say("done");
}

/// On the console, one line: the harness's own output has no line ends of its own.
fn say(what: &str) {
    let _ = writeln!(std::io::stderr(), "\nedu: {what}");
}

fn wait(what: &str, done: impl Fn() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(60), "{what} does not come");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn find() -> PathBuf {
    let is = |path: &Path| fs::read_to_string(path.join("device")).is_ok_and(|id| id.trim() == "0x11e8");
    let devices = fs::read_dir("/sys/bus/pci/devices").expect("a PCI bus");
    devices.flatten().map(|entry| entry.path()).find(|path| is(path)).expect("the device")
}

/// Lets the device decode, master the bus and send messages to the first processor.
fn set_up_messages(config: &File) {
    let read = |at: u64| {
        let mut bytes = [0; 4];
        config.read_exact_at(&mut bytes, at).expect("read");
        u32::from_le_bytes(bytes)
    };
    let write = |at: u64, bytes: &[u8]| config.write_all_at(bytes, at).expect("written");
    write(4, &[0x06, 0x04]);
    assert_eq!(read(4) as u16, 0x0406);
    let mut at = u64::from(read(0x34) as u8);
    while read(at) as u8 != 5 {
        at = u64::from((read(at) >> 8) as u8);
        assert_ne!(at, 0, "no MSI");
    }
    let wide = read(at) >> 16 & 0x80 != 0;
    write(at + 4, &0xfee0_0000_u32.to_le_bytes());
    if wide {
        write(at + 8, &[0; 4]);
    }
    write(at + if wide { 12 } else { 8 }, &[VECTOR, 0]);
    write(at + 2, &[1, 0]);
    assert_eq!(read(at) >> 16 & 1, 1);
}

struct Registers(NonNull<u8>);

impl Registers {
    fn map(edu: &Path) -> Self {
        let bar = OpenOptions::new().read(true).write(true).open(edu.join("resource0")).expect("BAR 0");
        let (length, rights) =
            (NonZeroUsize::new(1 << 20).expect("not 0"), ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
        #[allow(unsafe_code, reason = "the device's registers")]
        // SAFETY: a new mapping, which stays to the program's end.
        let map = unsafe { mmap(None, length, rights, MapFlags::MAP_SHARED, bar.as_fd(), 0) };
        Self(map.expect("mapped").cast())
    }
    fn at(&self, register: usize) -> NonNull<u32> {
        assert!(register < 1 << 20 && register % 4 == 0);
        #[allow(unsafe_code, reason = "the device's registers")]
        // SAFETY: inside of the mapping, and aligned.
        unsafe {
            self.0.add(register).cast()
        }
    }
    fn read(&self, register: usize) -> u32 {
        #[allow(unsafe_code, reason = "the device's registers")]
        // SAFETY: see `at`.
        unsafe {
            self.at(register).read_volatile()
        }
    }
    fn write(&self, register: usize, value: u32) {
        #[allow(unsafe_code, reason = "the device's registers")]
        // SAFETY: see `at`.
        unsafe {
            self.at(register).write_volatile(value);
        }
    }
    fn write_wide(&self, register: usize, value: u64) {
        #[allow(unsafe_code, reason = "the device's registers")]
        // SAFETY: see `at`, eight bytes aligned; the device takes these registers as a whole only.
        unsafe {
            self.at(register).cast::<u64>().write_volatile(value);
        }
    }
    fn copy(&self, from: u64, to: u64, bytes: u64, to_memory: bool) {
        self.write_wide(SOURCE, from);
        self.write_wide(DESTINATION, to);
        self.write_wide(COUNT, bytes);
        self.write_wide(COMMAND, 1 | u64::from(to_memory) << 1);
        wait("the transfer", || self.read(COMMAND) & 1 == 0);
    }
}

/// A page that stays where it is, and where that is.
fn memory() -> (NonNull<u8>, u64) {
    let (length, rights) =
        (NonZeroUsize::new(PAGE).expect("not 0"), ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_LOCKED | MapFlags::MAP_POPULATE;
    #[allow(unsafe_code, reason = "memory that a device writes")]
    // SAFETY: a new mapping, which stays to the program's end.
    let page = unsafe { mmap_anonymous(None, length, rights, flags) }.expect("a page");
    #[allow(unsafe_code, reason = "as above")]
    // SAFETY: the page is not copied on fork, and nothing else changes.
    unsafe { madvise(page, PAGE, MmapAdvise::MADV_DONTFORK) }.expect("kept");
    let page = page.cast::<u8>();
    #[allow(unsafe_code, reason = "as above")]
    // SAFETY: inside of the page.
    unsafe {
        page.write_volatile(1);
    }
    let map = File::open("/proc/self/pagemap").expect("a page map");
    let mut entry = [0; 8];
    map.read_exact_at(&mut entry, page.as_ptr() as u64 / PAGE as u64 * 8).expect("an entry");
    let entry = u64::from_le_bytes(entry);
    assert!(entry >> 63 == 1 && entry << 9 != 0, "no frame number: {entry:#x}");
    (page, (entry & ((1 << 55) - 1)) * PAGE as u64)
}
