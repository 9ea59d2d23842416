// SPDX-License-Identifier: GPL-2.0
/*
 * Invalidations under way, from the return of their start to the entry of their
 * end.
 *
 * The start is reported, and so judged before its caller goes on to change the
 * CPU's page tables. That it is over the host must be able to see without being
 * told, since a report takes longer than most invalidations: each has a slot in
 * memory, which holds its number until its end. A driver maps nothing there
 * before that, so whoever sees a mapping made sees the slot as it was then or
 * later.
 *
 * Start and end are paired by the range's address, which its caller keeps.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/dma-mapping.h>
#include <linux/hashtable.h>
#include <linux/list.h>
#include <linux/memremap.h>
#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/page-flags.h>
#include <linux/pagemap.h>
#include <linux/pci.h>
#include <linux/slab.h>
#include <linux/spinlock.h>

#include "hmm_vgpu_regs.h"
#include "witness.h"

/* Invalidations that can be under way at once: their callers sleep. */
#define MAX_RANGES 1024

/**
 * struct live_range - an invalidation under way
 * @node: in the hash, or in the list of free entries
 * @range: its range's address, a key
 * @id: the mm's id
 */
struct live_range {
	struct hlist_node node;
	const struct mmu_notifier_range *range;
	u64 id;
};

static DEFINE_RAW_SPINLOCK(ranges_lock);
static DEFINE_HASHTABLE(under_way, 8);
static HLIST_HEAD(unused);
static struct live_range *entries;
/* Read by the host. */
static __le64 *slots;
static dma_addr_t slots_dma;
/* Written by the host, while a start is judged. */
static __le64 (*questions)[WITNESS_QUESTION_WORDS];
static dma_addr_t questions_dma;
static u64 last_number;
/* For want of an entry. */
static u64 missed;

static struct live_range *find(const struct mmu_notifier_range *range)
{
	struct live_range *live;

	lockdep_assert_held(&ranges_lock);
	hash_for_each_possible(under_way, live, node, (unsigned long)range) {
		if (live->range == range)
			return live;
	}
	return NULL;
}

static u32 event_number(const struct mmu_notifier_range *range)
{
	switch (range->event) {
	case MMU_NOTIFY_UNMAP:
		return WITNESS_RANGE_UNMAP;
	case MMU_NOTIFY_CLEAR:
		return WITNESS_RANGE_CLEAR;
	case MMU_NOTIFY_PROTECTION_VMA:
		return WITNESS_RANGE_PROTECTION_VMA;
	case MMU_NOTIFY_PROTECTION_PAGE:
		return WITNESS_RANGE_PROTECTION_PAGE;
	case MMU_NOTIFY_SOFT_DIRTY:
		return WITNESS_RANGE_SOFT_DIRTY;
	case MMU_NOTIFY_RELEASE:
		return WITNESS_RANGE_RELEASE;
	case MMU_NOTIFY_MIGRATE:
		return WITNESS_RANGE_MIGRATE;
	case MMU_NOTIFY_EXCLUSIVE:
		return WITNESS_RANGE_EXCLUSIVE;
	default:
		return WITNESS_RANGE_OTHER;
	}
}

static void report(u32 kind, u64 id, const struct mmu_notifier_range *range,
		   u32 slot, u64 number)
{
	u32 what = event_number(range);

	if (mmu_notifier_range_blockable(range))
		what |= WITNESS_RANGE_BLOCKABLE;
	if (range->owner)
		what |= WITNESS_RANGE_OWNED;
	if (mm_table_leaving(range->mm))
		what |= WITNESS_RANGE_LEAVING;
	witness_report(kind, id, range->start, range->end - 1,
		       what | (u64)slot << 32, number);
}

/**
 * ranges_open - allocate entries and slots
 * @pdev: the witness's function
 *
 * Return: 0 or -ENOMEM.
 */
int ranges_open(struct pci_dev *pdev)
{
	unsigned int i;

	entries = kvcalloc(MAX_RANGES, sizeof(*entries), GFP_KERNEL);
	if (!entries)
		return -ENOMEM;
	slots = dma_alloc_coherent(&pdev->dev, MAX_RANGES * sizeof(*slots),
				   &slots_dma, GFP_KERNEL);
	if (!slots) {
		kvfree(entries);
		entries = NULL;
		return -ENOMEM;
	}
	questions = dma_alloc_coherent(&pdev->dev,
				       MAX_RANGES * sizeof(*questions),
				       &questions_dma, GFP_KERNEL);
	if (!questions) {
		dma_free_coherent(&pdev->dev, MAX_RANGES * sizeof(*slots),
				  slots, slots_dma);
		kvfree(entries);
		entries = NULL;
		return -ENOMEM;
	}
	memset(slots, 0, MAX_RANGES * sizeof(*slots));
	memset(questions, 0, MAX_RANGES * sizeof(*questions));
	hash_init(under_way);
	INIT_HLIST_HEAD(&unused);
	for (i = 0; i < MAX_RANGES; i++)
		hlist_add_head(&entries[i].node, &unused);
	return 0;
}

/**
 * ranges_tell - tell the host where the slots are
 */
void ranges_tell(void)
{
	witness_report(WITNESS_REC_RANGE_SLOTS, 0, slots_dma, MAX_RANGES,
		       questions_dma, 0);
}

/**
 * ranges_close - free them
 * @pdev: as they were opened with
 *
 * No probe runs any more, and the host has been told BYE.
 */
void ranges_close(struct pci_dev *pdev)
{
	dma_free_coherent(&pdev->dev, MAX_RANGES * sizeof(*questions), questions,
			  questions_dma);
	dma_free_coherent(&pdev->dev, MAX_RANGES * sizeof(*slots), slots,
			  slots_dma);
	kvfree(entries);
	questions = NULL;
	slots = NULL;
	entries = NULL;
}

/*
 * Whether nobody has said that there is something in it. Of others than these nobody
 * asks. One that is being written back was dirty a moment ago.
 */
static bool page_is_clean(struct page *page)
{
	struct folio *folio = page_folio(page);

	return !folio_test_dirty(folio) && !folio_test_writeback(folio) &&
	       !folio_test_hugetlb(folio) && !is_zone_device_page(page) &&
	       (folio_test_anon(folio) || folio_mapping(folio));
}

/*
 * Whether what is in a clean page is lost when it is dropped as it is. The CPU's
 * entry is not dirty, the host has seen that.
 *
 * An anonymous page goes with its last mapping, and nobody wants it back; but who
 * reclaims it drops it only if it is clean, and holds its lock. What a driver has
 * to say of the others it has to say in all cases. Unless it has pinned them: then
 * they stay, and it may say so when it unpins them.
 */
static bool clean_page_would_be_lost(struct page *page)
{
	struct folio *folio = page_folio(page);

	if (folio_maybe_dma_pinned(folio))
		return false;
	return !folio_test_anon(folio) || folio_test_locked(folio);
}

/* The pages are still mapped: the caller is about to change that. */
static void answer(u64 id, u32 slot, u64 number)
{
	const __le64 *word = questions[slot];
	u64 what = le64_to_cpu(READ_ONCE(*word++));
	u64 count = min_t(u64, (u32)what, WITNESS_QUESTIONS_MOST);
	u64 answer = WITNESS_QUESTIONS_ANSWERED;
	unsigned int i;

	/* The host fetches an answer when it judges the next start in this slot. */
	if (!count || what & WITNESS_QUESTIONS_ANSWERED)
		return;
	for (i = 0; i < count; i++, word += 3) {
		u64 frame = le64_to_cpu(word[1]);
		struct page *page;

		if (!pfn_valid(PHYS_PFN(frame)))
			continue;
		page = pfn_to_page(PHYS_PFN(frame));
		if (!page_is_clean(page))
			continue;
		answer |= BIT_ULL(i);
		if (!(what & WITNESS_QUESTIONS_STAYS) &&
		    clean_page_would_be_lost(page))
			witness_report(WITNESS_REC_PAGE_CLEAN, id,
				       le64_to_cpu(word[0]), frame,
				       le64_to_cpu(word[2]), number);
	}
	WRITE_ONCE(questions[slot][0], cpu_to_le64(answer));
}

/**
 * range_started - the start of an invalidation has returned 0
 * @id: of this address space
 * @range: the range
 */
void range_started(u64 id, const struct mmu_notifier_range *range)
{
	struct live_range *live;
	unsigned long flags;
	u64 number;
	u32 slot;

	raw_spin_lock_irqsave(&ranges_lock, flags);
	if (hlist_empty(&unused)) {
		missed++;
		raw_spin_unlock_irqrestore(&ranges_lock, flags);
		return;
	}
	live = hlist_entry(unused.first, struct live_range, node);
	hlist_del(&live->node);
	live->range = range;
	live->id = id;
	slot = live - entries;
	number = ++last_number;
	hash_add(under_way, &live->node, (unsigned long)range);
	WRITE_ONCE(slots[slot], cpu_to_le64(number));
	raw_spin_unlock_irqrestore(&ranges_lock, flags);

	/* Not under the lock: the others' reports need not wait for this one. */
	report(WITNESS_REC_RANGE_START, id, range, slot, number);
	answer(id, slot, number);
}

/**
 * range_ended - the end of an invalidation has been entered
 * @range: the range
 *
 * What rights are left is told by PROTECTION_VMA only, and only now: which ones
 * there will be a driver does not know at the start.
 */
void range_ended(const struct mmu_notifier_range *range)
{
	struct live_range *live;
	unsigned long flags;
	u64 number = 0;
	u64 id = 0;
	u32 slot = 0;

	raw_spin_lock_irqsave(&ranges_lock, flags);
	live = find(range);
	if (live) {
		slot = live - entries;
		number = le64_to_cpu(slots[slot]);
		id = live->id;
	}
	raw_spin_unlock_irqrestore(&ranges_lock, flags);
	if (!live)
		return;

	if (range->event == MMU_NOTIFY_PROTECTION_VMA)
		report(WITNESS_REC_RANGE_END, id, range, slot, number);

	raw_spin_lock_irqsave(&ranges_lock, flags);
	WRITE_ONCE(slots[slot], 0);
	hash_del(&live->node);
	hlist_add_head(&live->node, &unused);
	raw_spin_unlock_irqrestore(&ranges_lock, flags);
}

/**
 * ranges_missed - invalidations that were not reported
 */
u64 ranges_missed(void)
{
	return READ_ONCE(missed);
}
