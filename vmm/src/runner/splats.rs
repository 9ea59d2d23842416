// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a complaint of the guest's kernel means for the run.

use vgpu::oracle::{Rule, Violation};

use crate::console::{Splat, SplatKind};

/// What to make of a complaint.
#[derive(Debug)]
pub enum Meaning {
    /// The driver's: a violation.
    Violation(Violation),
    /// From before a module was loaded: the kernel's or the machine's own.
    Boot(String),
    /// The guest ends, for a reason that says nothing about the driver.
    Lost(String),
    /// Worth knowing, and nobody's fault.
    Note(String),
    /// The end of something already reported.
    Known,
}

/// Panics that say that something else ended, or that there was nothing to start.
const OWN_REASONS: &[&str] = &[
    "Attempted to kill init",
    "No working init",
    "No init found",
    "Unable to mount root",
    "Requested init",
    "Out of memory",
    "System is deadlocked on memory",
    "sysrq triggered crash",
    "NMI: Not continuing",
    "NMI: IOCK error",
];

/// Warnings that are the kernel's own, by the file that warns or what it says, and a function on the stack, and why.
const OWN_WARNINGS: &[(&str, &str, &str)] = &[
    (
        "kernel/time/hrtimer.c",
        "dl_task_timer",
        // Seen on 7.3 in a guest that the host let run a fiftieth of the time.
        "the scheduler's own timer, which came so late that it was queued again when it was put forward",
    ),
    // What arch/x86/kernel/unwind_orc.c says of itself, once a boot. The first was seen on 7.3 with kmemleak, which keeps the stack of
    // each allocation, in return_to_handler: where the witness's probes come back.
    ("WARNING: stack going in the wrong direction?", "", UNWINDER),
    ("WARNING: can't access registers at", "", UNWINDER),
    ("WARNING: can't access iret registers at", "", UNWINDER),
    ("WARNING: unknown unwind hint", "", UNWINDER),
];

const UNWINDER: &str = "the kernel's unwinder could not read a stack";

/// For how many seconds a task has not got on, if that is what is said: `task NAME:PID blocked for more than N seconds`.
pub fn hung_for(summary: &str) -> Option<u64> {
    let words = summary.split_once(" blocked for more than ")?.1;
    words.split_once(" seconds")?.0.parse().ok()
}

/// Why a warning is none of the driver's, if it is known to be so.
fn own_warning(splat: &Splat) -> Option<&'static str> {
    let has = |what: &str| splat.lines.iter().any(|line| line.contains(what));
    let known = |(file, function, _): &&(&str, &str, &str)| splat.summary.contains(file) && has(function);
    OWN_WARNINGS.iter().find(known).filter(|_| splat.kind == SplatKind::Warn).map(|(_, _, why)| *why)
}

/// A breakpoint was met where none is in memory: the byte in front of the one that `Code:` marks, which is where an int3 leaves the
/// processor, is none. The kernel writes one while it patches its code (a static key, a probe) and takes it away before it forgets about it; QEMU's
/// translator has run what it had translated in between, as was seen once, on 7.3 with two processors.
fn met_old_code(splat: &Splat) -> bool {
    const BREAKPOINT: &str = "cc";
    let code = || splat.lines.iter().find_map(|line| line.split_once("Code: "));
    splat.kind == SplatKind::Oops
        && splat.summary.contains("int3:")
        && code().is_some_and(|(_, bytes)| {
            let before = bytes.split_once('<').and_then(|(before, _)| before.split_whitespace().next_back());
            before.is_some_and(|byte| byte != BREAKPOINT)
        })
}

/// What to make of `splat`, in a guest in which `modules` were loaded already, and which has `complained` before.
#[must_use]
pub fn meaning(splat: &Splat, modules: bool, complained: bool) -> Meaning {
    if splat.kind == SplatKind::Blind {
        return Meaning::Note(format!(
            "lockdep turned itself off and sees nothing from here on: {}",
            splat.summary
        ));
    }
    if let Some(why) = own_warning(splat) {
        return Meaning::Note(format!("{}: {why}", splat.summary));
    }
    if met_old_code(splat) {
        return Meaning::Lost(format!(
            "the processor met a breakpoint that is not in memory any more, which is an emulator's doing: {}",
            splat.summary
        ));
    }
    let names_driver = splat.lines.iter().any(|line| line.contains("hmm_vgpu"));
    if splat.kind == SplatKind::Panic {
        if OWN_REASONS.iter().any(|reason| splat.summary.contains(reason)) || !(modules || names_driver) {
            return Meaning::Lost(format!("the guest's kernel panicked: {}", splat.summary));
        }
        if complained {
            return Meaning::Known;
        }
    }
    if !modules && !names_driver {
        return Meaning::Boot(splat.summary.clone());
    }
    let rule = match splat.kind {
        SplatKind::Oops | SplatKind::Panic => Rule::KernelOops,
        SplatKind::Warn => Rule::KernelWarn,
        SplatKind::Sanitizer => Rule::KernelKasan,
        SplatKind::Lockdep => Rule::KernelLockdep,
        // A CPU that does not get on is found by the kernel's own detector, as a task that does not.
        SplatKind::HungTask | SplatKind::Stall => Rule::KernelHungTask,
        SplatKind::Leak => Rule::KernelLeak,
        SplatKind::Blind => return Meaning::Known,
    };
    let mut violation = Violation::new(rule, splat.summary.clone());
    violation.events = splat.lines.clone();
    Meaning::Violation(violation)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn splat(kind: SplatKind, summary: &str) -> Splat {
        Splat { kind, summary: summary.into(), lines: vec![summary.into()] }
    }

    fn rule(meaning: Meaning) -> Option<Rule> {
        match meaning {
            Meaning::Violation(violation) => Some(violation.rule),
            _ => None,
        }
    }

    #[test]
    fn before_a_module_is_loaded_it_is_not_the_driver() {
        assert!(matches!(meaning(&splat(SplatKind::Warn, "WARNING: x"), false, false), Meaning::Boot(_)));
        assert_eq!(rule(meaning(&splat(SplatKind::Warn, "WARNING: x"), true, false)), Some(Rule::KernelWarn));
        let named = splat(SplatKind::Oops, "BUG: x in probe+0x1/0x2 [hmm_vgpu]");
        assert_eq!(rule(meaning(&named, false, false)), Some(Rule::KernelOops));
    }

    #[test]
    fn a_hung_task_says_for_how_long() {
        assert_eq!(hung_for("INFO: task kworker/u8:1:31 blocked for more than 61 seconds."), Some(61));
        for other in ["", "INFO: task x blocked for more than many seconds.", "watchdog: BUG: soft lockup"] {
            assert_eq!(hung_for(other), None, "{other}");
        }
    }

    #[test]
    fn what_the_unwinder_says_of_itself_is_nobodys_driver() {
        let own = "WARNING: stack going in the wrong direction? at return_to_handler+0x46/0x50";
        assert!(matches!(meaning(&splat(SplatKind::Warn, own), true, false), Meaning::Note(_)));
        let other = "WARNING: mm/rmap.c:12 at stack_going+0x46/0x50, CPU#0: init/1";
        assert_eq!(rule(meaning(&splat(SplatKind::Warn, other), true, false)), Some(Rule::KernelWarn));
    }

    #[test]
    fn a_breakpoint_that_is_not_there_is_nobodys_driver() {
        let oops = |code: &str| Splat {
            lines: vec![
                "Oops: int3: 0000 [#1] SMP NOPTI".into(),
                "RIP: 0010:f+0x1d3/0x3b0".into(),
                code.into(),
            ],
            ..splat(SplatKind::Oops, "Oops: int3: 0000 [#1] SMP NOPTI in f+0x1d3/0x3b0")
        };
        let lost = |splat: &Splat| matches!(meaning(splat, true, false), Meaning::Lost(_));
        // As it was seen: a static key's two-byte nop.
        assert!(lost(&oops("Code: 0f 84 73 01 00 00 66 <90> f7 c3 00")));
        // What lies between functions, and what says nothing.
        for code in
            ["Code: c3 cc cc <cc> 48", "Code: c3 cc <48> 89", "Code: c3 90 48", "Code: <90> 90", "Code:", ""]
        {
            assert!(!lost(&oops(code)), "{code}");
        }
        assert!(!lost(&Splat { kind: SplatKind::Warn, ..oops("Code: 66 <90>") }));
        let other = Splat { summary: "BUG: unable to handle".into(), ..oops("Code: 66 <90>") };
        assert_eq!(rule(meaning(&other, true, false)), Some(Rule::KernelOops));
    }

    #[test]
    fn the_schedulers_own_timer_is_nobodys_driver() {
        let summary =
            "WARNING: kernel/time/hrtimer.c:1098 at hrtimer_forward+0x7b/0xc0, CPU#1: hmm_witness/102";
        let mut warning = splat(SplatKind::Warn, summary);
        assert_eq!(
            rule(meaning(&warning, true, false)),
            Some(Rule::KernelWarn),
            "a driver's timer may do so"
        );
        warning.lines.push(" dl_task_timer+0x35b/0x8b0".into());
        assert!(matches!(meaning(&warning, true, false), Meaning::Note(_)));
        let elsewhere = Splat { summary: "WARNING: mm/rmap.c:1 at x".into(), ..warning };
        assert_eq!(rule(meaning(&elsewhere, true, false)), Some(Rule::KernelWarn));
    }

    #[test]
    fn panics() {
        let fatal = splat(SplatKind::Panic, "Kernel panic - not syncing: Fatal exception");
        assert!(matches!(meaning(&fatal, true, true), Meaning::Known));
        assert_eq!(rule(meaning(&fatal, true, false)), Some(Rule::KernelOops));
        assert!(matches!(meaning(&fatal, false, false), Meaning::Lost(_)));
        let init = splat(
            SplatKind::Panic,
            "Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100",
        );
        assert!(matches!(meaning(&init, true, false), Meaning::Lost(_)));
    }
}
