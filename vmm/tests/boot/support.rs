// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs the built binary and reads what it leaves behind.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

/// One guest at a time; a failed test must not fail the others.
static MACHINE: Mutex<()> = Mutex::new(());

pub(crate) fn machine() -> MutexGuard<'static, ()> {
    MACHINE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a run left behind.
pub(crate) struct Finished {
    pub(crate) status: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) took: Duration,
    /// results.json, or null where there is none.
    pub(crate) results: Value,
}

impl Finished {
    #[track_caller]
    pub(crate) fn expect_status(&self, status: i32) -> &Self {
        assert_eq!(self.status, status, "stdout:\n{}\nstderr:\n{}", tail(&self.stdout), tail(&self.stderr));
        self
    }

    #[track_caller]
    pub(crate) fn expect_said(&self, what: &str) -> &Self {
        assert!(
            self.stdout.contains(what) || self.stderr.contains(what),
            "nothing said {what:?}\nstdout:\n{}\nstderr:\n{}",
            tail(&self.stdout),
            tail(&self.stderr)
        );
        self
    }

    #[track_caller]
    pub(crate) fn counter(&self, name: &str) -> u64 {
        self.results["counters"][name]
            .as_u64()
            .unwrap_or_else(|| panic!("no counter {name} in {}", self.results["counters"]))
    }

    /// The first violation of a rule.
    #[track_caller]
    pub(crate) fn violation(&self, rule: &str) -> &Value {
        let found = self.violations().iter().find(|violation| violation["rule"] == rule);
        found.unwrap_or_else(|| panic!("no {rule} in {:?}", self.violations()))
    }

    pub(crate) fn violations(&self) -> &[Value] {
        self.results["violations"].as_array().map_or(&[], Vec::as_slice)
    }
}

fn tail(text: &str) -> &str {
    let from = text.len().saturating_sub(6000);
    let from = (from..text.len()).find(|i| text.is_char_boundary(*i)).unwrap_or(0);
    &text[from..]
}

pub(crate) fn binary() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hmm-testbench"));
    command.stdin(std::process::Stdio::null());
    command
}

pub(crate) fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The path of a patch in guest/mutants.
pub(crate) fn mutant(name: &str) -> String {
    let path = repository().join("guest/mutants").join(name).with_extension("patch");
    path.to_str().expect("a UTF-8 path").to_owned()
}

/// Runs `hmm-testbench run` with `args` and an output folder of its own.
pub(crate) fn run<I, S>(args: I) -> Finished
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    let out = tempfile::tempdir().expect("a temporary folder");
    run_in(out.path(), args)
}

/// As [`run`], with its output in `out`.
pub(crate) fn run_in<I, S>(out: &Path, args: I) -> Finished
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    let mut command = binary();
    command.arg("run").args(args).arg("--out").arg(out);
    let (output, took) = timed(&mut command);
    let results = std::fs::read(out.join("results.json"))
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .unwrap_or(Value::Null);
    finished(output, took, results)
}

/// Runs any command of the binary.
pub(crate) fn plain(command: &mut Command) -> Finished {
    let (output, took) = timed(command);
    finished(output, took, Value::Null)
}

fn timed(command: &mut Command) -> (Output, Duration) {
    let begin = Instant::now();
    let output = command.output().expect("the binary starts");
    (output, begin.elapsed())
}

fn finished(output: Output, took: Duration, results: Value) -> Finished {
    Finished {
        status: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        took,
        results,
    }
}
