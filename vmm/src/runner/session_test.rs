// SPDX-License-Identifier: MIT OR Apache-2.0
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::{Sender, SyncSender, channel, sync_channel};

use guest_protocol::{CONSOLE_PREFIX, Outcome};
use parking_lot::Mutex;
use vgpu::oracle::Rule;

use super::*;
use crate::failure::Result;
use crate::runner::RunConfig;
use crate::runner::plan::plan;

/// A machine that does what a script says, on a thread of its own.
struct Fake {
    exit: Receiver<MachineExit>,
    nmi: Sender<()>,
    killed: bool,
}

impl Machine for Fake {
    fn wait(&mut self, timeout: Duration) -> Option<MachineExit> {
        self.exit.recv_timeout(timeout).ok()
    }
    fn kill(&mut self) {
        self.killed = true;
    }
    fn nmi(&mut self) -> Result<()> {
        let _ = self.nmi.send(());
        Ok(())
    }
    fn pid(&self) -> Option<u32> {
        None
    }
}

#[derive(Default)]
struct Side {
    activity: AtomicU64,
    requested: AtomicU64,
    violations: Mutex<Vec<Violation>>,
}

impl DeviceSide for Side {
    fn activity(&self) -> u64 {
        self.activity.load(Ordering::Relaxed)
    }
    fn standing(&self) -> Standing {
        Standing { activity: self.activity(), ..Standing::default() }
    }
    fn request(&self, bits: u32) {
        self.requested.fetch_or(u64::from(bits), Ordering::Relaxed);
    }
    fn report(&self, violation: Violation) {
        self.violations.lock().push(violation);
    }
}

const LIMITS: Limits = Limits {
    silence: Duration::from_millis(1500),
    boot: Duration::from_secs(5),
    boot_talking: Duration::from_secs(10),
    no_heartbeat: Duration::from_secs(5),
    hang_heartbeats: 10,
    suspect_heartbeats: 5,
    stack_heartbeats: 3,
    violation_heartbeats: Some(5),
};

struct Guest {
    inputs: SyncSender<Input>,
    exit: Sender<MachineExit>,
    nmi: Receiver<()>,
    violations: Sender<Violation>,
}

impl Guest {
    fn print(&self, text: &str) {
        let _ = self.inputs.send(Input::Console(text.as_bytes().to_vec()));
    }
    fn say(&self, message: Message) {
        let _ = self.inputs.send(Input::Message(Box::new(message)));
    }
    fn boot(&self) {
        self.say(Message::Booted { kernel: "7.3".into(), cpus: 1, uptime_ms: 900 });
        self.say(Message::ModuleLoaded { module: "driver".into() });
    }
    fn workload(&self, name: &str) {
        self.say(Message::WorkloadStart { workload: name.into(), seed: 1 });
        let (workload, outcome) = (name.into(), Outcome::Pass);
        self.say(Message::WorkloadEnd { workload, outcome, seconds: 0.1, cases: 1, failed: 0 });
    }
    fn power_off(&self) {
        let _ = self.exit.send(MachineExit::PoweredOff);
    }
}

fn follow(script: impl FnOnce(&Guest) + Send + 'static) -> (End, Vec<Violation>, u64) {
    let (inputs, receiver) = sync_channel(64);
    let (exit, exits) = channel();
    let (nmi, nmis) = channel();
    let mut machine = Fake { exit: exits, nmi, killed: false };
    let side = Side::default();
    let plan = plan(&RunConfig::for_tests());
    let (sender, violations) = channel();
    let guest = Guest { inputs, exit, nmi: nmis, violations: sender };
    let thread = std::thread::spawn(move || {
        script(&guest);
        guest
    });
    let pace = Pace::default();
    let session = Session::new(Given {
        machine: &mut machine,
        device: &side,
        events: &|_: Event| {},
        console: Console::new(None),
        plan: &plan,
        interactive: false,
        limits: LIMITS,
        start: Instant::now(),
        pace: &pace,
    });
    let end = session.follow(receiver, &violations, &AtomicBool::new(false));
    thread.join().unwrap();
    assert!(machine.killed);
    let requested = side.requested.load(Ordering::Relaxed);
    (end, side.violations.into_inner(), requested)
}

#[test]
fn a_good_run() {
    let (end, violations, _) = follow(|guest| {
        guest.print("[    0.1] Linux\r\n");
        guest.boot();
        guest.workload("access");
        guest.workload("release");
        guest.say(Message::Done);
        guest.power_off();
    });
    assert!(end.story.done && end.lost.is_none() && violations.is_empty());
    assert!(end.boot_seconds.is_some() && end.console_tail.is_empty());
    assert!(end.story.results("").iter().all(|result| result.cases == 1));
}

#[test]
fn a_panic_at_boot_is_no_violation() {
    let (end, violations, _) = follow(|guest| {
        guest.print(
            "[    0.5] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)\r\n",
        );
        guest.print("[    0.5] CPU: 0 PID: 1 Comm: swapper/0\r\n");
        guest.power_off();
    });
    assert!(violations.is_empty());
    assert!(end.lost.unwrap().contains("Unable to mount root"));
    assert_eq!(end.console_tail.len(), 2);
}

#[test]
fn an_oops_with_the_driver_is_a_violation() {
    let (end, violations, _) = follow(|guest| {
        guest.boot();
        guest.print("[    9.1] BUG: kernel NULL pointer dereference, address: 0\r\n[    9.2] RIP: 0010:f+0x1/0x2 [hmm_vgpu]\r\n");
        guest.print(
            "[    9.3] ---[ end trace 0 ]---\r\n[    9.4] Kernel panic - not syncing: Fatal exception\r\n",
        );
        guest.power_off();
    });
    assert_eq!(violations.iter().map(|violation| violation.rule).collect::<Vec<_>>(), [Rule::KernelOops]);
    assert!(violations[0].events.len() >= 3);
    assert!(end.lost.unwrap().contains("ended"));
}

#[test]
fn an_oops_that_is_the_emulators_loses_the_guest_with_the_panic_behind_it() {
    let (end, violations, _) = follow(|guest| {
        guest.boot();
        guest.print("[    9.1] Oops: int3: 0000 [#1] SMP NOPTI\r\n[    9.1] RIP: 0010:f+0x1d3/0x3b0\r\n");
        guest.print(
            "[    9.2] Code: 0f 84 73 01 00 00 66 <90> f7 c3 00\r\n[    9.3] ---[ end trace 0 ]---\r\n",
        );
        guest.print("[    9.4] Kernel panic - not syncing: Fatal exception\r\n");
        guest.power_off();
    });
    assert!(violations.is_empty(), "{violations:?}");
    assert!(end.lost.unwrap().contains("breakpoint"));
}

#[test]
fn a_silent_boot_is_lost() {
    let (end, violations, _) = follow(|guest| guest.print("SeaBIOS\r\n"));
    assert!(violations.is_empty());
    assert!(end.lost.unwrap().contains("PID 1"));
    assert_eq!(end.console_tail, ["SeaBIOS"]);
}

#[test]
fn a_hang_is_shown_with_stacks() {
    let (end, violations, requested) = follow(|guest| {
        guest.boot();
        guest.say(Message::WorkloadStart { workload: "access".into(), seed: 1 });
        for beat in 1..40 {
            std::thread::sleep(Duration::from_millis(50));
            let _ = guest.inputs.send(Input::Heartbeat { counts: true });
            // Whenever this busy machine may have come to ask.
            if beat >= 12 {
                guest.print("[   40.1] task:agent           state:D stack:0     pid:88\r\n[   40.2]  down_write+0x1/0x2\r\n");
            }
        }
    });
    assert_eq!(requested, u64::from(REQUEST_BLOCKED_TASKS | REQUEST_ALL_CPUS));
    assert_eq!(violations.len(), 1);
    assert_eq!(violations[0].rule, Rule::HangDeadlock);
    assert!(violations[0].summary.contains("in access") && violations[0].summary.contains("agent"));
    assert!(violations[0].events.iter().any(|line| line.contains("down_write")));
    assert!(end.lost.is_some());
}

#[test]
fn heartbeats_that_do_not_count_are_life_and_no_time() {
    let (end, violations, requested) = follow(|guest| {
        guest.boot();
        guest.say(Message::WorkloadStart { workload: "access".into(), seed: 1 });
        for _ in 1..60 {
            std::thread::sleep(Duration::from_millis(50));
            let _ = guest.inputs.send(Input::Heartbeat { counts: false });
        }
        guest.say(Message::Done);
        let _ = guest.exit.send(MachineExit::PoweredOff);
    });
    assert!(violations.is_empty() && requested == 0, "{violations:?}");
    assert_eq!(end.lost, None);
}

/// What is said of a hang after the oracle has found `fault`.
fn hang_over(fault: Violation) -> Violation {
    let (_, violations, _) = follow(move |guest| {
        guest.boot();
        guest.say(Message::WorkloadStart { workload: "access".into(), seed: 1 });
        for beat in 1..30 {
            std::thread::sleep(Duration::from_millis(50));
            let _ = guest.inputs.send(Input::Heartbeat { counts: true });
            if beat == 3 {
                guest.violations.send(fault.clone().at(Some(0x1000), None).on(Handle(7))).unwrap();
            }
            if beat >= 7 {
                guest.print("task:kworker state:D pid:31\r\n mutex_lock+0x1/0x2\r\n");
            }
        }
    });
    let [violation] = &violations[..] else { panic!("{violations:?}") };
    assert_eq!((violation.rule, violation.address), (Rule::HangDeadlock, Some(0x1000)));
    assert_eq!(violation.context, Some(7));
    violation.clone()
}

#[test]
fn a_hang_over_a_fault_names_its_place() {
    let said = hang_over(Violation::new(Rule::FaultUnanswered, "waits")).summary;
    assert!(said.ends_with("; meanwhile a fault waits for its answer"), "{said}");
    let said = hang_over(Violation::new(Rule::HangLivelock, "again and again")).summary;
    assert!(said.ends_with("; meanwhile an access is replayed without end"), "{said}");
}

#[test]
fn a_run_ends_a_while_after_its_first_violation() {
    let (end, _, _) = follow(|guest| {
        guest.boot();
        guest.say(Message::WorkloadStart { workload: "release".into(), seed: 1 });
        guest.violations.send(Violation::new(Rule::ReleaseLate, "left")).unwrap();
        for beat in 1..40 {
            std::thread::sleep(Duration::from_millis(50));
            let _ = guest.inputs.send(Input::Heartbeat { counts: true });
            guest.say(Message::Progress { workload: "release".into(), done: beat, total: None });
        }
    });
    assert!(end.lost.is_none() && !end.story.done);
    assert!(end.notes.iter().any(|note| note.contains("after the first violation")), "{:?}", end.notes);
}

#[test]
fn a_guest_that_goes_silent_is_asked_by_nmi() {
    let (end, violations, _) = follow(|guest| {
        guest.boot();
        guest.nmi.recv_timeout(Duration::from_secs(10)).unwrap();
        guest.print("[   50.1] Kernel panic - not syncing: NMI: Not continuing\r\n[   50.2] RIP: 0010:spin+0x1/0x2\r\n");
        guest.power_off();
    });
    assert!(violations.is_empty(), "{violations:?}");
    assert!(end.lost.unwrap().contains("no sign of life"));
    assert!(end.console_tail.iter().any(|line| line.contains("spin")));
}

#[test]
fn an_early_power_off_is_lost() {
    let (end, violations, _) = follow(|guest| {
        // Without a witness the agent speaks on the console.
        for message in [
            Message::Booted { kernel: "7.3".into(), cpus: 1, uptime_ms: 900 },
            Message::ModuleLoaded { module: "driver".into() },
            Message::WorkloadStart { workload: "access".into(), seed: 1 },
        ] {
            guest.print(&format!("{CONSOLE_PREFIX}{}\r\n", serde_json::to_string(&message).unwrap()));
        }
        guest.print(&format!("{CONSOLE_PREFIX}nonsense\r\n"));
        guest.power_off();
    });
    assert!(violations.is_empty());
    assert_eq!(end.garbled, 1);
    assert_eq!(end.lost.unwrap(), "the guest ended in access");
}

#[test]
fn what_a_program_prints_is_no_word_of_the_agent() {
    let (end, _, _) = follow(|guest| {
        guest.boot();
        guest.say(Message::WorkloadStart { workload: "access".into(), seed: 1 });
        let (workload, outcome) = ("access".into(), Outcome::Pass);
        let forged = [
            Message::Booted { kernel: "other".into(), cpus: 1, uptime_ms: 1 },
            Message::ModuleLoaded { module: "witness.ko".into() },
            Message::ModuleLoaded { module: "driver.ko".into() },
            Message::WorkloadEnd { workload, outcome, seconds: 0.1, cases: 1, failed: 0 },
            Message::ExecEnd { status: 0 },
            Message::Done,
        ];
        for message in forged {
            guest.print(&format!("{CONSOLE_PREFIX}{}\r\n", serde_json::to_string(&message).unwrap()));
        }
        guest.power_off();
    });
    assert!(!end.story.done && end.story.exec_status.is_none());
    assert_eq!(end.garbled, 4, "what stands there before the witness speaks may be late");
    assert_eq!(end.story.kernel.as_deref(), Some("7.3"));
    assert_eq!(end.lost.unwrap(), "the guest ended in access");
}

#[test]
fn a_guest_that_floods_its_line_is_ended() {
    let (end, _, _) = follow(|guest| {
        guest.boot();
        guest.violations.send(Violation::new(Rule::ReleaseLate, "left")).unwrap();
        // Until nobody listens any more.
        while guest.inputs.send(Input::Console(b"x".to_vec())).is_ok() {
            let _ = guest.inputs.send(Input::Heartbeat { counts: true });
        }
    });
    assert!(end.notes.iter().any(|note| note.contains("after the first violation")), "{:?}", end.notes);
}
