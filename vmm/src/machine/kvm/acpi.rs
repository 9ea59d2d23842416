// SPDX-License-Identifier: MIT OR Apache-2.0
//! ACPI tables: a hardware-reduced platform, so that the guest looks for no old timers, no keyboard and no clock chip.

use super::aml::{
    Table, device, edge_interrupt, eisa, fixed_memory, inner_device, list, method, name, notify, number,
    port, ports, resources, root_pointer, string, window,
};
use super::layout::{ACPI, ACPI_BYTES, ECAM, IOAPIC, LOCAL_APIC, Layout, MMIO32};
use super::pci::FIRST_SLOT;
use super::ports::{COM1, COM1_IRQ, RESET, RESET_VALUE, SLEEP, SLEEP_OFF};

// Of the fixed table.
const FLAG_WBINVD: u32 = 1 << 0;
const FLAG_NO_POWER_BUTTON: u32 = 1 << 4;
const FLAG_NO_SLEEP_BUTTON: u32 = 1 << 5;
const FLAG_RESET_REGISTER: u32 = 1 << 10;
const FLAG_HARDWARE_REDUCED: u32 = 1 << 20;
const BOOT_NO_VGA: u16 = 1 << 2;
const BOOT_NO_CLOCK: u16 = 1 << 5;

/// Slots from [`FIRST_SLOT`] on whose functions come and go.
const SLOTS: u8 = 4;
/// The line by which the guest hears that a function has come or gone.
pub(super) const PLUG_LINE: u32 = 16;
/// That a bus is to be looked through again.
const BUS_CHECK: u32 = 0;

/// The tables as they lie in memory from [`ACPI`] on; the first is the root pointer.
pub(super) fn tables(layout: &Layout, cpus: u32) -> Option<Vec<u8>> {
    let mut area = Area { bytes: vec![0; root_pointer(0).len().next_multiple_of(16)] };
    let dsdt = area.add(&dsdt(layout));
    let entries = [area.add(&fixed(dsdt)), area.add(&processors(cpus)), area.add(&ecam())];
    let mut root = table(*b"XSDT", 1);
    for entry in entries {
        root.push(&entry.to_le_bytes());
    }
    let root = area.add(&root.finish());
    let pointer = root_pointer(root);
    area.bytes.get_mut(..pointer.len())?.copy_from_slice(&pointer);
    (area.bytes.len() as u64 <= ACPI_BYTES).then_some(area.bytes)
}

struct Area {
    bytes: Vec<u8>,
}

impl Area {
    /// Appends a table; its address.
    fn add(&mut self, table: &[u8]) -> u64 {
        let at = self.bytes.len().next_multiple_of(16);
        self.bytes.resize(at, 0);
        self.bytes.extend_from_slice(table);
        ACPI + at as u64
    }
}

fn table(signature: [u8; 4], revision: u8) -> Table {
    Table::new(signature, 36, revision)
}

fn fixed(dsdt: u64) -> Vec<u8> {
    let mut fixed = Table::new(*b"FACP", 276, 6);
    let flags = FLAG_WBINVD
        | FLAG_NO_POWER_BUTTON
        | FLAG_NO_SLEEP_BUTTON
        | FLAG_RESET_REGISTER
        | FLAG_HARDWARE_REDUCED;
    fixed.put(109, &(BOOT_NO_VGA | BOOT_NO_CLOCK).to_le_bytes());
    fixed.put(112, &flags.to_le_bytes());
    fixed.put(116, &port(RESET));
    fixed.put(128, &[RESET_VALUE]);
    fixed.put(131, &[3]); // minor version
    fixed.put(140, &dsdt.to_le_bytes());
    fixed.put(244, &port(SLEEP));
    fixed.put(256, &port(SLEEP + 1));
    fixed.finish()
}

fn processors(cpus: u32) -> Vec<u8> {
    let mut table = table(*b"APIC", 5);
    table.push(&LOCAL_APIC.to_le_bytes());
    table.push(&0_u32.to_le_bytes());
    for cpu in 0..cpus as u8 {
        table.push(&[0, 8, cpu, cpu, 1, 0, 0, 0]);
    }
    table.push(&[1, 12, 0, 0]);
    table.push(&IOAPIC.to_le_bytes());
    table.push(&0_u32.to_le_bytes());
    table.finish()
}

fn ecam() -> Vec<u8> {
    let mut table = table(*b"MCFG", 1);
    table.push(&[0; 8]);
    table.push(&ECAM.start.to_le_bytes());
    // Segment 0, buses 0 to 0.
    table.push(&[0; 8]);
    table.finish()
}

fn dsdt(layout: &Layout) -> Vec<u8> {
    const MEMORY: u8 = 0;
    const BUSES: u8 = 2;
    // Flags of memory: not cached, read and written.
    const WRITABLE: u8 = 1;
    let zero = number(0);
    // The host bridge. Its BARs need no particular kind of window: all are plain memory to it.
    let mut windows = vec![
        window(2, BUSES, 0, 0, 0),
        ports(0xcf8, 1, 8),
        window(4, MEMORY, WRITABLE, MMIO32.start, MMIO32.end),
    ];
    let high = layout.windows.iter().filter(|window| **window != MMIO32);
    windows.extend(high.map(|place| window(8, MEMORY, WRITABLE, place.start, place.end)));
    let mut table = table(*b"DSDT", 6);
    let mut bridge = vec![
        name(*b"_HID", &eisa(*b"PNP0A08")),
        name(*b"_CID", &eisa(*b"PNP0A03")),
        name(*b"_ADR", &zero),
        name(*b"_SEG", &zero),
        name(*b"_UID", &zero),
        name(*b"_BBN", &zero),
        name(*b"_CRS", &resources(&windows)),
    ];
    // The guest looks only into slots that are named, when it is told to look. They need no method: that configuration space
    // answers is how it sees whether somebody is there.
    bridge.extend((FIRST_SLOT..FIRST_SLOT + SLOTS).map(|slot| {
        let called = [b'S', b'L', b'0' + slot / 10, b'0' + slot % 10];
        inner_device(called, &[name(*b"_ADR", &number(u32::from(slot) << 16))])
    }));
    table.push(&device(*b"PCI0", &bridge));
    // Its interrupt means that a function has come or gone.
    table.push(&device(
        *b"GED0",
        &[
            name(*b"_HID", &string("ACPI0013")),
            name(*b"_UID", &zero),
            name(*b"_CRS", &resources(&[edge_interrupt(PLUG_LINE)])),
            method(*b"_EVT", 1, &notify(*b"PCI0", BUS_CHECK)),
        ],
    ));
    // Memory-mapped configuration space, reserved once more for kernels that do not believe the memory map.
    table.push(&device(
        *b"MRES",
        &[
            name(*b"_HID", &eisa(*b"PNP0C02")),
            name(*b"_UID", &zero),
            name(*b"_CRS", &resources(&[fixed_memory(ECAM.start as u32, ECAM.bytes() as u32)])),
        ],
    ));
    table.push(&device(
        *b"COM1",
        &[
            name(*b"_HID", &eisa(*b"PNP0501")),
            name(*b"_UID", &zero),
            name(*b"_DDN", &string("COM1")),
            name(*b"_CRS", &resources(&[edge_interrupt(COM1_IRQ), ports(COM1, 0, 8)])),
        ],
    ));
    table.push(&name(*b"_S5_", &list(&[number(SLEEP_OFF.into()), zero.clone(), zero.clone(), zero])));
    table.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn tables_are_found_from_the_root() {
        let layout = Layout::new(5 << 30, 40).unwrap();
        let bytes = tables(&layout, 8).unwrap();
        assert_eq!(&bytes[..8], b"RSD PTR ");
        assert_eq!((sum(&bytes[..20]), sum(&bytes[..36])), (0, 0));
        let at = |address: u64| &bytes[(address - ACPI) as usize..];
        let whole = |address: u64| {
            let table = at(address);
            &table[..u32::from_le_bytes(table[4..8].try_into().unwrap()) as usize]
        };
        let word = |bytes: &[u8]| u64::from_le_bytes(bytes[..8].try_into().unwrap());
        let root = whole(word(&bytes[24..]));
        assert_eq!((&root[..4], sum(root)), (&b"XSDT"[..], 0));
        let tables: Vec<&[u8]> = root[36..].chunks(8).map(|entry| whole(word(entry))).collect();
        let names: Vec<&[u8]> = tables.iter().map(|table| &table[..4]).collect();
        assert_eq!(names, [b"FACP", b"APIC", b"MCFG"]);
        assert!(tables.iter().all(|table| sum(table) == 0));
        let dsdt = whole(word(&tables[0][140..]));
        assert_eq!((&dsdt[..4], sum(dsdt)), (&b"DSDT"[..], 0));
        assert_eq!(tables[1].len(), 44 + 8 * 8 + 12);
    }
}
