// SPDX-License-Identifier: GPL-2.0
/*
 * Jobs and their completions. Job n (from 0) has fence n + 1 and is answered in
 * completion n modulo the ring's size; completions are taken in that order.
 * Interrupts coalesce, so one means "look", not "one more".
 */
#include <linux/dma-mapping.h>
#include <linux/ktime.h>
#include <linux/slab.h>

#include "hmm_vgpu.h"

/* How often a job is looked for that ends without an interrupt. */
#define VGPU_QUEUE_POLL_NS	NSEC_PER_MSEC

#define VGPU_QUEUE_BYTES						\
	(VGPU_QUEUE_JOBS * (sizeof(struct vgpu_job) +			\
			    sizeof(struct vgpu_completion)) + sizeof(__le64))

/* The lock and the wait queue are ready. */
int vgpu_queue_init(struct vgpu_ctx *ctx, struct vgpu_queue *q)
{
	void *memory;

	q->results = kcalloc(HMM_VGPU_RESULTS, sizeof(*q->results), GFP_KERNEL);
	if (!q->results)
		return -ENOMEM;
	memory = dma_alloc_coherent(&ctx->vdev->pdev->dev, VGPU_QUEUE_BYTES,
				    &q->dma, GFP_KERNEL);
	if (!memory)
		return -ENOMEM;
	q->job = memory;
	q->completion = (void *)(q->job + VGPU_QUEUE_JOBS);
	q->fence = (void *)(q->completion + VGPU_QUEUE_JOBS);
	return 0;
}

/* Frees what the device used; vgpu_ctx_put() frees the results. */
void vgpu_queue_fini(struct vgpu_ctx *ctx, struct vgpu_queue *q)
{
	struct vgpu_job *job;

	/* A task in an ioctl may still look at the queue. */
	mutex_lock(&q->lock);
	job = q->job;
	q->job = NULL;
	mutex_unlock(&q->lock);
	if (job)
		dma_free_coherent(&ctx->vdev->pdev->dev, VGPU_QUEUE_BYTES, job, q->dma);
}

struct vgpu_cmd vgpu_queue_create_cmd(struct vgpu_ctx *ctx, struct vgpu_queue *q)
{
	dma_addr_t completion = q->dma + ((void *)q->completion - (void *)q->job);
	dma_addr_t fence = q->dma + ((void *)q->fence - (void *)q->job);
	struct vgpu_cmd cmd;

	cmd = vgpu_cmd_make(VGPU_CMD_OP_QUEUE_CREATE, ctx->handle, q->dma,
			    VGPU_QUEUE_SHIFT, completion);
	cmd.arg[3] = cpu_to_le64(fence);
	return cmd;
}

static void vgpu_queue_end(struct vgpu_queue *q, struct vgpu_result result)
{
	q->results[q->done % HMM_VGPU_RESULTS] = result;
	/* Pairs with the acquire in vgpu_queue_reached(). */
	smp_store_release(&q->done, q->done + 1);
}

static void vgpu_queue_scan_locked(struct vgpu_queue *q)
{
	u64 before = q->done;

	lockdep_assert_held(&q->lock);

	while (q->job && q->done != q->head) {
		struct vgpu_completion *c;
		u32 status;

		c = &q->completion[q->done % VGPU_QUEUE_JOBS];
		status = le32_to_cpu(READ_ONCE(c->status));
		if (!status)
			break;
		/* The device writes the status last. */
		dma_rmb();
		vgpu_queue_end(q, (struct vgpu_result) {
			.status = status,
			.result = le64_to_cpu(c->result),
			.address = le64_to_cpu(c->address),
		});
		/* Seen before the doorbell of the job that uses the entry next. */
		WRITE_ONCE(c->status, 0);
	}
	if (q->done != before)
		wake_up_all(&q->wait);
}

/* Whether there are jobs whose completions have not been seen. */
bool vgpu_queue_busy(struct vgpu_queue *q)
{
	return READ_ONCE(q->head) != READ_ONCE(q->done);
}

/* Takes the completions that have arrived. */
void vgpu_queue_scan(struct vgpu_queue *q)
{
	mutex_lock(&q->lock);
	vgpu_queue_scan_locked(q);
	mutex_unlock(&q->lock);
}

/* From here on nothing is submitted, and the doorbell is not touched. */
void vgpu_queue_stop(struct vgpu_queue *q)
{
	mutex_lock(&q->lock);
	q->stopped = true;
	mutex_unlock(&q->lock);
}

/**
 * vgpu_queue_end_all() - account for every job of a context that was stopped
 * @q: the queue
 *
 * CTX_RELEASE has completed, or the device is dead: jobs without a completion
 * by now get none.
 */
void vgpu_queue_end_all(struct vgpu_queue *q)
{
	mutex_lock(&q->lock);
	vgpu_queue_scan_locked(q);
	while (q->done != q->head)
		vgpu_queue_end(q, (struct vgpu_result) {
			.status = VGPU_JOB_KILLED,
		});
	mutex_unlock(&q->lock);
	wake_up_all(&q->wait);
}

/**
 * vgpu_queue_submit() - write a job into the ring and ring the doorbell
 * @ctx: the context
 * @q: one of its queues
 * @arg: the job; its fence is filled in
 *
 * Return: 0, -ESRCH if the context has been stopped, -EAGAIN if the queue is
 * full, -EIO if the device is dead.
 */
int vgpu_queue_submit(struct vgpu_ctx *ctx, struct vgpu_queue *q,
		      struct hmm_vgpu_submit *arg)
{
	struct vgpu_job *job;
	unsigned int i;
	u32 doorbell;
	int ret = 0;

	mutex_lock(&q->lock);
	if (q->stopped) {
		ret = -ESRCH;
		goto out;
	}
	if (vgpu_is_dead(ctx->vdev)) {
		ret = -EIO;
		goto out;
	}
	if (q->head - q->done == VGPU_QUEUE_JOBS)
		vgpu_queue_scan_locked(q);
	if (q->head - q->done == VGPU_QUEUE_JOBS) {
		ret = -EAGAIN;
		goto out;
	}

	arg->fence = q->head + 1;
	job = &q->job[q->head % VGPU_QUEUE_JOBS];
	job->op = cpu_to_le16(arg->op);
	job->flags = cpu_to_le16(arg->flags);
	job->reserved = 0;
	job->fence = cpu_to_le64(arg->fence);
	job->dst = cpu_to_le64(arg->dst);
	job->src = cpu_to_le64(arg->src);
	job->len = cpu_to_le64(arg->len);
	for (i = 0; i < ARRAY_SIZE(job->operand); i++)
		job->operand[i] = cpu_to_le64(arg->operand[i]);
	WRITE_ONCE(q->head, q->head + 1);

	doorbell = (q->head & 0xffff) |
		   (VGPU_HANDLE_GENERATION(q->handle) & 0xffff) << 16;
	/* The job is seen before the doorbell. */
	dma_wmb();
	vgpu_write(ctx->vdev,
		   VGPU_REG_QUEUE_DOORBELL(VGPU_HANDLE_INDEX(q->handle)),
		   doorbell);
out:
	mutex_unlock(&q->lock);
	return ret;
}

static bool vgpu_queue_reached(struct vgpu_queue *q, u64 fence)
{
	/* Pairs with the release in vgpu_queue_end(). */
	return smp_load_acquire(&q->done) >= fence;
}

/* Whether a job that has not ended will end without an interrupt. */
static bool vgpu_queue_silent(struct vgpu_queue *q, u64 fence)
{
	bool silent = false;

	mutex_lock(&q->lock);
	if (q->job && q->done < fence)
		silent = le16_to_cpu(q->job[(fence - 1) % VGPU_QUEUE_JOBS].flags) &
			 VGPU_JOB_FLAG_NO_IRQ;
	mutex_unlock(&q->lock);
	return silent;
}

/* Sleeps until a job has ended; looks for it now and then if nothing will tell. */
static int vgpu_queue_sleep(struct vgpu_ctx *ctx, struct vgpu_queue *q, u64 fence,
			    ktime_t timeout)
{
	bool silent = vgpu_queue_silent(q, fence);
	ktime_t end = ktime_add_safe(ktime_get(), timeout);
	int ret;

	do {
		ktime_t left = ktime_sub(end, ktime_get());

		if (silent)
			left = min_t(ktime_t, left, VGPU_QUEUE_POLL_NS);
		ret = wait_event_interruptible_hrtimeout(q->wait,
				vgpu_queue_reached(q, fence) ||
				vgpu_is_dead(ctx->vdev), max_t(ktime_t, left, 0));
		if (ret == -ETIME)
			vgpu_queue_scan(q);
		if (vgpu_queue_reached(q, fence))
			return 0;
		if (ret == -ERESTARTSYS)
			return -EINTR;
		if (vgpu_is_dead(ctx->vdev))
			return -EIO;
	} while (ktime_before(ktime_get(), end));
	return -ETIME;
}

/**
 * vgpu_queue_wait() - wait for a job to end, and tell how
 * @ctx: the context
 * @q: one of its queues
 * @arg: the fence and the time limit; the rest is filled in
 *
 * A context that is stopped meanwhile ends its jobs, and so this wait.
 * Return: see struct hmm_vgpu_wait.
 */
int vgpu_queue_wait(struct vgpu_ctx *ctx, struct vgpu_queue *q,
		    struct hmm_vgpu_wait *arg)
{
	struct vgpu_result result;
	u64 last;
	int ret;

	if (!arg->fence || arg->fence > READ_ONCE(q->head))
		return -EINVAL;

	if (!vgpu_queue_reached(q, arg->fence))
		vgpu_queue_scan(q);
	if (!vgpu_queue_reached(q, arg->fence)) {
		if (!arg->timeout_ns)
			return -ETIME;
		ret = vgpu_queue_sleep(ctx, q, arg->fence,
				       min_t(u64, arg->timeout_ns, KTIME_MAX));
		if (ret)
			return ret;
	}

	mutex_lock(&q->lock);
	last = q->done;
	result = q->results[(arg->fence - 1) % HMM_VGPU_RESULTS];
	mutex_unlock(&q->lock);
	if (last - arg->fence >= HMM_VGPU_RESULTS)
		return -ENODATA;

	arg->status = result.status;
	arg->result = result.result;
	arg->address = result.address;
	return 0;
}
