// SPDX-License-Identifier: MIT OR Apache-2.0
//! The device in this process, with memory and the smallest driver: what is measured here is the device alone.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vgpu::function::{Function as _, InterruptSwitch};
use vgpu::gpu::{Gpu, GpuConfig};
use vgpu::memory::{MemoryError, SystemMemory};
use vgpu::oracle::{Inspect, Oracle};
use vgpu_spec::command::{
    Command, OP_CTX_BIND, OP_CTX_SET_ROOT, OP_GRANT, OP_QUEUE_CREATE, OP_WRITE_PTE, PAGE_TABLE, STATUS_OK,
};
use vgpu_spec::handle::Handle;
use vgpu_spec::job::{Completion, JOB_OK, Job};
use vgpu_spec::pte;
use vgpu_spec::regs::gpu as regs;

use crate::failure::{Failure, Result};
use crate::runner::device::{Device, memfd};

/// Where memory begins on the bus.
const RAM: u64 = 0x1000_0000;
/// Commands of the ring.
pub(super) const RING: usize = 256;
/// Jobs of the queue.
pub(super) const JOBS: usize = 64;
/// Bytes of a large page.
pub(super) const HUGE: u64 = 1 << pte::HUGE_SHIFT;
/// Longer than anything here takes, on any machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A device with one context and one queue.
pub(super) struct Rig {
    gpu: Arc<Gpu>,
    pub(super) memory: Arc<SystemMemory>,
    // The device holds its oracle, the oracle only a weak reference to the device.
    _oracle: Arc<Oracle>,
    /// The context.
    pub(super) ctx: Handle,
    queue: Handle,
    commands: u64,
    done: u64,
    jobs: u64,
    completions: u64,
    fence: u64,
    free: u64,
    end: u64,
    tail: u32,
    submitted: u64,
    table_pages: u64,
    /// By level: address of its first byte, and the table.
    tables: Vec<(u8, u64, Handle)>,
}

impl Rig {
    /// A device with `ram` bytes of memory, all judged by an oracle as in a run. One engine: one thread does the work, as one
    /// does for what it is compared with.
    pub(super) fn new(ram: u64) -> Result<Self> {
        let config = GpuConfig { engines: 1, ..GpuConfig::default() };
        let memory = Arc::new(SystemMemory::new());
        memory.map(RAM, ram, &memfd("hmm-testbench-bench", ram)?, 0, true).map_err(trouble)?;
        let oracle = Device::oracle(true, &config);
        let vram = memfd("hmm-testbench-vram", config.vram_bytes)?;
        let sink = Arc::new(InterruptSwitch::new());
        let gpu = Gpu::new(config, Arc::clone(&memory), vram, sink, Arc::clone(&oracle))
            .map_err(|error| Failure::environment(format!("cannot make the device: {error}")))?;
        let inspect: Arc<dyn Inspect> = gpu.clone();
        oracle.attach(Arc::downgrade(&inspect));
        let mut rig = Self {
            gpu,
            memory,
            _oracle: oracle,
            ctx: Handle::NONE,
            queue: Handle::NONE,
            commands: 0,
            done: 0,
            jobs: 0,
            completions: 0,
            fence: 0,
            free: RAM,
            end: RAM + ram,
            tail: 0,
            submitted: 0,
            table_pages: 0,
            tables: Vec::new(),
        };
        rig.start()?;
        Ok(rig)
    }

    fn start(&mut self) -> Result<()> {
        self.commands = self.alloc(64 * RING as u64)?;
        self.done = self.alloc(8)?;
        self.jobs = self.alloc(64 * JOBS as u64)?;
        self.completions = self.alloc(32 * JOBS as u64)?;
        self.fence = self.alloc(8)?;
        let faults = self.alloc(64 << 4)?;
        // Memory and bus mastering, as a driver turns them on.
        let _ = self.gpu.config_write(4, &[6, 0]);
        let bases = [
            (regs::CMD_BASE_LO, self.commands),
            (regs::CMD_DONE_LO, self.done),
            (regs::FAULT_BASE_LO, faults),
        ];
        for (register, address) in bases {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(regs::CMD_SIZE, RING.ilog2());
        self.write(regs::FAULT_SIZE, 4);
        self.write(regs::CTRL, regs::CTRL_ENABLE);
        self.ctx = Handle(self.command(OP_CTX_BIND, [1, 0, 0, 0, 0])?);
        let root = self.table(pte::ROOT_LEVEL, 0)?;
        self.command(OP_CTX_SET_ROOT, [root.0, 0, 0, 0, 0])?;
        let queue = [self.jobs, JOBS.ilog2().into(), self.completions, self.fence, 0];
        self.queue = Handle(self.command(OP_QUEUE_CREATE, queue)?);
        Ok(())
    }

    fn write(&self, register: u32, value: u32) {
        let _ = self.gpu.bar_write(0, register.into(), &value.to_le_bytes());
    }

    /// Takes memory, aligned to 4 KiB, or to 2 MiB if it is that large.
    pub(super) fn alloc(&mut self, bytes: u64) -> Result<u64> {
        let bytes = bytes.next_multiple_of(4096);
        let start = self.free.next_multiple_of(if bytes >= HUGE { HUGE } else { 4096 });
        if start + bytes > self.end {
            return Err(defect("the benchmark's memory is used up"));
        }
        self.free = start + bytes;
        Ok(start)
    }

    /// Runs commands, at most [`RING`], behind one doorbell; all must succeed.
    pub(super) fn run(&mut self, commands: &[Command]) -> Result<()> {
        let first = self.tail;
        {
            let memory = self.memory.snapshot();
            for command in commands {
                memory.write_object(self.slot(self.tail), command).map_err(trouble)?;
                self.tail = self.tail.wrapping_add(1);
            }
        }
        self.write(regs::CMD_TAIL, self.tail);
        let (memory, tail) = (self.memory.snapshot(), self.tail);
        wait(|| Ok(memory.load_u32(self.done).map_err(trouble)? == tail))?;
        for index in 0..commands.len() as u32 {
            let status = memory.load_u32(self.slot(first.wrapping_add(index)) + 4).map_err(trouble)?;
            if status != STATUS_OK {
                return Err(defect(&format!("a command ended with status {status}")));
            }
        }
        Ok(())
    }

    fn slot(&self, index: u32) -> u64 {
        self.commands + u64::from(index % RING as u32) * 64
    }

    /// Runs one command of the context; its result.
    pub(super) fn command(&mut self, op: u16, arg: [u64; 5]) -> Result<u64> {
        let slot = self.slot(self.tail);
        self.run(&[Command { op, ctx: self.ctx.0, arg, ..Command::default() }])?;
        let command: Command = self.memory.snapshot().read_object(slot).map_err(trouble)?;
        Ok(command.result)
    }

    /// The table of `level` for `va`, linked to those above.
    pub(super) fn table(&mut self, level: u8, va: u64) -> Result<Handle> {
        let shift = pte::PAGE_SHIFT + 9 * (u32::from(level) + 1);
        let base = va >> shift;
        if let Some((.., table)) = self.tables.iter().find(|table| (table.0, table.1) == (level, base)) {
            return Ok(*table);
        }
        let page = Handle(self.command(OP_GRANT, [PAGE_TABLE.into(), self.table_pages, 0, 0, 0])?);
        self.table_pages += 1;
        if level < pte::ROOT_LEVEL {
            let above = self.table(level + 1, va)?;
            let entry = pte::VALID | u64::from(page.index()) << pte::PAGE_SHIFT;
            self.command(OP_WRITE_PTE, [above.0, pte::index(va, level + 1) as u64, entry, 0, 0])?;
        }
        self.tables.push((level, base, page));
        Ok(page)
    }

    /// Writes the leaf of `va`, with all rights: 2 MiB if it has the HUGE bit, else 4 KiB.
    pub(super) fn map(&mut self, va: u64, leaf: u64) -> Result<()> {
        let level = u8::from(leaf & pte::HUGE != 0);
        let table = self.table(level, va)?;
        let leaf = leaf | pte::VALID | pte::WRITE | pte::ATOMIC;
        self.command(OP_WRITE_PTE, [table.0, pte::index(va, level) as u64, leaf, 0, 0]).map(drop)
    }

    /// Runs jobs, at most [`JOBS`], behind one doorbell; all must succeed.
    pub(super) fn jobs(&mut self, jobs: impl Iterator<Item = Job>) -> Result<()> {
        let memory = self.memory.snapshot();
        let first = self.submitted;
        for mut job in jobs {
            let at = self.submitted % JOBS as u64;
            self.submitted += 1;
            job.fence = self.submitted;
            memory.write_object(self.completions + at * 32, &Completion::default()).map_err(trouble)?;
            memory.write_object(self.jobs + at * 64, &job).map_err(trouble)?;
        }
        let doorbell = self.submitted as u32 & 0xffff | self.queue.generation() << 16;
        self.write(regs::QUEUE_DOORBELL + 4 * self.queue.index(), doorbell);
        let fence = memory.atomic_u64(self.fence, false).map_err(trouble)?;
        wait(|| Ok(fence.load(Ordering::Acquire) == self.submitted))?;
        for index in first..self.submitted {
            let at = self.completions + index % JOBS as u64 * 32;
            let completion: Completion = memory.read_object(at).map_err(trouble)?;
            if completion.status != JOB_OK {
                return Err(defect(&format!("a job ended with status {}", completion.status)));
            }
        }
        Ok(())
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.gpu.shutdown();
    }
}

/// Waits for the device: with a few looks in a row first, then less often, so that its thread has the processor.
fn wait(mut so: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    let mut looks = 0_u32;
    while !so()? {
        looks += 1;
        if looks < 200 {
            std::thread::yield_now();
        } else if start.elapsed() > PATIENCE {
            return Err(defect("the device does not answer"));
        } else {
            std::thread::sleep(Duration::from_micros(20));
        }
    }
    Ok(())
}

fn defect(what: &str) -> Failure {
    Failure::inconclusive(format!("{what} (a defect)"))
}

#[allow(clippy::needless_pass_by_value, reason = "for map_err")]
pub(super) fn trouble(error: MemoryError) -> Failure {
    defect(&format!("the benchmark's memory: {error}"))
}
