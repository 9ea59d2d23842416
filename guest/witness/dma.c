// SPDX-License-Identifier: GPL-2.0
/*
 * Memory of the device under test, as the kernel's DMA API has it: coherent
 * memory that its driver gives back, which the device may still have, and what
 * is still mapped for the device when its driver lets go of it.
 *
 * Mappings are counted only: there are as many of them as leaves. Each has to be
 * taken back before the driver's unbinding is over, as CONFIG_DMA_API_DEBUG asks
 * at the same notification (dma_debug_device_change() in kernel/dma/debug.c).
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/atomic.h>
#include <linux/device.h>
#include <linux/dma-mapping.h>
#include <linux/kernel.h>
#include <linux/pci.h>
#include <linux/printk.h>
#include <linux/tracepoint.h>
#include <linux/version.h>

#include "hmm_vgpu_regs.h"
#include "probe.h"
#include "witness.h"

static bool started;
/* Mapped more often than unmapped, since the first of those bound was. */
static atomic64_t mapped;
/* Devices whose driver has come since the witness looks. */
static atomic_t bound;
/* Somebody has asked whether what is mapped need be unmapped. */
static bool may_skip;
static u64 missed_before;

static bool is_tested(const struct device *dev)
{
	const struct pci_dev *pdev;

	if (!dev || !dev_is_pci(dev))
		return false;
	pdev = to_pci_dev(dev);
	return pdev->vendor == VGPU_PCI_VENDOR &&
	       pdev->device == VGPU_PCI_DEVICE;
}

static bool counts(const struct device *dev)
{
	return READ_ONCE(started) && is_tested(dev);
}

/* dma_free_attrs(dev, size, cpu_addr, dma_handle, attrs) */
static bool free_entry(struct witness_call *call, unsigned long dev,
		       unsigned long size)
{
	if (counts((const struct device *)dev))
		witness_report(WITNESS_REC_DMA_FREED, 0, call->arg3, size, 0, 0);
	return false;
}

static void no_exit(struct witness_call *call, unsigned long result)
{
}

#if defined(CONFIG_TRACEPOINTS) && LINUX_VERSION_CODE >= KERNEL_VERSION(6, 12, 0)
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 16, 0)
/*
 * dma_need_unmap(dev) (Linux 6.16): whoever asks need not unmap if the answer is
 * no, as it is without an IOMMU. hmm_dma_unmap_pfn() does so.
 */
static bool need_entry(struct witness_call *call, unsigned long dev,
		       unsigned long unused)
{
	if (counts((const struct device *)dev))
		WRITE_ONCE(may_skip, true);
	return false;
}
#endif

/*
 * Tracepoints (Linux 6.12): cheap, and none is missed. Whatever maps pages by
 * way of the DMA API comes by there, hmm_dma_map_pfn() included. They were
 * dma_map_page and dma_unmap_page until 6.17, with the same arguments.
 */
static struct witness_probe probes[] = {
	{ "dma_free_attrs", free_entry, no_exit },
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 16, 0)
	{ "dma_need_unmap", need_entry, no_exit },
#endif
};

static void trace_map(void *data, struct device *dev, phys_addr_t phys,
		      dma_addr_t dma, size_t size,
		      enum dma_data_direction dir, unsigned long attrs)
{
	if (dma != DMA_MAPPING_ERROR && counts(dev))
		atomic64_inc(&mapped);
}

static void trace_unmap(void *data, struct device *dev, dma_addr_t dma,
			size_t size, enum dma_data_direction dir,
			unsigned long attrs)
{
	if (counts(dev))
		atomic64_dec(&mapped);
}

static struct {
	const char *name;
	const char *old_name;
	void *function;
	struct tracepoint *tp;
	bool registered;
} traces[] = {
	{ "dma_map_phys", "dma_map_page", trace_map },
	{ "dma_unmap_phys", "dma_unmap_page", trace_unmap },
};

static void find_trace(struct tracepoint *tp, void *unused)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(traces); i++)
		if (!strcmp(tp->name, traces[i].name) ||
		    (!traces[i].tp && !strcmp(tp->name, traces[i].old_name)))
			traces[i].tp = tp;
}

static void traces_unregister(void)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(traces); i++) {
		if (traces[i].registered)
			tracepoint_probe_unregister(traces[i].tp,
						    traces[i].function, NULL);
		traces[i].registered = false;
	}
	tracepoint_synchronize_unregister();
}

static int traces_register(void)
{
	unsigned int i;
	int ret;

	for_each_kernel_tracepoint(find_trace, NULL);
	for (i = 0; i < ARRAY_SIZE(traces); i++) {
		ret = -ENOENT;
		if (traces[i].tp)
			ret = tracepoint_probe_register(traces[i].tp,
							traces[i].function,
							NULL);
		if (ret) {
			pr_err("cannot attach to the tracepoint %s: error %d\n",
			       traces[i].name, ret);
			traces_unregister();
			return ret;
		}
		traces[i].registered = true;
	}
	return 0;
}
#else
static bool map_entry(struct witness_call *call, unsigned long dev,
		      unsigned long page)
{
	return counts((const struct device *)dev);
}

static void map_exit(struct witness_call *call, unsigned long result)
{
	if ((dma_addr_t)result != DMA_MAPPING_ERROR)
		atomic64_inc(&mapped);
}

static bool unmap_entry(struct witness_call *call, unsigned long dev,
			unsigned long dma)
{
	if (counts((const struct device *)dev))
		atomic64_dec(&mapped);
	return false;
}

static struct witness_probe probes[] = {
	{ "dma_free_attrs", free_entry, no_exit },
	{ "dma_map_page_attrs", map_entry, map_exit },
	{ "dma_unmap_page_attrs", unmap_entry, no_exit },
};

static int traces_register(void)
{
	return 0;
}

static void traces_unregister(void)
{
}
#endif

/*
 * A driver that was there before the witness has mapped what nobody has counted:
 * of it nothing is said.
 */
static int device_changes(struct notifier_block *nb, unsigned long event,
			  void *data)
{
	s64 left;

	if (!counts(data))
		return NOTIFY_DONE;
	switch (event) {
	case BUS_NOTIFY_BIND_DRIVER:
		if (atomic_inc_return(&bound) != 1)
			break;
		atomic64_set(&mapped, 0);
		WRITE_ONCE(may_skip, false);
		break;
	case BUS_NOTIFY_DRIVER_NOT_BOUND:
	case BUS_NOTIFY_UNBOUND_DRIVER:
		if (atomic_dec_if_positive(&bound))
			break;
		left = atomic64_read(&mapped);
		if (left > 0 && !READ_ONCE(may_skip) && !dma_missed())
			witness_report(WITNESS_REC_DMA_LEFT, 0, left, 0, 0, 0);
		break;
	}
	return NOTIFY_DONE;
}

static struct notifier_block device_notifier = {
	.notifier_call = device_changes,
};

/**
 * dma_register - register the probes; they report and count nothing yet
 *
 * Return: 0, or the error of the first that could not be registered.
 */
int dma_register(void)
{
	unsigned int i;
	int ret;

	for (i = 0; i < ARRAY_SIZE(probes); i++) {
		ret = witness_probe_register(&probes[i]);
		if (ret)
			goto unregister;
	}
	ret = traces_register();
	if (ret)
		goto unregister;
	ret = bus_register_notifier(&pci_bus_type, &device_notifier);
	if (!ret)
		return 0;
	traces_unregister();
unregister:
	while (i--)
		witness_probe_unregister(&probes[i]);
	return ret;
}

/**
 * dma_start - let the probes report and count
 */
void dma_start(void)
{
	WRITE_ONCE(started, true);
}

/**
 * dma_unregister - unregister the probes; nothing happens if they are not
 *
 * When it returns, none runs nor will run.
 */
void dma_unregister(void)
{
	unsigned int i;

	WRITE_ONCE(started, false);
	bus_unregister_notifier(&pci_bus_type, &device_notifier);
	traces_unregister();
	for (i = 0; i < ARRAY_SIZE(probes); i++)
		missed_before += witness_probe_unregister(&probes[i]);
}

/**
 * dma_missed - calls that may have gone by without a report
 */
u64 dma_missed(void)
{
	u64 missed = missed_before;
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(probes); i++)
		missed += witness_probe_missed(&probes[i]);
	return missed;
}
