// SPDX-License-Identifier: GPL-2.0
/*
 * Table pages: which are whose, and how they hang together. A table is granted
 * and entered in its parent by the fault worker, stays when its last leaf goes
 * (the callback that clears it must not do more than it has to), and is returned
 * by the worker when the context has many empty ones, or needs one.
 */
#include <linux/dma-mapping.h>
#include <linux/slab.h>

#include "hmm_vgpu.h"

static void vgpu_table_free(struct vgpu_ctx *ctx, struct vgpu_table *t)
{
	struct vgpu_device *vdev = ctx->vdev;

	dma_free_coherent(&vdev->pdev->dev, PAGE_SIZE, t->pte, t->dma);
	spin_lock(&vdev->table_lock);
	__clear_bit(t->page, vdev->table_map);
	spin_unlock(&vdev->table_lock);
	kvfree(t);
}

static struct vgpu_table *vgpu_table_alloc(struct vgpu_ctx *ctx, u64 va,
					   unsigned int level)
{
	struct vgpu_device *vdev = ctx->vdev;
	struct vgpu_table *t;

	t = kvzalloc(sizeof(*t), GFP_KERNEL);
	if (!t)
		return ERR_PTR(-ENOMEM);
	t->pte = dma_alloc_coherent(&vdev->pdev->dev, PAGE_SIZE, &t->dma, GFP_KERNEL);
	if (!t->pte) {
		kvfree(t);
		return ERR_PTR(-ENOMEM);
	}
	INIT_LIST_HEAD(&t->link);
	INIT_LIST_HEAD(&t->empty);
	t->level = level;
	t->base = va & ~((1ULL << vgpu_pte_shift(level + 1)) - 1);

	spin_lock(&vdev->table_lock);
	t->page = find_first_zero_bit(vdev->table_map, vdev->table_pages);
	if (t->page < vdev->table_pages)
		__set_bit(t->page, vdev->table_map);
	spin_unlock(&vdev->table_lock);
	if (t->page >= vdev->table_pages) {
		dma_free_coherent(&vdev->pdev->dev, PAGE_SIZE, t->pte, t->dma);
		kvfree(t);
		return ERR_PTR(-ENOSPC);
	}
	return t;
}

/*
 * Gives a table page back. No command that reads its entries is on its way any
 * more. The next grant of the page comes later in the ring than its return.
 */
static void vgpu_table_return(struct vgpu_ctx *ctx, struct vgpu_table *t)
{
	struct vgpu_cmd cmd;
	u32 index;

	cmd = vgpu_cmd_make(VGPU_CMD_OP_RETURN, ctx->handle, t->handle, 0, 0);
	vgpu_cmd_post(ctx->vdev, &cmd, 1, true, &index);
	list_del(&t->link);
	vgpu_table_free(ctx, t);
}

/**
 * vgpu_table_grant() - allocate tables and have their pages granted
 * @ctx: the context
 * @va: an address they translate
 * @level: level of the first; the following are each one lower
 * @table: out: the tables; all or none
 * @count: how many
 *
 * Context: fault worker, without pt_lock.
 * Return: 0, -ENOSPC if the device has no page left, -ESRCH if the context has
 * been stopped, or another error.
 */
static int vgpu_table_grant(struct vgpu_ctx *ctx, u64 va, unsigned int level,
			    struct vgpu_table **table, unsigned int count)
{
	struct vgpu_cmd cmd[VGPU_PTE_LEVELS];
	unsigned int i, n;
	int ret = 0;
	u32 index;

	for (n = 0; n < count; n++) {
		table[n] = vgpu_table_alloc(ctx, va, level - n);
		if (IS_ERR(table[n])) {
			ret = PTR_ERR(table[n]);
			goto err_free;
		}
		cmd[n] = vgpu_cmd_make(VGPU_CMD_OP_GRANT, ctx->handle,
				       VGPU_CMD_PAGE_TABLE, table[n]->page, 0);
	}

	/* A context that was stopped gets nothing more: see vgpu_ctx_stop_locked(). */
	mutex_lock(&ctx->pt_lock);
	ret = ctx->stopped ? -ESRCH : vgpu_cmd_send(ctx->vdev, cmd, count, &index);
	mutex_unlock(&ctx->pt_lock);
	if (ret)
		goto err_free;
	ret = vgpu_cmd_finish(ctx->vdev, cmd, count, index);
	for (i = 0; i < count; i++)
		if (!vgpu_cmd_error(&cmd[i])) {
			table[i]->handle = le64_to_cpu(cmd[i].result);
			list_add(&table[i]->link, &ctx->tables);
		}
	if (!ret)
		return 0;

err_free:
	for (i = 0; i < n; i++) {
		if (table[i]->handle)
			vgpu_table_return(ctx, table[i]);
		else
			vgpu_table_free(ctx, table[i]);
	}
	return ret;
}

/* Grants the root and sets it. */
int vgpu_table_create_root(struct vgpu_ctx *ctx)
{
	struct vgpu_table *root;
	struct vgpu_cmd cmd;
	int ret;

	ret = vgpu_table_grant(ctx, 0, VGPU_ROOT_LEVEL, &root, 1);
	if (ret)
		return ret;
	ctx->root = root;
	cmd = vgpu_cmd_make(VGPU_CMD_OP_CTX_SET_ROOT, ctx->handle, root->handle, 0, 0);
	return vgpu_cmd_run(ctx->vdev, &cmd, 1);
}

/**
 * vgpu_table_account() - entries of a table became valid or invalid
 * @ctx: the context
 * @t: the table
 * @entries: how many more, or fewer
 *
 * Context: pt_lock. Allocates nothing.
 */
void vgpu_table_account(struct vgpu_ctx *ctx, struct vgpu_table *t, int entries)
{
	lockdep_assert_held(&ctx->pt_lock);

	t->used += entries;
	if (t == ctx->root)
		return;
	if (!t->used && list_empty(&t->empty)) {
		list_add_tail(&t->empty, &ctx->empty);
		ctx->nr_empty++;
	} else if (t->used && !list_empty(&t->empty)) {
		list_del_init(&t->empty);
		ctx->nr_empty--;
	}
}

/**
 * vgpu_table_lookup() - find a table
 * @ctx: the context
 * @va: an address it translates
 * @level: its level
 *
 * Context: pt_lock.
 * Return: the table or NULL.
 */
struct vgpu_table *vgpu_table_lookup(struct vgpu_ctx *ctx, u64 va,
				     unsigned int level)
{
	struct vgpu_table *t = ctx->root;

	lockdep_assert_held(&ctx->pt_lock);

	while (t && t->level > level) {
		unsigned int i = vgpu_pte_index(va, t->level);

		t = vgpu_pte_huge(t, i) ? NULL : t->slot[i].table;
	}
	return t;
}

/* Enters a table in its parent, in the place of a 2 MiB leaf if there is one. */
static void vgpu_table_link(struct vgpu_ctx *ctx, struct vgpu_table *parent,
			    struct vgpu_table *t)
{
	unsigned int i = vgpu_pte_index(t->base, parent->level);
	u64 pte = VGPU_PTE_VALID | (u64)t->page << PAGE_SHIFT;

	if (vgpu_pte_huge(parent, i))
		vgpu_pt_zap(ctx, t->base, t->base + VGPU_HUGE_SIZE - 1, true);
	t->parent = parent;
	parent->slot[i].table = t;
	WRITE_ONCE(parent->pte[i], cpu_to_le64(pte));
	vgpu_table_account(ctx, parent, 1);
	vgpu_table_account(ctx, t, 0);
	vgpu_pt_push(ctx, true, vgpu_cmd_make(VGPU_CMD_OP_WRITE_PTE, ctx->handle,
					      parent->handle, i, pte));
}

/**
 * vgpu_table_prepare() - make sure that there are tables down to a level
 * @ctx: the context
 * @va: the address they translate
 * @level: the lowest one needed
 *
 * Since only the fault worker removes tables, they stay until it does.
 * Context: fault worker, without pt_lock; may allocate.
 * Return: 0 or an error, see vgpu_table_grant().
 */
int vgpu_table_prepare(struct vgpu_ctx *ctx, u64 va, unsigned int level)
{
	struct vgpu_table *table[VGPU_PTE_LEVELS];
	struct vgpu_table *t, *next;
	unsigned int count, i;
	bool evicted = false;
	int ret;

again:
	/* Outside the lock leaves go; tables stay, and so does @t. */
	mutex_lock(&ctx->pt_lock);
	for (t = ctx->root; t->level > level; t = next) {
		next = vgpu_table_lookup(ctx, va, t->level - 1);
		if (!next)
			break;
	}
	mutex_unlock(&ctx->pt_lock);
	count = t->level - level;
	if (!count)
		return 0;

	ret = vgpu_table_grant(ctx, va, t->level - 1, table, count);
	if (ret == -ENOSPC && !evicted) {
		/* Whatever we drop will fault again. */
		evicted = true;
		mutex_lock(&ctx->pt_lock);
		if (!ctx->stopped)
			vgpu_pt_zap(ctx, 0, VGPU_VA_LAST, true);
		mutex_unlock(&ctx->pt_lock);
		vgpu_table_trim(ctx);
		goto again;
	}
	if (ret)
		return ret;

	mutex_lock(&ctx->pt_lock);
	if (!ctx->stopped) {
		for (i = 0; i < count; i++) {
			vgpu_table_link(ctx, t, table[i]);
			t = table[i];
		}
		ret = vgpu_pt_flush(ctx, true, false);
	} else {
		ret = -ESRCH;
	}
	mutex_unlock(&ctx->pt_lock);
	/* Not entered: they stay in ctx->tables, and go with the context. */
	return ret;
}

/**
 * vgpu_table_detach() - take a table without valid entries out of the tree
 * @ctx: the context
 * @t: the table, not the root
 *
 * Pushes the commands; after a vgpu_pt_flush() that waits, no walk of the device
 * reads the table, and vgpu_table_return_detached() gives it back.
 * Context: fault worker, pt_lock.
 */
void vgpu_table_detach(struct vgpu_ctx *ctx, struct vgpu_table *t)
{
	struct vgpu_table *parent = t->parent;
	unsigned int i = vgpu_pte_index(t->base, parent->level);

	lockdep_assert_held(&ctx->pt_lock);

	WRITE_ONCE(parent->pte[i], 0);
	parent->slot[i].table = NULL;
	t->parent = NULL;
	vgpu_pt_push(ctx, true, vgpu_cmd_make(VGPU_CMD_OP_CLEAR_PTES, ctx->handle,
					      parent->handle, vgpu_entries(i, 1), 0));
	vgpu_pt_push(ctx, true, vgpu_cmd_make(VGPU_CMD_OP_INVALIDATE, ctx->handle, t->base,
					      t->base + (1ULL << vgpu_pte_shift(t->level + 1)) - 1,
					      0));
	list_move(&t->empty, &ctx->detached);
	ctx->nr_empty--;
	vgpu_table_account(ctx, parent, -1);
}

/* Gives detached tables back. Context: fault worker, without pt_lock. */
void vgpu_table_return_detached(struct vgpu_ctx *ctx)
{
	struct vgpu_table *t, *next;

	list_for_each_entry_safe(t, next, &ctx->detached, empty) {
		list_del_init(&t->empty);
		vgpu_table_return(ctx, t);
	}
}

/**
 * vgpu_table_trim() - give all empty tables back
 * @ctx: the context
 *
 * Not those of the copy context, which has them made once and uses them again.
 *
 * Context: fault worker, without pt_lock.
 */
void vgpu_table_trim(struct vgpu_ctx *ctx)
{
	struct vgpu_table *t;

	mutex_lock(&ctx->pt_lock);
	if (ctx->mm && !ctx->stopped && !list_empty(&ctx->empty)) {
		/* The parent of the last one may become empty, and comes next. */
		while ((t = list_first_entry_or_null(&ctx->empty,
						     struct vgpu_table, empty)))
			vgpu_table_detach(ctx, t);
		vgpu_pt_flush(ctx, true, true);
	}
	mutex_unlock(&ctx->pt_lock);
	vgpu_table_return_detached(ctx);
}

/**
 * vgpu_table_return_all() - push the commands that give all tables back
 * @ctx: the context, stopped; its fault worker does not run any more
 *
 * Context: pt_lock; the caller flushes and waits, then vgpu_table_free_all().
 */
void vgpu_table_return_all(struct vgpu_ctx *ctx)
{
	struct vgpu_table *t;

	ctx->root = NULL;
	list_for_each_entry(t, &ctx->tables, link)
		vgpu_pt_push(ctx, true,
			     vgpu_cmd_make(VGPU_CMD_OP_RETURN, ctx->handle, t->handle, 0, 0));
}

void vgpu_table_free_all(struct vgpu_ctx *ctx)
{
	struct vgpu_table *t, *next;

	list_for_each_entry_safe(t, next, &ctx->tables, link) {
		list_del(&t->link);
		vgpu_table_free(ctx, t);
	}
}
