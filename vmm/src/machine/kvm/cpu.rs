// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a processor is and how it begins: CPUID, registers, and a text of its state.

use std::fmt::Write as _;

use kvm_bindings::{CpuId, Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::{Kvm, VcpuFd};

use super::boot::Entry;
use super::layout::{GDT, PAGE_TABLES, PVH_INFO, ZERO_PAGE};

/// Segments: none, none, code (64 or 32 bits), data, task. The Linux boot protocol names the selectors of code and data.
pub(super) const CODE_64: u64 = 0x00af_9b00_0000_ffff;
const CODE_32: u64 = 0x00cf_9b00_0000_ffff;
const DATA: u64 = 0x00cf_9300_0000_ffff;
const TASK: u64 = 0x0000_8b00_0000_0067;

const CR0_PE: u64 = 1 << 0;
const CR0_PG: u64 = 1 << 31;
const CR0_ET: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
const MSR_MTRR_DEFAULT: u32 = 0x2ff;
/// Memory types are on, and everything is write-back: no firmware set ranges up.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// What the host can offer, as the host says it.
pub(super) fn supported(kvm: &Kvm) -> Result<CpuId, kvm_ioctls::Error> {
    kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
}

/// Bits of a guest-physical address.
pub(super) fn physical_bits(cpuid: &CpuId) -> u32 {
    let entry = cpuid.as_slice().iter().find(|entry| entry.function == 0x8000_0008);
    entry.map_or(36, |entry| entry.eax & 0xff).clamp(32, 52)
}

/// Whether the host's virtualisation is QEMU's translator.
pub(super) fn host_is_translated() -> bool {
    // Safe in newer versions of Rust.
    #[allow(unused_unsafe, unsafe_code)]
    // SAFETY: every x86-64 processor has the instruction, and it touches nothing but registers.
    let leaf = unsafe { core::arch::x86_64::__cpuid(0x4000_0000) };
    [leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes).concat() == b"TCGTCGTCGTCG"
}

/// CPUID of processor `index` of `cpus`.
///
/// With `emulated_svm`, everything that needs XSAVE is left out: Linux 7.x finds its state's size wrong there and dies.
pub(super) fn cpuid(supported: &CpuId, index: u32, cpus: u32, emulated_svm: bool) -> CpuId {
    let mut cpuid = supported.clone();
    let topology_bits = cpus.next_power_of_two().trailing_zeros();
    for entry in cpuid.as_mut_slice() {
        match (entry.function, entry.index) {
            (0x1, _) => {
                entry.ebx = entry.ebx & 0x0000_ffff | index << 24 | cpus << 16;
                entry.edx = entry.edx & !(1 << 28) | u32::from(cpus > 1) << 28;
                entry.ecx |= 1 << 31 | 1 << 24; // under a hypervisor; timer with deadlines
                entry.ecx &= !(1 << 5); // no virtualisation inside
            }
            // Caches are shared by nobody; the package has all processors.
            (0x4, _) if entry.eax & 0x1f != 0 => {
                entry.eax = entry.eax & 0x0000_3fff | ((1 << topology_bits) - 1) << 26;
            }
            (0xb | 0x1f, 0) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 1, 1 << 8, index),
            (0xb | 0x1f, 1) => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (topology_bits, cpus, 2 << 8 | 1, index)
            }
            (0xb | 0x1f, level) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, level & 0xff, index),
            // No virtualisation inside, and topology by the plain leaves only.
            (0x8000_0001, _) => entry.ecx &= !(1 << 2 | 1 << 22),
            (0x8000_0008, _) => entry.ecx = entry.ecx & !0xf0ff | topology_bits << 12 | (cpus - 1),
            _ => {}
        }
        if emulated_svm {
            without_xsave(entry);
        }
    }
    cpuid
}

fn without_xsave(entry: &mut kvm_bindings::kvm_cpuid_entry2) {
    match (entry.function, entry.index) {
        // FMA, XSAVE, OSXSAVE, AVX, F16C.
        (0x1, _) => entry.ecx &= !(1 << 12 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29),
        (0x7, 0) => {
            // AVX2, MPX, and all of AVX-512.
            let avx512 = 1 << 16 | 1 << 17 | 1 << 21 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 30 | 1 << 31;
            entry.ebx &= !(1 << 5 | 1 << 14 | avx512);
            // Protection keys, shadow stacks, vector AES and multiplication, and the rest of AVX-512.
            let avx512 = 1 << 1 | 1 << 6 | 1 << 11 | 1 << 12 | 1 << 14;
            entry.ecx &= !(1 << 3 | 1 << 4 | 1 << 7 | 1 << 9 | 1 << 10 | avx512);
            // AVX-512, user interrupts, indirect branch tracking, AMX.
            entry.edx &=
                !(1 << 2 | 1 << 3 | 1 << 5 | 1 << 8 | 1 << 20 | 1 << 22 | 1 << 23 | 1 << 24 | 1 << 25);
        }
        // AVX-VNNI and the like; the state's sizes; AMX; AVX10.
        (0x7, _) | (0xd | 0x1d | 0x1e | 0x24, _) => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0)
        }
        // LWP, XOP and FMA4.
        (0x8000_0001, _) => entry.ecx &= !(1 << 11 | 1 << 15 | 1 << 16),
        _ => {}
    }
}

/// Sets the registers of the first processor. The others wait for the first to start them.
pub(super) fn begin(vcpu: &VcpuFd, entry: Entry) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    let mut regs = kvm_regs { rflags: 2, ..Default::default() };
    let mut task = segment(4, TASK);
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 5 * 8 - 1);
    (sregs.idt.base, sregs.idt.limit) = (0, 0);
    match entry {
        Entry::Long(address) => {
            regs.rip = address;
            regs.rsi = ZERO_PAGE;
            sregs.cs = segment(2, CODE_64);
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.cr3 = PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.efer |= EFER_LME | EFER_LMA;
        }
        Entry::Pvh(address) => {
            regs.rip = address;
            regs.rbx = PVH_INFO;
            sregs.cs = segment(2, CODE_32);
            sregs.cr0 = CR0_PE | CR0_ET;
            task.limit = 0x67;
        }
    }
    let data = segment(3, DATA);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = task;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&regs)?;
    // What `finit` and reset leave.
    vcpu.set_fpu(&kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() })
}

/// The descriptors that [`begin`] names.
pub(super) fn descriptors(entry: Entry) -> [u64; 5] {
    let code = if matches!(entry, Entry::Long(_)) { CODE_64 } else { CODE_32 };
    [0, 0, code, DATA, TASK]
}

/// Sets what firmware sets on every processor.
pub(super) fn firmware(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let entries =
        [entry(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRINGS), entry(MSR_MTRR_DEFAULT, MTRR_WRITE_BACK)];
    let msrs = Msrs::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(nix::libc::E2BIG))?;
    let set = vcpu.set_msrs(&msrs)?;
    if set == entries.len() { Ok(()) } else { Err(kvm_ioctls::Error::new(nix::libc::EINVAL)) }
}

/// The segment of a descriptor.
fn segment(number: u16, descriptor: u64) -> kvm_segment {
    let bits = |from: u32, count: u32| (descriptor >> from & ((1 << count) - 1)) as u32;
    let granular = bits(55, 1) != 0;
    let limit = bits(0, 16) | bits(48, 4) << 16;
    kvm_segment {
        base: (bits(16, 24) | bits(56, 8) << 24).into(),
        limit: if granular { limit << 12 | 0xfff } else { limit },
        selector: number * 8,
        type_: bits(40, 4) as u8,
        s: bits(44, 1) as u8,
        dpl: bits(45, 2) as u8,
        present: bits(47, 1) as u8,
        avl: bits(52, 1) as u8,
        l: bits(53, 1) as u8,
        db: bits(54, 1) as u8,
        g: u8::from(granular),
        unusable: 0,
        padding: 0,
    }
}

/// The registers as text, for people.
pub(super) fn describe(index: u32, regs: &kvm_regs, sregs: &kvm_sregs) -> String {
    let mut text = String::new();
    let r = regs;
    // Writing to a string does not fail.
    let _ =
        writeln!(text, "vCPU {index}: RIP {:04x}:{:016x} RFLAGS {:08x}", sregs.cs.selector, r.rip, r.rflags);
    let _ = writeln!(text, "  RAX {:016x} RBX {:016x} RCX {:016x} RDX {:016x}", r.rax, r.rbx, r.rcx, r.rdx);
    let _ = writeln!(text, "  RSI {:016x} RDI {:016x} RBP {:016x} RSP {:016x}", r.rsi, r.rdi, r.rbp, r.rsp);
    let _ = writeln!(text, "  R8  {:016x} R9  {:016x} R10 {:016x} R11 {:016x}", r.r8, r.r9, r.r10, r.r11);
    let _ = writeln!(text, "  R12 {:016x} R13 {:016x} R14 {:016x} R15 {:016x}", r.r12, r.r13, r.r14, r.r15);
    let s = sregs;
    let _ = writeln!(
        text,
        "  CR0 {:08x} CR2 {:016x} CR3 {:016x} CR4 {:08x} EFER {:04x} GS {:016x}",
        s.cr0, s.cr2, s.cr3, s.cr4, s.efer, s.gs.base
    );
    text
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_cpuid_entry2;

    use super::*;

    fn all_ones() -> CpuId {
        let leaf = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            eax: !0,
            ebx: !0,
            ecx: !0,
            edx: !0,
            ..Default::default()
        };
        let leaves = [
            (1, 0),
            (4, 0),
            (7, 0),
            (7, 1),
            (0xb, 0),
            (0xb, 1),
            (0xd, 0),
            (0x8000_0001, 0),
            (0x8000_0008, 0),
        ];
        CpuId::from_entries(&leaves.map(|(function, index)| leaf(function, index))).unwrap()
    }

    #[test]
    fn nothing_that_needs_xsave_is_left() {
        let masked = cpuid(&all_ones(), 0, 1, true);
        let leaf = |function, index| {
            *masked.as_slice().iter().find(|e| (e.function, e.index) == (function, index)).unwrap()
        };
        assert_eq!(leaf(1, 0).ecx & (1 << 26 | 1 << 28), 0);
        assert_eq!(leaf(7, 0).ebx & (1 << 5 | 1 << 16), 0);
        assert_eq!((leaf(7, 1).eax, leaf(0xd, 0).eax), (0, 0));
        let whole = cpuid(&all_ones(), 0, 1, false);
        assert_eq!(whole.as_slice()[0].ecx & 1 << 26, 1 << 26);
    }

    #[test]
    fn topology() {
        let third = cpuid(&all_ones(), 2, 3, false);
        let leaves = third.as_slice();
        assert_eq!(leaves[0].ebx >> 16, 0x0203);
        assert_eq!((leaves[5].eax, leaves[5].ebx, leaves[5].edx), (2, 3, 2));
        assert_eq!(leaves[8].ecx & 0xf0ff, 0x2002);
        assert_eq!(physical_bits(&third), 52);
    }

    #[test]
    fn segments() {
        let code = segment(2, CODE_64);
        assert_eq!((code.base, code.limit, code.selector, code.type_, code.l), (0, u32::MAX, 16, 0xb, 1));
        let task = segment(4, TASK);
        assert_eq!((task.limit, task.type_, task.s, task.present), (0x67, 0xb, 0, 1));
    }
}
