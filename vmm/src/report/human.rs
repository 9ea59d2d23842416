// SPDX-License-Identifier: MIT OR Apache-2.0
//! For people: lines on standard output, bars and a status line on a terminal.

mod end;

use std::collections::HashMap;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use anstyle::{AnsiColor, Style};
use guest_protocol::{Case, Message, Outcome};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use parking_lot::Mutex;

use super::Reporter;
use super::results::{Results, Verdict, ViolationRecord};
use crate::console::lines::printk;
use crate::event::{Event, EventSink};
use crate::failure::Failure;

/// Failed cases shown one by one; a broken driver can fail thousands.
const MAX_SHOWN_CASES: u64 = 10;
/// How often a plain log gets a line about a workload that goes on.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);
/// And about a step of provisioning.
const PLAIN_STEP_INTERVAL: Duration = Duration::from_secs(60);

/// Shows a run to people.
pub struct Human {
    colours: bool,
    bars: Option<MultiProgress>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    steps: HashMap<String, Step>,
    status: Option<ProgressBar>,
    last_plain: Option<Instant>,
    shown_cases: u64,
    violations: u64,
    driver_loaded: bool,
}

struct Step {
    about: String,
    bar: Option<ProgressBar>,
    /// When a plain log had its last line about it.
    said: Instant,
}

/// What a text is, and so its colour.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Tone {
    Strong,
    Good,
    Bad,
    Doubtful,
    Quiet,
}

impl Human {
    /// Bars if standard error is a terminal, colours if standard output is one and `NO_COLOR` is not set.
    #[must_use]
    pub fn new() -> Self {
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let ci = std::env::var_os("CI").is_some_and(|value| !value.is_empty());
        let terminal = io::stdout().is_terminal() && io::stderr().is_terminal() && !dumb && !ci;
        Self {
            colours: io::stdout().is_terminal() && !dumb && !no_color,
            bars: terminal.then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr())),
            state: Mutex::new(State::default()),
        }
    }

    fn print(&self, text: &str) {
        let write = || {
            // Nobody reads any more: the run goes on for its exit status.
            let _ = writeln!(io::stdout().lock(), "{text}");
        };
        match &self.bars {
            Some(bars) => bars.suspend(write),
            None => write(),
        }
    }

    /// The end of a run: workloads, what was checked, what was found, the verdict.
    pub(crate) fn end(&self, results: &Results) -> String {
        end::text(results, &|tone, text| self.paint(tone, text))
    }

    /// Violations, as at the end of a run.
    pub(crate) fn violations(&self, violations: &[ViolationRecord]) -> String {
        end::violations(violations, &|tone, text| self.paint(tone, text))
    }

    /// A verdict and its reasons, as at the end of a run.
    pub(crate) fn verdict(&self, verdict: Verdict, reasons: &[String]) -> String {
        end::verdict(verdict, reasons, &|tone, text| self.paint(tone, text))
    }

    /// `text` in the colour of `tone`, if there are colours.
    pub(crate) fn paint(&self, tone: Tone, text: &str) -> String {
        if !self.colours {
            return text.to_owned();
        }
        let style = match tone {
            Tone::Strong => Style::new().bold(),
            Tone::Good => AnsiColor::Green.on_default().bold(),
            Tone::Bad => AnsiColor::Red.on_default().bold(),
            Tone::Doubtful => AnsiColor::Yellow.on_default().bold(),
            Tone::Quiet => Style::new().dimmed(),
        };
        format!("{style}{text}{style:#}")
    }

    fn step_start(&self, state: &mut State, step: String, about: String, total: Option<u64>) {
        let bar = self.bars.as_ref().map(|bars| {
            let bar = bars.add(ProgressBar::new_spinner());
            bar.set_style(style(total));
            if let Some(total) = total {
                bar.set_length(total);
            }
            bar.set_message(about.clone());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        if bar.is_none() {
            self.print(&format!("{about} ..."));
        }
        state.steps.insert(step, Step { about, bar, said: Instant::now() });
    }

    fn step_progress(
        &self,
        state: &mut State,
        step: &str,
        done: u64,
        total: Option<u64>,
        detail: Option<String>,
    ) {
        let Some(Step { about, bar, said }) = state.steps.get_mut(step) else { return };
        let Some(bar) = bar else {
            // A log that stands still for a quarter of an hour looks like a hang.
            if let Some(total) = total.filter(|_| said.elapsed() >= PLAIN_STEP_INTERVAL) {
                *said = Instant::now();
                let text = format!("{about}: {} %", done.saturating_mul(100) / total.max(1));
                self.print(&text);
            }
            return;
        };
        if let Some(total) = total {
            if bar.length() != Some(total) {
                bar.set_style(style(Some(total)));
                bar.set_length(total);
            }
        }
        bar.set_position(done);
        if let Some(detail) = detail {
            bar.set_message(format!("{about}: {detail}"));
        }
    }

    fn step_end(&self, state: &mut State, step: &str, seconds: f64, cached: bool, ok: bool) {
        let Some(Step { about, bar, .. }) = state.steps.remove(step) else { return };
        if let Some(bar) = bar {
            bar.finish_and_clear();
        }
        let end = match (ok, cached) {
            (true, true) => self.paint(Tone::Quiet, "there already"),
            (true, false) => format!("done in {seconds:.1} s"),
            (false, _) => self.paint(Tone::Bad, "failed"),
        };
        self.print(&format!("{about}: {end}"));
    }

    fn guest(&self, state: &mut State, message: Message) {
        match message {
            Message::Booted { kernel, cpus, uptime_ms } => self.print(&format!(
                "guest: Linux {kernel}, {cpus} CPU{}, PID 1 after {:.1} s of guest time",
                if cpus == 1 { "" } else { "s" },
                uptime_ms as f64 / 1000.0
            )),
            Message::ModuleLoaded { module } => {
                state.driver_loaded |= module.contains("driver");
                self.print(&format!("guest: {module} loaded"));
            }
            Message::Ask { .. } | Message::ModuleText { .. } => {}
            Message::WorkloadStart { workload, seed } => {
                state.shown_cases = 0;
                state.last_plain = Some(Instant::now());
                match &self.bars {
                    Some(bars) => {
                        let bar = bars.add(ProgressBar::new_spinner());
                        bar.set_style(style(None));
                        bar.set_message(workload);
                        bar.enable_steady_tick(Duration::from_millis(120));
                        state.status = Some(bar);
                    }
                    None => self.print(&format!("{workload}: begins, seed {seed}")),
                }
            }
            Message::Progress { workload, done, total } => self.progress(state, &workload, done, total),
            Message::Case(case) => self.case(state, &case),
            Message::WorkloadEnd { workload, outcome, seconds, cases, failed } => {
                if let Some(bar) = state.status.take() {
                    bar.finish_and_clear();
                }
                if state.shown_cases > MAX_SHOWN_CASES {
                    self.print(&format!("  {} more failed cases", state.shown_cases - MAX_SHOWN_CASES));
                }
                let (tone, word) = match outcome {
                    Outcome::Pass => (Tone::Good, "pass"),
                    Outcome::Fail => (Tone::Bad, "fail"),
                    Outcome::Skip => (Tone::Doubtful, "skip"),
                };
                let failures = if failed > 0 { format!(", {failed} failed") } else { String::new() };
                let word = self.paint(tone, word);
                self.print(&format!(
                    "{workload}: {word}, {cases} cases{failures}, {seconds:.1} s of guest time"
                ));
            }
            Message::ExecEnd { status } => self.print(&format!("the command ended with status {status}")),
            Message::Fatal { reason } => {
                self.print(&self.paint(Tone::Bad, &format!("guest: cannot go on: {reason}")))
            }
            Message::Metric { name, value, unit } => self.print(&format!("{name}: {value:.3} {unit}")),
            Message::Done => {}
        }
    }

    fn progress(&self, state: &mut State, workload: &str, done: u64, total: Option<u64>) {
        let text = match total {
            Some(total) => format!("{workload}: {done} of {total}"),
            None => format!("{workload}: {done} iterations"),
        };
        if let Some(bar) = &state.status {
            if let Some(total) = total {
                if bar.length() != Some(total) {
                    bar.set_style(style(Some(total)));
                    bar.set_length(total);
                }
                bar.set_position(done);
                bar.set_message(workload.to_owned());
            } else {
                bar.set_message(text);
            }
        } else if state.last_plain.is_none_or(|last| last.elapsed() >= PLAIN_INTERVAL) {
            state.last_plain = Some(Instant::now());
            self.print(&text);
        }
    }

    fn case(&self, state: &mut State, case: &Case) {
        if case.outcome == Outcome::Pass {
            return;
        }
        let (tone, word) = match case.outcome {
            Outcome::Skip => (Tone::Doubtful, "skip"),
            _ => (Tone::Bad, "fail"),
        };
        if case.outcome == Outcome::Fail {
            state.shown_cases += 1;
            if state.shown_cases > MAX_SHOWN_CASES {
                return;
            }
        }
        let detail = case.detail.as_deref().unwrap_or("no detail");
        let word = self.paint(tone, word);
        self.print(&format!(
            "  {word} {}/{} (iteration {}): {detail}",
            case.workload, case.case, case.iteration
        ));
    }
}

impl Default for Human {
    fn default() -> Self {
        Self::new()
    }
}

/// A bar if the length is known, a spinner if not.
fn style(total: Option<u64>) -> ProgressStyle {
    let template = match total {
        Some(_) => "{spinner} {wide_msg} [{bar:30}] {percent:>3}% {elapsed}",
        None => "{spinner} {wide_msg} {elapsed}",
    };
    // The templates are constants; should one be wrong, the default is shown.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner())
}

impl EventSink for Human {
    fn event(&self, event: Event) {
        let (event, mark) = match event {
            Event::Nested { inner } => (*inner, "nested: "),
            plain => (plain, ""),
        };
        let mut state = self.state.lock();
        match event {
            Event::Note { text } => self.print(&format!("{mark}{text}")),
            // Nothing nests twice.
            Event::Nested { .. } => {}
            Event::StepStart { step, about, total } => self.step_start(&mut state, step, about, total),
            Event::StepProgress { step, done, total, detail } => {
                self.step_progress(&mut state, &step, done, total, detail);
            }
            Event::StepEnd { step, seconds, cached, ok } => {
                self.step_end(&mut state, &step, seconds, cached, ok);
            }
            // What programs print is shown. The kernel's complaints are shown as what they are, the rest is in console.log.
            Event::Console { line } => {
                if state.driver_loaded && !line.trim().is_empty() && printk(&line).is_none() {
                    self.print(&self.paint(Tone::Quiet, &format!("| {line}")));
                }
            }
            Event::Guest { message } => self.guest(&mut state, message),
            Event::Violation { violation } => {
                if let Some(reason) = &violation.allowed {
                    let word = self.paint(Tone::Doubtful, "allowed");
                    self.print(&format!("{word} {}: {} ({reason})", violation.rule, violation.summary));
                    return;
                }
                state.violations += 1;
                if state.violations <= 20 {
                    let word = self.paint(Tone::Bad, "violation");
                    self.print(&format!("{word} {}: {}", violation.rule, violation.summary));
                }
            }
        }
    }
}

impl Reporter for Human {
    fn results(&self, results: &Results) {
        let mut state = self.state.lock();
        for (_, step) in state.steps.drain() {
            if let Some(bar) = step.bar {
                bar.finish_and_clear();
            }
        }
        if let Some(bar) = state.status.take() {
            bar.finish_and_clear();
        }
        self.print(self.end(results).trim_end());
    }

    fn failure(&self, failure: &Failure) {
        let write = || {
            let mut text = String::new();
            if !failure.console_tail.is_empty() {
                text.push_str("last console lines:\n");
                for line in &failure.console_tail {
                    text.push_str(&format!("| {line}\n"));
                }
            }
            text.push_str(&format!("hmm-testbench: {failure}"));
            let _ = writeln!(io::stderr().lock(), "{text}");
        };
        match &self.bars {
            Some(bars) => bars.suspend(write),
            None => write(),
        }
    }
}
