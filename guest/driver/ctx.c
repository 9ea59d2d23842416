// SPDX-License-Identifier: GPL-2.0
/*
 * A context's life.
 *
 * create	the device knows it; nothing is mirrored yet
 * stop		CTX_RELEASE: it runs nothing, maps nothing, and stays so. From the
 *		notifier when the address space goes, else at the start of destroy;
 *		whichever comes first does it
 * destroy	close, unbind or removal of the device: everything granted is given
 *		back and CTX_UNBIND ends the handle
 * put		the memory; after destroy nothing outside the driver refers to it
 */
#include <linux/sched/mm.h>
#include <linux/slab.h>

#include "hmm_vgpu.h"

static void vgpu_ctx_free(struct kref *ref)
{
	struct vgpu_ctx *ctx = container_of(ref, struct vgpu_ctx, ref);
	unsigned int i;

	for (i = 0; i < HMM_VGPU_QUEUES; i++)
		kfree(ctx->queue[i].results);
	vgpu_device_put(ctx->vdev);
	kvfree(ctx);
}

void vgpu_ctx_put(struct vgpu_ctx *ctx)
{
	kref_put(&ctx->ref, vgpu_ctx_free);
}

/* The context in a place of the table, referenced, or NULL. */
struct vgpu_ctx *vgpu_ctx_get_index(struct vgpu_device *vdev, u32 index)
{
	struct vgpu_ctx *ctx = NULL;

	spin_lock(&vdev->ctx_lock);
	if (index < vdev->contexts)
		ctx = vdev->ctx[index];
	if (ctx)
		kref_get(&ctx->ref);
	spin_unlock(&vdev->ctx_lock);
	return ctx;
}

/*
 * The invalidate callback may be called in reclaim. Tell lockdep at once, so that
 * it does not need a machine short of memory to find an allocation under a lock.
 */
static void vgpu_ctx_prime_lockdep(struct vgpu_ctx *ctx)
{
	fs_reclaim_acquire(GFP_KERNEL);
	mutex_lock(&ctx->pt_lock);
	mutex_lock(&ctx->queue[0].lock);
	mutex_unlock(&ctx->queue[0].lock);
	mutex_unlock(&ctx->pt_lock);
	fs_reclaim_release(GFP_KERNEL);
}

static struct vgpu_ctx *vgpu_ctx_alloc(struct vgpu_device *vdev)
{
	struct vgpu_ctx *ctx = kvzalloc(sizeof(*ctx), GFP_KERNEL);
	unsigned int i;

	if (!ctx)
		return NULL;
	kref_init(&ctx->ref);
	kref_get(&vdev->ref);
	ctx->vdev = vdev;
	ctx->sync = &ctx->notifier;
	mutex_init(&ctx->pt_lock);
	INIT_LIST_HEAD(&ctx->empty);
	INIT_LIST_HEAD(&ctx->tables);
	INIT_LIST_HEAD(&ctx->detached);
	spin_lock_init(&ctx->fault_lock);
	INIT_WORK(&ctx->work, vgpu_fault_work);
	for (i = 0; i < HMM_VGPU_QUEUES; i++) {
		mutex_init(&ctx->queue[i].lock);
		init_waitqueue_head(&ctx->queue[i].wait);
	}
	for (i = 0; i < HMM_VGPU_QUEUES; i++)
		if (vgpu_queue_init(ctx, &ctx->queue[i]))
			goto err;
	vgpu_ctx_prime_lockdep(ctx);
	return ctx;

err:
	for (i = 0; i < HMM_VGPU_QUEUES; i++)
		vgpu_queue_fini(ctx, &ctx->queue[i]);
	vgpu_ctx_put(ctx);
	return NULL;
}

/**
 * vgpu_ctx_create() - bind a context of the device, with root and queues
 * @vdev: the device
 * @tag: what the device calls it in what it shows
 *
 * Return: the context, or an error pointer: -ENOSPC if the device has none left.
 */
struct vgpu_ctx *vgpu_ctx_create(struct vgpu_device *vdev, u32 tag)
{
	struct vgpu_cmd create[HMM_VGPU_QUEUES];
	struct vgpu_cmd bind;
	struct vgpu_ctx *ctx;
	unsigned int i;
	u32 index;
	int ret;

	ctx = vgpu_ctx_alloc(vdev);
	if (!ctx)
		return ERR_PTR(-ENOMEM);

	bind = vgpu_cmd_make(VGPU_CMD_OP_CTX_BIND, 0, tag, 0, 0);
	ret = vgpu_cmd_run(vdev, &bind, 1);
	if (ret)
		goto err_alloc;
	ctx->handle = le64_to_cpu(bind.result);
	index = VGPU_HANDLE_INDEX(ctx->handle);
	ret = -EIO;
	if (index >= vdev->contexts)
		goto err_alloc;

	ret = vgpu_table_create_root(ctx);
	if (ret)
		goto err_destroy;
	for (i = 0; i < HMM_VGPU_QUEUES; i++)
		create[i] = vgpu_queue_create_cmd(ctx, &ctx->queue[i]);
	ret = vgpu_cmd_run(vdev, create, HMM_VGPU_QUEUES);
	for (i = 0; i < HMM_VGPU_QUEUES; i++)
		if (!vgpu_cmd_error(&create[i]))
			ctx->queue[i].handle = le64_to_cpu(create[i].result);
	if (ret)
		goto err_destroy;

	spin_lock(&vdev->ctx_lock);
	WRITE_ONCE(vdev->ctx[index], ctx);
	spin_unlock(&vdev->ctx_lock);
	return ctx;

err_destroy:
	vgpu_ctx_destroy(ctx);
	return ERR_PTR(ret);
err_alloc:
	for (i = 0; i < HMM_VGPU_QUEUES; i++)
		vgpu_queue_fini(ctx, &ctx->queue[i]);
	vgpu_ctx_put(ctx);
	return ERR_PTR(ret);
}

/**
 * vgpu_ctx_stop_locked() - the context runs and maps nothing any more
 * @ctx: the context
 *
 * When it returns the device has ended its jobs, cancelled its faults, dropped
 * its TLB entries and let its accesses drain, and has no leaf of it. The second
 * call does nothing.
 *
 * Context: pt_lock. Called from the notifier; may sleep, allocates nothing.
 */
void vgpu_ctx_stop_locked(struct vgpu_ctx *ctx)
{
	unsigned int i;

	lockdep_assert_held(&ctx->pt_lock);

	if (ctx->stopped)
		return;
	/* Whoever maps or answers a fault looks at this under pt_lock. */
	WRITE_ONCE(ctx->stopped, true);
	for (i = 0; i < HMM_VGPU_QUEUES; i++)
		vgpu_queue_stop(&ctx->queue[i]);

	vgpu_pt_push(ctx, true,
		     vgpu_cmd_make(VGPU_CMD_OP_CTX_RELEASE, ctx->handle, 0, 0, 0));
	vgpu_pt_clear_all(ctx);
	vgpu_pt_flush(ctx, true, true);
	vgpu_pt_drop_all(ctx);

	for (i = 0; i < HMM_VGPU_QUEUES; i++)
		vgpu_queue_end_all(&ctx->queue[i]);
}

void vgpu_ctx_stop(struct vgpu_ctx *ctx)
{
	mutex_lock(&ctx->pt_lock);
	vgpu_ctx_stop_locked(ctx);
	mutex_unlock(&ctx->pt_lock);
}

/**
 * vgpu_ctx_destroy() - unregister a context
 * @ctx: the context; the caller's reference is dropped
 *
 * The order matters. Stopped first, so that no device mapping outlives the
 * notifier. Then out of the interrupts' sight, its device-private pages evicted
 * while it can still return them, and the fault worker at an end, since it uses
 * the notifier. Then the notifier goes, and nobody but us knows the
 * context. Then all that was granted is returned, and CTX_UNBIND is the last
 * command that names it. Only then is memory freed that the device has used.
 *
 * Context: may sleep; no lock that the invalidate callback takes, nor mmap_lock.
 */
void vgpu_ctx_destroy(struct vgpu_ctx *ctx)
{
	struct vgpu_device *vdev = ctx->vdev;
	u32 index = VGPU_HANDLE_INDEX(ctx->handle);
	unsigned int i;

	vgpu_ctx_stop(ctx);

	spin_lock(&vdev->ctx_lock);
	if (vdev->ctx[index] == ctx)
		WRITE_ONCE(vdev->ctx[index], NULL);
	spin_unlock(&vdev->ctx_lock);
	spin_lock(&ctx->fault_lock);
	ctx->closed = true;
	spin_unlock(&ctx->fault_lock);
	vgpu_devmem_close(ctx);
	cancel_work_sync(&ctx->work);

	vgpu_backend->end(ctx);

	mutex_lock(&ctx->pt_lock);
	for (i = 0; i < HMM_VGPU_QUEUES; i++)
		if (ctx->queue[i].handle)
			vgpu_pt_push(ctx, true,
				     vgpu_cmd_make(VGPU_CMD_OP_QUEUE_DESTROY, ctx->handle,
						   ctx->queue[i].handle, 0, 0));
	vgpu_table_return_all(ctx);
	vgpu_pt_push(ctx, true,
		     vgpu_cmd_make(VGPU_CMD_OP_CTX_UNBIND, ctx->handle, 0, 0, 0));
	vgpu_pt_flush(ctx, true, true);
	mutex_unlock(&ctx->pt_lock);

	vgpu_table_free_all(ctx);
	for (i = 0; i < HMM_VGPU_QUEUES; i++)
		vgpu_queue_fini(ctx, &ctx->queue[i]);
	vgpu_ctx_put(ctx);
}
