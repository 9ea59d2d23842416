/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/* What programs of the guest may ask of /dev/hmm_witness. */
#ifndef HMM_WITNESS_UAPI_H
#define HMM_WITNESS_UAPI_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define HMM_WITNESS_MAGIC 'w'

/**
 * struct hmm_witness_associate - which context mirrors the caller
 * @ctx: handle of the device's context that mirrors the caller's address space
 */
struct hmm_witness_associate {
	__u64 ctx;
};

/*
 * Tells the host that the caller's address space is mirrored by a context.
 * ESRCH: no notifier was seen for it. ENODEV: the witness has been unplugged.
 *
 * A write() of at most 64 KiB posts one message to the host and returns its
 * length when the host has taken it. EMSGSIZE: it is longer.
 */
#define HMM_WITNESS_ASSOCIATE \
	_IOW(HMM_WITNESS_MAGIC, 1, struct hmm_witness_associate)

#define HMM_WITNESS_PLACE_BYTES 72
#define HMM_WITNESS_ROLE_BYTES 16

/* Nobody waits there; it is only recorded. */
#define HMM_WITNESS_SITE_RECORD (1 << 0)
/* No gate: a function that is watched for tasks that are asleep in it. */
#define HMM_WITNESS_SITE_WATCH (1 << 1)
/* Opened in the guest, and not by the host. */
#define HMM_WITNESS_SITE_LOCAL (1 << 2)

/**
 * struct hmm_witness_site - a place where tasks wait until they are let go on
 * @id: its number
 * @flags: HMM_WITNESS_SITE_*
 * @place: entry:FUNCTION, return:FUNCTION, offset:FUNCTION+0xN or user:NAME
 * @gives: role of a task that has none when it comes here, or empty; with
 *	SITE_LOCAL: the only role whose tasks are held here
 */
struct hmm_witness_site {
	__u32 id;
	__u32 flags;
	char place[HMM_WITNESS_PLACE_BYTES];
	char gives[HMM_WITNESS_ROLE_BYTES];
};

/**
 * struct hmm_witness_arm - a repetition of a scenario begins
 * @iteration: its number
 * @limit: heartbeats after which a gate lets go by itself
 * @reserved: zero
 */
struct hmm_witness_arm {
	__u64 iteration;
	__u32 limit;
	__u32 reserved;
};

/**
 * struct hmm_witness_role - what the calling thread is called in scenarios
 * @name: the name; empty: it has none any more
 */
struct hmm_witness_role {
	char name[HMM_WITNESS_ROLE_BYTES];
};

/**
 * struct hmm_witness_point - a gate in user space
 * @name: of the site user:NAME
 */
struct hmm_witness_point {
	char name[32];
};

/**
 * struct hmm_witness_local - a look at a gate, and what is done with it
 * @id: the site
 * @what: 0: nothing; 1: open it; 2: close it; 3: let one task through
 * @waiting: out: tasks that wait there
 * @reached: out: tasks that have come there since it was armed
 */
struct hmm_witness_local {
	__u32 id;
	__u32 what;
	__u32 waiting;
	__u32 reached;
};

/*
 * Sites are made (ADD), hold nobody before they are armed (ARM), nor after that
 * (DISARM), and go (CLEAR). Only files that init opened may do that: EPERM.
 * ADD: ENOENT: no such function, or none that can be traced; EOPNOTSUPP: the
 * kernel has no direct calls from ftrace; EEXIST, ENOSPC, EBUSY (armed).
 * CLEAR: EBUSY: a task does not leave a function that was watched.
 *
 * Anybody may take a role, and come to a gate of its own (POINT, which passes
 * at once where no such site is armed).
 */
#define HMM_WITNESS_GATE_ADD \
	_IOW(HMM_WITNESS_MAGIC, 2, struct hmm_witness_site)
#define HMM_WITNESS_GATE_ARM \
	_IOW(HMM_WITNESS_MAGIC, 3, struct hmm_witness_arm)
#define HMM_WITNESS_GATE_DISARM _IO(HMM_WITNESS_MAGIC, 4)
#define HMM_WITNESS_GATE_CLEAR _IO(HMM_WITNESS_MAGIC, 5)
#define HMM_WITNESS_ROLE \
	_IOW(HMM_WITNESS_MAGIC, 6, struct hmm_witness_role)
#define HMM_WITNESS_GATE_POINT \
	_IOW(HMM_WITNESS_MAGIC, 7, struct hmm_witness_point)
#define HMM_WITNESS_GATE_LOCAL \
	_IOWR(HMM_WITNESS_MAGIC, 8, struct hmm_witness_local)

/**
 * struct hmm_witness_stable - a range of addresses that is promised to be stable
 * @start: first address
 * @last: last address, inclusive
 * @kept: at the end: the promise was kept; 0 takes it back
 */
struct hmm_witness_stable {
	__u64 start;
	__u64 last;
	__u64 kept;
};

/*
 * Begins and ends a promise: the range of the caller's address space stays
 * mapped and can be read and written, so that no fault of the device in it may
 * be fatal. EINVAL: it ends before it begins. ESRCH, ENODEV: as above.
 */
#define HMM_WITNESS_STABLE_BEGIN \
	_IOW(HMM_WITNESS_MAGIC, 16, struct hmm_witness_stable)
#define HMM_WITNESS_STABLE_END \
	_IOW(HMM_WITNESS_MAGIC, 17, struct hmm_witness_stable)

#endif
