// SPDX-License-Identifier: MIT OR Apache-2.0
//! The native machine: a small VMM on KVM, with the functions in this process.
//!
//! # Memory map
//!
//! | guest-physical | what |
//! |---|---|
//! | 0 to 3 GiB | RAM (one file for all of it, mapped shared, so that functions map it too) |
//! | below 1 MiB | descriptor table, zero page or PVH information, page tables, command line, ACPI tables: see [`layout`] |
//! | 0xc000_0000 to 0xdfff_ffff | BARs below 4 GiB |
//! | 0xe000_0000 to 0xe00f_ffff | configuration space of bus 0 (also through ports 0xcf8 and 0xcfc) |
//! | 0xfec0_0000, 0xfee0_0000 | I/O and local interrupt controllers, in the kernel |
//! | 0xfffb_c000 to 0xfffb_ffff | KVM's own, on Intel processors |
//! | 4 GiB and up | the rest of the RAM |
//! | 256 to 320 GiB | BARs, if the processor's addresses have 39 bits or more |
//!
//! Ports: 0x3f8 COM1, 0x64 and 0xcf9 reset, 0x600 sleep control (power-off), 0xcf8 to 0xcff configuration space, and the
//! kernel's own (timer, interrupt controllers). Anything else reads as all ones.
//!
//! # Threads
//!
//! | thread | does | ends when | filter |
//! |---|---|---|---|
//! | `vcpu-N` | runs a processor; carries out its register accesses, so that an access is over before the processor goes on | the machine ends | yes |
//! | `kvm-console` | hands the console's bytes to the sink | the queue is closed and empty | yes |
//! | `kvm-keys` | feeds keys to the serial port, if interactive | its socket is shut down | yes |
//! | `kvm-machine` | waits for a reason to end, then collects all of these and disconnects the functions | last | no: the sink is the caller's |
//!
//! # Who wakes whom
//!
//! A function's threads raise an interrupt by writing an event file descriptor that KVM routes ([`irq`]); no thread of ours is
//! involved. A processor that ends the machine, or `kill`, sets the reason and wakes `kvm-machine`, which sends `vcpu-N` a
//! signal until each has ended: the signal interrupts KVM_RUN, and is repeated because one sent just before KVM_RUN would be
//! lost. The same signal makes processors show their registers. `vcpu-N` wakes `kvm-console` at a line's end, and waits for it
//! only if [`serial::Queue`] is full.
//!
//! # Locks, in order
//!
//! 1. [`KvmMachine::threads`]
//! 2. [`pci::PciBus::state`]: configuration space; held while a function's `config_read` or `config_write` runs
//! 3. a function's own locks
//! 4. a function's message set-up, then the table of routes ([`irq`]); or a BAR's place, or the free slots ([`memory`])
//! 5. leaves: the serial port, then the console's queue; [`vcpu::Shared`]
//!
//! BAR accesses and interrupts take none of these, so that a register access can never wait for another one's configuration
//! space, and a function can raise an interrupt with its own locks held.
//!
//! # Register writes and doorbells
//!
//! Every register write is carried out on the processor's thread. An ioeventfd would let the processor go on earlier, but it
//! carries no value, and each doorbell of the device has one (the ring's new end). So none is registered, but for measuring what
//! it would save ([`KvmOptions::sink`]): docs/decisions/0009-no-ioeventfd.md.

mod acpi;
mod aml;
mod boot;
mod cpu;
mod host;
mod irq;
mod layout;
mod memory;
mod msi;
mod pci;
mod ports;
mod rig;
mod seccomp;
mod serial;
mod vcpu;
mod vfio;
mod vfio_config;
mod vfio_host;
mod vfio_iommu;

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::{CpuId, KVM_PIT_SPEAKER_DUMMY, kvm_msi, kvm_pit_config};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VmFd};
use nix::libc::{EFD_CLOEXEC, c_int, c_void, siginfo_t};
use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use self::acpi::PLUG_LINE;
use self::boot::Entry;
use self::irq::Routes;
use self::layout::{LOCAL_APIC, Layout};
use self::memory::{GuestRam, Slots};
use self::pci::PciBus;
use self::ports::{COM1_IRQ, Ports};
#[doc(hidden)]
pub use self::rig::{accesses_for_fuzzing, serial_for_fuzzing};
use self::seccomp::Filters;
use self::serial::{Queue, Serial};
use self::vcpu::{Ending, Shared, Vcpu};
pub use self::vfio_host::{Bdf, Handover};
use super::terminal::Terminal;
use super::{Accel, FunctionSlot, Machine, MachineConfig, MachineExit};
use crate::failure::{Failure, Result};

/// Processors at most.
pub const MOST_CPUS: u32 = 8;
/// What a processor is sent to make it look up, until it has.
const KICK: Duration = Duration::from_millis(1);
/// How long processors may take to show their registers.
const SHOW_PATIENCE: Duration = Duration::from_millis(500);
/// A message that is a non-maskable interrupt: delivery mode 4, asserted.
const NMI_MESSAGE: u32 = 1 << 14 | 4 << 8;

/// What the native machine is told beside what every machine is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvmOptions {
    /// The host's virtualisation is QEMU's emulated SVM: features that it gets wrong are hidden from the guest. Also found out
    /// by itself, where the host's hypervisor says who it is.
    pub emulated_svm: bool,
    /// The machine's threads give up the system calls that they do not need.
    pub seccomp: bool,
    /// Devices of the host that the guest gets, in the slots behind those of the functions.
    pub vfio: Option<Handover>,
    /// Writes to this guest-physical address end in the kernel, at an event file descriptor that nobody reads. For measuring only.
    pub sink: Option<u64>,
}

impl Default for KvmOptions {
    fn default() -> Self {
        Self { emulated_svm: false, seccomp: true, vfio: None, sink: None }
    }
}

/// Starts a guest.
///
/// # Errors
/// If KVM is not usable, or the kernel or the configuration is not one that this machine can start.
pub fn start(options: KvmOptions, config: MachineConfig) -> Result<Box<dyn Machine>> {
    Ok(Box::new(KvmMachine::start(options, config)?))
}

/// A failure of KVM, and what it was doing.
fn kvm_failure(what: &str) -> impl Fn(kvm_ioctls::Error) -> Failure {
    move |error| Failure::environment(format!("KVM cannot {what}: {error}"))
}

fn host_failure(what: &str) -> impl Fn(io::Error) -> Failure {
    move |error| Failure::environment(format!("the native machine: {what}: {error}"))
}

/// A machine with nothing in it yet.
struct Board {
    vm: Arc<VmFd>,
    cpuid: CpuId,
    layout: Layout,
    ram: Arc<GuestRam>,
    pci: Arc<PciBus>,
}

impl Board {
    fn new(memory_bytes: u64) -> Result<Self> {
        let kvm = Kvm::new().map_err(|error| {
            kvm_failure("be opened")(error).remedy("see `hmm-testbench doctor`, or use --machine qemu")
        })?;
        for needed in [
            Cap::Irqchip,
            Cap::Pit2,
            Cap::Irqfd,
            Cap::IrqRouting,
            Cap::SignalMsi,
            Cap::UserMemory,
            Cap::ExtCpuid,
        ] {
            if !kvm.check_extension(needed) {
                return Err(Failure::environment(format!("this host's KVM lacks {needed:?}"))
                    .remedy("use --machine qemu"));
            }
        }
        let cpuid = cpu::supported(&kvm).map_err(kvm_failure("say what processors it has"))?;
        let layout = Layout::new(memory_bytes, cpu::physical_bits(&cpuid))?;
        let vm = Arc::new(kvm.create_vm().map_err(kvm_failure("make a machine"))?);
        let chips = || {
            vm.set_identity_map_address(layout::IDENTITY_MAP)?;
            vm.set_tss_address(layout::TSS as usize)?;
            vm.create_irq_chip()?;
            vm.create_pit2(kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() })
        };
        chips().map_err(kvm_failure("make interrupt controllers"))?;
        let ram = Arc::new(GuestRam::new(&layout)?);
        let slots = Slots::new(vm.clone());
        slots.add_ram(&ram)?;
        let routes = Routes::new(vm.clone());
        let pci = Arc::new(PciBus::new(vm.clone(), layout.clone(), slots, routes));
        Ok(Self { vm, cpuid, layout, ram, pci })
    }

    /// An interrupt line of the I/O interrupt controller.
    fn line(&self, number: u32) -> Result<EventFd> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(host_failure("an interrupt line"))?;
        self.vm.register_irqfd(&event, number).map_err(kvm_failure("take an interrupt line"))?;
        Ok(event)
    }

    /// Lets the kernel take writes to an address, for as long as the descriptor is open.
    fn sink(&self, at: u64) -> Result<EventFd> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(host_failure("a doorbell"))?;
        self.vm
            .register_ioevent(&event, &IoEventAddress::Mmio(at), NoDatamatch)
            .map_err(kvm_failure("take a doorbell"))?;
        Ok(event)
    }

    fn processors(&self, entry: Entry, count: u32, emulated_svm: bool) -> Result<Vec<kvm_ioctls::VcpuFd>> {
        (0..count)
            .map(|index| {
                let cpuid = cpu::cpuid(&self.cpuid, index, count, emulated_svm);
                let make = || {
                    let vcpu = self.vm.create_vcpu(index.into())?;
                    vcpu.set_cpuid2(&cpuid)?;
                    cpu::firmware(&vcpu)?;
                    if index == 0 {
                        cpu::begin(&vcpu, entry)?;
                    }
                    Ok(vcpu)
                };
                make().map_err(kvm_failure(&format!("make processor {index}")))
            })
            .collect()
    }
}

/// A running machine.
pub struct KvmMachine {
    vm: Arc<VmFd>,
    shared: Arc<Shared>,
    queue: Arc<Queue>,
    pci: Arc<PciBus>,
    /// The functions of this process, on the bus or not.
    functions: Vec<FunctionSlot>,
    /// For functions that come later; the RAM ends with the machine, not with this.
    ram: Weak<GuestRam>,
    /// Tells the guest that a function has come or gone.
    plugged: EventFd,
    /// The processors' threads, until they are collected.
    threads: Arc<Mutex<Vec<JoinHandle<()>>>>,
    terminal: Option<Terminal>,
    supervisor: Option<JoinHandle<()>>,
    cpus: u32,
    /// What was found out about the guest while it ran.
    registers: String,
}

impl KvmMachine {
    fn start(options: KvmOptions, config: MachineConfig) -> Result<Self> {
        let MachineConfig {
            kernel,
            mut initramfs,
            cmdline,
            cpus,
            memory_bytes,
            nodes,
            accel,
            functions,
            console,
            interactive,
        } = config;
        if accel != Accel::Kvm {
            return Err(Failure::usage(format!("the native machine has no accelerator {accel}, only kvm")));
        }
        if !(1..=MOST_CPUS).contains(&cpus) {
            return Err(Failure::usage(format!(
                "the native machine has 1 to {MOST_CPUS} processors, not {cpus}"
            )));
        }
        if nodes != 1 {
            return Err(Failure::usage(format!("the native machine has one NUMA node, not {nodes}")));
        }
        let filters = Filters::new(options.seccomp, options.vfio.is_some())?;
        let board = Board::new(memory_bytes)?;
        let entry = boot::load(&board.ram.map, &board.layout, &kernel, &mut initramfs, &cmdline)?;
        boot::write_gdt(&board.ram.map, &cpu::descriptors(entry))?;
        boot::write_firmware(&board.ram.map, &board.layout, cpus)?;
        let sink = options.sink.map(|at| board.sink(at)).transpose()?;
        let queue = Arc::new(Queue::default());
        let serial = Serial::new(board.line(COM1_IRQ)?, Arc::clone(&queue));
        let emulated_svm = options.emulated_svm || cpu::host_is_translated();
        let vcpus = board.processors(entry, cpus, emulated_svm)?;
        register_signal_handler(SIGRTMIN(), kicked)
            .map_err(|error| host_failure("a signal")(io::Error::from_raw_os_error(error.errno())))?;
        // From here on dropping the machine ends whatever there is of it.
        let mut machine = Self {
            vm: Arc::clone(&board.vm),
            shared: Shared::new(cpus),
            queue: Arc::clone(&queue),
            pci: Arc::clone(&board.pci),
            functions,
            ram: Arc::downgrade(&board.ram),
            plugged: board.line(PLUG_LINE)?,
            threads: Arc::default(),
            terminal: None,
            supervisor: None,
            cpus,
            registers: String::new(),
        };
        for slot in &machine.functions {
            let name = slot.name;
            board.pci.add(slot.clone(), &board.ram).map_err(host_failure(&format!("function {name}")))?;
        }
        let shared = Arc::clone(&machine.shared);
        let trouble: Arc<dyn Fn(String) + Send + Sync> = Arc::new(move |what| shared.end(Ending::Died(what)));
        if let Some(found) = &options.vfio {
            for device in vfio::open(found, &board.vm, &board.ram, &trouble)? {
                let name = device.name.clone();
                board.pci.pass(device).map_err(host_failure(&format!("device {name}")))?;
            }
        }
        let filter = filters.console.clone();
        let deliver = thread("kvm-console", {
            let queue = Arc::clone(&queue);
            move || match seccomp::apply(&filter) {
                Ok(()) => queue.deliver(console, interactive),
                Err(_) => queue.close(),
            }
        })?;
        let mut helpers = Helpers { queue, serial: Arc::clone(&serial), keys: None, threads: vec![deliver] };
        if interactive {
            let (ours, theirs) = UnixStream::pair().map_err(host_failure("the terminal"))?;
            helpers.keys = Some(ours.try_clone().map_err(host_failure("the terminal"))?);
            let shared = Arc::clone(&machine.shared);
            let quit = move || shared.end(Ending::Died("killed".into()));
            machine.terminal = Some(Terminal::attach(ours, quit).map_err(host_failure("the terminal"))?);
            let (serial, filter) = (Arc::clone(&serial), filters.console.clone());
            helpers.threads.push(thread("kvm-keys", move || {
                if seccomp::apply(&filter).is_ok() {
                    serial.feed(theirs);
                }
            })?);
        }
        let ports = Arc::new(Ports { serial, pci: Arc::clone(&board.pci) });
        for (index, fd) in (0..cpus).zip(vcpus) {
            let (ports, shared) = (Arc::clone(&ports), Arc::clone(&machine.shared));
            let retries = if emulated_svm { vcpu::EMULATED_RETRIES } else { 0 };
            let vcpu = Vcpu { index, fd, ports, shared, retries };
            let (shared, filter) = (Arc::clone(&machine.shared), filters.vcpu.clone());
            let run = move || match seccomp::apply(&filter) {
                Ok(()) => vcpu.run(),
                Err(failure) => shared.end(Ending::Died(failure.to_string())),
            };
            let handle = thread(&format!("vcpu-{index}"), run)?;
            machine.threads.lock().push(handle);
        }
        let (shared, threads) = (Arc::clone(&machine.shared), Arc::clone(&machine.threads));
        let supervisor = move || {
            shared.wait_for_ending();
            collect(&threads);
            board.pci.clear();
            drop(ports);
            helpers.end();
            drop((sink, board));
            shared.set_ended();
        };
        machine.supervisor = Some(thread("kvm-machine", supervisor)?);
        Ok(machine)
    }

    /// Registers of all processors, as text; those that do not answer in time are named.
    fn show_registers(&mut self) -> &str {
        self.shared.ask();
        let until = Instant::now() + SHOW_PATIENCE;
        while self.shared.silent() > 0 && Instant::now() < until {
            kick(&self.threads.lock());
            std::thread::sleep(KICK);
        }
        self.registers = self.shared.registers(true);
        &self.registers
    }

    fn function(&self, name: &str) -> Result<&FunctionSlot> {
        let found = self.functions.iter().find(|slot| slot.name == name);
        found.ok_or_else(|| Failure::usage(format!("this machine has no function {name}")))
    }

    fn tell_of_change(&self) -> Result<()> {
        self.plugged.write(1).map_err(host_failure("an interrupt line"))
    }

    fn exit(&self, ending: Ending) -> MachineExit {
        match ending {
            Ending::PoweredOff => MachineExit::PoweredOff,
            Ending::Died(status) => {
                // A processor's last words, or what was shown when somebody asked.
                let words = self.shared.registers(false);
                let stderr_tail = if words.is_empty() { self.registers.clone() } else { words };
                MachineExit::Died { status, stderr_tail }
            }
        }
    }
}

/// The threads beside the processors'.
struct Helpers {
    queue: Arc<Queue>,
    serial: Arc<Serial>,
    keys: Option<UnixStream>,
    threads: Vec<JoinHandle<()>>,
}

impl Helpers {
    /// Ends them when all of the console is delivered.
    fn end(&mut self) {
        self.queue.close();
        self.serial.end();
        if let Some(keys) = self.keys.take() {
            let _ = keys.shutdown(Shutdown::Both);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for Helpers {
    fn drop(&mut self) {
        self.end();
    }
}

fn thread(name: &str, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.into()).spawn(run).map_err(host_failure("a thread"))
}

/// Does nothing: that it was called has interrupted KVM_RUN.
extern "C" fn kicked(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}

/// Makes processors look up.
fn kick(threads: &[JoinHandle<()>]) {
    for thread in threads.iter().filter(|thread| !thread.is_finished()) {
        // Fails only for a thread that has just ended.
        let _ = thread.kill(SIGRTMIN());
    }
}

/// Waits for the processors' threads, which end because there is a reason to.
fn collect(threads: &Mutex<Vec<JoinHandle<()>>>) {
    loop {
        let mut threads = threads.lock();
        kick(&threads);
        if threads.iter().all(JoinHandle::is_finished) {
            for thread in threads.drain(..) {
                let _ = thread.join();
            }
            return;
        }
        drop(threads);
        std::thread::sleep(KICK);
    }
}

impl Machine for KvmMachine {
    fn wait(&mut self, timeout: Duration) -> Option<MachineExit> {
        let ending = self.shared.ended(Some(timeout))?;
        if !super::last_words(timeout, || self.supervisor.as_ref().is_none_or(JoinHandle::is_finished)) {
            return None;
        }
        self.terminal = None;
        if let Some(supervisor) = self.supervisor.take() {
            let _ = supervisor.join();
        }
        Some(self.exit(ending))
    }

    fn kill(&mut self) {
        self.terminal = None;
        self.shared.end(Ending::Died("killed".into()));
        match self.supervisor.take() {
            // It also delivers the rest of the console.
            Some(supervisor) => drop(supervisor.join()),
            // Only a machine that could not be started whole has none, or one that was collected before.
            None => {
                collect(&self.threads);
                self.pci.clear();
            }
        }
    }

    fn nmi(&mut self) -> Result<()> {
        let text = self.show_registers().to_owned();
        self.queue.say(&text);
        for cpu in 0..self.cpus {
            let message =
                kvm_msi { address_lo: LOCAL_APIC | cpu << 12, data: NMI_MESSAGE, ..Default::default() };
            self.vm.signal_msi(message).map_err(|error| {
                Failure::inconclusive(format!("cannot send processor {cpu} an interrupt: {error}"))
            })?;
        }
        Ok(())
    }

    fn unplug(&mut self, function: &str) -> Result<()> {
        let slot = self.function(function)?;
        if !self.pci.remove(slot.name) {
            return Err(Failure::usage(format!("{function} is not in the machine")));
        }
        // It has no power any more. Its interrupts go nowhere.
        let _ = slot.function.reset();
        self.tell_of_change()
    }

    fn plug(&mut self, function: &str) -> Result<()> {
        let slot = self.function(function)?.clone();
        let ram = self.ram.upgrade().ok_or_else(|| Failure::inconclusive("the machine has ended"))?;
        // An access that was under way when it was pulled out may have reached it since.
        let _ = slot.function.reset();
        self.pci.add(slot, &ram).map_err(host_failure(&format!("function {function}")))?;
        self.tell_of_change()
    }

    fn pid(&self) -> Option<u32> {
        None
    }
}

impl Drop for KvmMachine {
    fn drop(&mut self) {
        self.kill();
    }
}
