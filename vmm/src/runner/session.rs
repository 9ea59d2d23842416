// SPDX-License-Identifier: MIT OR Apache-2.0
//! One guest from the machine's start to its end: everything it says goes through one queue to one thread, which judges.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use guest_protocol::{Message, Plan, WITNESS_MODULE, Wish};
use vgpu::oracle::{Rule, Violation};
use vgpu_spec::handle::Handle;
use vgpu_spec::regs::witness::{REQUEST_ALL_CPUS, REQUEST_BLOCKED_TASKS};

use super::device::GPU;
use super::hang::{self, Clues, Standing};
use super::pace::{Pace, Starvation};
use super::splats::{self, Meaning};
use super::story::Story;
use super::untrusted;
use super::watch::{Alarm, Limits, Phase, Watch};
use crate::console::{Console, Item, SplatKind};
use crate::event::{Event, EventSink};
use crate::machine::{Machine, MachineExit};

/// Seconds of processor time that a task may not have got on for; a little less than the guest's kernel is told (the agent's `boot.rs`).
const HUNG_TASK_SECONDS: f64 = 27.0;
/// Nothing on the console for so long: what was being said there has been said.
const CONSOLE_IDLE: Duration = Duration::from_secs(1);
/// Console lines shown of a guest that is lost.
const TAIL_LINES: usize = 30;
/// How often the clocks are looked at.
const TICK: Duration = Duration::from_millis(100);
/// A gap between two ticks from which on this process itself stood still, and the guest's time is not held against it.
const STOOD_STILL: Duration = Duration::from_secs(5);
/// Inputs taken from a guest that is to be ended: what was on its way, not what it goes on saying.
const LAST_INPUTS: usize = 8192;
/// How long a guest that got a non-maskable interrupt has to print its stacks.
const NMI_PATIENCE: Duration = Duration::from_secs(5);

/// What a guest says, in the order in which it arrives.
#[derive(Debug)]
pub enum Input {
    /// Bytes on the console.
    Console(Vec<u8>),
    /// A message of the agent.
    Message(Box<Message>),
    /// A message that cannot be read.
    Garbled(String),
    /// The witness's heartbeat. The guest's own count is for people: a nonsense number must not stop the clock of the watchdog.
    Heartbeat {
        /// It is worth one.
        counts: bool,
    },
}

/// What the session needs of the device side.
pub trait DeviceSide {
    /// A number that changes when the guest uses the device.
    fn activity(&self) -> u64;
    /// What the device stands at.
    fn standing(&self) -> Standing;
    /// Asks the witness for something.
    fn request(&self, bits: u32);
    /// What tasks are called in the scenario that runs, by thread id.
    fn roles(&self) -> Vec<(u32, String)> {
        Vec::new()
    }
    /// A number that changes when a scenario lets something go on.
    fn moves(&self) -> u64 {
        0
    }
    /// Takes a violation found here.
    fn report(&self, violation: Violation);
}

/// How it went.
#[derive(Debug)]
pub struct End {
    /// What the guest told.
    pub story: Story,
    /// Why the guest is lost, if it is.
    pub lost: Option<String>,
    /// Ended from outside.
    pub interrupted: bool,
    /// Messages that could not be read.
    pub garbled: u64,
    /// Complaints of the kernel that are not the driver's.
    pub boot_complaints: Vec<String>,
    /// The last console lines, if the guest is lost.
    pub console_tail: Vec<String>,
    /// Seconds to PID 1.
    pub boot_seconds: Option<f64>,
    /// Worth knowing.
    pub notes: Vec<String>,
}

/// A session under way.
pub struct Session<'a> {
    machine: &'a mut dyn Machine,
    device: &'a dyn DeviceSide,
    events: &'a dyn EventSink,
    console: Console,
    watch: Watch,
    limits: Limits,
    start: Instant,
    last_console: Instant,
    activity: u64,
    /// What the scenario's moves were when it was looked last.
    moves: u64,
    /// Console lines from which on a hanging guest prints its stacks, the first and the second time, and what the device stood at
    /// the first time.
    stacks_from: [u64; 2],
    stood: Standing,
    /// The first fault that was not answered, or was replayed without end: a hang is likely to be about it.
    stuck: Option<Violation>,
    nmi: bool,
    /// A hang was reported.
    hung: bool,
    interactive: bool,
    complained: bool,
    /// The agent speaks through the witness: what stands on the console any program may have written.
    witnessed: bool,
    /// Heartbeats so far, and how many there were at the first violation.
    heartbeats: u64,
    starvation: Starvation,
    /// A hung task was excused: it is said once.
    hung_task_excused: bool,
    pace: &'a Pace,
    violated_at: Option<u64>,
    end: End,
}

/// What the session is given.
pub struct Given<'a> {
    /// The started machine.
    pub machine: &'a mut dyn Machine,
    /// The device side.
    pub device: &'a dyn DeviceSide,
    /// Where events go.
    pub events: &'a dyn EventSink,
    /// The console, with its log.
    pub console: Console,
    /// What the guest was told.
    pub plan: &'a Plan,
    /// The terminal shows the console itself: its lines are no events.
    pub interactive: bool,
    /// How long things may take.
    pub limits: Limits,
    /// When the machine was started.
    pub start: Instant,
    /// What the guest's heartbeats are worth: kept up to date from how much of the host's processors it gets.
    pub pace: &'a Pace,
}

impl<'a> Session<'a> {
    /// Begins to follow a machine.
    #[must_use]
    pub fn new(given: Given<'a>) -> Self {
        Self {
            activity: given.device.activity(),
            machine: given.machine,
            device: given.device,
            events: given.events,
            console: given.console,
            watch: Watch::new(given.limits, given.plan, given.start),
            limits: given.limits,
            start: given.start,
            last_console: given.start,
            moves: 0,
            stacks_from: [0; 2],
            stood: Standing::default(),
            stuck: None,
            nmi: false,
            hung: false,
            interactive: given.interactive,
            complained: false,
            witnessed: false,
            heartbeats: 0,
            starvation: Starvation::new(given.start),
            hung_task_excused: false,
            pace: given.pace,
            violated_at: None,
            end: End {
                story: Story::new(given.plan),
                lost: None,
                interrupted: false,
                garbled: 0,
                boot_complaints: Vec::new(),
                console_tail: Vec::new(),
                boot_seconds: None,
                notes: Vec::new(),
            },
        }
    }

    /// Follows the guest to its end. The machine has ended when this returns.
    pub fn follow(
        mut self,
        inputs: Receiver<Input>,
        violations: &Receiver<Violation>,
        interrupted: &AtomicBool,
    ) -> End {
        let mut last_tick = Instant::now();
        loop {
            match inputs.recv_timeout(TICK) {
                Ok(input) => self.input(input),
                Err(RecvTimeoutError::Timeout) => {}
                // Only with the machine do all senders go.
                Err(RecvTimeoutError::Disconnected) => std::thread::sleep(TICK),
            }
            self.violations(violations);
            let now = Instant::now();
            let gap = now.saturating_duration_since(last_tick);
            if gap < TICK {
                continue;
            }
            last_tick = now;
            if interrupted.load(Ordering::Relaxed) {
                self.end.interrupted = true;
                break;
            }
            if let Some(exit) = self.machine.wait(Duration::ZERO) {
                self.last_inputs(&inputs);
                self.exited(&exit);
                break;
            }
            if gap >= STOOD_STILL {
                self.watch.pardon(gap);
                continue;
            }
            if self.tick(now) {
                break;
            }
        }
        self.last_inputs(&inputs);
        // The guest's threads that wait for room in the queue go on now, so that the machine can be ended.
        drop(inputs);
        self.machine.kill();
        let mut items = Vec::new();
        self.console.finish(&mut items);
        self.items(items);
        self.violations(violations);
        // A hang's report has the stacks; behind them the console has only more of the same.
        if self.end.lost.is_some() && !self.hung
            || self.end.interrupted
            || self.end.story.fatal.is_some()
            || !self.end.story.done && !self.hung
        {
            self.end.console_tail = self.console.tail(TAIL_LINES);
        }
        self.end
    }

    /// What is in the queue. A guest that floods it faster than it is read would never be ended.
    fn last_inputs(&mut self, inputs: &Receiver<Input>) {
        for input in inputs.try_iter().take(LAST_INPUTS) {
            self.input(input);
        }
    }

    fn violations(&mut self, violations: &Receiver<Violation>) {
        for violation in violations.try_iter() {
            if violation.allowed.is_none() {
                self.violated_at.get_or_insert(self.heartbeats);
            }
            let about = matches!(violation.rule, Rule::FaultUnanswered | Rule::HangLivelock);
            if about && self.stuck.is_none() {
                // Whoever should have answered may still be found at it.
                self.watch.suspect();
                self.stuck = Some(violation.clone());
            }
            self.events.event(Event::Violation { violation });
        }
    }

    fn input(&mut self, input: Input) {
        let now = Instant::now();
        match input {
            Input::Console(bytes) => {
                self.watch.console(now);
                self.last_console = now;
                let mut items = Vec::new();
                self.console.feed(&bytes, &mut items);
                self.items(items);
            }
            Input::Message(message) => {
                self.witnessed = true;
                self.message(now, *message);
            }
            Input::Garbled(text) => self.garbled(&text),
            Input::Heartbeat { counts: false } => self.watch.alive(now),
            Input::Heartbeat { counts: true } => {
                self.heartbeats += 1;
                self.watch.heartbeat(now, self.heartbeats);
            }
        }
    }

    fn items(&mut self, items: Vec<Item>) {
        for item in items {
            match item {
                Item::Line(_) if self.interactive => {}
                Item::Line(line) => self.events.event(Event::Console { line }),
                Item::Message(message) if self.witnessed && !before_the_witness(&message) => {
                    self.garbled(&format!(
                        "it stands on the console, where the agent does not write: {message:?}"
                    ));
                }
                Item::Message(message) => self.message(Instant::now(), message),
                Item::Garbled(text) => self.garbled(&text),
                Item::Splat(splat) => {
                    // What a guest prints because it was asked to end is no finding.
                    if self.nmi && matches!(splat.kind, SplatKind::Panic | SplatKind::Stall | SplatKind::Oops)
                    {
                        continue;
                    }
                    match splats::meaning(&splat, self.end.story.modules, self.complained) {
                        Meaning::Violation(violation) => {
                            if let Some(note) = self.excused(&violation) {
                                if !self.hung_task_excused {
                                    self.hung_task_excused = true;
                                    self.end.notes.push(note);
                                }
                                continue;
                            }
                            self.complained = true;
                            self.device.report(violation);
                        }
                        Meaning::Boot(text) => {
                            self.complained = true;
                            if self.end.boot_complaints.len() < 20 {
                                self.end.boot_complaints.push(text);
                            }
                        }
                        Meaning::Lost(text) => {
                            // The panic that ends what was lost is no finding either.
                            self.complained = true;
                            self.end.lost = self.end.lost.take().or(Some(text));
                        }
                        Meaning::Note(text) => self.end.notes.push(text),
                        Meaning::Known => {}
                    }
                }
            }
        }
    }

    /// Why a hung task is not one: the kernel goes by its clock, whatever the guest gets of the host. It says so again while the task
    /// does not get on, for more and more seconds, so that what hangs is not excused in the end.
    fn excused(&self, violation: &Violation) -> Option<String> {
        let seconds =
            splats::hung_for(&violation.summary).filter(|_| violation.rule == Rule::KernelHungTask)?;
        let share = self.starvation.share(Instant::now(), Duration::from_secs(seconds));
        let excused = (seconds as f64) * share < HUNG_TASK_SECONDS;
        excused.then(|| {
            format!(
                "{}: not judged, for the guest had {:.0} % of the processor time that it wanted",
                violation.summary,
                share * 100.0
            )
        })
    }

    fn garbled(&mut self, text: &str) {
        self.end.garbled += 1;
        if self.end.garbled <= 3 {
            let text = untrusted::printable(text, 200);
            self.events.event(Event::Note { text: format!("a message of the guest cannot be read: {text}") });
        }
    }

    fn message(&mut self, now: Instant, mut message: Message) {
        untrusted::tame(&mut message);
        self.watch.message(now, &message);
        if matches!(message, Message::Booted { .. }) {
            if self.end.boot_seconds.is_some() {
                // Said on the console first, and again through the witness once there is one.
                return;
            }
            self.end.boot_seconds = Some(now.saturating_duration_since(self.start).as_secs_f64());
        }
        if let Message::Ask { wish } = message {
            self.grant(wish);
        }
        if let Some(violation) = self.end.story.message(&message) {
            self.device.report(violation);
        }
        self.events.event(Event::Guest { message });
    }

    /// Does what the guest wants. A guest whose wish cannot be granted finds out by itself.
    fn grant(&mut self, wish: Wish) {
        let done = match wish {
            Wish::Unplug => self.machine.unplug(GPU),
            Wish::Plug => self.machine.plug(GPU),
            // Granted where it came in.
            Wish::FailCopies { .. } => Ok(()),
        };
        if let Err(failure) = done {
            self.events.event(Event::Note { text: format!("the guest's wish is not granted: {failure}") });
        }
    }

    fn exited(&mut self, exit: &MachineExit) {
        if self.end.story.done || self.end.lost.is_some() {
            return;
        }
        // The console's last block may still be open; it says more than the exit does.
        let mut items = Vec::new();
        self.console.finish(&mut items);
        self.items(items);
        if self.end.lost.is_some() {
            return;
        }
        let at = match self.watch.phase() {
            Phase::Boot => "before PID 1 ran".to_owned(),
            _ => self.place(),
        };
        self.end.lost = Some(match exit {
            MachineExit::PoweredOff => format!("the guest ended {at}"),
            MachineExit::Died { status, stderr_tail } => {
                let tail = stderr_tail.trim();
                let tail = if tail.is_empty() { String::new() } else { format!("; it said: {tail}") };
                format!("the machine ended {at} ({status}){tail}")
            }
        });
    }

    fn place(&self) -> String {
        match self.end.story.workload() {
            Some(workload) => format!("in {workload}"),
            None if self.watch.phase() == Phase::Free => "in the user's command".to_owned(),
            None if !self.end.story.driver => "before the driver was loaded".to_owned(),
            None => "between workloads".to_owned(),
        }
    }

    /// Whether enough was seen: a violation, and what else showed up for a while after it.
    fn seen_enough(&mut self) -> bool {
        let (Some(at), Some(limit)) = (self.violated_at, self.limits.violation_heartbeats) else {
            return false;
        };
        // A guest that was asked why it hangs gets to answer.
        let enough = self.heartbeats.saturating_sub(at) >= limit && !self.watch.asked();
        if enough {
            self.end.notes.push(format!(
                "ended {} {limit} heartbeats after the first violation; --keep-going runs to the end",
                self.place()
            ));
        }
        enough
    }

    /// The guest was asked for its stacks and still does not get on: says why.
    fn hang(&mut self) {
        let standing = self.device.standing();
        let [first, second] = self.stacks_from;
        let mut before = self.console.since(first);
        let stacks = self.console.since(second);
        before.truncate(before.len().saturating_sub(stacks.len()));
        let mut violation = hang::judge(&Clues {
            before,
            stacks,
            standing,
            still: standing.activity == self.stood.activity,
            heartbeats: self.watch.stalled(),
            place: self.place(),
            roles: self.device.roles(),
        });
        self.end.lost = Some("the guest hung and was ended".to_owned());
        self.hung = true;
        match &self.stuck {
            // The oracle has said so, and where. Of a livelock it has no stacks.
            Some(fault) if violation.rule == Rule::FaultUnanswered && fault.rule == violation.rule => return,
            Some(fault) => {
                violation = violation.at(fault.address, None);
                if let Some(context) = fault.context {
                    violation = violation.on(Handle(context));
                }
                let what = match fault.rule {
                    Rule::FaultUnanswered => "a fault waits for its answer",
                    _ => "an access is replayed without end",
                };
                violation.summary.push_str(&format!("; meanwhile {what}"));
            }
            None => {}
        }
        self.device.report(violation);
    }

    /// Looks at the clocks; true if the guest is to be ended.
    fn tick(&mut self, now: Instant) -> bool {
        self.starvation.look(now, self.machine.pid(), self.pace);
        if self.seen_enough() {
            return true;
        }
        // A complaint has many lines, and a starved guest's come slowly.
        if now.saturating_duration_since(self.last_console) >= self.starvation.longer(now, CONSOLE_IDLE) {
            let mut items = Vec::new();
            self.console.idle(&mut items);
            self.items(items);
        }
        let activity = self.device.activity();
        if activity != self.activity {
            self.activity = activity;
            self.watch.device(now);
        }
        // Whoever is held at a gate says nothing, and that is the scenario's doing.
        let moves = self.device.moves();
        if moves != self.moves {
            self.moves = moves;
            self.watch.moves();
        }
        match self.watch.check(now) {
            None => false,
            Some(Alarm::AskStacks) => {
                self.stacks_from = [self.console.count(); 2];
                self.stood = self.device.standing();
                self.events.event(Event::Note {
                    text: format!(
                        "no progress for {} heartbeats {}; the guest is asked for its stacks",
                        self.watch.stalled(),
                        self.place()
                    ),
                });
                self.device.request(REQUEST_BLOCKED_TASKS | REQUEST_ALL_CPUS);
                false
            }
            Some(Alarm::AskAgain) => {
                self.stacks_from[1] = self.console.count();
                self.device.request(REQUEST_BLOCKED_TASKS | REQUEST_ALL_CPUS);
                false
            }
            Some(Alarm::Hang) => {
                self.hang();
                true
            }
            Some(Alarm::Lost(text)) if self.watch.phase() == Phase::Boot || self.nmi => {
                self.end.lost = self.end.lost.take().or(Some(text));
                true
            }
            Some(Alarm::Lost(text)) => {
                // It may still be able to say where it hangs.
                self.end.lost = Some(text);
                self.nmi = true;
                match self.machine.nmi() {
                    Ok(()) => {
                        let patience = NMI_PATIENCE.min(self.limits.silence);
                        self.watch.grant(now, patience);
                        false
                    }
                    Err(_) => true,
                }
            }
        }
    }
}

/// What PID 1 says while it has no witness to say it through: on the console, which may be slower than the witness.
fn before_the_witness(message: &Message) -> bool {
    match message {
        Message::Booted { .. } => true,
        Message::ModuleLoaded { module } => WITNESS_MODULE.rsplit('/').next() == Some(module.as_str()),
        _ => false,
    }
}

#[cfg(test)]
#[path = "session_test.rs"]
mod tests;
