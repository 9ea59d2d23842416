// SPDX-License-Identifier: GPL-2.0
/*
 * A book of locks, for kernels without lockdep: who holds mirrors_sem, a device
 * lock, a list of ranges, who waits for it, since when. It is read out when the
 * guest looks hung (the witness calls hmm_lock_report()), or by writing to the
 * module's parameter show_locks.
 *
 * Only the mirror backend keeps it. Its own lock is innermost of all, and
 * nothing is printed under it.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/export.h>
#include <linux/ktime.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/mutex.h>
#include <linux/pid.h>
#include <linux/printk.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/spinlock.h>

#include "lock_book.h"

static DEFINE_SPINLOCK(book_lock);
static LIST_HEAD(book);

/**
 * lock_book_wants() - the running task is about to wait for a lock
 * @use: filled in; stays in the book until lock_book_done()
 * @kind: what sort of lock; a literal
 * @id: which one of the sort
 * @mode: "read", "write" or "exclusive"; a literal
 * @mutex: the lock if it is a mutex, or NULL
 */
void lock_book_wants(struct lock_use *use, const char *kind, u64 id, const char *mode,
		     const struct mutex *mutex)
{
	use->kind = kind;
	use->id = id;
	use->mode = mode;
	use->mutex = mutex;
	use->waits = true;
	use->since = ktime_get_ns();
	use->pid = task_pid_nr(current);
	get_task_comm(use->comm, current);

	spin_lock(&book_lock);
	list_add_tail(&use->link, &book);
	spin_unlock(&book_lock);
}

/**
 * lock_book_has() - it has got it
 * @use: as given to lock_book_wants()
 */
void lock_book_has(struct lock_use *use)
{
	spin_lock(&book_lock);
	use->waits = false;
	use->since = ktime_get_ns();
	spin_unlock(&book_lock);
}

/**
 * lock_book_done() - it has let it go, or given up waiting
 * @use: as given to lock_book_wants()
 */
void lock_book_done(struct lock_use *use)
{
	spin_lock(&book_lock);
	list_del(&use->link);
	spin_unlock(&book_lock);
}

static bool book_holds(const struct lock_use *wanted)
{
	const struct lock_use *use;

	lockdep_assert_held(&book_lock);

	list_for_each_entry(use, &book, link)
		if (!use->waits && use->kind == wanted->kind && use->id == wanted->id)
			return true;
	return false;
}

/* Who holds a mutex that somebody waits for, if whoever it is keeps no book. */
static bool book_owner(const struct lock_use *wanted, struct lock_use *owner)
{
	bool found = false;

	lockdep_assert_held(&book_lock);

#ifndef CONFIG_PREEMPT_RT
	if (wanted->waits && wanted->mutex && !book_holds(wanted)) {
		/* The waiter keeps the mutex, and the mutex its owner. */
		unsigned long word = atomic_long_read(&wanted->mutex->owner);
		struct task_struct *task = (struct task_struct *)(word & ~7UL);

		rcu_read_lock();
		if (task) {
			*owner = *wanted;
			owner->waits = false;
			owner->since = 0;
			owner->pid = task_pid_nr(task);
			get_task_comm(owner->comm, task);
			found = true;
		}
		rcu_read_unlock();
	}
#endif
	return found;
}

/* The nth entry, and the owner of what it waits for if nobody in the book is. */
static bool book_entry(unsigned int n, struct lock_use *entry, struct lock_use *owner,
		       bool *owned)
{
	const struct lock_use *use;
	bool found = false;

	spin_lock(&book_lock);
	list_for_each_entry(use, &book, link) {
		if (n--)
			continue;
		*entry = *use;
		*owned = book_owner(use, owner);
		found = true;
		break;
	}
	spin_unlock(&book_lock);
	return found;
}

static void book_print(const struct lock_use *use)
{
	pr_info("hmm_lock: %s/%d %s %s:%llu (%s) since %llu\n", use->comm, use->pid,
		use->waits ? "waits for" : "holds", use->kind, use->id, use->mode,
		use->since);
}

/**
 * hmm_lock_report() - print who holds and who waits, a line each
 *
 * Context: any that may take a spinlock. An owner that was not in the book has
 * the time 0: not known.
 */
void hmm_lock_report(void)
{
	struct lock_use entry, owner;
	unsigned int n = 0;
	bool owned;

	while (book_entry(n, &entry, &owner, &owned)) {
		book_print(&entry);
		if (owned)
			book_print(&owner);
		n++;
	}
	if (!n)
		pr_info("hmm_lock: none\n");
}
EXPORT_SYMBOL_GPL(hmm_lock_report);

static int book_show(const char *value, const struct kernel_param *param)
{
	hmm_lock_report();
	return 0;
}

static const struct kernel_param_ops book_ops = {
	.set = book_show,
};
module_param_cb(show_locks, &book_ops, NULL, 0200);
MODULE_PARM_DESC(show_locks, "write anything: the locks of the mirror backend are printed to the log");
