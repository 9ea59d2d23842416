// SPDX-License-Identifier: GPL-2.0
/*
 * The driver on the mirror layer: a mirror for each context.
 *
 * What the layer knows is a small object apart from the context, with a handle:
 * callbacks look the context up, under a reference. One that is not found has
 * been stopped, or was never bound, and has nothing mapped.
 *
 * The release callback trusts the layer to call it once, and never after
 * unregister: it tells the device at once, whatever becomes of the context.
 */
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/slab.h>

#include "backend_mirror.h"
#include "hmm_gate.h"
#include "hmm_vgpu.h"
#include "lock_book.h"

/* A fault's range is registered. */
HMM_GATE_DEFINE(range_registered);
/* A mirror is being invalidated; its device lock is not taken yet. */
HMM_GATE_DEFINE(sync_unlocked);
/* Work that release waits for is about to unmap. */
HMM_GATE_DEFINE(release_work);

/*
 * A cache of their own that is not merged with others, for it has a constructor:
 * whoever reads a mirror that was freed reads what was one, the same each time.
 */
static struct kmem_cache *client_cache;

static void client_construct(void *memory)
{
	memset(memory, 0, sizeof(struct vgpu_client));
}

/* The context, referenced, or NULL if it is on its way out. */
static struct vgpu_ctx *client_ctx(const struct vgpu_client *client)
{
	struct vgpu_ctx *ctx;

	ctx = vgpu_ctx_get_index(client->vdev, VGPU_HANDLE_INDEX(client->handle));
	if (ctx && ctx->handle != client->handle) {
		vgpu_ctx_put(ctx);
		ctx = NULL;
	}
	return ctx;
}

/**
 * vgpu_device_lock() - take a context's pt_lock, and say so in the book of locks
 * @ctx: the context
 * @use: in the book until vgpu_device_unlock()
 * @may_sleep: else it is only tried
 *
 * Return: whether it was taken.
 */
noinline __noclone bool vgpu_device_lock(struct vgpu_ctx *ctx, struct lock_use *use,
					 bool may_sleep)
{
	lock_book_wants(use, "device_lock", ctx->handle, "exclusive", &ctx->pt_lock);
	if (may_sleep) {
		mutex_lock(&ctx->pt_lock);
	} else if (!mutex_trylock(&ctx->pt_lock)) {
		lock_book_done(use);
		return false;
	}
	lock_book_has(use);
	return true;
}

void vgpu_device_unlock(struct vgpu_ctx *ctx, struct lock_use *use)
{
	mutex_unlock(&ctx->pt_lock);
	lock_book_done(use);
}

static bool client_sync_ctx(struct vgpu_ctx *ctx, const struct mmu_notifier_range *range)
{
	bool may_sleep = mmu_notifier_range_blockable(range);
	struct lock_use use;

	/* Who migrates with the device lock held has taken the range away itself. */
	if (range->event == MMU_NOTIFY_MIGRATE && range->owner == ctx)
		return true;
	if (may_sleep)
		hmm_gate_sync_unlocked();
	if (!vgpu_device_lock(ctx, &use, may_sleep))
		return false;
	atomic64_inc(&ctx->invalidations);
	if (!ctx->stopped)
		vgpu_pt_zap(ctx, range->start, range->end - 1, may_sleep);
	vgpu_device_unlock(ctx, &use);
	return true;
}

static bool client_sync(struct hmm_mirror *mirror, const struct mmu_notifier_range *range)
{
	struct vgpu_ctx *ctx = client_ctx(container_of(mirror, struct vgpu_client, mirror));
	bool done = true;

	if (ctx) {
		done = client_sync_ctx(ctx, range);
		vgpu_ctx_put(ctx);
	}
	return done;
}

static void client_release(struct hmm_mirror *mirror)
{
	struct vgpu_client *client = container_of(mirror, struct vgpu_client, mirror);
	struct vgpu_cmd cmd = vgpu_cmd_make(VGPU_CMD_OP_INVALIDATE, client->handle, 0,
					    VGPU_VA_LAST, 0);
	struct vgpu_ctx *ctx;
	struct lock_use use;

	/* The context may be stopped and not yet unbound: it has its handle still. */
	vgpu_cmd_run(client->vdev, &cmd, 1);
	ctx = client_ctx(client);
	if (ctx) {
		vgpu_device_lock(ctx, &use, true);
		vgpu_ctx_stop_locked(ctx);
		vgpu_device_unlock(ctx, &use);
		vgpu_ctx_put(ctx);
	}
	vgpu_act_release(client);
}

static const struct hmm_mirror_ops client_ops = {
	.release = client_release,
	.sync = client_sync,
};

/* Work of a driver that pulls its memory out of every process that maps it. */
static void client_unmap(struct work_struct *work)
{
	struct vgpu_client *client = container_of(work, struct vgpu_client, work);
	struct lock_use use;

	/* To whoever waits for the work it is a lock that is held. */
	lock_book_wants(&use, "release_work", client->handle, "exclusive", NULL);
	lock_book_has(&use);
	hmm_gate_release_work();
	unmap_mapping_range(client->file->f_mapping, 0, 0, 1);
	lock_book_done(&use);
}

static void client_free(struct vgpu_client *client)
{
	if (client->file)
		fput(client->file);
	kmem_cache_free(client_cache, client);
}

static int mirror_begin(struct vgpu_ctx *ctx, struct mm_struct *mm)
{
	struct vgpu_client *client = kmem_cache_alloc(client_cache, GFP_KERNEL);
	int ret;

	if (!client)
		return -ENOMEM;
	*client = (struct vgpu_client) {
		.mirror.ops = &client_ops,
		.vdev = ctx->vdev,
		.handle = ctx->handle,
	};
	INIT_WORK(&client->work, client_unmap);
	ctx->mm = mm;
	ret = hmm_mirror_register(&client->mirror, mm);
	if (ret) {
		client_free(client);
		return ret;
	}
	ctx->sync = &client->mirror.hmm->sync;
	ctx->client = client;
	ctx->mirrored = true;
	return 0;
}

static void mirror_end(struct vgpu_ctx *ctx)
{
	struct vgpu_client *client = ctx->client;

	if (!ctx->mirrored)
		return;
	ctx->mirrored = false;
	ctx->client = NULL;
	/* Unless its own release has, which a policy may allow. */
	if (!READ_ONCE(client->unregistered))
		hmm_mirror_unregister(&client->mirror);
	client_free(client);
}

/* All that the fault worker looks at for one fault lies in these 2 MiB. */
static void mirror_fault_begin(struct vgpu_ctx *ctx, const struct vgpu_fault *fault)
{
	struct vgpu_client *client = ctx->client;
	unsigned long base = le64_to_cpu(fault->va) & ~(VGPU_HUGE_SIZE - 1);

	/* The copy context of devmem.c mirrors nobody. */
	if (!client)
		return;
	/* If it has ended, the fault worker will find so too. */
	if (hmm_range_register(&client->range, &client->mirror, base, base + VGPU_HUGE_SIZE))
		return;
	ctx->range = &client->range;
	if (READ_ONCE(client->unheld))
		hmm_range_let_go(ctx->range);
	hmm_gate_range_registered();
}

static void mirror_fault_end(struct vgpu_ctx *ctx)
{
	if (ctx->range)
		hmm_range_unregister(ctx->range);
	ctx->range = NULL;
}

static unsigned long mirror_read_begin(struct vgpu_ctx *ctx)
{
	return hmm_range_begin(ctx->range);
}

static bool mirror_read_retry(struct vgpu_ctx *ctx, unsigned long seq)
{
	return hmm_range_retry(ctx->range, seq);
}

static int mirror_init(const char *policy)
{
	int ret;

	client_cache = kmem_cache_create("hmm_vgpu_client", sizeof(struct vgpu_client), 0, 0,
					 client_construct);
	if (!client_cache)
		return -ENOMEM;
	ret = hmm_layer_init(policy);
	if (ret)
		kmem_cache_destroy(client_cache);
	return ret;
}

static void mirror_exit(void)
{
	hmm_layer_exit();
	kmem_cache_destroy(client_cache);
}

const struct vgpu_backend vgpu_backend_mirror = {
	.name = "mirror",
	.init = mirror_init,
	.exit = mirror_exit,
	.begin = mirror_begin,
	.end = mirror_end,
	.fault_begin = mirror_fault_begin,
	.fault_end = mirror_fault_end,
	.read_begin = mirror_read_begin,
	.read_retry = mirror_read_retry,
	.layer = vgpu_act_layer,
	.act = vgpu_act,
};
