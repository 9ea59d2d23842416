// SPDX-License-Identifier: GPL-2.0
/*
 * Leaves. The driver holds each table's entries as the device has them, in
 * memory from which the device copies them: what has been written there is only
 * ever what the device may have, so it does not matter when it reads it.
 *
 * A leaf goes in two steps: cleared and drained on the device, then forgotten
 * here, with its DMA mapping. In between the page is still the address space's.
 */
#include <linux/dma-mapping.h>

#include "hmm_vgpu.h"

#define VGPU_PTE_RIGHTS	(VGPU_PTE_WRITE | VGPU_PTE_ATOMIC)

/**
 * vgpu_pt_push() - gather a command
 * @ctx: the context
 * @may_sleep: see vgpu_cmd_post()
 * @cmd: the command
 *
 * Context: pt_lock. vgpu_pt_flush() must follow before it is dropped.
 */
void vgpu_pt_push(struct vgpu_ctx *ctx, bool may_sleep, struct vgpu_cmd cmd)
{
	lockdep_assert_held(&ctx->pt_lock);

	if (ctx->nr_batch == VGPU_BATCH)
		vgpu_pt_flush(ctx, may_sleep, false);
	ctx->batch[ctx->nr_batch++] = cmd;
}

/**
 * vgpu_pt_flush() - send the commands gathered
 * @ctx: the context
 * @may_sleep: see vgpu_cmd_wait()
 * @wait: wait for their completion, and so for that of all before them
 *
 * Return: 0, or -EIO if the device is dead.
 */
int vgpu_pt_flush(struct vgpu_ctx *ctx, bool may_sleep, bool wait)
{
	unsigned int count = ctx->nr_batch;
	u32 index;
	int ret;

	lockdep_assert_held(&ctx->pt_lock);

	if (!count)
		return 0;
	ctx->nr_batch = 0;
	ret = vgpu_cmd_post(ctx->vdev, ctx->batch, count, may_sleep, &index);
	if (!ret && wait)
		ret = vgpu_cmd_wait(ctx->vdev, index, may_sleep);
	return ret;
}

/* The run of addresses in which something was cleared. */
struct vgpu_span {
	u64 start;
	u64 last;
	bool may_sleep;
};

typedef void (*vgpu_leaf_fn)(struct vgpu_ctx *ctx, struct vgpu_table *t,
			     unsigned int first, unsigned int count,
			     struct vgpu_span *span);

static bool vgpu_pte_valid(const struct vgpu_table *t, unsigned int i)
{
	return le64_to_cpu(t->pte[i]) & VGPU_PTE_VALID;
}

/*
 * Calls @fn for each run of entries that holds the valid leaves of a table
 * within [start, last]; a 2 MiB leaf that begins before or ends behind counts.
 */
static void vgpu_pt_for_leaves(struct vgpu_ctx *ctx, u64 start, u64 last,
			       vgpu_leaf_fn fn, struct vgpu_span *span)
{
	u64 va = start;

	lockdep_assert_held(&ctx->pt_lock);

	last = min(last, VGPU_VA_LAST);
	while (va <= last && ctx->root) {
		struct vgpu_table *t = ctx->root;
		unsigned int i, end;
		u64 stop;

		for (;;) {
			i = vgpu_pte_index(va, t->level);
			if (!t->level || vgpu_pte_huge(t, i))
				break;
			if (!t->slot[i].table || !t->slot[i].table->used)
				break;
			t = t->slot[i].table;
		}
		/* Up to here one entry of this table reaches; a leaf table, to its end. */
		stop = va | ((1ULL << vgpu_pte_shift(max_t(unsigned int, t->level, 1))) - 1);
		if (!t->level) {
			end = vgpu_pte_index(min(stop, last), 0);
			while (i <= end && !vgpu_pte_valid(t, i))
				i++;
			while (end > i && !vgpu_pte_valid(t, end))
				end--;
			if (i <= end)
				fn(ctx, t, i, end - i + 1, span);
		} else if (vgpu_pte_huge(t, i)) {
			fn(ctx, t, i, 1, span);
		}
		va = stop + 1;
	}
}

/* Clears a run of leaves on the device. */
static void vgpu_pt_clear_run(struct vgpu_ctx *ctx, struct vgpu_table *t,
			      unsigned int first, unsigned int count,
			      struct vgpu_span *span)
{
	unsigned int shift = vgpu_pte_shift(t->level);

	vgpu_pt_push(ctx, span->may_sleep,
		     vgpu_cmd_make(VGPU_CMD_OP_CLEAR_PTES, ctx->handle, t->handle,
				   vgpu_entries(first, count), 0));
	span->start = min(span->start, t->base + ((u64)first << shift));
	span->last = max(span->last, t->base + ((u64)(first + count) << shift) - 1);
}

/* As vgpu_pt_drop(). What comes back from VRAM counts as dirty, whoever wrote it. */
static void vgpu_pt_drop_vram(struct vgpu_ctx *ctx, struct vgpu_table *t, unsigned int i)
{
	WRITE_ONCE(t->pte[i], 0);
	t->slot[i].pfn = 0;
	atomic64_dec(&ctx->mapped_pages);
	vgpu_table_account(ctx, t, -1);
}

/* Forgets one leaf. The device does not use it any more. */
static void vgpu_pt_drop(struct vgpu_ctx *ctx, struct vgpu_table *t, unsigned int i)
{
	u64 pte = le64_to_cpu(t->pte[i]);
	unsigned long pages = pte & VGPU_PTE_HUGE ? VGPU_HUGE_PAGES : 1;
	struct folio *folio = page_folio(pfn_to_page(t->slot[i].pfn));

	if (pte & VGPU_PTE_VRAM) {
		vgpu_pt_drop_vram(ctx, t, i);
		return;
	}
	dma_unmap_page(&ctx->vdev->pdev->dev, pte & VGPU_PTE_ADDRESS,
		       pages << PAGE_SHIFT,
		       pte & VGPU_PTE_WRITE ? DMA_BIDIRECTIONAL : DMA_TO_DEVICE);
	/*
	 * The device may have written, and the CPU's entry need not say dirty:
	 * MADV_FREE leaves it writable and clean. Whoever is about to unmap the
	 * page looks at it only after this callback, and the page is still there.
	 */
	if (pte & VGPU_PTE_WRITE && !folio_test_dirty(folio))
		folio_mark_dirty(folio);

	WRITE_ONCE(t->pte[i], 0);
	t->slot[i].pfn = 0;
	atomic64_sub(pages, &ctx->mapped_pages);
	vgpu_table_account(ctx, t, -1);
}

static void vgpu_pt_drop_run(struct vgpu_ctx *ctx, struct vgpu_table *t,
			     unsigned int first, unsigned int count,
			     struct vgpu_span *span)
{
	for (; count; first++, count--)
		if (vgpu_pte_valid(t, first))
			vgpu_pt_drop(ctx, t, first);
}

/**
 * vgpu_pt_zap() - take a range of addresses away from the device
 * @ctx: the context, not stopped
 * @start: first address
 * @last: last address
 * @may_sleep: poll for the device by sleeping
 *
 * When it returns nothing in the range is mapped, in a TLB, or being accessed. A
 * 2 MiB leaf that is partly in the range goes as a whole. Where nothing is mapped
 * the device is not bothered: what a fault is about to map there, it will map
 * under pt_lock and only if no invalidation came in between.
 *
 * Context: pt_lock. Allocates nothing.
 */
void vgpu_pt_zap(struct vgpu_ctx *ctx, u64 start, u64 last, bool may_sleep)
{
	struct vgpu_span span = { .start = U64_MAX, .may_sleep = may_sleep };

	vgpu_pt_for_leaves(ctx, start, last, vgpu_pt_clear_run, &span);
	if (span.start > span.last)
		return;
	vgpu_pt_push(ctx, may_sleep,
		     vgpu_cmd_make(VGPU_CMD_OP_INVALIDATE, ctx->handle,
				   span.start, span.last, 0));
	/* Should the device be dead, it has no access to memory: go on. */
	vgpu_pt_flush(ctx, may_sleep, true);
	vgpu_pt_for_leaves(ctx, start, last, vgpu_pt_drop_run, &span);

	/* Even a process that does not fault any more gives its tables back. */
	if (ctx->nr_empty > VGPU_EMPTY_TABLES)
		queue_work(vgpu_fault_wq, &ctx->work);
}

/* Pushes the commands that clear every leaf. For vgpu_ctx_stop_locked(). */
void vgpu_pt_clear_all(struct vgpu_ctx *ctx)
{
	struct vgpu_span span = { .start = U64_MAX, .may_sleep = true };

	vgpu_pt_for_leaves(ctx, 0, VGPU_VA_LAST, vgpu_pt_clear_run, &span);
}

/* Forgets every leaf. For vgpu_ctx_stop_locked(), when the context has drained. */
void vgpu_pt_drop_all(struct vgpu_ctx *ctx)
{
	vgpu_pt_for_leaves(ctx, 0, VGPU_VA_LAST, vgpu_pt_drop_run, NULL);
}

static u64 vgpu_pt_rights(struct vgpu_ctx *ctx, unsigned long hmm_pfn)
{
	bool atomic = ctx->atomics == VGPU_ATOMICS_COHERENT;

	if (!(hmm_pfn & HMM_PFN_WRITE))
		return 0;
	/* No CPU gets at the device's own memory. */
	if (vgpu_devmem_leaf(ctx->vdev, hmm_pfn & ~HMM_PFN_FLAGS))
		atomic = ctx->atomics != VGPU_ATOMICS_NONE;
	return atomic ? VGPU_PTE_RIGHTS : VGPU_PTE_WRITE;
}

/* Whether hmm_range_fault() has found a page that can be mapped. */
static bool vgpu_pt_usable(struct vgpu_ctx *ctx, unsigned long hmm_pfn)
{
	return (hmm_pfn & (HMM_PFN_VALID | HMM_PFN_ERROR)) == HMM_PFN_VALID &&
	       vgpu_devmem_usable(ctx, hmm_pfn & ~HMM_PFN_FLAGS);
}

/* Whether a valid leaf is what it should be. */
static bool vgpu_pt_same(const struct vgpu_table *t, unsigned int i,
			 unsigned long pfn, u64 rights)
{
	return t->slot[i].pfn == pfn &&
	       (le64_to_cpu(t->pte[i]) & VGPU_PTE_RIGHTS) == rights;
}

/* Sets a leaf here; the device is told by the caller. */
static int vgpu_pt_set(struct vgpu_ctx *ctx, struct vgpu_table *t, unsigned int i,
		       unsigned long pfn, u64 rights, bool huge)
{
	struct device *dev = &ctx->vdev->pdev->dev;
	size_t size = huge ? VGPU_HUGE_SIZE : PAGE_SIZE;
	enum dma_data_direction dir;
	dma_addr_t dma;

	dir = rights & VGPU_PTE_WRITE ? DMA_BIDIRECTIONAL : DMA_TO_DEVICE;
	dma = dma_map_page(dev, pfn_to_page(pfn), 0, size, dir);
	if (dma_mapping_error(dev, dma))
		return -ENOMEM;
	if (dma & (size - 1)) {
		dma_unmap_page(dev, dma, size, dir);
		return -EINVAL;
	}

	t->slot[i].pfn = pfn;
	WRITE_ONCE(t->pte[i], cpu_to_le64(VGPU_PTE_VALID | rights | dma |
					  (huge ? VGPU_PTE_HUGE : 0)));
	atomic64_add(size >> PAGE_SHIFT, &ctx->mapped_pages);
	vgpu_table_account(ctx, t, 1);
	return 0;
}

/* Sets a leaf of 4 KiB, wherever the page is. */
static int vgpu_pt_set_page(struct vgpu_ctx *ctx, struct vgpu_table *t, unsigned int i,
			    unsigned long hmm_pfn)
{
	u64 rights = vgpu_pt_rights(ctx, hmm_pfn);
	unsigned long pfn = hmm_pfn & ~HMM_PFN_FLAGS;
	u64 leaf = vgpu_devmem_leaf(ctx->vdev, pfn);

	if (!leaf)
		return vgpu_pt_set(ctx, t, i, pfn, rights, false);
	t->slot[i].pfn = pfn;
	WRITE_ONCE(t->pte[i], cpu_to_le64(VGPU_PTE_VALID | rights | leaf));
	atomic64_inc(&ctx->mapped_pages);
	vgpu_table_account(ctx, t, 1);
	return 0;
}

/**
 * vgpu_pt_map() - map pages that hmm_range_fault() has found
 * @ctx: the context, not stopped
 * @start: first address; all lie in one table of level 0, which has been prepared
 * @pfns: what was found; pages that are not there are left out
 * @count: how many
 * @must: index of the one without which it is an error
 *
 * Pushes the commands, the caller flushes.
 * Context: pt_lock, with a sequence that is still valid.
 * Return: 0 or -ENOMEM.
 */
int vgpu_pt_map(struct vgpu_ctx *ctx, unsigned long start,
		const unsigned long *pfns, unsigned long count,
		unsigned long must)
{
	struct vgpu_table *t = vgpu_table_lookup(ctx, start, 0);
	unsigned int first = vgpu_pte_index(start, 0);
	unsigned int low = VGPU_PTE_ENTRIES, high = 0;
	unsigned long n;
	int ret = 0;

	lockdep_assert_held(&ctx->pt_lock);

	if (!t)
		return -ENOMEM;

	/*
	 * A right is added, as by a first write: the old leaf goes in order
	 * before the new one comes, TLB, DMA mapping and all.
	 */
	for (n = 0; n < count; n++) {
		unsigned long va = start + (n << PAGE_SHIFT);

		if (!vgpu_pt_usable(ctx, pfns[n]) || !vgpu_pte_valid(t, first + n) ||
		    vgpu_pt_same(t, first + n, pfns[n] & ~HMM_PFN_FLAGS,
				 vgpu_pt_rights(ctx, pfns[n])))
			continue;
		vgpu_pt_zap(ctx, va, start + (count << PAGE_SHIFT) - 1, true);
		break;
	}

	for (n = 0; n < count; n++) {
		int err;

		if (!vgpu_pt_usable(ctx, pfns[n]) || vgpu_pte_valid(t, first + n))
			continue;
		err = vgpu_pt_set_page(ctx, t, first + n, pfns[n]);
		if (err) {
			if (n == must)
				ret = err;
			continue;
		}
		low = min_t(unsigned int, low, first + n);
		high = first + n;
	}
	if (low <= high)
		vgpu_pt_push(ctx, true,
			     vgpu_cmd_make(VGPU_CMD_OP_WRITE_PTES, ctx->handle, t->handle,
					   vgpu_entries(low, high - low + 1),
					   t->dma + low * sizeof(*t->pte)));
	return ret;
}

/**
 * vgpu_pt_map_huge() - map 2 MiB that the CPU maps as a whole
 * @ctx: the context, not stopped
 * @va: an address in it; the table of level 1 has been prepared
 * @hmm_pfn: what hmm_range_fault() has found there
 *
 * Takes the place of 4 KiB leaves; their table is detached, to be returned by
 * the caller. Pushes the commands, the caller flushes.
 * Context: fault worker, pt_lock, with a sequence that is still valid.
 * Return: 0, or an error if it can only be mapped by pages.
 */
int vgpu_pt_map_huge(struct vgpu_ctx *ctx, unsigned long va, unsigned long hmm_pfn)
{
	unsigned long pfn = (hmm_pfn & ~HMM_PFN_FLAGS) & ~(VGPU_HUGE_PAGES - 1);
	unsigned long base = va & ~(VGPU_HUGE_SIZE - 1);
	struct vgpu_table *t = vgpu_table_lookup(ctx, va, 1);
	u64 rights = vgpu_pt_rights(ctx, hmm_pfn);
	unsigned int i = vgpu_pte_index(va, 1);
	int ret;

	lockdep_assert_held(&ctx->pt_lock);

	if (!t)
		return -ENOMEM;
	if (!vgpu_pt_usable(ctx, hmm_pfn))
		return -EFAULT;
	if (vgpu_pte_huge(t, i) && vgpu_pt_same(t, i, pfn, rights))
		return 0;
	vgpu_pt_zap(ctx, base, base + VGPU_HUGE_SIZE - 1, true);
	if (t->slot[i].table) {
		vgpu_table_detach(ctx, t->slot[i].table);
		vgpu_pt_flush(ctx, true, true);
	}

	ret = vgpu_pt_set(ctx, t, i, pfn, rights, true);
	if (ret)
		return ret;
	atomic64_inc(&ctx->huge_maps);
	vgpu_pt_push(ctx, true,
		     vgpu_cmd_make(VGPU_CMD_OP_WRITE_PTE, ctx->handle, t->handle, i,
				   le64_to_cpu(t->pte[i])));
	return 0;
}

/**
 * vgpu_pt_map_exclusive() - map a page that the CPUs are kept away from
 * @ctx: the context, not stopped
 * @va: its address; the table of level 0 has been prepared
 * @pfn: its page frame number
 *
 * Pushes the commands, the caller flushes.
 * Context: fault worker, pt_lock, with a sequence that is still valid.
 * Return: 0 or -ENOMEM.
 */
int vgpu_pt_map_exclusive(struct vgpu_ctx *ctx, unsigned long va, unsigned long pfn)
{
	struct vgpu_table *t = vgpu_table_lookup(ctx, va, 0);
	unsigned int i = vgpu_pte_index(va, 0);
	int ret;

	lockdep_assert_held(&ctx->pt_lock);

	if (!t)
		return -ENOMEM;
	vgpu_pt_zap(ctx, va & PAGE_MASK, va | ~PAGE_MASK, true);
	ret = vgpu_pt_set(ctx, t, i, pfn, VGPU_PTE_RIGHTS, false);
	if (ret)
		return ret;
	vgpu_pt_push(ctx, true,
		     vgpu_cmd_make(VGPU_CMD_OP_WRITE_PTE, ctx->handle, t->handle, i,
				   le64_to_cpu(t->pte[i])));
	return 0;
}
