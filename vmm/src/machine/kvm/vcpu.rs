// SPDX-License-Identifier: MIT OR Apache-2.0
//! A processor's thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};
use nix::libc::{EAGAIN, EINTR};
use parking_lot::{Condvar, Mutex};

use super::cpu;
use super::ports::{Ports, Wish};

/// Why the machine ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// The guest switched it off.
    PoweredOff,
    /// Anything else, in a few words.
    Died(String),
}

impl From<Wish> for Ending {
    fn from(wish: Wish) -> Self {
        match wish {
            Wish::PowerOff => Self::PoweredOff,
            Wish::Reset => Self::Died("the guest reset itself: a panic or a reboot".into()),
        }
    }
}

#[derive(Default)]
struct State {
    /// The first reason to end. All processors stop.
    ending: Option<Ending>,
    /// Everything is over.
    ended: bool,
    /// Registers of processors, by index, since they were last asked for.
    registers: Vec<Option<String>>,
}

/// What processors, supervisor and callers tell each other. Its lock is a leaf.
pub(super) struct Shared {
    stop: AtomicBool,
    /// Processors that are to show their registers.
    asked: Vec<AtomicBool>,
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    pub(super) fn new(cpus: u32) -> Arc<Self> {
        Arc::new(Self {
            stop: AtomicBool::new(false),
            asked: (0..cpus).map(|_| AtomicBool::new(false)).collect(),
            state: Mutex::new(State { registers: (0..cpus).map(|_| None).collect(), ..State::default() }),
            changed: Condvar::new(),
        })
    }

    /// Ends the machine for this reason, unless there was one before.
    pub(super) fn end(&self, why: Ending) {
        let mut state = self.state.lock();
        state.ending.get_or_insert(why);
        self.stop.store(true, SeqCst);
        self.changed.notify_all();
    }

    /// Waits until there is a reason to end.
    pub(super) fn wait_for_ending(&self) {
        let mut state = self.state.lock();
        while state.ending.is_none() {
            self.changed.wait(&mut state);
        }
    }

    /// Everything is over.
    pub(super) fn set_ended(&self) {
        self.state.lock().ended = true;
        self.changed.notify_all();
    }

    /// How it ended, once everything is over; `None` if that takes longer.
    pub(super) fn ended(&self, timeout: Option<Duration>) -> Option<Ending> {
        let until = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut state = self.state.lock();
        while !state.ended {
            match until {
                Some(until) if self.changed.wait_until(&mut state, until).timed_out() => break,
                Some(_) => {}
                None => self.changed.wait(&mut state),
            }
        }
        if state.ended { state.ending.clone() } else { None }
    }

    /// Asks all processors for their registers.
    pub(super) fn ask(&self) {
        self.state.lock().registers.iter_mut().for_each(|text| *text = None);
        self.asked.iter().for_each(|asked| asked.store(true, SeqCst));
    }

    /// Processors that have not answered.
    pub(super) fn silent(&self) -> usize {
        self.state.lock().registers.iter().filter(|text| text.is_none()).count()
    }

    /// What the processors have shown; with `all`, those that have shown nothing are named.
    pub(super) fn registers(&self, all: bool) -> String {
        let state = self.state.lock();
        let mut text = String::new();
        for (index, registers) in state.registers.iter().enumerate() {
            match registers {
                Some(registers) => text.push_str(registers),
                None if all => text.push_str(&format!("vCPU {index}: no answer\n")),
                None => {}
            }
        }
        text
    }
}

/// A processor.
pub(super) struct Vcpu {
    pub(super) index: u32,
    pub(super) fd: VcpuFd,
    pub(super) ports: Arc<Ports>,
    pub(super) shared: Arc<Shared>,
    /// How often KVM may still fail to deliver an event into a register access: see [`EMULATED_RETRIES`].
    pub(super) retries: u32,
}

/// On QEMU's emulated SVM an exit for a register access can say that it happened while an event was delivered (seen with two
/// processors). The access is to a device register, which no delivery touches, so the event is an old one; KVM refuses to
/// emulate the access all the same. Going on delivers the event once more, which Linux takes for a spurious interrupt. So often
/// in a run; never on real processors.
pub(super) const EMULATED_RETRIES: u32 = 10_000;

impl Drop for Vcpu {
    fn drop(&mut self) {
        // However the thread ends, the machine does not go on with a processor less.
        self.shared.end(Ending::Died(format!("the thread of vCPU {} ended", self.index)));
    }
}

impl Vcpu {
    /// Runs until the machine ends.
    pub(super) fn run(mut self) {
        while !self.shared.stop.load(SeqCst) {
            if self.shared.asked.get(self.index as usize).is_some_and(|asked| asked.swap(false, SeqCst)) {
                self.show();
            }
            if let Some(why) = self.once() {
                self.shared.end(why);
            }
        }
    }

    /// Until the next exit, which is dealt with.
    fn once(&mut self) -> Option<Ending> {
        let failure = match self.fd.run() {
            Ok(VcpuExit::MmioWrite(address, data)) => {
                self.ports.pci.memory_write(address, data);
                return None;
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.ports.pci.memory_read(address, data);
                return None;
            }
            Ok(VcpuExit::IoOut(port, data)) => return self.ports.write(port, data).map(Ending::from),
            Ok(VcpuExit::IoIn(port, data)) => {
                self.ports.read(port, data);
                return None;
            }
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => return Some(Wish::PowerOff.into()),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => return Some(Wish::Reset.into()),
            Ok(VcpuExit::Shutdown) => {
                return Some(Ending::Died("the guest reset itself: a triple fault".into()));
            }
            Ok(VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => return None,
            Err(error) if matches!(error.errno(), EINTR | EAGAIN) => return None,
            Ok(VcpuExit::FailEntry(reason, _)) => format!("it cannot be entered, reason {reason:#x}"),
            Ok(VcpuExit::InternalError) => {
                let (suberror, text) = self.internal_error();
                // KVM has put the event back, and delivers it again before the access is repeated.
                if suberror == KVM_INTERNAL_ERROR_DELIVERY_EV && self.retries > 0 {
                    self.retries -= 1;
                    return None;
                }
                text
            }
            Ok(other) => format!("it stopped for no known reason: {other:?}"),
            Err(error) => format!("it cannot run: {error}"),
        };
        self.show();
        Some(Ending::Died(format!("KVM failed on vCPU {}: {failure}", self.index)))
    }

    /// What KVM says of its own failure.
    fn internal_error(&mut self) -> (u32, String) {
        let run = self.fd.get_kvm_run();
        #[allow(unsafe_code)] // a union of the kernel's
        // SAFETY: the last exit was an internal error, for which the kernel fills this member; all its bits are numbers.
        let (suberror, count, data) = unsafe {
            let internal = &run.__bindgen_anon_1.internal;
            (internal.suberror, internal.ndata, internal.data)
        };
        let data = data.get(..(count as usize).min(4)).unwrap_or_default();
        (suberror, format!("an internal error, suberror {suberror}, data {data:x?}"))
    }

    fn show(&self) {
        let text = match (self.fd.get_regs(), self.fd.get_sregs()) {
            (Ok(regs), Ok(sregs)) => cpu::describe(self.index, &regs, &sregs),
            (Err(error), _) | (_, Err(error)) => format!("vCPU {}: no registers: {error}\n", self.index),
        };
        if let Some(registers) = self.shared.state.lock().registers.get_mut(self.index as usize) {
            *registers = Some(text);
        }
        self.shared.changed.notify_all();
    }
}
