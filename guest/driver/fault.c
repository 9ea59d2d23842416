// SPDX-License-Identifier: GPL-2.0
/*
 * Serving a context's faults: a work item each, on an unbound queue, since a
 * fault may wait for mmap_lock, for memory, for a page to come from storage.
 *
 * Every fault is answered exactly once, by replay or cancel, unless the context
 * is stopped: that ends all of them on the device, and their handles with them.
 */
#include <linux/sched/mm.h>

#include "hmm_vgpu.h"

/**
 * vgpu_fault_answer_locked() - push the answer to a fault
 * @ctx: the context, not stopped
 * @fault: the fault
 * @replay: let the access try again, rather than end its job
 *
 * Context: pt_lock; the caller flushes.
 */
void vgpu_fault_answer_locked(struct vgpu_ctx *ctx,
			      const struct vgpu_fault *fault, bool replay)
{
	lockdep_assert_held(&ctx->pt_lock);

	vgpu_pt_push(ctx, true,
		     vgpu_cmd_make(replay ? VGPU_CMD_OP_FAULT_REPLAY :
					    VGPU_CMD_OP_FAULT_CANCEL,
				   ctx->handle, le64_to_cpu(fault->fault), 0, 0));
}

static void vgpu_fault_answer(struct vgpu_ctx *ctx,
			      const struct vgpu_fault *fault, bool replay)
{
	mutex_lock(&ctx->pt_lock);
	if (!ctx->stopped) {
		vgpu_fault_answer_locked(ctx, fault, replay);
		vgpu_pt_flush(ctx, true, false);
	}
	mutex_unlock(&ctx->pt_lock);
}

/**
 * vgpu_fault_queue() - take a fault from the fault buffer
 * @ctx: the context, referenced
 * @fault: the entry; copied
 */
void vgpu_fault_queue(struct vgpu_ctx *ctx, const struct vgpu_fault *fault)
{
	bool full = false;

	spin_lock(&ctx->fault_lock);
	if (ctx->closed) {
		/* Stopped already. */
	} else if (ctx->fifo_head - ctx->fifo_tail == VGPU_FAULT_FIFO) {
		full = true;
	} else {
		ctx->fifo[ctx->fifo_head++ % VGPU_FAULT_FIFO] = *fault;
		queue_work(vgpu_fault_wq, &ctx->work);
	}
	spin_unlock(&ctx->fault_lock);

	/* A queue has one fault at a time, so hardly ever; it will come again. */
	if (full)
		vgpu_fault_answer(ctx, fault, true);
}

static bool vgpu_fault_take(struct vgpu_ctx *ctx, struct vgpu_fault *fault)
{
	bool any;

	spin_lock(&ctx->fault_lock);
	any = ctx->fifo_head != ctx->fifo_tail;
	if (any)
		*fault = ctx->fifo[ctx->fifo_tail++ % VGPU_FAULT_FIFO];
	spin_unlock(&ctx->fault_lock);
	return any;
}

static void vgpu_fault_serve(struct vgpu_ctx *ctx, const struct vgpu_fault *fault)
{
	int ret = -ESRCH;

	/* The copy context maps what it copies, and mirrors nobody: its job ends. */
	if (!ctx->mm) {
		vgpu_fault_answer(ctx, fault, false);
		return;
	}
	if (READ_ONCE(ctx->stopped))
		return;
	if (mmget_not_zero(ctx->mm)) {
		ret = vgpu_mirror_fault(ctx, fault);
		/*
		 * If this was the last reference the address space is torn down,
		 * our own callback included: not from here.
		 */
		mmput_async(ctx->mm);
	}

	switch (ret) {
	case 0:
		atomic64_inc(&ctx->faults_served);
		break;
	case -EBUSY:
		/* It keeps changing under us. The access will fault anew. */
		vgpu_fault_answer(ctx, fault, true);
		break;
	default:
		dev_dbg(&ctx->vdev->pdev->dev,
			"context %#llx: fault at %#llx, access %#x: %d\n",
			ctx->handle, le64_to_cpu(fault->va),
			le32_to_cpu(fault->access), ret);
		atomic64_inc(&ctx->faults_cancelled);
		vgpu_fault_answer(ctx, fault, false);
		break;
	}
}

void vgpu_fault_work(struct work_struct *work)
{
	struct vgpu_ctx *ctx = container_of(work, struct vgpu_ctx, work);
	struct vgpu_fault fault;

	while (vgpu_fault_take(ctx, &fault)) {
		if (vgpu_backend->fault_begin)
			vgpu_backend->fault_begin(ctx, &fault);
		vgpu_fault_serve(ctx, &fault);
		if (vgpu_backend->fault_end)
			vgpu_backend->fault_end(ctx);
		cond_resched();
	}
	vgpu_table_return_detached(ctx);
	if (READ_ONCE(ctx->nr_empty) > VGPU_EMPTY_TABLES)
		vgpu_table_trim(ctx);
}
