// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the guest is told: its plan, its seeds, its kernel's command line.

use guest_protocol::{Extent, Plan, WORKLOADS, WorkloadPlan, of_group};

use super::RunConfig;
use crate::cli::{AtomicsName, BackendName};
use crate::failure::{Failure, Result};
use crate::gates;

/// The kernel's command line.
///
/// Warnings reach the console (loglevel 5); less is not printed while booting because each byte on an emulated serial port
/// costs. Once PID 1 runs everything is printed, so that stacks asked for by sysrq are seen. Addresses are not randomised, for
/// replays. Lockup detectors get longer than their defaults: a slow host is not the driver's fault, and heartbeats judge hangs.
pub const CMDLINE: &str = "console=ttyS0 loglevel=5 printk.time=1 panic=-1 oops=panic unknown_nmi_panic nokaslr mitigations=off \
     random.trust_cpu=on transparent_hugepage=madvise watchdog_thresh=30 rcupdate.rcu_cpu_stall_timeout=60 sysctl.kernel.printk=7";

/// The guest kernel's command line, with what the user wants at its end.
#[must_use]
pub fn cmdline(append: Option<&str>) -> String {
    append.map_or_else(|| CMDLINE.to_owned(), |append| format!("{CMDLINE} {append}"))
}

/// The names of the workloads to run: those given, or the default suite if there is nothing else to do.
pub fn workloads(names: &[String], something_else: bool) -> Result<Vec<String>> {
    if names.is_empty() {
        let suite =
            WORKLOADS.iter().filter(|workload| workload.suite).map(|workload| workload.name.to_owned());
        return Ok(if something_else { Vec::new() } else { suite.collect() });
    }
    let mut wanted = Vec::new();
    for name in names {
        let group: Vec<String> = of_group(name).map(str::to_owned).collect();
        if !group.is_empty() {
            wanted.extend(group);
        } else if WORKLOADS.iter().any(|workload| workload.name == name) {
            wanted.push(name.clone());
        } else {
            let mut known: Vec<&str> = WORKLOADS.iter().map(|workload| workload.name).collect();
            known.extend(WORKLOADS.iter().filter_map(|workload| workload.group));
            known.dedup();
            let scenarios: Vec<&str> = gates::names().collect();
            return Err(Failure::usage(format!("there is no workload or scenario `{name}`")).remedy(
                format!("there are: {}; and scenarios: {}", known.join(", "), scenarios.join(", ")),
            ));
        }
    }
    Ok(wanted)
}

/// The plan of a run.
#[must_use]
pub fn plan(config: &RunConfig) -> Plan {
    // A scenario that cannot be followed has been refused when the run was configured.
    let script = config.script().ok().flatten();
    Plan {
        workloads: config
            .workloads
            .iter()
            .map(|name| {
                let scenario = script.as_ref().filter(|(scenario, _)| scenario.name == *name);
                WorkloadPlan {
                    name: name.clone(),
                    seed: workload_seed(config.seed, name),
                    extent: match (scenario, config.extent) {
                        (Some((scenario, _)), Extent::Default) => Extent::Iterations(scenario.repetitions),
                        (_, extent) => extent,
                    },
                    coherent_atomics: config.atomics == AtomicsName::Coherent,
                    scenario: scenario.map(|(scenario, script)| scenario.plan(script)),
                }
            })
            .collect(),
        exec: config.exec.clone(),
        shell: config.shell,
        load_driver: true,
        driver_parameters: driver_parameters(config),
    }
}

/// Parameters of the driver's module. A driver of the user's gets those that were asked for, and none that were not.
fn driver_parameters(config: &RunConfig) -> String {
    match (config.backend, config.policy) {
        (BackendName::Interval, _) => String::new(),
        (backend, None) => format!("backend={backend}"),
        (backend, Some(policy)) => format!("backend={backend} mirror_policy={policy}"),
    }
}

/// A workload's seed. It depends on the run's seed and the workload's name only, so that a run of this workload alone does the
/// same.
#[must_use]
pub fn workload_seed(seed: u64, name: &str) -> u64 {
    // FNV-1a over the name, then the finaliser of splitmix64.
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let mut z = seed.wrapping_add(hash).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A seed for a run that was given none.
#[must_use]
pub fn seed_from_clock() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    // Short enough to be copied by hand.
    workload_seed(now.as_nanos() as u64, "seed") >> 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_do_not_depend_on_the_company() {
        let mut config = RunConfig::for_tests();
        config.seed = 5;
        let together = plan(&config);
        config.workloads = vec!["release".into()];
        assert_eq!(plan(&config).workloads[0], together.workloads[1]);
        assert_ne!(together.workloads[0].seed, together.workloads[1].seed);
        assert_ne!(workload_seed(1, "access"), workload_seed(2, "access"));
    }

    #[test]
    fn the_module_is_told_its_backend() {
        let mut config = RunConfig::for_tests();
        assert_eq!(plan(&config).driver_parameters, "");
        config.backend = BackendName::Mirror;
        config.policy = Some(crate::cli::PolicyName::DropLock);
        assert_eq!(plan(&config).driver_parameters, "backend=mirror mirror_policy=drop-lock");
    }

    #[test]
    fn names() {
        assert_eq!(workloads(&[], false).unwrap().last().map(String::as_str), Some("migrate"));
        assert!(workloads(&[], true).unwrap().is_empty());
        assert_eq!(workloads(&["stress".into()], true).unwrap(), ["stress"]);
        let boundary = workloads(&["boundary".into(), "access".into()], false).unwrap();
        assert!(
            boundary.len() > 10
                && boundary.contains(&"swap".into())
                && boundary.ends_with(&["access".into()])
        );
        let error = workloads(&["acess".into()], false).unwrap_err();
        assert!(error.to_string().contains("access"), "{error}");
        assert_eq!(error.kind.exit_status(), 2);
    }
}
