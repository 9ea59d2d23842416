// SPDX-License-Identifier: GPL-2.0
/*
 * The module and its PCI function.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/dma-mapping.h>
#include <linux/idr.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/slab.h>

#include "hmm_vgpu.h"

/* What fits a handle; and nothing the device says makes us allocate more. */
#define VGPU_MAX_CONTEXTS	4096
#define VGPU_MAX_TABLE_PAGES	(1U << 20)

static DEFINE_IDA(vgpu_ids);

/*
 * Faults sleep, for long at times, and each context has one item: so unbound.
 * A job stands still until its fault is served: so high priority. Nothing in
 * reclaim waits for a fault: so no rescuer.
 */
struct workqueue_struct *vgpu_fault_wq;

static char *backend = "interval";
module_param(backend, charp, 0444);
MODULE_PARM_DESC(backend, "interval: a notifier for each context; mirror: the mirror layer");

static char *mirror_policy = "read-held";
module_param(mirror_policy, charp, 0444);
MODULE_PARM_DESC(mirror_policy, "of backend=mirror: drop-lock, read-held, srcu, srcu-nowait");

static const struct vgpu_backend *const vgpu_backends[] = {
	&vgpu_backend_interval,
	&vgpu_backend_mirror,
};

const struct vgpu_backend *vgpu_backend;

static void vgpu_device_free(struct kref *ref)
{
	struct vgpu_device *vdev = container_of(ref, struct vgpu_device, ref);

	bitmap_free(vdev->table_map);
	kvfree(vdev->ctx);
	vgpu_devmem_release(vdev);
	kfree(vdev);
}

void vgpu_device_put(struct vgpu_device *vdev)
{
	kref_put(&vdev->ref, vgpu_device_free);
}

static struct vgpu_device *vgpu_device_alloc(struct pci_dev *pdev)
{
	struct vgpu_device *vdev = kzalloc(sizeof(*vdev), GFP_KERNEL);

	if (!vdev)
		return NULL;
	vdev->id = ida_alloc(&vgpu_ids, GFP_KERNEL);
	if (vdev->id < 0) {
		kfree(vdev);
		return NULL;
	}
	if (vdev->id)
		snprintf(vdev->name, sizeof(vdev->name), HMM_VGPU_DEVICE "%d", vdev->id);
	else
		snprintf(vdev->name, sizeof(vdev->name), HMM_VGPU_DEVICE);

	kref_init(&vdev->ref);
	vdev->pdev = pdev;
	spin_lock_init(&vdev->table_lock);
	spin_lock_init(&vdev->ctx_lock);
	mutex_init(&vdev->files_lock);
	INIT_LIST_HEAD(&vdev->files);
	vdev->misc.minor = MISC_DYNAMIC_MINOR;
	vdev->misc.name = vdev->name;
	vdev->misc.fops = &vgpu_fops;
	vdev->misc.parent = &pdev->dev;
	return vdev;
}

/* Checks that this is the device we know, and how big it is. */
static int vgpu_identify(struct vgpu_device *vdev)
{
	struct device *dev = &vdev->pdev->dev;

	if (vgpu_read(vdev, VGPU_REG_ID) != VGPU_ID_VALUE ||
	    vgpu_read(vdev, VGPU_REG_VERSION) != VGPU_VERSION_VALUE) {
		dev_err(dev, "not the device or not the version this driver knows\n");
		return -ENODEV;
	}
	vdev->contexts = vgpu_read(vdev, VGPU_REG_CONTEXTS);
	vdev->table_pages = vgpu_read(vdev, VGPU_REG_TABLE_PAGES);
	vdev->atomics = vgpu_read(vdev, VGPU_REG_CAPS) & VGPU_CAP_COHERENT_ATOMICS;
	if (!vdev->contexts || vdev->contexts > VGPU_MAX_CONTEXTS ||
	    !vdev->table_pages || vdev->table_pages > VGPU_MAX_TABLE_PAGES) {
		dev_err(dev, "%u contexts and %u table pages make no sense\n",
			vdev->contexts, vdev->table_pages);
		return -ENODEV;
	}

	vdev->ctx = kvcalloc(vdev->contexts, sizeof(*vdev->ctx), GFP_KERNEL);
	vdev->table_map = bitmap_zalloc(vdev->table_pages, GFP_KERNEL);
	return vdev->ctx && vdev->table_map ? 0 : -ENOMEM;
}

static int vgpu_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct vgpu_device *vdev = vgpu_device_alloc(pdev);
	int ret;

	if (!vdev)
		return -ENOMEM;
	ret = pci_enable_device_mem(pdev);
	if (ret)
		goto err_device;
	ret = pci_request_regions(pdev, vdev->name);
	if (ret)
		goto err_disable;
	ret = dma_set_mask_and_coherent(&pdev->dev, DMA_BIT_MASK(64));
	if (ret)
		goto err_regions;
	vdev->regs = pci_iomap(pdev, 0, VGPU_BAR_BYTES);
	ret = -ENOMEM;
	if (!vdev->regs)
		goto err_regions;

	/* Whatever ran before us left nothing behind. */
	vgpu_write(vdev, VGPU_REG_CTRL, VGPU_CTRL_RESET);
	ret = vgpu_identify(vdev);
	if (ret)
		goto err_unmap;
	ret = vgpu_cmd_init(vdev);
	if (ret)
		goto err_unmap;
	pci_set_master(pdev);
	ret = vgpu_irq_init(vdev);
	if (ret)
		goto err_cmd;

	vgpu_cmd_start(vdev);
	vgpu_irq_start(vdev);
	vgpu_write(vdev, VGPU_REG_CTRL, VGPU_CTRL_ENABLE);
	vgpu_devmem_init(vdev);

	pci_set_drvdata(pdev, vdev);
	ret = misc_register(&vdev->misc);
	if (ret)
		goto err_devmem;
	dev_info(&pdev->dev, "/dev/%s: %u contexts, %u table pages, %d interrupt vectors\n",
		 vdev->name, vdev->contexts, vdev->table_pages, vdev->vectors);
	return 0;

err_devmem:
	vgpu_devmem_fini(vdev);
	vgpu_write(vdev, VGPU_REG_CTRL, 0);
	vgpu_irq_stop(vdev);
	vgpu_irq_fini(vdev);
err_cmd:
	pci_clear_master(pdev);
	vgpu_cmd_fini(vdev);
err_unmap:
	pci_iounmap(pdev, vdev->regs);
err_regions:
	pci_release_regions(pdev);
err_disable:
	pci_disable_device(pdev);
err_device:
	ida_free(&vgpu_ids, vdev->id);
	vgpu_device_put(vdev);
	return ret;
}

/*
 * With files open this is an unbind through sysfs, or the device was pulled out:
 * the files stay, and answer ENODEV.
 */
static void vgpu_remove(struct pci_dev *pdev)
{
	struct vgpu_device *vdev = pci_get_drvdata(pdev);

	misc_deregister(&vdev->misc);
	ida_free(&vgpu_ids, vdev->id);
	vgpu_files_detach(vdev);

	vgpu_devmem_fini(vdev);
	vgpu_irq_stop(vdev);
	/* A device that takes no commands cannot be given back what it has granted. */
	vgpu_write(vdev, VGPU_REG_CTRL, vgpu_is_dead(vdev) ? VGPU_CTRL_RESET : 0);
	vgpu_cmd_kill(vdev, NULL);
	vgpu_irq_fini(vdev);
	vgpu_cmd_fini(vdev);
	pci_iounmap(pdev, vdev->regs);
	pci_release_regions(pdev);
	pci_disable_device(pdev);
	vgpu_device_put(vdev);
}

/*
 * A reset makes the device forget everything it was told. Contexts have users,
 * who cannot be moved to new ones behind their backs: so the device counts as
 * dead, every wait ends, and binding the driver anew begins from scratch. What
 * memory it has is brought home before.
 */
static void vgpu_reset_prepare(struct pci_dev *pdev)
{
	struct vgpu_device *vdev = pci_get_drvdata(pdev);

	vgpu_devmem_shut(vdev);
	vgpu_cmd_kill(vdev, "the device is being reset");
}

static const struct pci_error_handlers vgpu_err_handlers = {
	.reset_prepare = vgpu_reset_prepare,
};

static const struct pci_device_id vgpu_pci_ids[] = {
	{ PCI_DEVICE(VGPU_PCI_VENDOR, VGPU_PCI_DEVICE) },
	{ }
};
MODULE_DEVICE_TABLE(pci, vgpu_pci_ids);

static struct pci_driver vgpu_pci_driver = {
	.name = "hmm_vgpu",
	.id_table = vgpu_pci_ids,
	.probe = vgpu_probe,
	.remove = vgpu_remove,
	.err_handler = &vgpu_err_handlers,
};

static int __init vgpu_backend_init(void)
{
	unsigned int i;
	int ret = 0;

	for (i = 0; i < ARRAY_SIZE(vgpu_backends); i++)
		if (!strcmp(vgpu_backends[i]->name, backend))
			vgpu_backend = vgpu_backends[i];
	if (!vgpu_backend) {
		pr_err("there is no backend %s\n", backend);
		return -EINVAL;
	}
	if (vgpu_backend->init)
		ret = vgpu_backend->init(mirror_policy);
	if (ret == -EINVAL)
		pr_err("backend %s has no policy %s\n", backend, mirror_policy);
	return ret;
}

static void vgpu_backend_exit(void)
{
	if (vgpu_backend->exit)
		vgpu_backend->exit();
}

static int __init vgpu_init(void)
{
	int ret = vgpu_backend_init();

	if (ret)
		return ret;
	vgpu_fault_wq = alloc_workqueue("hmm_vgpu_fault", WQ_UNBOUND | WQ_HIGHPRI, 0);
	if (!vgpu_fault_wq) {
		ret = -ENOMEM;
		goto err_backend;
	}
	ret = pci_register_driver(&vgpu_pci_driver);
	if (ret)
		goto err_queue;
	return 0;

err_queue:
	destroy_workqueue(vgpu_fault_wq);
err_backend:
	vgpu_backend_exit();
	return ret;
}
module_init(vgpu_init);

static void __exit vgpu_exit(void)
{
	pci_unregister_driver(&vgpu_pci_driver);
	destroy_workqueue(vgpu_fault_wq);
	vgpu_backend_exit();
	ida_destroy(&vgpu_ids);
}
module_exit(vgpu_exit);

MODULE_DESCRIPTION("Reference driver of the hmm-testbench virtual GPU");
MODULE_AUTHOR("hmm-testbench");
MODULE_LICENSE("GPL");
