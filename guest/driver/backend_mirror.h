/* SPDX-License-Identifier: GPL-2.0 */
/* What the mirror backend's files share. */
#ifndef HMM_VGPU_BACKEND_MIRROR_H
#define HMM_VGPU_BACKEND_MIRROR_H

#include <linux/workqueue.h>

#include "hmm_vgpu.h"
#include "lock_book.h"
#include "mirror_layer.h"

struct file;

/**
 * struct vgpu_client - what the mirror layer knows of a context
 * @mirror: registered with the layer
 * @vdev: the device; outlives the mirror
 * @handle: the context's handle
 * @unheld: faults let the address space's users go too early
 * @range: of the fault worker
 * @waits: release waits for @work
 * @unregisters: release unregisters @mirror
 * @unregistered: it has
 * @work: unmaps @file
 * @file: referenced, or NULL
 *
 * The flags are wrong on purpose: they are what scenarios are about (mirror_act.c).
 */
struct vgpu_client {
	struct hmm_mirror mirror;
	struct vgpu_device *vdev;
	u64 handle;
	struct hmm_mirror_range range;
	bool unheld;
	bool waits;
	bool unregisters;
	bool unregistered;
	struct work_struct work;
	struct file *file;
};

/* backend_mirror.c */
bool vgpu_device_lock(struct vgpu_ctx *ctx, struct lock_use *use, bool may_sleep);
void vgpu_device_unlock(struct vgpu_ctx *ctx, struct lock_use *use);

/* mirror_act.c */
void vgpu_act_release(struct vgpu_client *client);
int vgpu_act_layer(struct hmm_vgpu_layer *arg);
int vgpu_act(struct vgpu_ctx *ctx, const struct hmm_vgpu_act *arg);

#endif
