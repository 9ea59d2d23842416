// SPDX-License-Identifier: MIT OR Apache-2.0
//! Measurements by a guest: the benchmarks' workload, and the default suite with and without the oracle.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use guest_protocol::{BENCH_WORKLOAD, Extent, Message, Outcome};
use parking_lot::Mutex;

use super::figure::{Figure, Goal, median, paired_ratio};
use crate::cli::{DEFAULT_CPUS, DEFAULT_KERNEL};
use crate::event::{Event, EventSink};
use crate::failure::{Failure, Result};
use crate::report::results::{Results, WorkloadOutcome};
use crate::runner::{self, RunConfig, plan};

/// Pairs of runs of the suite.
const PAIRS: usize = 2;
/// Memory of the guests.
pub(super) const MEMORY: u64 = 1 << 30;

/// The benchmarks whose figures the guest's workload gives, and what they are.
const METRICS: &[(&str, &str, &str)] = &[
    ("registers", "read", "a read of ID from user space of the guest, round trip over vfio-user"),
    (
        "registers",
        "write",
        "a write of WINDOW_PAGE from user space of the guest; not posted, so a round trip too",
    ),
    (
        "tables",
        "driver",
        "4 KiB leaves that the driver writes while the device reads present pages in a row, a fault for each window of 64 included",
    ),
    ("invalidate", "unmirrored", "MADV_DONTNEED of one present page, before the address space is mirrored"),
    ("invalidate", "not-on-device", "the same in a mirrored address space, the page not on the device"),
    (
        "invalidate",
        "on-device",
        "the same, the page mapped on the device: callback, cleared leaf, invalidation",
    ),
    ("faults", "one-queue", "faults on present pages far apart, one queue that waits for each"),
    ("faults", "four-queues", "the same on four queues of two contexts at once"),
];

/// A run of the default machine.
pub(super) fn config(kernel: &str, workloads: Vec<String>, seed: u64, oracle: bool) -> RunConfig {
    RunConfig {
        append: None,
        vfio: None,
        scenario: None,
        scenario_file: None,
        gate_order: None,
        diagram: None,
        keep_going: false,
        program: "hmm-testbench".into(),
        command: "hmm-testbench bench".into(),
        workloads,
        exec: None,
        shell: false,
        extent: Extent::Default,
        seed,
        cpus: DEFAULT_CPUS,
        memory_bytes: MEMORY,
        nodes: 1,
        nodes_chosen: false,
        machine: crate::cli::MachineName::Qemu,
        nested: false,
        outer_cpus: 1,
        outer_kernel: DEFAULT_KERNEL.into(),
        accel: None,
        kernel: kernel.into(),
        backend: crate::cli::BackendName::Interval,
        policy: None,
        atomics: crate::cli::AtomicsName::Coherent,
        driver: None,
        patches: Vec::new(),
        add: Vec::new(),
        oracle,
        // What is measured is the way, not the waits.
        jitter: false,
        trace_bytes: vgpu::oracle::DEFAULT_BYTES,
        allow: None,
        out: None,
    }
}

/// Keeps what the guest measures. Only the provisioning's steps are passed on.
#[derive(Default)]
struct Collector {
    steps: Option<Arc<dyn EventSink>>,
    metrics: Mutex<HashMap<String, (f64, String)>>,
    failed: Mutex<Vec<String>>,
}

impl EventSink for Collector {
    fn event(&self, event: Event) {
        match event {
            Event::Guest { message: Message::Metric { name, value, unit } } => {
                self.metrics.lock().insert(name, (value, unit));
            }
            Event::Guest { message: Message::Case(case) } if case.outcome != Outcome::Pass => {
                let detail = case.detail.unwrap_or_default();
                self.failed.lock().push(format!("{}: {detail}", case.case));
            }
            Event::StepStart { .. } | Event::StepProgress { .. } | Event::StepEnd { .. } => {
                if let Some(steps) = &self.steps {
                    steps.event(event);
                }
            }
            _ => {}
        }
    }
}

/// Runs a guest to its end; a failure if it was lost.
fn run(config: &RunConfig, collector: &Arc<Collector>, interrupted: &AtomicBool) -> Result<Results> {
    let events: Arc<dyn EventSink> = collector.clone();
    let outcome = runner::run(config, &events, interrupted);
    match outcome.failure {
        Some(failure) => Err(failure),
        None => ended(outcome.results),
    }
}

/// The results, unless a workload did not end, or the driver was found to be wrong: its speed is nobody's concern then.
fn ended(results: Results) -> Result<Results> {
    let unfinished = |outcome| matches!(outcome, WorkloadOutcome::Unfinished | WorkloadOutcome::NotRun);
    if results.workloads.iter().any(|workload| unfinished(workload.outcome)) {
        let mut failure =
            Failure::inconclusive(format!("the guest was lost: {}", results.reasons.join("; ")));
        failure.console_tail = results.console_tail;
        return Err(failure);
    }
    if let Some(violation) = results.violations.first() {
        return Err(Failure::inconclusive(format!(
            "the oracle found {} violations, the first {}: {}",
            results.violations.len(),
            violation.rule,
            violation.summary
        ))
        .remedy("`run` gives the whole verdict"));
    }
    Ok(results)
}

/// Runs the guest's workload once and gives the figures of the benchmarks in `wanted`.
pub(super) fn workload(
    kernel: &str,
    wanted: &[&str],
    steps: Option<&Arc<dyn EventSink>>,
    interrupted: &AtomicBool,
) -> Result<(Vec<Figure>, Vec<String>)> {
    let collector = Arc::new(Collector { steps: steps.cloned(), ..Collector::default() });
    let config = config(kernel, vec![BENCH_WORKLOAD.to_owned()], 1, true);
    run(&config, &collector, interrupted)?;
    let figures = figures(wanted, &collector.metrics.lock());
    let failed = collector.failed.lock().clone();
    Ok((figures, failed))
}

/// Metrics of the guest as figures.
fn figures(wanted: &[&str], metrics: &HashMap<String, (f64, String)>) -> Vec<Figure> {
    let mut figures = Vec::new();
    for &(benchmark, name, about) in METRICS {
        if !wanted.contains(&benchmark) {
            continue;
        }
        if let Some((value, unit)) = metrics.get(&format!("{benchmark}/{name}")) {
            figures.push(Figure::new(benchmark, name, *value, unit, about));
        }
    }
    let value = |name: &str| metrics.get(name).map(|(value, _)| *value);
    if let (true, Some(alone), Some(present)) =
        (wanted.contains(&"invalidate"), value("invalidate/unmirrored"), value("invalidate/on-device"))
    {
        figures.push(
            Figure::new(
                "invalidate",
                "round-trip",
                present - alone,
                "us",
                "on-device less unmirrored: what mirroring a page adds to taking it away; ratio of the two",
            )
            .ratio(present / alone),
        );
    }
    figures
}

/// The default suite, in turns with the oracle on and off.
pub(super) fn oracle(
    kernel: &str,
    steps: Option<&Arc<dyn EventSink>>,
    note: &dyn Fn(String),
    interrupted: &AtomicBool,
) -> Result<Vec<Figure>> {
    let (mut on, mut off) = (Vec::new(), Vec::new());
    for pair in 0..PAIRS {
        // Swapped each time, so that neither is always the first.
        for judged in [pair % 2 == 0, pair % 2 != 0] {
            // The parts are made once; the later runs find them.
            let steps = steps.filter(|_| on.is_empty() && off.is_empty()).cloned();
            let collector = Arc::new(Collector { steps, ..Collector::default() });
            let workloads = plan::workloads(&[], false)?;
            let results = run(&config(kernel, workloads, 1 + pair as u64, judged), &collector, interrupted)?;
            let seconds: f64 = results.workloads.iter().map(|workload| workload.seconds).sum();
            if results.workloads.iter().any(|workload| workload.outcome != WorkloadOutcome::Pass) {
                let failed = collector.failed.lock().join("; ");
                return Err(Failure::inconclusive(format!("the suite did not pass: {failed}")));
            }
            note(format!(
                "oracle {}: suite of {seconds:.2} s of guest time",
                if judged { "on" } else { "off" }
            ));
            if judged { on.push(seconds) } else { off.push(seconds) }
        }
    }
    suite_figures(&on, &off).ok_or_else(|| Failure::inconclusive("nothing was measured (a defect)"))
}

fn suite_figures(on: &[f64], off: &[f64]) -> Option<Vec<Figure>> {
    let runs = off.len();
    Some(vec![
        Figure::new(
            "oracle",
            "off",
            median(off)?,
            "s",
            format!("guest seconds of the default suite without the oracle, median of {runs} runs"),
        ),
        Figure::new(
            "oracle",
            "on",
            median(on)?,
            "s",
            format!("the same with the oracle, runs in turns; ratio to off, median of {runs} pairs of the same seed"),
        )
        .ratio(paired_ratio(on, off)?)
        .goal(Goal::AtMost(1.3)),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_become_figures() {
        let collector = Collector::default();
        let said = [
            ("registers/read", 20.0, "us"),
            ("invalidate/unmirrored", 2.0, "us"),
            ("invalidate/on-device", 50.0, "us"),
            ("unknown/thing", 1.0, "us"),
        ];
        for (name, value, unit) in said {
            let message = Message::Metric { name: name.into(), value, unit: unit.into() };
            collector.event(Event::Guest { message });
        }
        let metrics = collector.metrics.into_inner();
        let named_figures = figures(&["registers", "invalidate"], &metrics);
        let named: Vec<_> =
            named_figures.iter().map(|f| (f.benchmark, f.name.as_str(), f.value, f.ratio)).collect();
        assert_eq!(
            named,
            [
                ("registers", "read", 20.0, None),
                ("invalidate", "unmirrored", 2.0, None),
                ("invalidate", "on-device", 50.0, None),
                ("invalidate", "round-trip", 48.0, Some(25.0)),
            ]
        );
        assert_eq!(figures(&["faults"], &metrics), []);
    }

    #[test]
    fn the_suite_with_and_without() {
        let figures = suite_figures(&[12.0, 11.0], &[10.0, 10.0]).unwrap();
        assert_eq!((figures[0].value, figures[1].value), (10.0, 11.5));
        assert!((figures[1].ratio.unwrap() - 1.15).abs() < 1e-9);
        assert_eq!(figures[1].met, Some(true));
        assert_eq!(suite_figures(&[], &[]), None);
    }
}
