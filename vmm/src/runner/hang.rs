// SPDX-License-Identifier: MIT OR Apache-2.0
//! Why a guest that lives gets nothing done: from the stacks it printed and from what the device stands at.
//!
//! The stacks are those of blocked tasks (sysrq w), of CPUs that are not idle (sysrq l), and of tasks that could run (the
//! witness). They are two looks: who is at work in both, while the device does nothing, works without end. What the device did
//! meanwhile says the rest.

use vgpu::oracle::{Rule, Violation};

use super::locks;
use crate::console::lines::printk;

/// What the device stands at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// A number that changes when the device does anything.
    pub activity: u64,
    /// Accesses parked by a fault.
    pub faults_parked: u64,
    /// Entries of the fault buffer that the driver has not taken.
    pub faults_untaken: u64,
    /// Interrupts sent so far.
    pub interrupts: u64,
}

/// What is known of a hang.
#[derive(Clone, Debug)]
pub struct Clues {
    /// What the guest printed when it was asked first.
    pub before: Vec<String>,
    /// What it printed when it was asked again; what it printed first counts if there is nothing.
    pub stacks: Vec<String>,
    /// What the device stands at.
    pub standing: Standing,
    /// It has done nothing since the guest was asked.
    pub still: bool,
    /// Heartbeats without progress.
    pub heartbeats: u64,
    /// Where in the plan, such as `in access`.
    pub place: String,
    /// What tasks are called in the scenario that runs, by thread id.
    pub roles: Vec<(u32, String)>,
}

/// Functions in which a task that sleeps waits for what another has to let go, or to end.
const LOCKS: &[&str] = &[
    "mutex_lock",
    "rwsem_down",
    "down_read",
    "down_write",
    "rt_mutex",
    "rtlock_",
    "rwbase_",
    "percpu_rwsem",
    "percpu_down",
    "folio_lock",
    "folio_wait",
    "lock_page",
    "mmu_interval_read_begin",
    "mmu_interval_notifier_remove",
    "mmu_notifier_unregister",
    "synchronize_",
    "rcu_barrier",
    "flush_work",
    "cancel_work",
    "drain_workqueue",
    "kthread_stop",
    "kthread_flush",
];

/// Functions in which a task on a CPU waits for a lock. One that runs may be seen inside of `down_read()` or `__rcu_read_lock()` by chance,
/// if it takes and leaves locks over and over; it stays in these only if it does not get one.
const SPINS: &[&str] =
    &["spin_lock_slowpath", "read_lock_slowpath", "write_lock_slowpath", "osq_lock", "spin_on_owner"];

/// Functions in which a task sleeps for a time and not for an event.
/// (`schedule_timeout` covers its sorts by state, which end by jumping into it; an event that is waited for in this state with a
/// time limit is one that is looked for again as well.)
const SLEEPS: &[&str] = &["schedule_timeout", "schedule_hrtimeout", "msleep", "usleep_range", "fsleep"];

/// Lines of one task kept at most: a recursion has no end.
const MAX_FRAMES: usize = 40;
/// Tasks named in a summary.
const MAX_NAMED: usize = 4;

/// A task in the dump.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Task {
    name: String,
    pid: String,
    blocked: bool,
    running: bool,
    /// Of a kernel worker that has something to do: the function and its module. The stack of a task that runs while another CPU prints
    /// it is nothing but guesses; this is read from the worker itself.
    work: String,
    /// `function+0x1/0x2 [module]`, innermost first.
    frames: Vec<String>,
    /// What a report shows of it.
    lines: Vec<String>,
}

impl Task {
    /// The innermost frame that waits for a lock, and where in the frames it is.
    fn lock(&self) -> Option<usize> {
        let waits = if self.running { SPINS } else { LOCKS };
        self.frames.iter().position(|frame| waits.iter().any(|wait| function(frame).contains(wait)))
    }

    /// Whether it is at work in a module or in what drivers mirror with, and not only on the CPU by chance.
    fn at_work(&self) -> bool {
        let concerns = |frame: &String| {
            frame.ends_with(']')
                || ["hmm_", "mmu_interval", "mmu_notifier"].iter().any(|f| frame.starts_with(f))
        };
        let at = self.frames.iter().any(concerns) || self.work.ends_with(']');
        self.running && self.name != "hmm_witness" && at
    }

    /// Whether it sleeps for a time, uninterruptibly, in a module: what it waits for tells nobody, and is looked for again and again.
    fn looks_now_and_then(&self) -> bool {
        let sleeps = |frame: &String| SLEEPS.iter().any(|sleep| function(frame).starts_with(sleep));
        // The module's frame is next but for its own sort of sleep.
        let asleep = self.frames.iter().rposition(sleeps);
        self.blocked
            && asleep.is_some_and(|at| self.frames.get(at + 1).is_some_and(|frame| frame.ends_with(']')))
    }

    /// For a sentence: who, in what, for whom.
    fn told(&self) -> String {
        let name = format!("{} (pid {})", self.name, self.pid);
        let inner = self.lock().or_else(|| {
            let outside = |f: &String| !["__schedule", "schedule"].iter().any(|s| function(f).starts_with(s));
            self.frames.iter().position(outside)
        });
        let Some(inner) = inner else {
            return if self.work.is_empty() { name } else { format!("{name} in {}", self.work) };
        };
        let rest = &self.frames[inner..];
        let caller = rest.iter().skip(1).find(|frame| frame.ends_with(']'));
        let module = |frame: &str| frame.rfind(" [").map_or(String::new(), |at| frame[at..].to_owned());
        let at = format!("{}{}", function(&rest[0]), module(&rest[0]));
        match caller {
            Some(frame) => format!("{name} in {at}, from {}{}", function(frame), module(frame)),
            None => format!("{name} in {at}"),
        }
    }
}

fn function(frame: &str) -> &str {
    frame.split('+').next().unwrap_or(frame)
}

/// A stack line's frame, if it is one and no guess.
fn frame(text: &str) -> Option<&str> {
    let text = text.trim();
    let (name, rest) = text.split_once("+0x")?;
    let plain = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "_.$".contains(c));
    (plain && rest.contains("/0x")).then_some(text)
}

fn word_after<'a>(text: &'a str, mark: &str) -> Option<&'a str> {
    text.split_once(mark)?.1.split_whitespace().next()
}

/// The tasks that a dump shows, without those that idle.
fn tasks(stacks: &[String]) -> Vec<Task> {
    let mut tasks: Vec<Task> = Vec::new();
    let mut open = false;
    for line in stacks {
        let text = printk(line).map_or(line.as_str(), |(_, text)| text).trim_end();
        if let Some((name, rest)) = text.strip_prefix("task:").and_then(|text| text.split_once("state:")) {
            open = true;
            tasks.push(Task {
                name: name.trim().to_owned(),
                pid: word_after(rest, "pid:").unwrap_or("?").to_owned(),
                blocked: rest.starts_with('D'),
                running: rest.starts_with('R'),
                lines: vec![text.to_owned()],
                ..Task::default()
            });
        } else if text.starts_with("NMI backtrace for cpu") {
            open = !text.contains("skipped");
            if open {
                let lines = vec![text.to_owned()];
                tasks.push(Task { running: true, lines, ..Task::default() });
            }
        } else if text.starts_with("sysrq:") || text.starts_with("Sending NMI from") {
            open = false;
        } else if let Some(task) = tasks.last_mut().filter(|_| open) {
            task.line(text);
        }
    }
    // A CPU's task may stand in the list of those that can run as well; the CPU's own stack is the better one.
    let mut once: Vec<Task> = Vec::new();
    for task in tasks {
        match once.iter_mut().find(|known| known.pid == task.pid) {
            Some(known) if known.frames.len() < task.frames.len() => *known = task,
            Some(_) => {}
            None => once.push(task),
        }
    }
    once
}

impl Task {
    /// Takes a line of its block.
    fn line(&mut self, text: &str) {
        if let Some(name) = word_after(text, "Comm:").filter(|_| text.starts_with("CPU:")) {
            self.name = name.to_owned();
            self.pid = word_after(text, "PID:").unwrap_or("?").to_owned();
            self.lines.push(text.to_owned());
        } else if let Some(work) = text.strip_prefix("Workqueue:") {
            // The queue's name comes first, and last what the worker says of itself, if it does.
            let work = work.trim().split_once(' ').map_or("", |(_, work)| work);
            self.work = work.split_once(" (").map_or(work, |(work, _)| work).to_owned();
            self.lines.push(text.to_owned());
        } else if let Some(frame) = text.strip_prefix("RIP: ").and_then(|rip| frame(rip.split_once(':')?.1)) {
            self.push(frame);
        } else if let Some(frame) = frame(text) {
            self.push(frame);
        }
    }

    fn push(&mut self, frame: &str) {
        if self.frames.len() < MAX_FRAMES {
            self.frames.push(frame.to_owned());
            self.lines.push(format!("  {frame}"));
        }
    }
}

fn told(tasks: &[&Task]) -> String {
    let named: Vec<String> = tasks.iter().take(MAX_NAMED).map(|task| task.told()).collect();
    let more = tasks.len().saturating_sub(MAX_NAMED);
    let more = if more > 0 { format!("; and {more} more") } else { String::new() };
    format!("{}{more}", named.join("; "))
}

/// What kind of hang it is, and the stacks that show it.
///
/// A circle of locks that the driver tells of outranks everything. Then comes who is at work both times while the device does
/// nothing: whoever waits for a lock waits for that one, since in a deadlock nobody is at work. Then who waits for a lock, for others
/// may just wait for those; then who looks again and again for what does not come. Only if there is none of these it is a matter of
/// news that nobody took: then the device stands still.
#[must_use]
pub fn judge(clues: &Clues) -> Violation {
    let before = tasks(&clues.before);
    let (all, printed) = match tasks(&clues.stacks) {
        none if none.is_empty() => (before.clone(), &clues.before),
        some => (some, &clues.stacks),
    };
    let blocked: Vec<&Task> = all.iter().filter(|task| task.blocked).collect();
    let locked: Vec<&Task> =
        all.iter().filter(|task| task.lock().is_some() && (task.blocked || task.at_work())).collect();
    let at_work = |task: &Task| task.at_work() && task.lock().is_none();
    let busy: Vec<&Task> = all.iter().filter(|task| at_work(task)).collect();
    let lasts = |task: &&Task| before.iter().any(|then| then.pid == task.pid && at_work(then));
    let endless: Vec<&Task> = busy.iter().copied().filter(lasts).collect();
    // What they were at is not known, but that they were at work before, and have not slept since.
    let unread: Vec<&Task> =
        all.iter().filter(|task| task.running && task.frames.is_empty() && lasts(task)).collect();
    let waits_on = |task: &Task| before.iter().any(|then| then.pid == task.pid && then.looks_now_and_then());
    let looking: Vec<&Task> = all.iter().filter(|task| task.looks_now_and_then() && waits_on(task)).collect();
    let Standing { faults_parked: parked, faults_untaken: untaken, interrupts, .. } = clues.standing;
    // The driver's own word on its locks, where it has one, says who waits for whom.
    let circle = locks::deadlock(printed, &clues.roles);
    let (rule, what) = if let Some((circle, _)) = &circle {
        (Rule::HangDeadlock, circle.clone())
    } else if clues.still && !endless.is_empty() {
        let waiting = if locked.is_empty() { "no task waits for a lock" } else { "the device stands still" };
        (Rule::HangLivelock, format!("{waiting}; at work without end: {}", told(&endless)))
    } else if !locked.is_empty() {
        (Rule::HangDeadlock, format!("blocked: {}", told(&locked)))
    } else if !busy.is_empty() || !unread.is_empty() {
        let busy = if busy.is_empty() { &unread } else { &busy };
        (Rule::HangLivelock, format!("no task waits for a lock; at work without end: {}", told(busy)))
    } else if clues.still && untaken == 0 && !looking.is_empty() {
        (Rule::HangDeadlock, format!("looked for again and again, and does not come: {}", told(&looking)))
    } else if clues.still && parked == 0 {
        let text = format!(
            "the device has done all it was given and sent {interrupts} interrupts, no task is at work, and whoever waits was not told"
        );
        (Rule::HangLostInterrupt, text)
    } else if clues.still && untaken > 0 {
        let text = format!("{untaken} entries stand in the fault buffer and nobody takes them");
        (Rule::HangLostInterrupt, text)
    } else if clues.still {
        let text = format!(
            "{parked} faults were taken from the fault buffer and never answered; no task is at work on them"
        );
        (Rule::FaultUnanswered, text)
    } else if !blocked.is_empty() {
        (Rule::HangDeadlock, format!("blocked: {}", told(&blocked)))
    } else {
        (Rule::HangLivelock, "no task is blocked, and the device is kept busy".to_owned())
    };
    let text = format!("no progress for {} heartbeats {}: {what}", clues.heartbeats, clues.place);
    let mut violation = Violation::new(rule, text);
    let mut shown: Vec<&Task> = if rule == Rule::HangLivelock { endless } else { locked.clone() };
    for task in busy.iter().chain(&unread).chain(&locked).chain(&blocked) {
        if !shown.contains(task) {
            shown.push(task);
        }
    }
    let waits = circle.map_or(Vec::new(), |(_, waits)| waits);
    let stacks = shown.iter().flat_map(|task| task.lines.iter().cloned());
    violation.events = waits.into_iter().chain(stacks).collect();
    if violation.events.is_empty() {
        violation.events = printed.clone();
    }
    violation
}

#[cfg(test)]
#[path = "hang_test.rs"]
mod tests;
