/* SPDX-License-Identifier: GPL-2.0 */
/*
 * hmm_vgpu - reference driver of the virtual GPU: mirrors a process's address
 * space with mmu_interval_notifier and hmm_range_fault.
 *
 * One open file has at most one context; a context mirrors one address space.
 *
 *	main.c			module, PCI function
 *	cmd.c			command ring
 *	irq.c			interrupts, fault buffer
 *	file.c			file operations, ioctls
 *	ctx.c			a context's life: create, stop, destroy
 *	queue.c			jobs and completions
 *	table.c			table pages: grant, link, return
 *	pgtable.c		leaves: map and zap
 *	fault.c			serving a context's faults
 *	mirror_interval.c	the notifier, and pages through hmm_range_fault
 *	exclusive.c		pages for atomics that are not coherent with the CPU's
 *	devmem.c		VRAM as device-private pages: who has which, copies
 *	migrate.c		migration to the device and back
 *
 * The backend is chosen when the module is loaded. For backend=mirror there are
 *
 *	mirror_layer.c		mirrors and ranges of an address space, by policy
 *	backend_mirror.c	the driver on that layer
 *	mirror_act.c		what scenarios have it do
 *	lock_book.c		who holds and who waits for its locks
 *
 * Lock order, outermost first:
 *
 *	vgpu_device.files_lock	list of open files
 *	vgpu_file.lock		which context the file has
 *	mmap_lock		bind (inserting the notifier); faults; migration
 *	page locks		migration
 *	vgpu_devmem.copy_lock	copies, grants of VRAM
 *	-- reclaim and the invalidate callback come in here --
 *	(backend=mirror: the locks of mirror_layer.h)
 *	vgpu_ctx.pt_lock	page tables, sequence check, answers to faults
 *	vgpu_queue.lock		a queue's ring and results
 *	vgpu_device.ctx_lock	table of contexts (spinlock)
 *	vgpu_ctx.fault_lock	faults waiting to be served (spinlock)
 *	vgpu_cmd_ring.lock	command ring and its doorbell (spinlock)
 *
 * The invalidate callback runs under mmap_lock, i_mmap_rwsem, anon_vma locks,
 * page locks and in reclaim. So under pt_lock and queue.lock there is no
 * GFP_KERNEL allocation, no mmap_lock, no page lock, and no waiting for
 * anything but the device, which always answers or is given up on (cmd.c).
 * pt_lock is a mutex; a callback that must not sleep only tries it, and then
 * polls for the device with udelay().
 *
 * A handle may be named to the device only as long as it is live. Faults die
 * with CTX_RELEASE, which is sent under pt_lock; so an answer to a fault goes
 * into the command ring under pt_lock too, after a look at vgpu_ctx.stopped.
 * Doorbells of queues hold to the same with vgpu_queue.lock and
 * vgpu_queue.stopped.
 */
#ifndef HMM_VGPU_H
#define HMM_VGPU_H

#include <linux/atomic.h>
#include <linux/bitmap.h>
#include <linux/build_bug.h>
#include <linux/hmm.h>
#include <linux/io.h>
#include <linux/kref.h>
#include <linux/list.h>
#include <linux/miscdevice.h>
#include <linux/mmu_notifier.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/spinlock.h>
#include <linux/types.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

#include "compat.h"
#include "hmm_vgpu_regs.h"
#include "hmm_vgpu_uapi.h"

/* The device's page size is the CPU's: nothing here splits or gathers pages. */
static_assert(PAGE_SHIFT == 12);

#define VGPU_ROOT_LEVEL		(VGPU_PTE_LEVELS - 1)
#define VGPU_VA_LAST		((1ULL << VGPU_VA_BITS) - 1)
#define VGPU_HUGE_SIZE		(1UL << VGPU_HUGE_SHIFT)
#define VGPU_HUGE_PAGES		(VGPU_HUGE_SIZE >> PAGE_SHIFT)
#define VGPU_HUGE_ORDER		(VGPU_HUGE_SHIFT - PAGE_SHIFT)

/* Commands gathered before they go into the ring. */
#define VGPU_BATCH		32
/* Jobs a queue holds. */
#define VGPU_QUEUE_SHIFT	7
#define VGPU_QUEUE_JOBS		(1U << VGPU_QUEUE_SHIFT)
/* Faults of one context waiting to be served; a power of two. */
#define VGPU_FAULT_FIFO		64
/* Pages mapped around a fault, where the CPU has them. */
#define VGPU_FAULT_AROUND	64
/* Empty tables a context keeps before it gives them back. */
#define VGPU_EMPTY_TABLES	16

struct hmm_mirror_range;
struct vgpu_client;
struct vgpu_ctx;
struct vgpu_devmem;

/**
 * enum vgpu_atomics - how a context's atomics get at system memory
 * @VGPU_ATOMICS_NONE: not at all
 * @VGPU_ATOMICS_COHERENT: like writes; the platform makes them coherent
 * @VGPU_ATOMICS_EXCLUSIVE: while the CPUs are kept away from the page
 */
enum vgpu_atomics {
	VGPU_ATOMICS_NONE,
	VGPU_ATOMICS_COHERENT,
	VGPU_ATOMICS_EXCLUSIVE,
};

/**
 * struct vgpu_cmd_ring - the device's command ring
 * @lock: all fields below, and CMD_TAIL
 * @cmd: the ring, in coherent memory
 * @dma: its bus address
 * @done: the device's count of completed commands, in coherent memory
 * @done_dma: its bus address
 * @owner: by slot: where status and result go to, or NULL
 * @tail: index behind the last command written
 * @reaped: index behind the last command whose status has been looked at
 * @dead: the device does not answer, or is going away: nothing more is sent
 */
struct vgpu_cmd_ring {
	spinlock_t lock;
	struct vgpu_cmd *cmd;
	dma_addr_t dma;
	__le32 *done;
	dma_addr_t done_dma;
	struct vgpu_cmd **owner;
	u32 tail;
	u32 reaped;
	bool dead;
};

/**
 * struct vgpu_fault_ring - the device's fault buffer
 * @entry: the ring, in coherent memory
 * @dma: its bus address
 * @put: the device's index behind the last entry written, in coherent memory
 * @put_dma: its bus address
 * @get: index behind the last entry taken; only the interrupt thread uses it
 */
struct vgpu_fault_ring {
	struct vgpu_fault *entry;
	dma_addr_t dma;
	__le32 *put;
	dma_addr_t put_dma;
	u32 get;
};

/**
 * struct vgpu_device - one PCI function
 * @ref: held by the PCI binding and by every open file
 * @pdev: the PCI function; not used after remove()
 * @misc: the character device
 * @name: its name
 * @id: number of the device among those of this driver
 * @regs: BAR0; not used after remove()
 * @ring: command ring
 * @faults: fault buffer
 * @vectors: how many interrupt vectors there are
 * @contexts: how many contexts the device has
 * @table_pages: how many table pages the device has
 * @atomics: device atomics on system memory are coherent with the CPU's
 * @devmem: its memory as device-private pages, or NULL
 * @table_lock: @table_map
 * @table_map: which table pages are granted
 * @ctx_lock: @ctx
 * @ctx: contexts by index of their handle; what interrupts look in
 * @files_lock: @files, @removed
 * @files: open files
 * @removed: remove() has begun; read under any file's lock
 * @tag: last tag given to a context
 */
struct vgpu_device {
	struct kref ref;
	struct pci_dev *pdev;
	struct miscdevice misc;
	char name[24];
	int id;
	void __iomem *regs;
	struct vgpu_cmd_ring ring;
	struct vgpu_fault_ring faults;
	int vectors;
	u32 contexts;
	u32 table_pages;
	bool atomics;
	struct vgpu_devmem *devmem;

	spinlock_t table_lock;
	unsigned long *table_map;

	spinlock_t ctx_lock;
	struct vgpu_ctx **ctx;

	struct mutex files_lock;
	struct list_head files;
	bool removed;

	atomic_t tag;
};

/**
 * struct vgpu_file - one open file
 * @vdev: its device, referenced
 * @link: in vgpu_device.files
 * @lock: @ctx
 * @ctx: its context, referenced, or NULL
 */
struct vgpu_file {
	struct vgpu_device *vdev;
	struct list_head link;
	struct mutex lock;
	struct vgpu_ctx *ctx;
};

/**
 * struct vgpu_result - how a job ended
 * @status: VGPU_JOB_*
 * @result: by op
 * @address: by op and status
 */
struct vgpu_result {
	u32 status;
	u64 result;
	u64 address;
};

/**
 * struct vgpu_queue - a queue of jobs
 * @lock: all fields below, and the doorbell
 * @handle: its handle, or 0
 * @job: ring of jobs, in coherent memory; @completion and @fence lie behind it
 * @dma: bus address of @job
 * @completion: ring of completions
 * @fence: where the device writes the last fence
 * @head: jobs submitted; also the newest fence
 * @done: jobs ended; also the newest fence reached. Grows under @lock, read without
 * @stopped: nothing may be submitted any more
 * @results: of the newest jobs, by fence
 * @wait: who waits for @done to grow
 */
struct vgpu_queue {
	struct mutex lock;
	u64 handle;
	struct vgpu_job *job;
	dma_addr_t dma;
	struct vgpu_completion *completion;
	__le64 *fence;
	u64 head;
	u64 done;
	bool stopped;
	struct vgpu_result *results;
	wait_queue_head_t wait;
};

/**
 * struct vgpu_table - a table page and what the driver knows about it
 * @link: in vgpu_ctx.tables
 * @empty: in vgpu_ctx.empty or vgpu_ctx.detached, or by itself
 * @parent: the table it is entered in, or NULL
 * @base: first address it translates
 * @handle: the table page's handle
 * @page: the table page's index
 * @level: 3 is the root, 0 holds 4 KiB leaves
 * @used: valid entries
 * @pte: the entries as the device has them, in coherent memory, for it to copy
 * @dma: bus address of @pte
 * @slot: behind each entry: the next table, or the CPU's page frame of a leaf
 *
 * Tables and leaves come and go under pt_lock. Only the fault worker links and
 * unlinks tables, so that one it has found stays while it does not hold the lock.
 */
struct vgpu_table {
	struct list_head link;
	struct list_head empty;
	struct vgpu_table *parent;
	u64 base;
	u64 handle;
	u32 page;
	u8 level;
	u16 used;
	__le64 *pte;
	dma_addr_t dma;
	union {
		struct vgpu_table *table;
		unsigned long pfn;
	} slot[VGPU_PTE_ENTRIES];
};

/**
 * struct vgpu_ctx - a context: one address space mirrored
 * @ref: held by the file, by tasks in an ioctl and by interrupt threads
 * @vdev: its device, referenced
 * @handle: its handle
 * @notifier: over the whole address space
 * @mm: the address space; the notifier keeps the structure from being freed
 * @mirrored: @notifier is inserted
 *
 * @pt_lock: all of this block. Taken in the invalidate callback
 * @stopped: CTX_RELEASE has been sent: nothing is mapped or answered any more
 * @root: the page tables
 * @empty: tables without a valid entry, except the root
 * @nr_empty: how many
 * @batch: commands gathered
 * @nr_batch: how many
 *
 * @tables: all tables; only the fault worker uses it, and teardown after it
 * @detached: tables taken out of the tree and drained, to be returned; likewise
 * @pfns: of the fault worker, for hmm_range_fault
 *
 * @fault_lock: this block
 * @fifo: faults waiting to be served
 * @fifo_head: index behind the newest
 * @fifo_tail: index of the oldest
 * @closed: no fault is taken any more, and @work is not queued for one
 * @work: serves them
 *
 * @queue: the queues
 * @faults_served: see struct hmm_vgpu_query; as the next ones
 * @faults_cancelled: -
 * @fault_retries: -
 * @invalidations: -
 * @mapped_pages: -
 * @huge_maps: -
 * @device_pages: -
 * @cpu_faults: -
 * @atomics: how its atomics get at system memory
 *
 * @sync: the notifier whose sequence counts: @notifier, or the mirror layer's
 * @client: what the mirror backend has registered, or NULL
 * @range: its range for the fault being served, or NULL; of the fault worker
 */
struct vgpu_ctx {
	struct kref ref;
	struct vgpu_device *vdev;
	u64 handle;
	struct mmu_interval_notifier notifier;
	struct mm_struct *mm;
	bool mirrored;

	struct mutex pt_lock;
	bool stopped;
	struct vgpu_table *root;
	struct list_head empty;
	unsigned int nr_empty;
	struct vgpu_cmd batch[VGPU_BATCH];
	unsigned int nr_batch;

	struct list_head tables;
	struct list_head detached;
	unsigned long pfns[VGPU_HUGE_PAGES];

	spinlock_t fault_lock;
	struct vgpu_fault fifo[VGPU_FAULT_FIFO];
	unsigned int fifo_head;
	unsigned int fifo_tail;
	bool closed;
	struct work_struct work;

	struct vgpu_queue queue[HMM_VGPU_QUEUES];

	atomic64_t faults_served;
	atomic64_t faults_cancelled;
	atomic64_t fault_retries;
	atomic64_t invalidations;
	atomic64_t mapped_pages;
	atomic64_t huge_maps;
	atomic_t device_pages;
	atomic64_t cpu_faults;
	enum vgpu_atomics atomics;

	struct mmu_interval_notifier *sync;
	struct vgpu_client *client;
	struct hmm_mirror_range *range;
};

static inline u32 vgpu_read(struct vgpu_device *vdev, u32 reg)
{
	return ioread32(vdev->regs + reg);
}

static inline void vgpu_write(struct vgpu_device *vdev, u32 reg, u32 value)
{
	iowrite32(value, vdev->regs + reg);
}

/* Writes a pair of registers _LO, _HI. */
static inline void vgpu_write64(struct vgpu_device *vdev, u32 reg, u64 value)
{
	vgpu_write(vdev, reg, lower_32_bits(value));
	vgpu_write(vdev, reg + 4, upper_32_bits(value));
}

static inline struct vgpu_cmd vgpu_cmd_make(u16 op, u64 ctx, u64 arg0,
					    u64 arg1, u64 arg2)
{
	return (struct vgpu_cmd) {
		.op = cpu_to_le16(op),
		.ctx = cpu_to_le64(ctx),
		.arg = {
			cpu_to_le64(arg0),
			cpu_to_le64(arg1),
			cpu_to_le64(arg2),
		},
	};
}

/* Arg1 of the commands that concern a run of table entries. */
static inline u64 vgpu_entries(unsigned int first, unsigned int count)
{
	return first | (u64)count << 16;
}

static inline unsigned int vgpu_pte_shift(unsigned int level)
{
	return PAGE_SHIFT + 9 * level;
}

static inline unsigned int vgpu_pte_index(u64 va, unsigned int level)
{
	return (va >> vgpu_pte_shift(level)) & (VGPU_PTE_ENTRIES - 1);
}

static inline bool vgpu_pte_huge(const struct vgpu_table *t, unsigned int i)
{
	return le64_to_cpu(READ_ONCE(t->pte[i])) & VGPU_PTE_HUGE;
}

/**
 * struct vgpu_backend - how an address space is followed
 * @name: as the module's parameter has it
 * @init: when the module is loaded, with the parameter mirror_policy; or NULL
 * @exit: when it is unloaded; or NULL
 * @begin: begin to mirror; sets vgpu_ctx.mm and mirrored
 * @end: end it if it has begun. The context is stopped, its fault worker does not
 *	run any more; no lock that a callback takes is held
 * @fault_begin: the fault worker is about to serve a fault; or NULL
 * @fault_end: it has; or NULL
 * @read_begin: the sequence to look with. Waits for invalidations under way
 * @read_retry: whether what was found may not be mapped. Under pt_lock
 * @layer: what the mirror layer has counted; or NULL
 * @act: do what a scenario asks for; or NULL
 */
struct vgpu_backend {
	const char *name;
	int (*init)(const char *policy);
	void (*exit)(void);
	int (*begin)(struct vgpu_ctx *ctx, struct mm_struct *mm);
	void (*end)(struct vgpu_ctx *ctx);
	void (*fault_begin)(struct vgpu_ctx *ctx, const struct vgpu_fault *fault);
	void (*fault_end)(struct vgpu_ctx *ctx);
	unsigned long (*read_begin)(struct vgpu_ctx *ctx);
	bool (*read_retry)(struct vgpu_ctx *ctx, unsigned long seq);
	int (*layer)(struct hmm_vgpu_layer *arg);
	int (*act)(struct vgpu_ctx *ctx, const struct hmm_vgpu_act *arg);
};

/* main.c */
extern struct workqueue_struct *vgpu_fault_wq;
extern const struct vgpu_backend *vgpu_backend;
void vgpu_device_put(struct vgpu_device *vdev);

/* cmd.c */
int vgpu_cmd_init(struct vgpu_device *vdev);
void vgpu_cmd_start(struct vgpu_device *vdev);
void vgpu_cmd_kill(struct vgpu_device *vdev, const char *why);
void vgpu_cmd_fini(struct vgpu_device *vdev);
int vgpu_cmd_post(struct vgpu_device *vdev, const struct vgpu_cmd *cmd,
		  unsigned int count, bool may_sleep, u32 *index);
int vgpu_cmd_send(struct vgpu_device *vdev, struct vgpu_cmd *cmd,
		  unsigned int count, u32 *index);
int vgpu_cmd_wait(struct vgpu_device *vdev, u32 index, bool may_sleep);
int vgpu_cmd_finish(struct vgpu_device *vdev, struct vgpu_cmd *cmd,
		    unsigned int count, u32 index);
int vgpu_cmd_run(struct vgpu_device *vdev, struct vgpu_cmd *cmd,
		 unsigned int count);
int vgpu_cmd_error(const struct vgpu_cmd *cmd);

static inline bool vgpu_is_dead(struct vgpu_device *vdev)
{
	return READ_ONCE(vdev->ring.dead);
}

/* irq.c */
int vgpu_irq_init(struct vgpu_device *vdev);
void vgpu_irq_start(struct vgpu_device *vdev);
void vgpu_irq_stop(struct vgpu_device *vdev);
void vgpu_irq_fini(struct vgpu_device *vdev);

/* file.c */
extern const struct file_operations vgpu_fops;
void vgpu_files_detach(struct vgpu_device *vdev);

/* ctx.c */
struct vgpu_ctx *vgpu_ctx_create(struct vgpu_device *vdev, u32 tag);
void vgpu_ctx_stop_locked(struct vgpu_ctx *ctx);
void vgpu_ctx_stop(struct vgpu_ctx *ctx);
void vgpu_ctx_destroy(struct vgpu_ctx *ctx);
void vgpu_ctx_put(struct vgpu_ctx *ctx);
struct vgpu_ctx *vgpu_ctx_get_index(struct vgpu_device *vdev, u32 index);

/* queue.c */
int vgpu_queue_init(struct vgpu_ctx *ctx, struct vgpu_queue *q);
void vgpu_queue_fini(struct vgpu_ctx *ctx, struct vgpu_queue *q);
struct vgpu_cmd vgpu_queue_create_cmd(struct vgpu_ctx *ctx, struct vgpu_queue *q);
void vgpu_queue_stop(struct vgpu_queue *q);
void vgpu_queue_end_all(struct vgpu_queue *q);
void vgpu_queue_scan(struct vgpu_queue *q);
bool vgpu_queue_busy(struct vgpu_queue *q);
int vgpu_queue_submit(struct vgpu_ctx *ctx, struct vgpu_queue *q,
		      struct hmm_vgpu_submit *arg);
int vgpu_queue_wait(struct vgpu_ctx *ctx, struct vgpu_queue *q,
		    struct hmm_vgpu_wait *arg);

/* table.c */
int vgpu_table_create_root(struct vgpu_ctx *ctx);
struct vgpu_table *vgpu_table_lookup(struct vgpu_ctx *ctx, u64 va,
				     unsigned int level);
int vgpu_table_prepare(struct vgpu_ctx *ctx, u64 va, unsigned int level);
void vgpu_table_account(struct vgpu_ctx *ctx, struct vgpu_table *t, int entries);
void vgpu_table_detach(struct vgpu_ctx *ctx, struct vgpu_table *t);
void vgpu_table_return_detached(struct vgpu_ctx *ctx);
void vgpu_table_trim(struct vgpu_ctx *ctx);
void vgpu_table_return_all(struct vgpu_ctx *ctx);
void vgpu_table_free_all(struct vgpu_ctx *ctx);

/* pgtable.c */
void vgpu_pt_push(struct vgpu_ctx *ctx, bool may_sleep, struct vgpu_cmd cmd);
int vgpu_pt_flush(struct vgpu_ctx *ctx, bool may_sleep, bool wait);
void vgpu_pt_zap(struct vgpu_ctx *ctx, u64 start, u64 last, bool may_sleep);
void vgpu_pt_clear_all(struct vgpu_ctx *ctx);
void vgpu_pt_drop_all(struct vgpu_ctx *ctx);
int vgpu_pt_map(struct vgpu_ctx *ctx, unsigned long start,
		const unsigned long *pfns, unsigned long count,
		unsigned long must);
int vgpu_pt_map_huge(struct vgpu_ctx *ctx, unsigned long va, unsigned long hmm_pfn);
int vgpu_pt_map_exclusive(struct vgpu_ctx *ctx, unsigned long va, unsigned long pfn);

/* fault.c */
void vgpu_fault_work(struct work_struct *work);
void vgpu_fault_queue(struct vgpu_ctx *ctx, const struct vgpu_fault *fault);
void vgpu_fault_answer_locked(struct vgpu_ctx *ctx,
			      const struct vgpu_fault *fault, bool replay);

/* exclusive.c */
enum vgpu_atomics vgpu_exclusive_mode(struct vgpu_device *vdev);
bool vgpu_exclusive_is_own(const struct vgpu_ctx *ctx,
			   const struct mmu_notifier_range *range);
bool vgpu_exclusive_invalidate(struct vgpu_ctx *ctx,
			       const struct mmu_notifier_range *range);
int vgpu_exclusive_fault(struct vgpu_ctx *ctx, const struct vgpu_fault *fault);

#if VGPU_DEVMEM
/* devmem.c */
void vgpu_devmem_init(struct vgpu_device *vdev);
void vgpu_devmem_shut(struct vgpu_device *vdev);
void vgpu_devmem_close(struct vgpu_ctx *ctx);
void vgpu_devmem_fini(struct vgpu_device *vdev);
void vgpu_devmem_release(struct vgpu_device *vdev);
u64 vgpu_devmem_leaf(struct vgpu_device *vdev, unsigned long pfn);
bool vgpu_devmem_usable(struct vgpu_ctx *ctx, unsigned long pfn);
int vgpu_devmem_claim(struct vgpu_ctx *ctx, const unsigned long *pfns,
		      unsigned long count, bool write);

/* migrate.c */
int vgpu_migrate(struct vgpu_ctx *ctx, struct hmm_vgpu_migrate *arg, bool to_device);
#else
static inline void vgpu_devmem_init(struct vgpu_device *vdev) {}
static inline void vgpu_devmem_shut(struct vgpu_device *vdev) {}
static inline void vgpu_devmem_close(struct vgpu_ctx *ctx) {}
static inline void vgpu_devmem_fini(struct vgpu_device *vdev) {}
static inline void vgpu_devmem_release(struct vgpu_device *vdev) {}

static inline u64 vgpu_devmem_leaf(struct vgpu_device *vdev, unsigned long pfn)
{
	return 0;
}

static inline bool vgpu_devmem_usable(struct vgpu_ctx *ctx, unsigned long pfn)
{
	return true;
}

static inline int vgpu_devmem_claim(struct vgpu_ctx *ctx, const unsigned long *pfns,
				    unsigned long count, bool write)
{
	return 0;
}

static inline int vgpu_migrate(struct vgpu_ctx *ctx, struct hmm_vgpu_migrate *arg,
			       bool to_device)
{
	return -EOPNOTSUPP;
}
#endif

/* mirror_interval.c */
bool vgpu_mirror_allowed(struct vgpu_ctx *ctx, const struct vm_area_struct *vma,
			 u32 access);
extern const struct vgpu_backend vgpu_backend_interval;
int vgpu_mirror_begin(struct vgpu_ctx *ctx, struct mm_struct *mm);
void vgpu_mirror_end(struct vgpu_ctx *ctx);
int vgpu_mirror_fault(struct vgpu_ctx *ctx, const struct vgpu_fault *fault);

/* backend_mirror.c */
extern const struct vgpu_backend vgpu_backend_mirror;

#endif
