/* SPDX-License-Identifier: GPL-2.0 */
/* A probe on the entry and the return of one function. */
#ifndef HMM_WITNESS_PROBE_H
#define HMM_WITNESS_PROBE_H

#include <linux/types.h>

#include "compat.h"

struct dev_pagemap;
struct mm_struct;
struct mmu_notifier_range;

/**
 * struct witness_call - what a probe remembers from a call's entry to its exit
 * @mm: the address space; a key only, since it can be gone at the exit
 * @id: its id, where the probe's entry has looked it up
 * @range: an invalidation's range, which its caller keeps until its end
 * @pgmap: a range of device memory, which its caller keeps
 * @empty: it had no mapping, where the probe's entry has looked
 * @arg3: the call's fourth argument
 */
struct witness_call {
	const struct mm_struct *mm;
	u64 id;
	const struct mmu_notifier_range *range;
	const struct dev_pagemap *pgmap;
	bool empty;
	unsigned long arg3;
};

/**
 * struct witness_probe - a probe on one function
 * @symbol: the function
 * @entry: called at the function's entry with its first two arguments; false:
 *	this call is of no interest, and @exit is not called for it
 * @exit: called when the function has returned, with its result; may be NULL
 *	if @entry never returns true
 * @hook: the kernel's part
 * @registered: it is registered
 *
 * Both are called with preemption off, and must not sleep.
 */
struct witness_probe {
	const char *symbol;
	bool (*entry)(struct witness_call *call, unsigned long arg0,
		      unsigned long arg1);
	void (*exit)(struct witness_call *call, unsigned long result);
#if WITNESS_FPROBE
	struct fprobe hook;
#else
	struct kretprobe hook;
#endif
	bool registered;
};

int witness_probe_register(struct witness_probe *probe);
u64 witness_probe_unregister(struct witness_probe *probe);
u64 witness_probe_missed(const struct witness_probe *probe);

#endif
