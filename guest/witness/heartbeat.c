// SPDX-License-Identifier: GPL-2.0
/*
 * The heartbeat: proof that ordinary threads of this guest get to run. It is
 * one itself, so that it starves when they do.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/err.h>
#include <linux/jiffies.h>
#include <linux/kthread.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>

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
		gates_beat();
		requests_act(witness_requests());
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
