// SPDX-License-Identifier: GPL-2.0
/*
 * The mirror layer: see mirror_layer.h for what it promises and asks.
 *
 * One struct hmm_mm for each address space. hmm_range_fault() wants an interval
 * notifier, and a list notifier that may refuse an invalidation must not have an
 * end callback: so a list notifier carries release only, and one interval
 * notifier over everything carries the invalidations. It passes RELEASE over,
 * for the list notifier comes right after it.
 *
 * The policies are the sides of one argument: how release walks the list, and
 * what unregister waits for.
 *
 *	drop-lock	release takes a mirror off the list, drops mirrors_sem and
 *			calls it. Unregister finds the mirror off the list, and
 *			does not wait for the call
 *	read-held	release calls all with mirrors_sem held for read. Unregister
 *			waits for that
 *	srcu		both callbacks run under SRCU, unregister waits for a
 *			grace period
 *	srcu-nowait	the same without that wait
 */
#include <linux/err.h>
#include <linux/minmax.h>
#include <linux/poison.h>
#include <linux/rculist.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include <linux/string.h>

#include "hmm_gate.h"
#include "lock_book.h"
#include "mirror_layer.h"

/**
 * struct hmm_policy - how the list of mirrors is walked and changed
 * @name: as the module's parameter has it
 * @srcu: readers are under SRCU, and not under mirrors_sem
 * @drop: release drops mirrors_sem around each callback
 * @wait: unregister waits for readers under SRCU
 */
struct hmm_policy {
	const char *name;
	bool srcu;
	bool drop;
	bool wait;
};

/* In the order of HMM_VGPU_POLICY_*. */
static const struct hmm_policy hmm_policies[] = {
	{ .name = "drop-lock", .drop = true },
	{ .name = "read-held" },
	{ .name = "srcu", .srcu = true, .wait = true },
	{ .name = "srcu-nowait", .srcu = true },
};

static const struct hmm_policy *hmm_policy;
/* What is left of a struct hmm_mm that SRCU's callback may not free. */
static struct workqueue_struct *hmm_free_wq;
static atomic64_t hmm_ids;

struct hmm_mirror_counts hmm_mirror_counts;

/* drop-lock: a mirror is off the list, and nothing keeps it from being freed. */
HMM_GATE_DEFINE(release_unlocked);
/* The other policies: release is about to call a mirror. */
HMM_GATE_DEFINE(release_locked);
/* Unregister holds mirrors_sem for write. */
HMM_GATE_DEFINE(unregister_locked);

/* Both have no other caller, and names that a scenario waits for. */
static noinline __noclone void hmm_mirrors_down_write(struct hmm_mm *hmm)
{
	down_write(&hmm->mirrors_sem);
}

static noinline __noclone void hmm_mirrors_down_read(struct hmm_mm *hmm)
{
	down_read(&hmm->mirrors_sem);
}

static noinline __noclone void hmm_mirrors_synchronize(struct hmm_mm *hmm)
{
	synchronize_srcu(&hmm->srcu);
}

static void hmm_write_begin(struct hmm_mm *hmm, struct lock_use *use)
{
	lock_book_wants(use, "mirrors_sem", hmm->id, "write", NULL);
	hmm_mirrors_down_write(hmm);
	lock_book_has(use);
}

static void hmm_write_end(struct hmm_mm *hmm, struct lock_use *use)
{
	up_write(&hmm->mirrors_sem);
	lock_book_done(use);
}

/**
 * struct hmm_walk - a reader of the list
 * @use: in the book of locks
 * @index: of SRCU
 */
struct hmm_walk {
	struct lock_use use;
	int index;
};

/* False if it would have to sleep and must not. */
static bool hmm_walk_begin(struct hmm_mm *hmm, struct hmm_walk *walk, bool may_sleep)
{
	if (hmm->policy->srcu) {
		lock_book_wants(&walk->use, "srcu", hmm->id, "read", NULL);
		walk->index = srcu_read_lock(&hmm->srcu);
		lock_book_has(&walk->use);
		return true;
	}
	lock_book_wants(&walk->use, "mirrors_sem", hmm->id, "read", NULL);
	if (may_sleep) {
		hmm_mirrors_down_read(hmm);
	} else if (!down_read_trylock(&hmm->mirrors_sem)) {
		lock_book_done(&walk->use);
		return false;
	}
	lock_book_has(&walk->use);
	return true;
}

static void hmm_walk_end(struct hmm_mm *hmm, struct hmm_walk *walk)
{
	if (hmm->policy->srcu)
		srcu_read_unlock(&hmm->srcu, walk->index);
	else
		up_read(&hmm->mirrors_sem);
	lock_book_done(&walk->use);
}

#define hmm_for_each_mirror(mirror, hmm)					\
	list_for_each_entry_srcu(mirror, &(hmm)->mirrors, link,			\
				 rwsem_is_locked(&(hmm)->mirrors_sem) ||	\
				 srcu_read_lock_held(&(hmm)->srcu))

static bool hmm_ranges_lock(struct hmm_mm *hmm, struct lock_use *use, bool may_sleep)
{
	lock_book_wants(use, "ranges_lock", hmm->id, "exclusive", &hmm->ranges_lock);
	if (may_sleep) {
		mutex_lock(&hmm->ranges_lock);
	} else if (!mutex_trylock(&hmm->ranges_lock)) {
		lock_book_done(use);
		return false;
	}
	lock_book_has(use);
	return true;
}

static void hmm_ranges_unlock(struct hmm_mm *hmm, struct lock_use *use)
{
	mutex_unlock(&hmm->ranges_lock);
	lock_book_done(use);
}

/* Marks the ranges that meet [start, last]. False if it must not sleep. */
static bool hmm_ranges_invalidate(struct hmm_mm *hmm, unsigned long start,
				  unsigned long last, bool may_sleep)
{
	struct hmm_mirror_range *range;
	struct lock_use use;

	if (!hmm_ranges_lock(hmm, &use, may_sleep))
		return false;
	list_for_each_entry(range, &hmm->ranges, link)
		if (range->start <= last && start < range->end)
			WRITE_ONCE(range->valid, false);
	hmm_ranges_unlock(hmm, &use);
	return true;
}

static bool hmm_sync_mirrors(struct hmm_mm *hmm, const struct mmu_notifier_range *range)
{
	bool may_sleep = mmu_notifier_range_blockable(range);
	struct hmm_mirror *mirror;

	if (!hmm_ranges_invalidate(hmm, range->start, range->end - 1, may_sleep))
		return false;
	hmm_for_each_mirror(mirror, hmm)
		if (!mirror->ops->sync(mirror, range))
			return false;
	return true;
}

/*
 * The sequence moves before any mirror is told. A mirror commits under a lock
 * that its sync() takes: what it commits before that, sync() takes away; after
 * it, the sequence is seen to have moved. Two invalidations at a time set the
 * same sequence, and if one is refused, or passes RELEASE over, no harm is done
 * by a sequence that has moved.
 */
static bool hmm_sync(struct mmu_interval_notifier *sync,
		     const struct mmu_notifier_range *range, unsigned long seq)
{
	struct hmm_mm *hmm = container_of(sync, struct hmm_mm, sync);
	struct hmm_walk walk;
	bool done;

	/* hmm_release() comes next, and is the one that is told to drivers. */
	if (range->event == MMU_NOTIFY_RELEASE) {
		mmu_interval_set_seq(sync, seq);
		return true;
	}
	/* Before any filter: a mirror that has no interest is in the list too. */
	done = hmm_walk_begin(hmm, &walk, mmu_notifier_range_blockable(range));
	mmu_interval_set_seq(sync, seq);
	if (done) {
		done = hmm_sync_mirrors(hmm, range);
		hmm_walk_end(hmm, &walk);
	}
	if (!done)
		atomic64_inc(&hmm_mirror_counts.refused);
	return done;
}

static const struct mmu_interval_notifier_ops hmm_sync_ops = {
	.invalidate = hmm_sync,
};

static void hmm_call_release(struct hmm_mirror *mirror)
{
	atomic64_inc(&hmm_mirror_counts.releases);
	if (atomic_inc_return(&mirror->releases) > 1)
		atomic64_inc(&hmm_mirror_counts.releases_again);
	mirror->ops->release(mirror);
}

/* Before the patch: the callback may wait for what needs mirrors_sem. */
static void hmm_release_dropping(struct hmm_mm *hmm)
{
	struct hmm_mirror *mirror;
	struct lock_use use;

	for (;;) {
		hmm_write_begin(hmm, &use);
		mirror = list_first_entry_or_null(&hmm->mirrors, struct hmm_mirror, link);
		if (mirror)
			list_del_init(&mirror->link);
		hmm_write_end(hmm, &use);
		if (!mirror)
			return;
		hmm_gate_release_unlocked();
		hmm_call_release(mirror);
	}
}

static void hmm_release_walking(struct hmm_mm *hmm)
{
	struct hmm_mirror *mirror;
	struct hmm_walk walk;

	hmm_walk_begin(hmm, &walk, true);
	hmm_for_each_mirror(mirror, hmm) {
		hmm_gate_release_locked();
		hmm_call_release(mirror);
	}
	hmm_walk_end(hmm, &walk);
}

static void hmm_release(struct mmu_notifier *list, struct mm_struct *mm)
{
	struct hmm_mm *hmm = container_of(list, struct hmm_mm, list);

	WARN(hmm->released, "the mirror layer's release runs twice for one address space\n");
	hmm->released = true;

	/* Each would hold the users whose end this is. */
	WARN(!list_empty_careful(&hmm->ranges),
	     "a range of the mirror layer outlives its address space\n");
	hmm_ranges_invalidate(hmm, 0, ULONG_MAX, true);

	if (hmm->policy->drop)
		hmm_release_dropping(hmm);
	else
		hmm_release_walking(hmm);
}

/* Under mmap_lock, for writing. */
static struct mmu_notifier *hmm_alloc(struct mm_struct *mm);

static void hmm_free_work(struct work_struct *work)
{
	struct hmm_mm *hmm = container_of(work, struct hmm_mm, free);

	cleanup_srcu_struct(&hmm->srcu);
	kfree(hmm);
}

/* No callback runs any more. Must not sleep. */
static void hmm_free(struct mmu_notifier *list)
{
	struct hmm_mm *hmm = container_of(list, struct hmm_mm, list);

	queue_work(hmm_free_wq, &hmm->free);
}

static const struct mmu_notifier_ops hmm_list_ops = {
	.release = hmm_release,
	.alloc_notifier = hmm_alloc,
	.free_notifier = hmm_free,
};

static struct mmu_notifier *hmm_alloc(struct mm_struct *mm)
{
	struct hmm_mm *hmm = kzalloc(sizeof(*hmm), GFP_KERNEL);

	if (!hmm)
		return ERR_PTR(-ENOMEM);
	if (init_srcu_struct(&hmm->srcu)) {
		kfree(hmm);
		return ERR_PTR(-ENOMEM);
	}
	hmm->policy = hmm_policy;
	hmm->id = atomic64_inc_return(&hmm_ids);
	mutex_init(&hmm->setup);
	init_rwsem(&hmm->mirrors_sem);
	INIT_LIST_HEAD(&hmm->mirrors);
	mutex_init(&hmm->ranges_lock);
	INIT_LIST_HEAD(&hmm->ranges);
	INIT_WORK(&hmm->free, hmm_free_work);
	return &hmm->list;
}

static int hmm_setup_get(struct hmm_mm *hmm, struct mm_struct *mm)
{
	int ret = 0;

	mutex_lock(&hmm->setup);
	if (!hmm->nr_mirrors)
		ret = mmu_interval_notifier_insert(&hmm->sync, mm, 0,
						   ULONG_MAX & PAGE_MASK, &hmm_sync_ops);
	if (!ret)
		hmm->nr_mirrors++;
	mutex_unlock(&hmm->setup);
	return ret;
}

static void hmm_setup_put(struct hmm_mm *hmm)
{
	mutex_lock(&hmm->setup);
	if (!--hmm->nr_mirrors)
		mmu_interval_notifier_remove(&hmm->sync);
	mutex_unlock(&hmm->setup);
}

/**
 * hmm_mirror_register() - follow an address space
 * @mirror: the mirror, with its ops set
 * @mm: the caller's own address space
 *
 * Callbacks may run before it returns.
 * Context: no lock that a callback takes, nor mmap_lock.
 * Return: 0 or an error.
 */
int hmm_mirror_register(struct hmm_mirror *mirror, struct mm_struct *mm)
{
	struct mmu_notifier *list = mmu_notifier_get(&hmm_list_ops, mm);
	struct lock_use use;
	struct hmm_mm *hmm;
	int ret;

	if (IS_ERR(list))
		return PTR_ERR(list);
	hmm = container_of(list, struct hmm_mm, list);
	ret = hmm_setup_get(hmm, mm);
	if (ret) {
		mmu_notifier_put(list);
		return ret;
	}

	mirror->hmm = hmm;
	atomic_set(&mirror->releases, 0);
	hmm_write_begin(hmm, &use);
	list_add_rcu(&mirror->link, &hmm->mirrors);
	hmm_write_end(hmm, &use);
	atomic64_inc(&hmm_mirror_counts.registered);
	return 0;
}

/**
 * hmm_mirror_unregister() - follow it no longer
 * @mirror: the mirror
 *
 * Context: no lock that a callback takes, nor mmap_lock; not from a callback.
 */
noinline __noclone void hmm_mirror_unregister(struct hmm_mirror *mirror)
{
	struct hmm_mm *hmm = mirror->hmm;
	struct lock_use use;

	hmm_write_begin(hmm, &use);
	/* drop-lock's release may have taken it off the list. */
	if (hmm->policy->drop)
		list_del_init(&mirror->link);
	else
		list_del_rcu(&mirror->link);
	hmm_gate_unregister_locked();
	hmm_write_end(hmm, &use);

	if (hmm->policy->wait) {
		lock_book_wants(&use, "srcu", hmm->id, "write", NULL);
		hmm_mirrors_synchronize(hmm);
		lock_book_done(&use);
	}
	hmm_setup_put(hmm);

	/* Who comes late with this mirror is not to find a living address space. */
	memset(&mirror->hmm, POISON_INUSE, sizeof(mirror->hmm));
	atomic64_inc(&hmm_mirror_counts.unregistered);
	mmu_notifier_put(&hmm->list);
}

/**
 * hmm_range_register() - begin to look at addresses
 * @range: filled in
 * @mirror: a mirror of the address space, which stays registered
 * @start: first address
 * @end: behind the last
 *
 * Return: 0, or -ESRCH if the address space has ended.
 */
int hmm_range_register(struct hmm_mirror_range *range, struct hmm_mirror *mirror,
		       unsigned long start, unsigned long end)
{
	struct hmm_mm *hmm = mirror->hmm;
	struct lock_use use;

	if (!mmget_not_zero(hmm->list.mm))
		return -ESRCH;
	*range = (struct hmm_mirror_range) {
		.hmm = hmm,
		.start = start,
		.end = end,
		.held = true,
	};
	hmm_ranges_lock(hmm, &use, true);
	list_add(&range->link, &hmm->ranges);
	hmm_ranges_unlock(hmm, &use);
	return 0;
}

/**
 * hmm_range_let_go() - let the address space's users go before the range
 * @range: the range
 *
 * Against rule 5. It is here so that a scenario can show what comes of it.
 */
void hmm_range_let_go(struct hmm_mirror_range *range)
{
	if (range->held)
		mmput_async(range->hmm->list.mm);
	range->held = false;
}

/**
 * hmm_range_begin() - look from here on
 * @range: the range
 *
 * Waits for invalidations under way. Context: not under mmap_lock.
 * Return: the sequence for hmm_range_fault() and hmm_range_retry().
 */
unsigned long hmm_range_begin(struct hmm_mirror_range *range)
{
	/*
	 * An invalidation that has marked the range before is waited for next;
	 * one that marks it from here on is meant.
	 */
	WRITE_ONCE(range->valid, true);
	return mmu_interval_read_begin(&range->hmm->sync);
}

/**
 * hmm_range_retry() - whether what was found may not be mapped
 * @range: the range
 * @seq: from hmm_range_begin()
 *
 * Context: a lock that the mirror's sync() takes.
 */
bool hmm_range_retry(struct hmm_mirror_range *range, unsigned long seq)
{
	return mmu_interval_read_retry(&range->hmm->sync, seq) || !READ_ONCE(range->valid);
}

/**
 * hmm_range_unregister() - end to look at addresses
 * @range: the range
 *
 * The address space may end here; not before this thread has gone on.
 */
void hmm_range_unregister(struct hmm_mirror_range *range)
{
	struct hmm_mm *hmm = range->hmm;
	struct lock_use use;

	hmm_ranges_lock(hmm, &use, true);
	list_del_init(&range->link);
	hmm_ranges_unlock(hmm, &use);
	hmm_range_let_go(range);
	memset(&range->hmm, POISON_INUSE, sizeof(range->hmm));
}

/**
 * hmm_layer_policy() - which policy is in force, as HMM_VGPU_POLICY_*
 */
int hmm_layer_policy(void)
{
	return 1 + (hmm_policy - hmm_policies);
}

/**
 * hmm_layer_init() - make the layer ready
 * @policy: name of its policy
 *
 * Return: 0, or -EINVAL if there is no such policy, or -ENOMEM.
 */
int hmm_layer_init(const char *policy)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(hmm_policies); i++)
		if (!strcmp(hmm_policies[i].name, policy))
			hmm_policy = &hmm_policies[i];
	if (!hmm_policy)
		return -EINVAL;
	hmm_free_wq = alloc_workqueue("hmm_vgpu_free", WQ_UNBOUND, 0);
	return hmm_free_wq ? 0 : -ENOMEM;
}

/**
 * hmm_layer_exit() - wait until nothing of the layer is left
 *
 * No mirror is registered any more.
 */
void hmm_layer_exit(void)
{
	/* The last hmm_free() of ours has run when this returns. */
	mmu_notifier_synchronize();
	destroy_workqueue(hmm_free_wq);
}
