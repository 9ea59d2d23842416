// SPDX-License-Identifier: GPL-2.0
/*
 * Gates: places where a task waits until it is let go on, by the host or by the
 * workload, and always in bounded time.
 *
 * A task that comes to a gate takes a slot, reports it, and looks at the slot's
 * register from time to time: each look is a register access of its own, since
 * one that is held back would stop the whole machine. Where it may sleep it
 * does so in between. Where it may not it spins, for a millisecond, and only if
 * another CPU is left for whoever is to come.
 *
 * A task may have a role. It is told to the host with all that the task does,
 * and only of tasks that have one it is known where they are asleep.
 *
 * Lock: gate_lock, a raw spinlock, a leaf: records are reported outside of it.
 * setup_lock, a mutex, is held around changes of what gates there are.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/atomic.h>
#include <linux/cpumask.h>
#include <linux/delay.h>
#include <linux/errno.h>
#include <linux/kernel.h>
#include <linux/ktime.h>
#include <linux/mutex.h>
#include <linux/pid.h>
#include <linux/preempt.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/sched/task.h>
#include <linux/spinlock.h>
#include <linux/string.h>
#include <linux/workqueue.h>

#include "gate.h"
#include "witness.h"

#define SITES WITNESS_GATE_SITES
#define SLOTS WITNESS_GATE_SLOTS
/* Tasks that can have a role at once. */
#define PEOPLE 64
#define ROLE_BYTES HMM_WITNESS_ROLE_BYTES
/* How long a task spins that cannot sleep. */
#define SPIN_NS NSEC_PER_MSEC
/* How often it is looked where tasks are asleep. */
#define LOOK msecs_to_jiffies(10)
/* Bits of REACHED's first word, and of a waiter that does not wait. */
#define REACHED_SPINS BIT_ULL(32)
#define REACHED_GOES_ON BIT_ULL(33)

enum site_sort {
	SITE_UNUSED,
	SITE_FUNCTION,
	SITE_WATCHED,
	SITE_OFFSET,
	SITE_USER,
};

/**
 * struct site - a place where tasks can be held, or are looked for
 * @sort: what it is
 * @flags: HMM_WITNESS_SITE_*
 * @name: of a gate in user space
 * @gives: role of a task that has none; of one that is opened in the guest: only
 *	tasks that have this role are held there
 * @open: of one that is opened in the guest: it is
 * @admitted: of such a one: so many may go on though it is not
 * @waiting: tasks that wait here
 * @reached: tasks that have come here since it was armed
 */
struct site {
	enum site_sort sort;
	u32 flags;
	char name[sizeof_field(struct hmm_witness_point, name)];
	char gives[ROLE_BYTES];
	bool open;
	u32 admitted;
	u32 waiting;
	u32 reached;
};

/**
 * struct person - a task that has a role
 * @task: the task, referenced; NULL: not in use
 * @role: its role
 * @inside: by site, how often it is in a watched function
 * @switches: context switches at the last look at which it was asleep in one
 * @looks: such looks in a row
 * @reported: by site: it was reported as blocked there
 */
struct person {
	struct task_struct *task;
	char role[ROLE_BYTES];
	u8 inside[SITES];
	unsigned long switches;
	unsigned int looks;
	u64 reported;
};

static DEFINE_MUTEX(setup_lock);
static DEFINE_RAW_SPINLOCK(gate_lock);
static struct site sites[SITES];
static struct person people[PEOPLE];
/* By slot, who waits in it. */
static struct task_struct *waiters[SLOTS];
/* The channel to the host is open. */
static bool open;
/* A repetition is under way. */
static bool armed;
static u64 iteration;
static u32 limit;
/* A task did not leave a hooked function: nothing is hooked any more. */
static bool stuck;
/* Tasks in the code below. */
static atomic_t busy;
static atomic_t spinning;
static atomic_t beats;

static void look(struct work_struct *work);
static DECLARE_DELAYED_WORK(look_work, look);

static u64 role_word(const char *role, unsigned int half)
{
	u64 word;

	memcpy(&word, role + 8 * half, sizeof(word));
	return le64_to_cpu((__force __le64)word);
}

static void report(u32 kind, u64 arg0, const char *role, u64 arg3)
{
	witness_report(kind, 0, arg0, role_word(role, 0), role_word(role, 1), arg3);
}

/**
 * gate_begin - may the running task go on to the functions below?
 *
 * Return: true; then gate_end() is called in the end.
 */
bool gate_begin(void)
{
	if (!READ_ONCE(armed))
		return false;
	atomic_inc(&busy);
	/* Pairs with gates_close(): it sees us, or we see it. */
	smp_mb__after_atomic();
	if (READ_ONCE(open))
		return true;
	atomic_dec(&busy);
	return false;
}

void gate_end(void)
{
	atomic_dec(&busy);
}

static struct person *find_person(const struct task_struct *task)
{
	unsigned int i;

	lockdep_assert_held(&gate_lock);
	for (i = 0; i < PEOPLE; i++) {
		if (people[i].task == task)
			return &people[i];
	}
	return NULL;
}

static struct person *new_person(struct task_struct *task, const char *role)
{
	struct person *person = find_person(NULL);

	if (!person)
		return NULL;
	memset(person, 0, sizeof(*person));
	person->task = get_task_struct(task);
	memcpy(person->role, role, ROLE_BYTES);
	return person;
}

/* The caller puts the task, without the lock. */
static struct task_struct *drop_person(struct person *person)
{
	struct task_struct *task = person->task;

	person->task = NULL;
	return task;
}

static bool at_a_gate(const struct task_struct *task)
{
	unsigned int i;

	lockdep_assert_held(&gate_lock);
	for (i = 0; i < SLOTS; i++) {
		if (waiters[i] == task)
			return true;
	}
	return false;
}

static int take_slot(void)
{
	unsigned int i;

	for (i = 0; i < SLOTS; i++) {
		if (!waiters[i]) {
			waiters[i] = current;
			return i;
		}
	}
	return -1;
}

static bool may_sleep_here(void)
{
	/* Without a count of preemption it is not known who holds a spinlock. */
	if (!IS_ENABLED(CONFIG_PREEMPT_COUNT) || !preemptible() ||
	    rcu_preempt_depth())
		return false;
	/* On its way to sleep already: it would wake up for us, and not for that. */
	return task_is_running(current);
}

static bool is_open(struct site *site, int slot)
{
	unsigned long flags;
	bool admitted;

	if (!(site->flags & HMM_WITNESS_SITE_LOCAL))
		return witness_gate(slot);
	if (READ_ONCE(site->open))
		return true;
	if (!READ_ONCE(site->admitted))
		return false;
	raw_spin_lock_irqsave(&gate_lock, flags);
	admitted = site->admitted;
	if (admitted)
		site->admitted--;
	raw_spin_unlock_irqrestore(&gate_lock, flags);
	return admitted;
}

/* Waits at a gate. Return: why it goes on, WITNESS_GATE_PASS_*. */
static u32 wait_at(struct site *site, int slot, bool sleeps)
{
	u32 why = site->flags & HMM_WITNESS_SITE_LOCAL ? WITNESS_GATE_PASS_LOCAL :
							 WITNESS_GATE_PASS_OPENED;
	unsigned int began = atomic_read(&beats);
	u64 until = ktime_get_mono_fast_ns() + SPIN_NS;

	if (!sleeps && atomic_inc_return(&spinning) >= num_online_cpus())
		why = WITNESS_GATE_PASS_NO_CPU;
	while (why != WITNESS_GATE_PASS_NO_CPU && !is_open(site, slot)) {
		if (!READ_ONCE(armed)) {
			why = WITNESS_GATE_PASS_OVER;
			break;
		}
		if (!sleeps) {
			if (ktime_get_mono_fast_ns() > until) {
				why = WITNESS_GATE_PASS_SPUN;
				break;
			}
			cpu_relax();
			continue;
		}
		if (atomic_read(&beats) - began >= READ_ONCE(limit)) {
			why = WITNESS_GATE_PASS_LIMIT;
			break;
		}
		/* Not counted as blocked by those who look for hung tasks. */
		usleep_range_state(100, 300, TASK_IDLE);
	}
	if (!sleeps)
		atomic_dec(&spinning);
	return why;
}

/* Whether only tasks of one role are held there. */
static bool of_one_role(const struct site *site)
{
	return site->flags & HMM_WITNESS_SITE_LOCAL && *site->gives;
}

/* Without the lock: what a task itself has or has not does not change meanwhile. */
static bool has_role(const struct task_struct *task)
{
	unsigned int i;

	for (i = 0; i < PEOPLE; i++) {
		if (READ_ONCE(people[i].task) == task)
			return true;
	}
	return false;
}

/**
 * gate_stop - the running task has come to a gate
 * @number: the site
 * @value: told to the host
 *
 * From any context but an NMI.
 */
void gate_stop(unsigned int number, u64 value)
{
	struct site *site = &sites[number];
	char role[ROLE_BYTES] = "";
	bool waits, sleeps, given = false;
	struct person *person;
	unsigned long flags;
	int slot = -1;
	u32 why;
	u64 word;

	if (in_nmi())
		return;
	/* It may be a function that the whole kernel calls. */
	if (of_one_role(site) && !has_role(current))
		return;
	sleeps = may_sleep_here();

	raw_spin_lock_irqsave(&gate_lock, flags);
	/* What a task does at a gate is not the kernel's doing. */
	if (!armed || site->sort == SITE_UNUSED || at_a_gate(current)) {
		raw_spin_unlock_irqrestore(&gate_lock, flags);
		return;
	}
	person = find_person(current);
	if (of_one_role(site) &&
	    (!person || strcmp(person->role, site->gives))) {
		raw_spin_unlock_irqrestore(&gate_lock, flags);
		return;
	}
	if (!person && *site->gives && in_task()) {
		person = new_person(current, site->gives);
		given = person;
	}
	if (person)
		memcpy(role, person->role, ROLE_BYTES);
	waits = !(site->flags & HMM_WITNESS_SITE_RECORD) &&
		site->sort != SITE_OFFSET;
	if (waits)
		slot = take_slot();
	waits = slot >= 0;
	site->reached++;
	site->waiting += waits;
	raw_spin_unlock_irqrestore(&gate_lock, flags);

	if (given)
		report(WITNESS_GATE_ROLE, 0, role, task_pid_nr(current));
	word = number | (u64)(waits ? slot : WITNESS_GATE_NO_SLOT) << 16;
	report(WITNESS_GATE_REACHED,
	       word | (waits && !sleeps ? REACHED_SPINS : 0) |
	       (waits ? 0 : REACHED_GOES_ON), role, value);
	if (!waits)
		return;

	why = wait_at(site, slot, sleeps);
	report(WITNESS_GATE_PASSED, word | (u64)why << 32, role, 0);

	raw_spin_lock_irqsave(&gate_lock, flags);
	waiters[slot] = NULL;
	site->waiting--;
	raw_spin_unlock_irqrestore(&gate_lock, flags);
}

/**
 * gate_watch_enter - the running task enters a watched function
 * @number: the site
 *
 * Return: whether it is to be told when the task leaves it.
 */
bool gate_watch_enter(unsigned int number)
{
	struct person *person;
	unsigned long flags;
	bool known = false;

	if (!in_task())
		return false;
	raw_spin_lock_irqsave(&gate_lock, flags);
	person = armed ? find_person(current) : NULL;
	if (person && person->inside[number] < U8_MAX) {
		person->inside[number]++;
		person->looks = 0;
		known = true;
	}
	raw_spin_unlock_irqrestore(&gate_lock, flags);
	return known;
}

/**
 * gate_watch_exit - the running task leaves a watched function
 * @number: the site
 */
void gate_watch_exit(unsigned int number)
{
	char role[ROLE_BYTES];
	struct person *person;
	unsigned long flags;
	bool told = false;

	raw_spin_lock_irqsave(&gate_lock, flags);
	person = find_person(current);
	/* Of an earlier repetition, perhaps. */
	if (person && person->inside[number]) {
		person->inside[number]--;
		person->looks = 0;
		told = person->reported & BIT_ULL(number);
		person->reported &= ~BIT_ULL(number);
		memcpy(role, person->role, ROLE_BYTES);
	}
	raw_spin_unlock_irqrestore(&gate_lock, flags);
	if (told)
		report(WITNESS_GATE_LEFT, number, role, task_pid_nr(current));
}

/*
 * A task is asleep in a watched function if at two looks it did not run, and
 * has not run in between.
 */
static u64 asleep_in(struct person *person)
{
	struct task_struct *task = person->task;
	unsigned long switches = READ_ONCE(task->nvcsw) + READ_ONCE(task->nivcsw);
	u64 inside = 0;
	unsigned int i;

	for (i = 0; i < SITES; i++)
		inside |= person->inside[i] ? BIT_ULL(i) : 0;
	if (!inside || task_is_running(task) || at_a_gate(task)) {
		person->looks = 0;
		return 0;
	}
	if (!person->looks || person->switches != switches) {
		person->switches = switches;
		person->looks = 1;
		return 0;
	}
	inside &= ~person->reported;
	person->reported |= inside;
	return inside;
}

static void look_at(struct person *person)
{
	struct task_struct *ended = NULL;
	char role[ROLE_BYTES];
	unsigned long flags;
	unsigned int i;
	u64 asleep = 0;
	pid_t pid;

	raw_spin_lock_irqsave(&gate_lock, flags);
	if (!person->task) {
		raw_spin_unlock_irqrestore(&gate_lock, flags);
		return;
	}
	pid = task_pid_nr(person->task);
	memcpy(role, person->role, ROLE_BYTES);
	if (READ_ONCE(person->task->exit_state))
		ended = drop_person(person);
	else
		asleep = asleep_in(person);
	raw_spin_unlock_irqrestore(&gate_lock, flags);

	if (ended) {
		report(WITNESS_GATE_ROLE, 1, role, pid);
		put_task_struct(ended);
	}
	for (i = 0; i < SITES; i++) {
		if (asleep & BIT_ULL(i))
			report(WITNESS_GATE_BLOCKED, i, role, pid);
	}
}

static void look(struct work_struct *work)
{
	unsigned int i;

	for (i = 0; i < PEOPLE; i++)
		look_at(&people[i]);
	if (READ_ONCE(armed))
		queue_delayed_work(system_unbound_wq, &look_work, LOOK);
}

/* Context: setup_lock. */
static void disarm(void)
{
	struct task_struct *left[PEOPLE];
	unsigned long flags;
	unsigned int i;

	if (!armed)
		return;
	raw_spin_lock_irqsave(&gate_lock, flags);
	WRITE_ONCE(armed, false);
	raw_spin_unlock_irqrestore(&gate_lock, flags);
	cancel_delayed_work_sync(&look_work);
	/* They do not stay: each looks whether this is over. */
	while (atomic_read(&busy))
		usleep_range(100, 300);

	raw_spin_lock_irqsave(&gate_lock, flags);
	for (i = 0; i < PEOPLE; i++)
		left[i] = people[i].task ? drop_person(&people[i]) : NULL;
	raw_spin_unlock_irqrestore(&gate_lock, flags);
	for (i = 0; i < PEOPLE; i++) {
		if (left[i])
			put_task_struct(left[i]);
	}
	witness_report(WITNESS_GATE_DISARMED, 0, iteration, 0, 0, 0);
}

static int site_hook(struct site *site, const char *place, unsigned int number)
{
	const char *name;

	if ((name = strstr(place, "user:")) == place) {
		if (strscpy(site->name, name + 5, sizeof(site->name)) <= 0)
			return -EINVAL;
		site->sort = SITE_USER;
		return 0;
	}
	if ((name = strstr(place, "offset:")) == place) {
		site->sort = SITE_OFFSET;
		return hook_add_offset(name + 7, number);
	}
	if ((name = strstr(place, "return:")) == place) {
		site->sort = SITE_FUNCTION;
		return hook_add(HOOK_RETURN, name + 7, number);
	}
	if ((name = strstr(place, "entry:")) != place)
		return -EINVAL;
	site->sort = site->flags & HMM_WITNESS_SITE_WATCH ? SITE_WATCHED :
							    SITE_FUNCTION;
	return hook_add(site->sort == SITE_WATCHED ? HOOK_WATCH : HOOK_ENTRY,
			name + 6, number);
}

static long gates_add(const struct hmm_witness_site *arg)
{
	struct site *site;
	int ret;

	if (arg->id >= SITES || arg->place[sizeof(arg->place) - 1] ||
	    arg->gives[sizeof(arg->gives) - 1])
		return -EINVAL;
	site = &sites[arg->id];
	if (armed || stuck)
		return -EBUSY;
	if (site->sort != SITE_UNUSED)
		return -EEXIST;
	memset(site, 0, sizeof(*site));
	site->flags = arg->flags;
	memcpy(site->gives, arg->gives, sizeof(site->gives));
	ret = site_hook(site, arg->place, arg->id);
	if (ret)
		site->sort = SITE_UNUSED;
	return ret;
}

static long gates_arm(const struct hmm_witness_arm *arg)
{
	unsigned int i;
	u64 there = 0, local = 0;

	if (arg->reserved || !arg->limit)
		return -EINVAL;
	if (armed || stuck)
		return -EBUSY;
	for (i = 0; i < SITES; i++) {
		sites[i].open = false;
		sites[i].admitted = 0;
		sites[i].reached = 0;
		sites[i].waiting = 0;
		if (sites[i].sort == SITE_UNUSED)
			continue;
		there |= BIT_ULL(i);
		if (sites[i].flags & HMM_WITNESS_SITE_LOCAL)
			local |= BIT_ULL(i);
	}
	iteration = arg->iteration;
	WRITE_ONCE(limit, arg->limit);
	witness_report(WITNESS_GATE_ARMED, 0, iteration, there, local, 0);
	WRITE_ONCE(armed, true);
	queue_delayed_work(system_unbound_wq, &look_work, LOOK);
	return 0;
}

static long gates_clear(void)
{
	unsigned int i;
	int ret;

	disarm();
	ret = hook_clear();
	for (i = 0; i < SITES; i++)
		sites[i].sort = SITE_UNUSED;
	if (ret && !stuck) {
		stuck = true;
		pr_warn("a task does not leave a function that was watched\n");
	}
	return ret;
}

/**
 * gates_setup - what is done with all gates
 * @cmd: HMM_WITNESS_GATE_ADD, _ARM, _DISARM or _CLEAR
 * @arg: its argument, or NULL
 *
 * Context: may sleep.
 * Return: as <hmm_witness_uapi.h> says.
 */
long gates_setup(unsigned int cmd, const void *arg)
{
	long ret = 0;

	mutex_lock(&setup_lock);
	if (!open)
		ret = -ENODEV;
	else if (cmd == HMM_WITNESS_GATE_ADD)
		ret = gates_add(arg);
	else if (cmd == HMM_WITNESS_GATE_ARM)
		ret = gates_arm(arg);
	else if (cmd == HMM_WITNESS_GATE_DISARM)
		disarm();
	else
		ret = gates_clear();
	mutex_unlock(&setup_lock);
	return ret;
}

/**
 * gates_role - give the running task a role
 * @name: the role, of ROLE_BYTES; empty: it has none any more
 *
 * Return: 0; -ENOSPC if too many have one. Nothing happens if no gate is armed.
 */
long gates_role(const char *name)
{
	struct task_struct *gone = NULL;
	struct person *person;
	char role[ROLE_BYTES];
	unsigned long flags;
	bool told = false;
	long ret = 0;

	if (name[ROLE_BYTES - 1])
		return -EINVAL;
	if (!gate_begin())
		return 0;
	memcpy(role, name, ROLE_BYTES);
	raw_spin_lock_irqsave(&gate_lock, flags);
	person = find_person(current);
	if (!armed) {
		/* It ends at this moment. */
	} else if (!*name) {
		told = person;
		if (person) {
			memcpy(role, person->role, ROLE_BYTES);
			gone = drop_person(person);
		}
	} else if (person) {
		memcpy(person->role, name, ROLE_BYTES);
		told = true;
	} else {
		person = new_person(current, name);
		told = person;
		ret = person ? 0 : -ENOSPC;
	}
	raw_spin_unlock_irqrestore(&gate_lock, flags);
	if (told)
		report(WITNESS_GATE_ROLE, gone ? 1 : 0, role, task_pid_nr(current));
	gate_end();
	if (gone)
		put_task_struct(gone);
	return ret;
}

/**
 * gates_point - the running task is at a gate in user space
 * @name: its name, of as many bytes as a site keeps
 */
long gates_point(const char *name)
{
	unsigned int i;

	if (name[sizeof(sites[0].name) - 1])
		return -EINVAL;
	if (!gate_begin())
		return 0;
	for (i = 0; i < SITES; i++) {
		if (sites[i].sort == SITE_USER && !strcmp(sites[i].name, name))
			gate_stop(i, 0);
	}
	gate_end();
	return 0;
}

/**
 * gates_local - look at a gate that is opened in the guest, and do so
 * @arg: what; out: how it stands there
 *
 * Return: 0 or -EINVAL.
 */
long gates_local(struct hmm_witness_local *arg)
{
	struct site *site;
	unsigned long flags;

	if (arg->id >= SITES || arg->what > 3)
		return -EINVAL;
	site = &sites[arg->id];
	if (!(READ_ONCE(site->flags) & HMM_WITNESS_SITE_LOCAL))
		return -EINVAL;
	raw_spin_lock_irqsave(&gate_lock, flags);
	if (arg->what == 3) {
		site->admitted++;
	} else if (arg->what) {
		site->open = arg->what == 1;
		/* Who was admitted and did not come is not admitted later. */
		site->admitted = 0;
	}
	arg->waiting = site->waiting;
	arg->reached = site->reached;
	raw_spin_unlock_irqrestore(&gate_lock, flags);
	return 0;
}

/**
 * gates_beat - another heartbeat
 */
void gates_beat(void)
{
	atomic_inc(&beats);
}

/**
 * gates_open - the channel to the host is open
 */
void gates_open(void)
{
	mutex_lock(&setup_lock);
	WRITE_ONCE(open, true);
	mutex_unlock(&setup_lock);
}

/**
 * gates_close - it is about to be closed
 *
 * When it returns nobody is at a gate or comes to one, and no hook is left.
 */
void gates_close(void)
{
	mutex_lock(&setup_lock);
	while (gates_clear() == -EBUSY)
		msleep(100);
	WRITE_ONCE(open, false);
	/* Pairs with gate_begin(). */
	smp_mb();
	while (atomic_read(&busy))
		usleep_range(100, 300);
	mutex_unlock(&setup_lock);
}
