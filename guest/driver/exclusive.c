// SPDX-License-Identifier: GPL-2.0
/*
 * Atomics on system memory where the platform does not make them coherent with
 * the CPUs' own: the core takes the page from all page tables and puts a
 * device-exclusive entry in their place. A CPU that touches the page has it put
 * back, and before that our callback takes the leaf away.
 *
 * Only pages of anonymous memory that can be written. The context itself is the
 * owner that the EXCLUSIVE invalidation names: another context on the same
 * address space must let go of the page like anybody else.
 */
#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/module.h>
#include <linux/string.h>

#include "hmm_vgpu.h"

#define VGPU_ATOMICS_AUTO	"auto"

static char vgpu_atomics[16] = VGPU_ATOMICS_AUTO;

static int vgpu_atomics_set(const char *value, const struct kernel_param *kp)
{
	char word[sizeof(vgpu_atomics)];

	strscpy(word, value, sizeof(word));
	strim(word);
	if (strcmp(word, VGPU_ATOMICS_AUTO) && strcmp(word, "coherent") &&
	    strcmp(word, "exclusive"))
		return -EINVAL;
	/* The mirror layer's callbacks do not tell who has caused them. */
	if (!strcmp(word, "exclusive") &&
	    (!VGPU_DEVMEM || (vgpu_backend && vgpu_backend != &vgpu_backend_interval)))
		return -EOPNOTSUPP;
	strscpy(vgpu_atomics, word, sizeof(vgpu_atomics));
	return 0;
}

static int vgpu_atomics_get(char *buffer, const struct kernel_param *kp)
{
	return sysfs_emit(buffer, "%s\n", vgpu_atomics);
}

static const struct kernel_param_ops vgpu_atomics_ops = {
	.set = vgpu_atomics_set,
	.get = vgpu_atomics_get,
};

/* The core holds the parameters' lock around set and get. */
module_param_cb(atomics, &vgpu_atomics_ops, NULL, 0644);
MODULE_PARM_DESC(atomics, "of contexts bound from now on: coherent, exclusive, or auto: coherent if the device says so");

/**
 * vgpu_exclusive_mode() - how the atomics of a context being bound are to work
 * @vdev: the device
 */
enum vgpu_atomics vgpu_exclusive_mode(struct vgpu_device *vdev)
{
	/* The mirror layer's callbacks do not tell who has caused them. */
	bool can = VGPU_DEVMEM && vgpu_backend == &vgpu_backend_interval;
	enum vgpu_atomics mode;

	kernel_param_lock(THIS_MODULE);
	if (can && !strcmp(vgpu_atomics, "exclusive"))
		mode = VGPU_ATOMICS_EXCLUSIVE;
	else if (vdev->atomics && strcmp(vgpu_atomics, "exclusive"))
		mode = VGPU_ATOMICS_COHERENT;
	else if (can && !strcmp(vgpu_atomics, VGPU_ATOMICS_AUTO))
		mode = VGPU_ATOMICS_EXCLUSIVE;
	else
		mode = VGPU_ATOMICS_NONE;
	kernel_param_unlock(THIS_MODULE);
	return mode;
}

/**
 * vgpu_exclusive_is_own() - whether the context itself has caused an invalidation
 * @ctx: the context
 * @range: the invalidation
 */
bool vgpu_exclusive_is_own(const struct vgpu_ctx *ctx,
			   const struct mmu_notifier_range *range)
{
	return range->event == MMU_NOTIFY_EXCLUSIVE && range->owner == ctx;
}

/**
 * vgpu_exclusive_invalidate() - the callback for what the context has caused
 * @ctx: the context
 * @range: the invalidation, for which vgpu_exclusive_is_own() holds
 *
 * The device loses the page like at any other. But the sequence stays: the fault
 * that is served would begin again, and cause the same again.
 */
bool vgpu_exclusive_invalidate(struct vgpu_ctx *ctx,
			       const struct mmu_notifier_range *range)
{
	mutex_lock(&ctx->pt_lock);
	atomic64_inc(&ctx->invalidations);
	if (!ctx->stopped)
		vgpu_pt_zap(ctx, range->start, range->end - 1, true);
	mutex_unlock(&ctx->pt_lock);
	return true;
}

#if VGPU_DEVMEM
/* Makes a page exclusive; locked and referenced, so that it stays so. */
static struct page *vgpu_exclusive_make(struct vgpu_ctx *ctx,
					const struct vgpu_fault *fault)
{
	unsigned long va = le64_to_cpu(fault->va);
	struct page *page = ERR_PTR(-EFAULT);
	struct vm_area_struct *vma;

	mmap_read_lock(ctx->mm);
	vma = vma_lookup(ctx->mm, va);
	if (vma && vgpu_mirror_allowed(ctx, vma, le32_to_cpu(fault->access)))
		page = compat_make_exclusive(ctx->mm, va, ctx);
	mmap_read_unlock(ctx->mm);
	return page;
}

/**
 * vgpu_exclusive_fault() - map a page for atomics, and replay the fault
 * @ctx: the context
 * @fault: the fault
 *
 * Context: fault worker, with a reference to the address space's users.
 * Return: 0, -EBUSY to try again, or why the access is not possible.
 */
int vgpu_exclusive_fault(struct vgpu_ctx *ctx, const struct vgpu_fault *fault)
{
	unsigned long va = le64_to_cpu(fault->va);
	struct page *page;
	unsigned long seq;
	int ret;

	ret = vgpu_table_prepare(ctx, va, 0);
	if (ret)
		return ret;
	seq = vgpu_backend->read_begin(ctx);
	page = vgpu_exclusive_make(ctx, fault);
	if (IS_ERR(page))
		return PTR_ERR(page);

	mutex_lock(&ctx->pt_lock);
	if (ctx->stopped) {
		ret = -ESRCH;
	} else if (vgpu_backend->read_retry(ctx, seq)) {
		atomic64_inc(&ctx->fault_retries);
		ret = -EBUSY;
	} else {
		ret = vgpu_pt_map_exclusive(ctx, va, page_to_pfn(page));
		if (!ret)
			vgpu_fault_answer_locked(ctx, fault, true);
		vgpu_pt_flush(ctx, true, false);
	}
	mutex_unlock(&ctx->pt_lock);
	/* From here on a CPU's access may have it back. */
	unlock_page(page);
	put_page(page);
	return ret;
}
#else
int vgpu_exclusive_fault(struct vgpu_ctx *ctx, const struct vgpu_fault *fault)
{
	return -EOPNOTSUPP;
}
#endif
