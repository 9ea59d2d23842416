// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is to be run.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use clap::builder::PossibleValue;
use guest_protocol::{Extent, NUMA_WORKLOAD, UNPLUG_WORKLOAD, WORKLOADS};
use serde::{Deserialize, Serialize};

use super::allow::Allow;
use super::{plan, replay};
use crate::cli::units::{Add, show_size};
use crate::cli::vfio::Vfio;
use crate::cli::{AccelName, AtomicsName, BackendName, MachineName, PolicyName, RunArgs, not_yet};
use crate::failure::{Failure, Result};
use crate::gates;
use crate::gates::order::Order;
use crate::gates::script::{Scenario, Script};
use crate::machine::{Accel, kvm, node_bytes};
use crate::provision::{KERNELS, refuse_outer};

/// What is to be run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunConfig {
    /// How this program was called, for replays.
    pub program: String,
    /// The whole command line, quoted, for the record.
    pub command: String,
    /// Workloads, in order.
    pub workloads: Vec<String>,
    /// A command to run after them.
    pub exec: Option<String>,
    /// End in a shell.
    pub shell: bool,
    /// How far each workload goes.
    pub extent: Extent,
    /// The run's seed.
    pub seed: u64,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Guest memory.
    pub memory_bytes: u64,
    /// NUMA nodes.
    pub nodes: u32,
    /// Nobody said how many: a workload needs so many.
    pub nodes_chosen: bool,
    /// The machine under the guest.
    pub machine: MachineName,
    /// Run it inside an outer guest that has KVM.
    pub nested: bool,
    /// Processors of that outer guest.
    pub outer_cpus: u32,
    /// Kernel of that outer guest, by name.
    pub outer_kernel: String,
    /// Accelerator, if one is demanded.
    pub accel: Option<Accel>,
    /// Kernel, by name or as a tree.
    pub kernel: String,
    /// The driver's backend.
    pub backend: BackendName,
    /// Its policy, if it has several.
    pub policy: Option<PolicyName>,
    /// What the platform does for the device's atomics.
    pub atomics: AtomicsName,
    /// A built driver to load instead of ours.
    pub driver: Option<PathBuf>,
    /// Patches to our driver.
    pub patches: Vec<PathBuf>,
    /// Files for the guest.
    pub add: Vec<Add>,
    /// Judge.
    pub oracle: bool,
    /// Let the device take its time now and then, by the seed.
    pub jitter: bool,
    /// Bytes of the trace.
    pub trace_bytes: u64,
    /// Folder of the results.
    pub out: Option<PathBuf>,
    /// More arguments for the guest's kernel.
    pub append: Option<String>,
    /// A device of the host for the guest.
    pub vfio: Option<Vfio>,
    /// What is accepted.
    pub allow: Option<Allow>,
    /// Run to the end whatever is found.
    pub keep_going: bool,
    /// The scenario, which is one of the workloads by its name.
    pub scenario: Option<Scenario>,
    /// The file it is from, if it is the user's.
    pub scenario_file: Option<PathBuf>,
    /// The order of its gates, if its script is not to be followed.
    pub gate_order: Option<Order>,
    /// File for its diagram.
    pub diagram: Option<PathBuf>,
}

impl RunConfig {
    /// From the command line; what can be seen to be wrong without starting anything is refused here.
    pub fn new(args: RunArgs, words: &[String]) -> Result<Self> {
        not_yet::refuse(&args)?;
        let (scenario, names) = scenario(&args)?;
        let others: Vec<String> =
            names.iter().filter(|name| scenario.as_ref().is_none_or(|s| s.name != **name)).cloned().collect();
        let something_else = args.exec.is_some() || args.shell || scenario.is_some();
        let workloads = plan::workloads(&others, something_else)?;
        // In the order in which they were named.
        let workloads = if scenario.is_some() { names } else { workloads };
        for (option, path) in
            args.driver.iter().map(|p| ("--driver", p)).chain(args.patch.iter().map(|p| ("--patch", p)))
        {
            if !path.is_file() {
                let what = if path.exists() { "is not a regular file" } else { "there is no such file" };
                return Err(Failure::usage(format!("{option} {}: {what}", path.display())));
            }
        }
        for (index, add) in args.add.iter().enumerate() {
            if args.add[..index].iter().any(|other| other.guest == add.guest) {
                return Err(Failure::usage(format!("--add: two are to be {} in the guest", add.guest))
                    .remedy("say where one of them goes, as in --add HOST:/GUEST"));
            }
            if !add.host.is_file() && !add.host.is_dir() {
                let what = if add.host.exists() {
                    "is neither a file nor a folder"
                } else {
                    "there is no such file or folder"
                };
                return Err(Failure::usage(format!("--add {}: {what}", add.host.display())));
            }
        }
        if args.mirror_policy.is_some() && args.backend != BackendName::Mirror {
            return Err(Failure::usage("--mirror-policy belongs to --backend mirror"));
        }
        if args.atomics == AtomicsName::Exclusive && args.backend == BackendName::Mirror {
            return Err(Failure::usage(
                "--atomics exclusive: the mirror layer's callbacks do not say who takes a page, so it has no exclusive ones",
            )
            .remedy("give --backend interval"));
        }
        if let Some(exec) = &args.exec {
            if exec.trim().is_empty() {
                return Err(Failure::usage("--exec: the command is empty"));
            }
        }
        if args.append.as_ref().is_some_and(|words| words.chars().any(char::is_control)) {
            return Err(Failure::usage("--append: the kernel's command line is one line of text"));
        }
        if args.shell && args.format != crate::cli::FormatName::Human {
            return Err(Failure::usage("--shell needs the terminal: use it with --format human"));
        }
        if args.nested && args.accel == Some(AccelName::Tcg) {
            return Err(Failure::usage(
                "--nested runs the guest with KVM in an outer guest: --accel tcg contradicts it",
            )
            .remedy("leave out one of the two"));
        }
        if args.nested && args.shell {
            return Err(Failure::usage("--shell: a nested guest's console cannot be typed on")
                .remedy("use --exec 'COMMAND', or --shell without --nested"));
        }
        if args.nested && args.trace_bytes > 1 << 30 {
            return Err(Failure::usage(
                "--trace-bytes: a nested run keeps its trace in the outer guest's memory, 1G at most",
            ));
        }
        refuse_outer(&args.kernel)?;
        if !KERNELS.iter().any(|kernel| kernel.name == args.outer_kernel) {
            return Err(Failure::usage(format!(
                "--outer-kernel: no kernel is named '{}'",
                args.outer_kernel
            ))
            .remedy("`hmm-testbench list kernels` has the names; it cannot be a tree"));
        }
        if args.outer_cpus != 1 && !args.nested {
            return Err(Failure::usage("--outer-cpus belongs to --nested"));
        }
        let unplugs = workloads.iter().any(|name| name == UNPLUG_WORKLOAD);
        if unplugs && (args.machine != MachineName::Kvm || args.vfio.is_some()) {
            return Err(Failure::usage(format!(
                "{UNPLUG_WORKLOAD} pulls the device out, which only the native machine lets happen to functions of its own"
            ))
            .remedy("give --machine kvm, with --nested where KVM runs no guests, and no --vfio"));
        }
        let nodes = nodes(&args, &workloads)?;
        if args.machine == MachineName::Kvm && args.cpus > kvm::MOST_CPUS {
            return Err(Failure::usage(format!(
                "--cpus {}: the native machine has {} at most",
                args.cpus,
                kvm::MOST_CPUS
            ))
            .remedy("give --machine qemu, with --accel kvm --nested if KVM is wanted"));
        }
        let vfio = args.vfio.as_deref().map(|text| Vfio::new(text, args.machine, args.nested)).transpose()?;
        Ok(Self {
            vfio,
            program: program(words.first().map(String::as_str)),
            command: replay::quote(words),
            workloads,
            exec: args.exec,
            shell: args.shell,
            extent: match (args.iterations, args.duration) {
                (Some(count), _) => Extent::Iterations(count),
                (None, Some(time)) => {
                    Extent::Milliseconds(u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
                }
                (None, None) => Extent::Default,
            },
            seed: args.seed.unwrap_or_else(plan::seed_from_clock),
            cpus: args.cpus,
            memory_bytes: args.memory,
            nodes,
            nodes_chosen: args.nodes.is_none(),
            machine: args.machine,
            nested: args.nested,
            outer_cpus: args.outer_cpus,
            outer_kernel: args.outer_kernel.clone(),
            accel: args.accel.map(|accel| match accel {
                AccelName::Kvm => Accel::Kvm,
                AccelName::Tcg => Accel::Tcg,
            }),
            kernel: args.kernel,
            backend: args.backend,
            policy: (args.backend == BackendName::Mirror)
                .then(|| args.mirror_policy.unwrap_or(PolicyName::ReadHeld)),
            atomics: args.atomics,
            driver: args.driver,
            patches: args.patch,
            add: args.add,
            oracle: !args.no_oracle,
            jitter: true,
            trace_bytes: args.trace_bytes,
            out: args.out,
            append: args.append,
            allow: args.allow.as_deref().map(Allow::read).transpose()?,
            keep_going: args.keep_going,
            scenario,
            scenario_file: args.scenario,
            gate_order: args.gate_order,
            diagram: args.diagram,
        })
    }

    /// What a scenario's `when` is held against.
    #[must_use]
    pub fn variants(&self) -> Vec<String> {
        let name = |value: Option<PossibleValue>| value.map(|value| value.get_name().to_owned());
        let policy = self.policy.and_then(|policy| name(policy.to_possible_value()));
        name(self.backend.to_possible_value()).into_iter().chain(policy).collect()
    }

    /// The scenario and its script, if there is one. It was looked at when the run was configured.
    pub fn script(&self) -> Result<Option<(&Scenario, Script)>> {
        let Some(scenario) = &self.scenario else { return Ok(None) };
        let script = scenario
            .compile(&self.variants().iter().map(String::as_str).collect::<Vec<_>>())
            .map_err(|why| Failure::usage(format!("{}: {why}", scenario.name)))?;
        Ok(Some((scenario, script)))
    }
}

/// The scenario of a run, and the names of all that is to be run.
fn scenario(args: &RunArgs) -> Result<(Option<Scenario>, Vec<String>)> {
    let mut names = args.names.clone();
    let mut found = args.scenario.as_deref().map(gates::from_file).transpose()?;
    if let Some(scenario) = &found {
        if WORKLOADS.iter().any(|workload| workload.name == scenario.name) {
            return Err(Failure::usage(format!("--scenario: {:?} is the name of a workload", scenario.name)));
        }
        names.push(scenario.name.clone());
    }
    for name in &args.names {
        if let Some(scenario) = gates::built_in(name)? {
            if found.replace(scenario).is_some() {
                return Err(Failure::usage("one scenario a run: its gates are all that can be decided on"));
            }
        }
    }
    let only = [(args.gate_order.is_some(), "--gate-order"), (args.diagram.is_some(), "--diagram")];
    match (&found, only.iter().find(|(given, _)| *given)) {
        (None, Some((_, option))) => {
            return Err(Failure::usage(format!("{option} belongs to a scenario"))
                .remedy(format!("there are: {}", gates::names().collect::<Vec<_>>().join(", "))));
        }
        (Some(scenario), _) => {
            let wrong = |why: String| Failure::usage(format!("{}: {why}", scenario.name));
            let script = scenario.compile(&[]).map_err(wrong)?;
            if let Some(order) = &args.gate_order {
                order.check(&script).map_err(|why| Failure::usage(format!("--gate-order: {why}")))?;
            }
            let backend = args.backend.to_possible_value().map(|value| value.get_name().to_owned());
            if let (Some(wanted), Some(backend)) = (&scenario.backend, backend) {
                if *wanted != backend {
                    return Err(Failure::usage(format!("{} is about the backend {wanted}", scenario.name))
                        .remedy(format!("add --backend {wanted}")));
                }
            }
        }
        (None, None) => {}
    }
    Ok((found, names))
}

/// How many nodes the guest has: as many as were asked for, or as its workloads need.
fn nodes(args: &RunArgs, workloads: &[String]) -> Result<u32> {
    let qemu = args.machine == MachineName::Qemu;
    let fit = |nodes: u32| node_bytes(args.memory, nodes).is_some();
    match args.nodes {
        Some(1) => Ok(1),
        Some(nodes) if !qemu => {
            Err(Failure::usage(format!("--nodes {nodes}: the native machine has one node"))
                .remedy("give --machine qemu, with --accel kvm --nested if KVM is wanted"))
        }
        Some(nodes) if !fit(nodes) => Err(Failure::usage(format!(
            "--nodes {nodes}: with {} of memory not every node gets the 128M that it needs",
            show_size(args.memory)
        ))
        .remedy("give more --memory, or fewer nodes")),
        Some(nodes) => Ok(nodes),
        None if qemu && fit(2) && workloads.iter().any(|name| name == NUMA_WORKLOAD) => Ok(2),
        None => Ok(1),
    }
}

/// How to call this program again, from any folder.
fn program(called: Option<&str>) -> String {
    let called = called.unwrap_or("hmm-testbench");
    let path = Path::new(called);
    // Without a slash it was found in PATH and will be again.
    if path.components().count() < 2 {
        return called.to_owned();
    }
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    AsRef::<OsStr>::as_ref(&absolute).to_string_lossy().into_owned()
}

#[cfg(test)]
impl RunConfig {
    /// Two workloads and the defaults.
    pub(crate) fn for_tests() -> Self {
        Self {
            program: "hmm-testbench".into(),
            command: "hmm-testbench run".into(),
            workloads: vec!["access".into(), "release".into()],
            exec: None,
            shell: false,
            extent: Extent::Default,
            seed: 1,
            cpus: crate::cli::DEFAULT_CPUS,
            memory_bytes: 1 << 30,
            nodes: 1,
            nodes_chosen: true,
            machine: MachineName::Qemu,
            nested: false,
            outer_cpus: 1,
            outer_kernel: crate::cli::DEFAULT_KERNEL.into(),
            accel: None,
            kernel: crate::cli::DEFAULT_KERNEL.into(),
            backend: BackendName::Interval,
            policy: None,
            atomics: AtomicsName::Coherent,
            driver: None,
            patches: Vec::new(),
            add: Vec::new(),
            oracle: true,
            jitter: true,
            trace_bytes: vgpu::oracle::DEFAULT_BYTES,
            out: None,
            append: None,
            vfio: None,
            allow: None,
            keep_going: false,
            scenario: None,
            scenario_file: None,
            gate_order: None,
            diagram: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::{Cli, Command};

    fn config(line: &str) -> Result<RunConfig> {
        let words: Vec<String> =
            ["hmm-testbench", "run"].into_iter().chain(line.split_whitespace()).map(str::to_owned).collect();
        match Cli::try_parse_from(&words).unwrap().command {
            Command::Run(args) => RunConfig::new(*args, &words),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn nodes_are_as_many_as_asked_for_or_as_numa_needs() {
        for (line, nodes) in [
            ("access", 1),
            ("numa", 2),
            ("boundary", 2),
            ("numa --nodes 1", 1),
            ("access --nodes 4", 4),
            ("numa --machine kvm", 1),
            ("numa --machine kvm --nodes 1", 1),
        ] {
            assert_eq!(config(line).unwrap().nodes, nodes, "{line}");
        }
        for wrong in ["access --machine kvm --nodes 2", "access --memory 256M --nodes 4"] {
            assert_eq!(config(wrong).unwrap_err().kind.exit_status(), 2, "{wrong}");
        }
    }

    #[test]
    fn the_native_machine_has_eight_processors_at_most() {
        for fine in ["access --machine kvm --nested --cpus 8", "access --cpus 9"] {
            assert!(config(fine).is_ok(), "{fine}");
        }
        let failure = config("access --machine kvm --nested --cpus 9").unwrap_err();
        assert_eq!(failure.kind.exit_status(), 2);
        assert!(failure.what.contains("8 at most"), "{failure}");
    }

    #[test]
    fn a_replay_has_the_nodes_of_its_run() {
        let boundary = config("boundary --seed 1").unwrap();
        for name in ["numa", "swap"] {
            let replay = replay::command(&boundary, Some(name));
            assert!(replay.contains(" --nodes 2 "), "{replay}");
        }
        let one = config("numa access --nodes 1").unwrap();
        assert!(replay::command(&one, Some("numa")).contains(" --nodes 1 "));
        assert!(replay::command(&one, None).contains(" --nodes 1 "));
        assert!(!replay::command(&one, Some("access")).contains("--nodes"));
    }
}
