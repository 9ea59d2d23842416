/* SPDX-License-Identifier: GPL-2.0 */
/* What devmem.c and migrate.c share. */
#ifndef HMM_VGPU_DEVMEM_H
#define HMM_VGPU_DEVMEM_H

#include "hmm_vgpu.h"

/* Pages copied at once: each needs a RETURN and a GRANT in one batch. */
#define VGPU_COPY_PAGES	(VGPU_BATCH / 2)

/**
 * struct vgpu_dpage - a page of VRAM and the device-private page it backs
 * @link: in vgpu_devmem.free or freed, or in nothing while it is in use
 * @owner: the context it was migrated for, referenced; its close evicts it
 * @holder: the context it is granted to: the owner, or the copy context
 * @handle: its handle, or 0
 */
struct vgpu_dpage {
	struct list_head link;
	struct vgpu_ctx *owner;
	struct vgpu_ctx *holder;
	u64 handle;
};

/**
 * struct vgpu_devmem - the device's memory as device-private pages
 * @vdev: the device
 * @region: the physical addresses that stand for it; nothing answers there
 * @first: first page frame number of the region
 * @count: how many pages of VRAM there are
 * @dpage: by index of the page
 * @lock: @free, @freed, @closed, and vgpu_dpage.link
 * @free: pages that nobody uses
 * @freed: pages that the kernel has freed and the device has not got back
 * @closed: no page is given out any more
 * @used: pages neither in @free nor in @freed
 * @reap: gives @freed back
 * @copy_lock: @copy, @cmd, and vgpu_dpage.holder and handle
 * @copy: the driver's own context, which copies
 * @cmd: commands under way
 * @pgmap: the kernel's side of it
 */
struct vgpu_devmem {
	struct vgpu_device *vdev;
	struct resource *region;
	unsigned long first;
	unsigned long count;
	struct vgpu_dpage *dpage;

	spinlock_t lock;
	struct list_head free;
	struct list_head freed;
	bool closed;
	atomic_t used;
	struct work_struct reap;

	struct mutex copy_lock;
	struct vgpu_ctx *copy;
	struct vgpu_cmd cmd[VGPU_BATCH];

	struct dev_pagemap pgmap;
};

/**
 * struct vgpu_copy - pages to be copied
 * @dpage: pages of VRAM
 * @page: the system's, to or from; NULL to fill with zeroes
 * @index: where each came from
 * @count: how many
 */
struct vgpu_copy {
	struct vgpu_dpage *dpage[VGPU_COPY_PAGES];
	struct page *page[VGPU_COPY_PAGES];
	unsigned long index[VGPU_COPY_PAGES];
	unsigned int count;
};

static inline unsigned long vgpu_dpage_index(const struct vgpu_devmem *dm,
					     const struct vgpu_dpage *dp)
{
	return dp - dm->dpage;
}

static inline struct page *vgpu_dpage_page(const struct vgpu_devmem *dm,
					   const struct vgpu_dpage *dp)
{
	return pfn_to_page(dm->first + vgpu_dpage_index(dm, dp));
}

static inline struct vgpu_dpage *vgpu_dpage_of(const struct vgpu_devmem *dm,
					       struct page *page)
{
	return &dm->dpage[page_to_pfn(page) - dm->first];
}

/* devmem.c */
struct vgpu_dpage *vgpu_devmem_alloc(struct vgpu_devmem *dm, struct vgpu_ctx *owner);
void vgpu_devmem_drop(struct vgpu_devmem *dm, struct vgpu_dpage *dp);
void vgpu_devmem_reap(struct vgpu_devmem *dm);
int vgpu_devmem_copy_in(struct vgpu_devmem *dm, const struct vgpu_copy *copy,
			struct vgpu_ctx *owner);
int vgpu_devmem_copy_out(struct vgpu_devmem *dm, const struct vgpu_copy *copy);

/* migrate.c */
vm_fault_t vgpu_migrate_to_ram(struct vm_fault *vmf);
void vgpu_migrate_evict(struct vgpu_devmem *dm, struct vgpu_ctx *owner);
void vgpu_migrate_evict_page(struct vgpu_devmem *dm, unsigned long pfn);

#endif
