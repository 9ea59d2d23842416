// SPDX-License-Identifier: MIT OR Apache-2.0
//! A run: parts, device, machine, guest, verdict.

pub mod accel;
pub mod allow;
pub mod config;
pub mod device;
pub mod guest;
pub mod hang;
pub mod locks;
mod pace;
pub mod parts;
pub mod plan;
pub mod replay;
pub mod session;
pub mod shell;
pub mod signals;
pub mod splats;
pub mod story;
pub(crate) mod untrusted;
pub mod verdict;
pub mod watch;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::sync::mpsc::sync_channel;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use guest_protocol::Plan;
use vgpu::gpu::GpuConfig;
use vgpu::oracle::{Oracle, Rule, Violation, file_bytes};

pub use config::RunConfig;

use crate::cli::vfio::Vfio;
use crate::cli::{AtomicsName, MachineName};
use crate::console::Console;
use crate::console::symbols::{Module, Symbols};
use crate::event::{Event, EventSink};
use crate::failure::{Failure, FailureKind, Result};
use crate::gates::diagram;
use crate::gates::engine::Engine;
use crate::machine::kvm::{Handover, KvmOptions};
use crate::machine::{Accel, MachineConfig, kvm, qemu};
use crate::nested::Errand;
use crate::nested::carried::Outer;
use crate::nested::outside::{Outside, outer_kernel};
use crate::provision::module_name;
use crate::report::out::OutDir;
use crate::report::results::{AllowedRecord, ErrorRecord, Results, SCHEMA_VERSION, Verdict, ViolationRecord};
use device::Device;
use guest::{Finds, GuestLine};
use parts::Parts;
use session::{End, Given, Input, Session};
use verdict::Evidence;
use watch::Limits;

/// How much the guest can say before it has to wait for the session.
const QUEUE: usize = 4096;

/// What came of a run.
#[derive(Debug)]
pub struct Outcome {
    /// All of it; already in the folder of `--out`.
    pub results: Results,
    /// Why the run could not be made, if it could not.
    pub failure: Option<Failure>,
}

/// Makes a run. Whatever happens, everything it started has ended when it returns, and `--out` has its results.
pub fn run(config: &RunConfig, events: &Arc<dyn EventSink>, interrupted: &AtomicBool) -> Outcome {
    let begin = Instant::now();
    let mut results = blank(config);
    let out = config.out.as_deref().map(OutDir::prepare).transpose();
    let (out, mut failure) = match out {
        // Nothing has been started, and there is no place to write to.
        Err(failure) => {
            note_failure(&mut results, &failure);
            return Outcome { results, failure: Some(failure) };
        }
        Ok(out) => {
            let made = make(config, events, interrupted, out.as_ref(), &mut results);
            (out, made.err())
        }
    };
    if let Some(failure) = &failure {
        note_failure(&mut results, failure);
    }
    results.seconds = begin.elapsed().as_secs_f64();
    let drawn = config.diagram.as_deref().map_or(Ok(()), |file| draw(config, &results, file));
    if let Err(trouble) = out.map_or(Ok(()), |out| out.write(&results)).and(drawn) {
        // A verdict that was reached stands; it is on the terminal.
        events.event(Event::Note { text: trouble.to_string() });
        if failure.is_none() && results.verdict != Verdict::Violation {
            results.exit_status = trouble.kind.exit_status();
            failure = Some(trouble);
        }
    }
    Outcome { results, failure }
}

/// Writes the scenario's diagram to its file.
fn draw(config: &RunConfig, results: &Results, file: &Path) -> Result<()> {
    let Some(scenario) = &results.scenario else { return Ok(()) };
    let command = replay::diagram_of(config);
    std::fs::write(file, diagram::page(scenario, &command))
        .map_err(|error| Failure::environment(format!("--diagram {}: {error}", file.display())))
}

fn make(
    config: &RunConfig,
    events: &Arc<dyn EventSink>,
    interrupted: &AtomicBool,
    out: Option<&OutDir>,
    results: &mut Results,
) -> Result<()> {
    let note = |text: String| events.event(Event::Note { text });
    let accel = accel::choose_for(config)?;
    results.accel = Some(accel.accel.to_string());
    results.accel_reason = Some(accel.reason.clone());
    note(format!("machine {}, accelerator {}: {}", config.machine, accel.accel, accel.reason));
    note(format!("seed {}", config.seed));
    if config.nodes > 1 {
        let why = if config.nodes_chosen { ", for the workload numa: --nodes says otherwise" } else { "" };
        note(format!("{} NUMA nodes{why}", config.nodes));
    }
    if config.shell {
        accel::require_terminal()?;
    }
    let plan = plan::plan(config);
    results.workloads = story::Story::new(&plan).results("the guest was not started");
    let parts = parts::gather(config, Arc::clone(events), interrupted)?;
    let (version, machine) = parts.machine();
    results.machine_version = Some(version);
    results.kernel.clone_from(&parts.kernel.release);
    note(format!("{machine}, kernel {} ({})", parts.kernel.release, parts.kernel.name));
    let initramfs = parts::initramfs(config, &parts, &plan)?;
    let carried = config.vfio == Some(Vfio::Gpu);
    if config.nested && !carried {
        let errand = Errand::Run;
        let outside = Outside {
            config,
            parts: &parts,
            plan: &plan,
            events,
            interrupted,
            out,
            errand,
            outer: &AtomicU32::new(0),
        };
        let made = outside.run(initramfs, results);
        with_kernel(results, &parts);
        return made;
    }
    let log = out.map(OutDir::console_log).transpose()?;
    let trace = match out.filter(|_| config.oracle) {
        Some(out) => TraceTo::File(out.trace(file_bytes(config.trace_bytes))?),
        None => TraceTo::Nobody,
    };
    let (mut limits, mut outer) = (limits(&parts), None);
    if carried {
        limits = crate::nested::limits(limits);
        // QEMU is only the host of the machine.
        results.machine_version = Some(env!("CARGO_PKG_VERSION").to_owned());
        let log = out.map(OutDir::outer_console_log).transpose()?;
        outer = Some(Outer {
            kernel: outer_kernel(&config.outer_kernel, &parts, events)?,
            log,
            events: Arc::clone(events),
        });
    }
    let given = Boot { parts: &parts, plan: &plan, initramfs, log, trace, limits, accel: accel.accel, outer };
    let made = follow(config, given, events.as_ref(), interrupted, results);
    with_kernel(results, &parts);
    made
}

/// Makes a run in an outer guest, from parts that lie there. `keep` is given the trace in the end. Whatever happens, everything it started has ended when it returns.
pub(crate) fn run_inside(
    config: &RunConfig,
    parts: &Parts,
    initramfs: File,
    log: File,
    keep: &dyn Fn(&[u8]),
    events: &dyn EventSink,
    interrupted: &AtomicBool,
) -> Outcome {
    let begin = Instant::now();
    let mut results = blank(config);
    let make = || {
        let accel = accel::choose_inside()?;
        results.accel = Some(accel.accel.to_string());
        events.event(Event::Note { text: accel.reason });
        let plan = plan::plan(config);
        results.workloads = story::Story::new(&plan).results("the guest was not started");
        results.machine_version = Some(parts.machine().0);
        results.kernel.clone_from(&parts.kernel.release);
        let limits = crate::nested::limits(limits(parts));
        let given = Boot {
            parts,
            plan: &plan,
            initramfs,
            log: Some(log),
            trace: TraceTo::Keeper(keep),
            limits,
            accel: accel.accel,
            outer: None,
        };
        follow(config, given, events, interrupted, &mut results)
    };
    let failure = make().err();
    if let Some(failure) = &failure {
        note_failure(&mut results, failure);
    }
    results.seconds = begin.elapsed().as_secs_f64();
    Outcome { results, failure }
}

/// The results of a run that could not be made.
pub(crate) fn not_made(config: &RunConfig, failure: &Failure) -> Results {
    let mut results = blank(config);
    note_failure(&mut results, failure);
    results
}

/// How long things may take in host time: a kernel with KASAN is several times slower than one without.
fn limits(parts: &Parts) -> Limits {
    let plain = Limits::default();
    if parts.kernel.slow() { plain.slower(5) } else { plain }
}

/// Where a run's trace goes.
enum TraceTo<'a> {
    /// It is forgotten with the run.
    Nobody,
    /// To this file, as it is written.
    File(File),
    /// To whoever is given it in the end.
    Keeper(&'a dyn Fn(&[u8])),
}

/// What a guest is booted from, and how long it may take.
struct Boot<'a> {
    parts: &'a Parts,
    plan: &'a Plan,
    initramfs: File,
    log: Option<File>,
    trace: TraceTo<'a>,
    limits: Limits,
    accel: Accel,
    /// The outer guest whose machine carries the run, if it is one that this process judges itself.
    outer: Option<Outer>,
}

/// Whose guest the machine's guest is.
enum Under {
    /// This process's, with devices handed over.
    Here(Option<Handover>),
    /// Of an outer guest.
    Outer(Box<Outer>),
}

/// Boots a guest, follows it to its end, and judges.
fn follow(
    config: &RunConfig,
    boot: Boot<'_>,
    events: &dyn EventSink,
    interrupted: &AtomicBool,
    results: &mut Results,
) -> Result<()> {
    let Boot { parts, plan, initramfs, log, trace, limits, accel, outer } = boot;
    let under = match outer {
        Some(outer) => Under::Outer(Box::new(outer)),
        None => Under::Here(handover(config, events)?),
    };
    let (queue, inputs) = sync_channel(QUEUE);
    let line = GuestLine::new(queue.clone());
    let size = GpuConfig {
        jitter: config.jitter.then_some(config.seed),
        coherent_atomics: config.atomics == AtomicsName::Coherent,
        ..GpuConfig::default()
    };
    let (file, keep) = match trace {
        TraceTo::Nobody => (None, None),
        TraceTo::File(file) => (Some(file), None),
        TraceTo::Keeper(keep) => (None, Some(keep).filter(|_| config.oracle)),
    };
    let oracle = Device::oracle_of(config, &size, file)?;
    let script = config.script()?;
    let hang = script.as_ref().is_some_and(|(scenario, _)| scenario.hang);
    let engine =
        script.map(|(scenario, script)| Engine::new(&scenario.name, script, config.gate_order.clone()));
    let (replay, orders) = (config.clone(), engine.clone());
    let kernel = parts.kernel.release.clone();
    let (finds, violations) = Finds::follow(&oracle, Arc::clone(&line), move |violation, workload| {
        let order = orders.as_ref().and_then(|engine| engine.order());
        violation.replay = Some(replay::command_in_order(&replay, workload, order));
        violation.allowed =
            allowed(&replay, &kernel, violation, workload).map(|(_, entry)| entry.reason.clone());
    });
    let device = Device::new(Arc::clone(&oracle), size, line.clone())?;
    line.serves(device.gpu());
    if let Some(engine) = &engine {
        device.conduct(Arc::clone(engine));
        line.follows(Arc::clone(engine));
    }
    let start = Instant::now();
    let mut machine = match start_machine(config, parts, &device, initramfs, accel, queue, under) {
        Ok(machine) => machine,
        Err(failure) => {
            // Why is said elsewhere; a trace that cannot be closed is no worse than that.
            let _ = oracle.finish(std::slice::from_ref(&failure.what));
            return Err(failure);
        }
    };
    let session = Session::new(Given {
        machine: machine.as_mut(),
        device: &device,
        events,
        console: Console::new(log),
        plan,
        interactive: config.shell,
        limits: Limits {
            violation_heartbeats: limits.violation_heartbeats.filter(|_| !config.keep_going),
            hang_heartbeats: if hang { limits.suspect_heartbeats } else { limits.hang_heartbeats },
            ..limits
        },
        start,
        pace: line.pace(),
    });
    let end = session.follow(inputs, &violations, interrupted);
    drop(machine);
    let engine = engine.as_deref();
    conclude(
        config,
        results,
        &end,
        &Seen { device: &device, oracle: &oracle, line: &line, finds: &finds, engine },
    );
    let found = usize::from(results.verdict == Verdict::Violation);
    let closed = oracle.finish(results.reasons.get(found..).unwrap_or_default());
    if let Err(error) = closed {
        results.notes.push(format!("the trace could not be closed: {error}"));
    }
    if let Some(keep) = keep {
        keep(&oracle.trace());
    }
    Ok(())
}

fn start_machine(
    config: &RunConfig,
    parts: &Parts,
    device: &Device,
    initramfs: File,
    accel: Accel,
    queue: std::sync::mpsc::SyncSender<Input>,
    under: Under,
) -> Result<Box<dyn crate::machine::Machine>> {
    let machine = MachineConfig {
        kernel: parts.kernel.image.clone(),
        initramfs,
        cmdline: plan::cmdline(config.append.as_deref()),
        cpus: config.cpus,
        memory_bytes: config.memory_bytes,
        nodes: config.nodes,
        accel,
        functions: device.functions(),
        console: Box::new(move |bytes| {
            // The session has ended: nobody wants it.
            let _ = queue.send(Input::Console(bytes.to_vec()));
        }),
        interactive: config.shell,
    };
    match config.machine {
        MachineName::Qemu => qemu::start(parts.qemu()?, machine),
        MachineName::Kvm => {
            let vfio = match under {
                Under::Outer(outer) => return outer.start(config, parts, machine),
                Under::Here(vfio) => vfio,
            };
            let options = KvmOptions { emulated_svm: config.nested, vfio, ..KvmOptions::default() };
            kvm::start(options, machine)
        }
    }
}

/// The devices that the machine hands over, where it is; it is told how.
pub(crate) fn handover(config: &RunConfig, events: &dyn EventSink) -> Result<Option<Handover>> {
    let Some(vfio) = &config.vfio else { return Ok(None) };
    let found = Handover::find(&vfio.devices()?)?;
    found.notes().for_each(|text| events.event(Event::Note { text }));
    Ok(Some(found))
}

/// Everything that has seen something.
struct Seen<'a> {
    device: &'a Device,
    oracle: &'a Oracle,
    line: &'a GuestLine,
    finds: &'a Finds,
    engine: Option<&'a Engine>,
}

/// The entry of the allow list that a violation falls under, and its number.
fn allowed<'c>(
    config: &'c RunConfig,
    release: &str,
    violation: &Violation,
    workload: Option<&str>,
) -> Option<(usize, &'c allow::Entry)> {
    let allow = config.allow.as_ref()?;
    let at = allow.entry(violation, workload, allow::Kernel { name: &config.kernel, release })?;
    Some((at, allow.entries.get(at)?))
}

/// What was found, apart from what is accepted; and what is said of entries that were not needed, those first that must have been.
fn sort_out(config: &RunConfig, results: &mut Results, seen: &Seen<'_>) -> Vec<String> {
    let release = results.kernel.clone();
    let mut needed = Vec::new();
    for violation in &seen.oracle.violations() {
        let workload = seen.finds.workload(violation);
        let order = seen.engine.and_then(Engine::order);
        let replay = replay::command_in_order(config, workload.as_deref(), order);
        let entry = allowed(config, &release, violation, workload.as_deref());
        let record = ViolationRecord::new(violation, workload.clone(), replay);
        match entry {
            Some((at, entry)) => {
                needed.push(at);
                results.allowed.push(AllowedRecord { violation: record, reason: entry.reason.clone() });
            }
            None => results.violations.push(record),
        }
    }
    let Some(allow) = &config.allow else { return Vec::new() };
    let kernel = allow::Kernel { name: &config.kernel, release: &release };
    let unneeded = allow.unneeded(&needed, &config.workloads, kernel);
    results.allow_unneeded = unneeded.iter().map(|entry| allow.say(entry)).collect();
    unneeded.iter().filter(|entry| entry.always).map(|entry| allow.say(entry)).collect()
}

fn conclude(config: &RunConfig, results: &mut Results, end: &End, seen: &Seen<'_>) {
    let mut counters = seen.device.counters();
    counters.probes_missed = counters.probes_missed.max(seen.line.missed());
    counters.heartbeats = counters.heartbeats.max(seen.line.heartbeats());
    let why = match (&end.lost, &end.story.fatal) {
        _ if end.interrupted => "interrupted".to_owned(),
        (_, Some(_)) => "the guest could not go on".to_owned(),
        (Some(lost), None) if lost.contains("hung") => "the guest hung".to_owned(),
        (Some(_), None) => "guest died".to_owned(),
        (None, None) => "the guest did not say that it ended".to_owned(),
    };
    results.workloads = end.story.results(&why);
    let unneeded = sort_out(config, results, seen);
    let evidence = Evidence {
        broken: results.violations.iter().map(|violation| violation.rule.clone()).collect(),
        unneeded,
        unkept: if results.allowed.is_empty() { 0 } else { seen.oracle.counters().suppressed },
        oracle: config.oracle,
        hello: seen.line.hello_seen(),
        counters,
        workloads: results.workloads.clone(),
        exec: config.exec.is_some(),
        exec_status: end.story.exec_status,
        done: end.story.done,
        fatal: end.story.fatal.clone(),
        lost: end.lost.clone(),
        interrupted: end.interrupted,
        garbled: end.garbled,
        loose: end.story.loose.clone(),
        scenario: seen.engine.map_or(Vec::new(), Engine::doubts),
    };
    let (verdict, reasons) = verdict::judge(&evidence);
    results.verdict = verdict;
    results.reasons = reasons;
    results.exit_status = match verdict {
        Verdict::Clean => 0,
        Verdict::Violation => 1,
        Verdict::Inconclusive | Verdict::Error => FailureKind::Inconclusive.exit_status(),
    };
    results.exec_status = end.story.exec_status;
    results.scenario = seen.engine.map(Engine::result);
    results.counters = counters;
    if let Some(kernel) = &end.story.kernel {
        results.kernel.clone_from(kernel);
    }
    results.boot_complaints.clone_from(&end.boot_complaints);
    results.console_tail.clone_from(&end.console_tail);
    results.boot_seconds = end.boot_seconds;
    results.notes.extend(end.notes.iter().cloned());
    results.module_texts = end.story.texts.iter().cloned().collect();
    let suppressed = seen.oracle.counters().suppressed;
    if suppressed > 0 {
        results.notes.push(format!("{suppressed} more violations were not kept"));
    }
}

/// Adds what the kernel's files tell: the lines of source of the functions that reports name, and what its checks no longer saw.
fn with_kernel(results: &mut Results, parts: &Parts) {
    const BLINDING: [Rule; 3] = [Rule::KernelLockdep, Rule::KernelKasan, Rule::KernelOops];
    let blind = BLINDING.iter().any(|rule| results.violations.iter().any(|v| v.rule == rule.name()));
    if blind && parts.kernel.option("PROVE_LOCKING").is_some() {
        results.notes.push(
            "lockdep is silent after its first report, and after one of KASAN or an oops: locking was not checked from there on"
                .to_owned(),
        );
    }
    let modules = [&parts.modules.driver, &parts.modules.witness];
    let modules = modules.into_iter().filter_map(|path| {
        let name = module_name(path)?;
        let text = results.module_texts.get(&name).copied();
        Some(Module::new(name, path.clone(), text))
    });
    let mut symbols = Symbols::new(parts.kernel.symbols.clone(), modules.collect());
    for violation in &mut results.violations {
        violation.summary = symbols.line(&violation.summary).into_owned();
        for line in &mut violation.events {
            *line = symbols.line(line).into_owned();
        }
    }
}

/// Results that say nothing yet.
pub(crate) fn blank(config: &RunConfig) -> Results {
    let text = |path: &std::path::PathBuf| path.display().to_string();
    Results {
        schema_version: SCHEMA_VERSION,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        command: config.command.clone(),
        verdict: Verdict::Error,
        exit_status: FailureKind::Environment.exit_status(),
        reasons: Vec::new(),
        machine: config.machine.to_string(),
        nested: config.nested,
        machine_version: None,
        accel: config.accel.map(|accel| accel.to_string()),
        accel_reason: None,
        kernel: config.kernel.clone(),
        kernel_name: config.kernel.clone(),
        backend: config.backend.to_string(),
        atomics: config.atomics.to_string(),
        policy: config.policy.map(|policy| policy.to_string()),
        driver: config.driver.as_ref().map(text),
        patches: config.patches.iter().map(text).collect(),
        seed: config.seed,
        cpus: config.cpus,
        memory_bytes: config.memory_bytes,
        nodes: config.nodes,
        oracle: config.oracle,
        workloads: Vec::new(),
        exec_status: None,
        scenario: None,
        counters: Default::default(),
        violations: Vec::new(),
        allowed: Vec::new(),
        allow_unneeded: Vec::new(),
        boot_complaints: Vec::new(),
        notes: Vec::new(),
        module_texts: BTreeMap::new(),
        error: None,
        console_tail: Vec::new(),
        boot_seconds: None,
        seconds: 0.0,
        started: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
    }
}

fn note_failure(results: &mut Results, failure: &Failure) {
    let (verdict, kind) = match failure.kind {
        FailureKind::Usage => (Verdict::Error, "usage"),
        FailureKind::Environment => (Verdict::Error, "environment"),
        FailureKind::Inconclusive => (Verdict::Inconclusive, "inconclusive"),
    };
    results.verdict = verdict;
    results.exit_status = failure.kind.exit_status();
    results.reasons = vec![failure.what.clone()];
    results.error = Some(ErrorRecord {
        kind: kind.to_owned(),
        message: failure.what.clone(),
        remedy: failure.remedy.clone(),
    });
    results.console_tail.clone_from(&failure.console_tail);
}
