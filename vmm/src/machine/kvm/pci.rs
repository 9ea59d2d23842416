// SPDX-License-Identifier: MIT OR Apache-2.0
//! The PCI bus: configuration space, and where BARs are.
//!
//! Functions come and go while the guest runs. What a BAR answers to is computed anew from all configuration spaces after each
//! write to one: decoding on, inside a window (so never over RAM or the machine's own addresses), not around the end of the
//! address space, and not over a BAR of a lower slot or number. A BAR for which that does not hold answers nothing, and reads
//! of nothing are all ones.
//!
//! Locks, in order: [`PciBus::state`], then whatever the function locks in `config_read` and `config_write`, or
//! [`super::irq`]'s, or [`super::memory`]'s. Accesses of BARs take none of them: they read a published map.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use vgpu::function::{Backing, Effects, Function, InterruptSink, InterruptSwitch};
use vgpu::memory::SystemMemory;
use vm_memory::MmapRegion;

use super::host::Host;
use super::irq::{Messages, Outside, Routes};
use super::layout::{ECAM, Layout, Window};
use super::memory::{GuestRam, MappedBar, Slots};
use super::msi::{Capabilities, MsiSetup};
use crate::machine::FunctionSlot;

/// Slot of the first function, as on QEMU, so that addresses in guests' messages are the same.
pub(super) const FIRST_SLOT: u8 = 4;
/// Slots of a bus.
const SLOTS: u8 = 32;
/// Bytes of one configuration space.
const CONFIG_BYTES: u16 = 4096;

const COMMAND: u16 = 0x04;
const COMMAND_MEMORY: u32 = 1 << 1;
const COMMAND_BUS_MASTER: u32 = 1 << 2;
const BAR0: u16 = 0x10;
/// Of the bits that say what a BAR is: it has 64 bits and takes the next one too.
const BAR_WIDE: u32 = 4;

/// The host bridge: a function that only says what it is.
const HOST_BRIDGE: [u32; 3] = [0x0008_1b36, 0, 0x0600_0000];

/// What a BAR is where no memory is shown in it.
enum Kind {
    Trapped,
    Table,
    Nothing,
}

struct Bar {
    index: u8,
    bytes: u64,
    kind: Kind,
    /// The parts that the guest reaches directly, with their offsets.
    areas: Vec<(u64, MappedBar)>,
}

/// A device of the host that is handed over.
pub(super) struct Passed {
    /// Unique on the bus.
    pub(super) name: String,
    /// Its configuration space, and the parts of its BARs that are not mapped.
    pub(super) function: Arc<dyn Function>,
    /// The parts that are: BAR, offset, memory.
    pub(super) areas: Vec<(u8, u64, MmapRegion<()>)>,
    /// Who signals its vectors.
    pub(super) outside: Arc<dyn Outside>,
}

/// A function on the bus.
struct Device {
    name: String,
    function: Arc<dyn Function>,
    /// What a function in this process is connected by.
    connection: Option<(Arc<SystemMemory>, Arc<InterruptSwitch>)>,
    bars: Vec<Bar>,
    capabilities: Capabilities,
    messages: Arc<Messages>,
}

impl Device {
    fn config(&self, at: u16) -> u32 {
        let mut bytes = [0xff; 4];
        self.function.config_read(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Where a BAR wants to be, if the function decodes memory.
    fn wanted(&self, bar: &Bar) -> Option<Window> {
        if self.config(COMMAND) & COMMAND_MEMORY == 0 {
            return None;
        }
        let at = BAR0 + 4 * u16::from(bar.index);
        let low = self.config(at);
        let high = if low & BAR_WIDE == 0 { 0 } else { u64::from(self.config(at + 4)) << 32 };
        let address = u64::from(low) | high;
        Window::sized(address & !(bar.bytes - 1), bar.bytes)
    }

    fn set_up_interrupts(&self) {
        let on = self.config(COMMAND) & COMMAND_BUS_MASTER != 0;
        let setup = self.capabilities.setup(&|at| self.config(at));
        self.messages.configure(if on { setup } else { MsiSetup::Off });
    }

    fn carry_out(&self, effects: Effects) {
        self.messages.raise_all(effects.interrupts);
    }

    /// The MSI-X table or the pending bits at an offset of a BAR: which, and where in it.
    fn in_table(&self, bar: u8, offset: u64) -> Option<(bool, u64)> {
        let msix = self.capabilities.msix?;
        let pending = || msix.pending.inside(bar, offset).map(|inside| (true, inside));
        msix.table.inside(bar, offset).map(|inside| (false, inside)).or_else(pending)
    }

    fn bar_read(&self, bar: &Bar, offset: u64, data: &mut [u8]) {
        match bar.kind {
            Kind::Trapped if self.in_table(bar.index, offset).is_none() => {
                self.function.bar_read(bar.index, offset, data);
            }
            Kind::Trapped | Kind::Table => match self.in_table(bar.index, offset) {
                Some((pending, inside)) => self.messages.table_read(pending, inside, data),
                None => data.fill(0),
            },
            Kind::Nothing => {}
        }
    }

    fn bar_write(&self, bar: &Bar, offset: u64, data: &[u8]) {
        match bar.kind {
            Kind::Trapped if self.in_table(bar.index, offset).is_none() => {
                self.carry_out(self.function.bar_write(bar.index, offset, data));
            }
            Kind::Trapped | Kind::Table => {
                if let Some((false, inside)) = self.in_table(bar.index, offset) {
                    self.messages.table_write(inside, data);
                }
            }
            Kind::Nothing => {}
        }
    }
}

/// Interrupts of a function that is not on a bus.
struct Nobody;

impl InterruptSink for Nobody {
    fn raise(&self, _: u16) {}
}

/// What answers at an address.
#[derive(Clone)]
struct Region {
    at: Window,
    device: Arc<Device>,
    /// Which of the device's BARs.
    bar: usize,
}

struct State {
    devices: BTreeMap<u8, Arc<Device>>,
    /// The register that selects what the configuration ports reach.
    address: u32,
    /// Nothing comes any more.
    closed: bool,
}

impl State {
    /// Whether a function of this name may come.
    fn takes(&self, name: &str) -> io::Result<()> {
        if self.closed {
            return Err(io::Error::other("the machine has ended"));
        }
        if self.devices.values().any(|other| other.name == name) {
            return Err(io::Error::other(format!("{name} is there already")));
        }
        Ok(())
    }
}

/// The bus.
pub(super) struct PciBus {
    host: Arc<dyn Host>,
    layout: Layout,
    slots: Arc<Slots>,
    routes: Arc<Routes>,
    state: Mutex<State>,
    /// In order of address, without overlaps.
    regions: ArcSwap<Vec<Region>>,
}

impl PciBus {
    pub(super) fn new(host: Arc<dyn Host>, layout: Layout, slots: Arc<Slots>, routes: Arc<Routes>) -> Self {
        let state = Mutex::new(State { devices: BTreeMap::new(), address: 0, closed: false });
        Self { host, layout, slots, routes, state, regions: ArcSwap::default() }
    }

    /// Puts a function into the first free slot, and gives it memory and interrupts.
    pub(super) fn add(&self, slot: FunctionSlot, ram: &GuestRam) -> io::Result<u8> {
        let FunctionSlot { name, function, memory, interrupts } = slot;
        let mut state = self.state.lock();
        state.takes(name)?;
        let shared = |device: &Arc<Device>| {
            device.connection.as_ref().is_some_and(|(other, _)| Arc::ptr_eq(other, &memory))
        };
        if state.devices.values().any(shared) {
            return Err(io::Error::other(format!("{name} shares its view of memory with another function")));
        }
        let mut bars = Vec::new();
        for bar in function.bars() {
            let (kind, file) = match bar.backing {
                Backing::Trapped => (Kind::Trapped, None),
                Backing::Mapped(file) => (Kind::Nothing, Some(file)),
                Backing::InterruptTable => (Kind::Table, None),
            };
            let mut areas = Vec::new();
            if let Some(file) = file {
                areas.push((0, MappedBar::new(&self.slots, file, bar.size)?));
            }
            bars.push(Bar { index: bar.index, bytes: bar.size, kind, areas });
        }
        let messages = Messages::new(&self.host, &self.routes, function.vectors(), None)?;
        for piece in &self.layout.ram {
            memory
                .map(piece.at.start, piece.at.bytes(), &ram.file, piece.offset, true)
                .map_err(io::Error::other)?;
        }
        interrupts.attach(messages.clone());
        let capabilities = capabilities(&*function);
        let connection = Some((memory, interrupts));
        let name = name.to_owned();
        self.insert(&mut state, Device { name, function, connection, bars, capabilities, messages })
    }

    /// Puts a device of the host into the first free slot.
    pub(super) fn pass(&self, passed: Passed) -> io::Result<u8> {
        let Passed { name, function, areas, outside } = passed;
        let mut bars: Vec<_> = function
            .bars()
            .iter()
            .map(|bar| Bar { index: bar.index, bytes: bar.size, kind: Kind::Trapped, areas: Vec::new() })
            .collect();
        for (index, offset, map) in areas {
            if let Some(bar) = bars.iter_mut().find(|bar| bar.index == index) {
                bar.areas.push((offset, MappedBar::of(&self.slots, map)?));
            }
        }
        let messages = Messages::new(&self.host, &self.routes, function.vectors(), Some(outside))?;
        let capabilities = capabilities(&*function);
        let device = Device { name, function, connection: None, bars, capabilities, messages };
        self.insert(&mut self.state.lock(), device)
    }

    fn insert(&self, state: &mut State, device: Device) -> io::Result<u8> {
        let name = &device.name;
        state.takes(name)?;
        for bar in &device.bars {
            if !bar.bytes.is_power_of_two() || bar.index > 5 {
                return Err(io::Error::other(format!("BAR {} of {name} has no possible shape", bar.index)));
            }
        }
        let number = (FIRST_SLOT..SLOTS).find(|number| !state.devices.contains_key(number));
        let number = number.ok_or_else(|| io::Error::other("the bus has no free slot"))?;
        device.set_up_interrupts();
        state.devices.insert(number, Arc::new(device));
        self.place(state);
        Ok(number)
    }

    /// Takes a function away at once, as pulling a card does. It reaches neither memory nor processors any more when this
    /// returns, but for a register access of a processor that is under way.
    pub(super) fn remove(&self, name: &str) -> bool {
        let mut state = self.state.lock();
        let found = state.devices.iter().find(|(_, device)| device.name == name);
        let Some(number) = found.map(|(number, _)| *number) else { return false };
        if let Some(device) = state.devices.remove(&number) {
            self.place(&state);
            for bar in &device.bars {
                for (_, area) in &bar.areas {
                    area.place(None);
                }
            }
            if let Some((_, switch)) = &device.connection {
                switch.attach(Arc::new(Nobody));
            }
            device.messages.configure(MsiSetup::Off);
            if let Some((memory, _)) = &device.connection {
                memory.clear();
            }
        }
        true
    }

    /// Takes all functions away, for good.
    pub(super) fn clear(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        let names: Vec<_> = state.devices.values().map(|device| device.name.clone()).collect();
        drop(state);
        for name in names {
            self.remove(&name);
        }
    }

    /// Computes what answers where, and publishes it.
    fn place(&self, state: &State) {
        let mut regions: Vec<Region> = Vec::new();
        for device in state.devices.values() {
            for (bar, shape) in device.bars.iter().enumerate() {
                let free = |at: &Window| {
                    self.layout.allows_bar(at) && !regions.iter().any(|region| region.at.overlaps(at))
                };
                if let Some(at) = device.wanted(shape).filter(free) {
                    regions.push(Region { at, device: Arc::clone(device), bar });
                }
            }
        }
        let mapped = |regions: &[Region], device: &Arc<Device>, bar: usize| {
            let same = |region: &&Region| Arc::ptr_eq(&region.device, device) && region.bar == bar;
            regions.iter().find(same).map(|region| region.at.start)
        };
        // First what goes, so that KVM never sees two at one place.
        for go in [true, false] {
            for device in state.devices.values() {
                for (bar, shape) in device.bars.iter().enumerate() {
                    for (offset, map) in &shape.areas {
                        let wanted = mapped(&regions, device, bar).map(|start| start + offset);
                        if !go || !map.is_at(wanted) {
                            map.place(if go { None } else { wanted });
                        }
                    }
                }
            }
            if go {
                regions.sort_by_key(|region| region.at.start);
                self.regions.store(Arc::new(regions.clone()));
            }
        }
    }

    /// Reads configuration space: `function` is its number as in an address, `offset + data.len()` at most 4096.
    fn config_read(&self, state: &State, function: u16, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        if function == 0 {
            let bytes = HOST_BRIDGE.iter().flat_map(|word| word.to_le_bytes());
            let rest = bytes.chain(std::iter::repeat(0)).skip(offset.into());
            data.iter_mut().zip(rest).for_each(|(to, from)| *to = from);
        } else if let Some(device) = device(state, function) {
            device.function.config_read(offset, data);
            if let Some(at) = device.capabilities.msi_pending() {
                let pending = device.messages.pending_bits(0).to_le_bytes();
                for (byte, place) in data.iter_mut().zip(offset..) {
                    if let Some(bits) = place.checked_sub(at).and_then(|i| pending.get(usize::from(i))) {
                        *byte = *bits;
                    }
                }
            }
        }
    }

    fn config_write(&self, state: &State, function: u16, offset: u16, data: &[u8]) {
        let Some(device) = device(state, function) else { return };
        device.carry_out(device.function.config_write(offset, data));
        if device.capabilities.resets(offset, data) {
            device.messages.reset_table();
        }
        device.set_up_interrupts();
        self.place(state);
    }

    /// An access through the old ports, 0xcf8 to 0xcff.
    pub(super) fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        let state = self.state.lock();
        match port {
            0xcf8 if data.len() == 4 => data.copy_from_slice(&state.address.to_le_bytes()),
            0xcfc..=0xcff => {
                if let Some((function, offset)) = selected(state.address, port, data.len()) {
                    self.config_read(&state, function, offset, data);
                }
            }
            _ => {}
        }
    }

    /// See [`Self::port_read`].
    pub(super) fn port_write(&self, port: u16, data: &[u8]) {
        let mut state = self.state.lock();
        match (port, <[u8; 4]>::try_from(data)) {
            (0xcf8, Ok(address)) => state.address = u32::from_le_bytes(address),
            (0xcfc..=0xcff, _) => {
                if let Some((function, offset)) = selected(state.address, port, data.len()) {
                    self.config_write(&state, function, offset, data);
                }
            }
            _ => {}
        }
    }

    /// A read of a guest-physical address without memory.
    pub(super) fn memory_read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if ECAM.contains(&Window { start: address, end: address }) {
            let state = self.state.lock();
            for (at, part) in (address..).step_by(4).zip(data.chunks_mut(4)) {
                if let Some((function, offset)) = in_ecam(at, part.len()) {
                    self.config_read(&state, function, offset, part);
                }
            }
        } else if let Some((region, offset)) = self.region(address, data.len()) {
            if let Some(bar) = region.device.bars.get(region.bar) {
                region.device.bar_read(bar, offset, data);
            }
        }
    }

    /// A write to a guest-physical address without memory. It has been carried out when this returns.
    pub(super) fn memory_write(&self, address: u64, data: &[u8]) {
        if ECAM.contains(&Window { start: address, end: address }) {
            let state = self.state.lock();
            for (at, part) in (address..).step_by(4).zip(data.chunks(4)) {
                if let Some((function, offset)) = in_ecam(at, part.len()) {
                    self.config_write(&state, function, offset, part);
                }
            }
        } else if let Some((region, offset)) = self.region(address, data.len()) {
            if let Some(bar) = region.device.bars.get(region.bar) {
                region.device.bar_write(bar, offset, data);
            }
        }
    }

    /// What answers to all of an access.
    fn region(&self, address: u64, length: usize) -> Option<(Region, u64)> {
        let wanted = Window::sized(address, length as u64)?;
        let regions = self.regions.load();
        let after = regions.partition_point(|region| region.at.start <= address);
        let region = regions.get(after.checked_sub(1)?).filter(|region| region.at.contains(&wanted))?;
        Some((region.clone(), address - region.at.start))
    }
}

fn capabilities(function: &dyn Function) -> Capabilities {
    Capabilities::find(&|at| {
        let mut bytes = [0xff; 4];
        function.config_read(at, &mut bytes);
        u32::from_le_bytes(bytes)
    })
}

/// The device with that function number.
fn device(state: &State, function: u16) -> Option<&Arc<Device>> {
    if function & 7 != 0 {
        return None;
    }
    state.devices.get(&u8::try_from(function >> 3).ok()?)
}

/// What the address register and a data port reach; accesses that cross a register's end reach nothing.
fn selected(address: u32, port: u16, length: usize) -> Option<(u16, u16)> {
    let inside = port & 3;
    let fits = matches!(length, 1 | 2 | 4) && usize::from(inside) + length <= 4;
    let on_bus_0 = address & 1 << 31 != 0 && address >> 16 & 0xff == 0;
    (fits && on_bus_0).then_some(((address >> 8 & 0xff) as u16, (address & 0xfc) as u16 + inside))
}

/// What an address of memory-mapped configuration space reaches.
fn in_ecam(address: u64, length: usize) -> Option<(u16, u16)> {
    let at = address.checked_sub(ECAM.start)?;
    let (function, offset) = (u16::try_from(at >> 12).ok()?, (at & u64::from(CONFIG_BYTES - 1)) as u16);
    let fits = matches!(length, 1 | 2 | 4) && usize::from(offset) % length == 0;
    (fits && function < 256).then_some((function, offset))
}

#[cfg(test)]
#[path = "pci_test.rs"]
mod tests;
