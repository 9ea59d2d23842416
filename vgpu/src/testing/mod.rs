// SPDX-License-Identifier: MIT OR Apache-2.0
//! For tests, benchmarks and fuzz targets: a machine of two files and a tiny driver.

pub mod input;

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use vgpu_spec::command::{
    Command, OP_CLEAR_PTES, OP_CTX_BIND, OP_CTX_RELEASE, OP_CTX_SET_ROOT, OP_CTX_UNBIND, OP_GRANT,
    OP_INVALIDATE, OP_QUEUE_CREATE, OP_QUEUE_DESTROY, OP_RETURN, OP_WRITE_PTE, PAGE_TABLE, STATUS_OK,
};
use vgpu_spec::fault::FaultEntry;
use vgpu_spec::handle::Handle;
use vgpu_spec::job::{Completion, Job};
use vgpu_spec::pte;
use vgpu_spec::regs::gpu as regs;

use crate::function::{Function as _, InterruptSink};
use crate::gpu::{Gpu, GpuConfig};
use crate::memory::SystemMemory;
use crate::oracle::{Oracle, OracleConfig};

/// A file of `bytes` zero bytes in memory that nobody else can open.
///
/// # Panics
/// If the host cannot make one.
#[must_use]
#[allow(clippy::expect_used, reason = "for tests only")]
pub fn anonymous_file(bytes: u64) -> File {
    let open = |folder: &std::path::Path| {
        File::options().read(true).write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(folder)
    };
    let file = open("/dev/shm".as_ref()).or_else(|_| open(&std::env::temp_dir()));
    let file = file.expect("an anonymous file in /dev/shm or the temporary folder");
    file.set_len(bytes).expect("room for the file");
    file
}

/// Where the rig's guest memory begins on the bus.
pub const RAM: u64 = 0x1000_0000;
/// How long a test waits for the device before it fails.
const PATIENCE: Duration = Duration::from_secs(20);
const CMD_LOG2: u32 = 8;
const FAULT_LOG2: u32 = 4;

/// Counts interrupts.
#[derive(Default)]
pub struct Interrupts(pub [AtomicU64; 3]);

impl InterruptSink for Interrupts {
    fn raise(&self, vector: u16) {
        if let Some(counter) = self.0.get(usize::from(vector)) {
            counter.fetch_add(1, SeqCst);
        }
    }
}

/// A device, guest memory, and what a driver needs to talk to it.
pub struct Rig {
    /// The device.
    pub gpu: Arc<Gpu>,
    /// Its memory: one region from [`RAM`] on.
    pub memory: Arc<SystemMemory>,
    /// What judges it.
    pub oracle: Arc<Oracle>,
    /// Interrupts that arrived.
    pub interrupts: Arc<Interrupts>,
    /// The command ring's address.
    pub commands: u64,
    /// The word that the device writes CMD_DONE to.
    pub done: u64,
    /// The fault buffer's address.
    pub faults: u64,
    free: AtomicU64,
    end: u64,
    tail: AtomicU32,
    fault_get: AtomicU32,
    pages: AtomicU32,
}

impl Rig {
    /// A device of that shape with `ram` bytes of memory, its ring and fault buffer set up, enabled.
    #[must_use]
    pub fn new(config: GpuConfig, ram: u64) -> Self {
        let rig = Self::cold(config, ram);
        rig.start();
        rig
    }

    /// The same, still in reset.
    #[must_use]
    #[allow(clippy::expect_used, reason = "for tests only")]
    pub fn cold(config: GpuConfig, ram: u64) -> Self {
        let memory = Arc::new(SystemMemory::new());
        memory.map(RAM, ram, &anonymous_file(ram), 0, true).expect("mapping the rig's memory");
        let interrupts = Arc::new(Interrupts::default());
        let oracle = Oracle::new(OracleConfig { contexts: config.contexts, ..OracleConfig::default() });
        let vram = anonymous_file(config.vram_bytes);
        let gpu =
            Gpu::new(config, Arc::clone(&memory), vram, Arc::clone(&interrupts) as _, Arc::clone(&oracle))
                .expect("making the device");
        let attached: Weak<Gpu> = Arc::downgrade(&gpu);
        oracle.attach(attached);
        let mut rig = Self {
            gpu,
            memory,
            oracle,
            interrupts,
            commands: 0,
            done: 0,
            faults: 0,
            free: AtomicU64::new(RAM),
            end: RAM + ram,
            tail: AtomicU32::new(0),
            fault_get: AtomicU32::new(0),
            pages: AtomicU32::new(0),
        };
        rig.commands = rig.alloc(64 << CMD_LOG2);
        rig.faults = rig.alloc(64 << FAULT_LOG2);
        rig.done = rig.alloc(4096);
        rig
    }

    /// Sets the ring and the fault buffer up and enables everything.
    pub fn start(&self) {
        let _ = self.gpu.config_write(4, &[6, 0]);
        self.tail.store(0, SeqCst);
        self.fault_get.store(0, SeqCst);
        self.put32(self.done, 0);
        for (register, value) in [
            (regs::CMD_BASE_LO, self.commands),
            (regs::CMD_DONE_LO, self.done),
            (regs::FAULT_BASE_LO, self.faults),
        ] {
            self.write(register, value as u32);
            self.write(register + 4, (value >> 32) as u32);
        }
        self.write(regs::CMD_SIZE, CMD_LOG2);
        self.write(regs::FAULT_SIZE, FAULT_LOG2);
        self.write(regs::IRQ_ENABLE, 7);
        self.write(regs::CTRL, regs::CTRL_ENABLE);
    }

    /// Takes whole pages of guest memory, aligned to their size up to 2 MiB.
    #[must_use]
    pub fn alloc(&self, bytes: u64) -> u64 {
        let bytes = bytes.next_multiple_of(4096);
        let align = bytes.next_power_of_two().min(2 << 20);
        let start = self.free.load(SeqCst).next_multiple_of(align);
        assert!(start + bytes <= self.end, "the rig's memory is used up");
        self.free.store(start + bytes, SeqCst);
        start
    }

    /// Writes a register.
    pub fn write(&self, register: u32, value: u32) {
        let effects = self.gpu.bar_write(0, register.into(), &value.to_le_bytes());
        for vector in 0..3 {
            if effects.interrupts & 1 << vector != 0 {
                self.interrupts.raise(vector);
            }
        }
    }

    /// Reads a register.
    #[must_use]
    pub fn read(&self, register: u32) -> u32 {
        let mut bytes = [0; 4];
        self.gpu.bar_read(0, register.into(), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Writes a word of guest memory.
    #[allow(clippy::expect_used, reason = "for tests only")]
    pub fn put(&self, address: u64, value: u64) {
        self.memory.snapshot().store_u64(address, value).expect("guest memory");
    }
    /// Reads a word of guest memory.
    #[must_use]
    #[allow(clippy::expect_used, reason = "for tests only")]
    pub fn get(&self, address: u64) -> u64 {
        self.memory.snapshot().atomic_u64(address, false).expect("guest memory").load(SeqCst)
    }
    /// Writes half a word of guest memory.
    #[allow(clippy::expect_used, reason = "for tests only")]
    pub fn put32(&self, address: u64, value: u32) {
        self.memory.snapshot().store_u32(address, value).expect("guest memory");
    }
    /// Reads half a word of guest memory.
    #[must_use]
    #[allow(clippy::expect_used, reason = "for tests only")]
    pub fn get32(&self, address: u64) -> u32 {
        self.memory.snapshot().load_u32(address).expect("guest memory")
    }

    /// Waits until it is so.
    #[allow(clippy::panic, reason = "for tests only")]
    pub fn until(&self, what: &str, mut so: impl FnMut() -> bool) {
        let start = Instant::now();
        let mut spins = 0_u32;
        while !so() {
            assert!(
                start.elapsed() < PATIENCE,
                "waited too long for {what}: head {}, done {}, error {:#x}, {:?}",
                self.read(regs::CMD_HEAD),
                self.get32(self.done),
                self.read(regs::ERROR),
                self.gpu.counters()
            );
            spins += 1;
            if spins > 100 {
                std::thread::sleep(Duration::from_micros(50));
            } else {
                std::thread::yield_now();
            }
        }
    }

    /// Puts commands into the ring and rings once; the index behind the last.
    #[allow(clippy::expect_used, reason = "for tests only")]
    pub fn submit(&self, commands: &[Command]) -> u32 {
        let mut tail = self.tail.load(SeqCst);
        for command in commands {
            self.until("room in the command ring", || {
                tail.wrapping_sub(self.get32(self.done)) < 1 << CMD_LOG2
            });
            self.memory.snapshot().write_object(self.slot(tail), command).expect("the command ring");
            tail = tail.wrapping_add(1);
            self.tail.store(tail, SeqCst);
            if tail % 64 == 0 {
                self.write(regs::CMD_TAIL, tail);
            }
        }
        self.write(regs::CMD_TAIL, tail);
        tail
    }

    fn slot(&self, index: u32) -> u64 {
        self.commands + u64::from(index % (1 << CMD_LOG2)) * 64
    }

    /// Waits until the commands before `index` have completed.
    pub fn wait(&self, index: u32) {
        self.until("commands to complete", || index.wrapping_sub(self.get32(self.done)) as i32 <= 0);
    }

    /// Runs one command: its status and result.
    pub fn command(&self, command: Command) -> (u32, u64) {
        let index = self.submit(&[command]);
        self.wait(index);
        self.outcome(index - 1)
    }

    /// Status and result of the command in slot `index`.
    #[must_use]
    pub fn outcome(&self, index: u32) -> (u32, u64) {
        let slot = self.slot(index);
        (self.get32(slot + 4), self.get(slot + 56))
    }

    /// Runs one command that must succeed; its result.
    pub fn ok(&self, op: u16, ctx: Handle, arg: [u64; 5]) -> u64 {
        let (status, result) = self.run(op, ctx, arg);
        assert_eq!(status, STATUS_OK, "op {op} of {ctx} with {arg:x?}");
        result
    }

    /// Runs one command: status and result.
    pub fn run(&self, op: u16, ctx: Handle, arg: [u64; 5]) -> (u32, u64) {
        self.command(Command { op, ctx: ctx.0, arg, ..Command::default() })
    }

    /// Binds a context and gives it a root table.
    #[must_use]
    pub fn bind(&self) -> Space<'_> {
        let ctx = Handle(self.ok(OP_CTX_BIND, Handle::NONE, [7, 0, 0, 0, 0]));
        let mut space =
            Space { rig: self, ctx, tables: HashMap::new(), data: Vec::new(), queues: Vec::new() };
        let root = space.table(3, 0);
        self.ok(OP_CTX_SET_ROOT, ctx, [root.0, 0, 0, 0, 0]);
        space
    }

    /// The next entry of the fault buffer, if there is one.
    #[allow(clippy::expect_used, reason = "for tests only")]
    pub fn next_fault(&self) -> Option<FaultEntry> {
        let get = self.fault_get.load(SeqCst);
        if self.read(regs::FAULT_PUT) == get {
            return None;
        }
        let at = self.faults + u64::from(get % (1 << FAULT_LOG2)) * 64;
        let entry = self.memory.snapshot().read_object(at).expect("the fault buffer");
        self.fault_get.store(get.wrapping_add(1), SeqCst);
        self.write(regs::FAULT_GET, get.wrapping_add(1));
        Some(entry)
    }

    /// Waits for a fault.
    pub fn fault(&self) -> FaultEntry {
        let mut found = None;
        self.until("a fault", || {
            found = self.next_fault();
            found.is_some()
        });
        found.unwrap_or_default()
    }
}

/// A bound context with the tables that the rig's driver keeps for it.
pub struct Space<'r> {
    /// Where it lives.
    pub rig: &'r Rig,
    /// Its handle.
    pub ctx: Handle,
    /// By (level, address of its first byte).
    pub tables: HashMap<(u8, u64), Handle>,
    /// Data pages granted.
    pub data: Vec<Handle>,
    /// Queues made.
    pub queues: Vec<Handle>,
}

impl Space<'_> {
    /// The table of `level` for `va`, linked to those above.
    pub fn table(&mut self, level: u8, va: u64) -> Handle {
        let base = va >> (12 + 9 * (u32::from(level) + 1)) << (12 + 9 * (u32::from(level) + 1));
        if let Some(&table) = self.tables.get(&(level, base)) {
            return table;
        }
        let above = (level < 3).then(|| self.table(level + 1, va));
        let page = loop {
            // Somebody else's page: try the next one.
            let index = self.rig.pages.fetch_add(1, SeqCst) % self.rig.read(regs::TABLE_PAGES);
            let (status, page) = self.rig.run(OP_GRANT, self.ctx, [PAGE_TABLE.into(), index.into(), 0, 0, 0]);
            if status == STATUS_OK {
                break Handle(page);
            }
        };
        if let Some(above) = above {
            let entry = pte::VALID | u64::from(page.index()) << 12;
            let index = pte::index(va, level + 1) as u64;
            self.rig.ok(OP_WRITE_PTE, self.ctx, [above.0, index, entry, 0, 0]);
        }
        self.tables.insert((level, base), page);
        page
    }

    /// Writes the leaf of `va`: 2 MiB if it has the HUGE bit, else 4 KiB.
    pub fn map(&mut self, va: u64, leaf: u64) {
        let level = u8::from(leaf & pte::HUGE != 0);
        let table = self.table(level, va);
        self.rig.ok(OP_WRITE_PTE, self.ctx, [table.0, pte::index(va, level) as u64, leaf, 0, 0]);
    }

    /// Maps `bytes` from `va` on to guest memory at `address`, page by page, with all rights.
    pub fn map_range(&mut self, va: u64, address: u64, bytes: u64) {
        for offset in (0..bytes).step_by(4096) {
            self.map(va + offset, (address + offset) | pte::VALID | pte::WRITE | pte::ATOMIC);
        }
    }

    /// The command that clears the leaf of `va`.
    #[must_use]
    pub fn clear(&mut self, level: u8, va: u64) -> Command {
        let table = self.table(level, va);
        let range = pte::index(va, level) as u64 | 1 << 16;
        Command { op: OP_CLEAR_PTES, ctx: self.ctx.0, arg: [table.0, range, 0, 0, 0], ..Command::default() }
    }

    /// The command that invalidates a range.
    #[must_use]
    pub fn invalidate(&self, start: u64, last: u64) -> Command {
        Command { op: OP_INVALIDATE, ctx: self.ctx.0, arg: [start, last, 0, 0, 0], ..Command::default() }
    }

    /// Makes a queue of `1 << log2` jobs.
    #[must_use]
    pub fn queue(&mut self, log2: u32) -> Queue {
        let (ring, completions, fence) =
            (self.rig.alloc(64 << log2), self.rig.alloc(32 << log2), self.rig.alloc(8));
        let handle = self.rig.ok(OP_QUEUE_CREATE, self.ctx, [ring, log2.into(), completions, fence, 0]);
        self.queues.push(Handle(handle));
        Queue { handle: Handle(handle), log2, ring, completions, fence, tail: 0 }
    }

    /// Gives everything back: release, queues, pages, unbind. The statuses of all commands.
    pub fn close(self) -> Vec<u32> {
        let command =
            |op, arg0: u64| Command { op, ctx: self.ctx.0, arg: [arg0, 0, 0, 0, 0], ..Command::default() };
        let mut commands = vec![command(OP_CTX_RELEASE, 0)];
        commands.extend(self.queues.iter().map(|queue| command(OP_QUEUE_DESTROY, queue.0)));
        commands.extend(self.tables.values().chain(&self.data).map(|page| command(OP_RETURN, page.0)));
        commands.push(command(OP_CTX_UNBIND, 0));
        commands.into_iter().map(|command| self.rig.command(command).0).collect()
    }
}

/// A queue of the rig's driver.
pub struct Queue {
    /// Its handle.
    pub handle: Handle,
    /// log2 of its size.
    pub log2: u32,
    /// Addresses of its ring,
    pub ring: u64,
    /// its completions,
    pub completions: u64,
    /// and its fence.
    pub fence: u64,
    /// Jobs submitted so far.
    pub tail: u64,
}

impl Queue {
    /// Puts a job into the ring and rings; its index.
    #[allow(clippy::expect_used, reason = "for tests only")]
    pub fn submit(&mut self, rig: &Rig, mut job: Job) -> u64 {
        let at = self.tail % (1 << self.log2);
        job.fence = self.tail + 1;
        rig.put32(self.completions + at * 32 + 8, 0);
        rig.memory.snapshot().write_object(self.ring + at * 64, &job).expect("the ring");
        self.tail += 1;
        self.ring(rig);
        self.tail - 1
    }

    /// Rings the doorbell.
    pub fn ring(&self, rig: &Rig) {
        let value = self.tail as u32 & 0xffff | self.handle.generation() << 16;
        rig.write(regs::QUEUE_DOORBELL + 4 * self.handle.index(), value);
    }

    /// The completion of job `index`, if it has one.
    #[must_use]
    #[allow(clippy::expect_used, reason = "for tests only")]
    pub fn completion(&self, rig: &Rig, index: u64) -> Option<Completion> {
        let at = self.completions + index % (1 << self.log2) * 32;
        (rig.get32(at + 8) != 0).then(|| rig.memory.snapshot().read_object(at).expect("the completion ring"))
    }

    /// Waits for the completion of job `index`.
    #[must_use]
    pub fn wait(&self, rig: &Rig, index: u64) -> Completion {
        rig.until("a completion", || self.completion(rig, index).is_some());
        self.completion(rig, index).unwrap_or_default()
    }

    /// Runs one job.
    pub fn run(&mut self, rig: &Rig, job: Job) -> Completion {
        let index = self.submit(rig, job);
        self.wait(rig, index)
    }
}
