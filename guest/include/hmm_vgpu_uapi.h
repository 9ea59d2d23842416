/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note OR MIT */
/*
 * The ioctls of /dev/hmm_vgpu.
 *
 * The Rust side is vgpu/spec/src/uapi.rs, and a test holds the layouts against
 * each other. Job ops, job flags and JOB_* statuses are in hmm_vgpu_regs.h.
 */
#ifndef HMM_VGPU_UAPI_H
#define HMM_VGPU_UAPI_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define HMM_VGPU_DEVICE	"hmm_vgpu"
#define HMM_VGPU_MAGIC	'v'

/* Queues of a context. */
#define HMM_VGPU_QUEUES	2
/* How many of a queue's newest jobs HMM_VGPU_WAIT can still tell about. */
#define HMM_VGPU_RESULTS	256

/**
 * struct hmm_vgpu_bind - mirror the caller's address space on the device
 * @flags: in: must be zero
 * @ctx: out: context handle
 *
 * EBUSY: the file has a context already. ENOSPC: the device has none left.
 */
struct hmm_vgpu_bind {
	__u64 flags;
	__u64 ctx;
};

/**
 * struct hmm_vgpu_submit - queue one job
 * @op: in: VGPU_JOB_OP_*
 * @flags: in: VGPU_JOB_FLAG_*
 * @queue: in: which of the context's queues
 * @dst: in: destination address
 * @src: in: source address
 * @len: in: bytes, or number of accesses
 * @operand: in: by op
 * @fence: out: what to wait for; ascends from 1 in each queue
 *
 * EAGAIN: the queue is full. ESRCH: the address space has been released.
 * EPERM: the caller runs in another address space than the bound one.
 * ENXIO: not bound.
 */
struct hmm_vgpu_submit {
	__u16 op;
	__u16 flags;
	__u32 queue;
	__u64 dst;
	__u64 src;
	__u64 len;
	__u64 operand[3];
	__u64 fence;
};

/**
 * struct hmm_vgpu_wait - wait for a job
 * @fence: in: its fence
 * @timeout_ns: in: how long at the most; 0 only asks
 * @queue: in: its queue
 * @status: out: VGPU_JOB_* status
 * @result: out: by op
 * @address: out: by op and status
 *
 * ETIME: not done in time. EINTR: a signal came first. EINVAL: no such fence
 * was ever given out. ENODATA: more than HMM_VGPU_RESULTS jobs have ended since.
 * EIO: the device has stopped answering. ENXIO: not bound.
 */
struct hmm_vgpu_wait {
	__u64 fence;
	__u64 timeout_ns;
	__u32 queue;
	__u32 status;
	__u64 result;
	__u64 address;
};

#define HMM_VGPU_STATE_UNBOUND	0
#define HMM_VGPU_STATE_BOUND	1
#define HMM_VGPU_STATE_RELEASED	2

/**
 * struct hmm_vgpu_query - what the driver counts for the file's context
 * @ctx: context handle, or 0
 * @state: HMM_VGPU_STATE_*
 * @queues: number of queues a context has
 * @faults_served: faults answered with a mapping
 * @faults_cancelled: faults whose job was ended
 * @fault_retries: times an invalidation came between looking and mapping
 * @invalidations: invalidate callbacks
 * @mapped_pages: pages mapped at the moment, in 4 KiB
 * @huge_maps: 2 MiB leaves written so far
 * @device_pages: pages of VRAM the context has at the moment
 * @cpu_faults: pages that a CPU's access has brought back from there
 */
struct hmm_vgpu_query {
	__u64 ctx;
	__u32 state;
	__u32 queues;
	__u64 faults_served;
	__u64 faults_cancelled;
	__u64 fault_retries;
	__u64 invalidations;
	__u64 mapped_pages;
	__u64 huge_maps;
	__u64 device_pages;
	__u64 cpu_faults;
};

/* What memory is filled with whose contents were lost with the device. */
#define HMM_VGPU_POISON	0xd7

/**
 * struct hmm_vgpu_migrate - migrate a range of the caller's addresses
 * @addr: in: first address, a multiple of the page size
 * @len: in: bytes, likewise
 * @flags: in: must be zero
 * @migrated: out: how many pages were migrated
 *
 * Pages that cannot be migrated stay where they are: of files, shared, pinned,
 * there already, or beyond what there is room for. EOPNOTSUPP: the kernel has no
 * device-private memory. ESRCH, EPERM, ENXIO: as for submit.
 */
struct hmm_vgpu_migrate {
	__u64 addr;
	__u64 len;
	__u64 flags;
	__u64 migrated;
};

#define HMM_VGPU_BIND	_IOWR(HMM_VGPU_MAGIC, 1, struct hmm_vgpu_bind)
#define HMM_VGPU_SUBMIT	_IOWR(HMM_VGPU_MAGIC, 2, struct hmm_vgpu_submit)
#define HMM_VGPU_WAIT	_IOWR(HMM_VGPU_MAGIC, 3, struct hmm_vgpu_wait)
#define HMM_VGPU_QUERY	_IOR(HMM_VGPU_MAGIC, 4, struct hmm_vgpu_query)
/* Unregisters the context, as close does. ENXIO if not bound. */
#define HMM_VGPU_UNBIND	_IO(HMM_VGPU_MAGIC, 5)
#define HMM_VGPU_MIGRATE_TO_DEVICE _IOWR(HMM_VGPU_MAGIC, 6, struct hmm_vgpu_migrate)
#define HMM_VGPU_MIGRATE_TO_SYSTEM _IOWR(HMM_VGPU_MAGIC, 7, struct hmm_vgpu_migrate)

/* Which policy the mirror layer has; 0: the driver's backend is another. */
#define HMM_VGPU_POLICY_NONE		0
#define HMM_VGPU_POLICY_DROP_LOCK	1
#define HMM_VGPU_POLICY_READ_HELD	2
#define HMM_VGPU_POLICY_SRCU		3
#define HMM_VGPU_POLICY_SRCU_NOWAIT	4

/**
 * struct hmm_vgpu_layer - what the mirror layer has counted since the driver was loaded
 * @policy: HMM_VGPU_POLICY_*
 * @registered: mirrors registered
 * @unregistered: mirrors unregistered
 * @releases: release callbacks called
 * @releases_again: of these, not the first of their mirror
 * @refused: invalidations refused because they must not sleep
 */
struct hmm_vgpu_layer {
	__u64 policy;
	__u64 registered;
	__u64 unregistered;
	__u64 releases;
	__u64 releases_again;
	__u64 refused;
};

/* Migrate the page at addr to another page, the device lock held around all of it. */
#define HMM_VGPU_ACT_MIGRATE_WIDE	1
/* The same, the device lock held for the device's mapping only. */
#define HMM_VGPU_ACT_MIGRATE_NARROW	2
/* At release, wait for work that unmaps the file fd everywhere. */
#define HMM_VGPU_ACT_RELEASE_WAITS	3
/* At release, unregister the mirror from within its callback. */
#define HMM_VGPU_ACT_RELEASE_UNREGISTERS 4
/* Let the address space's users go while a fault's range is registered. */
#define HMM_VGPU_ACT_RANGE_UNHELD	5

/**
 * struct hmm_vgpu_act - have the driver do what a scenario is about
 * @op: in: HMM_VGPU_ACT_*
 * @fd: in: by op
 * @addr: in: by op
 *
 * ENOTTY: only the mirror backend can. ENXIO: not bound. EPERM: the caller runs
 * in another address space than the bound one. EBUSY: the page could not be
 * migrated.
 */
struct hmm_vgpu_act {
	__u32 op;
	__s32 fd;
	__u64 addr;
};

#define HMM_VGPU_LAYER	_IOR(HMM_VGPU_MAGIC, 32, struct hmm_vgpu_layer)
#define HMM_VGPU_ACT	_IOW(HMM_VGPU_MAGIC, 33, struct hmm_vgpu_act)

#endif
