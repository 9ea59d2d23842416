// SPDX-License-Identifier: GPL-2.0
/*
 * The device's memory as device-private pages: the region of physical addresses
 * that stands for it, who has which page, and copies by the device's engine.
 * Pages come one by one, order 0; a huge page is split when it is migrated.
 *
 * A page is migrated for a context, its owner, which maps it: so it must be
 * granted to it. For copies there is a context of the driver's own, which mirrors
 * nobody, and to which the page is granted for as long as a copy takes:
 *
 *	to the device	GRANT to copy, copy, RETURN and GRANT to the owner
 *	to the system	RETURN by the owner and GRANT to copy, copy
 *	freed		RETURN by whoever has it
 *
 * The core has taken the page from every address space and every mirror before
 * it is copied, so no leaf of the owner names it then.
 *
 * How they end, and what must not be left out:
 *
 *	close, unbind of a context	vgpu_devmem_close(), called by
 *			vgpu_ctx_destroy() before the context's last command: its
 *			pages are evicted, whoever has them mapped, since a child
 *			may; waits until the device has them back
 *	reset of the device		vgpu_devmem_shut(): all are evicted before,
 *			as nothing on the device can be trusted after
 *	removal, unload		vgpu_devmem_fini(): all are evicted, then the copy
 *			context goes, then the region. memunmap_pages() waits for
 *			the last page: one that is left makes it wait for ever
 *
 * A device that is gone cannot be copied from. Then a CPU's access is SIGBUS, and
 * an eviction leaves a page of HMM_VGPU_POISON: never what memory held before.
 */
#include <linux/delay.h>
#include <linux/ioport.h>
#include <linux/jiffies.h>
#include <linux/memremap.h>
#include <linux/mm.h>
#include <linux/slab.h>

#include "devmem.h"

/* Addresses of the copy context: pages of VRAM, and the system's. */
#define VGPU_COPY_VRAM		0UL
#define VGPU_COPY_SYSTEM	(VGPU_COPY_PAGES * PAGE_SIZE)
#define VGPU_COPY_LAST		(2 * VGPU_COPY_PAGES * PAGE_SIZE - 1)
/* How often a copy is tried. */
#define VGPU_COPY_TRIES		3
/* When a copy asks whether the device is still there, and when it gives it up. */
#define VGPU_COPY_PROBE_MS	1000
#define VGPU_COPY_TIMEOUT_MS	10000

/*
 * The kernel has freed a page. Often under the page-table lock: so the device
 * gets it back later, before anybody else can have it.
 */
static void vgpu_devmem_page_free(struct page *page)
{
	struct vgpu_devmem *dm = container_of(compat_page_pgmap(page),
					      struct vgpu_devmem, pgmap);
	struct vgpu_dpage *dp = vgpu_dpage_of(dm, page);
	unsigned long flags;

	spin_lock_irqsave(&dm->lock, flags);
	list_add_tail(&dp->link, &dm->freed);
	queue_work(vgpu_fault_wq, &dm->reap);
	atomic_dec(&dm->used);
	spin_unlock_irqrestore(&dm->lock, flags);
}
compat_pagemap_free(vgpu_devmem_page_free, page)

static const struct dev_pagemap_ops vgpu_devmem_ops = {
	COMPAT_PAGEMAP_FREE(vgpu_devmem_page_free),
	.migrate_to_ram = vgpu_migrate_to_ram,
};

static struct vgpu_dpage *vgpu_devmem_take(struct vgpu_devmem *dm)
{
	struct vgpu_dpage *dp = NULL;

	spin_lock_irq(&dm->lock);
	if (!dm->closed)
		dp = list_first_entry_or_null(&dm->free, struct vgpu_dpage, link);
	if (dp) {
		list_del_init(&dp->link);
		atomic_inc(&dm->used);
	}
	spin_unlock_irq(&dm->lock);
	return dp;
}

/**
 * vgpu_devmem_alloc() - take a free page of VRAM
 * @dm: the memory
 * @owner: the context it is for
 *
 * Return: the page, its device-private page locked and with one reference, not
 * granted to anybody yet; or NULL if there is none.
 */
struct vgpu_dpage *vgpu_devmem_alloc(struct vgpu_devmem *dm, struct vgpu_ctx *owner)
{
	struct vgpu_dpage *dp = vgpu_devmem_take(dm);

	if (!dp) {
		vgpu_devmem_reap(dm);
		dp = vgpu_devmem_take(dm);
	}
	if (!dp)
		return NULL;
	kref_get(&owner->ref);
	atomic_inc(&owner->device_pages);
	WRITE_ONCE(dp->owner, owner);
	compat_device_page_init(vgpu_dpage_page(dm, dp), &dm->pgmap);
	return dp;
}

/* Gives up a page that vgpu_devmem_alloc() has returned and nothing has used. */
void vgpu_devmem_drop(struct vgpu_devmem *dm, struct vgpu_dpage *dp)
{
	struct page *page = vgpu_dpage_page(dm, dp);

	unlock_page(page);
	put_page(page);
}

/* Gives pages back to the device and then to the list. Context: copy_lock. */
static void vgpu_devmem_return(struct vgpu_devmem *dm, struct vgpu_dpage **dpage,
			       unsigned int count)
{
	unsigned int i, commands = 0;
	u32 index;

	for (i = 0; i < count; i++)
		if (dpage[i]->holder)
			dm->cmd[commands++] = vgpu_cmd_make(VGPU_CMD_OP_RETURN,
							    dpage[i]->holder->handle,
							    dpage[i]->handle, 0, 0);
	/* Not waited for: who is granted the page next is so behind this. */
	if (commands)
		vgpu_cmd_post(dm->vdev, dm->cmd, commands, true, &index);

	for (i = 0; i < count; i++) {
		struct vgpu_ctx *owner = dpage[i]->owner;

		WRITE_ONCE(dpage[i]->holder, NULL);
		dpage[i]->handle = 0;
		WRITE_ONCE(dpage[i]->owner, NULL);
		spin_lock_irq(&dm->lock);
		list_add(&dpage[i]->link, &dm->free);
		spin_unlock_irq(&dm->lock);
		/* Last: vgpu_ctx_destroy() unbinds the context at zero. */
		atomic_dec(&owner->device_pages);
		vgpu_ctx_put(owner);
	}
}

/**
 * vgpu_devmem_reap() - give what the kernel has freed back to the device
 * @dm: the memory
 *
 * Context: may sleep.
 */
void vgpu_devmem_reap(struct vgpu_devmem *dm)
{
	struct vgpu_dpage *dpage[VGPU_COPY_PAGES];
	unsigned int count;

	do {
		mutex_lock(&dm->copy_lock);
		count = 0;
		spin_lock_irq(&dm->lock);
		while (count < ARRAY_SIZE(dpage) && !list_empty(&dm->freed)) {
			dpage[count] = list_first_entry(&dm->freed,
							struct vgpu_dpage, link);
			list_del_init(&dpage[count++]->link);
		}
		spin_unlock_irq(&dm->lock);
		vgpu_devmem_return(dm, dpage, count);
		mutex_unlock(&dm->copy_lock);
	} while (count);
}

static void vgpu_devmem_reap_work(struct work_struct *work)
{
	vgpu_devmem_reap(container_of(work, struct vgpu_devmem, reap));
}

/**
 * vgpu_devmem_hand() - have pages granted to another context
 * @dm: the memory
 * @dpage: the pages; no leaf names them
 * @count: how many
 * @to: the context
 *
 * A page that could not be handed over stays where it was, or is nobody's.
 * Context: copy_lock.
 * Return: 0, -ESRCH if the context has been stopped, or another error.
 */
static int vgpu_devmem_hand(struct vgpu_devmem *dm, struct vgpu_dpage *const *dpage,
			    unsigned int count, struct vgpu_ctx *to)
{
	struct vgpu_cmd *cmd = dm->cmd;
	unsigned int i;
	u32 index;
	int ret;

	lockdep_assert_held(&dm->copy_lock);

	for (i = 0; i < count; i++) {
		struct vgpu_ctx *from = dpage[i]->holder;

		if (from)
			*cmd++ = vgpu_cmd_make(VGPU_CMD_OP_RETURN, from->handle,
					       dpage[i]->handle, 0, 0);
		*cmd++ = vgpu_cmd_make(VGPU_CMD_OP_GRANT, to->handle, VGPU_CMD_PAGE_DATA,
				       vgpu_dpage_index(dm, dpage[i]), 0);
	}

	/* A context that was stopped gets nothing more: see vgpu_ctx_stop_locked(). */
	mutex_lock(&to->pt_lock);
	ret = to->stopped ? -ESRCH :
			    vgpu_cmd_send(dm->vdev, dm->cmd, cmd - dm->cmd, &index);
	mutex_unlock(&to->pt_lock);
	if (ret)
		return ret;
	ret = vgpu_cmd_finish(dm->vdev, dm->cmd, cmd - dm->cmd, index);

	cmd = dm->cmd;
	for (i = 0; i < count; i++) {
		if (dpage[i]->holder && !vgpu_cmd_error(cmd++))
			WRITE_ONCE(dpage[i]->holder, NULL);
		if (!vgpu_cmd_error(cmd)) {
			WRITE_ONCE(dpage[i]->holder, to);
			dpage[i]->handle = le64_to_cpu(cmd->result);
		}
		cmd++;
	}
	return ret;
}

/* Runs one job of the copy context. Not interruptible, and not endless. */
static int vgpu_devmem_run(struct vgpu_devmem *dm, struct hmm_vgpu_submit *job)
{
	struct vgpu_queue *q = &dm->copy->queue[0];
	struct vgpu_device *vdev = dm->vdev;
	unsigned long start = jiffies;
	struct hmm_vgpu_wait wait = {};
	bool probed = false;
	int ret;

	job->flags = VGPU_JOB_FLAG_NO_IRQ;
	ret = vgpu_queue_submit(dm->copy, q, job);
	if (ret)
		return ret;

	for (;;) {
		unsigned long ms = jiffies_to_msecs(jiffies - start);

		wait.fence = job->fence;
		ret = vgpu_queue_wait(dm->copy, q, &wait);
		if (ret != -ETIME)
			break;
		if (vgpu_is_dead(vdev))
			return -EIO;
		if (ms > VGPU_COPY_TIMEOUT_MS ||
		    (ms > VGPU_COPY_PROBE_MS && !probed &&
		     vgpu_read(vdev, VGPU_REG_ID) != VGPU_ID_VALUE)) {
			vgpu_cmd_kill(vdev, "the copy engine does not answer");
			return -EIO;
		}
		probed = ms > VGPU_COPY_PROBE_MS;
		usleep_range(20, 100);
	}
	if (ret)
		return ret;
	/* What was not copied must not be taken for a copy. */
	if (wait.status != VGPU_JOB_OK) {
		dev_err_ratelimited(&vdev->pdev->dev, "copy at %#llx: status %u\n",
				    wait.address, wait.status);
		return -EIO;
	}
	return 0;
}

/* Copies runs of pages next to each other, or fills them with zeroes. */
static int vgpu_devmem_run_all(struct vgpu_devmem *dm, const struct vgpu_copy *copy,
			       bool in)
{
	unsigned int i, end;
	int ret = 0;

	for (i = 0; i < copy->count && !ret; i = end) {
		u64 vram = VGPU_COPY_VRAM + i * PAGE_SIZE;
		u64 system = VGPU_COPY_SYSTEM + i * PAGE_SIZE;
		struct hmm_vgpu_submit job = {
			.op = copy->page[i] ? VGPU_JOB_OP_COPY : VGPU_JOB_OP_FILL,
			.dst = in ? vram : system,
			.src = copy->page[i] ? (in ? system : vram) : 0,
		};

		for (end = i + 1; end < copy->count; end++)
			if (!copy->page[end] != !copy->page[i])
				break;
		job.len = (end - i) * PAGE_SIZE;
		ret = vgpu_devmem_run(dm, &job);
	}
	return ret;
}

/* Maps pages in the copy context. */
static int vgpu_devmem_map(struct vgpu_devmem *dm, const struct vgpu_copy *copy, bool in)
{
	unsigned long vram[VGPU_COPY_PAGES], system[VGPU_COPY_PAGES] = {};
	struct vgpu_ctx *ctx = dm->copy;
	unsigned int i, count = 0;
	int ret;

	for (i = 0; i < copy->count; i++) {
		vram[i] = page_to_pfn(vgpu_dpage_page(dm, copy->dpage[i])) |
			  HMM_PFN_VALID | (in ? HMM_PFN_WRITE : 0);
		count++;
		if (!copy->page[i])
			continue;
		system[i] = page_to_pfn(copy->page[i]) | HMM_PFN_VALID |
			    (in ? 0 : HMM_PFN_WRITE);
		count++;
	}

	mutex_lock(&ctx->pt_lock);
	vgpu_pt_map(ctx, VGPU_COPY_VRAM, vram, copy->count, 0);
	vgpu_pt_map(ctx, VGPU_COPY_SYSTEM, system, copy->count, 0);
	/* Engines do not wait for the command ring. */
	ret = vgpu_pt_flush(ctx, true, true);
	if (!ret && atomic64_read(&ctx->mapped_pages) != count)
		ret = -ENOMEM;
	mutex_unlock(&ctx->pt_lock);
	return ret;
}

/* Context: copy_lock; the pages are granted to the copy context. */
static int vgpu_devmem_copy(struct vgpu_devmem *dm, const struct vgpu_copy *copy, bool in)
{
	int ret = vgpu_devmem_map(dm, copy, in);
	int tries;

	for (tries = 0; !ret && tries < VGPU_COPY_TRIES; tries++) {
		ret = vgpu_devmem_run_all(dm, copy, in);
		if (!ret || vgpu_is_dead(dm->vdev))
			break;
	}
	mutex_lock(&dm->copy->pt_lock);
	vgpu_pt_zap(dm->copy, VGPU_COPY_VRAM, VGPU_COPY_LAST, true);
	mutex_unlock(&dm->copy->pt_lock);
	/* A device that died before it was all over may not have done it. */
	return ret ? ret : vgpu_is_dead(dm->vdev) ? -EIO : 0;
}

/**
 * vgpu_devmem_copy_in() - copy pages to VRAM and hand them to their owner
 * @dm: the memory
 * @copy: the pages, locked and unmapped by the core
 * @owner: the context
 *
 * Context: may sleep.
 * Return: 0 or an error; then none of them may be used.
 */
int vgpu_devmem_copy_in(struct vgpu_devmem *dm, const struct vgpu_copy *copy,
			struct vgpu_ctx *owner)
{
	int ret;

	mutex_lock(&dm->copy_lock);
	ret = vgpu_devmem_hand(dm, copy->dpage, copy->count, dm->copy);
	if (!ret)
		ret = vgpu_devmem_copy(dm, copy, true);
	if (!ret)
		ret = vgpu_devmem_hand(dm, copy->dpage, copy->count, owner);
	mutex_unlock(&dm->copy_lock);
	return ret;
}

/**
 * vgpu_devmem_copy_out() - copy pages from VRAM
 * @dm: the memory
 * @copy: the pages, locked and unmapped by the core
 *
 * They stay granted to the copy context: they are about to be freed, and should
 * their migration fail after all, the owner's next fault evicts them.
 * Context: may sleep.
 * Return: 0 or an error; then what was copied is not to be used.
 */
int vgpu_devmem_copy_out(struct vgpu_devmem *dm, const struct vgpu_copy *copy)
{
	int ret;

	mutex_lock(&dm->copy_lock);
	ret = vgpu_devmem_hand(dm, copy->dpage, copy->count, dm->copy);
	if (!ret)
		ret = vgpu_devmem_copy(dm, copy, false);
	mutex_unlock(&dm->copy_lock);
	return ret;
}

/* Whether the copy context works: one page there and back. */
static int vgpu_devmem_try(struct vgpu_devmem *dm)
{
	struct vgpu_copy copy = { .count = 1, .dpage = { &dm->dpage[0] } };
	struct page *page = alloc_page(GFP_KERNEL | __GFP_ZERO);
	u64 *word;
	u32 index;
	int ret;

	if (!page)
		return -ENOMEM;
	word = page_address(page);
	word[0] = word[511] = 0x76677075646d656dULL;
	copy.page[0] = page;

	mutex_lock(&dm->copy_lock);
	ret = vgpu_devmem_hand(dm, copy.dpage, 1, dm->copy);
	if (!ret)
		ret = vgpu_devmem_copy(dm, &copy, true);
	memset(word, 0, PAGE_SIZE);
	if (!ret)
		ret = vgpu_devmem_copy(dm, &copy, false);
	if (!ret && (word[0] != 0x76677075646d656dULL || word[511] != word[0]))
		ret = -EIO;
	if (copy.dpage[0]->holder) {
		dm->cmd[0] = vgpu_cmd_make(VGPU_CMD_OP_RETURN, dm->copy->handle,
					   copy.dpage[0]->handle, 0, 0);
		vgpu_cmd_post(dm->vdev, dm->cmd, 1, true, &index);
		copy.dpage[0]->holder = NULL;
		copy.dpage[0]->handle = 0;
	}
	mutex_unlock(&dm->copy_lock);
	__free_page(page);
	return ret;
}

static int vgpu_devmem_create_copy(struct vgpu_devmem *dm)
{
	struct vgpu_ctx *ctx = vgpu_ctx_create(dm->vdev, VGPU_CMD_TAG_NONE);
	int ret;

	if (IS_ERR(ctx))
		return PTR_ERR(ctx);
	dm->copy = ctx;
	ret = vgpu_table_prepare(ctx, VGPU_COPY_VRAM, 0);
	return ret ? ret : vgpu_devmem_try(dm);
}

static int vgpu_devmem_map_region(struct vgpu_devmem *dm)
{
	unsigned long bytes = ALIGN(dm->count, PAGES_PER_SECTION) << PAGE_SHIFT;
	struct dev_pagemap *pgmap = &dm->pgmap;
	void *mapped;

	dm->region = request_free_mem_region(&iomem_resource, bytes, dm->vdev->name);
	if (IS_ERR(dm->region))
		return PTR_ERR(dm->region);
	dm->first = dm->region->start >> PAGE_SHIFT;
	pgmap->type = MEMORY_DEVICE_PRIVATE;
	pgmap->range.start = dm->region->start;
	pgmap->range.end = dm->region->end;
	pgmap->nr_range = 1;
	pgmap->ops = &vgpu_devmem_ops;
	pgmap->owner = dm->vdev;
	mapped = memremap_pages(pgmap, dev_to_node(&dm->vdev->pdev->dev));
	if (IS_ERR(mapped)) {
		release_mem_region(dm->region->start, resource_size(dm->region));
		return PTR_ERR(mapped);
	}
	return 0;
}

static void vgpu_devmem_free(struct vgpu_devmem *dm)
{
	kvfree(dm->dpage);
	kfree(dm);
}

/**
 * vgpu_devmem_init() - make the device's memory usable for migration
 * @vdev: the device, enabled
 *
 * A device or a kernel that cannot is not an error: vgpu_device.devmem is NULL.
 */
void vgpu_devmem_init(struct vgpu_device *vdev)
{
	u32 pages = vgpu_read(vdev, VGPU_REG_DATA_PAGES);
	struct vgpu_devmem *dm;
	unsigned long i;
	int ret = -ENOMEM;

	/* What a leaf's address and a handle have room for. */
	if (!pages || pages > (1U << 24))
		return;
	dm = kzalloc(sizeof(*dm), GFP_KERNEL);
	if (!dm)
		goto err;
	dm->vdev = vdev;
	dm->count = pages;
	spin_lock_init(&dm->lock);
	INIT_LIST_HEAD(&dm->free);
	INIT_LIST_HEAD(&dm->freed);
	INIT_WORK(&dm->reap, vgpu_devmem_reap_work);
	mutex_init(&dm->copy_lock);
	dm->dpage = kvcalloc(pages, sizeof(*dm->dpage), GFP_KERNEL);
	if (!dm->dpage)
		goto err_free;
	for (i = 0; i < pages; i++)
		list_add_tail(&dm->dpage[i].link, &dm->free);

	ret = vgpu_devmem_map_region(dm);
	if (ret)
		goto err_free;
	/* Leaves of VRAM are told by the region. */
	WRITE_ONCE(vdev->devmem, dm);
	ret = vgpu_devmem_create_copy(dm);
	if (ret)
		goto err_region;
	dev_info(&vdev->pdev->dev, "%lu pages of device-private memory\n", dm->count);
	return;

err_region:
	vgpu_devmem_fini(vdev);
	vdev->devmem = NULL;
err_free:
	vgpu_devmem_free(dm);
err:
	dev_warn(&vdev->pdev->dev, "no device-private memory: error %d\n", ret);
}

/**
 * vgpu_devmem_shut() - evict everything, and let nothing in any more
 * @vdev: the device
 *
 * Context: may sleep; no lock of an address space.
 */
void vgpu_devmem_shut(struct vgpu_device *vdev)
{
	struct vgpu_devmem *dm = vdev->devmem;

	if (!dm)
		return;
	spin_lock_irq(&dm->lock);
	dm->closed = true;
	spin_unlock_irq(&dm->lock);
	vgpu_migrate_evict(dm, NULL);
}

/**
 * vgpu_devmem_close() - evict the pages of a context
 * @ctx: the context, stopped
 *
 * When it returns the device has them all back. Context: may sleep; no lock of
 * an address space.
 */
void vgpu_devmem_close(struct vgpu_ctx *ctx)
{
	struct vgpu_devmem *dm = ctx->vdev->devmem;

	if (dm)
		vgpu_migrate_evict(dm, ctx);
}

/**
 * vgpu_devmem_fini() - give the device's memory up
 * @vdev: the device, being removed; no file has a context any more
 *
 * A task may still be in an ioctl, and finds it closed: so the books stay until
 * vgpu_devmem_release().
 */
void vgpu_devmem_fini(struct vgpu_device *vdev)
{
	struct vgpu_devmem *dm = vdev->devmem;

	if (!dm)
		return;
	vgpu_devmem_shut(vdev);
	cancel_work_sync(&dm->reap);
	vgpu_devmem_reap(dm);
	if (dm->copy)
		vgpu_ctx_destroy(dm->copy);
	dm->copy = NULL;
	memunmap_pages(&dm->pgmap);
	release_mem_region(dm->region->start, resource_size(dm->region));
}

/* With the last reference to the device. */
void vgpu_devmem_release(struct vgpu_device *vdev)
{
	if (vdev->devmem)
		vgpu_devmem_free(vdev->devmem);
}

/* Whether a page frame number is one of the region's pages. */
static bool vgpu_devmem_covers(const struct vgpu_devmem *dm, unsigned long pfn)
{
	return dm && pfn >= dm->first && pfn - dm->first < dm->count;
}

/**
 * vgpu_devmem_leaf() - what a leaf says of a device-private page
 * @vdev: the device
 * @pfn: a page frame number
 *
 * Return: VGPU_PTE_VRAM and the page's address, or 0 if it is the system's.
 */
u64 vgpu_devmem_leaf(struct vgpu_device *vdev, unsigned long pfn)
{
	const struct vgpu_devmem *dm = vdev->devmem;

	if (!vgpu_devmem_covers(dm, pfn))
		return 0;
	return VGPU_PTE_VRAM | (u64)(pfn - dm->first) << PAGE_SHIFT;
}

/**
 * vgpu_devmem_usable() - whether a context may map a page that it was found
 * @ctx: the context
 * @pfn: the page frame number
 *
 * Not a device-private page that is granted to another one, as after a fork.
 */
bool vgpu_devmem_usable(struct vgpu_ctx *ctx, unsigned long pfn)
{
	const struct vgpu_devmem *dm = ctx->vdev->devmem;

	return !vgpu_devmem_covers(dm, pfn) ||
	       READ_ONCE(dm->dpage[pfn - dm->first].holder) == ctx;
}

/**
 * vgpu_devmem_claim() - move pages out of the way that the context cannot map
 * @ctx: the context
 * @pfns: what hmm_range_fault() has found
 * @count: how many
 * @write: they are wanted for writing
 *
 * hmm_range_fault() reports a device-private page of ours as it is: it neither
 * breaks a COW for a write, nor knows whose the page is. In system memory the
 * core does what is to be done.
 *
 * Context: fault worker, without any lock.
 * Return: 0, or -EBUSY if pages were moved.
 */
int vgpu_devmem_claim(struct vgpu_ctx *ctx, const unsigned long *pfns,
		      unsigned long count, bool write)
{
	struct vgpu_devmem *dm = ctx->vdev->devmem;
	unsigned long i;
	int ret = 0;

	for (i = 0; i < count; i++) {
		unsigned long pfn = pfns[i] & ~HMM_PFN_FLAGS;

		if (!(pfns[i] & HMM_PFN_VALID) || !vgpu_devmem_covers(dm, pfn))
			continue;
		if (vgpu_devmem_usable(ctx, pfn) && (!write || pfns[i] & HMM_PFN_WRITE))
			continue;
		vgpu_migrate_evict_page(dm, pfn);
		ret = -EBUSY;
	}
	return ret;
}
