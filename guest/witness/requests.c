// SPDX-License-Identifier: GPL-2.0
/*
 * What the host asks of the guest when it looks hung: dumps to the console, and
 * an end.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/err.h>
#include <linux/fs.h>
#include <linux/kernel.h>
#include <linux/module.h>
#include <linux/panic.h>
#include <linux/printk.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/sched/debug.h>
#include <linux/sched/signal.h>
#include <linux/sysrq.h>

#include "hmm_vgpu_regs.h"
#include "witness.h"

#ifdef CONFIG_MAGIC_SYSRQ

/**
 * requests_allow - see to it that the dumps will be done
 *
 * handle_sysrq() obeys the mask of allowed keys, and distributions leave the
 * dumps out of it. The way from a module to the mask is its sysctl, and that
 * only from the task that loads the module: kernel threads need not see the
 * file systems of user space. It is not fatal if it fails.
 */
void __init requests_allow(void)
{
	struct file *file;
	loff_t pos = 0;
	ssize_t done;

	if (sysrq_mask() == 1 || (sysrq_mask() & SYSRQ_ENABLE_DUMP))
		return;

	file = filp_open("/proc/sys/kernel/sysrq", O_WRONLY, 0);
	if (IS_ERR(file)) {
		done = PTR_ERR(file);
	} else {
		done = kernel_write(file, "1\n", 2, &pos);
		filp_close(file, NULL);
	}
	if (done < 0)
		pr_warn("cannot allow sysrq dumps, so the host will not see who hangs: error %zd; boot with sysrq_always_enabled\n",
			done);
}

#else

void __init requests_allow(void)
{
	pr_warn("without CONFIG_MAGIC_SYSRQ the host will not see who hangs\n");
}

#endif

/*
 * Tasks that could run and are not the reader: who works without end is one of
 * them. sysrq knows only those that are on a CPU at this moment, and on a
 * machine with one CPU that is us.
 */
static void show_runnable(void)
{
	struct task_struct *process, *task;

	rcu_read_lock();
	for_each_process_thread(process, task)
		if (task_is_running(task) && task != current && !is_idle_task(task))
			sched_show_task(task);
	rcu_read_unlock();
}

/*
 * A driver may know more of its own locks than their waiters' stacks say: who
 * holds them. Nothing depends on that there is one.
 */
extern void hmm_lock_report(void);

static void show_locks(void)
{
	void (*report)(void) = symbol_get(hmm_lock_report);

	if (!report)
		return;
	report();
	symbol_put(hmm_lock_report);
}

/**
 * requests_act - do what the host asks
 * @requests: WITNESS_REQUEST_* bits
 */
void requests_act(u32 requests)
{
	if (requests & WITNESS_REQUEST_BLOCKED_TASKS) {
		handle_sysrq('w');
		show_locks();
	}
	if (requests & WITNESS_REQUEST_ALL_CPUS) {
		handle_sysrq('l');
		show_runnable();
	}
	if (requests & WITNESS_REQUEST_PANIC)
		panic("hmm_witness: the host asked for a panic");
}
