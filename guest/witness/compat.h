/* SPDX-License-Identifier: GPL-2.0 */
/*
 * All that differs between the kernels the witness is built for.
 *
 * Function probes: fprobe where its handlers carry entry data and a return
 * address (6.6), on pt_regs until 6.13 and on ftrace_regs since; kretprobe on
 * older kernels, and on those built without CONFIG_FPROBE (Debian's 6.1).
 */
#ifndef HMM_WITNESS_COMPAT_H
#define HMM_WITNESS_COMPAT_H

#include <linux/ptrace.h>
#include <linux/version.h>

#if defined(CONFIG_FPROBE) && LINUX_VERSION_CODE >= KERNEL_VERSION(6, 6, 0)
#define WITNESS_FPROBE 1
/* As HELLO reports it. */
#define WITNESS_MECHANISM 1

#include <linux/fprobe.h>

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 14, 0)
typedef struct ftrace_regs compat_regs;
#define compat_argument(regs, n) ftrace_regs_get_argument(regs, n)
#define compat_result(regs) ftrace_regs_get_return_value(regs)

/* Exits are kept on each task's own shadow stack: there is nothing to size. */
static inline void compat_fprobe_size(struct fprobe *fp, int calls)
{
}
#else
typedef struct pt_regs compat_regs;
#define compat_argument(regs, n) regs_get_kernel_argument(regs, n)
#define compat_result(regs) regs_return_value(regs)

static inline void compat_fprobe_size(struct fprobe *fp, int calls)
{
	fp->nr_maxactive = calls;
}
#endif

#elif defined(CONFIG_KRETPROBES)
#define WITNESS_FPROBE 0
#define WITNESS_MECHANISM 2

#include <linux/kprobes.h>

typedef struct pt_regs compat_regs;
#define compat_argument(regs, n) regs_get_kernel_argument(regs, n)
#define compat_result(regs) regs_return_value(regs)

#else
#error "hmm_witness needs a kernel with CONFIG_FPROBE or CONFIG_KRETPROBES"
#endif

#endif
