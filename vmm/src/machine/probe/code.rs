// SPDX-License-Identifier: MIT OR Apache-2.0
//! The probe guest's program.
#![allow(unsafe_code, reason = "assembly, and the labels in it")]

use super::{CODE, FACTOR, FAULTS, IDT_POINTER, PD, PML4, PORT, SEED, SUMMAND, TURNS};

// It runs at CODE, so addresses of labels are their distances from the start, plus that.
std::arch::global_asm!(
    ".pushsection .rodata.hmm_testbench_probe, \"a\", @progbits",
    ".globl hmm_testbench_probe_start, hmm_testbench_probe_fault, hmm_testbench_probe_end",
    ".code32",
    "hmm_testbench_probe_start:",
    "    movl ${pml4}, %eax",
    "    movl %eax, %cr3",
    "    movl %cr4, %eax",
    "    orl $0x620, %eax", // physical address extension, and vector registers
    "    movl %eax, %cr4",
    "    movl $0xc0000080, %ecx", // EFER
    "    rdmsr",
    "    orl $0x100, %eax", // long mode
    "    wrmsr",
    "    movl %cr0, %eax",
    "    orl $0x80000000, %eax", // paging
    "    movl %eax, %cr0",
    "    ljmp $0x08, $(2f - hmm_testbench_probe_start + {code})",
    ".code64",
    "2:  movl $0x10, %eax",
    "    movl %eax, %ds",
    "    movl %eax, %es",
    "    movl %eax, %ss",
    "    movl $0x8000, %esp",
    "    lidt {idt_pointer}",
    "    xorl %r15d, %r15d",
    "    movl ${faults}, %ebx",
    "3:  movq $0, {pd} + 8", // takes the second 2 MiB away
    "    invlpg 0x200000",
    "    movl %ebx, 0x206000", // faults
    "    decl %ebx",
    "    jnz 3b",
    "    movl ${turns}, %ecx",
    "    movabsq ${seed}, %rax",
    "    movabsq ${factor}, %rsi",
    "    movabsq ${summand}, %rdi",
    "4:  imulq %rsi, %rax",
    "    addq %rdi, %rax",
    "    movq %rax, 0x206008",
    "    decl %ecx",
    "    jnz 4b",
    "    movq 0x6008, %xmm0", // the same memory at its other address
    "    pxor %xmm1, %xmm1",
    "    paddq %xmm0, %xmm1",
    "    movq %xmm1, %rax",
    "    addl %r15d, %eax",
    "    outl %eax, ${port}",
    "5:  hlt",
    "    jmp 5b",
    "hmm_testbench_probe_fault:",
    "    incl %r15d",
    "    movq $0x83, {pd} + 8", // back again: present, writable, large, at physical 0
    "    addq $8, %rsp",
    "    iretq",
    "hmm_testbench_probe_end:",
    ".popsection",
    code = const CODE,
    pml4 = const PML4,
    pd = const PD,
    idt_pointer = const IDT_POINTER,
    faults = const FAULTS,
    turns = const TURNS,
    seed = const SEED,
    factor = const FACTOR,
    summand = const SUMMAND,
    port = const PORT,
    options(att_syntax)
);

unsafe extern "C" {
    static hmm_testbench_probe_start: u8;
    static hmm_testbench_probe_fault: u8;
    static hmm_testbench_probe_end: u8;
}

/// The probe's code, and where in it the fault handler begins.
pub(super) fn code() -> (&'static [u8], u64) {
    let (start, fault, end) = (
        &raw const hmm_testbench_probe_start,
        &raw const hmm_testbench_probe_fault,
        &raw const hmm_testbench_probe_end,
    );
    let distance = |to: *const u8| to.addr() - start.addr();
    // SAFETY: the three labels lie in this order in one section that is never written, and what is between them are bytes.
    let bytes = unsafe { std::slice::from_raw_parts(start, distance(end)) };
    (bytes, distance(fault) as u64)
}
