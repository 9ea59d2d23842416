// SPDX-License-Identifier: GPL-2.0
/*
 * Migration of pages to the device and back: asked for by ioctl, by a CPU's
 * access, and when the device, or the context they are for, goes.
 *
 * The MIGRATE invalidations that this causes are handled as any other: the device
 * loses the range, and its faults there wait in hmm_range_fault() until the CPU's
 * entry has settled. Nothing is mapped from here; the next access faults.
 */
#include <linux/highmem.h>
#include <linux/migrate.h>
#include <linux/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>

#include "devmem.h"

/* When an eviction that makes no progress is worth a word. */
#define VGPU_EVICT_WARN_MS	5000

/**
 * struct vgpu_move - a migration under way
 * @dm: the memory
 * @owner: the context that pages are migrated to; NULL on the way out
 * @src: entries of migrate_vma, or of migrate_device_range()
 * @dst: likewise
 * @forced: the pages must go, even if they cannot be copied
 * @copy: pages gathered
 */
struct vgpu_move {
	struct vgpu_devmem *dm;
	struct vgpu_ctx *owner;
	const unsigned long *src;
	unsigned long *dst;
	bool forced;
	struct vgpu_copy copy;
};

static void vgpu_move_poison(struct vgpu_move *move)
{
	unsigned int i;

	for (i = 0; i < move->copy.count; i++) {
		void *to = kmap_local_page(move->copy.page[i]);

		memset(to, HMM_VGPU_POISON, PAGE_SIZE);
		kunmap_local(to);
	}
	dev_err_ratelimited(&move->dm->vdev->pdev->dev,
			    "%u pages are lost with the device's memory\n",
			    move->copy.count);
}

/* Copies what was gathered; what could not be copied is not migrated. */
static int vgpu_move_flush(struct vgpu_move *move)
{
	struct vgpu_devmem *dm = move->dm;
	struct vgpu_copy *copy = &move->copy;
	unsigned int i;
	int ret;

	if (!copy->count)
		return 0;
	ret = move->owner ? vgpu_devmem_copy_in(dm, copy, move->owner) :
			    vgpu_devmem_copy_out(dm, copy);
	if (ret && move->forced) {
		vgpu_move_poison(move);
		ret = 0;
	}

	for (i = 0; i < copy->count; i++) {
		unsigned long at = copy->index[i];
		struct page *to = move->owner ? vgpu_dpage_page(dm, copy->dpage[i]) :
						copy->page[i];

		if (!ret) {
			move->dst[at] = migrate_pfn(page_to_pfn(to)) |
					(move->src[at] & MIGRATE_PFN_WRITE);
		} else if (move->owner) {
			vgpu_devmem_drop(dm, copy->dpage[i]);
		} else {
			unlock_page(to);
			put_page(to);
		}
	}
	copy->count = 0;
	return ret;
}

static int vgpu_move_add(struct vgpu_move *move, struct vgpu_dpage *dp,
			 struct page *page, unsigned long at)
{
	struct vgpu_copy *copy = &move->copy;

	copy->dpage[copy->count] = dp;
	copy->page[copy->count] = page;
	copy->index[copy->count++] = at;
	return copy->count == VGPU_COPY_PAGES ? vgpu_move_flush(move) : 0;
}

/* Finds room on the device for what the core lets go, and copies it there. */
static int vgpu_move_in(struct vgpu_move *move, unsigned long count)
{
	unsigned long i;
	int ret = 0;

	for (i = 0; i < count && !ret; i++) {
		struct vgpu_dpage *dp;

		if (!(move->src[i] & MIGRATE_PFN_MIGRATE))
			continue;
		dp = vgpu_devmem_alloc(move->dm, move->owner);
		if (!dp)
			break;
		/* No page: a hole, or the zero page. */
		ret = vgpu_move_add(move, dp, migrate_pfn_to_page(move->src[i]), i);
	}
	return ret ? ret : vgpu_move_flush(move);
}

/* Finds system memory for what the core lets go, and copies it there. */
static int vgpu_move_out(struct vgpu_move *move, unsigned long count,
			 struct vm_area_struct *vma, unsigned long addr)
{
	unsigned long i;
	int ret = 0, err;

	for (i = 0; i < count && !ret; i++) {
		struct page *from = migrate_pfn_to_page(move->src[i]);
		struct page *to;

		if (!from || !(move->src[i] & MIGRATE_PFN_MIGRATE))
			continue;
		/* Who waits for the page to go cannot do without. */
		if (move->forced)
			to = alloc_page(GFP_HIGHUSER_MOVABLE | __GFP_NOFAIL);
		else
			to = alloc_page_vma(GFP_HIGHUSER_MOVABLE, vma,
					    addr + (i << PAGE_SHIFT));
		if (!to) {
			ret = -ENOMEM;
			break;
		}
		lock_page(to);
		ret = vgpu_move_add(move, vgpu_dpage_of(move->dm, from), to, i);
	}
	err = vgpu_move_flush(move);
	return ret ? ret : err;
}

static unsigned long vgpu_migrate_count(const struct migrate_vma *args)
{
	unsigned long i, count = 0;

	for (i = 0; i < args->npages; i++)
		if (args->src[i] & MIGRATE_PFN_MIGRATE && args->dst[i] & MIGRATE_PFN_VALID)
			count++;
	return count;
}

/* Migrates a piece of a vma. Context: mmap_lock. */
static int vgpu_migrate_piece(struct vgpu_ctx *ctx, struct migrate_vma *args,
			      bool to_device, u64 *migrated)
{
	struct vgpu_move move = {
		.dm = ctx->vdev->devmem,
		.owner = to_device ? ctx : NULL,
		.src = args->src,
		.dst = args->dst,
	};
	int ret;

	args->pgmap_owner = ctx->vdev;
	args->flags = to_device ? MIGRATE_VMA_SELECT_SYSTEM :
				  MIGRATE_VMA_SELECT_DEVICE_PRIVATE;
	ret = migrate_vma_setup(args);
	if (ret)
		/* A vma of which nothing can be migrated. */
		return ret == -EINVAL ? 0 : ret;
	ret = to_device ? vgpu_move_in(&move, args->npages) :
			  vgpu_move_out(&move, args->npages, args->vma, args->start);
	/* What has no destination, or loses it here, stays where it was. */
	migrate_vma_pages(args);
	*migrated += vgpu_migrate_count(args);
	migrate_vma_finalize(args);
	return ret;
}

/**
 * vgpu_migrate() - migrate a range of addresses to the device or back
 * @ctx: the context; its address space is the caller's
 * @arg: the range; how many pages were migrated is filled in
 * @to_device: which way
 *
 * What cannot be migrated, by its sort or for want of VRAM, stays.
 *
 * Return: 0 or an error.
 */
int vgpu_migrate(struct vgpu_ctx *ctx, struct hmm_vgpu_migrate *arg, bool to_device)
{
	unsigned long addr = arg->addr, end = arg->addr + arg->len, next;
	struct mm_struct *mm = current->mm;
	unsigned long *pfns;
	int ret = 0;

	arg->migrated = 0;
	if (arg->flags || !arg->len || (arg->addr | arg->len) & ~PAGE_MASK ||
	    end < addr || end > TASK_SIZE)
		return -EINVAL;
	if (!ctx->vdev->devmem)
		return -EOPNOTSUPP;
	pfns = kvcalloc(2 * VGPU_HUGE_PAGES, sizeof(*pfns), GFP_KERNEL);
	if (!pfns)
		return -ENOMEM;

	if (mmap_read_lock_killable(mm)) {
		ret = -EINTR;
		goto out;
	}
	for (; addr < end && !ret; addr = next) {
		struct vm_area_struct *vma = find_vma_intersection(mm, addr, end);
		struct migrate_vma args = {
			.vma = vma,
			.src = pfns,
			.dst = pfns + VGPU_HUGE_PAGES,
		};

		if (!vma)
			break;
		args.start = max(addr, vma->vm_start);
		next = min3(end, vma->vm_end,
			    (args.start & ~(VGPU_HUGE_SIZE - 1)) + VGPU_HUGE_SIZE);
		args.end = next;
		ret = vgpu_migrate_piece(ctx, &args, to_device, &arg->migrated);
		if (fatal_signal_pending(current))
			ret = -EINTR;
		cond_resched();
	}
	mmap_read_unlock(mm);
out:
	kvfree(pfns);
	return ret;
}

/**
 * vgpu_migrate_to_ram() - a CPU has touched a page that is on the device
 * @vmf: the fault; its page is locked and referenced
 *
 * Return: 0, to look again; VM_FAULT_OOM; VM_FAULT_SIGBUS if the data is lost.
 */
vm_fault_t vgpu_migrate_to_ram(struct vm_fault *vmf)
{
	struct vgpu_devmem *dm = container_of(compat_page_pgmap(vmf->page),
					      struct vgpu_devmem, pgmap);
	unsigned long src = 0, dst = 0;
	struct vgpu_move move = { .dm = dm, .src = &src, .dst = &dst };
	struct migrate_vma args = {
		.vma = vmf->vma,
		.start = vmf->address & PAGE_MASK,
		.end = (vmf->address & PAGE_MASK) + PAGE_SIZE,
		.src = &src,
		.dst = &dst,
		.pgmap_owner = dm->vdev,
		.flags = MIGRATE_VMA_SELECT_DEVICE_PRIVATE,
		.fault_page = vmf->page,
	};
	int ret;

	if (migrate_vma_setup(&args))
		return VM_FAULT_SIGBUS;
	/* Somebody else is migrating it, or has done so. */
	if (!args.cpages)
		return 0;
	ret = vgpu_move_out(&move, 1, args.vma, args.start);
	migrate_vma_pages(&args);
	if (vgpu_migrate_count(&args))
		atomic64_inc(&vgpu_dpage_of(dm, vmf->page)->owner->cpu_faults);
	migrate_vma_finalize(&args);

	switch (ret) {
	case 0:
		return 0;
	case -ENOMEM:
		return VM_FAULT_OOM;
	default:
		return VM_FAULT_SIGBUS;
	}
}

/* Evicts pages next to each other, as far as nobody is at work on them. */
static void vgpu_migrate_evict_run(struct vgpu_devmem *dm, unsigned long first,
				   unsigned int count)
{
	unsigned long src[VGPU_COPY_PAGES] = {}, dst[VGPU_COPY_PAGES] = {};
	struct vgpu_move move = { .dm = dm, .src = src, .dst = dst, .forced = true };

	migrate_device_range(src, dm->first + first, count);
	vgpu_move_out(&move, count, NULL, 0);
	migrate_device_pages(src, dst, count);
	migrate_device_finalize(src, dst, count);
}

/* Evicts a page, if it is still in use. Context: may sleep, no lock. */
void vgpu_migrate_evict_page(struct vgpu_devmem *dm, unsigned long pfn)
{
	vgpu_migrate_evict_run(dm, pfn - dm->first, 1);
}

static bool vgpu_migrate_concerns(const struct vgpu_devmem *dm, unsigned long i,
				  const struct vgpu_ctx *owner)
{
	const struct vgpu_ctx *has = READ_ONCE(dm->dpage[i].owner);

	return has && (!owner || has == owner);
}

static int vgpu_migrate_left(struct vgpu_devmem *dm, struct vgpu_ctx *owner)
{
	return atomic_read(owner ? &owner->device_pages : &dm->used);
}

/**
 * vgpu_migrate_evict() - evict pages to system memory until none is left
 * @dm: the memory
 * @owner: the context whose pages go, or NULL for all
 *
 * A page that a task is just migrating, or that an exit is about to free, is
 * passed over and looked at again. No page can be pinned: so it ends. It needs no
 * memory but the pages themselves, and those it waits for.
 *
 * Context: may sleep; no lock of an address space.
 */
void vgpu_migrate_evict(struct vgpu_devmem *dm, struct vgpu_ctx *owner)
{
	unsigned long start = jiffies;
	bool warned = false;
	unsigned long i;

	vgpu_devmem_reap(dm);
	while (vgpu_migrate_left(dm, owner)) {
		for (i = 0; i < dm->count; i++) {
			unsigned int n = 0;

			while (n < VGPU_COPY_PAGES && i + n < dm->count &&
			       vgpu_migrate_concerns(dm, i + n, owner))
				n++;
			if (!n)
				continue;
			vgpu_migrate_evict_run(dm, i, n);
			i += n - 1;
			cond_resched();
		}
		vgpu_devmem_reap(dm);
		if (!vgpu_migrate_left(dm, owner))
			break;
		if (!warned && jiffies_to_msecs(jiffies - start) > VGPU_EVICT_WARN_MS) {
			warned = true;
			dev_warn(&dm->vdev->pdev->dev, "%d device pages do not go\n",
				 vgpu_migrate_left(dm, owner));
		}
		schedule_timeout_uninterruptible(1);
	}
}
