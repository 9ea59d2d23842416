// SPDX-License-Identifier: GPL-2.0
/*
 * Probes on a function's entry and return: fprobe, or kretprobe.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/kernel.h>
#include <linux/printk.h>

#include "probe.h"

/*
 * Calls of one function that can be under way at once: they sleep, in
 * notifiers and in SRCU, so it is not the number of CPUs that limits them.
 */
#define MAX_CALLS 512

#if WITNESS_FPROBE

static int hook_entry(struct fprobe *fp, unsigned long ip, unsigned long ret_ip,
		      compat_regs *regs, void *data)
{
	struct witness_probe *probe =
		container_of(fp, struct witness_probe, hook);
	struct witness_call *call = data;

	call->arg3 = compat_argument(regs, 3);
	return !probe->entry(call, compat_argument(regs, 0),
			     compat_argument(regs, 1));
}

static void hook_exit(struct fprobe *fp, unsigned long ip, unsigned long ret_ip,
		      compat_regs *regs, void *data)
{
	struct witness_probe *probe =
		container_of(fp, struct witness_probe, hook);

	probe->exit(data, compat_result(regs));
}

static int hook_register(struct witness_probe *probe)
{
	struct fprobe *fp = &probe->hook;
	const char *symbol = probe->symbol;

	*fp = (struct fprobe) {
		.entry_handler = hook_entry,
		.exit_handler = hook_exit,
		.entry_data_size = sizeof(struct witness_call),
	};
	compat_fprobe_size(fp, MAX_CALLS);
	return register_fprobe_syms(fp, &symbol, 1);
}

static void hook_unregister(struct witness_probe *probe)
{
	unregister_fprobe(&probe->hook);
}

static u64 hook_missed(const struct witness_probe *probe)
{
	return READ_ONCE(probe->hook.nmissed);
}

#else /* kretprobe */

static int hook_entry(struct kretprobe_instance *ri, struct pt_regs *regs)
{
	struct kretprobe *rp = get_kretprobe(ri);
	struct witness_call *call = (struct witness_call *)ri->data;
	struct witness_probe *probe;

	if (!rp)
		return 1;
	probe = container_of(rp, struct witness_probe, hook);
	call->arg3 = compat_argument(regs, 3);
	return !probe->entry(call, compat_argument(regs, 0),
			     compat_argument(regs, 1));
}
NOKPROBE_SYMBOL(hook_entry);

static int hook_exit(struct kretprobe_instance *ri, struct pt_regs *regs)
{
	struct kretprobe *rp = get_kretprobe(ri);
	struct witness_probe *probe;

	if (!rp)
		return 0;
	probe = container_of(rp, struct witness_probe, hook);
	probe->exit((struct witness_call *)ri->data, compat_result(regs));
	return 0;
}
NOKPROBE_SYMBOL(hook_exit);

static int hook_register(struct witness_probe *probe)
{
	struct kretprobe *rp = &probe->hook;

	*rp = (struct kretprobe) {
		.kp.symbol_name = probe->symbol,
		.entry_handler = hook_entry,
		.handler = hook_exit,
		.data_size = sizeof(struct witness_call),
		.maxactive = MAX_CALLS,
	};
	return register_kretprobe(rp);
}

static void hook_unregister(struct witness_probe *probe)
{
	unregister_kretprobe(&probe->hook);
}

static u64 hook_missed(const struct witness_probe *probe)
{
	/* Without an instance to spare; inside another probe's handler. */
	return (u64)READ_ONCE(probe->hook.nmissed) +
	       READ_ONCE(probe->hook.kp.nmissed);
}

#endif

/**
 * witness_probe_register - start to probe a function
 * @probe: the probe
 *
 * Return: 0, or a negative error, which has been said with the symbol.
 */
int witness_probe_register(struct witness_probe *probe)
{
	int ret = hook_register(probe);

	if (ret) {
		pr_err("cannot probe %s: error %d; is it in this kernel, and can it be traced?\n",
		       probe->symbol, ret);
		return ret;
	}
	probe->registered = true;
	return 0;
}

/**
 * witness_probe_missed - calls that a probe has not seen
 * @probe: the probe
 *
 * Return: how many since it was registered.
 */
u64 witness_probe_missed(const struct witness_probe *probe)
{
	return probe->registered ? hook_missed(probe) : 0;
}

/**
 * witness_probe_unregister - stop to probe a function
 * @probe: the probe; nothing happens if it is not registered
 *
 * When it returns, neither of the probe's functions runs nor will run.
 *
 * Return: how many calls it has missed.
 */
u64 witness_probe_unregister(struct witness_probe *probe)
{
	u64 missed;

	if (!probe->registered)
		return 0;
	hook_unregister(probe);
	missed = hook_missed(probe);
	probe->registered = false;
	return missed;
}
