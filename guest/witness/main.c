// SPDX-License-Identifier: GPL-2.0
/*
 * The witness: tells the host what the kernel's mmu_notifier core does, apart
 * from the driver under test and from the device it drives.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/cpumask.h>
#include <linux/dma-mapping.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/version.h>

#include "compat.h"
#include "hmm_vgpu_regs.h"
#include "witness.h"

/* What the last attempt to bind a device came to. */
static int bind_result = -ENODEV;
/* There is one witness: the probes and the table are the kernel's, not its. */
static bool bound;

static int device_enable(struct pci_dev *pdev)
{
	int ret;

	ret = pci_enable_device_mem(pdev);
	if (ret)
		return ret;
	ret = dma_set_mask_and_coherent(&pdev->dev, DMA_BIT_MASK(64));
	if (ret)
		goto disable;
	ret = pci_request_region(pdev, 0, KBUILD_MODNAME);
	if (ret)
		goto disable;
	pci_set_master(pdev);
	return 0;

disable:
	pci_disable_device(pdev);
	return ret;
}

static void device_disable(struct pci_dev *pdev)
{
	pci_clear_master(pdev);
	pci_release_region(pdev, 0);
	pci_disable_device(pdev);
}

static int witness_start(struct pci_dev *pdev)
{
	int ret;

	if (bound) {
		pci_err(pdev, "there is a witness already\n");
		return -EBUSY;
	}

	ret = device_enable(pdev);
	if (ret)
		return ret;
	ret = witness_channel_open(pdev);
	if (ret)
		goto disable;
	ret = mm_table_open();
	if (ret)
		goto close;
	ret = ranges_open(pdev);
	if (ret)
		goto free;
	ret = moments_register();
	if (ret)
		goto ranges;

	/* From here on the host hears of it: what fails says BYE. */
	witness_report(WITNESS_REC_HELLO, 0, WITNESS_VERSION_VALUE,
		       LINUX_VERSION_CODE, num_online_cpus(),
		       WITNESS_MECHANISM);
	format_report();
	ranges_tell();
	moments_start();
	ret = heartbeat_start();
	if (ret)
		goto bye;
	gates_open();
	ret = chardev_register(pdev);
	if (ret)
		goto stop;
	bound = true;
	return 0;

stop:
	gates_close();
	heartbeat_stop();
bye:
	moments_unregister();
	witness_report(WITNESS_REC_BYE, 0, moments_missed(), 0, 0, 0);
ranges:
	ranges_close(pdev);
free:
	mm_table_close();
close:
	witness_channel_close(pdev);
disable:
	device_disable(pdev);
	return ret;
}

static int witness_bind(struct pci_dev *pdev, const struct pci_device_id *id)
{
	bind_result = witness_start(pdev);
	return bind_result;
}

static void witness_unbind(struct pci_dev *pdev)
{
	chardev_unregister(pdev);
	gates_close();
	heartbeat_stop();
	mm_table_report_stranded();
	moments_unregister();
	witness_report(WITNESS_REC_BYE, 0, moments_missed(), 0, 0, 0);
	ranges_close(pdev);
	mm_table_close();
	witness_channel_close(pdev);
	device_disable(pdev);
	bound = false;
}

static const struct pci_device_id witness_ids[] = {
	{ PCI_DEVICE(VGPU_PCI_VENDOR, WITNESS_PCI_DEVICE) },
	{ }
};
MODULE_DEVICE_TABLE(pci, witness_ids);

static struct pci_driver witness_driver = {
	.name = KBUILD_MODNAME,
	.id_table = witness_ids,
	.probe = witness_bind,
	.remove = witness_unbind,
	/* So that witness_init() knows what became of it. */
	.driver.probe_type = PROBE_FORCE_SYNCHRONOUS,
};

/*
 * A driver's module would load without its device, or with one that it cannot
 * drive. A witness that sees nothing must not look like one that sees.
 */
static int __init witness_init(void)
{
	int ret;

	requests_allow();
	ret = pci_register_driver(&witness_driver);
	if (ret)
		return ret;
	if (!bound) {
		pr_err("no witness was bound: error %d\n", bind_result);
		pci_unregister_driver(&witness_driver);
		return bind_result;
	}
	return 0;
}
module_init(witness_init);

static void __exit witness_exit(void)
{
	pci_unregister_driver(&witness_driver);
}
module_exit(witness_exit);

MODULE_DESCRIPTION("Reports the moments of the mmu_notifier core to hmm-testbench");
MODULE_LICENSE("GPL");
