/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The mirror layer: what a driver registers with to follow an address space, in
 * the way that mm/hmm.c once had it. Built on today's mmu notifiers.
 *
 * Its rules:
 *
 * 1. release() runs once for a mirror at the most, when the address space ends,
 *    and once for each struct hmm_mm. A mirror unregistered before has none.
 * 2. After hmm_mirror_unregister() no callback runs or will run, and the mirror
 *    may be freed. (What the policies drop-lock and srcu-nowait make of this is
 *    what docs/seed.md is about.)
 * 3. No register or unregister from within a callback. drop-lock alone lets
 *    release() unregister.
 * 4. sync() returns when the device does not use the range any more. It may take
 *    a lock of the driver's only to change what the device has: whoever holds
 *    that lock must not get into a notifier, allocate, or wait for who may.
 *    It returns false only if it would have to sleep and must not.
 * 5. A registered range holds the address space's users: release comes after.
 *    A range marked invalid, or whose sequence has moved, is not mapped from.
 *
 * Lock order, outermost first:
 *
 *	mmap_lock		hmm_mirror_register() takes it itself
 *	hmm_mm.setup		whether the interval notifier is there
 *	-- reclaim and the callbacks come in here --
 *	hmm_mm.mirrors_sem	list of mirrors; or hmm_mm.srcu for who walks it
 *	the driver's own	what sync() and release() take
 *	hmm_mm.ranges_lock	list of ranges; nothing is taken under it
 */
#ifndef HMM_VGPU_MIRROR_LAYER_H
#define HMM_VGPU_MIRROR_LAYER_H

#include <linux/atomic.h>
#include <linux/list.h>
#include <linux/mmu_notifier.h>
#include <linux/mutex.h>
#include <linux/rwsem.h>
#include <linux/srcu.h>
#include <linux/types.h>
#include <linux/workqueue.h>

struct hmm_mirror;
struct hmm_policy;

/**
 * struct hmm_mm - an address space that is mirrored
 * @list: carries release. Its count of users is this structure's reference
 *	count: each mirror holds one, through mmu_notifier_get()
 * @sync: over the whole address space; carries everything else
 * @policy: how the list of mirrors is walked and changed
 * @id: number of it, for people
 * @setup: @nr_mirrors, and whether @sync is inserted
 * @nr_mirrors: mirrors registered, on the list or not
 * @mirrors_sem: writers of @mirrors, and under two policies its readers
 * @srcu: readers of @mirrors under the other two
 * @mirrors: the mirrors
 * @ranges_lock: @ranges and their @valid
 * @ranges: ranges registered
 * @released: release has run
 * @free: frees it where it may sleep
 */
struct hmm_mm {
	struct mmu_notifier list;
	struct mmu_interval_notifier sync;
	const struct hmm_policy *policy;
	u64 id;

	struct mutex setup;
	unsigned int nr_mirrors;

	struct rw_semaphore mirrors_sem;
	struct srcu_struct srcu;
	struct list_head mirrors;

	struct mutex ranges_lock;
	struct list_head ranges;

	bool released;
	struct work_struct free;
};

/**
 * struct hmm_mirror_ops - what a driver is told
 * @release: the address space ends: give up all of it. May sleep
 * @sync: a range changes; see rule 4
 */
struct hmm_mirror_ops {
	void (*release)(struct hmm_mirror *mirror);
	bool (*sync)(struct hmm_mirror *mirror, const struct mmu_notifier_range *range);
};

/**
 * struct hmm_mirror - one driver's interest in an address space
 * @hmm: the address space; poison once unregistered
 * @ops: the driver's
 * @link: in hmm_mm.mirrors
 * @releases: how often release() was called
 */
struct hmm_mirror {
	struct hmm_mm *hmm;
	const struct hmm_mirror_ops *ops;
	struct list_head link;
	atomic_t releases;
};

/**
 * struct hmm_mirror_range - addresses that are being looked at
 * @link: in hmm_mm.ranges
 * @hmm: the address space; poison once unregistered
 * @start: first address
 * @end: behind the last
 * @valid: nothing has changed in it since hmm_range_begin()
 * @held: it holds the address space's users
 */
struct hmm_mirror_range {
	struct list_head link;
	struct hmm_mm *hmm;
	unsigned long start;
	unsigned long end;
	bool valid;
	bool held;
};

/**
 * struct hmm_mirror_counts - what the layer has counted since it was loaded
 * @registered: mirrors registered
 * @unregistered: mirrors unregistered
 * @releases: release callbacks called
 * @releases_again: of these, not the first of their mirror
 * @refused: invalidations refused because they must not sleep
 */
struct hmm_mirror_counts {
	atomic64_t registered;
	atomic64_t unregistered;
	atomic64_t releases;
	atomic64_t releases_again;
	atomic64_t refused;
};

extern struct hmm_mirror_counts hmm_mirror_counts;

int hmm_layer_init(const char *policy);
void hmm_layer_exit(void);
int hmm_layer_policy(void);

int hmm_mirror_register(struct hmm_mirror *mirror, struct mm_struct *mm);
void hmm_mirror_unregister(struct hmm_mirror *mirror);

int hmm_range_register(struct hmm_mirror_range *range, struct hmm_mirror *mirror,
		       unsigned long start, unsigned long end);
void hmm_range_let_go(struct hmm_mirror_range *range);
unsigned long hmm_range_begin(struct hmm_mirror_range *range);
bool hmm_range_retry(struct hmm_mirror_range *range, unsigned long seq);
void hmm_range_unregister(struct hmm_mirror_range *range);

#endif
