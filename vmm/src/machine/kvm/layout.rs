// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guest-physical address space: what lies where.

use crate::failure::{Failure, Result};

/// Host and guest pages.
pub(super) const PAGE: u64 = 4096;

// Below 1 MiB: what the kernel is started with. All of it is dead once the kernel has its own.
/// Descriptor table of the boot processor.
pub(super) const GDT: u64 = 0x500;
/// The PVH start information, its module list and memory map behind it.
pub(super) const PVH_INFO: u64 = 0x6000;
/// The Linux boot protocol's zero page.
pub(super) const ZERO_PAGE: u64 = 0x7000;
/// Identity page tables of the first 4 GiB: one top page, one below it, then four of 2 MiB leaves.
pub(super) const PAGE_TABLES: u64 = 0x9000;
/// The kernel's command line.
pub(super) const CMDLINE: u64 = 0x2_0000;
/// Room for it, the final zero included.
pub(super) const CMDLINE_BYTES: u64 = 0x1_0000;
/// End of conventional memory as the guest is told.
pub(super) const LOW_END: u64 = 0x9_fc00;
/// ACPI tables, in what is firmware on a PC.
pub(super) const ACPI: u64 = 0xe_0000;
/// Room for them.
pub(super) const ACPI_BYTES: u64 = 0x1_0000;
/// Where processors begin after a reset, in 16-bit mode.
pub(super) const RESET_VECTOR: u64 = 0xf_fff0;
/// Memory above this is free for the kernel.
pub(super) const HIGH_MEMORY: u64 = 0x10_0000;

/// RAM below 4 GiB ends here at the latest.
pub(super) const RAM_HOLE: u64 = 0xc000_0000;
/// BARs of 32-bit guests, or what a guest puts there.
pub(super) const MMIO32: Window = Window { start: 0xc000_0000, end: 0xdfff_ffff };
/// Configuration space of bus 0: one megabyte, a page a function.
pub(super) const ECAM: Window = Window { start: 0xe000_0000, end: 0xe00f_ffff };
/// The I/O interrupt controller (in the kernel).
pub(super) const IOAPIC: u32 = 0xfec0_0000;
/// The processors' interrupt controllers (in the kernel).
pub(super) const LOCAL_APIC: u32 = 0xfee0_0000;
/// A page that KVM needs on Intel processors.
pub(super) const IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages that KVM needs on Intel processors.
pub(super) const TSS: u64 = 0xfffb_d000;
/// RAM goes on here.
pub(super) const RAM_ABOVE_4G: u64 = 1 << 32;
/// BARs above all RAM, where the processor's addresses are wide enough.
const MMIO64: Window = Window { start: 0x40_0000_0000, end: 0x4f_ffff_ffff };

/// An inclusive range of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window {
    pub(super) start: u64,
    pub(super) end: u64,
}

impl Window {
    /// The range of `bytes` from `start` on; `None` if it is empty or goes around the end.
    pub(super) fn sized(start: u64, bytes: u64) -> Option<Self> {
        let end = start.checked_add(bytes.checked_sub(1)?)?;
        Some(Self { start, end })
    }

    pub(super) fn bytes(&self) -> u64 {
        (self.end - self.start).saturating_add(1)
    }

    pub(super) fn contains(&self, other: &Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    pub(super) fn overlaps(&self, other: &Self) -> bool {
        self.start <= other.end && other.start <= self.end
    }
}

/// A piece of RAM and where it is in the RAM's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ram {
    pub(super) at: Window,
    pub(super) offset: u64,
}

/// The address space of one machine.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    /// One piece or two.
    pub(super) ram: Vec<Ram>,
    /// Where BARs may be: the first below 4 GiB, a second above all RAM if there is room.
    pub(super) windows: Vec<Window>,
}

impl Layout {
    /// For so much memory and processors with addresses of so many bits.
    pub(super) fn new(memory_bytes: u64, physical_bits: u32) -> Result<Self> {
        let bytes = memory_bytes.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX);
        let limit = 1_u64.checked_shl(physical_bits).unwrap_or(0).wrapping_sub(1);
        let high_window = MMIO64.end <= limit;
        let low = bytes.min(RAM_HOLE);
        let most = if high_window { MMIO64.start } else { limit } - RAM_ABOVE_4G + RAM_HOLE;
        if bytes < HIGH_MEMORY * 16 || bytes > most {
            return Err(Failure::usage(format!("the native machine cannot have {bytes} bytes of memory"))
                .remedy(format!("give it from 16 to {} MiB with --memory", most >> 20)));
        }
        let mut ram = Vec::from_iter(Window::sized(0, low).map(|at| Ram { at, offset: 0 }));
        ram.extend(Window::sized(RAM_ABOVE_4G, bytes - low).map(|at| Ram { at, offset: low }));
        let mut windows = vec![MMIO32];
        windows.extend(high_window.then_some(MMIO64));
        Ok(Self { ram, windows })
    }

    /// All of the RAM.
    pub(super) fn ram_bytes(&self) -> u64 {
        self.ram.iter().map(|piece| piece.at.bytes()).sum()
    }

    /// Bytes of RAM below 4 GiB.
    pub(super) fn low_bytes(&self) -> u64 {
        self.ram.first().map_or(0, |piece| piece.at.bytes())
    }

    /// Whether a BAR may be decoded there: inside a window, so never over RAM, configuration space or interrupt controllers.
    pub(super) fn allows_bar(&self, at: &Window) -> bool {
        self.windows.iter().any(|window| window.contains(at))
    }

    /// The memory map for the guest: start, bytes, whether it is usable RAM.
    pub(super) fn memory_map(&self) -> Vec<(u64, u64, bool)> {
        let mut map = vec![(0, LOW_END, true), (LOW_END, HIGH_MEMORY - LOW_END, false)];
        map.push((HIGH_MEMORY, self.low_bytes() - HIGH_MEMORY, true));
        // The kernel uses memory-mapped configuration space only if it is reserved.
        map.push((ECAM.start, ECAM.bytes(), false));
        map.extend(self.ram.iter().skip(1).map(|piece| (piece.at.start, piece.at.bytes(), true)));
        map
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn memory_above_the_hole() {
        let small = Layout::new(1 << 30, 40).unwrap();
        assert_eq!(small.ram.len(), 1);
        let large = Layout::new(5 << 30, 40).unwrap();
        assert_eq!(large.ram[1], Ram { at: Window { start: 1 << 32, end: (6 << 30) - 1 }, offset: RAM_HOLE });
        assert_eq!(large.ram_bytes(), 5 << 30);
        assert_eq!(Layout::new(1 << 30, 36).unwrap().windows, [MMIO32]);
        assert!(Layout::new(0, 40).is_err() && Layout::new(u64::MAX, 40).is_err());
        assert!(Layout::new(100 << 30, 36).is_err() && Layout::new(1 << 30, 64).is_ok());
    }

    proptest! {
        #[test]
        fn ram_windows_and_fixed_places_are_apart(bytes in (16_u64 << 20)..(200 << 30), bits in 36_u32..52) {
            if let Ok(layout) = Layout::new(bytes, bits) {
                prop_assert!(layout.ram_bytes() >= bytes && layout.ram_bytes() < bytes + PAGE);
                let fixed = [
                    ECAM,
                    Window::sized(IOAPIC.into(), PAGE).unwrap(),
                    Window::sized(LOCAL_APIC.into(), PAGE).unwrap(),
                    Window::sized(IDENTITY_MAP, 4 * PAGE).unwrap(),
                ];
                for window in &layout.windows {
                    for other in layout.ram.iter().map(|piece| &piece.at).chain(&fixed) {
                        prop_assert!(!window.overlaps(other));
                    }
                    prop_assert!(bits >= 63 || window.end < 1 << bits);
                }
                for piece in &layout.ram {
                    prop_assert!(fixed.iter().all(|place| !place.overlaps(&piece.at)));
                }
            }
        }
    }
}
