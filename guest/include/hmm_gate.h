/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/*
 * Gates in a driver: places in the middle of a function where a scenario of the
 * testbench may hold a task, or wait for one.
 *
 *	HMM_GATE_DEFINE(looked);
 *	...
 *		hmm_gate_looked();
 *
 * A gate is an empty function that is really called, so that ftrace finds it.
 * It needs nothing of the witness module, and does nothing unless a scenario
 * has hooked it: then the caller may wait here, for seconds of guest time and
 * with whatever locks it holds, but always for a bounded time.
 *
 * Of functions there is no need for one: entry and return of every function
 * that ftrace can trace may be a gate as they are. Where a scenario names a
 * static one it should be noinline.
 */
#ifndef HMM_GATE_H
#define HMM_GATE_H

#include <linux/build_bug.h>
#include <linux/compiler.h>
#include <linux/kernel.h>

/* Context: may sleep. */
#define HMM_GATE_DEFINE(name)						\
	static noinline void hmm_gate_##name(void)			\
	{								\
		might_sleep();						\
		/*							\
		 * Without it the compiler sees that nothing is done; and	\
		 * without the name, that all gates do the same, and makes	\
		 * one function of them.					\
		 */							\
		asm volatile("# gate " #name : : : "memory");		\
	}								\
	static_assert(sizeof(#name) <= 48)

/* Context: any but NMI. Holds its caller for a millisecond at the most. */
#define HMM_GATE_DEFINE_ATOMIC(name)					\
	static noinline void hmm_gate_atomic_##name(void)		\
	{								\
		asm volatile("# gate " #name : : : "memory");		\
	}								\
	static_assert(sizeof(#name) <= 48)

#endif
