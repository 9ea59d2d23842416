/* SPDX-License-Identifier: GPL-2.0 */
/* Who holds and who waits for the locks that a hang would be about. */
#ifndef HMM_VGPU_LOCK_BOOK_H
#define HMM_VGPU_LOCK_BOOK_H

#include <linux/list.h>
#include <linux/sched.h>
#include <linux/types.h>

struct mutex;

/**
 * struct lock_use - one task's use of one lock, on its stack
 * @link: in the book
 * @kind: what sort of lock
 * @id: which one of the sort
 * @mode: "read", "write" or "exclusive"
 * @mutex: the lock, if it is a mutex: its owner may be one that keeps no book
 * @waits: not got yet
 * @since: when the waiting or the holding began, ktime_get_ns()
 * @pid: of the task
 * @comm: of the task
 */
struct lock_use {
	struct list_head link;
	const char *kind;
	u64 id;
	const char *mode;
	const struct mutex *mutex;
	bool waits;
	u64 since;
	pid_t pid;
	char comm[TASK_COMM_LEN];
};

void lock_book_wants(struct lock_use *use, const char *kind, u64 id, const char *mode,
		     const struct mutex *mutex);
void lock_book_has(struct lock_use *use);
void lock_book_done(struct lock_use *use);
void hmm_lock_report(void);

#endif
