// SPDX-License-Identifier: GPL-2.0
/*
 * The heartbeat: proof that ordinary threads of this guest get to run. It is
 * one itself, so that it starves when they do.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/err.h>
#include <linux/fs.h>
#include <linux/jiffies.h>
#include <linux/kernel.h>
#include <linux/kthread.h>
#include <linux/panic.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/sysrq.h>

#include "hmm_vgpu_regs.h"
#include "witness.h"

#define PERIOD (HZ / 10)

static struct task_struct *thread;

static u64 blocked_tasks(void)
{
	struct task_struct *process, *task;
	u64 blocked = 0;

	rcu_read_lock();
	for_each_process_thread(process, task) {
		unsigned int state = READ_ONCE(task->__state);

		/* Without idle kernel threads, as in the load average. */
		if ((state & TASK_UNINTERRUPTIBLE) && !(state & TASK_NOLOAD))
			blocked++;
	}
	rcu_read_unlock();
	return blocked;
}

/*
 * handle_sysrq() obeys the mask of allowed keys, and distributions leave the
 * dumps out of it. The way from a module to that mask is its sysctl.
 */
static void allow_dumps(void)
{
	struct file *file;
	loff_t pos = 0;
	ssize_t done;

	if (!IS_ENABLED(CONFIG_MAGIC_SYSRQ)) {
		pr_warn_once("the host asks for a dump, but this kernel lacks CONFIG_MAGIC_SYSRQ\n");
		return;
	}
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
		pr_warn("cannot allow sysrq dumps: error %zd; boot with sysrq_always_enabled\n",
			done);
}

static void act(u32 requests)
{
	if (requests & (WITNESS_REQUEST_BLOCKED_TASKS |
			WITNESS_REQUEST_ALL_CPUS))
		allow_dumps();
	if (requests & WITNESS_REQUEST_BLOCKED_TASKS)
		handle_sysrq('w');
	if (requests & WITNESS_REQUEST_ALL_CPUS)
		handle_sysrq('l');
	if (requests & WITNESS_REQUEST_PANIC)
		panic("hmm_witness: the host asked for a panic");
}

static int heartbeat(void *unused)
{
	u64 count = 0;

	for (;;) {
		set_current_state(TASK_INTERRUPTIBLE);
		if (kthread_should_stop())
			break;
		schedule_timeout(PERIOD);
		if (kthread_should_stop())
			break;
		witness_report(WITNESS_REC_HEARTBEAT, 0, ++count,
			       moments_missed(), blocked_tasks(), 0);
		act(witness_requests());
	}
	__set_current_state(TASK_RUNNING);
	return 0;
}

/**
 * heartbeat_start - start the thread
 *
 * Return: 0 or a negative error.
 */
int heartbeat_start(void)
{
	thread = kthread_run(heartbeat, NULL, "hmm_witness");
	if (IS_ERR(thread))
		return PTR_ERR(thread);
	return 0;
}

/**
 * heartbeat_stop - stop the thread
 */
void heartbeat_stop(void)
{
	kthread_stop(thread);
}
