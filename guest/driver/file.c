// SPDX-License-Identifier: GPL-2.0
/*
 * The character device. A file may outlive the address space it is bound to (a
 * child inherited it, exec) and the device (unbound from the driver).
 */
#include <linux/fs.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "hmm_vgpu.h"

static int vgpu_open(struct inode *inode, struct file *filp)
{
	struct vgpu_device *vdev = container_of(filp->private_data,
						struct vgpu_device, misc);
	struct vgpu_file *file = kzalloc(sizeof(*file), GFP_KERNEL);

	if (!file)
		return -ENOMEM;
	/* The misc core calls us under the lock that misc_deregister() takes. */
	kref_get(&vdev->ref);
	file->vdev = vdev;
	mutex_init(&file->lock);

	mutex_lock(&vdev->files_lock);
	list_add(&file->link, &vdev->files);
	mutex_unlock(&vdev->files_lock);

	filp->private_data = file;
	return nonseekable_open(inode, filp);
}

static int vgpu_file_unbind(struct vgpu_file *file)
{
	lockdep_assert_held(&file->lock);

	if (!file->ctx)
		return -ENXIO;
	vgpu_ctx_destroy(file->ctx);
	file->ctx = NULL;
	return 0;
}

static int vgpu_release(struct inode *inode, struct file *filp)
{
	struct vgpu_file *file = filp->private_data;
	struct vgpu_device *vdev = file->vdev;

	mutex_lock(&file->lock);
	vgpu_file_unbind(file);
	mutex_unlock(&file->lock);

	mutex_lock(&vdev->files_lock);
	list_del(&file->link);
	mutex_unlock(&vdev->files_lock);

	kfree(file);
	vgpu_device_put(vdev);
	return 0;
}

/**
 * vgpu_files_detach() - take the device away from all open files
 * @vdev: the device, being removed; no file is opened any more
 *
 * When it returns no file has a context, and none gets one.
 */
void vgpu_files_detach(struct vgpu_device *vdev)
{
	struct vgpu_file *file;

	mutex_lock(&vdev->files_lock);
	WRITE_ONCE(vdev->removed, true);
	list_for_each_entry(file, &vdev->files, link) {
		mutex_lock(&file->lock);
		vgpu_file_unbind(file);
		mutex_unlock(&file->lock);
	}
	mutex_unlock(&vdev->files_lock);
}

/* The file's context, referenced, or an error pointer. */
static struct vgpu_ctx *vgpu_file_ctx(struct vgpu_file *file)
{
	struct vgpu_ctx *ctx;

	mutex_lock(&file->lock);
	if (READ_ONCE(file->vdev->removed)) {
		ctx = ERR_PTR(-ENODEV);
	} else if (!file->ctx) {
		ctx = ERR_PTR(-ENXIO);
	} else {
		ctx = file->ctx;
		kref_get(&ctx->ref);
	}
	mutex_unlock(&file->lock);
	return ctx;
}

static int vgpu_bind_locked(struct vgpu_file *file, u64 *handle)
{
	struct vgpu_device *vdev = file->vdev;
	struct vgpu_ctx *ctx;
	int ret;

	lockdep_assert_held(&file->lock);

	if (READ_ONCE(vdev->removed))
		return -ENODEV;
	if (file->ctx)
		return -EBUSY;
	ctx = vgpu_ctx_create(vdev, atomic_inc_return(&vdev->tag));
	if (IS_ERR(ctx))
		return PTR_ERR(ctx);
	ret = vgpu_backend->begin(ctx, current->mm);
	if (ret) {
		vgpu_ctx_destroy(ctx);
		return ret;
	}
	*handle = ctx->handle;
	/* Nothing can be submitted yet. */
	ctx->atomics = vgpu_exclusive_mode(vdev);
	file->ctx = ctx;
	return 0;
}

static int vgpu_ioctl_bind(struct vgpu_file *file, void __user *user)
{
	struct hmm_vgpu_bind arg;
	int ret;

	if (copy_from_user(&arg, user, sizeof(arg)))
		return -EFAULT;
	if (arg.flags)
		return -EINVAL;

	mutex_lock(&file->lock);
	ret = vgpu_bind_locked(file, &arg.ctx);
	mutex_unlock(&file->lock);
	if (ret)
		return ret;
	/* Should this fail the file stays bound; it can be unbound and closed. */
	return copy_to_user(user, &arg, sizeof(arg)) ? -EFAULT : 0;
}

static int vgpu_ioctl_unbind(struct vgpu_file *file)
{
	int ret;

	mutex_lock(&file->lock);
	ret = READ_ONCE(file->vdev->removed) ? -ENODEV : vgpu_file_unbind(file);
	mutex_unlock(&file->lock);
	return ret;
}

static int vgpu_ioctl_submit(struct vgpu_file *file, void __user *user)
{
	struct hmm_vgpu_submit arg;
	struct vgpu_ctx *ctx;
	int ret;

	if (copy_from_user(&arg, user, sizeof(arg)))
		return -EFAULT;
	if (arg.queue >= HMM_VGPU_QUEUES)
		return -EINVAL;

	ctx = vgpu_file_ctx(file);
	if (IS_ERR(ctx))
		return PTR_ERR(ctx);
	if (READ_ONCE(ctx->stopped))
		ret = -ESRCH;
	else if (current->mm != ctx->mm)
		ret = -EPERM;
	else
		ret = vgpu_queue_submit(ctx, &ctx->queue[arg.queue], &arg);
	vgpu_ctx_put(ctx);
	if (ret)
		return ret;
	return copy_to_user(user, &arg, sizeof(arg)) ? -EFAULT : 0;
}

static int vgpu_ioctl_wait(struct vgpu_file *file, void __user *user)
{
	struct hmm_vgpu_wait arg;
	struct vgpu_ctx *ctx;
	int ret;

	if (copy_from_user(&arg, user, sizeof(arg)))
		return -EFAULT;
	if (arg.queue >= HMM_VGPU_QUEUES)
		return -EINVAL;

	ctx = vgpu_file_ctx(file);
	if (IS_ERR(ctx))
		return PTR_ERR(ctx);
	ret = vgpu_queue_wait(ctx, &ctx->queue[arg.queue], &arg);
	vgpu_ctx_put(ctx);
	if (ret)
		return ret;
	return copy_to_user(user, &arg, sizeof(arg)) ? -EFAULT : 0;
}

static int vgpu_ioctl_migrate(struct vgpu_file *file, void __user *user, bool to_device)
{
	struct hmm_vgpu_migrate arg;
	struct vgpu_ctx *ctx;
	int ret;

	if (copy_from_user(&arg, user, sizeof(arg)))
		return -EFAULT;

	ctx = vgpu_file_ctx(file);
	if (IS_ERR(ctx))
		return PTR_ERR(ctx);
	if (READ_ONCE(ctx->stopped))
		ret = -ESRCH;
	else if (current->mm != ctx->mm)
		ret = -EPERM;
	else
		ret = vgpu_migrate(ctx, &arg, to_device);
	vgpu_ctx_put(ctx);
	if (ret)
		return ret;
	return copy_to_user(user, &arg, sizeof(arg)) ? -EFAULT : 0;
}

static int vgpu_ioctl_query(struct vgpu_file *file, void __user *user)
{
	struct hmm_vgpu_query arg = { .queues = HMM_VGPU_QUEUES };
	struct vgpu_ctx *ctx = vgpu_file_ctx(file);

	if (ctx == ERR_PTR(-ENODEV))
		return -ENODEV;
	if (!IS_ERR(ctx)) {
		arg.ctx = ctx->handle;
		/* So that "released" means that it is done. */
		mutex_lock(&ctx->pt_lock);
		arg.state = ctx->stopped ? HMM_VGPU_STATE_RELEASED : HMM_VGPU_STATE_BOUND;
		mutex_unlock(&ctx->pt_lock);
		arg.faults_served = atomic64_read(&ctx->faults_served);
		arg.faults_cancelled = atomic64_read(&ctx->faults_cancelled);
		arg.fault_retries = atomic64_read(&ctx->fault_retries);
		arg.invalidations = atomic64_read(&ctx->invalidations);
		arg.mapped_pages = atomic64_read(&ctx->mapped_pages);
		arg.huge_maps = atomic64_read(&ctx->huge_maps);
		arg.device_pages = atomic_read(&ctx->device_pages);
		arg.cpu_faults = atomic64_read(&ctx->cpu_faults);
		vgpu_ctx_put(ctx);
	}
	return copy_to_user(user, &arg, sizeof(arg)) ? -EFAULT : 0;
}

static int vgpu_ioctl_layer(void __user *user)
{
	struct hmm_vgpu_layer arg = {};
	int ret = vgpu_backend->layer ? vgpu_backend->layer(&arg) : 0;

	if (ret)
		return ret;
	return copy_to_user(user, &arg, sizeof(arg)) ? -EFAULT : 0;
}

static int vgpu_ioctl_act(struct vgpu_file *file, void __user *user)
{
	struct hmm_vgpu_act arg;
	int ret;

	if (!vgpu_backend->act)
		return -ENOTTY;
	if (copy_from_user(&arg, user, sizeof(arg)))
		return -EFAULT;

	mutex_lock(&file->lock);
	if (READ_ONCE(file->vdev->removed))
		ret = -ENODEV;
	else if (!file->ctx)
		ret = -ENXIO;
	else if (current->mm != file->ctx->mm)
		ret = -EPERM;
	else
		ret = vgpu_backend->act(file->ctx, &arg);
	mutex_unlock(&file->lock);
	return ret;
}

static long vgpu_ioctl(struct file *filp, unsigned int cmd, unsigned long data)
{
	struct vgpu_file *file = filp->private_data;
	void __user *user = (void __user *)data;

	switch (cmd) {
	case HMM_VGPU_BIND:
		return vgpu_ioctl_bind(file, user);
	case HMM_VGPU_SUBMIT:
		return vgpu_ioctl_submit(file, user);
	case HMM_VGPU_WAIT:
		return vgpu_ioctl_wait(file, user);
	case HMM_VGPU_QUERY:
		return vgpu_ioctl_query(file, user);
	case HMM_VGPU_UNBIND:
		return vgpu_ioctl_unbind(file);
	case HMM_VGPU_LAYER:
		return vgpu_ioctl_layer(user);
	case HMM_VGPU_ACT:
		return vgpu_ioctl_act(file, user);
	case HMM_VGPU_MIGRATE_TO_DEVICE:
		return vgpu_ioctl_migrate(file, user, true);
	case HMM_VGPU_MIGRATE_TO_SYSTEM:
		return vgpu_ioctl_migrate(file, user, false);
	default:
		return -ENOTTY;
	}
}

const struct file_operations vgpu_fops = {
	.owner = THIS_MODULE,
	.open = vgpu_open,
	.release = vgpu_release,
	.unlocked_ioctl = vgpu_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.llseek = noop_llseek,
};
