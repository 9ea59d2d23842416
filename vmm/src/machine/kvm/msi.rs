// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a function's configuration space says of its interrupts, and the MSI-X table, which is the machine's.

use super::host::Message;

const STATUS: u16 = 0x06;
const STATUS_CAPABILITIES: u32 = 1 << 4;
const CAP_POINTER: u16 = 0x34;
/// Capabilities that fit into the 192 bytes behind the header: a longer list is a circle.
pub(super) const MOST_CAPABILITIES: usize = 48;
pub(super) const CAP_MSI: u8 = 0x05;
pub(super) const CAP_EXPRESS: u8 = 0x10;
pub(super) const CAP_MSIX: u8 = 0x11;

/// Bytes of an entry of the MSI-X table.
const ENTRY: usize = 16;
/// Vectors that a table can have.
const MOST_VECTORS: u16 = 2048;

/// Reads 32 aligned bits of configuration space.
pub(super) type Config<'a> = &'a dyn Fn(u16) -> u32;

/// The MSI capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Msi {
    at: u16,
    wide: bool,
    maskable: bool,
    most: u16,
}

/// The MSI-X capability: where its table and pending bits are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Msix {
    at: u16,
    pub(super) table: Place,
    pub(super) pending: Place,
}

/// A part of a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) bar: u8,
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

impl Place {
    /// Where an access of that BAR falls in here.
    pub(super) fn inside(&self, bar: u8, offset: u64) -> Option<u64> {
        let inside = offset.checked_sub(self.offset)?;
        (bar == self.bar && inside < self.bytes).then_some(inside)
    }
}

/// The capabilities that the machine has to know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Capabilities {
    pub(super) msi: Option<Msi>,
    pub(super) msix: Option<Msix>,
    /// Offset of the express capability.
    pub(super) express: Option<u16>,
}

impl Capabilities {
    pub(super) fn find(config: Config<'_>) -> Self {
        let mut found = Self::default();
        if config(STATUS & !3) >> 16 & STATUS_CAPABILITIES == 0 {
            return found;
        }
        let mut at = config(CAP_POINTER) as u16 & 0xfc;
        for _ in 0..MOST_CAPABILITIES {
            if at < 0x40 {
                break;
            }
            let head = config(at);
            match head as u8 {
                CAP_MSI => {
                    let control = head >> 16;
                    found.msi = Some(Msi {
                        at,
                        wide: control & 1 << 7 != 0,
                        maskable: control & 1 << 8 != 0,
                        most: 1 << (control >> 1 & 7).min(5),
                    });
                }
                CAP_MSIX if at <= 0xf4 => {
                    let count = u64::from((head >> 16) as u16 & (MOST_VECTORS - 1)) + 1;
                    let place = |word: u32, bytes| Place {
                        bar: (word & 7) as u8,
                        offset: u64::from(word & !7),
                        bytes,
                    };
                    found.msix = Some(Msix {
                        at,
                        table: place(config(at + 4), count * ENTRY as u64),
                        pending: place(config(at + 8), count.div_ceil(64) * 8),
                    });
                }
                CAP_EXPRESS => found.express = Some(at),
                _ => {}
            }
            at = (head >> 8) as u16 & 0xfc;
        }
        found
    }

    /// What the guest has set up. MSI-X wins where both are on, which the standard leaves open.
    pub(super) fn setup(&self, config: Config<'_>) -> MsiSetup {
        if let Some(msix) = self.msix {
            let control = config(msix.at) >> 16;
            if control & 1 << 15 != 0 {
                return MsiSetup::Msix { masked: control & 1 << 14 != 0 };
            }
        }
        let Some(msi) = self.msi else { return MsiSetup::Off };
        let control = config(msi.at) >> 16;
        if control & 1 == 0 {
            return MsiSetup::Off;
        }
        let high = if msi.wide { u64::from(config(msi.at + 8)) << 32 } else { 0 };
        let data = if msi.wide { msi.at + 12 } else { msi.at + 8 };
        MsiSetup::Msi {
            vectors: (1 << (control >> 4 & 7).min(5)).min(msi.most),
            address: u64::from(config(msi.at + 4)) | high,
            data: config(data) as u16,
            mask: if msi.maskable { config(data + 4) } else { 0 },
        }
    }

    /// Offset of the MSI pending bits, if there are any.
    pub(super) fn msi_pending(&self) -> Option<u16> {
        self.msi.filter(|msi| msi.maskable).map(|msi| msi.at + if msi.wide { 20 } else { 16 })
    }

    /// Whether a write asks for a function-level reset.
    pub(super) fn resets(&self, offset: u16, data: &[u8]) -> bool {
        let Some(express) = self.express else { return false };
        // The bit is the highest of the device control register.
        let at = usize::from(express + 9).checked_sub(usize::from(offset));
        at.and_then(|at| data.get(at)).is_some_and(|byte| byte & 0x80 != 0)
    }
}

/// How the guest has set a function's interrupts up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum MsiSetup {
    /// No interrupts.
    #[default]
    Off,
    /// Messages from configuration space.
    Msi { vectors: u16, address: u64, data: u16, mask: u32 },
    /// Messages from the table.
    Msix { masked: bool },
}

impl MsiSetup {
    /// Vectors in use, at most.
    pub(super) fn vectors(&self) -> u16 {
        match *self {
            Self::Off => 0,
            Self::Msi { vectors, .. } => vectors,
            Self::Msix { .. } => MOST_VECTORS,
        }
    }

    /// A function with more vectors than it was granted sends them as others.
    pub(super) fn folds(&self) -> bool {
        matches!(self, Self::Msi { .. })
    }

    /// The message of a vector, unless it is masked.
    pub(super) fn message(&self, vector: u16, table: &MsixTable) -> Option<Message> {
        match *self {
            Self::Off => None,
            Self::Msi { vectors, address, data, mask } => {
                let masked = mask.checked_shr(vector.into()).is_some_and(|mask| mask & 1 != 0);
                let data = data & !(vectors - 1) | vector & (vectors - 1);
                (!masked).then_some(Message { address, data: data.into() })
            }
            Self::Msix { masked } => {
                if masked {
                    None
                } else {
                    table.message(vector)
                }
            }
        }
    }
}

/// The MSI-X table.
pub(super) struct MsixTable {
    bytes: Vec<u8>,
}

impl MsixTable {
    /// For so many vectors, all masked.
    pub(super) fn new(vectors: u16) -> Self {
        let mut table = Self { bytes: vec![0; usize::from(vectors.min(MOST_VECTORS)) * ENTRY] };
        table.reset();
        table
    }

    /// As at power-on.
    pub(super) fn reset(&mut self) {
        for entry in self.bytes.chunks_exact_mut(ENTRY) {
            entry.fill(0);
            entry[12] = 1;
        }
    }

    /// Four or eight bytes, aligned; anything else reads as zero.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(bytes) = range(offset, data.len()).and_then(|range| self.bytes.get(range)) {
            data.copy_from_slice(bytes);
        }
    }

    /// Four or eight bytes, aligned; anything else is ignored. Says whether something was written.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> bool {
        let Some(bytes) = range(offset, data.len()).and_then(|range| self.bytes.get_mut(range)) else {
            return false;
        };
        bytes.copy_from_slice(data);
        true
    }

    fn message(&self, vector: u16) -> Option<Message> {
        let entry = self.bytes.chunks_exact(ENTRY).nth(vector.into())?;
        let word = |at: usize| u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]);
        let address = u64::from(word(0) & !3) | u64::from(word(4)) << 32;
        (word(12) & 1 == 0).then_some(Message { address, data: word(8) })
    }
}

/// The range of an allowed access.
fn range(offset: u64, length: usize) -> Option<std::ops::Range<usize>> {
    let start = usize::try_from(offset).ok()?;
    let aligned = matches!(length, 4 | 8) && start % length == 0;
    aligned.then_some(start..start.checked_add(length)?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vgpu::pci::{BarShape, CLASS_GPU, ConfigSpace, Identity, MsixShape};

    use super::*;

    fn space(msi: u16, msix: bool) -> ConfigSpace {
        let identity = Identity { vendor: 0x1234, device: 0x4d47, class: CLASS_GPU, revision: 1 };
        let bars = [BarShape { index: 4, size: 0x1000, prefetchable: false }];
        ConfigSpace::new(identity, &bars, msi, msix.then(|| MsixShape::in_bar4(3)))
    }
    fn read(space: &ConfigSpace, at: u16) -> u32 {
        let mut bytes = [0; 4];
        space.read(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn capabilities_of_our_own_functions() {
        let space = space(3, true);
        let found = Capabilities::find(&|at| read(&space, at));
        let msix = found.msix.unwrap();
        assert_eq!(msix.table, Place { bar: 4, offset: 0, bytes: 48 });
        assert_eq!(msix.pending, Place { bar: 4, offset: 0x800, bytes: 8 });
        assert_eq!(msix.pending.inside(4, 0x804), Some(4));
        assert_eq!(msix.pending.inside(2, 0x804), None);
        assert_eq!(found.msi, Some(Msi { at: 0x90, wide: true, maskable: true, most: 4 }));
        assert!(
            found.resets(0x58, &[0, 0x80]) && found.resets(0x59, &[0xff]) && !found.resets(0x58, &[0xff])
        );
    }

    #[test]
    fn msi_folds_and_masks() {
        let mut space = space(3, false);
        let found = Capabilities::find(&|at| read(&space, at));
        let table = MsixTable::new(3);
        assert_eq!(found.setup(&|at| read(&space, at)), MsiSetup::Off);
        let _ = space.write(0x94, &0xfee0_1000_u32.to_le_bytes());
        let _ = space.write(0x9c, &0x41_u16.to_le_bytes());
        let _ = space.write(0xa0, &2_u32.to_le_bytes());
        let _ = space.write(0x92, &(1_u16 | 1 << 4).to_le_bytes());
        let setup = found.setup(&|at| read(&space, at));
        assert_eq!((setup.vectors(), setup.folds()), (2, true));
        assert_eq!(setup.message(0, &table), Some(Message { address: 0xfee0_1000, data: 0x40 }));
        assert_eq!(setup.message(1, &table), None, "masked");
    }

    #[test]
    fn msix_table() {
        let mut table = MsixTable::new(2);
        let on = MsiSetup::Msix { masked: false };
        assert_eq!(on.message(0, &table), None, "masked at power-on");
        assert!(table.write(16, &0xfee0_2000_u64.to_le_bytes()));
        assert!(table.write(24, &0x51_u32.to_le_bytes()) && table.write(28, &0_u32.to_le_bytes()));
        assert_eq!(on.message(1, &table), Some(Message { address: 0xfee0_2000, data: 0x51 }));
        assert_eq!(MsiSetup::Msix { masked: true }.message(1, &table), None);
        assert_eq!(on.message(2, &table), None);
        assert!(!table.write(32, &[0; 4]) && !table.write(2, &[0; 4]) && !table.write(0, &[0; 2]));
        table.reset();
        assert_eq!(on.message(1, &table), None);
    }

    proptest! {
        #[test]
        fn hostile_configuration_space(words in prop::collection::vec(any::<u32>(), 64)) {
            let config = |at: u16| words.get(usize::from(at / 4)).copied().unwrap_or(u32::MAX);
            let found = Capabilities::find(&config);
            let setup = found.setup(&config);
            let table = MsixTable::new(4);
            for vector in 0..setup.vectors().min(64) {
                let _ = setup.message(vector, &table);
            }
            let _ = (found.msi_pending(), found.resets(words[0] as u16, &[0xff; 4]));
        }

        #[test]
        fn hostile_table_accesses(offset in any::<u64>(), near in 0_u64..80, data in prop::collection::vec(any::<u8>(), 0..9)) {
            let mut table = MsixTable::new(4);
            for offset in [offset, near] {
                let mut back = vec![1; data.len()];
                let written = table.write(offset, &data);
                table.read(offset, &mut back);
                let sound = if written { back == data } else { back.iter().all(|byte| *byte == 0) || data.len() % 4 == 0 };
                prop_assert!(sound);
            }
        }
    }
}
