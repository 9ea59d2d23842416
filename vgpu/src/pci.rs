// SPDX-License-Identifier: MIT OR Apache-2.0
//! Configuration space of a PCI Express endpoint.
//!
//! Every byte has a value and a mask of writable bits; what a write *means* is told to the caller as a [`ConfigEffect`].
//! On QEMU the client keeps BAR addresses, MSI and MSI-X itself and reads this space for what the device offers; the native
//! machine takes them from here.

/// Size of the space.
pub const CONFIG_BYTES: usize = 4096;

/// `Command`: memory accesses are answered.
const COMMAND_MEMORY: u16 = 1 << 1;
/// `Command`: the function may write and read memory and raise messages.
const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// `Command`: what can be written: memory, bus master, parity, SERR, interrupt disable.
const COMMAND_MASK: u16 = COMMAND_MEMORY | COMMAND_BUS_MASTER | 1 << 6 | 1 << 8 | 1 << 10;

const COMMAND: usize = 0x04;
const BAR0: usize = 0x10;
const CAP_POINTER: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const PM: usize = 0x40;
const EXPRESS: usize = 0x50;
const MSI: usize = 0x90;
const MSIX: usize = 0xb0;
// The express capability has 0x3c bytes.
const _: () = assert!(EXPRESS + 0x3c <= MSI && MSI + 24 <= MSIX);

const DEVCTL: usize = EXPRESS + 0x08;
const DEVCTL_FLR: u16 = 1 << 15;
const MSI_CONTROL: usize = MSI + 2;
const MSIX_CONTROL: usize = MSIX + 2;

/// Who a function says it is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor id, also of the subsystem.
    pub vendor: u16,
    /// Device id, also of the subsystem.
    pub device: u16,
    /// Base class, subclass and interface, 24 bits.
    pub class: u32,
    /// Revision.
    pub revision: u8,
}

/// Class of the virtual GPU: a processing accelerator. A display class would draw in-kernel console and arbitration code.
pub const CLASS_GPU: u32 = 0x12_00_00;
/// Class of the witness: a system peripheral of no further kind.
pub const CLASS_WITNESS: u32 = 0x08_80_00;

/// A memory BAR, 64 bits wide.
#[derive(Clone, Copy, Debug)]
pub struct BarShape {
    /// 0, 2 or 4.
    pub index: u8,
    /// Bytes, a power of two, 16 at least.
    pub size: u64,
    /// Prefetchable.
    pub prefetchable: bool,
}

/// Where the MSI-X table and the pending bits are.
#[derive(Clone, Copy, Debug)]
pub struct MsixShape {
    /// Vectors, 1 to 2048.
    pub vectors: u16,
    /// BAR of both.
    pub bar: u8,
    /// Offset of the table.
    pub table: u32,
    /// Offset of the pending bits.
    pub pending: u32,
}

/// The MSI-X table in BAR4, of one page, with the pending bits in its second half: fits up to 128 vectors.
pub const MSIX_BAR_BYTES: u64 = 0x1000;

impl MsixShape {
    /// Table and pending bits in BAR4.
    #[must_use]
    pub fn in_bar4(vectors: u16) -> Self {
        Self { vectors, bar: 4, table: 0, pending: 0x800 }
    }
}

/// What a write did, beside changing bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use = "a function-level reset must be carried out"]
pub struct ConfigEffect {
    /// A function-level reset was asked for.
    pub flr: bool,
    /// Bus mastering was turned on or off.
    pub bus_master: Option<bool>,
    /// Decoding of memory was turned on or off.
    pub memory: Option<bool>,
    /// A BAR's address, or the decoding, changed.
    pub bars_changed: bool,
    /// Something about MSI or MSI-X changed.
    pub interrupts_changed: bool,
}

/// MSI as the guest has set it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiState {
    /// Enabled.
    pub enabled: bool,
    /// Vectors enabled, a power of two; vector `n` is sent as `n % vectors`, added to `data`.
    pub vectors: u16,
    /// Message address.
    pub address: u64,
    /// Message data of vector 0.
    pub data: u16,
    /// Vectors masked, bit = vector.
    pub mask: u32,
}

/// MSI-X as the guest has set it; the table itself is the machine's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsixState {
    /// Enabled.
    pub enabled: bool,
    /// All vectors are masked.
    pub masked: bool,
}

/// The configuration space of one function.
pub struct ConfigSpace {
    value: Box<[u8; CONFIG_BYTES]>,
    mask: Box<[u8; CONFIG_BYTES]>,
    reset: Box<[u8; CONFIG_BYTES]>,
    bars: Vec<BarShape>,
    msi_vectors: u16,
    has_msix: bool,
}

impl ConfigSpace {
    /// A space with the given BARs; `msi_vectors` of 0 leaves the MSI capability out, else 1, 2 or 4 (rounded up) are offered.
    #[must_use]
    pub fn new(identity: Identity, bars: &[BarShape], msi_vectors: u16, msix: Option<MsixShape>) -> Self {
        let msi_vectors = if msi_vectors == 0 { 0 } else { msi_vectors.min(4).next_power_of_two() };
        let mut space = Self {
            value: Box::new([0; CONFIG_BYTES]),
            mask: Box::new([0; CONFIG_BYTES]),
            reset: Box::new([0; CONFIG_BYTES]),
            bars: Vec::new(),
            msi_vectors,
            has_msix: msix.is_some(),
        };
        space.header(identity);
        for &bar in bars {
            space.add_bar(bar);
        }
        space.power_management();
        space.express();
        let mut last = EXPRESS;
        if msi_vectors > 0 {
            space.msi_capability(&mut last);
        }
        if let Some(shape) = msix {
            space.msix_capability(shape, &mut last);
        }
        space.reset.copy_from_slice(&space.value[..]);
        space
    }

    fn set<const N: usize>(&mut self, at: usize, value: [u8; N], mask: [u8; N]) {
        self.value[at..at + N].copy_from_slice(&value);
        self.mask[at..at + N].copy_from_slice(&mask);
    }
    fn set16(&mut self, at: usize, value: u16, mask: u16) {
        self.set(at, value.to_le_bytes(), mask.to_le_bytes());
    }
    fn set32(&mut self, at: usize, value: u32, mask: u32) {
        self.set(at, value.to_le_bytes(), mask.to_le_bytes());
    }

    fn header(&mut self, identity: Identity) {
        self.set16(0x00, identity.vendor, 0);
        self.set16(0x02, identity.device, 0);
        self.set16(COMMAND, 0, COMMAND_MASK);
        self.set16(0x06, 1 << 4, 0); // status: there is a list of capabilities
        self.set32(0x08, identity.class << 8 | u32::from(identity.revision), 0);
        self.set(0x0c, [0], [0xff]); // cache line size: kept for the guest, means nothing
        self.set16(0x2c, identity.vendor, 0);
        self.set16(0x2e, identity.device, 0);
        self.set(CAP_POINTER, [PM as u8], [0]);
        self.set(INTERRUPT_LINE, [0], [0xff]); // no pin: messages only
    }

    fn add_bar(&mut self, bar: BarShape) {
        if !matches!(bar.index, 0 | 2 | 4) || !bar.size.is_power_of_two() || bar.size < 16 {
            return; // a shape that no header can express: left out, and `bar_address` says so
        }
        let at = BAR0 + 4 * usize::from(bar.index);
        let mask = !(bar.size - 1);
        let flags = 0b100 | u32::from(bar.prefetchable) << 3;
        self.set32(at, flags, mask as u32);
        self.set32(at + 4, 0, (mask >> 32) as u32);
        self.bars.push(bar);
    }

    fn power_management(&mut self) {
        self.set(PM, [0x01, EXPRESS as u8], [0, 0]);
        self.set16(PM + 2, 0x0003, 0); // version 3, D0 and D3hot only, no PME
        self.set16(PM + 4, 1 << 3, 0b11); // no soft reset: D3hot keeps the state
    }

    fn express(&mut self) {
        self.set(EXPRESS, [0x10, 0], [0, 0]);
        self.set16(EXPRESS + 0x02, 0x0002, 0); // version 2, endpoint
        self.set32(EXPRESS + 0x04, 1 << 28 | 1 << 15, 0); // function-level reset, role-based errors
        self.set16(DEVCTL, 0x2810, 0x7fff); // relaxed ordering, no snoop, 512-byte reads; FLR reads as zero
        self.set32(EXPRESS + 0x0c, 0x11, 0); // 2.5 GT/s, x1
        self.set16(EXPRESS + 0x10, 0, 0x00c8); // link control: RCB, common clock, extended sync
        self.set16(EXPRESS + 0x12, 0x11, 0);
        self.set32(EXPRESS + 0x24, 0x1f, 0); // completion timeouts: ranges A to D and off
        self.set16(EXPRESS + 0x28, 0, 0x001f);
        self.set32(EXPRESS + 0x2c, 1 << 1, 0);
        self.set16(EXPRESS + 0x30, 0x0001, 0x000f);
    }

    fn msi_capability(&mut self, last: &mut usize) {
        self.value[*last + 1] = MSI as u8;
        *last = MSI;
        let log2 = self.msi_vectors.trailing_zeros() as u16;
        self.set(MSI, [0x05, 0], [0, 0]);
        self.set16(MSI_CONTROL, log2 << 1 | 1 << 7 | 1 << 8, 0x0071); // 64-bit, maskable; enable and count can be set
        self.set32(MSI + 4, 0, !3);
        self.set32(MSI + 8, 0, !0);
        self.set16(MSI + 12, 0, !0);
        self.set32(MSI + 16, 0, (1 << self.msi_vectors) - 1);
    }

    fn msix_capability(&mut self, shape: MsixShape, last: &mut usize) {
        self.value[*last + 1] = MSIX as u8;
        *last = MSIX;
        let vectors = shape.vectors.clamp(1, 2048);
        self.set(MSIX, [0x11, 0], [0, 0]);
        self.set16(MSIX_CONTROL, vectors - 1, 0xc000);
        self.set32(MSIX + 4, shape.table & !7 | u32::from(shape.bar & 7), 0);
        self.set32(MSIX + 8, shape.pending & !7 | u32::from(shape.bar & 7), 0);
    }

    fn get16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.value[at], self.value[at + 1]])
    }
    fn get32(&self, at: usize) -> u32 {
        u32::from(self.get16(at)) | u32::from(self.get16(at + 2)) << 16
    }

    /// Reads; beyond the end all ones.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.value.get(usize::from(offset) + i).copied().unwrap_or(0xff);
        }
    }

    /// Writes the writable bits and tells what that did. The reset itself is the caller's; [`Self::reset`] is part of it.
    pub fn write(&mut self, offset: u16, data: &[u8]) -> ConfigEffect {
        let start = usize::from(offset);
        let before = (self.get16(COMMAND), self.bar_words(), self.interrupt_words());
        let mut flr = false;
        for (i, &byte) in data.iter().enumerate() {
            let at = start + i;
            let (Some(value), Some(&mask)) = (self.value.get_mut(at), self.mask.get(at)) else {
                break;
            };
            flr |= at == DEVCTL + 1 && byte & (DEVCTL_FLR >> 8) as u8 != 0;
            *value = *value & !mask | byte & mask;
        }
        let command = self.get16(COMMAND);
        let changed = |bit: u16| ((before.0 ^ command) & bit != 0).then_some(command & bit != 0);
        let memory = changed(COMMAND_MEMORY);
        ConfigEffect {
            flr,
            bus_master: changed(COMMAND_BUS_MASTER),
            memory,
            bars_changed: memory.is_some() || before.1 != self.bar_words(),
            interrupts_changed: before.2 != self.interrupt_words(),
        }
    }

    fn bar_words(&self) -> [u32; 6] {
        std::array::from_fn(|i| self.get32(BAR0 + 4 * i))
    }
    fn interrupt_words(&self) -> [u32; 6] {
        let msi = |at| if self.msi_vectors > 0 { self.get32(at) } else { 0 };
        let msix = if self.has_msix { u32::from(self.get16(MSIX_CONTROL)) } else { 0 };
        [msi(MSI), msi(MSI + 4), msi(MSI + 8), msi(MSI + 12), msi(MSI + 16), msix]
    }

    /// Back to the values of power-on.
    pub fn reset(&mut self) {
        let Self { value, mask: _, reset, bars: _, msi_vectors: _, has_msix: _ } = self;
        value.copy_from_slice(&reset[..]);
    }

    /// The function may reach memory and raise messages.
    #[must_use]
    pub fn bus_master_enabled(&self) -> bool {
        self.get16(COMMAND) & COMMAND_BUS_MASTER != 0
    }

    /// The function answers at its BARs.
    #[must_use]
    pub fn memory_enabled(&self) -> bool {
        self.get16(COMMAND) & COMMAND_MEMORY != 0
    }

    /// Address of a BAR as written, 0 at first; `None` if there is no such BAR.
    #[must_use]
    pub fn bar_address(&self, index: u8) -> Option<u64> {
        let bar = self.bars.iter().find(|bar| bar.index == index)?;
        let at = BAR0 + 4 * usize::from(bar.index);
        Some((u64::from(self.get32(at)) | u64::from(self.get32(at + 4)) << 32) & !(bar.size - 1))
    }

    /// MSI, if it is offered.
    #[must_use]
    pub fn msi(&self) -> Option<MsiState> {
        (self.msi_vectors > 0).then(|| {
            let control = self.get16(MSI_CONTROL);
            MsiState {
                enabled: control & 1 != 0,
                vectors: (1 << (control >> 4 & 7)).min(self.msi_vectors),
                address: u64::from(self.get32(MSI + 4)) | u64::from(self.get32(MSI + 8)) << 32,
                data: self.get16(MSI + 12),
                mask: self.get32(MSI + 16),
            }
        })
    }

    /// Sets or clears the pending bit of a masked MSI vector.
    pub fn set_msi_pending(&mut self, vector: u16, pending: bool) {
        if vector < self.msi_vectors {
            let bit = 1 << vector;
            let byte = &mut self.value[MSI + 20];
            *byte = if pending { *byte | bit } else { *byte & !bit };
        }
    }

    /// MSI-X, if it is offered.
    #[must_use]
    pub fn msix(&self) -> Option<MsixState> {
        self.has_msix.then(|| {
            let control = self.get16(MSIX_CONTROL);
            MsixState { enabled: control & 1 << 15 != 0, masked: control & 1 << 14 != 0 }
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn space(msi: u16, msix: bool) -> ConfigSpace {
        let identity = Identity { vendor: 0x1234, device: 0x4d47, class: CLASS_GPU, revision: 1 };
        let bars = [
            BarShape { index: 0, size: 0x1_0000, prefetchable: false },
            BarShape { index: 2, size: 16 << 20, prefetchable: true },
            BarShape { index: 4, size: 0x1000, prefetchable: false },
        ];
        ConfigSpace::new(identity, &bars, msi, msix.then(|| MsixShape::in_bar4(3)))
    }
    fn r32(space: &ConfigSpace, at: u16) -> u32 {
        let mut b = [0; 4];
        space.read(at, &mut b);
        u32::from_le_bytes(b)
    }
    fn capabilities(space: &ConfigSpace) -> Vec<(u8, usize)> {
        let mut at = r32(space, 0x34) as u8;
        let mut found = vec![];
        while at != 0 {
            assert!(found.len() < 16, "the list must end");
            found.push(((r32(space, at.into()) & 0xff) as u8, usize::from(at)));
            at = (r32(space, at.into()) >> 8) as u8;
        }
        found
    }

    #[test]
    fn header_and_capabilities() {
        let s = space(3, true);
        assert_eq!(r32(&s, 0), 0x4d47_1234);
        assert_eq!(r32(&s, 8), 0x1200_0001);
        assert_eq!(r32(&s, 0x2c), 0x4d47_1234);
        assert_eq!(capabilities(&s), [(0x01, PM), (0x10, EXPRESS), (0x05, MSI), (0x11, MSIX)]);
        assert_eq!(r32(&s, MSI as u16) >> 17 & 7, 2, "three vectors are offered as four");
        assert_eq!(r32(&s, EXPRESS as u16 + 4) >> 28 & 1, 1);
        let ids = |s: &ConfigSpace| capabilities(s).iter().map(|c| c.0).collect::<Vec<_>>();
        assert_eq!(ids(&space(0, false)), [0x01, 0x10]);
        assert_eq!(ids(&space(0, true)), [0x01, 0x10, 0x11]);
        assert!(space(0, false).msi().is_none() && space(1, false).msix().is_none());
    }

    #[test]
    fn bars_are_sized_and_placed() {
        let mut s = space(4, true);
        assert_eq!(s.bar_address(2), Some(0));
        assert!(s.write(0x18, &[0xff; 8]).bars_changed);
        assert_eq!(u64::from(r32(&s, 0x18)) | u64::from(r32(&s, 0x1c)) << 32, !((16 << 20) - 1) | 0xc);
        let _ = s.write(0x18, &0x3_4100_0000_u64.to_le_bytes());
        assert_eq!(s.bar_address(2), Some(0x3_4100_0000));
        assert_eq!(s.bar_address(1), None);
        let e = s.write(0x04, &[0x06, 0]);
        assert_eq!((e.bus_master, e.memory, e.bars_changed), (Some(true), Some(true), true));
        assert!(s.bus_master_enabled() && s.memory_enabled());
        assert_eq!(s.write(0x04, &[0x02]).bus_master, Some(false));
        assert_eq!(s.write(0x04, &[0x02]), ConfigEffect::default());
    }

    #[test]
    fn flr_is_told_and_reads_as_zero() {
        let mut s = space(4, false);
        assert!(s.write(DEVCTL as u16 + 1, &[0x80]).flr);
        assert!(s.write(DEVCTL as u16, &[0, 0x80]).flr);
        assert!(!s.write(DEVCTL as u16, &[0, 0x7f]).flr);
        assert_eq!(r32(&s, DEVCTL as u16) & 0x8000, 0);
        let _ = s.write(4, &[6]);
        s.reset();
        assert!(!s.bus_master_enabled());
        assert_eq!(r32(&s, DEVCTL as u16) as u16, 0x2810);
    }

    #[test]
    fn messages() {
        let mut s = space(4, true);
        assert_eq!(s.msi(), Some(MsiState { vectors: 1, ..MsiState::default() }));
        let mut all = vec![0xff, 0xff];
        all.extend(0xfee0_0004_u64.to_le_bytes());
        all.extend(0x41_u16.to_le_bytes());
        let effect = s.write(MSI_CONTROL as u16, &all);
        assert!(effect.interrupts_changed);
        assert_eq!(
            s.msi(),
            Some(MsiState { enabled: true, vectors: 4, address: 0xfee0_0004, data: 0x41, mask: 0 })
        );
        let _ = s.write(MSI as u16 + 16, &[0xff; 4]);
        assert_eq!(s.msi().map(|m| m.mask), Some(0xf));
        s.set_msi_pending(2, true);
        s.set_msi_pending(9, true);
        assert_eq!(r32(&s, MSI as u16 + 20), 4);
        let _ = s.write(MSIX_CONTROL as u16, &[0xff, 0xff]);
        assert_eq!(s.msix(), Some(MsixState { enabled: true, masked: true }));
        assert_eq!(r32(&s, MSIX_CONTROL as u16) & 0x7ff, 2, "the table size cannot be written");
    }

    proptest! {
        #[test]
        fn any_access_is_harmless(ops in proptest::collection::vec((any::<u16>(), proptest::collection::vec(any::<u8>(), 0..9)), 0..64)) {
            let mut s = space(4, true);
            let fixed: Vec<u8> = (0..CONFIG_BYTES).map(|i| s.value[i] & !s.mask[i]).collect();
            for (at, data) in &ops {
                let _ = s.write(*at, data);
                let mut out = vec![0; data.len()];
                s.read(*at, &mut out);
            }
            for (i, f) in fixed.iter().enumerate() {
                prop_assert_eq!(s.value[i] & !s.mask[i], *f);
            }
            let _ = (s.msi(), s.msix(), s.bar_address(0));
            s.reset();
            prop_assert_eq!(&s.value[..], &s.reset[..]);
        }
    }
}
