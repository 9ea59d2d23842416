// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command line's grammar. Scripts depend on it: names are added, never changed.

pub mod check;
pub mod examine;
pub mod list;
pub mod mutants;
pub mod not_yet;
pub mod report;
pub mod units;
pub mod vfio;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::gates::order::Order;
use units::Add;

/// Boots a Linux guest, shows it a virtual GPU, loads a driver that mirrors address spaces on it, and proves from the device's
/// side that the driver tears its mappings down in time.
#[derive(Debug, Parser)]
#[command(name = "hmm-testbench", version, about, after_help = EXIT_STATUS)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXIT_STATUS: &str = "\
Exit status: 0 clean; 1 a violation was found; 2 the command line or an input file is wrong; \
3 inconclusive (the guest was lost, or there is no evidence); 4 the environment lacks something, and the message says what \
and how to get it.";

const RUN_HELP: &str = "\
Exit status: 0 clean; 1 a violation was found, which outranks everything else; 2 usage; 3 inconclusive: the guest was lost, a \
workload did not run to its end or failed for a reason of its own, a witness probe was missed, or the command of --exec ended \
with another status than 0 and without a violation (results.json has it as exec_status); 4 the environment lacks something.";

const CHECK_HELP: &str = "\
Exit status: that of the run, as far as it is in the trace: 0 clean; 1 a violation was found; 2 the file is no whole trace; 3 \
inconclusive: the run was, the trace was not closed (the testbench was killed), or its oldest events gave way to newer ones.";

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Say what this machine has and lacks
    Doctor {
        /// As one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Get the parts a run needs into the user's cache folder: QEMU, module build root, guest kernels
    Provision {
        /// Guest kernel to get, by name (see `list kernels`); may be given several times
        #[arg(long, value_name = "NAME")]
        kernel: Vec<String>,
    },
    /// Print the names of things
    List {
        /// Of what
        kind: ListKind,
        /// As a JSON array
        #[arg(long)]
        json: bool,
    },
    /// Boot a guest, run workloads with the oracle on, and give a verdict
    #[command(after_help = RUN_HELP)]
    Run(Box<RunArgs>),
    /// Measure, as ratios in one run where that is possible
    Bench {
        /// Benchmarks, by name; all without
        names: Vec<String>,
        /// Kernel of the guests, as for `run`
        #[arg(long, default_value = DEFAULT_KERNEL, value_name = "NAME|TREE")]
        kernel: String,
        /// One JSON object a line
        #[arg(long)]
        json: bool,
    },
    /// PID 1 of the outer guest of `run --nested`
    #[command(hide = true, name = crate::nested::COMMAND)]
    NestedInside,
    /// Try broken drivers, which the oracle must find, or correct ones, in which it must find nothing
    #[command(after_help = mutants::HELP)]
    Mutants(Box<mutants::MutantsArgs>),
    /// Judge the trace of an earlier run once more, without a guest
    #[command(after_help = CHECK_HELP)]
    Check(check::CheckArgs),
    /// (not in this version)
    #[command(hide = true, disable_help_flag = true)]
    Campaign(Later),
    /// Show again what earlier runs found
    Report(report::ReportArgs),
}

/// Arguments of a command that this version does not have.
#[derive(Debug, Args)]
pub struct Later {
    /// Whatever is given.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub rest: Vec<String>,
}

/// Kinds of things that can be listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ListKind {
    /// What `run` takes as NAME
    Workloads,
    /// Scenarios of gates
    Scenarios,
    /// The oracle's rules
    Rules,
    /// Injection points
    Inject,
    /// Gates
    Gates,
    /// Guest kernels by name
    Kernels,
    /// Faulty drivers that the oracle must find
    Mutants,
}

/// The machine under the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum MachineName {
    /// QEMU, the device over vfio-user
    Qemu,
    /// The testbench's own, for hosts whose KVM runs Linux, or with --nested
    Kvm,
}

impl std::fmt::Display for MachineName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Qemu => "qemu",
            Self::Kvm => "kvm",
        })
    }
}

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AccelName {
    /// The host's KVM
    Kvm,
    /// QEMU's translator
    Tcg,
}

/// What the platform does for the device's atomics on system memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum AtomicsName {
    /// They are coherent with the CPUs'
    Coherent,
    /// They are not: they need pages that the CPUs are kept away from
    Exclusive,
}

impl std::fmt::Display for AtomicsName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Coherent => "coherent",
            Self::Exclusive => "exclusive",
        })
    }
}

/// The driver's backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum BackendName {
    /// mmu_interval_notifier and hmm_range_fault
    Interval,
    /// The hmm_mirror layer
    Mirror,
}

impl std::fmt::Display for BackendName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Interval => "interval",
            Self::Mirror => "mirror",
        })
    }
}

/// How the hmm_mirror layer walks its list of mirrors. docs/seed.md has the argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum PolicyName {
    /// Release drops the semaphore around each callback
    DropLock,
    /// Release holds the semaphore for reading around all callbacks
    ReadHeld,
    /// The list is walked under SRCU, and unregister waits for that
    Srcu,
    /// The same, and unregister does not wait
    SrcuNowait,
}

impl std::fmt::Display for PolicyName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::DropLock => "drop-lock",
            Self::ReadHeld => "read-held",
            Self::Srcu => "srcu",
            Self::SrcuNowait => "srcu-nowait",
        })
    }
}

/// How a run is shown on standard output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FormatName {
    /// For people
    Human,
    /// One JSON object a line
    Jsonl,
    /// (not in this version)
    #[value(hide = true)]
    Ktap,
    /// (not in this version)
    #[value(hide = true)]
    Junit,
}

/// Options of `run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Workloads and scenarios, by name (see `list workloads`, `list scenarios`), or `boundary` for all workloads that shake the
    /// mm boundary. Without: the default suite, or none if --exec, --shell or --scenario is given
    #[arg(value_name = "NAME")]
    pub names: Vec<String>,
    /// Machine under the guest
    #[arg(long, value_enum, default_value_t = DEFAULT_MACHINE)]
    pub machine: MachineName,
    /// Run the guest with KVM inside an outer guest whose processor QEMU's translator emulates, virtualisation included: slower,
    /// works everywhere, needs no root
    #[arg(long)]
    pub nested: bool,
    /// Processors of the outer guest of --nested; more than one is faster and less reliable
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8))]
    pub outer_cpus: u32,
    /// Kernel of the outer guest of --nested, one of `list kernels` that has KVM; with built:host, devices are handed over by iommufd
    #[arg(long, value_name = "NAME", requires = "nested", default_value = DEFAULT_KERNEL, hide_default_value = true)]
    pub outer_kernel: String,
    /// What runs the guest's instructions; KVM where it can run Linux if not given, and the run fails if it is given and cannot
    #[arg(long, value_enum)]
    pub accel: Option<AccelName>,
    /// Guest kernel: a name of `list kernels`, or the folder of a built kernel tree
    #[arg(long, value_name = "NAME|TREE", default_value = DEFAULT_KERNEL)]
    pub kernel: String,
    /// Virtual CPUs; 8 at most with --machine kvm
    #[arg(long, value_name = "N", default_value_t = DEFAULT_CPUS, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub cpus: u32,
    /// NUMA nodes, among which memory and CPUs are shared out; 1 if not given, or 2 for the workload numa. Needs --machine qemu
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=8))]
    pub nodes: Option<u32>,
    /// Guest memory, such as 512M or 2G
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = units::memory)]
    pub memory: u64,
    /// The driver's backend
    #[arg(long, value_enum, default_value = "interval")]
    pub backend: BackendName,
    /// The policy of --backend mirror; read-held if not given
    #[arg(long, value_name = "POLICY", value_enum)]
    pub mirror_policy: Option<PolicyName>,
    /// What the platform does for the device's atomics on system memory
    #[arg(long, value_enum, default_value = "coherent")]
    pub atomics: AtomicsName,
    /// A built module to load instead of the testbench's own driver
    #[arg(long, value_name = "FILE.ko", conflicts_with = "patch")]
    pub driver: Option<PathBuf>,
    /// A diff to apply to a copy of the driver before it is built; may be given several times, applied in order
    #[arg(long, value_name = "FILE")]
    pub patch: Vec<PathBuf>,
    /// Seed of everything random; taken from the clock if not given, and always printed
    #[arg(long, value_name = "N", value_parser = seed)]
    pub seed: Option<u64>,
    /// A scenario of your own, in TOML (see docs/gates.md)
    #[arg(long, value_name = "FILE.toml")]
    pub scenario: Option<PathBuf>,
    /// Without the scenario's script, let those who wait at its gates go on in an order of chance, or in this one; the order in
    /// which a violation was found is part of its replay command
    #[arg(long, value_name = "SEED|GATE@ROLE,...", value_parser = clap::value_parser!(Order))]
    pub gate_order: Option<Order>,
    /// File for the scenario's last repetition, or that in which a violation was found, as a diagram
    #[arg(long, value_name = "FILE.md")]
    pub diagram: Option<PathBuf>,
    /// How many iterations each workload does
    #[arg(long, value_name = "N", conflicts_with = "duration", value_parser = clap::value_parser!(u64).range(1..))]
    pub iterations: Option<u64>,
    /// How long each workload goes on, in guest time, such as 30s or 2m
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    pub duration: Option<Duration>,
    /// Leave the oracle out (for measuring): only data, the console and hangs are judged
    #[arg(long)]
    pub no_oracle: bool,
    /// A file or folder to put into the guest, as /add/NAME if not said otherwise; programs bring their libraries; may be given several times
    #[arg(long, value_name = "HOST[:GUEST]", value_parser = units::add)]
    pub add: Vec<Add>,
    /// A command to run in the guest after the workloads, with the driver loaded; see below for the exit status
    #[arg(long, value_name = "COMMAND")]
    pub exec: Option<String>,
    /// End in a shell on the guest's console
    #[arg(long)]
    pub shell: bool,
    /// Arguments to put at the end of the guest kernel's command line
    #[arg(long, value_name = "ARGUMENTS", allow_hyphen_values = true)]
    pub append: Option<String>,
    /// A device of the host that the guest gets as well: its PCI address, such as 0000:01:00.0; with --nested gpu, for
    /// the testbench's own functions as devices of the outer guest, or edu, QEMU's test device there. Needs --machine kvm and an
    /// IOMMU
    #[arg(long, value_name = "BDF")]
    pub vfio: Option<String>,
    /// What is accepted and why: a TOML file of [[allow]] entries with rule and reason (docs/using.md)
    #[arg(long, value_name = "FILE")]
    pub allow: Option<PathBuf>,
    /// Run to the end whatever is found; else a run ends ten seconds of guest time after its first violation
    #[arg(long)]
    pub keep_going: bool,
    /// Size of the trace, a ring in which the oldest events give way: in memory, or with --out the file `trace`
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = units::trace)]
    pub trace_bytes: u64,
    /// Folder for results.json, console.log, junit.xml and trace; made if needed
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// How the run is shown on standard output
    #[arg(long, value_enum, default_value = "human")]
    pub format: FormatName,
    /// Options that this version refuses.
    #[command(flatten)]
    pub later: not_yet::LaterOptions,
}

/// The machine of a run that names none.
pub const DEFAULT_MACHINE: MachineName = MachineName::Qemu;
/// The kernel of a run that names none.
pub const DEFAULT_KERNEL: &str = "backports";
/// The virtual CPUs of a run that does not say.
pub const DEFAULT_CPUS: u32 = 2;

/// A seed: decimal or, with 0x, hexadecimal.
fn seed(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| "a seed is a whole number of 64 bits, decimal or 0x hexadecimal".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_grammar_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_full_command_line() {
        let line = "hmm-testbench run access stress --machine qemu --accel tcg --kernel bookworm --cpus 4 --memory 2G --backend interval \
                    --patch a.patch --patch b.patch --seed 0x2a --duration 30s --no-oracle --add /bin/true:/bin/true --shell --out o --format jsonl";
        let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
        let Command::Run(run) = cli.command else { panic!("not a run") };
        assert_eq!(run.names, ["access", "stress"]);
        assert_eq!((run.seed, run.cpus, run.memory), (Some(42), 4, 2 << 30));
        assert_eq!(run.patch.len(), 2);
        assert_eq!(run.duration, Some(Duration::from_secs(30)));
    }

    #[test]
    fn bad_values_are_refused() {
        for bad in [
            "run --cpus 0",
            "run --cpus 65",
            "run --nodes 0",
            "run --nodes 9",
            "run --memory 5",
            "run --iterations 0",
            "run --iterations 1 --duration 1s",
            "run --seed x",
            "run --format xml",
            "run --driver a.ko --patch b",
            "run --accel hvf",
            "list nothing",
            "",
        ] {
            let words = std::iter::once("hmm-testbench").chain(bad.split_whitespace());
            let error = Cli::try_parse_from(words).expect_err(bad);
            assert_eq!(error.exit_code(), 2, "{bad}");
        }
    }
}
