// SPDX-License-Identifier: GPL-2.0
/*
 * The mirror: one mmu_interval_notifier over the whole address space, and
 * hmm_range_fault() for what is there.
 *
 * A fault reads the notifier's sequence, asks for pages under mmap_lock, drops
 * it, takes pt_lock, and maps them only if the sequence has not moved. The
 * callback moves the sequence under pt_lock and then takes the range away from
 * the device. So whichever comes first, nothing stays mapped that should not.
 */
#include <linux/hmm.h>
#include <linux/jiffies.h>
#include <linux/minmax.h>
#include <linux/mm.h>
#include <linux/mmu_notifier.h>

#include "hmm_vgpu.h"

static bool vgpu_mirror_invalidate(struct mmu_interval_notifier *notifier,
				   const struct mmu_notifier_range *range,
				   unsigned long seq)
{
	struct vgpu_ctx *ctx = container_of(notifier, struct vgpu_ctx, notifier);
	bool may_sleep = mmu_notifier_range_blockable(range);

	if (vgpu_exclusive_is_own(ctx, range))
		return vgpu_exclusive_invalidate(ctx, range);

	if (may_sleep)
		mutex_lock(&ctx->pt_lock);
	else if (!mutex_trylock(&ctx->pt_lock))
		return false;

	mmu_interval_set_seq(notifier, seq);
	atomic64_inc(&ctx->invalidations);
	/*
	 * Whatever the event, the device loses the range. Keeping the right to
	 * read where only writes are revoked would be allowed, and is not worth it.
	 */
	if (range->event == MMU_NOTIFY_RELEASE)
		vgpu_ctx_stop_locked(ctx);
	else if (!ctx->stopped)
		vgpu_pt_zap(ctx, range->start, range->end - 1, may_sleep);
	mutex_unlock(&ctx->pt_lock);
	return true;
}

static const struct mmu_interval_notifier_ops vgpu_mirror_ops = {
	.invalidate = vgpu_mirror_invalidate,
};

/**
 * vgpu_mirror_begin() - begin to mirror an address space
 * @ctx: the context
 * @mm: the caller's address space
 *
 * Return: 0 or an error.
 */
int vgpu_mirror_begin(struct vgpu_ctx *ctx, struct mm_struct *mm)
{
	int ret;

	ctx->mm = mm;
	ret = mmu_interval_notifier_insert(&ctx->notifier, mm, 0,
					   ULONG_MAX & PAGE_MASK, &vgpu_mirror_ops);
	ctx->mirrored = !ret;
	return ret;
}

/**
 * vgpu_mirror_end() - remove the notifier, if it was inserted
 * @ctx: the context, stopped; its fault worker does not run any more
 *
 * Waits for callbacks that run. Context: no lock that a callback takes.
 */
void vgpu_mirror_end(struct vgpu_ctx *ctx)
{
	if (ctx->mirrored)
		mmu_interval_notifier_remove(&ctx->notifier);
	ctx->mirrored = false;
}

/**
 * struct vgpu_window - pages looked at for one fault
 * @range: for hmm_range_fault()
 * @must: index of the page that faulted
 * @wanted: how many pages from there on the access wants
 * @huge: the CPU maps 2 MiB here, and all of them are in the vma
 */
struct vgpu_window {
	struct hmm_range range;
	unsigned long must;
	unsigned long wanted;
	bool huge;
};

/* Whether a vma allows an access; HMM would say so too, but later. */
bool vgpu_mirror_allowed(struct vgpu_ctx *ctx, const struct vm_area_struct *vma,
			 u32 access)
{
	if (access & VGPU_FAULT_ACCESS_ATOMIC && ctx->atomics == VGPU_ATOMICS_NONE)
		return false;
	if (access & (VGPU_FAULT_ACCESS_WRITE | VGPU_FAULT_ACCESS_ATOMIC) &&
	    !(vma->vm_flags & VM_WRITE))
		return false;
	return vma->vm_flags & VM_READ;
}

/* Makes sure that what was found can be mapped for the access. */
static int vgpu_mirror_claim(struct vgpu_ctx *ctx, u32 access, struct vgpu_window *w)
{
	return vgpu_devmem_claim(ctx, &ctx->pfns[w->must], w->wanted,
				 access & (VGPU_FAULT_ACCESS_WRITE |
					   VGPU_FAULT_ACCESS_ATOMIC));
}

/* Whether the page must be made exclusive first. */
static bool vgpu_mirror_wants_exclusive(struct vgpu_ctx *ctx, u32 access,
					const struct vgpu_window *w)
{
	return access & VGPU_FAULT_ACCESS_ATOMIC &&
	       ctx->atomics == VGPU_ATOMICS_EXCLUSIVE &&
	       !vgpu_devmem_leaf(ctx->vdev, ctx->pfns[w->must] & ~HMM_PFN_FLAGS);
}

/**
 * vgpu_mirror_look() - find the pages around a fault
 * @ctx: the context
 * @fault: the fault
 * @w: out: what was found
 * @bytes: how far the access goes on, to have those pages faulted in too
 *
 * Return: 0, -EBUSY to try again, or why the access is not possible.
 */
static int vgpu_mirror_look(struct vgpu_ctx *ctx, const struct vgpu_fault *fault,
			    struct vgpu_window *w, u64 bytes)
{
	const unsigned long around = VGPU_FAULT_AROUND << PAGE_SHIFT;
	u32 access = le32_to_cpu(fault->access);
	unsigned long va = le64_to_cpu(fault->va);
	unsigned long page = va & PAGE_MASK;
	unsigned long base = va & ~(VGPU_HUGE_SIZE - 1);
	unsigned long want = HMM_PFN_REQ_FAULT;
	unsigned long start, end, wanted, i;
	struct vm_area_struct *vma;
	int ret = -EFAULT;

	if (access & (VGPU_FAULT_ACCESS_WRITE | VGPU_FAULT_ACCESS_ATOMIC))
		want |= HMM_PFN_REQ_WRITE;

	w->huge = false;
	w->range = (struct hmm_range) {
		.notifier = ctx->sync,
		/* Waits while an invalidation is under way: not under mmap_lock. */
		.notifier_seq = vgpu_backend->read_begin(ctx),
		.hmm_pfns = ctx->pfns,
		.pfn_flags_mask = HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE,
		/* Our own device-private pages are reported, and not faulted in. */
		.dev_private_owner = ctx->vdev,
	};

	mmap_read_lock(ctx->mm);
	vma = vma_lookup(ctx->mm, va);
	if (!vma || !vgpu_mirror_allowed(ctx, vma, access))
		goto out;

	/* Never beyond the 2 MiB around the address: one table of leaves. */
	bytes = clamp_t(u64, bytes, 1, base + VGPU_HUGE_SIZE - va);
	wanted = PAGE_ALIGN(va + bytes);
	start = max3(va & ~(around - 1), base, vma->vm_start);
	end = max((va & ~(around - 1)) + around, wanted);
	end = min3(end, base + VGPU_HUGE_SIZE, vma->vm_end);

	/* HMM faults in what follows a missing page too, and may fail over that. */
	if (bytes == 1) {
		start = page;
		end = page + PAGE_SIZE;
	}

	w->range.start = start;
	w->range.end = end;
	w->must = (page - start) >> PAGE_SHIFT;
	w->wanted = (min(wanted, end) - page) >> PAGE_SHIFT;
	/* Of a hugetlb page HMM looks at what is asked of the first only. */
	if (vma->vm_flags & VM_HUGETLB)
		page = start;
	for (i = 0; i < (end - start) >> PAGE_SHIFT; i++) {
		unsigned long at = start + (i << PAGE_SHIFT);

		/* The others are taken if they are there. */
		ctx->pfns[i] = at >= page && at < wanted ? want : 0;
	}

	ret = hmm_range_fault(&w->range);
	if (!ret)
		w->huge = hmm_pfn_to_map_order(ctx->pfns[w->must]) >= VGPU_HUGE_ORDER &&
			  vma->vm_start <= base && base + VGPU_HUGE_SIZE <= vma->vm_end;
out:
	mmap_read_unlock(ctx->mm);
	return ret;
}

/* Maps what was found, and answers the fault. Context: pt_lock. */
static int vgpu_mirror_map(struct vgpu_ctx *ctx, const struct vgpu_fault *fault,
			   struct vgpu_window *w)
{
	unsigned long count = (w->range.end - w->range.start) >> PAGE_SHIFT;
	int ret;

	if (w->huge)
		ret = vgpu_pt_map_huge(ctx, le64_to_cpu(fault->va), ctx->pfns[w->must]);
	else
		ret = vgpu_pt_map(ctx, w->range.start, ctx->pfns, count, w->must);
	if (!ret)
		vgpu_fault_answer_locked(ctx, fault, true);
	/* Not waited for: what is sent later comes later. */
	vgpu_pt_flush(ctx, true, false);
	return ret;
}

/**
 * vgpu_mirror_fault() - map what a fault asks for, and replay it
 * @ctx: the context
 * @fault: the fault
 *
 * Context: fault worker, with a reference to the address space's users.
 * Return: 0 if the fault was replayed; -EBUSY if the address space kept changing;
 * else why the access is not possible.
 */
int vgpu_mirror_fault(struct vgpu_ctx *ctx, const struct vgpu_fault *fault)
{
	unsigned long deadline = jiffies + msecs_to_jiffies(HMM_RANGE_DEFAULT_TIMEOUT);
	u64 bytes = le64_to_cpu(fault->bytes);
	u32 access = le32_to_cpu(fault->access);
	struct vgpu_window w;
	bool small = false;
	int ret;

	do {
		if (READ_ONCE(ctx->stopped))
			return -ESRCH;

		ret = vgpu_mirror_look(ctx, fault, &w, bytes);
		if (ret == -EBUSY) {
			atomic64_inc(&ctx->fault_retries);
			continue;
		}
		if (ret && bytes > 1) {
			/* A page further on may not be there: first things first. */
			bytes = 1;
			ret = -EBUSY;
			continue;
		}
		if (ret)
			return ret;
		ret = vgpu_mirror_claim(ctx, access, &w);
		if (ret)
			continue;
		if (vgpu_mirror_wants_exclusive(ctx, access, &w)) {
			ret = vgpu_exclusive_fault(ctx, fault);
			continue;
		}

		w.huge = w.huge && !small;
		ret = vgpu_table_prepare(ctx, le64_to_cpu(fault->va), w.huge ? 1 : 0);
		if (ret)
			return ret;

		mutex_lock(&ctx->pt_lock);
		if (ctx->stopped) {
			ret = -ESRCH;
		} else if (vgpu_backend->read_retry(ctx, w.range.notifier_seq)) {
			atomic64_inc(&ctx->fault_retries);
			ret = -EBUSY;
		} else {
			ret = vgpu_mirror_map(ctx, fault, &w);
			if (ret && w.huge) {
				small = true;
				ret = -EBUSY;
			}
		}
		mutex_unlock(&ctx->pt_lock);
	} while (ret == -EBUSY && time_before(jiffies, deadline));

	return ret;
}

static unsigned long vgpu_mirror_read_begin(struct vgpu_ctx *ctx)
{
	return mmu_interval_read_begin(ctx->sync);
}

static bool vgpu_mirror_read_retry(struct vgpu_ctx *ctx, unsigned long seq)
{
	return mmu_interval_read_retry(ctx->sync, seq);
}

const struct vgpu_backend vgpu_backend_interval = {
	.name = "interval",
	.begin = vgpu_mirror_begin,
	.end = vgpu_mirror_end,
	.read_begin = vgpu_mirror_read_begin,
	.read_retry = vgpu_mirror_read_retry,
};
