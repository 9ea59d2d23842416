// SPDX-License-Identifier: GPL-2.0
/*
 * /dev/hmm_witness: messages of the guest's agent to the host, and programs
 * that say which context mirrors them.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/compat.h>
#include <linux/dma-mapping.h>
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/sched.h>
#include <linux/uaccess.h>

#include "hmm_vgpu_regs.h"
#include "hmm_witness_uapi.h"
#include "witness.h"

/*
 * Guards the buffer against other writers, and against the device going away
 * under files that stay open: without a buffer there is no device.
 */
static DEFINE_MUTEX(message_lock);
static void *message;
static dma_addr_t message_dma;

/*
 * Messages are init's word on how the run went. A file that init opened, and
 * that its workloads inherit, carries them; a program under test gets one that
 * can only associate.
 */
static int chardev_open(struct inode *inode, struct file *file)
{
	file->private_data = is_global_init(current) ? file : NULL;
	return nonseekable_open(inode, file);
}

static ssize_t chardev_write(struct file *file, const char __user *from,
			     size_t bytes, loff_t *pos)
{
	ssize_t ret = bytes;

	if (!file->private_data)
		return -EPERM;
	if (bytes > WITNESS_MAX_MESSAGE)
		return -EMSGSIZE;
	if (!bytes)
		return 0;

	if (mutex_lock_interruptible(&message_lock))
		return -ERESTARTSYS;
	if (!message)
		ret = -ENODEV;
	else if (copy_from_user(message, from, bytes))
		ret = -EFAULT;
	else
		witness_report(WITNESS_REC_MESSAGE, 0, message_dma, bytes,
			       0, 0);
	mutex_unlock(&message_lock);
	return ret;
}

static long chardev_associate(const void __user *from)
{
	struct hmm_witness_associate arg;
	long ret;

	if (copy_from_user(&arg, from, sizeof(arg)))
		return -EFAULT;

	if (mutex_lock_interruptible(&message_lock))
		return -ERESTARTSYS;
	ret = message ? mm_table_associate(current->mm, arg.ctx) : -ENODEV;
	mutex_unlock(&message_lock);
	return ret;
}

/* What stands where is init's and its workloads' to say. */
static long chardev_gates(struct file *file, unsigned int cmd,
			  const void __user *from)
{
	union {
		struct hmm_witness_site site;
		struct hmm_witness_arm arm;
	} arg;

	if (!file->private_data)
		return -EPERM;
	if (_IOC_SIZE(cmd) && copy_from_user(&arg, from, _IOC_SIZE(cmd)))
		return -EFAULT;
	return gates_setup(cmd, &arg);
}

static long chardev_role(const void __user *from)
{
	struct hmm_witness_role arg;

	if (copy_from_user(&arg, from, sizeof(arg)))
		return -EFAULT;
	return gates_role(arg.name);
}

static long chardev_point(const void __user *from)
{
	struct hmm_witness_point arg;

	if (copy_from_user(&arg, from, sizeof(arg)))
		return -EFAULT;
	return gates_point(arg.name);
}

static long chardev_local(struct file *file, void __user *user)
{
	struct hmm_witness_local arg;
	long ret;

	if (!file->private_data)
		return -EPERM;
	if (copy_from_user(&arg, user, sizeof(arg)))
		return -EFAULT;
	ret = gates_local(&arg);
	if (ret)
		return ret;
	return copy_to_user(user, &arg, sizeof(arg)) ? -EFAULT : 0;
}

static long chardev_stable(const void __user *from, u32 kind)
{
	struct hmm_witness_stable arg;
	long ret;

	if (copy_from_user(&arg, from, sizeof(arg)))
		return -EFAULT;
	if (arg.start > arg.last)
		return -EINVAL;

	if (mutex_lock_interruptible(&message_lock))
		return -ERESTARTSYS;
	ret = message ? mm_table_stable(current->mm, kind, arg.start, arg.last,
					arg.kept) : -ENODEV;
	mutex_unlock(&message_lock);
	return ret;
}

static long chardev_ioctl(struct file *file, unsigned int cmd,
			  unsigned long arg)
{
	switch (cmd) {
	case HMM_WITNESS_ASSOCIATE:
		return chardev_associate((const void __user *)arg);
	case HMM_WITNESS_GATE_ADD:
	case HMM_WITNESS_GATE_ARM:
	case HMM_WITNESS_GATE_DISARM:
	case HMM_WITNESS_GATE_CLEAR:
		return chardev_gates(file, cmd, (const void __user *)arg);
	case HMM_WITNESS_ROLE:
		return chardev_role((const void __user *)arg);
	case HMM_WITNESS_GATE_POINT:
		return chardev_point((const void __user *)arg);
	case HMM_WITNESS_GATE_LOCAL:
		return chardev_local(file, (void __user *)arg);
	case HMM_WITNESS_STABLE_BEGIN:
		return chardev_stable((const void __user *)arg,
				      WITNESS_REC_STABLE_BEGIN);
	case HMM_WITNESS_STABLE_END:
		return chardev_stable((const void __user *)arg,
				      WITNESS_REC_STABLE_END);
	default:
		return -ENOTTY;
	}
}

static const struct file_operations chardev_fops = {
	.owner = THIS_MODULE,
	.open = chardev_open,
	.write = chardev_write,
	.unlocked_ioctl = chardev_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
};

static struct miscdevice chardev = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "hmm_witness",
	.fops = &chardev_fops,
};

static void *set_message(void *buffer)
{
	void *before;

	mutex_lock(&message_lock);
	before = message;
	message = buffer;
	mutex_unlock(&message_lock);
	return before;
}

/**
 * chardev_register - make the character device
 * @pdev: what its messages go to
 *
 * Return: 0 or a negative error.
 */
int chardev_register(struct pci_dev *pdev)
{
	void *buffer;
	int ret;

	buffer = dma_alloc_coherent(&pdev->dev, WITNESS_MAX_MESSAGE,
				    &message_dma, GFP_KERNEL);
	if (!buffer)
		return -ENOMEM;
	set_message(buffer);

	chardev.parent = &pdev->dev;
	ret = misc_register(&chardev);
	if (ret) {
		set_message(NULL);
		dma_free_coherent(&pdev->dev, WITNESS_MAX_MESSAGE, buffer,
				  message_dma);
	}
	return ret;
}

/**
 * chardev_unregister - remove the character device
 * @pdev: as it was registered with
 *
 * Files that are still open get ENODEV from now on.
 */
void chardev_unregister(struct pci_dev *pdev)
{
	misc_deregister(&chardev);
	dma_free_coherent(&pdev->dev, WITNESS_MAX_MESSAGE, set_message(NULL),
			  message_dma);
}
