// SPDX-License-Identifier: GPL-2.0
/*
 * How this kernel writes its page tables, for a host that walks them.
 *
 * All of it is what the kernel's own headers say as this module is compiled
 * against them, or what the running kernel has decided at boot; nothing is
 * guessed from a version. The types of entries that are no swap are counted
 * down from the end of swap's numbers, and which there are depends on the
 * configuration: so they differ from kernel to kernel.
 */
#include <linux/build_bug.h>
#include <linux/mm.h>
#include <linux/pgtable.h>
#include <linux/swap.h>
#include <linux/swapops.h>

#include "hmm_vgpu_regs.h"
#include "witness.h"

#define NO_TYPE 0xffULL

#ifdef CONFIG_MIGRATION
#define MIGRATION_TYPE(name) ((u64)SWP_MIGRATION_##name)
#else
#define MIGRATION_TYPE(name) NO_TYPE
#endif

#ifdef CONFIG_DEVICE_PRIVATE
#define DEVICE_TYPE(name) ((u64)SWP_DEVICE_##name)
#else
#define DEVICE_TYPE(name) NO_TYPE
#endif

/* One type since 6.15; before, one for each right of the entry it replaced. */
#if defined(CONFIG_DEVICE_PRIVATE) && defined(SWP_DEVICE_EXCLUSIVE)
#define EXCLUSIVE_TYPE ((u64)SWP_DEVICE_EXCLUSIVE)
#else
#define EXCLUSIVE_TYPE NO_TYPE
#endif
#if defined(CONFIG_DEVICE_PRIVATE) && defined(SWP_DEVICE_EXCLUSIVE_READ)
#define EXCLUSIVE_READ_TYPE ((u64)SWP_DEVICE_EXCLUSIVE_READ)
#define EXCLUSIVE_WRITE_TYPE ((u64)SWP_DEVICE_EXCLUSIVE_WRITE)
#else
#define EXCLUSIVE_READ_TYPE NO_TYPE
#define EXCLUSIVE_WRITE_TYPE NO_TYPE
#endif

#if defined(CONFIG_MEMORY_FAILURE) && defined(SWP_HWPOISON)
#define HWPOISON_TYPE ((u64)SWP_HWPOISON)
#else
#define HWPOISON_TYPE NO_TYPE
#endif

#if defined(SWP_PTE_MARKER) && SWP_PTE_MARKER_NUM
#define MARKER_TYPE ((u64)SWP_PTE_MARKER)
#else
#define MARKER_TYPE NO_TYPE
#endif

/* Became a marker in 6.2. */
#ifdef SWP_SWAPIN_ERROR
#define SWAPIN_ERROR_TYPE ((u64)SWP_SWAPIN_ERROR)
#else
#define SWAPIN_ERROR_TYPE NO_TYPE
#endif

/**
 * format_report - tell the host how to read this kernel's page tables
 */
void format_report(void)
{
	u64 layout, first, second;

	/* As the record's description has it, for a pfn and a type of all ones. */
	BUILD_BUG_ON(__swp_entry(0, 0).val !=
		     ~0UL << SWP_OFFSET_SHIFT >> SWP_TYPE_BITS);
	BUILD_BUG_ON(__swp_entry((1UL << SWP_TYPE_BITS) - 1, 0).val !=
		     (__swp_entry(0, 0).val | ~0UL << (64 - SWP_TYPE_BITS)));

	layout = (pgtable_l5_enabled() ? 5 : 4) |
		 (u64)SWP_PFN_BITS << 8 |
		 (u64)SWP_TYPE_BITS << 16 |
		 (u64)SWP_OFFSET_FIRST_BIT << 24;
	first = MIGRATION_TYPE(READ) |
		MIGRATION_TYPE(READ_EXCLUSIVE) << 8 |
		MIGRATION_TYPE(WRITE) << 16 |
		DEVICE_TYPE(READ) << 24 |
		DEVICE_TYPE(WRITE) << 32 |
		EXCLUSIVE_TYPE << 40 |
		EXCLUSIVE_READ_TYPE << 48 |
		EXCLUSIVE_WRITE_TYPE << 56;
	second = HWPOISON_TYPE |
		 MARKER_TYPE << 8 |
		 SWAPIN_ERROR_TYPE << 16 |
		 (u64)MAX_SWAPFILES << 24 |
		 ~0ULL << 32;
	witness_report(WITNESS_REC_CPU_FORMAT, 0, layout, PTE_PFN_MASK, first,
		       second);
}
