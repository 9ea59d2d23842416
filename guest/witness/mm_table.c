// SPDX-License-Identifier: GPL-2.0
/*
 * The mirrored address spaces: which mm has which id, and how far its end has
 * come.
 *
 * An mm is never held, and here never looked into: its address is a key, valid
 * until its subscriptions are destroyed. Nearly all is done in probe handlers, so
 * entries are allocated beforehand, and the lock is a raw spinlock. It is held
 * across the reports: they must reach the host in the order of the changes,
 * MM_BEGIN before all else and MM_END after all else of an id.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/delay.h>
#include <linux/errno.h>
#include <linux/hashtable.h>
#include <linux/list.h>
#include <linux/io.h>
#include <linux/mm.h>
#include <linux/rcupdate.h>
#include <linux/sched/signal.h>
#include <linux/spinlock.h>
#include <linux/string.h>

#include "hmm_vgpu_regs.h"
#include "witness.h"

/* Address spaces that can be mirrored at once. */
#define MAX_MMS 4096

/**
 * enum mm_state - how far the end of an address space has come
 * @MM_LIVE: not at all
 * @MM_RELEASED: the release notifiers have been called
 * @MM_UNMAPPED: exit's full-range UNMAP has started, or there was nothing to unmap
 */
enum mm_state {
	MM_LIVE,
	MM_RELEASED,
	MM_UNMAPPED,
};

/**
 * struct mirrored_mm - a mirrored address space
 * @node: in the hash, or in the list of free entries
 * @mm: its address
 * @id: its id
 * @state: how far its end has come
 * @judged: a context is known to mirror it, so that the host can judge
 * @present: by sort, how many notifiers have been added and not removed
 * @leaving: by sort, how many removals have begun and are not over
 * @put: list notifiers that are called no more, and are to be freed
 */
struct mirrored_mm {
	struct hlist_node node;
	const struct mm_struct *mm;
	u64 id;
	enum mm_state state;
	bool judged;
	u32 present[WITNESS_NOTIFIERS];
	u32 leaving[WITNESS_NOTIFIERS];
	u32 put;
};

static DEFINE_RAW_SPINLOCK(table_lock);
static DEFINE_HASHTABLE(table, 8);
static HLIST_HEAD(unused);
static struct mirrored_mm *entries;
/* Never starts again, even if the device is unplugged and comes back. */
static u64 last_id;
/* Moments lost for want of an entry, or found to have been lost. */
static u64 missed;

static struct mirrored_mm *find(const struct mm_struct *mm)
{
	struct mirrored_mm *entry;

	lockdep_assert_held(&table_lock);
	hash_for_each_possible(table, entry, node, (unsigned long)mm) {
		if (entry->mm == mm)
			return entry;
	}
	return NULL;
}

static void drop(struct mirrored_mm *entry)
{
	hash_del(&entry->node);
	hlist_add_head(&entry->node, &unused);
}

static struct mirrored_mm *begin(const struct mm_struct *mm,
				 enum witness_notifier sort)
{
	struct mirrored_mm *entry;

	if (hlist_empty(&unused)) {
		missed++;
		return NULL;
	}
	entry = hlist_entry(unused.first, struct mirrored_mm, node);
	hlist_del(&entry->node);
	memset(entry, 0, sizeof(*entry));
	entry->mm = mm;
	entry->id = ++last_id;
	hash_add(table, &entry->node, (unsigned long)mm);
	/* Whoever inserts the notifier holds the mm, and so its tables. */
	witness_report(WITNESS_REC_MM_BEGIN, entry->id, sort, __pa(mm->pgd),
		       0, 0);
	return entry;
}

static void report_removed(struct mirrored_mm *entry,
			   enum witness_notifier sort)
{
	entry->leaving[sort]--;
	/* It is zero for a notifier from before the witness was loaded. */
	if (entry->present[sort])
		entry->present[sort]--;
	witness_report(WITNESS_REC_NOTIFIER_REMOVED, entry->id, sort, 0, 0, 0);
}

/**
 * mm_table_open - allocate the table
 *
 * Return: 0 or -ENOMEM.
 */
int mm_table_open(void)
{
	unsigned int i;

	entries = kvcalloc(MAX_MMS, sizeof(*entries), GFP_KERNEL);
	if (!entries)
		return -ENOMEM;
	hash_init(table);
	INIT_HLIST_HEAD(&unused);
	for (i = 0; i < MAX_MMS; i++)
		hlist_add_head(&entries[i].node, &unused);
	return 0;
}

/**
 * mm_table_close - free the table
 *
 * No probe runs any more.
 */
void mm_table_close(void)
{
	kvfree(entries);
	entries = NULL;
}

/**
 * mm_table_has - does an mm have an id?
 * @mm: the mm
 */
bool mm_table_has(const struct mm_struct *mm)
{
	unsigned long flags;
	bool has;

	raw_spin_lock_irqsave(&table_lock, flags);
	has = find(mm);
	raw_spin_unlock_irqrestore(&table_lock, flags);
	return has;
}

/**
 * mm_table_added - the running task has inserted a notifier
 * @mm: into this mm; its id begins if it had none
 * @sort: which sort
 */
void mm_table_added(const struct mm_struct *mm, enum witness_notifier sort)
{
	struct mirrored_mm *entry;
	unsigned long flags;

	raw_spin_lock_irqsave(&table_lock, flags);
	entry = find(mm);
	if (entry && entry->state != MM_LIVE) {
		/*
		 * Nothing can be inserted any more once release has run: this
		 * is another mm at the same address, and the end of the one
		 * before it was not seen.
		 */
		missed++;
		drop(entry);
		entry = NULL;
	}
	if (!entry)
		entry = begin(mm, sort);
	if (entry) {
		entry->present[sort]++;
		witness_report(WITNESS_REC_NOTIFIER_ADDED, entry->id, sort,
			       0, 0, 0);
	}
	raw_spin_unlock_irqrestore(&table_lock, flags);
}

/**
 * mm_table_removing - the removal of a notifier begins
 * @mm: from this mm
 * @sort: which sort
 *
 * Return: the mm's id, to be given to mm_table_removed(), or 0.
 */
u64 mm_table_removing(const struct mm_struct *mm, enum witness_notifier sort)
{
	struct mirrored_mm *entry;
	unsigned long flags;
	u64 id = 0;

	raw_spin_lock_irqsave(&table_lock, flags);
	entry = find(mm);
	if (entry) {
		entry->leaving[sort]++;
		id = entry->id;
	}
	raw_spin_unlock_irqrestore(&table_lock, flags);
	return id;
}

/**
 * mm_table_removed - the removal of a notifier is over
 * @mm: from this mm, which may be gone
 * @id: what mm_table_removing() returned
 * @sort: which sort
 */
void mm_table_removed(const struct mm_struct *mm, u64 id,
		      enum witness_notifier sort)
{
	struct mirrored_mm *entry;
	unsigned long flags;

	raw_spin_lock_irqsave(&table_lock, flags);
	entry = find(mm);
	/* Else the removal was reported by mm_table_end(). */
	if (entry && entry->id == id && entry->leaving[sort])
		report_removed(entry, sort);
	raw_spin_unlock_irqrestore(&table_lock, flags);
}

/**
 * mm_table_put - a list notifier is called no more, and will be freed
 * @mm: from this mm
 */
void mm_table_put(const struct mm_struct *mm)
{
	struct mirrored_mm *entry;
	unsigned long flags;

	raw_spin_lock_irqsave(&table_lock, flags);
	entry = find(mm);
	if (entry)
		entry->put++;
	raw_spin_unlock_irqrestore(&table_lock, flags);
}

/**
 * mm_table_freed - what mm_table_put() spoke of has been freed
 * @mm: from this mm, which may be gone
 * @id: its id then
 */
void mm_table_freed(const struct mm_struct *mm, u64 id)
{
	struct mirrored_mm *entry;
	unsigned long flags;

	raw_spin_lock_irqsave(&table_lock, flags);
	entry = find(mm);
	if (entry && entry->id == id && entry->put)
		entry->put--;
	raw_spin_unlock_irqrestore(&table_lock, flags);
}

/**
 * mm_table_leaving - may a notifier not be called any more that is still counted?
 * @mm: of this mm
 */
bool mm_table_leaving(const struct mm_struct *mm)
{
	struct mirrored_mm *entry;
	unsigned long flags;
	bool leaving;

	raw_spin_lock_irqsave(&table_lock, flags);
	entry = find(mm);
	leaving = entry && (entry->leaving[WITNESS_LIST] ||
			    entry->leaving[WITNESS_INTERVAL] || entry->put);
	raw_spin_unlock_irqrestore(&table_lock, flags);
	return leaving;
}

/**
 * mm_table_released - the release notifiers have been called
 * @mm: for this mm
 * @empty: nothing is mapped in it, so that no UNMAP will follow
 */
void mm_table_released(const struct mm_struct *mm, bool empty)
{
	struct mirrored_mm *entry;
	unsigned long flags;

	raw_spin_lock_irqsave(&table_lock, flags);
	entry = find(mm);
	if (entry && entry->state == MM_LIVE) {
		entry->state = empty ? MM_UNMAPPED : MM_RELEASED;
		witness_report(WITNESS_REC_MM_RELEASED, entry->id, 0, 0, 0, 0);
	}
	raw_spin_unlock_irqrestore(&table_lock, flags);
}

/**
 * mm_table_awaits_unmap - is exit's full-range UNMAP what comes next?
 * @mm: the mm
 */
bool mm_table_awaits_unmap(const struct mm_struct *mm)
{
	struct mirrored_mm *entry;
	unsigned long flags;
	bool awaits;

	raw_spin_lock_irqsave(&table_lock, flags);
	entry = find(mm);
	awaits = entry && entry->state == MM_RELEASED;
	raw_spin_unlock_irqrestore(&table_lock, flags);
	return awaits;
}

/**
 * mm_table_unmapped - the start of exit's full-range UNMAP is over
 * @mm: the mm
 */
void mm_table_unmapped(const struct mm_struct *mm)
{
	struct mirrored_mm *entry;
	unsigned long flags;

	raw_spin_lock_irqsave(&table_lock, flags);
	entry = find(mm);
	if (entry && entry->state == MM_RELEASED) {
		entry->state = MM_UNMAPPED;
		witness_report(WITNESS_REC_MM_UNMAPPED, entry->id, 0, 0, 0, 0);
	}
	raw_spin_unlock_irqrestore(&table_lock, flags);
}

/**
 * mm_table_end - the subscriptions are being destroyed: the id ends
 * @mm: the mm
 *
 * The last removal drops the mm, and so can get here before it has returned.
 * It is over all the same, since dropping is the last thing it does.
 *
 * Not every miss is counted where it happens (the function graph tracer counts
 * none), but an end that lacks what must come before it gives it away.
 */
void mm_table_end(const struct mm_struct *mm)
{
	struct mirrored_mm *entry;
	unsigned long flags;
	unsigned int sort;

	raw_spin_lock_irqsave(&table_lock, flags);
	entry = find(mm);
	if (entry) {
		for (sort = WITNESS_LIST; sort < WITNESS_NOTIFIERS; sort++) {
			while (entry->leaving[sort])
				report_removed(entry, sort);
			missed += entry->present[sort];
		}
		if (entry->state != MM_UNMAPPED)
			missed++;
		witness_report(WITNESS_REC_MM_END, entry->id, 0, 0, 0, 0);
		drop(entry);
	}
	raw_spin_unlock_irqrestore(&table_lock, flags);
}

/**
 * mm_table_associate - report which context mirrors the running task
 * @mm: the running task's mm
 * @ctx: the context's handle
 *
 * Return: 0, or -ESRCH if the mm has no id.
 */
int mm_table_associate(const struct mm_struct *mm, u64 ctx)
{
	struct mirrored_mm *entry;
	unsigned long flags;

	raw_spin_lock_irqsave(&table_lock, flags);
	entry = find(mm);
	if (entry) {
		entry->judged = true;
		witness_report(WITNESS_REC_ASSOCIATE, entry->id, ctx, 0, 0, 0);
	}
	raw_spin_unlock_irqrestore(&table_lock, flags);
	return entry ? 0 : -ESRCH;
}

/**
 * mm_table_stable - report what the running task promises of its memory
 * @mm: the running task's mm
 * @kind: WITNESS_REC_STABLE_BEGIN or WITNESS_REC_STABLE_END
 * @start: first address
 * @last: last address
 * @kept: at the end: it was kept
 *
 * Return: 0, or -ESRCH if the mm has no id.
 */
int mm_table_stable(const struct mm_struct *mm, u32 kind, u64 start, u64 last,
		    u64 kept)
{
	struct mirrored_mm *entry;
	unsigned long flags;

	raw_spin_lock_irqsave(&table_lock, flags);
	entry = find(mm);
	if (entry)
		witness_report(kind, entry->id, start, last, kept, 0);
	raw_spin_unlock_irqrestore(&table_lock, flags);
	return entry ? 0 : -ESRCH;
}

/**
 * mm_table_judged - is there anything to judge in an invalidation?
 * @mm: of this mm
 *
 * Each report costs the guest as much as a register access. So only mms are
 * reported of which the host knows a context that mirrors them, and only until
 * their release, which is judged as a whole.
 *
 * Return: its id, or 0.
 */
u64 mm_table_judged(const struct mm_struct *mm)
{
	struct mirrored_mm *entry;
	unsigned long flags;
	u64 id = 0;

	raw_spin_lock_irqsave(&table_lock, flags);
	entry = find(mm);
	if (entry && entry->judged && entry->state == MM_LIVE)
		id = entry->id;
	raw_spin_unlock_irqrestore(&table_lock, flags);
	return id;
}

static bool has_task(const struct mm_struct *mm)
{
	struct task_struct *process, *task;
	bool has = false;

	rcu_read_lock();
	for_each_process_thread(process, task) {
		/* A kernel thread that has borrowed it counts too. */
		if (READ_ONCE(task->mm) == mm)
			has = true;
	}
	rcu_read_unlock();
	return has;
}

static bool find_stranded(bool report)
{
	struct mirrored_mm *entry;
	unsigned long flags;
	bool any = false;
	int bucket;

	raw_spin_lock_irqsave(&table_lock, flags);
	hash_for_each(table, bucket, entry, node) {
		if (entry->state != MM_LIVE || has_task(entry->mm))
			continue;
		any = true;
		if (report)
			witness_report(WITNESS_REC_MM_STRANDED, entry->id,
				       0, 0, 0, 0);
	}
	raw_spin_unlock_irqrestore(&table_lock, flags);
	return any;
}

/**
 * mm_table_report_stranded - report mms that nobody uses and nobody releases
 *
 * A task lets go of its mm a little before it drops its reference, and the last
 * one may be dropped by a worker: so it waits a second for them. The probes
 * still run. Context: may sleep.
 */
void mm_table_report_stranded(void)
{
	unsigned int i;

	for (i = 0; i < 10; i++) {
		if (!find_stranded(false))
			return;
		msleep(100);
	}
	find_stranded(true);
}

/**
 * mm_table_missed - moments that the table has lost
 */
u64 mm_table_missed(void)
{
	return READ_ONCE(missed);
}
