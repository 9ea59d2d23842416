// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guest's PID 1: built from this source tree by cargo, linked statically, since the guest has no libraries.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use super::cache::Cache;
use super::hash::Hash;
use super::source_tree;
use crate::event::{Event, EventSink};
use crate::failure::{Failure, Result};
use crate::process::{self, last_lines};

const TARGET: &str = "x86_64-unknown-linux-gnu";
const STEP: &str = "agent";

pub(super) fn provide(cache: &Cache, events: &Arc<dyn EventSink>) -> Result<PathBuf> {
    let source = source_tree()?;
    let cargo = std::env::var_os("CARGO")
        .map(PathBuf::from)
        .filter(|cargo| cargo.is_file())
        .or_else(|| process::find_program("cargo"))
        .ok_or_else(|| {
            Failure::environment("cargo is not installed; the guest's PID 1 is built with it")
                .remedy("apt-get install cargo (Debian 13), or see rustup.rs; 1.85 or newer")
        })?;
    // One for each source tree: cargo takes another checkout's newer build for this one's.
    let tree = Hash::default().add(source.as_os_str().as_encoded_bytes()).finish();
    let target_dir = cache.root().join("agent-target").join(tree);
    fs::create_dir_all(&target_dir).map_err(|e| cache.trouble("cannot make the agent's build folder", &e))?;

    let start = Instant::now();
    events.event(Event::StepStart {
        step: STEP.into(),
        about: "building the guest's PID 1 and workloads".into(),
        total: None,
    });
    let mut compiled = 0;
    let result = (|| {
        let guard = process::Guard::new::<&str>(&[])
            .map_err(|e| Failure::environment(format!("cannot start /bin/sh: {e}")))?;
        let mut command = Command::new(cargo);
        command.args(["build", "--release", "-p", "guest-agent", "--target", TARGET]).current_dir(&source);
        // The flags of the outer build, if it had any, are not the guest's. Encoded flags override a configuration's too.
        command.env_remove("RUSTFLAGS").env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static");
        // It travels in every guest's initramfs, where line tables only cost boot time.
        command.env("CARGO_PROFILE_RELEASE_STRIP", "true");
        command.env("CARGO_TARGET_DIR", &target_dir).env("CARGO_TERM_COLOR", "never");
        for variable in ["CARGO_BUILD_TARGET", "CARGO_BUILD_RUSTC_WRAPPER", "CARGO_BUILD_TARGET_DIR"] {
            command.env_remove(variable);
        }
        let done = process::run(&mut command, Some(&guard), &mut |line| {
            let line = line.trim();
            if line.starts_with("Compiling ")
                || line.starts_with("Blocking ")
                || line.starts_with("Downloading ")
            {
                compiled += u64::from(line.starts_with("Compiling "));
                events.event(Event::StepProgress {
                    step: STEP.into(),
                    done: compiled,
                    total: None,
                    detail: Some(line.split(" (").next().unwrap_or(line).to_owned()),
                });
            }
        })
        .map_err(|e| Failure::environment(format!("cannot run cargo: {e}")))?;
        if done.status.success() { Ok(()) } else { Err(explain(cache, &done.tail)) }
    })();
    events.event(Event::StepEnd {
        step: STEP.into(),
        seconds: start.elapsed().as_secs_f64(),
        cached: result.is_ok() && compiled == 0,
        ok: result.is_ok(),
    });
    result?;
    let binary = target_dir.join(TARGET).join("release/init");
    if binary.is_file() {
        Ok(binary)
    } else {
        Err(Failure::environment(format!("cargo built the guest's PID 1, but not at {}", binary.display())))
    }
}

fn explain(cache: &Cache, tail: &str) -> Failure {
    if tail.contains("No space left on device") || tail.contains("os error 28") {
        return cache.disk_full("building the guest's PID 1");
    }
    let errors: Vec<&str> = tail.lines().filter(|line| line.starts_with("error")).take(5).collect();
    let lines =
        if errors.is_empty() { last_lines(tail, 8) } else { errors.into_iter().map(str::to_owned).collect() };
    let failure =
        Failure::environment(format!("the guest's PID 1 could not be built:\n    {}", lines.join("\n    ")));
    if tail.contains("cannot find -lc") || tail.contains("libc.a") {
        failure.remedy("the static C library is missing: apt-get install libc6-dev")
    } else if tail.contains("linker `cc` not found") {
        failure.remedy("apt-get install gcc libc6-dev")
    } else {
        failure.remedy(format!("cargo's own words: cargo build --release -p guest-agent --target {TARGET}"))
    }
}
