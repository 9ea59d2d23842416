// SPDX-License-Identifier: MIT OR Apache-2.0
//! PID 1 of the guest: follows the plan that the host put into the initramfs, and tells the host what happens.
//!
//! It needs nothing but the kernel: no shell, no library, no other program. Everything that can crash or hang runs in a child
//! process, so that the machine's end is always this program's decision and a message says what went wrong.

mod board;
mod boot;
mod cast;
mod client;
mod device;
mod exec;
mod gates;
mod kernel;
mod leaks;
mod memory;
mod outcome;
mod process;
mod report;
mod rng;
mod uffd;
mod workload;

use std::path::Path;
use std::time::Instant;

use guest_protocol::{Case, DRIVER_MODULE, Message, Outcome, PLAN_PATH, Plan, WITNESS_MODULE, WorkloadPlan};

use crate::board::Board;
use crate::device::real::Nodes;
use crate::gates::Gates;
use crate::outcome::{Checked, Doing, Failure};
use crate::process::Child;
use crate::report::{Host, Sink, note};
use crate::workload::Ground;

fn main() {
    if std::env::args().any(|argument| argument == workload::EXIT_ARGUMENT) {
        process::exit_now(0);
    }
    if std::process::id() != 1 {
        note("this is PID 1 of a testbench guest; it does nothing elsewhere");
        process::exit_now(2);
    }
    let mut host = Host::default();
    boot::mount_all();
    boot::take_console();
    host.send(&boot::booted());
    if let Err(failure) = follow(&mut host) {
        host.send(&Message::Fatal { reason: failure.to_string() });
    }
    host.close_witness();
    boot::power_off();
}

/// Everything between boot and power-off.
fn follow(host: &mut Host) -> Checked {
    let text = std::fs::read(PLAN_PATH).map_err(|error| Failure::wrong(format!("{PLAN_PATH}: {error}")))?;
    let plan: Plan =
        serde_json::from_slice(&text).map_err(|error| Failure::wrong(format!("{PLAN_PATH}: {error}")))?;
    boot::set_sysctls();
    boot::patch_early();
    let taint = boot::taint();
    let witness = Path::new(WITNESS_MODULE).exists();
    if witness {
        boot::load_module(WITNESS_MODULE, "", host)?;
        boot::wait_for_node(vgpu_spec::uapi::WITNESS_DEVICE)?;
        host.open_witness().map_err(|error| Failure::wrong(format!("open the witness: {error}")))?;
        // The host now hears the same in its place among the witness's records.
        host.send(&boot::booted());
    }
    let mut driver = None;
    if plan.load_driver {
        leaks::forget(host);
        driver = Some(boot::load_module(DRIVER_MODULE, &plan.driver_parameters, host)?);
        boot::tell_texts(host);
        if !plan.workloads.is_empty() {
            boot::wait_for_node(vgpu_spec::uapi::DRIVER_DEVICE)?;
        }
    }
    for workload in &plan.workloads {
        run_workload(workload, host);
        boot::end_all_others();
    }
    if let Some(command) = &plan.exec {
        let status = exec::run(command);
        host.send(&Message::ExecEnd { status });
        boot::end_all_others();
    }
    if plan.shell {
        exec::shell();
        boot::end_all_others();
    }
    if let Some(driver) = driver {
        if !plan.workloads.is_empty() {
            keep_driver(&driver, host);
        }
        unload_driver(&driver, host);
        leaks::tell(host);
    }
    // The console tells of complaints, unless a program made the kernel print less. This it cannot take back.
    if let Some(trouble) = boot::trouble(boot::taint() & !taint) {
        outside(host, ("kernel", "taint"), 0.0, Some(trouble));
    }
    host.send(&Message::Done);
    host.close_witness();
    if witness {
        if let Err(failure) = boot::unload_module("hmm_witness") {
            // Done is said: the console is what is left, and the run's verdict does not hang on this.
            note(&format!("the witness stays loaded: {failure}"));
        }
    }
    Ok(())
}

/// Sees whether the driver stays while a file of its device is open. Where it goes the file's next use is of code that has gone.
fn keep_driver(name: &str, host: &Host) {
    let began = Instant::now();
    let failure = boot::must_stay(name, vgpu_spec::uapi::DRIVER_DEVICE).err();
    let detail = failure.map(|failure| failure.to_string());
    outside(host, ("unload", "open-file"), began.elapsed().as_secs_f64(), detail);
}

/// Unloads the driver. That it cannot be unloaded with no process left is a finding, reported as a failed case.
fn unload_driver(name: &str, host: &Host) {
    let began = Instant::now();
    let failure = boot::unload_module(name).err();
    let detail = failure.map(|failure| failure.to_string());
    outside(host, ("unload", "driver"), began.elapsed().as_secs_f64(), detail);
}

/// Reports a case outside of the workloads: it failed if there is a detail to tell.
fn outside(host: &Host, (workload, case): (&str, &str), seconds: f64, detail: Option<String>) {
    host.send(&Message::Case(Case {
        workload: workload.to_owned(),
        case: case.to_owned(),
        seed: 0,
        iteration: 0,
        outcome: if detail.is_none() { Outcome::Pass } else { Outcome::Fail },
        seconds,
        detail,
        mismatch: None,
    }));
}

/// Runs a workload in a child process and reports its end, whatever end that is.
fn run_workload(plan: &WorkloadPlan, host: &Host) {
    let began = Instant::now();
    host.send(&Message::WorkloadStart { workload: plan.name.clone(), seed: plan.seed });
    let end = |outcome, cases, failed| Message::WorkloadEnd {
        workload: plan.name.clone(),
        outcome,
        seconds: began.elapsed().as_secs_f64(),
        cases,
        failed,
    };
    let crashed = |case: Option<String>, detail: String| {
        Message::Case(Case {
            workload: plan.name.clone(),
            case: case.unwrap_or_else(|| "process".to_owned()),
            seed: plan.seed,
            iteration: 0,
            outcome: Outcome::Fail,
            seconds: began.elapsed().as_secs_f64(),
            detail: Some(detail),
            mismatch: None,
        })
    };
    let board = match Board::new() {
        Ok(board) => board,
        Err(errno) => {
            host.send(&crashed(None, format!("no memory for the workload: {}", outcome::describe(errno))));
            host.send(&end(Outcome::Fail, 1, 1));
            return;
        }
    };
    let result = Child::spawn(|_| {
        // Orphans of the cases come to the workload, which waits for them.
        nix::sys::prctl::set_child_subreaper(true).doing("prctl")?;
        let program = Path::new("/init");
        let gates = Gates::new(host.witness());
        let coherent_atomics = plan.coherent_atomics;
        let ground = Ground { device: &Nodes, sink: host, board: &board, program, gates, coherent_atomics };
        if workload::run(plan, &ground) {
            Ok(())
        } else {
            Err(Failure::wrong(format!("there is no workload {:?}", plan.name)))
        }
    })
    .and_then(|mut child| {
        let ended = child.wait_long()?;
        child.judge(ended)
    });
    // A workload that crashed has left its gates.
    let cleared = Gates::new(host.witness()).clear();
    let (mut cases, mut failed) = (board.cases(), board.failed());
    if let Err(errno) = cleared {
        let why = outcome::describe(errno);
        host.send(&crashed(None, format!("a task does not leave a function that was watched: {why}")));
        cases += 1;
        failed += 1;
    }
    if let Err(failure) = result {
        host.send(&crashed(board.running(), format!("the workload's process died: {failure}")));
        cases += 1;
        failed += 1;
    }
    host.send(&end(if failed == 0 { Outcome::Pass } else { Outcome::Fail }, cases, failed));
}
