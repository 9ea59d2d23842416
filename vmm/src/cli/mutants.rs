// SPDX-License-Identifier: MIT OR Apache-2.0
//! The options of `mutants`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;

use super::{AccelName, DEFAULT_CPUS, DEFAULT_MACHINE, MachineName};

/// What `mutants --help` ends with.
pub const HELP: &str = "\
Each driver gets a guest of its own and the default suite, with nothing made for it, and is done with at the first violation of \
the rule that its head names. Exit status: 0 every mutant was killed so, or every correct driver ran clean; 1 not so; \
2 usage; 3 interrupted; 4 the environment lacks something.";

/// Options of `mutants`.
#[derive(Debug, Args)]
pub struct MutantsArgs {
    /// Mutants, by name (see `list mutants`); all of them if none is named
    #[arg(value_name = "NAME")]
    pub names: Vec<String>,
    /// Take the patches of this folder instead of the testbench's own; a patch without a `Rule:` may be killed by any
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Try drivers that are correct (guest/benign, or those of --dir): nothing may be found
    #[arg(long)]
    pub benign: bool,
    /// How many seeds each is tried with
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub seeds: u64,
    /// The first of the seeds
    #[arg(long, value_name = "N", default_value = "1", value_parser = super::seed)]
    pub seed: u64,
    /// Guests at a time. More than the host has processors for make each slower, and none of them wrong
    #[arg(long, value_name = "N", default_value = "1", value_parser = jobs)]
    pub jobs: NonZeroUsize,
    /// Guest kernel: a name of `list kernels`, or the folder of a built kernel tree. A patch that is for another (`Kernel:`) is skipped;
    /// one that is named is tried with its own if none is given
    #[arg(long, value_name = "NAME|TREE")]
    pub kernel: Option<String>,
    /// Machine under the guest
    #[arg(long, value_enum, default_value_t = DEFAULT_MACHINE)]
    pub machine: MachineName,
    /// As for `run`
    #[arg(long)]
    pub nested: bool,
    /// As for `run`
    #[arg(long, value_enum)]
    pub accel: Option<AccelName>,
    /// Virtual CPUs
    #[arg(long, value_name = "N", default_value_t = DEFAULT_CPUS, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub cpus: u32,
    /// Folder that gets a folder for each guest, NAME-SEED, with what `run --out` writes
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// One JSON object a line
    #[arg(long)]
    pub json: bool,
}

/// Most guests at a time.
const MOST_JOBS: usize = 256;

fn jobs(text: &str) -> Result<NonZeroUsize, String> {
    let within = |jobs: &NonZeroUsize| jobs.get() <= MOST_JOBS;
    text.parse().ok().filter(within).ok_or_else(|| format!("not a number from 1 to {MOST_JOBS}"))
}
