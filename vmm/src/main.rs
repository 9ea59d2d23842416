// SPDX-License-Identifier: MIT OR Apache-2.0
//! The `hmm-testbench` command.

use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use hmm_testbench::bench;
use hmm_testbench::cli::mutants::MutantsArgs;
use hmm_testbench::cli::{Cli, Command, DEFAULT_KERNEL, FormatName, check, examine, list, not_yet, report};
use hmm_testbench::doctor::Doctor;
use hmm_testbench::event::{Event, EventSink};
use hmm_testbench::failure::Result;
use hmm_testbench::nested;
use hmm_testbench::provision::{Cache, Provisioner};
use hmm_testbench::report::Reporter;
use hmm_testbench::report::human::Human;
use hmm_testbench::report::jsonl::Jsonl;
use hmm_testbench::runner::{self, RunConfig, signals};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    // The kernel also hands its PID 1 every option of its own that it does not know: that is no command line for the grammar.
    if std::process::id() == 1 && words.iter().any(|word| word == nested::COMMAND) {
        let _ = nested::inside::main();
    }
    let cli = Cli::parse();
    let human = Arc::new(Human::new());
    let done = match cli.command {
        Command::Run(args) => {
            let events: (Arc<dyn EventSink>, Arc<dyn Reporter>) = match args.format {
                FormatName::Jsonl => {
                    let jsonl = Arc::new(Jsonl);
                    (jsonl.clone(), jsonl)
                }
                _ => (human.clone(), human.clone()),
            };
            RunConfig::new(*args, &words).and_then(|config| run(&config, &events.0, events.1.as_ref()))
        }
        Command::Doctor { json } => doctor(json),
        Command::Provision { kernel } => provision(kernel, human.clone()),
        Command::List { kind, json } => list::print(kind, json, &mut std::io::stdout().lock()).map(|()| 0),
        Command::Bench { names, kernel, json } => bench::run(&names, &kernel, json, human.clone()),
        Command::NestedInside => nested::inside::main(),
        Command::Mutants(args) => mutants(&args, &words, human.clone()),
        Command::Check(args) => check::print(&args, &human, &mut std::io::stdout().lock()),
        Command::Campaign(_) => Err(not_yet::not_in_this_version("`campaign`")),
        Command::Report(args) => report::print(&args, &human, &mut std::io::stdout().lock()),
    };
    ExitCode::from(done.unwrap_or_else(|failure| {
        human.failure(&failure);
        failure.kind.exit_status()
    }))
}

fn run(config: &RunConfig, events: &Arc<dyn EventSink>, reporter: &dyn Reporter) -> Result<u8> {
    let interrupted = signals::interrupted()?;
    let outcome = runner::run(config, events, &interrupted);
    reporter.results(&outcome.results);
    if let Some(failure) = &outcome.failure {
        reporter.failure(failure);
    }
    Ok(outcome.results.exit_status)
}

fn mutants(args: &MutantsArgs, words: &[String], human: Arc<dyn EventSink>) -> Result<u8> {
    // Standard output is for the lines that a program reads.
    let quiet = |event: Event| {
        if let Event::StepStart { about, .. } = event {
            eprintln!("{about} ...");
        }
    };
    let steps: Arc<dyn EventSink> = if args.json { Arc::new(quiet) } else { human };
    let program = words.first().map_or("hmm-testbench", String::as_str);
    hmm_testbench::mutants::run(args, program, &steps, &*signals::interrupted()?)
}

fn doctor(json: bool) -> Result<u8> {
    examine::print(&Doctor::examine(&Cache::from_env()?), json, &mut std::io::stdout().lock())
}

fn provision(kernels: Vec<String>, events: Arc<dyn EventSink>) -> Result<u8> {
    let kernels = if kernels.is_empty() { vec![DEFAULT_KERNEL.to_owned()] } else { kernels };
    Provisioner::new(Cache::from_env()?, events).everything(&kernels, &[])?;
    Ok(0)
}
