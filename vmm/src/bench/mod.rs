// SPDX-License-Identifier: MIT OR Apache-2.0
//! `bench`: measurements, as ratios in one run where that is possible, since machines are shared and noisy.
//!
//! A goal that is not reached is printed as such and is no error: nothing here is a test.

mod boot;
mod device;
mod figure;
mod guest;
pub(crate) mod nested;
mod rig;
mod start;

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::event::{Event, EventSink};
use crate::failure::{Failure, FailureKind, Result};
use crate::provision::refuse_outer;
use crate::runner::signals;
use figure::Figure;

/// Names of the benchmarks, in the order in which they are run.
pub const BENCHMARKS: &[&str] =
    &["bandwidth", "registers", "tables", "invalidate", "faults", "boot", "nested", "oracle"];
/// Those whose figures come from one run of the guest's workload.
const IN_GUEST: &[&str] = &["registers", "tables", "invalidate", "faults"];

/// Runs the benchmarks of these names, or all, with that kernel in the guests. The exit status is 0 if all was measured.
pub fn run(names: &[String], kernel: &str, json: bool, events: Arc<dyn EventSink>) -> Result<u8> {
    let wanted = wanted(names)?;
    refuse_outer(kernel)?;
    let interrupted = signals::interrupted()?;
    let mut bench = Bench {
        kernel,
        events: (!json).then_some(events),
        interrupted: &interrupted,
        figures: Vec::new(),
        failure: None,
    };
    bench.all(&wanted);
    if let Some(failure) = bench.failure {
        return Err(failure);
    }
    Ok(0)
}

/// The benchmarks to run, in our order.
fn wanted(names: &[String]) -> Result<Vec<&'static str>> {
    if let Some(unknown) = names.iter().find(|name| !BENCHMARKS.contains(&name.as_str())) {
        return Err(Failure::usage(format!("there is no benchmark `{unknown}`"))
            .remedy(format!("there are: {}", BENCHMARKS.join(", "))));
    }
    let wanted = |name: &&str| names.is_empty() || names.iter().any(|given| given == name);
    Ok(BENCHMARKS.iter().copied().filter(wanted).collect())
}

/// What came of a benchmark.
struct Measured {
    figures: Vec<Figure>,
    /// What else was to be measured, and why it was not.
    missing: Vec<String>,
}

impl Measured {
    fn all(figures: Vec<Figure>) -> Self {
        Self { figures, missing: Vec::new() }
    }
}

/// The benchmarks under way.
struct Bench<'a> {
    /// Of the guests.
    kernel: &'a str,
    /// Where people are told what goes on; none with JSON.
    events: Option<Arc<dyn EventSink>>,
    interrupted: &'a AtomicBool,
    figures: Vec<Figure>,
    failure: Option<Failure>,
}

impl Bench<'_> {
    fn all(&mut self, wanted: &[&'static str]) {
        let in_guest: Vec<&str> = wanted.iter().copied().filter(|name| IN_GUEST.contains(name)).collect();
        let in_guest = in_guest.as_slice();
        if wanted.contains(&"bandwidth") {
            self.one("bandwidth: the device in this process against memcpy", |_| {
                device::bandwidth().map(Measured::all)
            });
        }
        if wanted.contains(&"tables") {
            self.one("tables: the device in this process", |_| device::tables().map(Measured::all));
        }
        if wanted.contains(&"invalidate") {
            self.one("invalidate: the device in this process", |_| device::invalidate().map(Measured::all));
        }
        if !in_guest.is_empty() {
            let about = format!("{}: a guest measures", in_guest.join(", "));
            self.one(&about, |bench| bench.in_guest(in_guest));
        }
        if wanted.contains(&"boot") {
            self.one("boot: our machine and QEMU by hand, in turns", |bench| {
                let events = bench.events.clone().unwrap_or_else(|| Arc::new(|_: Event| ()));
                boot::boot(bench.kernel, events, &|text| bench.note(text), bench.interrupted)
                    .map(Measured::all)
            });
        }
        if wanted.contains(&"nested") {
            self.one("nested: the native machine and QEMU with KVM, in turns in one outer guest", |bench| {
                let events = bench.events.clone().unwrap_or_else(|| Arc::new(|_: Event| ()));
                nested::nested(bench.kernel, events, bench.interrupted).map(Measured::all)
            });
        }
        if wanted.contains(&"oracle") {
            self.one("oracle: the default suite with it and without, in turns", |bench| {
                guest::oracle(
                    bench.kernel,
                    bench.events.as_ref(),
                    &|text| bench.note(text),
                    bench.interrupted,
                )
                .map(Measured::all)
            });
        }
        if self.events.is_some() && !self.figures.is_empty() {
            print(&format!("\n{}", figure::table(&self.figures)));
        }
    }

    fn in_guest(&self, wanted: &[&str]) -> Result<Measured> {
        let (figures, mut missing) =
            guest::workload(self.kernel, wanted, self.events.as_ref(), self.interrupted)?;
        let has = |name: &str| figures.iter().any(|figure| figure.benchmark == name);
        if missing.is_empty() {
            missing.extend(wanted.iter().filter(|name| !has(name)).map(|name| format!("{name}: no figure")));
        }
        Ok(Measured { figures, missing })
    }

    /// Runs one benchmark and keeps its figures. After one that failed the others go on, unless they would fail too.
    fn one(&mut self, about: &str, measure: impl FnOnce(&Self) -> Result<Measured>) {
        let hopeless = |failure: &Failure| failure.kind == FailureKind::Environment;
        if self.failure.as_ref().is_some_and(hopeless) || self.interrupted.load(Ordering::Relaxed) {
            return;
        }
        self.note(about.to_owned());
        match measure(self) {
            Ok(Measured { figures, missing }) => {
                if self.events.is_none() {
                    for figure in &figures {
                        print(&format!("{}\n", figure.json()));
                    }
                }
                self.figures.extend(figures);
                if !missing.is_empty() && self.failure.is_none() {
                    let missing = missing.join("; ");
                    self.failure =
                        Some(Failure::inconclusive(format!("not everything was measured: {missing}")));
                }
            }
            Err(failure) => {
                self.note(format!("not measured: {}", failure.what));
                if self.failure.is_none() || hopeless(&failure) {
                    self.failure = Some(failure);
                }
            }
        }
    }

    fn note(&self, text: String) {
        if let Some(events) = &self.events {
            events.event(Event::Note { text });
        }
    }
}

fn print(text: &str) {
    // Nobody reads any more: the exit status is still right.
    let _ = io::stdout().lock().write_all(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(wanted(&[]).unwrap(), BENCHMARKS);
        // In our order, each once.
        let given = ["faults", "bandwidth", "faults"].map(str::to_owned);
        assert_eq!(wanted(&given).unwrap(), ["bandwidth", "faults"]);
        let error = wanted(&["speed".to_owned()]).unwrap_err();
        assert_eq!(error.kind.exit_status(), 2);
        assert!(error.to_string().contains("bandwidth"), "{error}");
    }

    fn bench(interrupted: &AtomicBool) -> Bench<'_> {
        let events: Arc<dyn EventSink> = Arc::new(|_: Event| ());
        Bench { kernel: "backports", events: Some(events), interrupted, figures: Vec::new(), failure: None }
    }

    #[test]
    fn what_is_missing_is_not_passed_over() {
        let interrupted = AtomicBool::new(false);
        let mut bench = bench(&interrupted);
        let figures = vec![Figure::new("a", "a", 1.0, "s", "")];
        bench.one("a", |_| Ok(Measured { figures, missing: vec!["registers: no device".to_owned()] }));
        assert_eq!(bench.figures.len(), 1);
        let failure = bench.failure.expect("a failure");
        assert_eq!(failure.kind.exit_status(), 3);
        assert!(failure.what.contains("no device"), "{failure}");
    }

    #[test]
    fn a_failure_does_not_stop_the_others_unless_the_machine_lacks_something() {
        let interrupted = AtomicBool::new(false);
        let mut bench = bench(&interrupted);
        bench.one("a", |_| Err(Failure::inconclusive("lost")));
        bench.one("b", |_| Ok(Measured::all(vec![Figure::new("b", "b", 1.0, "s", "")])));
        assert_eq!(bench.figures.len(), 1);
        bench.one("c", |_| Err(Failure::environment("no QEMU")));
        bench.one("d", |_| Ok(Measured::all(vec![Figure::new("d", "d", 1.0, "s", "")])));
        assert_eq!(bench.figures.len(), 1);
        assert_eq!(bench.failure.map(|failure| failure.kind.exit_status()), Some(4));
    }
}
