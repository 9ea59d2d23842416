// SPDX-License-Identifier: MIT OR Apache-2.0
//! The device side of a run: GPU, witness and oracle, and how a machine gets them.

use std::fs::File;
use std::sync::{Arc, OnceLock, Weak};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vgpu::function::{Function, InterruptSwitch};
use vgpu::gpu::{Gpu, GpuConfig, GpuCounters};
use vgpu::memory::SystemMemory;
use vgpu::oracle::{Inspect, Oracle, OracleConfig, Violation};
use vgpu::witness::{GuestSink, Witness};
use vgpu_spec::regs::gpu::{FAULT_GET, FAULT_PUT};

use super::RunConfig;
use super::hang::Standing;
use super::session::DeviceSide;
use crate::failure::{Failure, Result};
use crate::gates::engine::Engine;
use crate::machine::FunctionSlot;
use crate::report::results::Counters;

/// The GPU's name on a machine.
pub const GPU: &str = "gpu";

/// Violations kept at most where some are accepted.
const WITH_ALLOWED: usize = 2000;

/// GPU, witness and oracle, connected to each other.
pub struct Device {
    gpu: Arc<Gpu>,
    witness: Arc<Witness>,
    oracle: Arc<Oracle>,
    gpu_memory: Arc<SystemMemory>,
    witness_memory: Arc<SystemMemory>,
    gpu_interrupts: Arc<InterruptSwitch>,
    witness_interrupts: Arc<InterruptSwitch>,
    engine: OnceLock<Arc<Engine>>,
}

impl Device {
    /// Makes them.
    pub fn new(oracle: Arc<Oracle>, config: GpuConfig, sink: Arc<dyn GuestSink>) -> Result<Self> {
        let vram = memfd("hmm-testbench-vram", config.vram_bytes)?;
        let gpu_memory = Arc::new(SystemMemory::new());
        let witness_memory = Arc::new(SystemMemory::new());
        let gpu_interrupts = Arc::new(InterruptSwitch::new());
        let interrupts = Arc::clone(&gpu_interrupts);
        let gpu = Gpu::new(config, Arc::clone(&gpu_memory), vram, interrupts, Arc::clone(&oracle))
            .map_err(|error| Failure::environment(format!("cannot make the device: {error}")))?;
        let inspect: Arc<dyn Inspect> = gpu.clone();
        oracle.attach(Arc::downgrade(&inspect));
        // Without an IOMMU in the guest a bus address is a physical one, for all functions.
        oracle.attach_memory(Arc::clone(&witness_memory));
        let witness = Witness::new(Arc::clone(&witness_memory), Arc::clone(&oracle), sink);
        Ok(Self {
            gpu,
            witness,
            oracle,
            gpu_memory,
            witness_memory,
            gpu_interrupts,
            witness_interrupts: Arc::new(InterruptSwitch::new()),
            engine: OnceLock::new(),
        })
    }

    /// An oracle for a device of this size.
    #[must_use]
    pub fn oracle(enabled: bool, config: &GpuConfig) -> Arc<Oracle> {
        let GpuConfig { contexts, coherent_atomics, .. } = *config;
        Oracle::new(OracleConfig { enabled, contexts, coherent_atomics, ..OracleConfig::default() })
    }

    /// The oracle of a run, whose trace goes to `trace`, if it is to be kept.
    pub(super) fn oracle_of(run: &RunConfig, device: &GpuConfig, trace: Option<File>) -> Result<Arc<Oracle>> {
        let default = OracleConfig::default();
        let config = OracleConfig {
            enabled: run.oracle,
            contexts: device.contexts,
            coherent_atomics: device.coherent_atomics,
            trace_bytes: run.trace_bytes,
            // What is accepted must not fill the list before what is not.
            max_violations: if run.allow.is_some() { WITH_ALLOWED } else { default.max_violations },
            ..default
        };
        match trace.filter(|_| run.oracle) {
            None => Ok(Oracle::new(config)),
            Some(file) => Oracle::with_trace(config, file, &run.command)
                .map_err(|error| Failure::environment(format!("cannot map the trace: {error}"))),
        }
    }

    /// Who decides on gates. Before the guest runs.
    pub fn conduct(&self, engine: Arc<Engine>) {
        self.witness.conduct(engine.clone());
        // The first one stays.
        let _ = self.engine.set(engine);
    }

    /// The GPU, for as long as this is there.
    #[must_use]
    pub fn gpu(&self) -> Weak<Gpu> {
        Arc::downgrade(&self.gpu)
    }

    /// What a machine is given.
    #[must_use]
    pub fn functions(&self) -> Vec<FunctionSlot> {
        vec![
            FunctionSlot {
                name: GPU,
                function: self.gpu.clone(),
                memory: Arc::clone(&self.gpu_memory),
                interrupts: Arc::clone(&self.gpu_interrupts),
            },
            FunctionSlot {
                name: "witness",
                function: self.witness.clone(),
                memory: Arc::clone(&self.witness_memory),
                interrupts: Arc::clone(&self.witness_interrupts),
            },
        ]
    }

    /// What device and oracle have counted.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let gpu = self.gpu.counters();
        let oracle = self.oracle.counters();
        Counters {
            accesses: gpu.accesses,
            distinct_pages: gpu.distinct_pages,
            tlb_misses: gpu.tlb_misses,
            walks: gpu.walks,
            invalidations: gpu.invalidations,
            faults: gpu.faults,
            fault_overflows: gpu.fault_overflows,
            jobs_cut_off: gpu.jobs_cut_off,
            contexts: gpu.contexts,
            address_spaces: oracle.address_spaces,
            releases: oracle.releases,
            unregisters: oracle.unregisters,
            probes_missed: oracle.probes_missed,
            heartbeats: oracle.heartbeats,
            unassociated_contexts: oracle.unassociated_contexts,
            bad_records: oracle.bad_records.saturating_add(oracle.bad_associations),
            witness_starts: oracle.witness_starts,
            contexts_lost: oracle.contexts_lost,
            ranges_judged: oracle.ranges_judged,
            steps_compared: oracle.steps_compared,
            events: oracle.events,
        }
    }

    fn register(&self, offset: u32) -> u32 {
        let mut data = [0; 4];
        self.gpu.bar_read(0, u64::from(offset), &mut data);
        u32::from_le_bytes(data)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.gpu.shutdown();
    }
}

impl DeviceSide for Device {
    fn activity(&self) -> u64 {
        let GpuCounters { accesses, jobs, commands, faults, contexts, .. } = self.gpu.counters();
        let events = self.oracle.counters().events;
        [accesses, jobs, commands, faults, contexts, events].into_iter().fold(0, u64::wrapping_add)
    }
    fn standing(&self) -> Standing {
        let untaken = self.register(FAULT_PUT).wrapping_sub(self.register(FAULT_GET));
        Standing {
            activity: self.activity(),
            faults_parked: self.gpu.parked_faults().into(),
            faults_untaken: untaken.into(),
            interrupts: self.gpu.counters().interrupts,
        }
    }
    fn request(&self, bits: u32) {
        self.witness.request(bits);
    }
    fn roles(&self) -> Vec<(u32, String)> {
        self.engine.get().map_or(Vec::new(), |engine| engine.roles())
    }
    fn moves(&self) -> u64 {
        self.engine.get().map_or(0, |engine| engine.moves())
    }
    fn report(&self, violation: Violation) {
        self.oracle.report(violation);
    }
}

/// An anonymous file of this size. It cannot be made shorter, by whoever else gets it: touching a mapping beyond the end of its
/// file would end this process.
pub fn memfd(name: &str, bytes: u64) -> Result<File> {
    let fail = |error: std::io::Error| {
        Failure::environment(format!("cannot make {bytes} bytes of shared memory: {error}"))
    };
    let file = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)
        .map(File::from)
        .map_err(|errno| fail(errno.into()))?;
    file.set_len(bytes).map_err(fail)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(|errno| fail(errno.into()))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_shortens_shared_memory() {
        let file = memfd("test", 8192).unwrap();
        assert!(file.set_len(4096).is_err());
        assert_eq!(file.metadata().unwrap().len(), 8192);
    }
}
