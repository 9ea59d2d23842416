/* SPDX-License-Identifier: GPL-2.0 */
/* What the witness's files share. */
#ifndef HMM_WITNESS_H
#define HMM_WITNESS_H

#include <linux/types.h>

struct mm_struct;
struct mmu_notifier_range;
struct pci_dev;

/**
 * enum witness_notifier - the two sorts of notifier, numbered as in the records
 * @WITNESS_LIST: struct mmu_notifier
 * @WITNESS_INTERVAL: struct mmu_interval_notifier
 * @WITNESS_NOTIFIERS: array size
 */
enum witness_notifier {
	WITNESS_LIST = 1,
	WITNESS_INTERVAL = 2,
	WITNESS_NOTIFIERS
};

/* report.c: the channel to the host. */
int witness_channel_open(struct pci_dev *pdev);
void witness_channel_close(struct pci_dev *pdev);
void witness_report(u32 kind, u64 mm, u64 arg0, u64 arg1, u64 arg2, u64 arg3);
u32 witness_requests(void);
bool witness_gate(unsigned int slot);

/* mm_table.c: the mirrored address spaces. */
int mm_table_open(void);
void mm_table_close(void);
bool mm_table_has(const struct mm_struct *mm);
void mm_table_added(const struct mm_struct *mm, enum witness_notifier sort);
u64 mm_table_removing(const struct mm_struct *mm, enum witness_notifier sort);
void mm_table_removed(const struct mm_struct *mm, u64 id,
		      enum witness_notifier sort);
void mm_table_put(const struct mm_struct *mm);
void mm_table_freed(const struct mm_struct *mm, u64 id);
bool mm_table_leaving(const struct mm_struct *mm);
void mm_table_released(const struct mm_struct *mm, bool empty);
bool mm_table_awaits_unmap(const struct mm_struct *mm);
void mm_table_unmapped(const struct mm_struct *mm);
void mm_table_end(const struct mm_struct *mm);
int mm_table_associate(const struct mm_struct *mm, u64 ctx);
int mm_table_stable(const struct mm_struct *mm, u32 kind, u64 start, u64 last,
		    u64 kept);
void mm_table_report_stranded(void);
u64 mm_table_judged(const struct mm_struct *mm);
u64 mm_table_missed(void);

/* ranges.c: invalidations under way. */
int ranges_open(struct pci_dev *pdev);
void ranges_close(struct pci_dev *pdev);
void ranges_tell(void);
void range_started(u64 id, const struct mmu_notifier_range *range);
void range_ended(const struct mmu_notifier_range *range);
u64 ranges_missed(void);

/* moments.c: the probes that feed the table. */
int moments_register(void);
void moments_start(void);
void moments_unregister(void);
u64 moments_missed(void);

/* pgmap.c: ranges of device-private memory. */
int pgmap_register(void);
void pgmap_start(void);
void pgmap_unregister(void);
u64 pgmap_missed(void);

/* dma.c: memory of the device under test. */
int dma_register(void);
void dma_start(void);
void dma_unregister(void);
u64 dma_missed(void);

/* format.c */
void format_report(void);

/* heartbeat.c */
int heartbeat_start(void);
void heartbeat_stop(void);

/* gate.c: where tasks wait until they are let go on. */
struct hmm_witness_local;
void gates_open(void);
void gates_close(void);
void gates_beat(void);
long gates_setup(unsigned int cmd, const void *arg);
long gates_role(const char *name);
long gates_point(const char *name);
long gates_local(struct hmm_witness_local *arg);

/* requests.c: what the host asks for. */
void requests_allow(void);
void requests_act(u32 requests);

/* chardev.c: /dev/hmm_witness. */
int chardev_register(struct pci_dev *pdev);
void chardev_unregister(struct pci_dev *pdev);

#endif
