/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/* Made by `cargo run -p vgpu-spec --bin spec-gen`; a test compares it. Do not edit. */
#ifndef HMM_VGPU_REGS_H
#define HMM_VGPU_REGS_H

#include <linux/types.h>

#define VGPU_PCI_VENDOR 0x1234
#define VGPU_PCI_DEVICE 0x4d47
#define WITNESS_PCI_DEVICE 0x4d57

/* GPU registers (BAR0) */
/* Identification, "HMMG". */
#define VGPU_REG_ID 0x0
/* Version of the programming interface. */
#define VGPU_REG_VERSION 0x4
/* Capability bits (CAP_*). */
#define VGPU_REG_CAPS 0x8
/* Number of contexts. */
#define VGPU_REG_CONTEXTS 0xc
/* Number of engines. */
#define VGPU_REG_ENGINES 0x10
/* Number of queues. */
#define VGPU_REG_QUEUES 0x14
/* Number of 4 KiB table pages. */
#define VGPU_REG_TABLE_PAGES 0x18
/* Number of 4 KiB data pages of VRAM (BAR2). */
#define VGPU_REG_DATA_PAGES 0x1c
/* Control: CTRL_ENABLE, CTRL_RESET. */
#define VGPU_REG_CTRL 0x20
/* Interrupt causes pending, bit = vector; a bit stays until it is cleared. */
#define VGPU_REG_IRQ_STATUS 0x28
/* Interrupt causes that may raise a message, bit = vector. */
#define VGPU_REG_IRQ_ENABLE 0x2c
/* What went wrong (ERROR_*). */
#define VGPU_REG_ERROR 0x30
/* Command ring: bus address, low half. 64-byte aligned. */
#define VGPU_REG_CMD_BASE_LO 0x40
/* Command ring: bus address, high half. */
#define VGPU_REG_CMD_BASE_HI 0x44
/* Command ring: log2 of the number of 64-byte commands, 4 to 16. Writing it starts the ring at index 0. */
#define VGPU_REG_CMD_SIZE 0x48
/* Command ring doorbell: the index (not wrapped, modulo 2^32) behind the last command written. A command has its place until it has completed. */
#define VGPU_REG_CMD_TAIL 0x4c
/* The index behind the last command taken from the ring. */
#define VGPU_REG_CMD_HEAD 0x50
/* Bus address, low half, of the u32 where the device writes the index behind the last *completed* command. In order. */
#define VGPU_REG_CMD_DONE_LO 0x58
/* High half of it. 0:0 turns the write-back off. */
#define VGPU_REG_CMD_DONE_HI 0x5c
/* Fault buffer: bus address, low half. 64-byte aligned. */
#define VGPU_REG_FAULT_BASE_LO 0x80
/* Fault buffer: bus address, high half. */
#define VGPU_REG_FAULT_BASE_HI 0x84
/* Fault buffer: log2 of the number of 64-byte entries, 2 to 12. Writing it empties the buffer. */
#define VGPU_REG_FAULT_SIZE 0x88
/* The index (not wrapped) behind the last entry the device wrote. */
#define VGPU_REG_FAULT_PUT 0x8c
/* The index behind the last entry the driver has consumed. */
#define VGPU_REG_FAULT_GET 0x90
/* FAULT_OVERFLOW. */
#define VGPU_REG_FAULT_STATUS 0x94
/* Bus address, low half, of the u32 where the device writes FAULT_PUT. 0:0 turns it off. */
#define VGPU_REG_FAULT_PUT_WB_LO 0x98
/* High half of it. */
#define VGPU_REG_FAULT_PUT_WB_HI 0x9c
/* Table page (its index) that the window shows. Debugging only: slow. */
#define VGPU_REG_WINDOW_PAGE 0xa0
/* How many register accesses were refused (offset, width, alignment, read-only). */
#define VGPU_REG_BAD_ACCESSES 0xa4
/* Queue doorbells, by queue index: bits 0-15 the index behind the last job written, modulo 2^16 (a job has its place until it has completed); bits 16-31 the low half of the queue handle's generation. */
#define VGPU_REG_QUEUE_DOORBELL(n) (0x1000 + 4 * (n))
#define VGPU_BAR_BYTES 0x10000
#define VGPU_WINDOW 0x8000
#define VGPU_ID_VALUE 0x474d4d48
#define VGPU_VERSION_VALUE 0x1
#define VGPU_CTRL_ENABLE 0x1
#define VGPU_CTRL_RESET 0x2
#define VGPU_FAULT_OVERFLOW 0x1
#define VGPU_ERROR_CMD_RING 0x1
#define VGPU_ERROR_FAULT_BUFFER 0x2
#define VGPU_ERROR_QUEUE 0x4
#define VGPU_ERROR_DOORBELL 0x8
#define VGPU_CAP_COHERENT_ATOMICS 0x1
#define VGPU_VECTOR_FAULT 0x0
#define VGPU_VECTOR_COMPLETION 0x1
#define VGPU_VECTOR_EVENT 0x2
#define VGPU_VECTORS 0x3
#define VGPU_MAX_QUEUES 0x100

/* Witness registers (BAR0) */
/* Identification, "HMMW". */
#define WITNESS_REG_ID 0x0
/* Version of the programming interface. */
#define WITNESS_REG_VERSION 0x4
/* Record slots: bus address, low half. 64-byte aligned. */
#define WITNESS_REG_RECORDS_LO 0x8
/* Record slots: bus address, high half. */
#define WITNESS_REG_RECORDS_HI 0xc
/* Number of 64-byte record slots, one a CPU. */
#define WITNESS_REG_SLOTS 0x10
/* A write of n: slot n holds a record. The write returns to the CPU only after the record has been judged. */
#define WITNESS_REG_EVENT 0x14
/* What the host asks of the guest (REQUEST_*); read at each heartbeat, cleared by reading. */
#define WITNESS_REG_REQUEST 0x18
/* How many records were refused. */
#define WITNESS_REG_BAD_RECORDS 0x1c
/* Gate slots: 1 when the task that waits in the slot may go on. */
#define WITNESS_REG_GATE(n) (0x100 + 4 * (n))
#define WITNESS_BAR_BYTES 0x1000
#define WITNESS_ID_VALUE 0x574d4d48
#define WITNESS_VERSION_VALUE 0x1
#define WITNESS_MAX_SLOTS 0x200
#define WITNESS_REQUEST_BLOCKED_TASKS 0x1
#define WITNESS_REQUEST_ALL_CPUS 0x2
#define WITNESS_REQUEST_PANIC 0x4
#define WITNESS_QUESTION_WORDS 0x80
#define WITNESS_QUESTIONS_MOST 0x2a
#define WITNESS_QUESTIONS_STAYS 0x4000000000000000
#define WITNESS_QUESTIONS_ANSWERED 0x8000000000000000
#define WITNESS_MAX_MESSAGE 0x10000
#define WITNESS_GATE_SLOTS 0x40
#define WITNESS_GATE_SITES 0x40
#define WITNESS_GATE_NO_SLOT 0xffff

/* Commands */
/* Nothing. */
#define VGPU_CMD_OP_NOP 0x1
/* Binds a free context: arg0 a tag of the driver's own (a PASID). Result: context handle. Free -> Bound. */
#define VGPU_CMD_OP_CTX_BIND 0x2
/* Sets the context's root: arg0 table page handle, or 0 for none. */
#define VGPU_CMD_OP_CTX_SET_ROOT 0x3
/* Stops the context for good: jobs end with JOB_KILLED, faults are cancelled, its TLB entries go, nothing is translated any more. Bound -> Released. Completes when its accesses have drained. */
#define VGPU_CMD_OP_CTX_RELEASE 0x4
/* Ends the context's jobs with JOB_KILLED and cancels its faults; it stays Bound. Completes when drained. */
#define VGPU_CMD_OP_CTX_KILL 0x5
/* Frees the context. Released -> Free. Everything granted must have been returned and every queue destroyed. */
#define VGPU_CMD_OP_CTX_UNBIND 0x6
/* Grants a VRAM page to the context: arg0 PAGE_TABLE or PAGE_DATA, arg1 its index. A table page is cleared. Result: page handle. */
#define VGPU_CMD_OP_GRANT 0x7
/* Returns a VRAM page: arg0 page handle. */
#define VGPU_CMD_OP_RETURN 0x8
/* Writes table entries: arg0 table page handle, arg1 first | count << 16, arg2 bus address of `count` u64, 8-byte aligned. */
#define VGPU_CMD_OP_WRITE_PTES 0x9
/* Writes one table entry: arg0 table page handle, arg1 index, arg2 the entry. */
#define VGPU_CMD_OP_WRITE_PTE 0xa
/* Clears table entries: arg0 table page handle, arg1 first | count << 16. */
#define VGPU_CMD_OP_CLEAR_PTES 0xb
/* Drops the TLB entries of [arg0, arg1] (arg1 inclusive). Completes when accesses in flight on them have drained. */
#define VGPU_CMD_OP_INVALIDATE 0xc
/* Makes a queue: arg0 bus address of its ring, arg1 log2 of its entries (2 to 10), arg2 bus address of its completion ring, arg3 bus address of its u64 fence or 0. Result: queue handle. */
#define VGPU_CMD_OP_QUEUE_CREATE 0xd
/* Destroys a queue: arg0 queue handle. Jobs not done end with JOB_KILLED. Completes when drained. */
#define VGPU_CMD_OP_QUEUE_DESTROY 0xe
/* Lets a parked access try again: arg0 fault handle, or 0 for all of the context. */
#define VGPU_CMD_OP_FAULT_REPLAY 0xf
/* Ends the job of a parked access with JOB_FAULT: arg0 fault handle, or 0 for all of the context. */
#define VGPU_CMD_OP_FAULT_CANCEL 0x10
/* Raises VECTOR_EVENT when every command before it has completed. */
#define VGPU_CMD_OP_INTERRUPT 0x11
/* `OP_CTX_BIND` arg0: the context is the driver's own, for copies say, and mirrors no address space. */
#define VGPU_CMD_TAG_NONE 0x0
/* `OP_GRANT` arg0: a page for page tables. */
#define VGPU_CMD_PAGE_TABLE 0x1
/* `OP_GRANT` arg0: a data page of BAR2. */
#define VGPU_CMD_PAGE_DATA 0x2
/* Not done yet. */
#define VGPU_CMD_STATUS_PENDING 0x0
/* Done. */
#define VGPU_CMD_STATUS_OK 0x1
/* No such command, or reserved fields set. */
#define VGPU_CMD_STATUS_BAD_COMMAND 0x2
/* A handle is stale or made up. */
#define VGPU_CMD_STATUS_BAD_HANDLE 0x3
/* An argument is out of range. */
#define VGPU_CMD_STATUS_BAD_ARGUMENT 0x4
/* The context or page is not in the state the command needs. */
#define VGPU_CMD_STATUS_BAD_STATE 0x5
/* Nothing free. */
#define VGPU_CMD_STATUS_NO_SPACE 0x6
/* A bus address is not guest memory. */
#define VGPU_CMD_STATUS_BAD_ADDRESS 0x7

/* Jobs and completions */
/* Only writes its fence. */
#define VGPU_JOB_OP_NOP 0x1
/* Writes the pattern (operand0, operand1) to dst, len bytes. */
#define VGPU_JOB_OP_FILL 0x2
/* Copies len bytes from src to dst; the ranges must not overlap. */
#define VGPU_JOB_OP_COPY 0x3
/* Compares src, len bytes, with the pattern (operand0, operand1). Result: words that differ; address: the first. */
#define VGPU_JOB_OP_CHECK 0x4
/* Compares src with dst, len bytes. Result: words that differ; address: the first, in src. */
#define VGPU_JOB_OP_COMPARE 0x5
/* Adds operand0 atomically to the word at dst + i * operand1, for i < len (accesses). Result: sum of the old values. */
#define VGPU_JOB_OP_ATOMIC_ADD 0x6
/* Accesses the word at dst + i * operand1, for i < len: writes operand0 + i with FLAG_WRITE, else reads. Result: sum of what was read. */
#define VGPU_JOB_OP_STRIDED 0x7
/* Accesses len words of [dst, dst + operand1) in the order of a generator seeded by operand0: xors operand2 ^ index into it with FLAG_WRITE, else reads. Result: sum of what was read. */
#define VGPU_JOB_OP_RANDOM 0x8
/* STRIDED, RANDOM: write. */
#define VGPU_JOB_FLAG_WRITE 0x1
/* No interrupt when it is done. */
#define VGPU_JOB_FLAG_NO_IRQ 0x2
/* Completion: done. */
#define VGPU_JOB_OK 0x1
/* Completion: its fault was cancelled; address says where. */
#define VGPU_JOB_FAULT 0x2
/* Completion: ended by CTX_KILL, CTX_RELEASE, QUEUE_DESTROY or a reset. Its interrupt may come after that command has completed. */
#define VGPU_JOB_KILLED 0x3
/* Completion: the job was not well formed. */
#define VGPU_JOB_BAD 0x4
/* Completion: a translation led outside guest memory and VRAM, or the engine has failed. What was to be written may be written in part or not at all. */
#define VGPU_JOB_BUS_ERROR 0x5

/* Page-table entries */
/* The entry is in use; all other bits are ignored while it is clear. */
#define VGPU_PTE_VALID 0x1
/* Leaf: writes are allowed. */
#define VGPU_PTE_WRITE 0x2
/* Leaf: atomics are allowed. */
#define VGPU_PTE_ATOMIC 0x4
/* Level 1 only: this is a 2 MiB leaf. */
#define VGPU_PTE_HUGE 0x8
/* Leaf: the address is an offset in VRAM, and not a bus address. */
#define VGPU_PTE_VRAM 0x10
/* Leaf: address bits 12-51. Directory: table page index << 12. A 2 MiB leaf's address is 2 MiB aligned. */
#define VGPU_PTE_ADDRESS 0xffffffffff000ULL

/* Faults */
/* The access reads. */
#define VGPU_FAULT_ACCESS_READ 0x1
/* The access writes. */
#define VGPU_FAULT_ACCESS_WRITE 0x2
/* The access is atomic. */
#define VGPU_FAULT_ACCESS_ATOMIC 0x4
/* Nothing is mapped there. */
#define VGPU_FAULT_REASON_ABSENT 0x1
/* The leaf lacks the right. */
#define VGPU_FAULT_REASON_RIGHTS 0x2
/* An entry on the way is malformed or leads to a page that is not the context's. */
#define VGPU_FAULT_REASON_MALFORMED 0x3
/* The context has no root. */
#define VGPU_FAULT_REASON_NO_ROOT 0x4

/* Witness records */
/* The module is loaded: arg0 its interface version, arg1 LINUX_VERSION_CODE, arg2 number of CPUs, arg3 1 = fprobe, 2 = kretprobe. */
#define WITNESS_REC_HELLO 0x1
/* A tenth of a second of guest time went by for an ordinary thread: arg0 count, arg1 probes missed so far, arg2 tasks in uninterruptible sleep if known. */
#define WITNESS_REC_HEARTBEAT 0x2
/* An address space is mirrored for the first time: arg0 1 = list notifier, 2 = interval notifier, arg1 physical address of its top page table (mm->pgd). */
#define WITNESS_REC_MM_BEGIN 0x3
/* __mmu_notifier_release has returned for it. */
#define WITNESS_REC_MM_RELEASED 0x4
/* After that, the start of exit's own full-range UNMAP has returned. */
#define WITNESS_REC_MM_UNMAPPED 0x5
/* Its subscriptions are destroyed: the id ends. */
#define WITNESS_REC_MM_END 0x6
/* The running task's address space is mirrored by context handle arg0. */
#define WITNESS_REC_ASSOCIATE 0x7
/* A message of the guest's agent: arg0 bus address, arg1 bytes. */
#define WITNESS_REC_MESSAGE 0x8
/* The module is being unloaded: arg0 probes missed in all. */
#define WITNESS_REC_BYE 0x9
/* A notifier was inserted for it by the running task: arg0 1 = list, 2 = interval. */
#define WITNESS_REC_NOTIFIER_ADDED 0xa
/* A notifier was removed from it: arg0 1 = list, 2 = interval. */
#define WITNESS_REC_NOTIFIER_REMOVED 0xb
/* The module is about to be unloaded, and for a second no task has used it; yet it has not been released. */
#define WITNESS_REC_MM_STRANDED 0xc
/* How the kernel writes its page tables, once, after HELLO: arg0 bits 0-7 paging levels (4 or 5), 8-15 bits of a frame number in a swap offset, 16-23 bits of a swap type, 24-31 lowest bit of a swap offset, arg1 frame mask of an entry (PTE_PFN_MASK), arg2 and arg3 eight types each, a byte each from the lowest, 0xff = not in this kernel: arg2 migration read, migration read exclusive, migration write, device private read, device private write, device exclusive (newer kernels), device exclusive read, device exclusive write (older ones); arg3 hwpoison, marker, swapin error, first number that is no swap file. */
#define WITNESS_REC_CPU_FORMAT 0xd
/* memremap_pages has returned a range of device-private memory: arg0 its first frame number, arg1 its last, arg2 a number that names its owner. */
#define WITNESS_REC_DEVICE_PRIVATE_ADDED 0xe
/* memunmap_pages was called for it, and waits until none of its pages is in use: arguments as in DEVICE_PRIVATE_ADDED. */
#define WITNESS_REC_DEVICE_PRIVATE_REMOVED 0xf
/* The driver gives coherent memory of the device's back (dma_free_attrs is entered): arg0 its bus address, arg1 bytes. */
#define WITNESS_REC_DMA_FREED 0x10
/* The driver has let go of the device, and has not taken back all that it mapped for it (dma_map_page, dma_map_phys): arg0 how many times more it mapped than unmapped. */
#define WITNESS_REC_DMA_LEFT 0x11
/* The start of an invalidation has returned 0 for an address space that a context mirrors: arg0 first address, arg1 last address, arg2 event | flags | slot << 32 (both in the next section), arg3 its number, never reused. */
#define WITNESS_REC_RANGE_START 0x14
/* The end of an invalidation has been entered, of event PROTECTION_VMA only: arguments as in RANGE_START. */
#define WITNESS_REC_RANGE_END 0x15
/* Where it stands whether an invalidation has come to its end: arg0 bus address of an array of u64, arg1 how many, arg2 bus address of as many questions of QUESTION_WORDS u64 each. An invalidation's slot holds its number until its end is entered. While a RANGE_START is judged the host may write questions to its slot's place: how many (with QUESTIONS_STAYS), then for each an address, the page's physical address, a context's handle. The answer (QUESTIONS_ANSWERED) is written over how many there are, and stays there until the next start in the slot is judged. */
#define WITNESS_REC_RANGE_SLOTS 0x16
/* Answer to a question: arg0 address, arg1 physical address, arg2 context's handle, as in the question, arg3 the invalidation's number. The page is not dirty, and dropping it loses what is in it. */
#define WITNESS_REC_PAGE_CLEAN 0x17
/* The running task declares a range of its address space stable: arg0 first address, arg1 last (inclusive). Until its end it stays mapped and can be read and written. */
#define WITNESS_REC_STABLE_BEGIN 0x1e
/* The declaration of arg0 to arg1 ends: arg2 1 = it was kept, 0 = it is taken back. */
#define WITNESS_REC_STABLE_END 0x1f

/* Invalidations in witness records */
/* Event: addresses are unmapped. The numbers are the kernel's enum mmu_notifier_event. */
#define WITNESS_RANGE_UNMAP 0x0
/* Event: pages are replaced. */
#define WITNESS_RANGE_CLEAR 0x1
/* Event: rights of a mapping change. */
#define WITNESS_RANGE_PROTECTION_VMA 0x2
/* Event: pages are write-protected. */
#define WITNESS_RANGE_PROTECTION_PAGE 0x3
/* Event: soft-dirty bits are cleared. */
#define WITNESS_RANGE_SOFT_DIRTY 0x4
/* Event: the address space goes. */
#define WITNESS_RANGE_RELEASE 0x5
/* Event: a driver migrates pages. */
#define WITNESS_RANGE_MIGRATE 0x6
/* Event: a driver takes pages for its device's atomics. */
#define WITNESS_RANGE_EXCLUSIVE 0x7
/* Event: an event that this interface has no number for; taken for CLEAR. */
#define WITNESS_RANGE_OTHER 0xff
/* Flag: callbacks could sleep. */
#define WITNESS_RANGE_BLOCKABLE 0x100
/* Flag: the caller named an owner. */
#define WITNESS_RANGE_OWNED 0x200
/* Flag: a notifier is being removed from the address space, and may not have been called. */
#define WITNESS_RANGE_LEAVING 0x400

/* Gates: witness records, and why a task goes on */
/* A repetition of a scenario begins: arg0 its number, arg1 a bit for each site that there is, arg2 a bit for each that the guest itself opens. */
#define WITNESS_GATE_ARMED 0x40
/* It has ended: arg0 its number. */
#define WITNESS_GATE_DISARMED 0x41
/* A task has come to a gate: arg0 site in bits 0-15, slot in bits 16-31, bit 32: it spins, bit 33: it does not wait; arg3 the function's first argument, or what it returns. */
#define WITNESS_GATE_REACHED 0x42
/* A task goes on: arg0 site in bits 0-15, slot in bits 16-31, why in bits 32-39 (PASS_*). */
#define WITNESS_GATE_PASSED 0x43
/* A task has been asleep in a watched function for two looks: arg0 site, arg3 its thread id. */
#define WITNESS_GATE_BLOCKED 0x44
/* A task that was reported as blocked has left the function: arg0 site, arg3 its thread id. */
#define WITNESS_GATE_LEFT 0x45
/* A task has a role, or none any more: arg3 its thread id, arg0 bit 0: it has ended. */
#define WITNESS_GATE_ROLE 0x46
/* In PASSED: the host let it go on. */
#define WITNESS_GATE_PASS_OPENED 0x0
/* In PASSED: it waited for as many heartbeats as a gate may stay closed. */
#define WITNESS_GATE_PASS_LIMIT 0x1
/* In PASSED: it could not sleep there, and had spun for a millisecond. */
#define WITNESS_GATE_PASS_SPUN 0x2
/* In PASSED: it could not sleep there, and no CPU would have been left to open the gate. */
#define WITNESS_GATE_PASS_NO_CPU 0x3
/* In PASSED: the repetition has ended. */
#define WITNESS_GATE_PASS_OVER 0x4
/* In PASSED: the guest itself opened the gate. */
#define WITNESS_GATE_PASS_LOCAL 0x5

/* Handles: index in bits 0-23, kind in 24-31, generation in 32-63. */
#define VGPU_HANDLE_INDEX(h) ((u32)((h) & 0xffffff))
#define VGPU_HANDLE_KIND(h) ((u32)((h) >> 24) & 0xff)
#define VGPU_HANDLE_GENERATION(h) ((u32)((h) >> 32))
#define VGPU_PTE_LEVELS 4
#define VGPU_PTE_ENTRIES 512
#define VGPU_VA_BITS 48
#define VGPU_HUGE_SHIFT 21

/* Memory formats, little endian. */
struct vgpu_cmd {
	__le16 op;
	__le16 flags;
	__le32 status;
	__le64 ctx;
	__le64 arg[5];
	__le64 result;
};

struct vgpu_job {
	__le16 op;
	__le16 flags;
	__le32 reserved;
	__le64 fence;
	__le64 dst;
	__le64 src;
	__le64 len;
	__le64 operand[3];
};

struct vgpu_completion {
	__le64 fence;
	__le32 status;
	__le32 sequence;
	__le64 result;
	__le64 address;
};

struct vgpu_fault {
	__le64 fault;
	__le64 ctx;
	__le64 va;
	__le32 access;
	__le32 reason;
	__le64 queue;
	__le64 fence;
	__le64 bytes;
	__le32 retries;
	__le32 reserved;
};

struct witness_record {
	__le32 kind;
	__le32 cpu;
	__le64 mm;
	__le64 arg[4];
	__le32 pid;
	__le32 tgid;
	__le64 time_ns;
};

#endif
