// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whether this host's KVM runs guests, found out by running one.
//!
//! A `/dev/kvm` that opens and makes machines proves nothing: there are hosts whose KVM has no hardware below it and interprets its
//! guests' instructions, a thousand times slower, and not all of them. The probe is a guest of some hundred bytes that does what a
//! kernel's first milliseconds do: it goes from protected to 64-bit mode by itself, takes page faults and mends its page tables in
//! the handler, uses a vector register, and computes for some millions of instructions. It has to bring the right number in time.

mod code;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// How long the probe guest may take on a processor of its own. One with hardware below it takes 5 to 20 ms.
pub const DEADLINE: Duration = Duration::from_secs(1);
/// The same where the processor is emulated.
pub const EMULATED_DEADLINE: Duration = Duration::from_secs(30);

/// The capabilities without which no machine here works.
const NEEDED: &[(Cap, &str)] =
    &[(Cap::UserMemory, "user memory"), (Cap::Irqchip, "interrupt controllers"), (Cap::Irqfd, "irqfd")];

const MEMORY_BYTES: usize = 16 << 12;
/// Places in the guest's memory; the code below knows them too.
const CODE: u64 = 0x1000;
const PML4: u64 = 0x3000;
const PDPT: u64 = 0x4000;
const PD: u64 = 0x5000;
const IDT: u64 = 0x9000;
const IDT_POINTER: u64 = 0x9ff0;
const GDT: u64 = 0xa000;
/// Page faults that it takes.
const FAULTS: u32 = 100;
/// Turns of its loop, five instructions each.
const TURNS: u32 = 3_000_000;
const SEED: u64 = 0x1234_5678_9abc_def0;
const FACTOR: u64 = 0x5851_f42d_4c95_7f2d;
const SUMMAND: u64 = 0x1405_7b7e_f767_814f;
/// Where it reports.
const PORT: u16 = 0xf4;

/// What the guest reports if all went well.
fn expected() -> u32 {
    let last = (0..TURNS).fold(SEED, |x, _| x.wrapping_mul(FACTOR).wrapping_add(SUMMAND));
    (last as u32).wrapping_add(FAULTS)
}

/// Runs the probe: how long it took, or why this KVM cannot be used.
///
/// # Errors
/// A reason, for people.
pub fn run(deadline: Duration) -> Result<Duration, String> {
    let kvm = Kvm::new().map_err(|errno| match errno.errno() {
        nix::libc::ENOENT => "there is no /dev/kvm".to_owned(),
        _ => format!("/dev/kvm cannot be opened: {}", reason(errno)),
    })?;
    let version = kvm.get_api_version();
    if u32::try_from(version) != Ok(KVM_API_VERSION) {
        return Err(format!("/dev/kvm speaks version {version} of its interface, not {KVM_API_VERSION}"));
    }
    if let Some((_, lacking)) = NEEDED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        return Err(format!("this KVM has no {lacking}"));
    }
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)])
        .map_err(|error| format!("no memory for a probe guest: {error}"))?;
    fill(&memory).map_err(|error| format!("a probe guest cannot be prepared: {error}"))?;
    let refused = |what: &str, errno| format!("/dev/kvm opens, but {what}: {}", reason(errno));
    let vm = kvm.create_vm().map_err(|errno| refused("makes no machine", errno))?;
    // Where processors without "unrestricted guest" keep what they need for modes without paging.
    let _ = vm.set_identity_map_address(0xfffb_c000);
    let _ = vm.set_tss_address(0xfffb_d000);
    give(&vm, &memory).map_err(|errno| refused("takes no memory", errno))?;
    let vcpu = vm.create_vcpu(0).map_err(|errno| refused("makes no processor", errno))?;
    // Without this the processor has no 64-bit mode.
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .and_then(|cpuid| vcpu.set_cpuid2(&cpuid))
        .map_err(|errno| refused("does not say what its processors have", errno))?;
    prepare(&vcpu).map_err(|errno| refused("does not set a processor's registers", errno))?;
    watched(vcpu, (vm, memory), deadline)
}

fn reason(errno: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(errno.errno())
}

/// Code, page tables and descriptor tables.
fn fill(memory: &GuestMemoryMmap) -> Result<(), vm_memory::GuestMemoryError> {
    let (code, fault) = code::code();
    let write = |at: u64, value: u64| memory.write_obj(value.to_le(), GuestAddress(at));
    memory.write_slice(code, GuestAddress(CODE))?;
    write(PML4, PDPT | 3)?;
    write(PDPT, PD | 3)?;
    write(PD, 0x83)?;
    // 64-bit code, data, 32-bit code.
    write(GDT + 0x08, 0x00af_9b00_0000_ffff)?;
    write(GDT + 0x10, 0x00cf_9300_0000_ffff)?;
    write(GDT + 0x18, 0x00cf_9b00_0000_ffff)?;
    // An interrupt gate for page faults. Handler and selector fit the low half.
    let handler = CODE + fault;
    write(IDT + 14 * 16, (handler & 0xffff) | (0x08 << 16) | (0x8e00 << 32))?;
    memory.write_obj((15u16 * 16 - 1).to_le(), GuestAddress(IDT_POINTER))?;
    write(IDT_POINTER + 2, IDT)
}

fn give(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), kvm_ioctls::Error> {
    let address =
        memory.get_host_address(GuestAddress(0)).map_err(|_| kvm_ioctls::Error::new(nix::libc::EFAULT))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY_BYTES as u64,
        userspace_addr: address as u64,
    };
    // SAFETY: the mapping has this address and size, and goes with the machine: `watched` drops them together.
    #[allow(unsafe_code, reason = "KVM is given memory by address")]
    unsafe {
        vm.set_user_memory_region(region)
    }
}

/// Protected mode without paging, at the code's beginning.
fn prepare(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let segment = |selector, type_| kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..kvm_segment::default()
    };
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs = segment(0x18, 0xb);
    let data = segment(0x10, 0x3);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 4 * 8 - 1;
    sregs.cr0 |= 1;
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    regs.rip = CODE;
    regs.rflags = 2;
    vcpu.set_regs(&regs)
}

extern "C" fn kick(_: i32, _: *mut nix::libc::siginfo_t, _: *mut nix::libc::c_void) {}

/// Runs the processor on a thread of its own, and ends that when the time is over: a signal takes it out of the kernel.
fn watched(vcpu: VcpuFd, machine: (VmFd, GuestMemoryMmap), deadline: Duration) -> Result<Duration, String> {
    let trouble = |what: &dyn std::fmt::Display| format!("a probe guest cannot be watched: {what}");
    register_signal_handler(SIGRTMIN(), kick).map_err(|error| trouble(&error))?;
    let over = Arc::new(AtomicBool::new(false));
    let (sender, receiver) = channel();
    let begin = Instant::now();
    let thread = std::thread::Builder::new().name("kvm-probe".into()).spawn({
        let over = Arc::clone(&over);
        move || {
            let mut vcpu = vcpu;
            let _ = sender.send(drive(&mut vcpu, &over));
            // The processor goes before the machine and its memory.
            drop(vcpu);
            drop(machine);
        }
    });
    let thread = thread.map_err(|error| trouble(&error))?;
    let outcome = match receiver.recv_timeout(deadline) {
        Ok(outcome) => outcome.map(|()| begin.elapsed()),
        Err(RecvTimeoutError::Timeout) => Err(format!(
            "a probe guest did not finish within {} ms: this KVM does not let the processor run its guests, it interprets them",
            deadline.as_millis()
        )),
        Err(RecvTimeoutError::Disconnected) => Err("a probe guest's thread ended unexpectedly".into()),
    };
    over.store(true, Ordering::SeqCst);
    // The signal may come just before the thread enters the kernel, so it comes again. Should the kernel not give the thread back,
    // it is left behind: this process does not depend on it.
    for _ in 0..50 {
        if thread.is_finished() {
            let _ = thread.join();
            break;
        }
        let _ = thread.kill(SIGRTMIN());
        std::thread::sleep(Duration::from_millis(2));
    }
    outcome
}

fn drive(vcpu: &mut VcpuFd, over: &AtomicBool) -> Result<(), String> {
    while !over.load(Ordering::SeqCst) {
        let exit = match vcpu.run() {
            Err(errno) if [nix::libc::EINTR, nix::libc::EAGAIN].contains(&errno.errno()) => continue,
            other => other.map_err(|errno| format!("a probe guest cannot be run: {}", reason(errno)))?,
        };
        return match exit {
            VcpuExit::IoOut(PORT, data) if data == expected().to_le_bytes() => Ok(()),
            VcpuExit::IoOut(PORT, data) => Err(format!(
                "a probe guest computed a wrong number ({data:02x?}): this KVM runs guests wrongly"
            )),
            VcpuExit::InternalError => {
                Err("a probe guest's instructions could not be carried out: this KVM interprets its guests"
                    .into())
            }
            other => Err(format!("a probe guest ended with {other:?}")),
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_is_there_and_small() {
        let (code, fault) = code::code();
        assert!((100..600).contains(&code.len()), "{}", code.len());
        assert!((fault as usize) < code.len());
        assert_eq!(code[..1], [0xb8], "the first instruction loads a constant");
        assert!(CODE + (code.len() as u64) < PML4);
    }

    #[test]
    fn it_comes_to_an_end_and_gives_a_reason() {
        let begin = Instant::now();
        let outcome = run(DEADLINE);
        assert!(begin.elapsed() < 3 * DEADLINE, "{:?}", begin.elapsed());
        if let Err(why) = outcome {
            assert!(!why.is_empty());
        }
    }
}
