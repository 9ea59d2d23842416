// SPDX-License-Identifier: MIT OR Apache-2.0
//! The host's side of a nested run: boots the outer guest, watches it, and passes on what it says.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use guest_protocol::Plan;
use parking_lot::Mutex;
use vgpu::gpu::GpuConfig;
use vgpu::oracle::file_bytes;

use super::frame::{Frame, Hello, InnerEvent, VERSION};
use super::image::{self, Image};
use super::{COMMAND, Errand, PORT};
use crate::console::{Console, Item};
use crate::event::{Event, EventSink};
use crate::failure::{Failure, FailureKind, Result};
use crate::machine::qemu::{self, Port};
use crate::machine::{Accel, ConsoleSink, FunctionSlot, Machine, MachineConfig, MachineExit};
use crate::provision::{Cache, Kernel, Provisioner};
use crate::report::out::OutDir;
use crate::report::results::{AllowedRecord, Results, SCHEMA_VERSION, Verdict, ViolationRecord};
use crate::runner::RunConfig;
use crate::runner::parts::Parts;
use crate::runner::story::Story;
use crate::runner::untrusted;

/// The outer kernel's command line. What follows `--` are the arguments of its PID 1.
const CMDLINE: &str = "console=ttyS0 loglevel=5 printk.time=1 panic=-1 oops=panic unknown_nmi_panic nokaslr mitigations=off no_timer_check \
     random.trust_cpu=on watchdog_thresh=30 rcupdate.rcu_cpu_stall_timeout=60 tsc=reliable";
/// Memory of the outer guest beside the inner guest's and its own files.
const OUTER_BYTES: u64 = 512 << 20;
/// How many frames can be said before the sayer waits. Each can be as long as its kind allows, and is several times as large
/// here.
const QUEUE: usize = 64;
const TICK: Duration = Duration::from_millis(100);
/// Host time until the outer guest's PID 1 says hello.
pub(super) const BOOT: Duration = Duration::from_secs(180);
/// Host time without a frame; one is due every second.
pub(super) const SILENCE: Duration = Duration::from_secs(90);
/// Host time that an interrupted run has to end in order.
const GRACE: Duration = Duration::from_secs(15);
/// Host time that an outer guest has to print its stacks, and that it has to switch itself off.
pub(super) const LAST_WORDS: Duration = Duration::from_secs(5);
/// A gap between two ticks from which on this process itself stood still.
const STOOD_STILL: Duration = Duration::from_secs(5);
/// Console lines shown of a lost outer guest.
const TAIL_LINES: usize = 30;
/// Complaints of the outer kernel that are kept at a time, and in all.
const MAX_COMPLAINTS: usize = 20;
/// Violations kept for the case that the outer guest is lost.
const MAX_VIOLATIONS: usize = 1000;

/// A nested run, from outside.
pub(crate) struct Outside<'a> {
    /// The run.
    pub config: &'a RunConfig,
    /// The inner guest's parts.
    pub parts: &'a Parts,
    /// What the inner guest is told.
    pub plan: &'a Plan,
    /// Where events go.
    pub events: &'a Arc<dyn EventSink>,
    /// The user wants an end.
    pub interrupted: &'a AtomicBool,
    /// The folder of `--out`.
    pub out: Option<&'a OutDir>,
    /// What the inside is for.
    pub errand: Errand,
    /// Gets the outer guest's process.
    pub outer: &'a AtomicU32,
}

/// What reaches the one thread that follows the outer guest.
enum Input {
    /// A frame.
    Frame(Box<Frame>),
    /// The line ended; with an error if not in order.
    LineEnd(Option<io::Error>),
}

impl Outside<'_> {
    /// Makes the run. `inner` are the inner guest's files. What came of it is in `results`; the outer guest is gone.
    pub(crate) fn run(&self, mut inner: File, results: &mut Results) -> Result<()> {
        let kernel = outer_kernel(&self.config.outer_kernel, self.parts, self.events)?;
        let begin = Instant::now();
        let image =
            image::build(self.errand, self.config, self.parts, &kernel, &mut inner, self.parts.qemu()?)?;
        drop(inner);
        let log = self.out.map(OutDir::console_log).transpose()?;
        let outer_log = self.out.map(OutDir::outer_console_log).transpose()?;
        self.note(format!(
            "outer guest: kernel {}, {} processor{}, {} MiB of files made in {:.1} s",
            kernel.release,
            self.config.outer_cpus,
            if self.config.outer_cpus == 1 { "" } else { "s" },
            image.bytes >> 20,
            begin.elapsed().as_secs_f64()
        ));
        let (queue, inputs) = sync_channel(QUEUE);
        let (line, theirs) =
            UnixStream::pair().map_err(|error| Failure::environment(format!("no line: {error}")))?;
        let reader = line
            .try_clone()
            .map_err(|error| Failure::environment(format!("cannot share the line: {error}")))?;
        let console = Arc::new(Mutex::new(OuterConsole::new(outer_log)));
        // Taken at once, without a queue: the machine's end waits for the console's.
        let sink: ConsoleSink = Box::new({
            let console = Arc::clone(&console);
            move |bytes| console.lock().feed(bytes)
        });
        let machine = start_outer(self.config, self.parts, &kernel, image, theirs, Vec::new(), sink)?;
        self.outer.store(machine.pid().unwrap_or(0), Ordering::SeqCst);
        listen(reader, queue)?;
        let following = Following {
            outside: self,
            machine,
            line,
            console,
            log,
            trace: None,
            trace_bytes: 0,
            trace_failed: false,
            hello: None,
            story: Story::new(self.plan),
            violations: Vec::new(),
            allowed: Vec::new(),
            results: None,
            notes: Vec::new(),
            begin: Instant::now(),
            heard: Instant::now(),
            interrupted_at: None,
        };
        following.follow(&inputs, results)
    }

    fn note(&self, text: String) {
        self.events.event(Event::Note { text });
    }
}

/// The outer guest's kernel: the default one if nothing is said, whatever the inner one is, for that has KVM as modules.
pub(crate) fn outer_kernel(name: &str, parts: &Parts, events: &Arc<dyn EventSink>) -> Result<Kernel> {
    if parts.kernel.name == name {
        return Ok(parts.kernel.clone());
    }
    Provisioner::new(Cache::from_env()?, Arc::clone(events)).kernel(name)
}

/// Boots the outer guest of a run, with these functions.
pub(super) fn start_outer(
    run: &RunConfig,
    parts: &Parts,
    kernel: &Kernel,
    image: Image,
    port: UnixStream,
    functions: Vec<FunctionSlot>,
    console: ConsoleSink,
) -> Result<Box<dyn Machine>> {
    // The inner guest's memory, its VRAM, its files once more on their way into it, and the trace, in the end twice. The archive is
    // there twice while it is unpacked.
    let trace = if run.oracle { 2 * run.trace_bytes } else { 0 };
    let memory = run.memory_bytes + GpuConfig::default().vram_bytes + 3 * image.bytes + trace + OUTER_BYTES;
    let iommu = if run.vfio.is_some() { " intel_iommu=on" } else { "" };
    let config = MachineConfig {
        kernel: kernel.image.clone(),
        initramfs: image.file,
        cmdline: format!("{CMDLINE}{iommu} -- {COMMAND}"),
        cpus: run.outer_cpus,
        memory_bytes: memory.next_multiple_of(2 << 20),
        nodes: 1,
        accel: Accel::Tcg,
        functions,
        console,
        interactive: false,
    };
    let handed = run.vfio.and_then(|vfio| vfio.outer_device());
    let port = Port { name: PORT, socket: port, iommu: run.vfio.is_some(), handed };
    qemu::start_outer(parts.qemu()?, config, port)
}

/// Reads frames on a thread of its own until the line ends.
fn listen(mut line: UnixStream, queue: SyncSender<Input>) -> Result<()> {
    let body = move || {
        loop {
            let (input, end) = match Frame::read(&mut line) {
                Ok(Some(frame)) => (Input::Frame(Box::new(frame)), false),
                Ok(None) => (Input::LineEnd(None), true),
                Err(error) => (Input::LineEnd(Some(error)), true),
            };
            if queue.send(input).is_err() || end {
                return;
            }
        }
    };
    std::thread::Builder::new()
        .name("nested-line".into())
        .spawn(body)
        .map(drop)
        .map_err(|error| Failure::environment(format!("cannot start a thread: {error}")))
}

/// The outer guest's console. It is not the run's: only what its kernel complains of is of interest.
///
/// Its lock is held while bytes are taken or complaints are fetched, and nothing else is waited for meanwhile.
pub(super) struct OuterConsole {
    console: Console,
    /// Complaints that nobody has fetched yet.
    complaints: Vec<String>,
}

impl OuterConsole {
    pub(super) fn new(log: Option<File>) -> Self {
        Self { console: Console::new(log), complaints: Vec::new() }
    }

    pub(super) fn feed(&mut self, bytes: &[u8]) {
        let mut items = Vec::new();
        self.console.feed(bytes, &mut items);
        self.take(items);
    }

    fn take(&mut self, items: Vec<Item>) {
        for item in items {
            if let (Item::Splat(splat), true) = (item, self.complaints.len() < MAX_COMPLAINTS) {
                self.complaints.push(format!("the outer guest's kernel complained: {}", splat.summary));
            }
        }
    }

    /// The complaints since the last call; all that there are if the console has ended.
    fn fetch(&mut self, ended: bool) -> Vec<String> {
        if ended {
            let mut items = Vec::new();
            self.console.finish(&mut items);
            self.take(items);
        }
        std::mem::take(&mut self.complaints)
    }
}

/// A started outer guest.
struct Following<'a> {
    outside: &'a Outside<'a>,
    machine: Box<dyn Machine>,
    line: UnixStream,
    console: Arc<Mutex<OuterConsole>>,
    log: Option<File>,
    /// The run's trace, which comes at its end, and how much of it came.
    trace: Option<File>,
    trace_bytes: u64,
    trace_failed: bool,
    hello: Option<Hello>,
    /// What the inner guest told, for the case that the results never come.
    story: Story,
    violations: Vec<ViolationRecord>,
    allowed: Vec<AllowedRecord>,
    results: Option<Box<Results>>,
    /// What is worth knowing about the outer guest.
    notes: Vec<String>,
    begin: Instant,
    heard: Instant,
    interrupted_at: Option<Instant>,
}

/// Why a run without results ended.
enum Lost {
    /// Ended from outside, and not in order.
    Interrupted,
    /// The outer guest is gone, stuck or out of its mind.
    Outer(String),
}

impl Following<'_> {
    fn follow(mut self, inputs: &Receiver<Input>, results: &mut Results) -> Result<()> {
        let lost = self.listen(inputs).err();
        if let Some(Lost::Outer(_)) = &lost {
            self.last_words();
        }
        self.machine.kill();
        self.complaints(true);
        results.notes.append(&mut self.notes);
        match (self.results.take(), lost) {
            (Some(theirs), _) => adopt(results, *theirs),
            (None, Some(lost)) => self.without_results(lost, results),
            (None, None) => self.without_results(Lost::Outer("it ended without results".into()), results),
        }
    }

    /// Until the results are there and the outer guest has switched itself off.
    fn listen(&mut self, inputs: &Receiver<Input>) -> Result<(), Lost> {
        let mut last_tick = Instant::now();
        let mut received_at = None;
        loop {
            match inputs.recv_timeout(TICK) {
                Ok(input) => self.input(input)?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => std::thread::sleep(TICK),
            }
            let now = Instant::now();
            let gap = now.saturating_duration_since(last_tick);
            if gap < TICK {
                continue;
            }
            last_tick = now;
            self.complaints(false);
            if self.results.is_some() {
                let since = *received_at.get_or_insert_with(|| {
                    let _ = Frame::Received.write(&mut self.line);
                    now
                });
                // It has nothing more to say. That it goes by itself shows that it was in order to the end.
                if self.machine.wait(Duration::ZERO).is_some() {
                    return Ok(());
                }
                if now.saturating_duration_since(since) >= LAST_WORDS {
                    self.notes.push("the outer guest did not switch itself off and was ended".into());
                    return Ok(());
                }
                continue;
            }
            if let Some(exit) = self.machine.wait(Duration::ZERO) {
                while let Ok(input) = inputs.try_recv() {
                    self.input(input)?;
                }
                if self.results.is_some() {
                    return Ok(());
                }
                return Err(Lost::Outer(match exit {
                    MachineExit::PoweredOff => "it switched itself off without results".into(),
                    MachineExit::Died { status, stderr_tail } if stderr_tail.is_empty() => status,
                    MachineExit::Died { status, stderr_tail } => format!("{status}; it said: {stderr_tail}"),
                }));
            }
            if gap >= STOOD_STILL {
                // This process stood still, not the guest.
                self.begin += gap;
                self.heard += gap;
                continue;
            }
            self.clocks(now)?;
        }
    }

    fn clocks(&mut self, now: Instant) -> Result<(), Lost> {
        let since = |then: Instant| now.saturating_duration_since(then);
        if self.outside.interrupted.load(Ordering::Relaxed) {
            let first = self.interrupted_at.is_none();
            let at = *self.interrupted_at.get_or_insert(now);
            if first && (self.hello.is_none() || Frame::Interrupt.write(&mut self.line).is_err()) {
                return Err(Lost::Interrupted);
            }
            if since(at) >= GRACE {
                return Err(Lost::Interrupted);
            }
        }
        if self.hello.is_none() {
            if since(self.begin) >= BOOT {
                return Err(Lost::Outer(format!("it did not reach PID 1 within {} s", BOOT.as_secs())));
            }
        } else if since(self.heard) >= SILENCE {
            return Err(Lost::Outer(format!(
                "nothing was heard from it for {} s: none of its threads gets to run",
                SILENCE.as_secs()
            )));
        }
        Ok(())
    }

    fn input(&mut self, input: Input) -> Result<(), Lost> {
        let frame = match input {
            Input::LineEnd(Some(error)) if self.results.is_none() => {
                return Err(Lost::Outer(format!("what it sent cannot be read: {error}")));
            }
            Input::LineEnd(_) => return Ok(()),
            Input::Frame(frame) => *frame,
        };
        self.heard = Instant::now();
        let out_of_turn = |what: &str| Err(Lost::Outer(format!("it sent {what} out of turn")));
        match (frame, self.hello.is_some()) {
            (Frame::Hello(hello), false) => {
                if hello.version != VERSION {
                    return Err(Lost::Outer(format!("it speaks version {} of the frames", hello.version)));
                }
                self.outside
                    .note(format!("outer guest: PID 1 after {:.1} s", self.begin.elapsed().as_secs_f64()));
                self.hello = Some(hello);
            }
            (Frame::Hello(_), true) => return out_of_turn("a second greeting"),
            (_, false) => return out_of_turn("a frame before its greeting"),
            (Frame::Alive, true) => {}
            (Frame::Event(event), true) => self.event(*event),
            (Frame::Log(bytes), true) => {
                // A full disk must not end the run.
                if self.log.as_mut().is_some_and(|log| log.write_all(&bytes).is_err()) {
                    self.log = None;
                }
            }
            (Frame::Trace(bytes), true) => self.trace(&bytes)?,
            (Frame::Results(mut theirs), true) => {
                let told = !self.violations.is_empty() && theirs.verdict == Verdict::Clean;
                let sound = plausible(self.outside.config, &theirs);
                if let Err(why) = if told { Err("a violation was told before") } else { sound } {
                    return Err(Lost::Outer(format!("its results cannot be this run's: {why}")));
                }
                untrusted::tame_results(&mut theirs);
                self.results = Some(theirs);
            }
            (Frame::Exit(_), true) => return out_of_turn("the end of a machine that it does not carry"),
            (Frame::Interrupt | Frame::Nmi | Frame::Received, true) => {
                return out_of_turn("a frame of the host's");
            }
        }
        Ok(())
    }

    /// Takes the next part of the trace.
    fn trace(&mut self, bytes: &[u8]) -> Result<(), Lost> {
        self.trace_bytes += bytes.len() as u64;
        if self.trace_bytes > file_bytes(self.outside.config.trace_bytes) {
            return Err(Lost::Outer("it sent more of a trace than there can be".into()));
        }
        let Some(out) = self.outside.out.filter(|_| !self.trace_failed) else { return Ok(()) };
        let written = match &mut self.trace {
            Some(file) => file.write_all(bytes).map_err(|error| error.to_string()),
            None => out.trace_copy().map_err(|failure| failure.to_string()).and_then(|mut file| {
                file.write_all(bytes).map_err(|error| error.to_string())?;
                self.trace = Some(file);
                Ok(())
            }),
        };
        // A full disk must not end the run; what is there is not whole, and says so itself.
        if let Err(error) = written {
            self.trace_failed = true;
            self.notes.push(format!("the trace could not be kept: {error}"));
        }
        Ok(())
    }

    fn event(&mut self, event: InnerEvent) {
        let event = match event {
            InnerEvent::Note { mut text } => {
                untrusted::tame_text(&mut text);
                Event::Note { text }
            }
            InnerEvent::Console { mut line } => {
                untrusted::tame_text(&mut line);
                Event::Console { line }
            }
            InnerEvent::Guest { mut message } => {
                untrusted::tame(&mut message);
                self.story.message(&message);
                Event::Guest { message }
            }
            InnerEvent::Violation { mut violation } => {
                untrusted::tame_violation(&mut violation);
                if self.violations.len() + self.allowed.len() < MAX_VIOLATIONS {
                    let workload = self.story.workload().map(str::to_owned);
                    let replay = violation.replay.clone().unwrap_or_default();
                    let record = ViolationRecord::new(&violation, workload, replay);
                    match violation.allowed.clone() {
                        Some(reason) => self.allowed.push(AllowedRecord { violation: record, reason }),
                        None => self.violations.push(record),
                    }
                }
                Event::Violation { violation }
            }
        };
        self.outside.events.event(Event::Nested { inner: Box::new(event) });
    }

    /// Tells what the outer kernel complained of, as soon as it is known.
    fn complaints(&mut self, ended: bool) {
        let fresh = self.console.lock().fetch(ended);
        for text in fresh {
            self.outside.note(text.clone());
            if self.notes.len() < MAX_COMPLAINTS {
                self.notes.push(text);
            }
        }
    }

    /// Lets a lost outer guest say where it hangs.
    fn last_words(&mut self) {
        if self.machine.wait(Duration::ZERO).is_none() && self.machine.nmi().is_ok() {
            let _ = self.machine.wait(LAST_WORDS);
        }
    }

    /// The outer guest was lost. What was found before that stands.
    fn without_results(&mut self, lost: Lost, results: &mut Results) -> Result<()> {
        let why = match lost {
            Lost::Interrupted => "interrupted".to_owned(),
            Lost::Outer(why) => format!("the outer guest was lost: {why}"),
        };
        results.workloads = self.story.results(&why);
        results.console_tail = self.console.lock().console.tail(TAIL_LINES);
        results.allowed = std::mem::take(&mut self.allowed);
        if self.violations.is_empty() {
            let mut failure = Failure::inconclusive(why);
            failure.console_tail.clone_from(&results.console_tail);
            return Err(failure);
        }
        results.violations = std::mem::take(&mut self.violations);
        results.verdict = Verdict::Violation;
        results.exit_status = 1;
        results.reasons = results.violations.iter().map(|violation| violation.rule.clone()).collect();
        results.reasons.dedup();
        results.notes.push(why);
        Ok(())
    }
}

/// Whether results from inside can be those of this run.
fn plausible(config: &RunConfig, theirs: &Results) -> Result<(), &'static str> {
    let status = match theirs.verdict {
        Verdict::Clean => theirs.exit_status == 0 && theirs.violations.is_empty() && theirs.error.is_none(),
        Verdict::Violation => theirs.exit_status == 1,
        Verdict::Inconclusive => theirs.exit_status == 3,
        Verdict::Error => theirs.error.is_some() && matches!(theirs.exit_status, 2 | 4),
    };
    let checks = [
        (theirs.schema_version == SCHEMA_VERSION, "another version of the form"),
        (status, "verdict and exit status disagree"),
        (theirs.seed == config.seed, "another seed"),
        (theirs.machine == config.machine.to_string(), "another machine"),
        (theirs.oracle == config.oracle, "another oracle setting"),
    ];
    checks.iter().find(|(holds, _)| !holds).map_or(Ok(()), |(_, why)| Err(*why))
}

/// Takes over what was found out inside; what was chosen outside stays.
fn adopt(results: &mut Results, theirs: Results) -> Result<()> {
    // Every field is named, so that a new one is decided on.
    let Results {
        schema_version: _,
        version: _,
        command: _,
        verdict,
        exit_status,
        reasons,
        machine: _,
        nested: _,
        machine_version,
        accel: _,
        accel_reason: _,
        kernel,
        kernel_name: _,
        backend: _,
        policy: _,
        driver: _,
        patches: _,
        seed: _,
        cpus: _,
        memory_bytes: _,
        nodes: _,
        atomics: _,
        oracle: _,
        workloads,
        exec_status,
        scenario,
        counters,
        violations,
        allowed,
        allow_unneeded,
        boot_complaints,
        notes,
        module_texts,
        error,
        console_tail,
        boot_seconds,
        seconds: _,
        started: _,
    } = theirs;
    results.verdict = verdict;
    results.exit_status = exit_status;
    results.reasons = reasons;
    results.machine_version = machine_version;
    results.kernel = kernel;
    results.workloads = workloads;
    results.exec_status = exec_status;
    results.scenario = scenario;
    results.counters = counters;
    results.violations = violations;
    results.allowed = allowed;
    results.allow_unneeded = allow_unneeded;
    results.boot_complaints = boot_complaints;
    results.notes.extend(notes);
    results.module_texts = module_texts;
    results.console_tail = console_tail;
    results.boot_seconds = boot_seconds;
    let Some(error) = error else { return Ok(()) };
    let kind = match error.kind.as_str() {
        "usage" => FailureKind::Usage,
        "environment" => FailureKind::Environment,
        _ => FailureKind::Inconclusive,
    };
    let what = format!("in the outer guest: {}", error.message);
    let console_tail = results.console_tail.clone();
    Err(Failure { kind, what, remedy: error.remedy, console_tail })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gates::engine::ScenarioResult;
    use crate::report::results::ErrorRecord;
    use crate::report::results::tests::sample;

    fn theirs() -> (RunConfig, Results) {
        let mut config = RunConfig::for_tests();
        let results = sample();
        config.seed = results.seed;
        (config, results)
    }

    #[test]
    fn results_of_another_run_are_refused() {
        let (config, results) = theirs();
        assert_eq!(plausible(&config, &results), Ok(()));
        let refused = |change: &dyn Fn(&mut Results)| {
            let mut changed = results.clone();
            change(&mut changed);
            plausible(&config, &changed).unwrap_err()
        };
        assert_eq!(refused(&|r| r.seed ^= 1), "another seed");
        assert_eq!(refused(&|r| r.exit_status = 0), "verdict and exit status disagree");
        assert_eq!(refused(&|r| r.verdict = Verdict::Clean), "verdict and exit status disagree");
        assert_eq!(refused(&|r| r.schema_version = 0), "another version of the form");
        assert_eq!(refused(&|r| r.machine = "kvm".into()), "another machine");
    }

    #[test]
    fn what_came_of_a_scenario_arrives() {
        let (_, mut theirs) = theirs();
        let scenario = ScenarioResult { name: "one".into(), repetitions: 3, ..ScenarioResult::default() };
        theirs.scenario = Some(scenario.clone());
        let mut ours = sample();
        adopt(&mut ours, theirs).unwrap();
        assert_eq!(ours.scenario, Some(scenario));
    }

    #[test]
    fn an_error_inside_is_one_outside() {
        let (_, mut theirs) = theirs();
        theirs.verdict = Verdict::Error;
        theirs.exit_status = 4;
        theirs.error =
            Some(ErrorRecord { kind: "environment".into(), message: "no KVM".into(), remedy: None });
        let failure = adopt(&mut sample(), theirs).unwrap_err();
        assert_eq!(failure.kind, FailureKind::Environment);
        assert!(failure.what.contains("no KVM"));
    }
}
