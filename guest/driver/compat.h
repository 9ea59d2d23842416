/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What differs between the kernels this builds on (6.1 to 7.x). Nothing else in
 * the driver looks at the kernel's version.
 */
#ifndef HMM_VGPU_COMPAT_H
#define HMM_VGPU_COMPAT_H

#include <linux/memremap.h>
#include <linux/migrate.h>
#include <linux/mm.h>
#include <linux/pagemap.h>
#include <linux/rmap.h>
#include <linux/version.h>

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 1, 0)
#error "hmm_vgpu needs Linux 6.1 or newer"
#endif

/*
 * Device memory needs a kernel with CONFIG_DEVICE_PRIVATE. In 6.19 its interface
 * was half way from pages to folios; that one is left out.
 */
#if defined(CONFIG_DEVICE_PRIVATE) &&				\
	(LINUX_VERSION_CODE < KERNEL_VERSION(6, 19, 0) ||	\
	 LINUX_VERSION_CODE >= KERNEL_VERSION(7, 0, 0))
#define VGPU_DEVMEM 1
#else
#define VGPU_DEVMEM 0
#endif

#if VGPU_DEVMEM
#if LINUX_VERSION_CODE >= KERNEL_VERSION(7, 0, 0)
#define compat_pagemap_free(name, page)			\
	static void name##_folio(struct folio *folio)	\
	{						\
		name(folio_page(folio, 0));		\
	}
#define COMPAT_PAGEMAP_FREE(name) .folio_free = name##_folio

static inline void compat_device_page_init(struct page *page,
					   struct dev_pagemap *pgmap)
{
	zone_device_page_init(page, pgmap, 0);
}
#else
#define compat_pagemap_free(name, page)
#define COMPAT_PAGEMAP_FREE(name) .page_free = name

static inline void compat_device_page_init(struct page *page,
					   struct dev_pagemap *pgmap)
{
	zone_device_page_init(page);
}
#endif

static inline struct dev_pagemap *compat_page_pgmap(struct page *page)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 15, 0)
	return page_pgmap(page);
#else
	return page->pgmap;
#endif
}

/*
 * Makes one page exclusive to the device. Returns it locked and referenced, or
 * an error pointer.
 */
static inline struct page *compat_make_exclusive(struct mm_struct *mm,
						 unsigned long addr, void *owner)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 15, 0)
	struct folio *folio;

	return make_device_exclusive(mm, addr, owner, &folio);
#else
	struct page *page = NULL;
	int ret = make_device_exclusive_range(mm, addr & PAGE_MASK,
					      (addr & PAGE_MASK) + PAGE_SIZE, &page,
					      owner);

	if (ret < 0)
		return ERR_PTR(ret);
	return page ? page : ERR_PTR(-EBUSY);
#endif
}
#endif

#endif
