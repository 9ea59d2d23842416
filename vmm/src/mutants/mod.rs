// SPDX-License-Identifier: MIT OR Apache-2.0
//! `mutants`: the oracle is judged. Broken drivers must be found by the rule that their heads name, correct ones by none.
//!
//! Each driver and seed is a run as any other: a guest, a device and an oracle of its own, the default suite. Why not several to
//! a guest: `docs/decisions/0010-mutants.md`.

mod judge;
mod listen;
mod pool;
mod report;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Parser as _;

use crate::cli::mutants::MutantsArgs;
use crate::cli::{AccelName, Cli, Command, DEFAULT_KERNEL};
use crate::event::EventSink;
use crate::failure::{Failure, FailureKind, Result};
use crate::provision::mutants::{self as patches, Mutant};
use crate::provision::{Cache, Provisioner};
use crate::runner::{self, RunConfig};
use judge::{Judged, Outcome};
use listen::Listener;
use report::Report;

/// How often a trial looks whether it is to end.
const TICK: Duration = Duration::from_millis(50);

/// Tries the drivers and prints what came of each. The status is that of the process.
///
/// `steps` is told of what is fetched and built beforehand.
///
/// # Errors
/// Usage and environment, as for `run`; inconclusive if interrupted.
pub fn run(
    args: &MutantsArgs,
    program: &str,
    steps: &Arc<dyn EventSink>,
    interrupted: &AtomicBool,
) -> Result<u8> {
    let chosen = choose(args)?;
    let trials = chosen
        .iter()
        .flat_map(|mutant| (0..args.seeds).map(move |n| (mutant, args.seed.wrapping_add(n))))
        .map(|(mutant, seed)| Ok((mutant, config(args, mutant, seed, program)?)))
        .collect::<Result<Vec<_>>>()?;
    if !args.nested {
        provision(&trials, steps)?;
    }
    let mut report = Report::new(args, &chosen);
    report.begin();
    let stop = AtomicBool::new(false);
    let work = |index: usize| {
        let (mutant, config) = &trials[index];
        match elsewhere(mutant, config) {
            Some(kernel) => {
                let why = format!("for kernel {kernel}: --kernel {kernel}");
                Ok(Judged::untried(mutant, config, Outcome::Skipped, why))
            }
            None => trial(args.benign, mutant, config, &[interrupted, &stop]),
        }
    };
    pool::in_order(args.jobs, trials.len(), &stop, work, |judged| {
        let goes_on = !interrupted.load(Ordering::SeqCst);
        if goes_on {
            report.add(judged);
        }
        goes_on
    })?;
    report.end();
    if interrupted.load(Ordering::SeqCst) {
        return Err(Failure::inconclusive("interrupted"));
    }
    Ok(u8::from(!report.as_it_should_be()))
}

/// The drivers that were asked for.
fn choose(args: &MutantsArgs) -> Result<Vec<Mutant>> {
    let all = match (&args.dir, args.benign) {
        (Some(dir), _) => patches::folder(dir)?,
        (None, true) => patches::benign()?,
        (None, false) => patches::all()?,
    };
    let place = || match (&args.dir, args.benign) {
        (Some(dir), _) => dir.display().to_string(),
        (None, true) => "guest/benign".to_owned(),
        (None, false) => "guest/mutants".to_owned(),
    };
    if all.is_empty() {
        return Err(Failure::usage(format!("there is no patch in {}", place())));
    }
    if args.names.is_empty() {
        return Ok(all);
    }
    args.names
        .iter()
        .map(|name| {
            all.iter().find(|mutant| mutant.name == *name).cloned().ok_or_else(|| {
                Failure::usage(format!("there is no `{name}` in {}", place())).remedy(
                    "without a name all are tried; `list mutants` has the names of the testbench's own",
                )
            })
        })
        .collect()
}

/// The run of one driver with one seed: what `run` would make of these words.
fn config(args: &MutantsArgs, mutant: &Mutant, seed: u64, program: &str) -> Result<RunConfig> {
    // What only some kernel can see is tried without that kernel only if it is asked for by name.
    let own = mutant.kernel.as_deref().filter(|_| !args.names.is_empty());
    let kernel = args.kernel.as_deref().or(own).unwrap_or(DEFAULT_KERNEL);
    let mut words = vec![program.to_owned(), "run".to_owned(), "--kernel".to_owned(), kernel.to_owned()];
    let mut option = |name: &str, value: String| words.extend([name.to_owned(), value]);
    option("--machine", args.machine.to_string());
    option("--cpus", args.cpus.to_string());
    option("--seed", seed.to_string());
    option("--patch", text(&mutant.path)?);
    words.extend(mutant.options.iter().cloned());
    let mut option = |name: &str, value: String| words.extend([name.to_owned(), value]);
    match args.accel {
        Some(AccelName::Kvm) => option("--accel", "kvm".into()),
        Some(AccelName::Tcg) => option("--accel", "tcg".into()),
        None => {}
    }
    if let Some(out) = &args.out {
        option("--out", text(&out.join(format!("{}-{seed}", mutant.name)))?);
    }
    if args.nested {
        words.push("--nested".to_owned());
    }
    let cli = Cli::try_parse_from(&words).map_err(|error| Failure::usage(error.to_string()))?;
    match cli.command {
        Command::Run(run) => RunConfig::new(*run, &words),
        _ => Err(Failure::usage("`run` is no run (a defect)")),
    }
}

/// The kernel that a driver is for, if that is not the one it would be tried with.
fn elsewhere<'a>(mutant: &'a Mutant, config: &RunConfig) -> Option<&'a str> {
    mutant.kernel.as_deref().filter(|kernel| *kernel != config.kernel)
}

fn text(path: &Path) -> Result<String> {
    path.to_str()
        .map(str::to_owned)
        .ok_or_else(|| Failure::usage(format!("the path {} is not UTF-8", path.display())))
}

/// Fetches and builds what all of them need, so that this is not part of anybody's time.
fn provision(trials: &[(&Mutant, RunConfig)], steps: &Arc<dyn EventSink>) -> Result<()> {
    let here = |trial: &&(&Mutant, RunConfig)| elsewhere(trial.0, &trial.1).is_none();
    let mut kernels: Vec<String> =
        trials.iter().filter(here).map(|(_, config)| config.kernel.clone()).collect();
    kernels.sort();
    kernels.dedup();
    Provisioner::new(Cache::from_env()?, Arc::clone(steps)).everything(&kernels, &[]).map(drop)
}

/// One driver in a guest, and in another if the first one was lost: a host that has too much to do starves one now and then.
fn trial(benign: bool, mutant: &Mutant, config: &RunConfig, ends: &[&AtomicBool; 2]) -> Result<Judged> {
    let (first, lost) = in_a_guest(benign, mutant, config, ends)?;
    if !lost || ends.iter().any(|end| end.load(Ordering::SeqCst)) {
        return Ok(first);
    }
    let (mut second, _) = in_a_guest(benign, mutant, config, ends)?;
    let why = first.detail.as_deref().unwrap_or("unknown");
    let before = format!("a guest before could not be tried to the end: {why}");
    second.detail =
        Some(second.detail.map_or_else(|| before.clone(), |detail| format!("{detail}; {before}")));
    Ok(second)
}

/// One guest with one driver, ended early by either of `ends`; and whether it was lost before it could tell.
fn in_a_guest(
    benign: bool,
    mutant: &Mutant,
    config: &RunConfig,
    ends: &[&AtomicBool; 2],
) -> Result<(Judged, bool)> {
    let listener = Arc::new(Listener::new((!benign).then(|| mutant.clone())));
    let stop = AtomicBool::new(false);
    let ended = AtomicBool::new(false);
    let outcome = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::SeqCst) {
                if ends.iter().any(|end| end.load(Ordering::SeqCst)) || listener.heard_enough() {
                    stop.store(true, Ordering::SeqCst);
                }
                std::thread::sleep(TICK);
            }
        });
        let events: Arc<dyn EventSink> = listener.clone();
        let outcome = runner::run(config, &events, &stop);
        ended.store(true, Ordering::SeqCst);
        outcome
    });
    // What is missing here is missing for all of them.
    if let Some(failure) = outcome.failure {
        if failure.kind == FailureKind::Environment {
            return Err(failure);
        }
        let skipped = mutant.needs.as_ref().filter(|_| failure.kind == FailureKind::Usage);
        let outcome = if skipped.is_some() { Outcome::Skipped } else { Outcome::Error };
        let detail = skipped.map_or_else(|| failure.what.clone(), |needs| format!("needs {needs}"));
        return Ok((Judged::untried(mutant, config, outcome, detail), false));
    }
    let judged = judge::judge(benign, mutant, config, &listener.heard(), &outcome.results);
    let lost = judged.outcome == Outcome::Error && !judge::to_the_end(&outcome.results);
    Ok((judged, lost))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> MutantsArgs {
        let words = ["hmm-testbench", "mutants"].into_iter().chain(line.split_whitespace());
        match Cli::try_parse_from(words).unwrap().command {
            Command::Mutants(args) => *args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_run_of_a_mutant_is_the_default_suite() {
        let args = args("last-page --seed 7 --cpus 4 --kernel bookworm --accel tcg");
        let chosen = choose(&args).unwrap();
        assert_eq!(chosen.len(), 1);
        let made = config(&args, &chosen[0], 7, "testbench").unwrap();
        assert_eq!((made.seed, made.cpus, made.kernel.as_str()), (7, 4, "bookworm"));
        assert_eq!(made.patches, [chosen[0].path.clone()]);
        assert_eq!(made.workloads, runner::plan::workloads(&[], false).unwrap());
        assert_eq!(made.program, "testbench");
    }

    #[test]
    fn a_patch_for_a_kernel_is_tried_with_that_one_or_not_at_all() {
        let mut mutant = choose(&args("last-page")).unwrap().remove(0);
        mutant.kernel = Some("trixie".to_owned());
        for (line, kernel, tried) in [
            ("", DEFAULT_KERNEL, false),
            ("last-page", "trixie", true),
            ("--kernel trixie", "trixie", true),
            ("last-page --kernel bookworm", "bookworm", false),
        ] {
            let config = config(&args(line), &mutant, 1, "t").unwrap();
            assert_eq!(
                (config.kernel.as_str(), elsewhere(&mutant, &config).is_none()),
                (kernel, tried),
                "{line}"
            );
        }
    }

    #[test]
    fn what_there_is_not_is_refused() {
        let empty = tempfile::tempdir().unwrap();
        for line in ["no-such-mutant".to_owned(), format!("--dir {}", empty.path().display())] {
            let failure = choose(&args(&line)).unwrap_err();
            assert_eq!(failure.kind, FailureKind::Usage, "{failure}");
        }
    }
}
