// SPDX-License-Identifier: MIT OR Apache-2.0
use super::*;

const INVERSION: &str = "\
[   40.000001] sysrq: Show Blocked State
[   40.000002] task:agent           state:D stack:0     pid:88    tgid:88    ppid:60     task_flags:0x400040 flags:0x00004002
[   40.000003] Call Trace:
[   40.000004]  <TASK>
[   40.000005]  __schedule+0x4f0/0xb20
[   40.000006]  ? guess+0x1/0x2
[   40.000007]  schedule+0x27/0xf0
[   40.000008]  __mutex_lock.constprop.0+0x3a0/0x6b0
[   40.000009]  vgpu_mirror_invalidate+0x5a/0x120 [hmm_vgpu]
[   40.000010]  __mmu_notifier_invalidate_range_start+0x1/0x2
[   40.000011]  do_syscall_64+0x82/0x190
[   40.000012]  </TASK>
[   40.000013] task:kworker/u8:1    state:D stack:0     pid:31    tgid:31    ppid:2
[   40.000014] Workqueue: hmm_vgpu_fault vgpu_fault_work [hmm_vgpu]
[   40.000015] Call Trace:
[   40.000016]  rwsem_down_read_slowpath+0x1/0x2
[   40.000017]  vgpu_mirror_look+0x1/0x2 [hmm_vgpu]
[   40.000018] sysrq: Show backtrace of all active CPUs
[   40.000019] NMI backtrace for cpu 0
[   40.000020] CPU: 0 UID: 0 PID: 62 Comm: hmm_witness Tainted: G           OE
[   40.000021]  nmi_cpu_backtrace+0x1/0x2
[   40.000022]  requests_act+0x1/0x2 [hmm_witness]
[   40.000023] Sending NMI from CPU 0 to CPUs 1:
[   40.000024] NMI backtrace for cpu 1 skipped: idling at default_idle+0xf/0x20";

const SPINNING: &str = "\
[   40.000018] sysrq: Show backtrace of all active CPUs
[   40.000024] NMI backtrace for cpu 1
[   40.000025] CPU: 1 UID: 0 PID: 31 Comm: kworker/u8:1 Tainted: G           OE
[   40.000026] Workqueue: hmm_vgpu_fault vgpu_fault_work [hmm_vgpu]
[   40.000027] RIP: 0010:hmm_range_fault+0x1f/0x120
[   40.000028] RSP: 0018:ffffc90000123d58 EFLAGS: 00000246
[   40.000029]  vgpu_mirror_fault+0x1/0x2 [hmm_vgpu]
[   40.000030] task:kworker/u8:1    state:R  running task     stack:0     pid:31    tgid:31
[   40.000031] task:pr/ttyS0        state:R  running task     stack:0     pid:19    tgid:19
[   40.000032]  serial8250_console_write+0x1/0x2";

fn clues(stacks: &str, still: bool, standing: Standing) -> Clues {
    let stacks: Vec<String> = stacks.lines().map(str::to_owned).collect();
    Clues {
        before: stacks.clone(),
        stacks,
        standing,
        still,
        heartbeats: 300,
        place: "in access".into(),
        roles: Vec::new(),
    }
}

fn standing(parked: u64, untaken: u64) -> Standing {
    Standing { activity: 7, faults_parked: parked, faults_untaken: untaken, interrupts: 5 }
}

#[test]
fn two_tasks_that_wait_for_each_other() {
    let found = judge(&clues(INVERSION, true, standing(1, 0)));
    assert_eq!(found.rule, Rule::HangDeadlock);
    assert_eq!(
        found.summary,
        "no progress for 300 heartbeats in access: blocked: \
         agent (pid 88) in __mutex_lock.constprop.0, from vgpu_mirror_invalidate [hmm_vgpu]; \
         kworker/u8:1 (pid 31) in rwsem_down_read_slowpath, from vgpu_mirror_look [hmm_vgpu]"
    );
    let shown = found.events.join("\n");
    assert!(shown.contains("  do_syscall_64+0x82/0x190") && shown.contains("Workqueue: hmm_vgpu_fault"));
    for noise in ["guess", "hmm_witness", "idling", "TASK>"] {
        assert!(!shown.contains(noise), "{noise} in\n{shown}");
    }
}

#[test]
fn one_that_goes_round_and_round() {
    let found = judge(&clues(SPINNING, true, standing(1, 0)));
    assert_eq!(found.rule, Rule::HangLivelock);
    assert!(
        found.summary.contains("kworker/u8:1 (pid 31) in hmm_range_fault, from vgpu_mirror_fault [hmm_vgpu]")
    );
    assert!(!found.events.join("\n").contains("ttyS0"));
}

#[test]
fn a_spinning_lock_is_a_lock() {
    let spinning = SPINNING.replace("hmm_range_fault", "native_queued_spin_lock_slowpath");
    assert_eq!(judge(&clues(&spinning, true, standing(0, 0))).rule, Rule::HangDeadlock);
}

/// Whoever goes round takes and leaves locks, and may be seen at it.
#[test]
fn a_lock_that_is_taken_by_the_way_is_no_wait() {
    for by_the_way in
        ["__rcu_read_lock", "down_read", "mmu_interval_read_begin", "_raw_spin_lock", "mutex_lock"]
    {
        let looping = SPINNING.replace("hmm_range_fault", by_the_way);
        assert_eq!(judge(&clues(&looping, true, standing(1, 0))).rule, Rule::HangLivelock, "{by_the_way}");
        let listed = looping.lines().filter(|line| !line.contains("cpu 1")).collect::<Vec<_>>().join("\n");
        let listed = listed.replace(
            "running task     stack:0     pid:31    tgid:31",
            "running task     pid:31\n down_read+0x1/0x2\n vgpu_mirror_fault+0x1/0x2 [hmm_vgpu]",
        );
        assert_eq!(judge(&clues(&listed, true, standing(1, 0))).rule, Rule::HangLivelock, "{by_the_way}");
    }
}

/// Whoever goes round with a lock held makes others wait for it: that is no deadlock. Who is at work in one look only, or while the
/// device is at work, may be anybody.
#[test]
fn at_work_without_end_is_what_lasts() {
    let both = format!("{INVERSION}\n{}", SPINNING.replace("31", "99"));
    let lasting = clues(&both, true, standing(1, 0));
    let found = judge(&lasting);
    assert_eq!(found.rule, Rule::HangLivelock);
    assert!(found.summary.contains("(pid 99) in hmm_range_fault"), "{}", found.summary);
    assert!(
        found.events.iter().any(|line| line.contains("rwsem_down_read_slowpath")),
        "who waits is shown too"
    );
    let once = Clues { before: INVERSION.lines().map(str::to_owned).collect(), ..lasting.clone() };
    assert_eq!(judge(&once).rule, Rule::HangDeadlock);
    assert_eq!(judge(&Clues { still: false, ..lasting.clone() }).rule, Rule::HangDeadlock);
    // A second look that did not come leaves the first.
    assert_eq!(judge(&Clues { stacks: Vec::new(), ..lasting }).rule, Rule::HangLivelock);
}

/// Another CPU printed them while they ran: guesses, and whatever was left on the stack by what ran before.
const UNREADABLE: &str = "\
[   17.133895] sysrq: Show backtrace of all active CPUs
[   17.134150] NMI backtrace for cpu 0
[   17.134151] CPU: 0 UID: 0 PID: 35 Comm: pr/ttyS0 Tainted: G           OE
[   17.134152]  nbcon_emit_one+0x9e/0xf0
[   17.174440] task:kworker/u9:0    state:R  running task     stack:0     pid:31    tgid:31    ppid:2
[   17.174815] Workqueue: hmm_vgpu_fault vgpu_fault_work [hmm_vgpu]
[   17.175006] Call Trace:
[   17.175013]  <TASK>
[   17.175535]  ? vgpu_mirror_fault+0x156/0x6e0 [hmm_vgpu]
[   17.176089]  </TASK>";

#[test]
fn a_worker_that_runs_says_itself_what_it_is_at() {
    let hang = judge(&clues(UNREADABLE, true, standing(1, 0)));
    assert_eq!(hang.rule, Rule::HangLivelock);
    assert!(hang.summary.contains("kworker/u9:0 (pid 31) in vgpu_fault_work [hmm_vgpu]"), "{}", hang.summary);
    let described = UNREADABLE.replace("_work [hmm_vgpu]", "_work [hmm_vgpu] (faults of card 0)");
    assert_eq!(judge(&clues(&described, true, standing(1, 0))).summary, hang.summary);
}

#[test]
fn who_was_at_work_and_still_runs_is_at_work() {
    let of_a_program =
        UNREADABLE.replace("kworker/u9:0", "ioctls").replace("[   17.174815] Workqueue: hmm_vgpu_fault", "");
    let before = SPINNING.lines().map(str::to_owned).collect();
    let now = clues(&of_a_program, true, standing(1, 0));
    assert_eq!(judge(&now).rule, Rule::FaultUnanswered, "what is guessed says nothing");
    let hang = judge(&Clues { before, ..now.clone() });
    assert_eq!(hang.rule, Rule::HangLivelock);
    assert!(hang.summary.contains("at work without end: ioctls (pid 31)"), "{}", hang.summary);
    // It may poll for what somebody else waits for.
    let before = SPINNING.lines().map(str::to_owned).collect();
    let stacks: Vec<String> = INVERSION.lines().chain(of_a_program.lines()).map(str::to_owned).collect();
    let stacks = stacks.iter().map(|line| line.replace("pid:31 ", "pid:32 ")).collect();
    assert_eq!(judge(&Clues { before, stacks, ..now }).rule, Rule::HangDeadlock);
}

#[test]
fn nobody_does_anything() {
    let rule = |still, parked, untaken| judge(&clues("", still, standing(parked, untaken))).rule;
    assert_eq!(rule(true, 0, 0), Rule::HangLostInterrupt);
    assert_eq!(rule(true, 2, 1), Rule::HangLostInterrupt);
    assert_eq!(rule(true, 2, 0), Rule::FaultUnanswered);
    assert_eq!(rule(false, 0, 0), Rule::HangLivelock);
}

#[test]
fn a_wait_that_cannot_be_interrupted_is_no_lock() {
    let waits = "task:agent           state:D stack:0     pid:88    tgid:88\n wait_for_completion+0x1/0x2\n";
    assert_eq!(judge(&clues(waits, true, standing(0, 0))).rule, Rule::HangLostInterrupt);
    assert_eq!(judge(&clues(waits, false, standing(0, 0))).rule, Rule::HangDeadlock);
}

#[test]
fn who_looks_again_and_again_waits_for_what_does_not_come() {
    let text = "\
task:agent           state:D stack:0     pid:88    tgid:88    ppid:60
 __schedule+0x4f0/0xb20
 schedule+0x27/0xf0
 schedule_timeout+0x1/0x2
 vgpu_migrate_evict+0x5a/0x120 [hmm_vgpu]
 vgpu_release+0x5a/0x120 [hmm_vgpu]";
    let found = judge(&clues(text, true, standing(0, 0)));
    assert_eq!(found.rule, Rule::HangDeadlock);
    assert!(
        found
            .summary
            .contains("agent (pid 88) in vgpu_migrate_evict [hmm_vgpu], from vgpu_release [hmm_vgpu]"),
        "{}",
        found.summary
    );
    // What stands in a ring and is not taken says more.
    assert_eq!(judge(&clues(text, true, standing(1, 1))).rule, Rule::HangLostInterrupt);
    // Once is chance.
    let mut once = clues(text, true, standing(0, 0));
    once.before = vec![text.replace("pid:88", "pid:87")];
    assert_eq!(judge(&once).rule, Rule::HangLostInterrupt);
    // An event that does not come is news that nobody took.
    let event = text.replace("schedule_timeout", "wait_for_completion");
    assert_eq!(judge(&clues(&event, true, standing(0, 0))).rule, Rule::HangLostInterrupt);
}

#[test]
fn nonsense_is_no_trouble() {
    for text in ["task:", "task:x state:", "NMI backtrace for cpu", "CPU: Comm:", " +0x/0x", "RIP: "] {
        let _ = judge(&clues(text, true, standing(0, 0)));
        let _ = judge(&clues(&format!("task:a state:D pid:1\n{text}"), true, standing(0, 0)));
    }
}

#[test]
fn a_drivers_word_on_its_locks_says_who_waits_for_whom() {
    let text = "task:a               state:D stack:0     pid:1     tgid:1     ppid:1      flags:0x0
Call Trace:
 schedule+0x1/0x2
 rwsem_down_read_slowpath+0x1/0x2
[    9.000001] hmm_vgpu: hmm_lock: a/1 holds x (exclusive) since 1
[    9.000002] hmm_vgpu: hmm_lock: a/1 waits for y (exclusive) since 3
[    9.000003] hmm_vgpu: hmm_lock: b/2 holds y (exclusive) since 2
[    9.000004] hmm_vgpu: hmm_lock: b/2 waits for x (exclusive) since 4";
    let mut clues = clues(text, true, Standing::default());
    clues.roles = vec![(2, "B".into())];
    let violation = judge(&clues);
    assert_eq!(violation.rule, Rule::HangDeadlock);
    assert!(
        violation.summary.ends_with("B waits for a (pid 1) (x), a (pid 1) waits for B (y)"),
        "{}",
        violation.summary
    );
    assert_eq!(violation.events[0], "B (b/2) waits for x, held by a (pid 1)");
    assert!(violation.events.iter().any(|line| line.contains("rwsem_down_read_slowpath")));
}
