// SPDX-License-Identifier: GPL-2.0
/*
 * The channel to the host: record slots in memory, and the register whose
 * write returns when the host has judged a record.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/dma-mapping.h>
#include <linux/io.h>
#include <linux/kernel.h>
#include <linux/ktime.h>
#include <linux/pci.h>
#include <linux/sched.h>
#include <linux/smp.h>

#include "hmm_vgpu_regs.h"
#include "witness.h"

static struct {
	void __iomem *regs;
	struct witness_record *slots;
	dma_addr_t slots_dma;
} channel;

static size_t slots_bytes(void)
{
	return nr_cpu_ids * sizeof(struct witness_record);
}

/**
 * witness_channel_open - make the device ready for reports
 * @pdev: the witness's function; its BARs are requested and it is bus master
 *
 * Return: 0 or a negative error.
 */
int witness_channel_open(struct pci_dev *pdev)
{
	u32 id, version;
	int ret;

	BUILD_BUG_ON(sizeof(struct witness_record) != 64);

	if (nr_cpu_ids > WITNESS_MAX_SLOTS) {
		pci_err(pdev, "%u possible CPUs are more than the %u record slots; boot with a smaller possible_cpus=\n",
			nr_cpu_ids, WITNESS_MAX_SLOTS);
		return -E2BIG;
	}

	channel.regs = pci_iomap(pdev, 0, WITNESS_BAR_BYTES);
	if (!channel.regs)
		return -ENOMEM;

	id = readl(channel.regs + WITNESS_REG_ID);
	version = readl(channel.regs + WITNESS_REG_VERSION);
	if (id != WITNESS_ID_VALUE || version != WITNESS_VERSION_VALUE) {
		pci_err(pdev, "not a witness of version %u: id %#x, version %u\n",
			WITNESS_VERSION_VALUE, id, version);
		ret = -ENODEV;
		goto unmap;
	}

	channel.slots = dma_alloc_coherent(&pdev->dev, slots_bytes(),
					   &channel.slots_dma, GFP_KERNEL);
	if (!channel.slots) {
		ret = -ENOMEM;
		goto unmap;
	}

	writel(lower_32_bits(channel.slots_dma),
	       channel.regs + WITNESS_REG_RECORDS_LO);
	writel(upper_32_bits(channel.slots_dma),
	       channel.regs + WITNESS_REG_RECORDS_HI);
	writel(nr_cpu_ids, channel.regs + WITNESS_REG_SLOTS);
	return 0;

unmap:
	pci_iounmap(pdev, channel.regs);
	channel.regs = NULL;
	return ret;
}

/**
 * witness_channel_close - take the memory back from the device
 * @pdev: as it was opened with
 *
 * Nobody reports any more.
 */
void witness_channel_close(struct pci_dev *pdev)
{
	writel(0, channel.regs + WITNESS_REG_SLOTS);
	writel(0, channel.regs + WITNESS_REG_RECORDS_LO);
	writel(0, channel.regs + WITNESS_REG_RECORDS_HI);
	dma_free_coherent(&pdev->dev, slots_bytes(), channel.slots,
			  channel.slots_dma);
	pci_iounmap(pdev, channel.regs);
	channel.slots = NULL;
	channel.regs = NULL;
}

/**
 * witness_report - report a record and wait until it has been judged
 * @kind: WITNESS_REC_*
 * @mm: address-space id or 0
 * @arg0: by kind
 * @arg1: by kind
 * @arg2: by kind
 * @arg3: by kind
 *
 * From any context but an NMI. A CPU's slot is its own while its interrupts are
 * off, and the host has read it when the register write is over.
 */
void witness_report(u32 kind, u64 mm, u64 arg0, u64 arg1, u64 arg2, u64 arg3)
{
	struct witness_record *record;
	unsigned long flags;
	unsigned int cpu;

	local_irq_save(flags);
	cpu = smp_processor_id();
	record = &channel.slots[cpu];
	*record = (struct witness_record) {
		.kind = cpu_to_le32(kind),
		.cpu = cpu_to_le32(cpu),
		.mm = cpu_to_le64(mm),
		.arg = {
			cpu_to_le64(arg0), cpu_to_le64(arg1),
			cpu_to_le64(arg2), cpu_to_le64(arg3),
		},
		.pid = cpu_to_le32(task_pid_nr(current)),
		.tgid = cpu_to_le32(task_tgid_nr(current)),
		.time_ns = cpu_to_le64(ktime_get_ns()),
	};
	/* writel() orders the record before itself. */
	writel(cpu, channel.regs + WITNESS_REG_EVENT);
	local_irq_restore(flags);
}

/**
 * witness_requests - what the host asks of the guest
 *
 * Return: WITNESS_REQUEST_* bits, which are cleared by this.
 */
u32 witness_requests(void)
{
	u32 bits = readl(channel.regs + WITNESS_REG_REQUEST);

	/* All ones: there is no device behind the address any more. */
	return bits == U32_MAX ? 0 : bits;
}

/**
 * witness_gate - may the task in a slot go on?
 * @slot: the slot
 *
 * Also if there is no device any more that could say so.
 */
bool witness_gate(unsigned int slot)
{
	return readl(channel.regs + WITNESS_REG_GATE(slot));
}
