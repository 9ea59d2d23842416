// SPDX-License-Identifier: MIT OR Apache-2.0
//! `check`: judges the trace of a run once more, without a guest.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use vgpu::oracle::{Checked, TraceFile, check};

use crate::failure::{Failure, FailureKind, Result};
use crate::report::human::Human;
use crate::report::out::TRACE;
use crate::report::results::{AllowedRecord, Verdict, ViolationRecord};
use crate::runner::allow::{Allow, Kernel};
use crate::runner::untrusted;
use crate::runner::verdict::unkept_beside_allowed;

/// Arguments of `check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The trace of a run, or the folder that it wrote with --out
    #[arg(value_name = "TRACE")]
    pub trace: PathBuf,
    /// What is accepted, as for `run`; entries of a workload or a kernel do not fit here, a trace knows neither
    #[arg(long, value_name = "FILE")]
    pub allow: Option<PathBuf>,
    /// As one JSON object
    #[arg(long)]
    pub json: bool,
}

/// What a trace says, for programs.
#[derive(Debug, Serialize)]
struct Report {
    verdict: Verdict,
    exit_status: u8,
    reasons: Vec<String>,
    /// The command line of the run.
    run: String,
    /// The run came to its end.
    closed: bool,
    /// Events judged.
    events: u64,
    /// Events that gave way to newer ones.
    events_lost: u64,
    violations: Vec<ViolationRecord>,
    allowed: Vec<AllowedRecord>,
}

/// Judges a trace and prints what was found; the exit status is that of the verdict.
///
/// # Errors
/// Usage if the file cannot be read or is no whole trace.
pub fn print(args: &CheckArgs, human: &Human, out: &mut dyn Write) -> Result<u8> {
    let allow = args.allow.as_deref().map(Allow::read).transpose()?;
    let path = if args.trace.is_dir() { args.trace.join(TRACE) } else { args.trace.clone() };
    let report = judge(&path, allow.as_ref())?;
    let text = if args.json {
        let json = serde_json::to_string(&report);
        json.map_err(|error| Failure::environment(format!("cannot write JSON: {error}")))? + "\n"
    } else {
        text(&report, human)
    };
    match out.write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::environment(format!("cannot write: {error}")))
        }
        _ => Ok(report.exit_status),
    }
}

fn judge(path: &Path, allow: Option<&Allow>) -> Result<Report> {
    let bad = |why: String| {
        Failure::usage(format!("{}: {why}", path.display()))
            .remedy("name the file `trace` in a folder that `run --out DIR` has written")
    };
    let file = File::open(path).map_err(|error| bad(error.to_string()))?;
    let trace = TraceFile::open(&file).map_err(|error| bad(error.to_string()))?;
    let checked = check(&trace).map_err(|error| bad(error.to_string()))?;
    Ok(report(&trace, checked, allow))
}

fn report(trace: &TraceFile<'_>, checked: Checked, allow: Option<&Allow>) -> Report {
    let mut gaps = checked.gaps;
    if trace.missing() > 0 {
        gaps.push(format!(
            "the first {} events are lost: newer ones took their place (run --trace-bytes SIZE keeps more). What began with them was not judged",
            trace.missing()
        ));
    }
    if !trace.closed() {
        gaps.push("the testbench did not come to the run's end: what followed was not seen".to_owned());
    }
    if checked.events == 0 {
        gaps.push("there are no events".to_owned());
    }
    let mut run = trace.about().to_owned();
    untrusted::tame_text(&mut run);
    let (mut violations, mut allowed) = (Vec::new(), Vec::new());
    for mut violation in checked.violations {
        untrusted::tame_violation(&mut violation);
        let entry = allow.and_then(|allow| {
            let at = allow.entry(&violation, None, Kernel { name: "", release: "" })?;
            allow.entries.get(at)
        });
        let record = ViolationRecord::of_trace(&violation);
        match entry {
            Some(entry) => allowed.push(AllowedRecord { violation: record, reason: entry.reason.clone() }),
            None => violations.push(record),
        }
    }
    // What a full list had no room for is nobody's to accept.
    let unkept = if allowed.is_empty() { 0 } else { checked.counters.suppressed };
    gaps.extend(unkept_beside_allowed(unkept));
    let (verdict, mut reasons) = if violations.is_empty() {
        (if gaps.is_empty() { Verdict::Clean } else { Verdict::Inconclusive }, Vec::new())
    } else {
        let mut names: Vec<&str> = Vec::new();
        for violation in &violations {
            if !names.contains(&violation.rule.as_str()) {
                names.push(&violation.rule);
            }
        }
        (Verdict::Violation, vec![format!("broken: {}", names.join(", "))])
    };
    gaps.iter_mut().for_each(untrusted::tame_text);
    reasons.append(&mut gaps);
    let exit_status = match verdict {
        Verdict::Clean => 0,
        Verdict::Violation => 1,
        Verdict::Inconclusive | Verdict::Error => FailureKind::Inconclusive.exit_status(),
    };
    Report {
        verdict,
        exit_status,
        reasons,
        run,
        closed: trace.closed(),
        events: checked.events,
        events_lost: trace.missing(),
        violations,
        allowed,
    }
}

fn text(report: &Report, human: &Human) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(text, "trace of: {}", report.run);
    let _ = writeln!(text, "{} events judged", report.events);
    for allowed in &report.allowed {
        let record = &allowed.violation;
        let _ = writeln!(text, "allowed {}: {} ({})", record.rule, record.summary, allowed.reason);
    }
    text + &human.violations(&report.violations) + &human.verdict(report.verdict, &report.reasons)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use vgpu::oracle::{LEAST_BYTES, Oracle, OracleConfig, Rule, Violation, file_bytes};

    use super::*;

    /// A trace in a folder, made by `with` and closed with `gaps`, if it is.
    fn run(folder: &Path, gaps: Option<&[&str]>, with: impl FnOnce(&Oracle)) -> PathBuf {
        let path = folder.join(TRACE);
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        file.set_len(file_bytes(LEAST_BYTES)).unwrap();
        let config = OracleConfig { trace_bytes: LEAST_BYTES, ..OracleConfig::default() };
        let oracle = Oracle::with_trace(config, file, "hmm-testbench run --seed 7").unwrap();
        with(&oracle);
        if let Some(gaps) = gaps {
            oracle.finish(&gaps.iter().map(ToString::to_string).collect::<Vec<_>>()).unwrap();
        }
        path
    }

    fn checked(path: &Path, json: bool) -> (u8, String) {
        let mut out = Vec::new();
        let args = CheckArgs { trace: path.to_owned(), allow: None, json };
        let status = print(&args, &Human::new(), &mut out).unwrap();
        (status, String::from_utf8(out).unwrap())
    }

    fn oops(oracle: &Oracle) {
        oracle.report(Violation::new(Rule::KernelOops, "BUG: at mm/memory.c\u{1b}[2J"));
    }

    fn reset(oracle: &Oracle) {
        oracle.event(vgpu::oracle::DeviceEvent::Reset);
    }

    #[test]
    fn the_verdict_of_a_trace() {
        let folder = tempfile::tempdir().unwrap();
        let path = run(folder.path(), Some(&[]), reset);
        let (status, text) = checked(&path, false);
        assert!(status == 0 && text.contains("verdict: clean") && text.contains("--seed 7"), "{text}");
        run(folder.path(), Some(&["the guest was lost"]), reset);
        let (status, text) = checked(folder.path(), false);
        assert!(status == 3 && text.contains("the guest was lost"), "{text}");
        run(folder.path(), None, reset);
        let (status, text) = checked(folder.path(), false);
        assert!(status == 3 && text.contains("did not come to the run's end"), "{text}");
        // A violation outranks every gap.
        run(folder.path(), None, oops);
        let (status, text) = checked(folder.path(), false);
        assert!(status == 1 && text.contains("broken: kernel/oops"), "{text}");
        assert!(!text.contains('\u{1b}'));
        let (status, json) = checked(folder.path(), true);
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!((status, &json["verdict"]), (1, &"violation".into()));
        assert_eq!(json["violations"][0]["rule"], "kernel/oops");
        let list = folder.path().join("allow.toml");
        std::fs::write(&list, "[[allow]]\nrule = \"kernel/oops\"\nreason = \"known\"\n").unwrap();
        let mut out = Vec::new();
        let args = CheckArgs { trace: path, allow: Some(list), json: false };
        // Not closed, and so not clean.
        assert_eq!(print(&args, &Human::new(), &mut out).unwrap(), 3);
        assert!(String::from_utf8(out).unwrap().contains("(known)"));
        // The ring came round.
        run(folder.path(), Some(&[]), |oracle| (0..400_000).for_each(|_| reset(oracle)));
        let (status, text) = checked(folder.path(), false);
        assert!(status == 3 && text.contains("--trace-bytes"), "{text}");
    }

    #[test]
    fn what_was_not_kept_is_not_accepted() {
        let folder = tempfile::tempdir().unwrap();
        let list = folder.path().join("allow.toml");
        std::fs::write(&list, "[[allow]]\nrule = \"kernel/oops\"\nreason = \"known\"\n").unwrap();
        let most = OracleConfig::default().max_violations;
        for (found, status) in [(most, 0), (most + 1, 3)] {
            let path = run(folder.path(), Some(&[]), |oracle| {
                for number in 0..found {
                    oracle.report(Violation::new(Rule::KernelOops, format!("number {number}")));
                }
            });
            let mut out = Vec::new();
            let args = CheckArgs { trace: path, allow: Some(list.clone()), json: false };
            assert_eq!(print(&args, &Human::new(), &mut out).unwrap(), status);
            let said = String::from_utf8(out).unwrap().contains("1 violations were not kept");
            assert_eq!(said, status != 0);
        }
    }

    #[test]
    fn what_is_no_trace_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let refused = |path: &Path, said: &str| {
            let args = CheckArgs { trace: path.to_owned(), allow: None, json: false };
            let failure = print(&args, &Human::new(), &mut Vec::new()).unwrap_err();
            assert_eq!(failure.kind, FailureKind::Usage);
            assert!(failure.to_string().contains(said), "{failure}");
        };
        refused(folder.path(), "No such file");
        let path = run(folder.path(), Some(&[]), reset);
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(b"x", 4096 + 32 + 2).unwrap();
        refused(&path, "is damaged at byte 0x1020, event #0");
        file.set_len(5000).unwrap();
        refused(&path, "is cut off");
        file.set_len(3).unwrap();
        refused(&path, "is no trace");
    }
}
