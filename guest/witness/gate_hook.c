// SPDX-License-Identifier: GPL-2.0
/*
 * Hooks on functions, by name: ftrace's direct calls, which reach any function
 * that can be traced, in its own context, so that a task can be put to sleep
 * there; and kprobes within functions, which can only be reported.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/delay.h>
#include <linux/errno.h>
#include <linux/ftrace.h>
#include <linux/kernel.h>
#include <linux/kprobes.h>
#include <linux/mutex.h>
#include <linux/printk.h>
#include <linux/rcupdate.h>
#include <linux/string.h>
#include <linux/version.h>

#include "gate.h"

/* As many as there are stubs in gate_stub.S. */
#define HOOKS 24
#define OFFSETS 16
/* How long tasks get to leave functions that were hooked. */
#define PATIENCE_MS 10000

/* Guards both arrays against other changes. Gates are not armed meanwhile. */
static DEFINE_MUTEX(hook_lock);

#ifdef CONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS

/**
 * struct hook - a hooked function
 * @ops: ftrace's part
 * @function: its name; empty: not in use
 * @site: by sort, the site it is hooked for, or -1
 */
struct hook {
	struct ftrace_ops ops;
	char function[HMM_WITNESS_PLACE_BYTES];
	int site[HOOK_SORTS];
};

static struct hook hooks[HOOKS];
/* Tasks in functions that were called from a stub: these will return to it. */
static atomic_t inside;

extern const unsigned long hmm_gate_stubs[HOOKS];
unsigned long hmm_gate_enter(unsigned long index, u64 argument);
void hmm_gate_exit(unsigned long index, u64 result);

/*
 * Called by the stubs. What is returned decides whether hmm_gate_exit() is
 * called too.
 */
unsigned long hmm_gate_enter(unsigned long index, u64 argument)
{
	const struct hook *hook = &hooks[index];
	bool exit = false;
	int site;

	if (!gate_begin())
		return 0;
	site = READ_ONCE(hook->site[HOOK_ENTRY]);
	if (site >= 0)
		gate_stop(site, argument);
	site = READ_ONCE(hook->site[HOOK_WATCH]);
	if (site >= 0)
		exit = gate_watch_enter(site);
	if (READ_ONCE(hook->site[HOOK_RETURN]) >= 0)
		exit = true;
	if (exit)
		atomic_inc(&inside);
	gate_end();
	return exit;
}

void hmm_gate_exit(unsigned long index, u64 result)
{
	const struct hook *hook = &hooks[index];
	int site;

	if (gate_begin()) {
		site = READ_ONCE(hook->site[HOOK_WATCH]);
		if (site >= 0)
			gate_watch_exit(site);
		site = READ_ONCE(hook->site[HOOK_RETURN]);
		if (site >= 0)
			gate_stop(site, result);
		gate_end();
	}
	atomic_dec(&inside);
}

static int direct_register(struct ftrace_ops *ops, unsigned long stub)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 4, 0)
	return register_ftrace_direct(ops, stub);
#else
	return register_ftrace_direct_multi(ops, stub);
#endif
}

static int direct_unregister(struct ftrace_ops *ops, unsigned long stub)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 4, 0)
	return unregister_ftrace_direct(ops, stub, true);
#else
	int ret = unregister_ftrace_direct_multi(ops, stub);

	ftrace_free_filter(ops);
	return ret;
#endif
}

static int hook_new(struct hook *hook, const char *function)
{
	unsigned long stub = hmm_gate_stubs[hook - hooks];
	int sort, ret;

	memset(&hook->ops, 0, sizeof(hook->ops));
	for (sort = 0; sort < HOOK_SORTS; sort++)
		hook->site[sort] = -1;
	ret = ftrace_set_filter(&hook->ops, (unsigned char *)function,
				strlen(function), 1);
	if (ret) {
		ftrace_free_filter(&hook->ops);
		/* As it says where no function matches. */
		return ret == -EINVAL ? -ENOENT : ret;
	}
	ret = direct_register(&hook->ops, stub);
	if (ret) {
		ftrace_free_filter(&hook->ops);
		return ret;
	}
	strscpy(hook->function, function, sizeof(hook->function));
	return 0;
}

/**
 * hook_add - hook a function
 * @sort: what of it
 * @function: its name
 * @site: the site it is for
 *
 * Context: may sleep; no gate is armed.
 * Return: 0; -ENOENT if there is no such function, or if it cannot be traced;
 * -EEXIST; -ENOSPC; what ftrace says.
 */
int hook_add(enum hook_sort sort, const char *function, unsigned int site)
{
	struct hook *hook, *spare = NULL;
	int ret = 0;

	/* It would be a pattern. */
	if (!*function || strpbrk(function, "*?[]! :"))
		return -EINVAL;

	mutex_lock(&hook_lock);
	for (hook = hooks; hook < hooks + HOOKS; hook++) {
		if (!strcmp(hook->function, function))
			break;
		if (!*hook->function && !spare)
			spare = hook;
	}
	if (hook == hooks + HOOKS) {
		hook = spare;
		ret = hook ? hook_new(hook, function) : -ENOSPC;
	}
	if (!ret && hook->site[sort] >= 0)
		ret = -EEXIST;
	if (!ret)
		WRITE_ONCE(hook->site[sort], site);
	mutex_unlock(&hook_lock);
	return ret;
}

static int hooks_remove(void)
{
	struct hook *hook;
	unsigned int ms;
	bool any = false;

	for (hook = hooks; hook < hooks + HOOKS; hook++) {
		if (!*hook->function)
			continue;
		if (direct_unregister(&hook->ops, hmm_gate_stubs[hook - hooks]))
			pr_warn("ftrace does not let go of %s\n", hook->function);
		hook->function[0] = '\0';
		any = true;
	}
	if (!any)
		return 0;
	for (ms = 0; atomic_read(&inside); ms += 10) {
		if (ms >= PATIENCE_MS)
			return -EBUSY;
		msleep(10);
	}
	/* Those that are on the last instructions of a stub leave it too. */
	synchronize_rcu_tasks();
	return 0;
}

#else

int hook_add(enum hook_sort sort, const char *function, unsigned int site)
{
	return -EOPNOTSUPP;
}

static int hooks_remove(void)
{
	return 0;
}

#endif

/**
 * struct offset - a probe within a function
 * @probe: the kernel's part
 * @function: the function's name; empty: not in use
 * @site: the site it is for
 */
struct offset {
	struct kprobe probe;
	char function[HMM_WITNESS_PLACE_BYTES];
	unsigned int site;
};

static struct offset offsets[OFFSETS];

static int offset_hit(struct kprobe *probe, struct pt_regs *regs)
{
	struct offset *offset = container_of(probe, struct offset, probe);

	if (gate_begin()) {
		gate_stop(offset->site, 0);
		gate_end();
	}
	return 0;
}
NOKPROBE_SYMBOL(offset_hit);

/**
 * hook_add_offset - probe a place within a function
 * @place: FUNCTION+0xN
 * @site: the site it is for, where nobody waits
 *
 * Return: 0, -EINVAL, -ENOSPC, what the kernel's probes say.
 */
int hook_add_offset(const char *place, unsigned int site)
{
	const char *plus = strchr(place, '+');
	struct offset *offset;
	unsigned int by;
	int ret;

	if (!plus || plus == place || plus - place >= sizeof(offset->function) ||
	    kstrtouint(plus + 1, 0, &by))
		return -EINVAL;

	mutex_lock(&hook_lock);
	for (offset = offsets; offset < offsets + OFFSETS; offset++) {
		if (!*offset->function)
			break;
	}
	ret = -ENOSPC;
	if (offset == offsets + OFFSETS)
		goto unlock;
	memset(offset, 0, sizeof(*offset));
	strscpy(offset->function, place, plus - place + 1);
	offset->site = site;
	offset->probe.symbol_name = offset->function;
	offset->probe.offset = by;
	offset->probe.pre_handler = offset_hit;
	ret = register_kprobe(&offset->probe);
	if (ret)
		offset->function[0] = '\0';
unlock:
	mutex_unlock(&hook_lock);
	return ret;
}

/**
 * hook_clear - take all hooks away
 *
 * Context: may sleep; no gate is armed.
 * Return: 0 when no task is in a stub any more; -EBUSY if one does not leave a
 * function that was called from one. Then this module must stay.
 */
int hook_clear(void)
{
	struct offset *offset;
	int ret;

	mutex_lock(&hook_lock);
	for (offset = offsets; offset < offsets + OFFSETS; offset++) {
		if (*offset->function)
			unregister_kprobe(&offset->probe);
		offset->function[0] = '\0';
	}
	ret = hooks_remove();
	mutex_unlock(&hook_lock);
	return ret;
}
