// SPDX-License-Identifier: GPL-2.0
/*
 * The command ring: one for the whole device, in guest memory. A batch of
 * commands costs one doorbell. Commands complete in order, and the device writes
 * how many have to a word in memory, which is polled: an interrupt would cost
 * more than nearly all commands take.
 */
#include <linux/delay.h>
#include <linux/dma-mapping.h>
#include <linux/jiffies.h>
#include <linux/ktime.h>
#include <linux/slab.h>

#include "hmm_vgpu.h"

#define VGPU_CMD_SHIFT		10
#define VGPU_CMDS		(1U << VGPU_CMD_SHIFT)
#define VGPU_CMD_BYTES		(VGPU_CMDS * sizeof(struct vgpu_cmd))
/* How long a wait spins before it sleeps. */
#define VGPU_CMD_SPIN_US	100
/* When a wait asks whether the device is still there at all. */
#define VGPU_CMD_PROBE_MS	1000
/* When the device is given up. */
#define VGPU_CMD_TIMEOUT_MS	10000

int vgpu_cmd_init(struct vgpu_device *vdev)
{
	struct vgpu_cmd_ring *ring = &vdev->ring;
	struct device *dev = &vdev->pdev->dev;

	spin_lock_init(&ring->lock);
	ring->owner = kcalloc(VGPU_CMDS, sizeof(*ring->owner), GFP_KERNEL);
	if (!ring->owner)
		return -ENOMEM;
	ring->cmd = dma_alloc_coherent(dev, VGPU_CMD_BYTES, &ring->dma, GFP_KERNEL);
	if (!ring->cmd)
		goto err_owner;
	ring->done = dma_alloc_coherent(dev, sizeof(*ring->done), &ring->done_dma,
					GFP_KERNEL);
	if (!ring->done)
		goto err_cmd;
	return 0;

err_cmd:
	dma_free_coherent(dev, VGPU_CMD_BYTES, ring->cmd, ring->dma);
err_owner:
	kfree(ring->owner);
	return -ENOMEM;
}

/* Tells the device, just reset, where the ring is. */
void vgpu_cmd_start(struct vgpu_device *vdev)
{
	struct vgpu_cmd_ring *ring = &vdev->ring;

	vgpu_write64(vdev, VGPU_REG_CMD_BASE_LO, ring->dma);
	vgpu_write64(vdev, VGPU_REG_CMD_DONE_LO, ring->done_dma);
	vgpu_write(vdev, VGPU_REG_CMD_SIZE, VGPU_CMD_SHIFT);
}

void vgpu_cmd_fini(struct vgpu_device *vdev)
{
	struct vgpu_cmd_ring *ring = &vdev->ring;
	struct device *dev = &vdev->pdev->dev;

	dma_free_coherent(dev, sizeof(*ring->done), ring->done, ring->done_dma);
	dma_free_coherent(dev, VGPU_CMD_BYTES, ring->cmd, ring->dma);
	kfree(ring->owner);
}

/**
 * vgpu_cmd_kill() - send nothing to the device any more
 * @vdev: the device
 * @why: for the log; NULL when the device is being removed in order
 *
 * Every wait, now and later, ends with -EIO. The device loses its access to
 * memory, since nobody can tell any more what it still has mapped.
 * Context: any but hard interrupt.
 */
void vgpu_cmd_kill(struct vgpu_device *vdev, const char *why)
{
	struct vgpu_cmd_ring *ring = &vdev->ring;
	unsigned int i, j;
	bool first;

	spin_lock(&ring->lock);
	first = !ring->dead;
	WRITE_ONCE(ring->dead, true);
	spin_unlock(&ring->lock);
	if (!first)
		return;

	if (why)
		dev_err(&vdev->pdev->dev, "%s; giving the device up\n", why);
	pci_clear_master(vdev->pdev);

	spin_lock(&vdev->ctx_lock);
	for (i = 0; i < vdev->contexts; i++) {
		if (!vdev->ctx[i])
			continue;
		for (j = 0; j < HMM_VGPU_QUEUES; j++)
			wake_up_all(&vdev->ctx[i]->queue[j].wait);
	}
	spin_unlock(&vdev->ctx_lock);
}

static u32 vgpu_cmd_done(struct vgpu_cmd_ring *ring)
{
	u32 done = le32_to_cpu(READ_ONCE(*ring->done));

	/* What the device wrote before it is read after. */
	dma_rmb();
	return done;
}

/* Indices wrap, and no two that are compared are 2^31 apart. */
static bool vgpu_cmd_reached(struct vgpu_cmd_ring *ring, u32 index)
{
	return (s32)(vgpu_cmd_done(ring) - index) >= 0;
}

/* Looks at the statuses of what has completed, so that slots can be used again. */
static void vgpu_cmd_reap(struct vgpu_device *vdev)
{
	struct vgpu_cmd_ring *ring = &vdev->ring;
	u32 done = vgpu_cmd_done(ring);

	lockdep_assert_held(&ring->lock);

	while (ring->reaped != done && ring->reaped != ring->tail) {
		unsigned int slot = ring->reaped++ & (VGPU_CMDS - 1);
		const struct vgpu_cmd *cmd = &ring->cmd[slot];
		struct vgpu_cmd *owner = ring->owner[slot];

		if (owner) {
			owner->status = cmd->status;
			owner->result = cmd->result;
			ring->owner[slot] = NULL;
		} else if (le32_to_cpu(cmd->status) != VGPU_CMD_STATUS_OK) {
			dev_err_ratelimited(&vdev->pdev->dev,
					    "command %u of context %#llx: status %u\n",
					    le16_to_cpu(cmd->op),
					    le64_to_cpu(cmd->ctx),
					    le32_to_cpu(cmd->status));
		}
	}
}

static int vgpu_cmd_write(struct vgpu_device *vdev, const struct vgpu_cmd *cmd,
			  struct vgpu_cmd *owner, unsigned int count,
			  bool may_sleep, u32 *index)
{
	struct vgpu_cmd_ring *ring = &vdev->ring;
	unsigned int i;
	int ret;

	for (;;) {
		u32 end;

		spin_lock(&ring->lock);
		if (ring->dead) {
			spin_unlock(&ring->lock);
			return -EIO;
		}
		vgpu_cmd_reap(vdev);
		end = ring->tail + count;
		if (end - ring->reaped <= VGPU_CMDS)
			break;
		spin_unlock(&ring->lock);

		ret = vgpu_cmd_wait(vdev, end - VGPU_CMDS, may_sleep);
		if (ret)
			return ret;
	}

	for (i = 0; i < count; i++) {
		unsigned int slot = (ring->tail + i) & (VGPU_CMDS - 1);

		ring->cmd[slot] = cmd[i];
		ring->owner[slot] = owner ? &owner[i] : NULL;
	}
	ring->tail += count;
	*index = ring->tail;

	/* The commands, and what they point to, are seen before the doorbell. */
	dma_wmb();
	/* Under the lock: a doorbell must not overtake a later one. */
	vgpu_write(vdev, VGPU_REG_CMD_TAIL, ring->tail);
	spin_unlock(&ring->lock);
	return 0;
}

/**
 * vgpu_cmd_post() - send commands whose results nobody needs
 * @vdev: the device
 * @cmd: the commands; copied
 * @count: how many, not more than VGPU_BATCH
 * @may_sleep: if the ring is full, wait by sleeping
 * @index: out: what to wait for, see vgpu_cmd_wait()
 *
 * A command that fails is logged when its slot is used again.
 *
 * Return: 0, or -EIO if the device is dead.
 */
int vgpu_cmd_post(struct vgpu_device *vdev, const struct vgpu_cmd *cmd,
		  unsigned int count, bool may_sleep, u32 *index)
{
	return vgpu_cmd_write(vdev, cmd, NULL, count, may_sleep, index);
}

/**
 * vgpu_cmd_send() - send commands whose status and result come back
 * @vdev: the device
 * @cmd: the commands; status and result are written to them later
 * @count: how many, not more than VGPU_BATCH
 * @index: out: for vgpu_cmd_finish()
 *
 * On success vgpu_cmd_finish() must be called before @cmd goes away.
 * Return: 0, or -EIO if the device is dead.
 */
int vgpu_cmd_send(struct vgpu_device *vdev, struct vgpu_cmd *cmd,
		  unsigned int count, u32 *index)
{
	return vgpu_cmd_write(vdev, cmd, cmd, count, true, index);
}

/**
 * vgpu_cmd_wait() - wait until commands have completed
 * @vdev: the device
 * @index: index behind the last of them
 * @may_sleep: poll by sleeping rather than by spinning
 *
 * Called from the invalidate callback: not interruptible, and not endless. A
 * device that does not answer in time is dead from then on.
 *
 * Return: 0, or -EIO if the device is dead.
 */
int vgpu_cmd_wait(struct vgpu_device *vdev, u32 index, bool may_sleep)
{
	struct vgpu_cmd_ring *ring = &vdev->ring;
	ktime_t start = ktime_get();
	bool probed = false;

	while (!vgpu_cmd_reached(ring, index)) {
		s64 us = ktime_us_delta(ktime_get(), start);

		if (READ_ONCE(ring->dead))
			return -EIO;
		if (us < VGPU_CMD_SPIN_US) {
			cpu_relax();
			continue;
		}
		if (us > VGPU_CMD_PROBE_MS * USEC_PER_MSEC && !probed) {
			probed = true;
			if (vgpu_read(vdev, VGPU_REG_ID) != VGPU_ID_VALUE) {
				vgpu_cmd_kill(vdev, "the device is gone");
				return -EIO;
			}
		}
		if (us > VGPU_CMD_TIMEOUT_MS * USEC_PER_MSEC) {
			vgpu_cmd_kill(vdev, "the device does not answer commands");
			return -EIO;
		}
		if (may_sleep)
			usleep_range(20, 100);
		else
			udelay(5);
	}
	return 0;
}

/**
 * vgpu_cmd_error() - what a command's status means as an error number
 * @cmd: a command that has come back
 *
 * Return: 0 or a negative error number.
 */
int vgpu_cmd_error(const struct vgpu_cmd *cmd)
{
	switch (le32_to_cpu(cmd->status)) {
	case VGPU_CMD_STATUS_OK:
		return 0;
	case VGPU_CMD_STATUS_NO_SPACE:
		return -ENOSPC;
	case VGPU_CMD_STATUS_BAD_STATE:
		return -ESRCH;
	default:
		return -EIO;
	}
}

/**
 * vgpu_cmd_finish() - wait for commands that were sent with vgpu_cmd_send()
 * @vdev: the device
 * @cmd: the commands
 * @count: how many
 * @index: from vgpu_cmd_send()
 *
 * Return: 0 if all went well, else the first error. A command that did not come
 * back has status PENDING.
 */
int vgpu_cmd_finish(struct vgpu_device *vdev, struct vgpu_cmd *cmd,
		    unsigned int count, u32 index)
{
	struct vgpu_cmd_ring *ring = &vdev->ring;
	int ret = vgpu_cmd_wait(vdev, index, true);
	unsigned int i;

	spin_lock(&ring->lock);
	if (!ret)
		vgpu_cmd_reap(vdev);
	for (i = 0; i < count; i++) {
		unsigned int slot = (index - count + i) & (VGPU_CMDS - 1);

		if (ring->owner[slot] == &cmd[i])
			ring->owner[slot] = NULL;
	}
	spin_unlock(&ring->lock);

	for (i = 0; i < count && !ret; i++)
		ret = vgpu_cmd_error(&cmd[i]);
	return ret;
}

/**
 * vgpu_cmd_run() - send commands and wait for their results
 * @vdev: the device
 * @cmd: the commands
 * @count: how many, not more than VGPU_BATCH
 *
 * Return: as vgpu_cmd_finish().
 */
int vgpu_cmd_run(struct vgpu_device *vdev, struct vgpu_cmd *cmd,
		 unsigned int count)
{
	u32 index;
	int ret = vgpu_cmd_send(vdev, cmd, count, &index);

	return ret ? ret : vgpu_cmd_finish(vdev, cmd, count, index);
}
