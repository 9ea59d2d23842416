// SPDX-License-Identifier: MIT OR Apache-2.0
//! The register file: storage and rules of access, both taken from the declared table.

use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

use vgpu_spec::regs::gpu::{QUEUE_DOORBELL, REGISTERS};
use vgpu_spec::regs::{Access, Register};

/// Bytes of the BAR that hold stored registers; the doorbells behind only act.
const FILE_BYTES: u32 = 0x100;
const FILE_WORDS: usize = FILE_BYTES as usize / 4;

/// Values of all registers that have one.
#[derive(Debug)]
pub(crate) struct Registers {
    words: [AtomicU32; FILE_WORDS],
    /// Which register a word is.
    map: [Option<&'static Register>; FILE_WORDS],
    /// Values after reset that only the configuration knows.
    fixed: Vec<(u32, u32)>,
}

/// What a permitted write came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) before: u32,
    /// What is stored now, or for a register that only acts what was written.
    pub(crate) after: u32,
}

impl Registers {
    pub(crate) fn new(fixed: Vec<(u32, u32)>) -> Self {
        let mut map = [None; FILE_WORDS];
        for register in REGISTERS.iter().filter(|r| r.offset < FILE_BYTES) {
            for i in 0..register.count {
                if let Some(slot) = map.get_mut((register.offset / 4 + i) as usize) {
                    *slot = Some(register);
                }
            }
        }
        let registers = Self { words: std::array::from_fn(|_| AtomicU32::new(0)), map, fixed };
        registers.reset();
        registers
    }

    pub(crate) fn reset(&self) {
        let Self { words, map, fixed } = self;
        for (word, register) in words.iter().zip(map) {
            word.store(register.map_or(0, |register| register.reset), SeqCst);
        }
        for &(offset, value) in fixed {
            self.set(offset, value);
        }
    }

    /// The value of a register that is known to exist.
    #[inline]
    pub(crate) fn get(&self, offset: u32) -> u32 {
        self.words[offset as usize / 4 % FILE_WORDS].load(SeqCst)
    }
    pub(crate) fn set(&self, offset: u32, value: u32) {
        self.words[offset as usize / 4 % FILE_WORDS].store(value, SeqCst);
    }
    pub(crate) fn set_bits(&self, offset: u32, bits: u32) -> u32 {
        self.words[offset as usize / 4 % FILE_WORDS].fetch_or(bits, SeqCst)
    }
    /// A 64-bit value in a LO and HI pair.
    pub(crate) fn pair(&self, low: u32) -> u64 {
        u64::from(self.get(low)) | u64::from(self.get(low + 4)) << 32
    }

    fn register(&self, offset: u32) -> Option<&'static Register> {
        if offset % 4 != 0 {
            return None;
        }
        self.map.get(offset as usize / 4).copied().flatten()
    }

    /// A read by the guest; `None` if it is refused.
    pub(crate) fn guest_read(&self, offset: u32) -> Option<u32> {
        let register = self.register(offset)?;
        Some(if register.access == Access::WriteOnly { 0 } else { self.get(offset) })
    }

    /// A write by the guest; `None` if it is refused.
    pub(crate) fn guest_write(&self, offset: u32, value: u32) -> Option<Written> {
        let word = &self.words.get(offset as usize / 4);
        let register = self.register(offset)?;
        let word = (*word)?;
        match register.access {
            Access::ReadOnly => None,
            Access::WriteOnly => Some(Written { before: 0, after: value }),
            Access::ReadWrite(mask) => {
                let after = value & mask;
                Some(Written { before: word.swap(after, SeqCst), after })
            }
            Access::WriteOneToClear(mask) => {
                let before = word.fetch_and(!(value & mask), SeqCst);
                Some(Written { before, after: before & !(value & mask) })
            }
        }
    }
}

/// Which doorbell an offset is.
pub(crate) fn doorbell(offset: u32) -> Option<u32> {
    let register = REGISTERS.iter().find(|r| r.offset == QUEUE_DOORBELL)?;
    let index = offset.checked_sub(QUEUE_DOORBELL)?;
    (index % 4 == 0 && index / 4 < register.count).then_some(index / 4)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vgpu_spec::regs::gpu;

    #[test]
    fn access_rights_are_the_tables() {
        let registers = Registers::new(vec![(gpu::CONTEXTS, 64)]);
        for register in REGISTERS.iter().filter(|r| r.count == 1) {
            let value = registers.guest_read(register.offset).unwrap();
            if register.offset != gpu::CONTEXTS {
                assert_eq!(value, register.reset, "{}", register.name);
            }
            let written = registers.guest_write(register.offset, u32::MAX);
            match register.access {
                Access::ReadOnly => assert_eq!(written, None),
                Access::ReadWrite(mask) => assert_eq!(registers.get(register.offset), mask),
                Access::WriteOneToClear(_) => assert_eq!(registers.get(register.offset), 0),
                Access::WriteOnly => {}
            }
        }
        assert_eq!(registers.get(gpu::CONTEXTS), 64);
        assert_eq!(registers.guest_read(0x024), None);
        assert_eq!(registers.guest_read(0x001), None);
        assert_eq!(registers.guest_write(0xfc, 1), None);
        registers.reset();
        assert_eq!(registers.get(gpu::CMD_TAIL), 0);
        assert_eq!(registers.get(gpu::CONTEXTS), 64);
    }

    #[test]
    fn doorbells_are_found() {
        assert_eq!(doorbell(QUEUE_DOORBELL), Some(0));
        assert_eq!(doorbell(QUEUE_DOORBELL + 255 * 4), Some(255));
        assert_eq!(doorbell(QUEUE_DOORBELL + 256 * 4), None);
        assert_eq!(doorbell(QUEUE_DOORBELL + 2), None);
        assert_eq!(doorbell(0), None);
    }

    #[test]
    fn write_one_to_clear_clears_only_those() {
        let registers = Registers::new(vec![]);
        registers.set_bits(gpu::IRQ_STATUS, 7);
        registers.guest_write(gpu::IRQ_STATUS, 5);
        assert_eq!(registers.get(gpu::IRQ_STATUS), 2);
    }
}
