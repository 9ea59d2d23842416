// SPDX-License-Identifier: GPL-2.0
/*
 * Interrupts. All handlers are threaded, and look in memory for what there is to
 * do: messages coalesce. The device sends one for each piece of news, whether or
 * not the cause was pending; so a vector with one cause is not cleared, which
 * would cost a register access, tens of microseconds under emulation.
 *
 * The thread of the fault buffer only hands faults out to their contexts, each
 * of which has a work item. It never waits for an address space, so one context
 * that waits long for a page does not keep another's faults from being served.
 */
#include <linux/dma-mapping.h>
#include <linux/interrupt.h>

#include "hmm_vgpu.h"

#define VGPU_FAULT_SHIFT	8
#define VGPU_FAULTS		(1U << VGPU_FAULT_SHIFT)
#define VGPU_FAULT_BYTES	(VGPU_FAULTS * sizeof(struct vgpu_fault))

/* Hands one fault to its context. */
static void vgpu_irq_fault(struct vgpu_device *vdev, const struct vgpu_fault *fault)
{
	u64 handle = le64_to_cpu(fault->ctx);
	struct vgpu_ctx *ctx = vgpu_ctx_get_index(vdev, VGPU_HANDLE_INDEX(handle));

	if (!ctx)
		return;
	/*
	 * Another generation: that context is gone, and its fault with it. To
	 * answer it would name a handle that is not live any more.
	 */
	if (ctx->handle == handle)
		vgpu_fault_queue(ctx, fault);
	vgpu_ctx_put(ctx);
}

static void vgpu_irq_faults(struct vgpu_device *vdev)
{
	struct vgpu_fault_ring *ring = &vdev->faults;
	/* What the device may still take for our index while it wrote @put. */
	u32 told = ring->get;
	bool full = false;
	bool any = false;

	for (;;) {
		u32 put = le32_to_cpu(READ_ONCE(*ring->put));

		/* The entries were written before the index. */
		dma_rmb();
		if (put - told >= VGPU_FAULTS)
			full = true;
		if (put == ring->get)
			break;
		any = true;
		told = ring->get;
		while (ring->get != put && ring->get - told < VGPU_FAULTS)
			vgpu_irq_fault(vdev, &ring->entry[ring->get++ & (VGPU_FAULTS - 1)]);
		vgpu_write(vdev, VGPU_REG_FAULT_GET, ring->get);
	}

	/*
	 * An overflow needs a full buffer, or comes as an interrupt by itself.
	 * The device writes the entries it has held back once the flag is cleared.
	 */
	if (full || !any) {
		u32 status = vgpu_read(vdev, VGPU_REG_FAULT_STATUS);

		if (status != ~0U && status & VGPU_FAULT_OVERFLOW)
			vgpu_write(vdev, VGPU_REG_FAULT_STATUS, VGPU_FAULT_OVERFLOW);
	}
}

static void vgpu_irq_completions(struct vgpu_device *vdev)
{
	unsigned int i, j;

	for (i = 0; i < vdev->contexts; i++) {
		struct vgpu_ctx *ctx;

		if (!READ_ONCE(vdev->ctx[i]))
			continue;
		ctx = vgpu_ctx_get_index(vdev, i);
		if (!ctx)
			continue;
		for (j = 0; j < HMM_VGPU_QUEUES; j++)
			if (vgpu_queue_busy(&ctx->queue[j]))
				vgpu_queue_scan(&ctx->queue[j]);
		vgpu_ctx_put(ctx);
	}
}

static void vgpu_irq_events(struct vgpu_device *vdev)
{
	u32 error = vgpu_read(vdev, VGPU_REG_ERROR);

	if (!error)
		return;
	dev_err_ratelimited(&vdev->pdev->dev, "device error %#x\n", error);
	vgpu_write(vdev, VGPU_REG_ERROR, error);
}

static irqreturn_t vgpu_irq_thread(int irq, void *data)
{
	struct vgpu_device *vdev = data;
	u32 causes = 0;
	int i;

	/* With fewer vectors than causes, cause n arrives as n modulo their number. */
	for (i = 0; i < VGPU_VECTORS; i++)
		if (pci_irq_vector(vdev->pdev, i % vdev->vectors) == irq)
			causes |= BIT(i);
	if (vdev->vectors < VGPU_VECTORS) {
		causes &= vgpu_read(vdev, VGPU_REG_IRQ_STATUS);
		/* Cleared before we look: what comes later sends again. */
		vgpu_write(vdev, VGPU_REG_IRQ_STATUS, causes);
	}

	if (causes & BIT(VGPU_VECTOR_FAULT))
		vgpu_irq_faults(vdev);
	if (causes & BIT(VGPU_VECTOR_COMPLETION))
		vgpu_irq_completions(vdev);
	if (causes & BIT(VGPU_VECTOR_EVENT))
		vgpu_irq_events(vdev);
	return IRQ_HANDLED;
}

int vgpu_irq_init(struct vgpu_device *vdev)
{
	struct vgpu_fault_ring *ring = &vdev->faults;
	struct pci_dev *pdev = vdev->pdev;
	int ret = -ENOMEM;
	int i;

	ring->entry = dma_alloc_coherent(&pdev->dev, VGPU_FAULT_BYTES, &ring->dma,
					 GFP_KERNEL);
	if (!ring->entry)
		return ret;
	ring->put = dma_alloc_coherent(&pdev->dev, sizeof(*ring->put),
				       &ring->put_dma, GFP_KERNEL);
	if (!ring->put)
		goto err_entry;

	ret = pci_alloc_irq_vectors(pdev, 1, VGPU_VECTORS, PCI_IRQ_MSIX | PCI_IRQ_MSI);
	if (ret < 0)
		goto err_put;
	vdev->vectors = ret;
	for (i = 0; i < vdev->vectors; i++) {
		ret = request_threaded_irq(pci_irq_vector(pdev, i), NULL,
					   vgpu_irq_thread, IRQF_ONESHOT,
					   vdev->name, vdev);
		if (ret)
			goto err_irq;
	}
	return 0;

err_irq:
	while (i--)
		free_irq(pci_irq_vector(pdev, i), vdev);
	pci_free_irq_vectors(pdev);
err_put:
	dma_free_coherent(&pdev->dev, sizeof(*ring->put), ring->put, ring->put_dma);
err_entry:
	dma_free_coherent(&pdev->dev, VGPU_FAULT_BYTES, ring->entry, ring->dma);
	return ret;
}

/* Tells the device, just reset, where the fault buffer is, and lets it interrupt. */
void vgpu_irq_start(struct vgpu_device *vdev)
{
	struct vgpu_fault_ring *ring = &vdev->faults;

	vgpu_write64(vdev, VGPU_REG_FAULT_BASE_LO, ring->dma);
	vgpu_write64(vdev, VGPU_REG_FAULT_PUT_WB_LO, ring->put_dma);
	vgpu_write(vdev, VGPU_REG_FAULT_SIZE, VGPU_FAULT_SHIFT);
	vgpu_write(vdev, VGPU_REG_IRQ_ENABLE, BIT(VGPU_VECTORS) - 1);
}

/* No handler runs any more, and none will. The device may still write to memory. */
void vgpu_irq_stop(struct vgpu_device *vdev)
{
	int i;

	vgpu_write(vdev, VGPU_REG_IRQ_ENABLE, 0);
	for (i = 0; i < vdev->vectors; i++)
		free_irq(pci_irq_vector(vdev->pdev, i), vdev);
	pci_free_irq_vectors(vdev->pdev);
}

void vgpu_irq_fini(struct vgpu_device *vdev)
{
	struct vgpu_fault_ring *ring = &vdev->faults;
	struct device *dev = &vdev->pdev->dev;

	dma_free_coherent(dev, sizeof(*ring->put), ring->put, ring->put_dma);
	dma_free_coherent(dev, VGPU_FAULT_BYTES, ring->entry, ring->dma);
}
