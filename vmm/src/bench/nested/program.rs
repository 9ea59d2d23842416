// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guest that measures a register access: it turns a PCI function's memory on at a place of its own choice, accesses one
//! register many times, and says on the serial port how many ticks of the time stamp counter that took. Again and again.
#![allow(unsafe_code, reason = "assembly, and the labels in it")]

use crate::machine::small::{self, CODE};

/// Begins the line that has a round's ticks, as 16 hexadecimal digits.
pub(super) const WORD: &[u8] = b"ticks ";

/// What to access, and how.
#[derive(Clone, Copy, Debug)]
pub(super) struct Access {
    /// PCI slot on bus 0.
    pub(super) slot: u32,
    /// Offset in BAR 0, which must be one of memory.
    pub(super) register: u32,
    /// Written instead of read.
    pub(super) write: bool,
    /// Times in a round.
    pub(super) count: u32,
}

impl Access {
    /// The guest-physical address of the register.
    pub(super) fn place(&self) -> u64 {
        (BAR + self.register).into()
    }
}

/// Where the function's BAR 0 is put: no RAM, firmware or configuration space of any machine here, with as little memory as
/// these guests have.
const BAR: u32 = 0xc800_0000;

/// An image that does it for ever.
pub(super) fn image(access: Access) -> Vec<u8> {
    let mut code = code().to_vec();
    let words =
        [1 << 31 | access.slot << 11, BAR, BAR + access.register, access.count, u32::from(access.write)];
    for (place, word) in code[PARAMETERS..].chunks_exact_mut(4).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    small::image(&code)
}

/// Where the parameters are: behind a short jump and its padding.
const PARAMETERS: usize = 4;

// It is entered at CODE, so addresses of labels are their distances from the start, plus that.
std::arch::global_asm!(
    ".pushsection .rodata.hmm_testbench_accesses, \"a\", @progbits",
    ".globl hmm_testbench_accesses_start, hmm_testbench_accesses_end",
    ".code32",
    "hmm_testbench_accesses_start:",
    "    jmp 2f",
    "    .balign 4",
    "1:  .long 0, 0, 0, 0, 0",
    "2:  movl ${code} + 0x1000, %esp",
    "    movl ${code} + (1b - hmm_testbench_accesses_start), %ebp",
    // BAR 0 and, should it have 64 bits, its upper half.
    "    movl $0x10, %ebx",
    "    movl 4(%ebp), %ecx",
    "    call 7f",
    "    movl $0x14, %ebx",
    "    xorl %ecx, %ecx",
    "    call 7f",
    // Memory and bus mastering.
    "    movl $0x04, %ebx",
    "    movl $6, %ecx",
    "    call 7f",
    "3:  movl 8(%ebp), %edi",
    "    movl 12(%ebp), %ecx",
    "    xorl %eax, %eax",
    "    cpuid",
    "    movl 12(%ebp), %ecx",
    "    rdtsc",
    "    pushl %edx",
    "    pushl %eax",
    "    xorl %eax, %eax",
    "    cmpl $0, 16(%ebp)",
    "    jne 5f",
    "4:  movl (%edi), %eax",
    "    decl %ecx",
    "    jnz 4b",
    "    jmp 6f",
    "5:  movl %eax, (%edi)",
    "    decl %ecx",
    "    jnz 5b",
    "6:  rdtsc",
    "    popl %ebx",
    "    popl %ecx",
    "    subl %ebx, %eax",
    "    sbbl %ecx, %edx",
    "    movl %eax, %esi",
    "    movl %edx, %ebx",
    "    movb $'t', %al",
    "    call 9f",
    "    movb $'i', %al",
    "    call 9f",
    "    movb $'c', %al",
    "    call 9f",
    "    movb $'k', %al",
    "    call 9f",
    "    movb $'s', %al",
    "    call 9f",
    "    movb $' ', %al",
    "    call 9f",
    "    call 8f",
    "    movl %esi, %ebx",
    "    call 8f",
    "    movb $10, %al",
    "    call 9f",
    "    jmp 3b",
    // Writes ECX to the register EBX of configuration space.
    "7:  movl (%ebp), %eax",
    "    orl %ebx, %eax",
    "    movl $0xcf8, %edx",
    "    outl %eax, %dx",
    "    movl $0xcfc, %edx",
    "    movl %ecx, %eax",
    "    outl %eax, %dx",
    "    ret",
    // Says EBX.
    "8:  movl $8, %ecx",
    "80: roll $4, %ebx",
    "    movl %ebx, %eax",
    "    andl $15, %eax",
    "    addl $'0', %eax",
    "    cmpl $'9', %eax",
    "    jbe 81f",
    "    addl $('a' - '9' - 1), %eax",
    "81: call 9f",
    "    decl %ecx",
    "    jnz 80b",
    "    ret",
    // Says the letter in AL.
    "9:  movl $0x3f8, %edx",
    "    outb %al, %dx",
    "    ret",
    "hmm_testbench_accesses_end:",
    ".popsection",
    code = const CODE,
    options(att_syntax)
);

unsafe extern "C" {
    static hmm_testbench_accesses_start: u8;
    static hmm_testbench_accesses_end: u8;
}

fn code() -> &'static [u8] {
    let (start, end) = (&raw const hmm_testbench_accesses_start, &raw const hmm_testbench_accesses_end);
    // SAFETY: the two labels lie in this order in one section that is never written, and what is between them are bytes.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_is_there_and_its_parameters_are_where_they_are_put() {
        let plain = code();
        assert!((100..0x800).contains(&plain.len()), "{}", plain.len());
        assert_eq!(plain[0], 0xeb, "a short jump");
        assert_eq!(usize::from(plain[1]), PARAMETERS + 5 * 4 - 2, "over the parameters");
        assert!(plain[PARAMETERS..PARAMETERS + 20].iter().all(|byte| *byte == 0));
        let made = image(Access { slot: 4, register: 8, write: true, count: 7 });
        let at = made.len() - plain.len() + PARAMETERS;
        let words: Vec<u32> =
            made[at..at + 20].chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
        assert_eq!(words, [0x8000_2000, BAR, BAR + 8, 7, 1]);
    }
}
