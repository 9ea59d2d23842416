// SPDX-License-Identifier: MIT OR Apache-2.0
//! `results.json`: what a run found, for programs. Fields may be added, never renamed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use vgpu::oracle::Violation;

use crate::gates::engine::ScenarioResult;

/// Version of this form; goes up when a field's meaning changes.
pub const SCHEMA_VERSION: u32 = 1;

/// What a run says about the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Everything ran and nothing was found.
    Clean,
    /// A rule was broken.
    Violation,
    /// The run proves nothing; `reasons` says why.
    Inconclusive,
    /// The run could not be made; `error` says why.
    Error,
}

impl Verdict {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Clean => "clean",
            Self::Violation => "violation",
            Self::Inconclusive => "inconclusive",
            Self::Error => "error",
        }
    }
}

/// The kernel a guest ran, and everything else that was found out or chosen on the way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Version of the testbench.
    pub version: String,
    /// The command line, quoted for a shell.
    pub command: String,
    /// The verdict.
    pub verdict: Verdict,
    /// The process's exit status.
    pub exit_status: u8,
    /// Why the verdict is not `clean`, one line each.
    pub reasons: Vec<String>,
    /// The machine, such as `qemu`.
    pub machine: String,
    /// Whether that machine ran inside an outer guest, on an emulated processor.
    #[serde(default)]
    pub nested: bool,
    /// Its version, once known.
    pub machine_version: Option<String>,
    /// `kvm` or `tcg`.
    pub accel: Option<String>,
    /// Why that one.
    pub accel_reason: Option<String>,
    /// The guest kernel's release, or what was asked for until that is known.
    pub kernel: String,
    /// The kernel as it was asked for.
    pub kernel_name: String,
    /// The driver's backend.
    pub backend: String,
    /// The backend's policy, if it has several.
    pub policy: Option<String>,
    /// The driver's file if it was given.
    pub driver: Option<String>,
    /// Patches put on the driver.
    pub patches: Vec<String>,
    /// The run's seed.
    pub seed: u64,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Guest memory.
    pub memory_bytes: u64,
    /// NUMA nodes of the guest; 0 in results of versions that did not say.
    #[serde(default)]
    pub nodes: u32,
    /// What the platform does for the device's atomics, `--atomics`; empty in results of versions that did not say.
    #[serde(default)]
    pub atomics: String,
    /// Whether the oracle judged.
    pub oracle: bool,
    /// Workloads, in the order of the plan.
    pub workloads: Vec<WorkloadResult>,
    /// Exit status of the command of `--exec`; none if there was none or it did not end.
    pub exec_status: Option<i32>,
    /// What came of the scenario, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scenario: Option<ScenarioResult>,
    /// What was checked.
    pub counters: Counters,
    /// What was found.
    pub violations: Vec<ViolationRecord>,
    /// What was found and is accepted, by the list of `--allow`.
    #[serde(default)]
    pub allowed: Vec<AllowedRecord>,
    /// Entries of that list that could have been needed and were not, in words.
    #[serde(default)]
    pub allow_unneeded: Vec<String>,
    /// Complaints of the kernel from before the driver was loaded. They are not the driver's.
    pub boot_complaints: Vec<String>,
    /// Things worth knowing that are no reason for the verdict.
    pub notes: Vec<String>,
    /// Where in the guest the code of its modules began.
    #[serde(default)]
    pub module_texts: BTreeMap<String, u64>,
    /// Why the run could not be made.
    pub error: Option<ErrorRecord>,
    /// The last console lines, if the guest was lost.
    pub console_tail: Vec<String>,
    /// Seconds from the machine's start to PID 1, by the host's clock.
    pub boot_seconds: Option<f64>,
    /// Seconds from the beginning to the verdict.
    pub seconds: f64,
    /// When it began, in seconds since 1970.
    pub started: u64,
}

/// A workload's end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkloadResult {
    /// Its name.
    pub name: String,
    /// Its seed, derived from the run's.
    pub seed: u64,
    /// How it ended.
    pub outcome: WorkloadOutcome,
    /// Seconds of guest time.
    pub seconds: f64,
    /// Cases that ended.
    pub cases: u64,
    /// Cases that failed.
    pub failed: u64,
    /// Cases that could not be tried.
    pub skipped: u64,
    /// Why it did not pass.
    pub detail: Option<String>,
    /// What moved memory while it worked (cases `mover/NAME`), and in how many of its rounds.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub movers: BTreeMap<String, u64>,
}

/// How a workload ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WorkloadOutcome {
    /// Everything as expected.
    Pass,
    /// Something not as expected.
    Fail,
    /// It could not be tried here.
    Skip,
    /// It began and did not end.
    Unfinished,
    /// It did not begin.
    NotRun,
}

impl WorkloadOutcome {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Fail => "fail",
            Self::Skip => "skip",
            Self::Unfinished => "unfinished",
            Self::NotRun => "not-run",
        }
    }
}

/// What was checked, in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counters {
    /// Device accesses translated.
    pub accesses: u64,
    /// Distinct (context, page) pairs among them.
    pub distinct_pages: u64,
    /// Lookups the TLB could not answer.
    pub tlb_misses: u64,
    /// Walks of the device's page tables.
    pub walks: u64,
    /// Invalidations of ranges that the device had something of.
    pub invalidations: u64,
    /// Faults raised.
    pub faults: u64,
    /// Times that the fault buffer was full.
    #[serde(default)]
    pub fault_overflows: u64,
    /// Jobs that were under way when their queue or context was taken away: the races that workloads are for.
    #[serde(default)]
    pub jobs_cut_off: u64,
    /// Contexts bound.
    pub contexts: u64,
    /// Address spaces that had a context.
    pub address_spaces: u64,
    /// Address spaces whose release has returned.
    pub releases: u64,
    /// Contexts unregistered.
    pub unregisters: u64,
    /// Probes the witness missed.
    pub probes_missed: u64,
    /// Guest heartbeats.
    pub heartbeats: u64,
    /// Contexts that no address space could be told for.
    pub unassociated_contexts: u64,
    /// Records of the witness that could not be used, and contexts that were said to be another address space's.
    pub bad_records: u64,
    /// Times that the witness began; once in a run that was watched throughout.
    pub witness_starts: u64,
    /// Contexts that a reset of the function took away.
    pub contexts_lost: u64,
    /// Starts of invalidations after which the device was looked at.
    pub ranges_judged: u64,
    /// Steps of engines, and leaves set, that were held against the CPU's page tables.
    pub steps_compared: u64,
    /// Events that oracle and device and witness exchanged.
    pub events: u64,
}

/// A violation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ViolationRecord {
    /// The rule's name.
    pub rule: String,
    /// Handle of the context.
    pub context: Option<u64>,
    /// The same, for people.
    pub context_name: Option<String>,
    /// Address.
    pub address: Option<u64>,
    /// Frame.
    pub frame: Option<u64>,
    /// One sentence.
    pub summary: String,
    /// Workload in which it was found.
    pub workload: Option<String>,
    /// How often it was seen.
    pub count: u64,
    /// The last events.
    pub events: Vec<String>,
    /// The command that finds it again.
    pub replay: Option<String>,
}

/// A violation that is accepted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AllowedRecord {
    /// It.
    #[serde(flatten)]
    pub violation: ViolationRecord,
    /// Why.
    pub reason: String,
}

impl ViolationRecord {
    /// The record of one that was found in a trace: neither the workload nor the command is known there.
    #[must_use]
    pub fn of_trace(violation: &Violation) -> Self {
        Self { replay: None, ..Self::new(violation, None, String::new()) }
    }

    /// The record of a violation found in `workload`.
    #[must_use]
    pub fn new(violation: &Violation, workload: Option<String>, replay: String) -> Self {
        Self {
            rule: violation.rule.name().to_owned(),
            context: violation.context,
            context_name: violation.context_name.clone(),
            address: violation.address,
            frame: violation.frame,
            summary: violation.summary.clone(),
            workload,
            count: violation.count,
            events: violation.events.clone(),
            replay: Some(replay),
        }
    }
}

/// Why a run could not be made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ErrorRecord {
    /// `usage`, `inconclusive` or `environment`.
    pub kind: String,
    /// What was wrong.
    pub message: String,
    /// What can be done about it.
    pub remedy: Option<String>,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Results with something in every field.
    pub(crate) fn sample() -> Results {
        let mut violation = Violation::new(vgpu::oracle::Rule::ReleaseLate, "left one");
        violation.context = Some(0x1_0100_0003);
        violation.address = Some(0x7f00_0000_1000);
        Results {
            schema_version: SCHEMA_VERSION,
            version: "0.1.0".into(),
            command: "hmm-testbench run".into(),
            verdict: Verdict::Violation,
            exit_status: 1,
            reasons: vec!["release/late".into()],
            machine: "qemu".into(),
            nested: false,
            machine_version: Some("11.1.3".into()),
            accel: Some("tcg".into()),
            accel_reason: Some("/proc/cpuinfo has neither vmx nor svm".into()),
            kernel: "7.3.4".into(),
            kernel_name: "backports".into(),
            backend: "interval".into(),
            policy: None,
            driver: None,
            patches: vec!["a.patch".into()],
            seed: u64::MAX,
            cpus: 2,
            memory_bytes: 1 << 30,
            nodes: 1,
            atomics: "coherent".into(),
            oracle: true,
            workloads: vec![WorkloadResult {
                name: "release".into(),
                seed: 7,
                outcome: WorkloadOutcome::NotRun,
                seconds: 0.5,
                cases: 3,
                failed: 1,
                skipped: 1,
                detail: Some("not run: guest died".into()),
                movers: BTreeMap::new(),
            }],
            exec_status: Some(3),
            scenario: None,
            counters: Counters { accesses: 1, ..Counters::default() },
            violations: vec![ViolationRecord::new(&violation, Some("release".into()), "replay".into())],
            allowed: vec![AllowedRecord {
                violation: ViolationRecord::new(&violation, None, "replay".into()),
                reason: "exit's UNMAP does it".into(),
            }],
            allow_unneeded: vec!["a.toml:9: kernel/warn was allowed and did not happen".into()],
            boot_complaints: vec![],
            notes: vec!["note".into()],
            module_texts: BTreeMap::new(),
            error: None,
            console_tail: vec!["line".into()],
            boot_seconds: Some(2.5),
            seconds: 10.25,
            started: 1,
        }
    }

    #[test]
    fn results_are_read_back() {
        let mut sample = sample();
        sample.error = Some(ErrorRecord { kind: "usage".into(), message: "m".into(), remedy: None });
        let text = serde_json::to_string_pretty(&sample).unwrap();
        assert_eq!(serde_json::from_str::<Results>(&text).unwrap(), sample);
    }

    #[test]
    fn the_fields_that_scripts_read_are_there() {
        let value = serde_json::to_value(sample()).unwrap();
        for field in [
            "schema_version",
            "verdict",
            "machine",
            "accel",
            "kernel",
            "backend",
            "policy",
            "seed",
            "workloads",
            "counters",
            "violations",
        ] {
            assert!(value.get(field).is_some(), "{field}");
        }
        for field in ["name", "outcome", "seconds", "cases"] {
            assert!(value["workloads"][0].get(field).is_some(), "{field}");
        }
        for field in [
            "accesses",
            "distinct_pages",
            "tlb_misses",
            "walks",
            "invalidations",
            "faults",
            "contexts",
            "address_spaces",
            "releases",
            "unregisters",
            "probes_missed",
        ] {
            assert!(value["counters"].get(field).is_some(), "{field}");
        }
        for field in ["rule", "context", "address", "frame", "summary", "replay"] {
            assert!(value["violations"][0].get(field).is_some(), "{field}");
        }
        assert_eq!(value["verdict"], "violation");
        assert_eq!(value["violations"][0]["rule"], "release/late");
        assert_eq!(value["workloads"][0]["outcome"], "not-run");
    }
}
