// SPDX-License-Identifier: GPL-2.0
/*
 * The moments the witness reports, and the functions of the mmu_notifier core
 * that they are the entries and returns of.
 *
 * Not notifiers of the witness's own: those are called in an order of their
 * own, and say nothing about what the others have returned.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/kernel.h>
#include <linux/mm_types.h>
#include <linux/mmu_notifier.h>

#include "probe.h"
#include "witness.h"

static bool started;
/* Missed by probes that are unregistered by now. */
static u64 missed_before;

static bool register_entry(struct witness_call *call, unsigned long subscription,
			   unsigned long mm)
{
	/*
	 * Without a subscription this is mmu_interval_notifier_insert*(), which
	 * prepares the mm for interval notifiers and reports for itself.
	 */
	if (!READ_ONCE(started) || !subscription)
		return false;
	call->mm = (const struct mm_struct *)mm;
	return true;
}

static void register_exit(struct witness_call *call, unsigned long result)
{
	if (!(int)result)
		mm_table_added(call->mm, WITNESS_LIST);
}

static bool insert_entry(struct witness_call *call, unsigned long subscription,
			 unsigned long mm)
{
	if (!READ_ONCE(started))
		return false;
	call->mm = (const struct mm_struct *)mm;
	return true;
}

static void insert_exit(struct witness_call *call, unsigned long result)
{
	if (!(int)result)
		mm_table_added(call->mm, WITNESS_INTERVAL);
}

static bool removal_begins(struct witness_call *call, const struct mm_struct *mm,
			   enum witness_notifier sort)
{
	if (!READ_ONCE(started))
		return false;
	call->mm = mm;
	call->id = mm_table_removing(mm, sort);
	return call->id;
}

static bool remove_entry(struct witness_call *call, unsigned long subscription,
			 unsigned long unused)
{
	const struct mmu_interval_notifier *interval_sub =
		(const struct mmu_interval_notifier *)subscription;

	return removal_begins(call, interval_sub->mm, WITNESS_INTERVAL);
}

static void remove_exit(struct witness_call *call, unsigned long result)
{
	mm_table_removed(call->mm, call->id, WITNESS_INTERVAL);
}

static bool unregister_entry(struct witness_call *call,
			     unsigned long subscription, unsigned long mm)
{
	return removal_begins(call, (const struct mm_struct *)mm, WITNESS_LIST);
}

static void unregister_exit(struct witness_call *call, unsigned long result)
{
	mm_table_removed(call->mm, call->id, WITNESS_LIST);
}

/*
 * mmu_notifier_put() only drops a reference, and leaves callbacks running. The
 * last one takes the notifier off the list, so that it is called no more; it is
 * removed when it is freed, after SRCU's grace period. Whether it is the last one
 * is not certain before its lock is taken: then a removal is seen where there is
 * none, and what would be judged at once is judged later.
 */
static bool put_entry(struct witness_call *call, unsigned long subscription,
		      unsigned long unused)
{
	const struct mmu_notifier *list_sub =
		(const struct mmu_notifier *)subscription;

	if (READ_ONCE(started) && READ_ONCE(list_sub->users) == 1)
		mm_table_put(list_sub->mm);
	return false;
}

static bool free_entry(struct witness_call *call, unsigned long head,
		       unsigned long unused)
{
	const struct mmu_notifier *subscription =
		container_of((struct rcu_head *)head, struct mmu_notifier, rcu);

	return removal_begins(call, subscription->mm, WITNESS_LIST);
}

static void free_exit(struct witness_call *call, unsigned long result)
{
	mm_table_freed(call->mm, call->id);
	mm_table_removed(call->mm, call->id, WITNESS_LIST);
}

static bool release_entry(struct witness_call *call, unsigned long mm,
			  unsigned long unused)
{
	call->mm = (const struct mm_struct *)mm;
	/* Its last user is at its end: nobody maps anything in it any more. */
	call->empty = !READ_ONCE(call->mm->map_count);
	return READ_ONCE(started) && mm_table_has(call->mm);
}

static void release_exit(struct witness_call *call, unsigned long result)
{
	mm_table_released(call->mm, call->empty);
}

/*
 * exit_mmap() unmaps 0 to ULONG_MAX at once, so in 6.1, 6.12 and 7.3, and nothing
 * else does. (The OOM reaper, which can come after release too, goes VMA by VMA.)
 */
static bool exit_unmaps(const struct mmu_notifier_range *range)
{
	return range->event == MMU_NOTIFY_UNMAP && !range->start &&
	       range->end == ULONG_MAX;
}

static bool start_entry(struct witness_call *call, unsigned long arg,
			unsigned long unused)
{
	const struct mmu_notifier_range *range =
		(const struct mmu_notifier_range *)arg;

	if (!READ_ONCE(started))
		return false;
	call->mm = range->mm;
	if (exit_unmaps(range)) {
		call->range = NULL;
		return mm_table_awaits_unmap(call->mm);
	}
	call->range = range;
	call->id = mm_table_judged(call->mm);
	return call->id;
}

static void start_exit(struct witness_call *call, unsigned long result)
{
	/* Refused: what could not be done without sleeping is not done at all. */
	if ((int)result)
		return;
	if (call->range)
		range_started(call->id, call->range);
	else
		mm_table_unmapped(call->mm);
}

static bool end_entry(struct witness_call *call, unsigned long arg,
		      unsigned long unused)
{
	if (READ_ONCE(started))
		range_ended((const struct mmu_notifier_range *)arg);
	return false;
}

static bool destroy_entry(struct witness_call *call, unsigned long mm,
			  unsigned long unused)
{
	if (READ_ONCE(started))
		mm_table_end((const struct mm_struct *)mm);
	return false;
}

static void no_exit(struct witness_call *call, unsigned long result)
{
}

/* Every kernel from 6.1 to 7.3 has all of them. */
static struct witness_probe probes[] = {
	{ "__mmu_notifier_register", register_entry, register_exit },
	{ "mmu_interval_notifier_insert", insert_entry, insert_exit },
	{ "mmu_interval_notifier_insert_locked", insert_entry, insert_exit },
	{ "mmu_interval_notifier_remove", remove_entry, remove_exit },
	{ "mmu_notifier_unregister", unregister_entry, unregister_exit },
	{ "mmu_notifier_put", put_entry, no_exit },
	{ "mmu_notifier_free_rcu", free_entry, free_exit },
	{ "__mmu_notifier_release", release_entry, release_exit },
	{ "__mmu_notifier_invalidate_range_start", start_entry, start_exit },
	{ "__mmu_notifier_invalidate_range_end", end_entry, no_exit },
	{ "__mmu_notifier_subscriptions_destroy", destroy_entry, no_exit },
};

/**
 * moments_register - register the probes; they report nothing yet
 *
 * Return: 0, or the error of the first that could not be registered.
 */
int moments_register(void)
{
	unsigned int i;
	int ret;

	for (i = 0; i < ARRAY_SIZE(probes); i++) {
		ret = witness_probe_register(&probes[i]);
		if (ret) {
			moments_unregister();
			return ret;
		}
	}
	ret = pgmap_register();
	if (!ret)
		ret = dma_register();
	if (ret)
		moments_unregister();
	return ret;
}

/**
 * moments_start - let the probes report
 */
void moments_start(void)
{
	WRITE_ONCE(started, true);
	pgmap_start();
	dma_start();
}

/**
 * moments_unregister - unregister the probes
 *
 * When it returns, none runs nor will run.
 */
void moments_unregister(void)
{
	unsigned int i;

	WRITE_ONCE(started, false);
	dma_unregister();
	pgmap_unregister();
	for (i = 0; i < ARRAY_SIZE(probes); i++)
		missed_before += witness_probe_unregister(&probes[i]);
}

/**
 * moments_missed - moments that may have gone by without a report
 */
u64 moments_missed(void)
{
	u64 missed = missed_before + mm_table_missed() + ranges_missed() +
		     pgmap_missed() + dma_missed();
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(probes); i++)
		missed += witness_probe_missed(&probes[i]);
	return missed;
}
