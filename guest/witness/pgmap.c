// SPDX-License-Identifier: GPL-2.0
/*
 * Ranges of page frame numbers that stand for memory of devices: what a driver
 * takes with memremap_pages() for MEMORY_DEVICE_PRIVATE. The host finds such
 * numbers in the entries of page tables, and must know what they are, and until
 * when there may be any.
 */
#include <linux/err.h>
#include <linux/kernel.h>
#include <linux/memremap.h>
#include <linux/pfn.h>

#include "hmm_vgpu_regs.h"
#include "probe.h"
#include "witness.h"

static bool started;

#ifdef CONFIG_DEVICE_PRIVATE
static void report(const struct dev_pagemap *pgmap, u32 kind)
{
	int i;

	if (pgmap->type != MEMORY_DEVICE_PRIVATE)
		return;
	for (i = 0; i < pgmap->nr_range; i++)
		witness_report(kind, 0, PHYS_PFN(pgmap->ranges[i].start),
			       PHYS_PFN(pgmap->ranges[i].end),
			       (u64)(uintptr_t)pgmap->owner, 0);
}

static bool map_entry(struct witness_call *call, unsigned long pgmap,
		      unsigned long nid)
{
	call->pgmap = (const struct dev_pagemap *)pgmap;
	return READ_ONCE(started);
}

static void map_exit(struct witness_call *call, unsigned long result)
{
	if (!IS_ERR_VALUE(result))
		report(call->pgmap, WITNESS_REC_DEVICE_PRIVATE_ADDED);
}

/*
 * It waits until the last of the pages is free. The driver has said by calling it
 * that none is in use any more.
 */
static bool unmap_entry(struct witness_call *call, unsigned long pgmap,
			unsigned long unused)
{
	if (READ_ONCE(started))
		report((const struct dev_pagemap *)pgmap,
		       WITNESS_REC_DEVICE_PRIVATE_REMOVED);
	return false;
}

static void no_exit(struct witness_call *call, unsigned long result)
{
}

static struct witness_probe probes[] = {
	{ "memremap_pages", map_entry, map_exit },
	{ "memunmap_pages", unmap_entry, no_exit },
};
#define NR_PROBES ARRAY_SIZE(probes)
#else
/* Nobody can take such a range; not every such kernel has the functions. */
static struct witness_probe probes[1];
#define NR_PROBES 0
#endif

static u64 missed_before;

/**
 * pgmap_register - register the probes; they report nothing yet
 *
 * Return: 0, or the error of the first that could not be registered.
 */
int pgmap_register(void)
{
	unsigned int i;
	int ret;

	for (i = 0; i < NR_PROBES; i++) {
		ret = witness_probe_register(&probes[i]);
		if (ret) {
			pgmap_unregister();
			return ret;
		}
	}
	return 0;
}

/**
 * pgmap_start - let the probes report
 */
void pgmap_start(void)
{
	WRITE_ONCE(started, true);
}

/**
 * pgmap_unregister - unregister the probes
 *
 * When it returns, none runs nor will run.
 */
void pgmap_unregister(void)
{
	unsigned int i;

	WRITE_ONCE(started, false);
	for (i = 0; i < NR_PROBES; i++)
		missed_before += witness_probe_unregister(&probes[i]);
}

/**
 * pgmap_missed - moments that may have gone by without a report
 */
u64 pgmap_missed(void)
{
	u64 missed = missed_before;
	unsigned int i;

	for (i = 0; i < NR_PROBES; i++)
		missed += witness_probe_missed(&probes[i]);
	return missed;
}
