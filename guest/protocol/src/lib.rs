// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the testbench and the program inside the guest say to each other.
//!
//! The host puts a [`Plan`] into the initramfs at [`PLAN_PATH`]. The guest's PID 1 follows it and answers with [`Message`]s,
//! one JSON object each, written to `/dev/hmm_witness` (and so synchronously known to the host), or, before the witness is
//! loaded and when it cannot be, as console lines that begin with [`CONSOLE_PREFIX`].
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

/// Where the plan lies in the initramfs.
pub const PLAN_PATH: &str = "/testbench/plan.json";
/// Where the driver's module lies in the initramfs.
pub const DRIVER_MODULE: &str = "/testbench/driver.ko";
/// Where modules lie in the initramfs that the kernel came with and that some workloads load.
pub const MODULES_DIR: &str = "/testbench/modules";
/// These modules, as paths below the kernel's own, without the endings that a package gives them.
pub const KERNEL_MODULES: &[&str] = &[
    "mm/zsmalloc",
    "crypto/lzo-rle",
    "lib/lz4/lz4_compress",
    "lib/lz4/lz4hc_compress",
    "drivers/block/zram/zram",
];
/// Where the witness's module lies in the initramfs.
pub const WITNESS_MODULE: &str = "/testbench/witness.ko";
/// Begins a console line that carries a [`Message`].
pub const CONSOLE_PREFIX: &str = "hmm-testbench: ";
/// Longest message in bytes, as JSON.
pub const MAX_MESSAGE: usize = 64 * 1024;

/// What the guest is to do.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct Plan {
    /// Workloads, in order.
    pub workloads: Vec<WorkloadPlan>,
    /// A shell command to run after the workloads, with the driver loaded.
    pub exec: Option<String>,
    /// Whether to end in an interactive shell on the console.
    pub shell: bool,
    /// Whether a driver is loaded at all.
    pub load_driver: bool,
    /// Parameters of the driver's module, as for insmod.
    pub driver_parameters: String,
}

const fn coherent() -> bool {
    true
}

/// One workload.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct WorkloadPlan {
    /// Its name, one of [`WORKLOADS`].
    pub name: String,
    /// Seed of everything random in it.
    pub seed: u64,
    /// How far it goes.
    pub extent: Extent,
    /// The platform makes the device's atomics on system memory coherent with the CPUs'; else it takes pages of anonymous memory
    /// for them, and no others.
    #[serde(default = "coherent")]
    pub coherent_atomics: bool,
    /// The scenario that it is, if it is none of [`WORKLOADS`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scenario: Option<ScenarioPlan>,
}

/// A scenario: who plays in it, and where its gates are. When they are opened is for the host to decide.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
pub struct ScenarioPlan {
    /// What is played, once a repetition.
    pub play: Play,
    /// The gates, and the functions that are watched.
    pub sites: Vec<SitePlan>,
    /// Heartbeats that a gate stays closed at the most.
    pub limit: u32,
}

/// What a scenario plays.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Play {
    /// One of [`CASTS`].
    Cast(String),
    /// A round of one of [`WORKLOADS`].
    Workload(String),
    /// A command, as for `--exec`.
    Command(String),
}

impl Default for Play {
    fn default() -> Self {
        Self::Cast(String::new())
    }
}

/// A place in the guest where tasks are held, or are looked for.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
pub struct SitePlan {
    /// Its number.
    pub id: u32,
    /// As the witness takes it, such as `return:hmm_range_fault`.
    pub place: String,
    /// Role of a task that has none when it comes there, or empty.
    #[serde(default)]
    pub gives: String,
    /// Nobody waits there.
    #[serde(default)]
    pub record: bool,
    /// A function that is watched for tasks asleep in it.
    #[serde(default)]
    pub watch: bool,
    /// It need not exist.
    #[serde(default)]
    pub optional: bool,
}

/// A cast's name and what it plays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CastInfo {
    /// Name in scenarios.
    pub name: &'static str,
    /// One line.
    pub about: &'static str,
}

/// Every cast, for scenarios to choose from.
pub const CASTS: &[CastInfo] = &[
    CastInfo {
        name: "fault-and-drop",
        about: "the device faults on a page (its fault handler) while thread D drops it; D comes to the gates user:drop and user:dropped",
    },
    CastInfo {
        name: "drop-and-fault",
        about: "thread D drops a page; while it does so the device faults on it; the faulting job is asked for after the gate user:fault",
    },
    CastInfo {
        name: "release-unregister",
        about: "a mirrored process ends (user:exit) while U unregisters its only mirror (user:unregister, user:unregistered)",
    },
    CastInfo {
        name: "release-once",
        about: "a process with twelve mirrors ends while U unregisters eleven of them; gates as for release-unregister",
    },
    CastInfo {
        name: "release-waits",
        about: "a process ends, its release callback waits for work that invalidates it, and B unregisters its other mirror (user:unregister, user:unregistered); P has seen it end at user:ended",
    },
    CastInfo {
        name: "unregister-in-release",
        about: "a process ends (user:exit), and its release callback unregisters its mirror",
    },
    CastInfo {
        name: "mirrors-sem",
        about: "A drops a page (user:a, user:a-done), B unregisters another mirror (user:b, user:b-done), C migrates a page with the device lock held across it (user:c, user:c-done)",
    },
    CastInfo {
        name: "mirrors-sem-narrow",
        about: "the same, C holding the device lock only to change what the device has",
    },
    CastInfo {
        name: "range-unheld",
        about: "a process is killed by K (user:kill, user:killed) in a fault of its device (user:fault), whose range does not hold its users",
    },
    CastInfo { name: "range-held", about: "the same, with a range that holds them" },
    CastInfo {
        name: "reclaim",
        about: "T unregisters a mirror (user:unregister) of a process that K kills (user:kill) and whose memory K reaps (user:reaped) until all is gone (user:over)",
    },
];

/// How far a workload goes.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Extent {
    /// The share of the default suite.
    Default,
    /// So many iterations.
    Iterations(u64),
    /// At least so long, in milliseconds of guest time.
    Milliseconds(u64),
}

/// A workload's name and what it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkloadInfo {
    /// Name on the command line.
    pub name: &'static str,
    /// One line.
    pub about: &'static str,
    /// Part of the default suite.
    pub suite: bool,
    /// A name that stands for it and others on the command line.
    pub group: Option<&'static str>,
    /// Resets the device with contexts on it, on purpose: that their end cannot be judged is no gap in the evidence.
    pub resets: bool,
}

/// Every workload; those of the default suite first, in its order.
pub const WORKLOADS: &[WorkloadInfo] = &[
    WorkloadInfo {
        name: "access",
        about: "the device reads and writes anonymous, file and shared memory; the CPU checks, both ways",
        suite: true,
        group: None,
        resets: false,
    },
    WorkloadInfo {
        name: "release",
        about: "a process exits, is killed or execs with live mappings and with engines running",
        suite: true,
        group: None,
        resets: false,
    },
    WorkloadInfo {
        name: "unregister",
        about: "the file is closed while engines run, from another thread, from a child that inherited it",
        suite: true,
        group: None,
        resets: false,
    },
    WorkloadInfo {
        name: "invalidate",
        about: "munmap, mremap, mprotect, madvise, fork and COW, hole punch, truncate under running engines; then the hole is touched from the device and must fault",
        suite: true,
        group: None,
        resets: false,
    },
    WorkloadInfo {
        name: "races",
        about: "memory goes at the hardest moment, made certain: a fault handler is held when it has found a page, an invalidation when the driver has been told",
        suite: true,
        group: None,
        resets: false,
    },
    WorkloadInfo {
        name: "stress",
        about: "threads of random memory operations against random device work, checked against a model",
        suite: true,
        group: None,
        resets: false,
    },
    WorkloadInfo {
        name: "migrate",
        about: "pages go to the device's memory and back, by request, by the CPU's access, by fork, close and exit; atomics on device-exclusive pages; skipped on kernels without device-private memory",
        suite: true,
        group: None,
        resets: false,
    },
    WorkloadInfo {
        name: "removal",
        about: "the device is taken from the driver through sysfs, or reset, while files are open and engines run; not part of the default suite",
        suite: false,
        group: None,
        resets: true,
    },
    WorkloadInfo {
        name: UNPLUG_WORKLOAD,
        about: "the device is pulled out under running engines, and put back in; only on the native machine, and not part of the default suite",
        suite: false,
        group: None,
        resets: true,
    },
    boundary(
        "khugepaged",
        "small pages become large ones under the device, by khugepaged (mTHP where the kernel has it) and MADV_COLLAPSE",
    ),
    boundary("damon", "DAMON watches the memory, and cools, reclaims and enlarges it"),
    boundary("soft-dirty", "clear_refs write-protects everything"),
    boundary("uprobes", "breakpoints are put into a mapped file and taken out"),
    boundary("ksm", "pages that are alike are merged, and part where one is written"),
    boundary(
        "swap",
        "memory goes to swap space (zram) and comes back: MADV_PAGEOUT, memory.reclaim, memory.max, MADV_FREE, swapoff",
    ),
    boundary(
        "writeback",
        "what the device wrote to a file is written back, reclaimed, unmapped, and must be on the disk",
    ),
    boundary("compaction", "pages move to make room"),
    boundary(NUMA_WORKLOAD, "hinting takes rights from pages, pages move between nodes"),
    boundary("userfaultfd", "a thread supplies pages and protects them from writing"),
    boundary("memory-failure", "a frame is broken, or given up before it breaks"),
    boundary("oom", "a process is killed for its memory, and reaped while its device runs"),
    boundary("process-madvise", "another process advises on the memory"),
    boundary(
        "ptrace",
        "another process writes to the memory, and breaks the sharing of pages nobody may write",
    ),
    boundary("mremap", "memory moves to another address, with MREMAP_DONTUNMAP too"),
    boundary("hugetlb", "memory of the pool of huge pages: COW, holes, truncation"),
];

/// The workload that needs a machine whose devices can be pulled out.
pub const UNPLUG_WORKLOAD: &str = "unplug";

/// The workload that needs a machine with more than one node.
pub const NUMA_WORKLOAD: &str = "numa";

/// The group of the workloads that shake the boundary between the mm core and a mirror.
pub const BOUNDARY: &str = "boundary";

const fn boundary(name: &'static str, about: &'static str) -> WorkloadInfo {
    WorkloadInfo { name, about, suite: false, group: Some(BOUNDARY), resets: false }
}

/// The names of a group's workloads; none if there is no such group.
pub fn of_group(group: &str) -> impl Iterator<Item = &'static str> {
    WORKLOADS.iter().filter(move |workload| workload.group == Some(group)).map(|workload| workload.name)
}

/// A workload that measures instead of testing. It is none of [`WORKLOADS`]: `bench` puts it into a plan, nothing else does.
pub const BENCH_WORKLOAD: &str = "bench";

/// What the guest says.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Message {
    /// PID 1 runs.
    Booted {
        /// `uname -r`.
        kernel: String,
        /// CPUs online.
        cpus: u32,
        /// Milliseconds since the kernel's clock began.
        uptime_ms: u64,
    },
    /// A module was loaded.
    ModuleLoaded {
        /// Its file name.
        module: String,
    },
    /// Where a loaded module's code begins. What the kernel prints about the module once it is gone are bare addresses.
    ModuleText {
        /// Its name in the kernel.
        module: String,
        /// The address.
        text: u64,
    },
    /// A workload begins.
    WorkloadStart {
        /// Which.
        workload: String,
        /// Its seed.
        seed: u64,
    },
    /// A case of a workload ended.
    Case(Case),
    /// The workload still makes progress.
    Progress {
        /// Which.
        workload: String,
        /// Iterations done.
        done: u64,
        /// Of how many, if known.
        total: Option<u64>,
    },
    /// A workload ended.
    WorkloadEnd {
        /// Which.
        workload: String,
        /// How.
        outcome: Outcome,
        /// Seconds of guest time.
        seconds: f64,
        /// Cases run.
        cases: u64,
        /// Cases that failed.
        failed: u64,
    },
    /// The guest wants something of the machine that it runs on.
    Ask {
        /// What.
        wish: Wish,
    },
    /// Something was measured; only the benchmarks' workload says so.
    Metric {
        /// What, such as `faults/one-queue`.
        name: String,
        /// How much.
        value: f64,
        /// Of what, such as `us`.
        unit: String,
    },
    /// The command of `--exec` ended.
    ExecEnd {
        /// Exit status, or 128 + the signal.
        status: i32,
    },
    /// The guest cannot go on.
    Fatal {
        /// Why.
        reason: String,
    },
    /// The plan is done; the guest powers off now.
    Done,
}

/// What a guest can want of its machine.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Wish {
    /// That the GPU is pulled out, without a warning to anybody.
    Unplug,
    /// That it is put back in.
    Plug,
    /// That the next jobs by which something would be written to the device's own memory fail and write nothing; 0: none any more. It is
    /// so when the message has been sent.
    FailCopies {
        /// How many.
        count: u32,
    },
}

/// How a case or workload ended.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// As expected.
    Pass,
    /// Not as expected.
    Fail,
    /// Could not be tried here; the detail says why.
    Skip,
}

/// One case: the JSON line that workloads print.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Case {
    /// Workload it belongs to.
    pub workload: String,
    /// Its name, unique in the workload, such as `munmap/running/thp`.
    pub case: String,
    /// Seed that makes it again.
    pub seed: u64,
    /// Iteration it was.
    pub iteration: u64,
    /// How it ended.
    pub outcome: Outcome,
    /// Seconds of guest time.
    pub seconds: f64,
    /// What went wrong, or why it was skipped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// Data that differs from the model; a `data/mismatch`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mismatch: Option<Mismatch>,
}

/// Data that is not what the model says. Where `expected` and `found` are the same, the access itself must not have worked:
/// the device reached a hole.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct Mismatch {
    /// Context handle.
    pub context: u64,
    /// Address of the word.
    pub address: u64,
    /// What the model says.
    pub expected: u64,
    /// What was found.
    pub found: u64,
    /// Who read it.
    pub reader: Reader,
}

/// Who read a word.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Reader {
    /// The CPU.
    Cpu,
    /// The device.
    Device,
    /// Nobody: the device's access failed for good, where it should have been served.
    Refused,
    /// Nobody: the context, or what it is to know of its newest jobs, has gone before its owner let it go. There is no address.
    Ended,
    /// Nobody: the context has gone, and somebody still holds pages that it had.
    Held,
}
