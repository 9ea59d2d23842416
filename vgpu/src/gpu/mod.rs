// SPDX-License-Identifier: MIT OR Apache-2.0
//! The virtual GPU.
//!
//! One thread processes commands, one thread an engine runs jobs, and register accesses run on the machine's threads.
//!
//! | state | who changes it |
//! |---|---|
//! | contexts, page owners, queue slots | the holder of the core's lock: the command processor, or a reset |
//! | table entries | as above, and the debugging window; under the tables' link lock |
//! | a queue's run state | who has the queue from the scheduler |
//! | registers, in-flight slots | anybody, atomics |
//!
//! Lock order, outermost first. A thread that holds one takes only those further down:
//! 1. `core` (command processor, reset)
//! 2. `Queue::run` (engines for a turn; the core only for a queue that it has claimed or that has ended)
//! 3. the tables' links
//! 4. `Scheduler::inner`, `ring_request`, `pci`, the fault table
//! 5. TLBs, a context's `seen` and `cleared`; nothing is taken under them
//!
//! The oracle and the interrupt sink may be called under any of 1 to 4; they do not call back.

mod bar;
#[cfg(any(test, feature = "testing"))]
mod check;
mod checked;
mod command;
mod context;
mod counters;
mod device;
mod engine;
mod exec;
mod fault;
mod inflight;
mod inspect;
mod irq;
mod jitter;
mod ops;
mod pages;
mod queue;
mod registers;
mod sched;
mod tables;
#[cfg(test)]
mod tests;
mod tlb;
mod work;

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::thread::JoinHandle;

use parking_lot::Mutex;
use vgpu_spec::handle::Handle;
use vgpu_spec::regs::gpu::{BAR_BYTES, MAX_QUEUES, VECTORS};

pub use counters::GpuCounters;

use crate::function::{Backing, Bar, Effects, Function, InterruptSink};
use crate::memory::{MemoryError, Region, SystemMemory};
use crate::oracle::{ContextView, Inspect, Oracle, RangeView, RingView, Written};
use crate::pci::{BarShape, CLASS_GPU, ConfigSpace, Identity, MSIX_BAR_BYTES, MsixShape};
use device::Device;
use engine::Engine;

/// How large the device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuConfig {
    /// Contexts, 1 to 4096.
    pub contexts: u32,
    /// Engines, 1 to 16.
    pub engines: u32,
    /// Queues, 1 to 256.
    pub queues: u32,
    /// Pages for page tables, 1 to 65536. By default few enough that a workload can use them up within a second.
    pub table_pages: u32,
    /// Bytes of VRAM in BAR2, a power of two from 4 KiB to 64 GiB.
    pub vram_bytes: u64,
    /// Offer MSI-X beside MSI.
    pub msix: bool,
    /// Translations of each size that an engine keeps per context; `None` is all of them until told otherwise (2^18, in fact).
    pub tlb_entries: Option<usize>,
    /// Seed of moments in which the device takes its time, so that drivers that do not wait for it are found out; `None` for a
    /// device that is as fast as it can be.
    pub jitter: Option<u64>,
    /// Atomics on system memory are coherent with the CPUs': `CAP_COHERENT_ATOMICS`. Else they are a load and a store, between
    /// which others get in.
    pub coherent_atomics: bool,
}

impl Default for GpuConfig {
    fn default() -> Self {
        Self {
            contexts: 64,
            engines: 2,
            queues: 128,
            table_pages: 2048,
            vram_bytes: 16 << 20,
            msix: true,
            tlb_entries: None,
            jitter: None,
            coherent_atomics: true,
        }
    }
}

/// Why a device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum GpuError {
    /// A number of the configuration is out of range.
    #[error("the device cannot have {name} = {value}")]
    Config {
        /// Its name.
        name: &'static str,
        /// What was asked for.
        value: u64,
    },
    /// The VRAM file does not do.
    #[error("VRAM: {0}")]
    Vram(#[from] MemoryError),
    /// A thread or a file could not be made.
    #[error("starting the device: {0}")]
    Host(#[from] std::io::Error),
}

impl GpuConfig {
    fn check(&self) -> Result<(), GpuError> {
        let vram = self.vram_bytes;
        for (name, value, good) in [
            ("contexts", self.contexts.into(), (1..=4096).contains(&self.contexts)),
            ("engines", self.engines.into(), (1..=16).contains(&self.engines)),
            ("queues", self.queues.into(), (1..=MAX_QUEUES).contains(&self.queues)),
            ("table_pages", self.table_pages.into(), (1..=65536).contains(&self.table_pages)),
            ("vram_bytes", vram, vram.is_power_of_two() && (1 << 12..=1 << 36).contains(&vram)),
            ("tlb_entries", 0, self.tlb_entries != Some(0)),
        ] {
            if !good {
                return Err(GpuError::Config { name, value });
            }
        }
        Ok(())
    }

    fn config_space(&self) -> ConfigSpace {
        let identity = Identity {
            vendor: vgpu_spec::PCI_VENDOR_ID,
            device: vgpu_spec::PCI_DEVICE_GPU,
            class: CLASS_GPU,
            revision: 1,
        };
        let mut bars = vec![
            BarShape { index: 0, size: BAR_BYTES, prefetchable: false },
            BarShape { index: 2, size: self.vram_bytes, prefetchable: true },
        ];
        if self.msix {
            bars.push(BarShape { index: 4, size: MSIX_BAR_BYTES, prefetchable: false });
        }
        let vectors = VECTORS as u16;
        ConfigSpace::new(identity, &bars, vectors, self.msix.then(|| MsixShape::in_bar4(vectors)))
    }
}

/// The virtual GPU: a PCI function with threads of its own. They end with [`Gpu::shutdown`] or when it is dropped.
pub struct Gpu {
    device: Arc<Device>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Gpu {
    /// Makes a device, in reset, and starts its threads. The first `vram_bytes` of `vram` are its VRAM.
    pub fn new(
        config: GpuConfig,
        memory: Arc<SystemMemory>,
        vram: File,
        interrupts: Arc<dyn InterruptSink>,
        oracle: Arc<Oracle>,
    ) -> Result<Arc<Self>, GpuError> {
        config.check()?;
        let region = Region::new(0, config.vram_bytes, &vram, 0, true)?;
        let interrupts = irq::Interrupts::new(interrupts);
        let device =
            Arc::new(Device::new(config, memory, oracle, (region, vram), interrupts, config.config_space()));
        let gpu = Arc::new(Self { device, threads: Mutex::default() });
        let start = |name: String, body: Box<dyn FnOnce(&Device) + Send>| {
            let device = Arc::clone(&gpu.device);
            std::thread::Builder::new().name(name).spawn(move || body(&device))
        };
        // If one cannot be started, dropping `gpu` ends the others.
        gpu.threads.lock().push(start("vgpu-command".into(), Box::new(|device| device.command_thread()))?);
        for index in 0..config.engines as usize {
            let body = Box::new(move |device: &Device| Engine::new(device, index).run());
            gpu.threads.lock().push(start(format!("vgpu-engine{index}"), body)?);
        }
        Ok(gpu)
    }

    /// Ends the device's threads; it does nothing any more. May be called twice.
    pub fn shutdown(&self) {
        self.device.stop.store(true, SeqCst);
        self.device.sched.stop();
        self.device.signal.notify();
        let threads = std::mem::take(&mut *self.threads.lock());
        for thread in threads {
            // A thread that panicked has said so on its own.
            let _ = thread.join();
        }
    }

    /// Has the next `count` jobs that copy or fill, and whose first address is in VRAM, end with JOB_BUS_ERROR having written nothing: an
    /// engine that has failed. 0 ends that, and so does a reset.
    pub fn fail_copies(&self, count: u32) {
        self.device.copies_fail.store(count, SeqCst);
    }

    /// What the device has counted.
    #[must_use]
    pub fn counters(&self) -> GpuCounters {
        self.device.counted()
    }

    /// How many accesses are parked by a fault at the moment.
    #[must_use]
    pub fn parked_faults(&self) -> u32 {
        self.device.faults.parked(None)
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        self.shutdown();
    }
}

impl Inspect for Gpu {
    fn range(&self, ctx: Handle, range: (u64, u64), write_only: bool, most: usize) -> Option<RangeView> {
        self.device.range_view(ctx, range, write_only, most)
    }
    fn rings(&self, range: (u64, u64)) -> Vec<RingView> {
        self.device.rings(range)
    }
    fn take_written(&self, ctx: Handle, range: (u64, u64)) -> Vec<Written> {
        self.device.take_written(ctx, range)
    }
    fn context(&self, ctx: Handle) -> Option<ContextView> {
        self.device.view(ctx)
    }
}

impl Function for Gpu {
    fn bars(&self) -> Vec<Bar<'_>> {
        let config = &self.device.config;
        let mut bars = vec![
            Bar { index: 0, size: BAR_BYTES, prefetchable: false, backing: Backing::Trapped },
            Bar {
                index: 2,
                size: config.vram_bytes,
                prefetchable: true,
                backing: Backing::Mapped(&self.device.vram_file),
            },
        ];
        if config.msix {
            let backing = Backing::InterruptTable;
            bars.push(Bar { index: 4, size: MSIX_BAR_BYTES, prefetchable: false, backing });
        }
        bars
    }

    fn vectors(&self) -> u16 {
        VECTORS as u16
    }

    fn has_msix(&self) -> bool {
        self.device.config.msix
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.device.pci.lock().read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Effects {
        let effect = self.device.pci.lock().write(offset, data);
        if let Some(on) = effect.bus_master {
            self.device.bus_master.store(on, SeqCst);
            self.device.power_changed();
        }
        if effect.flr { self.reset() } else { Effects::default() }
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        match bar {
            0 => self.device.register_read(offset, data),
            2 => self.device.vram_read(offset, data),
            _ => data.fill(0xff),
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> Effects {
        match bar {
            0 => return self.device.register_write(offset, data),
            2 => self.device.vram_write(offset, data),
            _ => {}
        }
        Effects::default()
    }

    fn reset(&self) -> Effects {
        self.device.pci.lock().reset();
        self.device.bus_master.store(false, SeqCst);
        self.device.reset();
        Effects::default()
    }
}
