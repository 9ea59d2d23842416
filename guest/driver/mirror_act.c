// SPDX-License-Identifier: GPL-2.0
/*
 * What scenarios have the driver do on the mirror backend: mostly what drivers
 * must not (docs/seed.md). Nothing here is done unless it is asked for.
 */
#include <linux/file.h>
#include <linux/highmem.h>
#include <linux/migrate.h>
#include <linux/mm.h>

#include "backend_mirror.h"
#include "hmm_gate.h"

/* The device lock is held, and the migration not begun. */
HMM_GATE_DEFINE(migrate_locked);

/**
 * vgpu_act_release() - the end of a release callback
 * @client: the mirror's
 *
 * Context: whatever lock the policy holds around the callback.
 */
void vgpu_act_release(struct vgpu_client *client)
{
	if (client->waits) {
		struct lock_use use;

		queue_work(system_unbound_wq, &client->work);
		lock_book_wants(&use, "release_work", client->handle, "exclusive", NULL);
		flush_work(&client->work);
		lock_book_done(&use);
	}
	if (client->unregisters) {
		hmm_mirror_unregister(&client->mirror);
		WRITE_ONCE(client->unregistered, true);
	}
}

/* Gives every page that is to go somewhere to go to, with its content. */
static void act_copy(struct migrate_vma *migrate)
{
	struct page *from = migrate_pfn_to_page(*migrate->src);
	struct page *to;

	if (!(*migrate->src & MIGRATE_PFN_MIGRATE) || !from)
		return;
	to = alloc_page(GFP_HIGHUSER_MOVABLE);
	if (!to)
		return;
	lock_page(to);
	copy_highpage(to, from);
	*migrate->dst = migrate_pfn(page_to_pfn(to));
}

/* One page, to another of the system's memory. Context: mmap_lock, for reading. */
static int act_migrate_page(struct vgpu_ctx *ctx, unsigned long addr, void *owner)
{
	unsigned long src = 0, dst = 0;
	struct migrate_vma migrate = {
		.vma = vma_lookup(ctx->mm, addr),
		.src = &src,
		.dst = &dst,
		.start = addr,
		.end = addr + PAGE_SIZE,
		.pgmap_owner = owner,
		.flags = MIGRATE_VMA_SELECT_SYSTEM,
	};
	int ret;

	if (!migrate.vma || addr + PAGE_SIZE > migrate.vma->vm_end)
		return -EFAULT;
	ret = migrate_vma_setup(&migrate);
	if (ret)
		return ret;
	act_copy(&migrate);
	migrate_vma_pages(&migrate);
	ret = src & MIGRATE_PFN_MIGRATE ? 0 : -EBUSY;
	migrate_vma_finalize(&migrate);
	return ret;
}

/*
 * wide: the device lock is held across the migration, as in the thread. Nothing
 * of the range is mapped until it is let go; so what the migration's own
 * invalidation would take away is taken here, and it is let pass by its owner.
 *
 * narrow: the invalidation takes the lock itself, for as long as it needs.
 */
static int act_migrate(struct vgpu_ctx *ctx, unsigned long addr, bool wide)
{
	struct lock_use use;
	int ret;

	addr &= PAGE_MASK;
	mmap_read_lock(ctx->mm);
	if (wide) {
		vgpu_device_lock(ctx, &use, true);
		hmm_gate_migrate_locked();
		if (!ctx->stopped)
			vgpu_pt_zap(ctx, addr, addr + PAGE_SIZE - 1, true);
		ret = act_migrate_page(ctx, addr, ctx);
		vgpu_device_unlock(ctx, &use);
	} else {
		hmm_gate_migrate_locked();
		ret = act_migrate_page(ctx, addr, NULL);
	}
	mmap_read_unlock(ctx->mm);
	return ret;
}

static int act_release_waits(struct vgpu_client *client, int fd)
{
	struct file *file;

	if (client->file)
		return -EBUSY;
	file = fget(fd);
	if (!file)
		return -EBADF;
	client->file = file;
	WRITE_ONCE(client->waits, true);
	return 0;
}

/**
 * vgpu_act() - do what a scenario asks for
 * @ctx: a bound context
 * @arg: what
 *
 * Context: the context's address space; the file's lock, so that the context
 * stays bound.
 * Return: 0 or an error.
 */
int vgpu_act(struct vgpu_ctx *ctx, const struct hmm_vgpu_act *arg)
{
	struct vgpu_client *client = ctx->client;

	switch (arg->op) {
	case HMM_VGPU_ACT_MIGRATE_WIDE:
	case HMM_VGPU_ACT_MIGRATE_NARROW:
		return act_migrate(ctx, arg->addr, arg->op == HMM_VGPU_ACT_MIGRATE_WIDE);
	case HMM_VGPU_ACT_RELEASE_WAITS:
		return act_release_waits(client, arg->fd);
	case HMM_VGPU_ACT_RELEASE_UNREGISTERS:
		WRITE_ONCE(client->unregisters, true);
		return 0;
	case HMM_VGPU_ACT_RANGE_UNHELD:
		WRITE_ONCE(client->unheld, true);
		return 0;
	default:
		return -EINVAL;
	}
}

/**
 * vgpu_act_layer() - what the layer has counted
 * @arg: out
 *
 * Return: 0.
 */
int vgpu_act_layer(struct hmm_vgpu_layer *arg)
{
	*arg = (struct hmm_vgpu_layer) {
		.policy = hmm_layer_policy(),
		.registered = atomic64_read(&hmm_mirror_counts.registered),
		.unregistered = atomic64_read(&hmm_mirror_counts.unregistered),
		.releases = atomic64_read(&hmm_mirror_counts.releases),
		.releases_again = atomic64_read(&hmm_mirror_counts.releases_again),
		.refused = atomic64_read(&hmm_mirror_counts.refused),
	};
	return 0;
}
