// SPDX-License-Identifier: MIT OR Apache-2.0
//! ACPI tables: a hardware-reduced platform, so that the guest looks for no old timers, no keyboard and no clock chip.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package,
    ResourceTemplate, ZERO,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::{GenericAddress, Sdt};

use super::layout::{ACPI, ACPI_BYTES, ECAM, IOAPIC, LOCAL_APIC, Layout, MMIO32};
use super::ports::{COM1, COM1_IRQ, RESET, RESET_VALUE, SLEEP, SLEEP_OFF};

const OEM: [u8; 6] = *b"HMMTB ";
const OEM_TABLE: [u8; 8] = *b"HMMTBVMM";

// Of the fixed table.
const FLAG_WBINVD: u32 = 1 << 0;
const FLAG_NO_POWER_BUTTON: u32 = 1 << 4;
const FLAG_NO_SLEEP_BUTTON: u32 = 1 << 5;
const FLAG_RESET_REGISTER: u32 = 1 << 10;
const FLAG_HARDWARE_REDUCED: u32 = 1 << 20;
const BOOT_NO_VGA: u16 = 1 << 2;
const BOOT_NO_CLOCK: u16 = 1 << 5;

/// The tables as they lie in memory from [`ACPI`] on; the first is the root pointer.
pub(super) fn tables(layout: &Layout, cpus: u32) -> Option<Vec<u8>> {
    let mut area = Area { bytes: vec![0; Rsdp::len().next_multiple_of(16)] };
    let dsdt = area.add(dsdt(layout).as_slice());
    let entries = [
        area.add(fixed(dsdt).as_slice()),
        area.add(processors(cpus).as_slice()),
        area.add(ecam().as_slice()),
    ];
    let mut root = table(*b"XSDT", 1);
    for entry in entries {
        root.append(entry);
    }
    let root = area.add(root.as_slice());
    let mut pointer = Vec::new();
    Rsdp::new(OEM, root).to_aml_bytes(&mut pointer);
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

fn table(signature: [u8; 4], revision: u8) -> Sdt {
    Sdt::new(signature, 36, revision, OEM, OEM_TABLE, 1)
}

fn fixed(dsdt: u64) -> Sdt {
    let mut fixed = Sdt::new(*b"FACP", 276, 6, OEM, OEM_TABLE, 1);
    let flags = FLAG_WBINVD
        | FLAG_NO_POWER_BUTTON
        | FLAG_NO_SLEEP_BUTTON
        | FLAG_RESET_REGISTER
        | FLAG_HARDWARE_REDUCED;
    fixed.write_u16(109, BOOT_NO_VGA | BOOT_NO_CLOCK);
    fixed.write_u32(112, flags);
    fixed.write(116, GenericAddress::io_port_address::<u8>(RESET));
    fixed.write_u8(128, RESET_VALUE);
    fixed.write_u8(131, 3); // minor version
    fixed.write_u64(140, dsdt);
    fixed.write(244, GenericAddress::io_port_address::<u8>(SLEEP));
    fixed.write(256, GenericAddress::io_port_address::<u8>(SLEEP + 1));
    fixed.update_checksum();
    fixed
}

fn processors(cpus: u32) -> Sdt {
    let mut table = table(*b"APIC", 5);
    table.append_slice(&LOCAL_APIC.to_le_bytes());
    table.append_slice(&0_u32.to_le_bytes());
    for cpu in 0..cpus as u8 {
        table.append_slice(&[0, 8, cpu, cpu, 1, 0, 0, 0]);
    }
    table.append_slice(&[1, 12, 0, 0]);
    table.append_slice(&IOAPIC.to_le_bytes());
    table.append_slice(&0_u32.to_le_bytes());
    table.update_checksum();
    table
}

fn ecam() -> Sdt {
    let mut table = table(*b"MCFG", 1);
    table.append_slice(&[0; 8]);
    table.append_slice(&ECAM.start.to_le_bytes());
    // Segment 0, buses 0 to 0.
    table.append_slice(&[0; 8]);
    table.update_checksum();
    table
}

fn dsdt(layout: &Layout) -> Sdt {
    let mut code = Vec::new();
    // The host bridge. Its BARs need no particular kind of window: all are plain memory to it.
    let memory: Vec<AddressSpace<u64>> = layout
        .windows
        .iter()
        .filter(|window| **window != MMIO32)
        .map(|window| {
            AddressSpace::new_memory(
                AddressSpaceCacheable::NotCacheable,
                true,
                window.start,
                window.end,
                None,
            )
        })
        .collect();
    let low = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        MMIO32.start as u32,
        MMIO32.end as u32,
        None,
    );
    let buses = AddressSpace::new_bus_number(0_u16, 0);
    let ports = IO::new(0xcf8, 0xcf8, 1, 8);
    let mut resources: Vec<&dyn Aml> = vec![&buses, &ports, &low];
    resources.extend(memory.iter().map(|window| window as &dyn Aml));
    let resources = ResourceTemplate::new(resources);
    let (host, compatible) = (EISAName::new("PNP0A08"), EISAName::new("PNP0A03"));
    Device::new(
        "_SB_.PCI0".into(),
        vec![
            &Name::new("_HID".into(), &host),
            &Name::new("_CID".into(), &compatible),
            &Name::new("_ADR".into(), &ZERO),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_BBN".into(), &ZERO),
            &Name::new("_CRS".into(), &resources),
        ],
    )
    .to_aml_bytes(&mut code);
    // Memory-mapped configuration space, reserved once more for kernels that do not believe the memory map.
    let board = EISAName::new("PNP0C02");
    let reserved = Memory32Fixed::new(true, ECAM.start as u32, ECAM.bytes() as u32);
    Device::new(
        "_SB_.MRES".into(),
        vec![
            &Name::new("_HID".into(), &board),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&reserved])),
        ],
    )
    .to_aml_bytes(&mut code);
    let serial = EISAName::new("PNP0501");
    let registers = IO::new(COM1, COM1, 0, 8);
    let interrupt = Interrupt::new(true, true, false, false, COM1_IRQ);
    Device::new(
        "_SB_.COM1".into(),
        vec![
            &Name::new("_HID".into(), &serial),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_DDN".into(), &"COM1"),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt, &registers])),
        ],
    )
    .to_aml_bytes(&mut code);
    Name::new("_S5_".into(), &Package::new(vec![&SLEEP_OFF, &ZERO, &ZERO, &ZERO])).to_aml_bytes(&mut code);
    let mut table = table(*b"DSDT", 6);
    table.append_slice(&code);
    table.update_checksum();
    table
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
