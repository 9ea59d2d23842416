/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What ftrace calls at the entry of a hooked function, directly: not as one of
 * its callbacks, which must not sleep, but in the function's own context.
 *
 * On entry (%rsp) is the place in the function behind the call, and 8(%rsp) the
 * function's own return address. A stub calls hmm_gate_enter(). If that returns
 * zero the function goes on as if nothing had been. Else it is called from
 * here, so that its return is seen; hmm_gate_exit() is called, and the stub
 * returns to the function's caller. Arguments on the stack would not be found
 * there: such functions have entry gates only.
 *
 * There is a stub for each hook, since a stub has nowhere to look for the
 * number of its own.
 */
#include <linux/linkage.h>
#include <linux/objtool.h>
#include <asm/ibt.h>
#include <asm/nospec-branch.h>

	.text

/*
 * Goes to %r11 as a return would: it is in the middle of a function, where an
 * indirect branch must not go if the CPU tracks them.
 */
	.balign 16
	.type hmm_gate_jump, @function
hmm_gate_jump:
	pushq	%r11
	RET
	.size hmm_gate_jump, . - hmm_gate_jump
	STACK_FRAME_NON_STANDARD hmm_gate_jump

/* Where a stub whose function has been called returns to: past the function. */
	.balign 16
	.type hmm_gate_past, @function
hmm_gate_past:
	ENDBR
	RET
	.size hmm_gate_past, . - hmm_gate_past

.macro restore
	popq	%r9
	popq	%r8
	popq	%rcx
	popq	%rdx
	popq	%rsi
	popq	%rdi
	popq	%rax
.endm

.macro stub n
	.balign 16
	.type hmm_gate_stub_\n, @function
hmm_gate_stub_\n:
	ENDBR
	pushq	%rbp
	movq	%rsp, %rbp
	pushq	%rax
	pushq	%rdi
	pushq	%rsi
	pushq	%rdx
	pushq	%rcx
	pushq	%r8
	pushq	%r9
	movq	%rdi, %rsi
	movl	$\n, %edi
	call	hmm_gate_enter
	testq	%rax, %rax
	jnz	1f
	restore
	popq	%rbp
	RET
1:
	restore
	movq	8(%rbp), %r11
	call	hmm_gate_jump
	pushq	%rax
	pushq	%rdx
	movq	%rax, %rsi
	movl	$\n, %edi
	call	hmm_gate_exit
	popq	%rdx
	popq	%rax
	leaq	hmm_gate_past(%rip), %r11
	movq	%r11, 8(%rbp)
	popq	%rbp
	RET
	.size hmm_gate_stub_\n, . - hmm_gate_stub_\n
.endm

.irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23
	stub \n
.endr

	.section .rodata
	.balign 8
	.globl hmm_gate_stubs
hmm_gate_stubs:
.irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23
	.quad hmm_gate_stub_\n
.endr
	.size hmm_gate_stubs, . - hmm_gate_stubs
