// SPDX-License-Identifier: MIT OR Apache-2.0
use super::*;

fn all(text: &str) -> Vec<Splat> {
    let mut recogniser = Recogniser::default();
    let mut found: Vec<Splat> = text.lines().filter_map(|line| recogniser.line(line)).collect();
    found.extend(recogniser.idle());
    found
}

fn kinds(text: &str) -> Vec<SplatKind> {
    all(text).into_iter().map(|splat| splat.kind).collect()
}

const NULL_POINTER: &str = "\
[    9.100000] BUG: kernel NULL pointer dereference, address: 0000000000000018
[    9.100001] #PF: supervisor read access in kernel mode
[    9.100002] #PF: error_code(0x0000) - not-present page
[    9.100003] PGD 0 P4D 0
[    9.100004] Oops: Oops: 0000 [#1] SMP NOPTI
[    9.100005] CPU: 0 UID: 0 PID: 77 Comm: agent Tainted: G           O        7.3.4 #1 PREEMPT(lazy)
[    9.100006] RIP: 0010:vgpu_mirror_release+0x24/0x90 [hmm_vgpu]
[    9.100007] Call Trace:
[    9.100008]  <TASK>
[    9.100009]  __mmu_notifier_release+0x70/0x1f0
[    9.100010]  exit_mmap+0x3a/0x3c0
[    9.100011]  </TASK>
[    9.100012] Modules linked in: hmm_vgpu(O) hmm_witness(O)
[    9.100013] ---[ end trace 0000000000000000 ]---
[    9.100014] RIP: 0010:vgpu_mirror_release+0x24/0x90 [hmm_vgpu]
[    9.200000] Kernel panic - not syncing: Fatal exception
[    9.200001] Rebooting in 1 seconds..
";

#[test]
fn an_oops_is_one_splat_and_names_its_function() {
    let found = all(NULL_POINTER);
    assert_eq!(found.iter().map(|splat| splat.kind).collect::<Vec<_>>(), [Oops, Panic]);
    assert_eq!(
        found[0].summary,
        "BUG: kernel NULL pointer dereference, address: 0000000000000018 in vgpu_mirror_release+0x24/0x90 [hmm_vgpu]"
    );
    assert_eq!(found[0].lines.len(), 14);
    assert!(found[0].lines[9].contains("__mmu_notifier_release"));
}

#[test]
fn both_formats_of_warnings() {
    let old = "\
[   12.000001] ------------[ cut here ]------------
[   12.000002] WARNING: CPU: 1 PID: 99 at mm/hmm.c:597 hmm_range_fault+0x120/0x130
[   12.000003] Modules linked in: hmm_vgpu(O)
[   12.000004] RIP: 0010:hmm_range_fault+0x120/0x130
[   12.000005] ---[ end trace 0000000000000000 ]---
[   12.100000] later and unrelated
";
    let found = all(old);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].kind, Warn);
    assert_eq!(found[0].lines.len(), 5);
    assert!(found[0].lines[0].contains("cut here"));
    let new = "\
[   12.000001] ------------[ cut here ]------------
[   12.000002] WARNING: mm/mmu_notifier.c:1011 at mmu_interval_notifier_remove+0x16d/0x180, CPU#0: agent/123
[   12.000003] Modules linked in: hmm_vgpu(O)
[   12.000005] ---[ end trace 0000000000000000 ]---
";
    let found = all(new);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].kind, Warn);
    assert!(found[0].summary.starts_with("WARNING: mm/mmu_notifier.c:1011"));
}

#[test]
fn a_bug_is_an_oops() {
    let text = "\
[    3.000001] ------------[ cut here ]------------
[    3.000002] kernel BUG at /mnt/mirror.c:88!
[    3.000003] Oops: invalid opcode: 0000 [#1] SMP
[    3.000004] RIP: 0010:unmap+0x1/0x2 [hmm_vgpu]
[    3.000005] ---[ end trace 0000000000000000 ]---
";
    assert_eq!(kinds(text), [Oops]);
}

#[test]
fn general_protection_without_a_bug_line() {
    let text = "\
[    3.0] Oops: general protection fault, probably for non-canonical address 0xdead000000000122: 0000 [#1] SMP
[    3.1] RIP: 0010:list_del+0x1/0x2
[    3.2] ---[ end trace 0000000000000000 ]---
";
    assert_eq!(kinds(text), [Oops]);
    assert_eq!(
        kinds("[    3.0] general protection fault, maybe for address 0x1: 0000 [#1] PREEMPT SMP"),
        [Oops]
    );
    assert_eq!(kinds("[    3.0] BUG: unable to handle page fault for address: ffffc90000000000"), [Oops]);
}

#[test]
fn kasan_ends_at_its_second_rule() {
    let text = "\
[   20.000001] ==================================================================
[   20.000002] BUG: KASAN: slab-use-after-free in rmap_walk_anon+0x2a/0x300
[   20.000003] Read of size 8 at addr ffff888001234560 by task agent/321
[   20.000004] Call Trace:
[   20.000005]  dump_stack_lvl+0x4d/0x70
[   20.000006]  kasan_report+0xce/0x100
[   20.000007]  rmap_walk_anon+0x2a/0x300
[   20.000008] Freed by task 300:
[   20.000009] ==================================================================
[   20.000010] Disabling lock debugging due to kernel taint
";
    let found = all(text);
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].kind, found[0].lines.len()), (Sanitizer, 9));
    assert_eq!(found[0].summary, "BUG: KASAN: slab-use-after-free in rmap_walk_anon+0x2a/0x300");
}

#[test]
fn lockdep_is_not_a_mere_warning() {
    let text = "\
[    5.000001] ======================================================
[    5.000002] WARNING: possible circular locking dependency detected
[    5.000003] 7.3.4 #1 Tainted: G           O
[    5.000004] ------------------------------------------------------
[    5.000005] agent/55 is trying to acquire lock:
[    5.000006]  *** DEADLOCK ***
[    5.000007] stack backtrace:
";
    assert_eq!(kinds(text), [Lockdep]);
    assert_eq!(kinds("[    5.0] WARNING: possible recursive locking detected"), [Lockdep]);
    assert_eq!(kinds("[    5.0] WARNING: inconsistent lock state"), [Lockdep]);
    assert_eq!(kinds("[    5.0] WARNING: HARDIRQ-safe -> HARDIRQ-unsafe lock order detected"), [Lockdep]);
    assert_eq!(kinds("[    5.0] WARNING: suspicious RCU usage"), [Lockdep]);
    assert_eq!(kinds("[    5.0] [ BUG: Invalid wait context ]"), [Lockdep]);
}

#[test]
fn hangs_and_stalls() {
    assert_eq!(kinds("[  245.1] INFO: task agent:88 blocked for more than 120 seconds."), [HungTask]);
    assert_eq!(kinds("[   30.1] watchdog: BUG: soft lockup - CPU#1 stuck for 22s! [agent:88]"), [Stall]);
    let rcu = "\
[   30.1] rcu: INFO: rcu_preempt self-detected stall on CPU
[   30.2] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:
[   30.3] rcu:     0-....: (20999 ticks this GP) idle=1/2/0x4000
";
    assert_eq!(kinds(rcu), [Stall]);
}

#[test]
fn two_splats_in_a_row_are_two() {
    let text = "\
[    1.0] BUG: sleeping function called from invalid context at mm/page_alloc.c:1
[    1.1] in_atomic(): 1, irqs_disabled(): 0
[    1.2] ------------[ cut here ]------------
[    1.3] WARNING: CPU: 0 PID: 1 at kernel/softirq.c:1 f+0x0/0x1
[    1.4] ---[ end trace 0000000000000000 ]---
[    1.5] kmemleak: 3 new suspected memory leaks (see /sys/kernel/debug/kmemleak)
";
    assert_eq!(kinds(text), [Warn, Warn, Leak]);
}

#[test]
fn a_panic_alone() {
    let text = "[    1.0] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)";
    assert_eq!(kinds(text), [Panic]);
    assert_eq!(
        kinds("[    1.0] Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000000b"),
        [Panic]
    );
}

#[test]
fn programs_and_ordinary_lines_are_not_the_kernel() {
    assert_eq!(kinds("WARNING: CPU: 0 at home"), []);
    assert_eq!(kinds("BUG: my program's own"), []);
    assert_eq!(kinds("[    1.0] hmm_vgpu: loading out-of-tree module taints kernel."), []);
    assert_eq!(kinds("[    1.0] Spectre V2 : WARNING: Unprivileged eBPF is enabled"), []);
    assert_eq!(kinds("[    1.0] debug: BUGS ahead"), []);
}

#[test]
fn the_log_printed_again_is_not_new() {
    let twice = format!("{NULL_POINTER}{NULL_POINTER}");
    assert_eq!(kinds(&twice), [Oops, Panic]);
}

#[test]
fn a_block_is_bounded() {
    let mut recogniser = Recogniser::default();
    let mut found = recogniser.line("[    1.0] BUG: Bad page state in process x  pfn:1");
    for index in 0..10_000 {
        found = found.or(recogniser.line(&format!("[    1.0] junk {index}")));
    }
    assert_eq!(found.map(|splat| splat.lines.len()), Some(MAX_BLOCK));
    assert!(!recogniser.collecting());
}

/// What a guest printed, `run release --kernel built:debug` with a driver that frees a context before its last use.
#[test]
fn a_real_report_of_kasan() {
    let found = all(include_str!("real/kasan.txt"));
    assert_eq!(found.len(), 1, "{found:?}");
    let splat = &found[0];
    assert_eq!(splat.kind, Sanitizer);
    assert_eq!(splat.summary, "BUG: KASAN: use-after-free in vgpu_ctx_destroy+0x466/0x480 [hmm_vgpu]");
    let rule = "==================================================================";
    assert_eq!(splat.lines.first().map(String::as_str), Some(rule));
    assert_eq!(splat.lines.last().map(String::as_str), Some(rule));
    assert!(splat.lines.iter().any(|line| line.contains("Memory state around the buggy address")));
}

/// The same guest with a driver that takes two locks in one order and then in the other.
#[test]
fn a_real_report_of_lockdep_names_the_locks() {
    let found = all(include_str!("real/lockdep.txt"));
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].kind, Lockdep);
    assert_eq!(
        found[0].summary,
        "WARNING: possible circular locking dependency detected: init/1 wants (trial_a){+.+.}-{4:4}, at: vgpu_init+0x5b/0x1000 \
         [hmm_vgpu], holding (trial_b){+.+.}-{4:4}, at: vgpu_init+0x4d/0x1000 [hmm_vgpu]"
    );
    assert_eq!(found[0].lines.last().map(String::as_str), Some(" </TASK>"));
}

#[test]
fn a_lockdep_that_gave_up_is_no_finding() {
    let full = "[    5.0] BUG: MAX_LOCKDEP_CHAINS too low!\n[    5.1] turning off the locking correctness validator.";
    assert_eq!(kinds(full), [Blind]);
    assert_eq!(kinds("[    5.0] BUG: MAX_LOCK_DEPTH too low!"), [Lockdep]);
}

#[test]
fn a_hung_task_and_whom_it_waits_for() {
    let text = "\
[   61.000001] INFO: task trial_waiter:58 blocked for more than 30 seconds.
[   61.000002]       Tainted: G           O        7.3.4 #1
[   61.000003] task:trial_waiter    state:D stack:0     pid:58    tgid:58    ppid:2
[   61.000004] Call Trace:
[   61.000005]  <TASK>
[   61.000006]  __schedule+0xd53/0x35f0
[   61.000007]  schedule_preempt_disabled+0x18/0x30
[   61.000008]  __mutex_lock+0x512/0x1040
[   61.000009]  </TASK>
[   61.000010] INFO: task trial_waiter:58 is blocked on a mutex likely owned by task trial_holder:57.
[   61.000011] task:trial_holder    state:S stack:0     pid:57    tgid:57    ppid:2
";
    let found = all(text);
    assert_eq!(found.len(), 1);
    assert_eq!(
        found[0].summary,
        "INFO: task trial_waiter:58 blocked for more than 30 seconds. in __mutex_lock+0x512/0x1040: blocked on a mutex likely owned by \
         task trial_holder:57"
    );
}

#[test]
fn leaks_are_one_finding_and_name_the_first_maker() {
    let text = "\
[   70.000001] kmemleak: unreferenced object 0xffff888006f3a000 (size 64):
[   70.000002] kmemleak:   comm \"init\", pid 55, jiffies 4294940000
[   70.000003] kmemleak:   backtrace (crc 0):
[   70.000004] kmemleak:     __kmalloc_cache_noprof+0x2a0/0x320
[   70.000005] kmemleak:     0xffffffffc0201234
[   70.000006] kmemleak:     vgpu_ctx_create+0x50/0x100 [hmm_vgpu]
[   70.000007] kmemleak: unreferenced object 0xffff888006f3b000 (size 64):
[   70.000008] kmemleak:   backtrace (crc 0):
[   70.000009] kmemleak: 2 new suspected memory leaks (see /sys/kernel/debug/kmemleak)
[   70.000010] later and unrelated
";
    let found = all(text);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].kind, Leak);
    assert_eq!(found[0].lines.len(), 9);
    assert!(found[0].summary.ends_with("made in 0xffffffffc0201234"), "{}", found[0].summary);
}
