// SPDX-License-Identifier: MIT OR Apache-2.0
//! For tests and fuzz targets: a bus with two functions and no KVM, and a hypervisor's side that checks what it is asked for.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use parking_lot::Mutex;
use vgpu::function::{Backing, Bar, Effects, Function, InterruptSink, InterruptSwitch};
use vgpu::memory::SystemMemory;
use vgpu::pci::{BarShape, CLASS_GPU, ConfigSpace, Identity, MSIX_BAR_BYTES, MsixShape};
use vm_memory::MmapRegion;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::host::{Host, Message, PINS};
use super::irq::Routes;
use super::layout::{Layout, Window};
use super::memory::{GuestRam, Slots};
use super::pci::PciBus;
use super::ports::Ports;
use super::serial::{Queue, Serial};
use crate::failure::Result;
use crate::machine::FunctionSlot;
use crate::runner::device::memfd;

/// Vectors of each function.
pub(super) const VECTORS: u16 = 3;
/// Sizes of BARs 0 (trapped) and 2 (mapped).
pub(super) const BAR0: u64 = 0x1_0000;
pub(super) const BAR2: u64 = 0x10_0000;

/// Address of a message that the hypervisor does not take.
pub(super) const REFUSED: u64 = 0xdead_0000;

/// What the hypervisor was asked for.
#[derive(Default)]
pub(super) struct FakeHost {
    pub(super) shown: Mutex<BTreeMap<u32, Window>>,
    pub(super) connected: Mutex<BTreeMap<u32, EventFd>>,
    pub(super) routes: Mutex<BTreeMap<u32, Message>>,
    /// What no hypervisor would be asked for, and the first such thing.
    pub(super) complaint: Mutex<Option<String>>,
}

impl FakeHost {
    fn complain(&self, what: String) {
        self.complaint.lock().get_or_insert(what);
    }

    /// Takes the signals of an interrupt number: how often it was raised.
    #[cfg(test)]
    pub(super) fn signals(&self, number: u32) -> u64 {
        self.connected.lock().get(&number).map_or(0, |event| event.read().unwrap_or(0))
    }
}

impl Host for FakeHost {
    fn route(&self, messages: &BTreeMap<u32, Message>) -> io::Result<()> {
        if messages.keys().any(|number| *number < PINS) {
            self.complain("a pin is routed as a message".into());
        }
        if messages.values().any(|message| message.address == REFUSED) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.routes.lock().clone_from(messages);
        Ok(())
    }
    fn connect(&self, event: &EventFd, number: u32) -> io::Result<()> {
        if self.connected.lock().insert(number, event.try_clone()?).is_some() {
            self.complain(format!("number {number} is connected twice"));
        }
        Ok(())
    }
    fn disconnect(&self, _: &EventFd, number: u32) {
        if self.connected.lock().remove(&number).is_none() {
            self.complain(format!("number {number} was not connected"));
        }
    }
    fn show(&self, slot: u32, start: u64, map: &MmapRegion<()>) -> io::Result<()> {
        let Some(at) = Window::sized(start, map.size() as u64) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let mut shown = self.shown.lock();
        if shown.contains_key(&slot) || shown.values().any(|other| other.overlaps(&at)) {
            self.complain(format!("slot {slot} at {start:#x} is in the way of another"));
        }
        shown.insert(slot, at);
        Ok(())
    }
    fn hide(&self, slot: u32, start: u64) -> io::Result<()> {
        if self.shown.lock().remove(&slot).is_none_or(|at| at.start != start) {
            self.complain(format!("slot {slot} is not at {start:#x}"));
        }
        Ok(())
    }
}

/// A function that remembers the last access.
pub(super) struct FakeFunction {
    config: Mutex<ConfigSpace>,
    file: File,
    /// BAR and offset, the former in the highest byte.
    pub(super) last: AtomicU64,
}

impl FakeFunction {
    fn touched(&self, bar: u8, offset: u64) {
        self.last.store(u64::from(bar) << 56 | offset, SeqCst);
    }
}

impl Function for FakeFunction {
    fn bars(&self) -> Vec<Bar<'_>> {
        vec![
            Bar { index: 0, size: BAR0, prefetchable: false, backing: Backing::Trapped },
            Bar { index: 2, size: BAR2, prefetchable: true, backing: Backing::Mapped(&self.file) },
            Bar { index: 4, size: MSIX_BAR_BYTES, prefetchable: false, backing: Backing::InterruptTable },
        ]
    }
    fn vectors(&self) -> u16 {
        VECTORS
    }
    fn has_msix(&self) -> bool {
        true
    }
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.config.lock().read(offset, data);
    }
    fn config_write(&self, offset: u16, data: &[u8]) -> Effects {
        let mut config = self.config.lock();
        if config.write(offset, data).flr {
            config.reset();
        }
        Effects::default()
    }
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        self.touched(bar, offset);
        data.fill(0x5a);
    }
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> Effects {
        self.touched(bar, offset);
        Effects { interrupts: data.first().copied().unwrap_or(0).into() }
    }
    fn reset(&self) -> Effects {
        Effects::default()
    }
}

/// The bus with everything that it needs.
pub(super) struct Rig {
    pub(super) host: Arc<FakeHost>,
    pub(super) ports: Ports,
    pub(super) functions: Vec<Arc<FakeFunction>>,
    pub(super) memories: Vec<Arc<SystemMemory>>,
    pub(super) switches: Vec<Arc<InterruptSwitch>>,
    pub(super) layout: Layout,
}

impl Rig {
    /// Two functions, in slots 4 and 5.
    pub(super) fn new() -> Result<Self> {
        let host = Arc::new(FakeHost::default());
        let layout = Layout::new(16 << 20, 40)?;
        let ram = GuestRam::new(&layout)?;
        let slots = Slots::new(host.clone());
        slots.add_ram(&ram)?;
        let pci = Arc::new(PciBus::new(host.clone(), layout.clone(), slots, Routes::new(host.clone())));
        let queue = Arc::new(Queue::default());
        // Nobody hears what the guest says, and it waits for nobody.
        queue.close();
        let fail = super::host_failure("a test");
        let serial = Serial::new(EventFd::new(EFD_NONBLOCK).map_err(&fail)?, queue);
        let (mut functions, mut memories, mut switches) = (Vec::new(), Vec::new(), Vec::new());
        let identity = Identity { vendor: 0x1234, device: 0x4d47, class: CLASS_GPU, revision: 1 };
        let shape = |index, size| BarShape { index, size, prefetchable: false };
        let shapes = [shape(0, BAR0), shape(2, BAR2), shape(4, MSIX_BAR_BYTES)];
        for name in ["one", "two"] {
            let config = ConfigSpace::new(identity, &shapes, VECTORS, Some(MsixShape::in_bar4(VECTORS)));
            let function = Arc::new(FakeFunction {
                config: Mutex::new(config),
                file: memfd("hmm-testbench-bar", BAR2)?,
                last: AtomicU64::new(0),
            });
            let (memory, interrupts) = (Arc::new(SystemMemory::new()), Arc::new(InterruptSwitch::new()));
            functions.push(function.clone());
            memories.push(memory.clone());
            switches.push(interrupts.clone());
            pci.add(FunctionSlot { name, function, memory, interrupts }, &ram).map_err(&fail)?;
        }
        Ok(Self { host, ports: Ports { serial, pci }, functions, memories, switches, layout })
    }
}

/// Lets a guest do what `bytes` say to ports and memory without RAM, and says what it broke.
///
/// # Errors
/// What the machine asked of the hypervisor and must not have.
pub fn accesses_for_fuzzing(bytes: &[u8]) -> std::result::Result<(), String> {
    let rig = Rig::new().map_err(|failure| failure.to_string())?;
    for step in bytes.chunks_exact(12) {
        let word = |at: usize| u32::from_le_bytes([step[at], step[at + 1], step[at + 2], step[at + 3]]);
        let length = [1, 2, 4, 8][usize::from(step[0] >> 3 & 3)];
        let value = u64::from(word(8)) << 32 | u64::from(word(8));
        let (value, mut back) = (value.to_le_bytes(), [0; 8]);
        // Configuration space, where BARs were put last, ports, or anywhere.
        let place = word(4);
        let shown = rig.host.shown.lock().values().last().map_or(0, |at| at.start);
        let address = match step[0] & 3 {
            0 => super::layout::ECAM.start + u64::from(place & 0xf_ffff),
            1 => shown.wrapping_add(u64::from(place) << 4).wrapping_sub(1 << 30),
            2 => u64::from(place) << (step[1] & 31),
            _ => {
                let port = if step[1] & 1 == 0 { 0xcf8 + (place & 7) } else { place };
                let port = if step[1] & 6 == 6 { 0x3f8 + (place & 7) } else { port } as u16;
                if step[0] & 4 == 0 {
                    rig.ports.write(port, &value[..length]);
                } else {
                    rig.ports.read(port, &mut back[..length]);
                }
                continue;
            }
        };
        if step[0] & 4 == 0 {
            rig.ports.pci.memory_write(address, &value[..length]);
        } else {
            rig.ports.pci.memory_read(address, &mut back[..length]);
        }
        if let Some(switch) = rig.switches.get(usize::from(step[2])) {
            switch.raise(step[3].into());
        }
        let outside = |function: &Arc<FakeFunction>| function.last.load(SeqCst) >= BAR0;
        if rig.functions.iter().any(outside) {
            return Err("a function was reached outside of its trapped BAR".into());
        }
        let ram = rig.layout.low_bytes();
        if rig
            .host
            .shown
            .lock()
            .iter()
            .any(|(slot, at)| *slot > 0 && (at.start < ram || !rig.layout.allows_bar(at)))
        {
            return Err("a BAR is shown where none may be".into());
        }
    }
    rig.ports.pci.clear();
    let left =
        rig.host.connected.lock().len() + rig.host.shown.lock().len() - 1 + rig.host.routes.lock().len();
    if rig.memories.iter().any(|memory| memory.snapshot().check(0, 4096, false).is_ok()) {
        return Err("a function that was taken away reaches memory".into());
    }
    let complaint = rig.host.complaint.lock().clone();
    match complaint {
        Some(complaint) => Err(complaint),
        None if left > 0 => Err("something is left".into()),
        None => Ok(()),
    }
}

/// Lets a guest and a typist do what `bytes` say to the serial port. Ends.
///
/// # Errors
/// If the host has no socket for the typist.
pub fn serial_for_fuzzing(bytes: &[u8]) -> io::Result<()> {
    let queue = Arc::new(Queue::default());
    queue.close();
    let serial = Serial::new(EventFd::new(EFD_NONBLOCK)?, queue);
    let (ours, theirs) = UnixStream::pair()?;
    // A guest that takes no keys fills the port and then the socket; it is this thread that would have to take them.
    ours.set_nonblocking(true)?;
    let typist = std::thread::spawn({
        let serial = serial.clone();
        move || serial.feed(theirs)
    });
    for step in bytes.chunks_exact(2) {
        match step[0] >> 3 & 3 {
            0 => drop(serial.read(step[0])),
            1 => match io::Write::write(&mut &ours, &[step[1]]) {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                _ => {}
            },
            _ => serial.write(step[0], step[1]),
        }
    }
    serial.end();
    drop(ours);
    typist.join().map_err(|_| io::Error::other("the typist panicked"))
}
