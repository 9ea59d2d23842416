/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What differs between the kernels this builds on (6.1 to 7.x). Nothing else in
 * the driver looks at the kernel's version.
 */
#ifndef HMM_VGPU_COMPAT_H
#define HMM_VGPU_COMPAT_H

#include <linux/version.h>

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 1, 0)
#error "hmm_vgpu needs Linux 6.1 or newer"
#endif

#endif
