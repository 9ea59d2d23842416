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

#endif
