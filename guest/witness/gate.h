/* SPDX-License-Identifier: GPL-2.0 */
/* Between gates and the hooks that bring tasks to them. */
#ifndef HMM_WITNESS_GATE_H
#define HMM_WITNESS_GATE_H

#include <linux/types.h>

#include "hmm_vgpu_regs.h"
#include "hmm_witness_uapi.h"

/* gate.c: called by hooks, in the context of the hooked function. */
void gate_stop(unsigned int site, u64 value);
bool gate_watch_enter(unsigned int site);
void gate_watch_exit(unsigned int site);
/* Whoever calls the three above does so between these; false: not at all. */
bool gate_begin(void);
void gate_end(void);

/**
 * enum hook_sort - what of a function a hook is for
 * @HOOK_ENTRY: a gate at its entry
 * @HOOK_RETURN: a gate at its return
 * @HOOK_WATCH: it is watched for tasks that are asleep in it
 * @HOOK_SORTS: array size
 */
enum hook_sort {
	HOOK_ENTRY,
	HOOK_RETURN,
	HOOK_WATCH,
	HOOK_SORTS
};

/* gate_hook.c */
int hook_add(enum hook_sort sort, const char *function, unsigned int site);
int hook_add_offset(const char *place, unsigned int site);
int hook_clear(void);

#endif
