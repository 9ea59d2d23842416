// SPDX-License-Identifier: MIT OR Apache-2.0
//! The I/O ports.

use std::sync::Arc;

use super::pci::PciBus;
use super::serial::Serial;

/// COM1, eight registers.
pub(super) const COM1: u16 = 0x3f8;
/// Interrupt of COM1.
pub(super) const COM1_IRQ: u32 = 4;
/// The keyboard controller's command port: only its reset line exists.
const KEYBOARD: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;
/// The reset register, within the range of the configuration ports.
pub(super) const RESET: u16 = 0xcf9;
/// What resets when written there.
pub(super) const RESET_VALUE: u8 = 0x06;
/// The sleep control register, and the sleep status register behind it.
pub(super) const SLEEP: u16 = 0x600;
/// The type of sleep that is power-off, as the tables say.
pub(super) const SLEEP_OFF: u8 = 5;
const SLEEP_ENABLE: u8 = 1 << 5;

/// What the guest wants of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    /// To be switched off.
    PowerOff,
    /// To begin anew.
    Reset,
}

/// What answers at I/O ports.
pub(super) struct Ports {
    pub(super) serial: Arc<Serial>,
    pub(super) pci: Arc<PciBus>,
}

impl Ports {
    /// An access of a string instruction comes with many bytes for one port.
    pub(super) fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match port {
            0x3f8..=0x3ff => data.fill_with(|| self.serial.read((port - COM1) as u8)),
            0xcf8..=0xcff => self.pci.port_read(port, data),
            // No key is there, and commands are taken at once.
            0x60 | KEYBOARD => data.fill(0),
            SLEEP | 0x601 => data.fill(0),
            _ => {}
        }
    }

    /// Carries a write out; what it means to the machine, if anything.
    pub(super) fn write(&self, port: u16, data: &[u8]) -> Option<Wish> {
        match (port, data) {
            (0x3f8..=0x3ff, _) => data.iter().for_each(|byte| self.serial.write((port - COM1) as u8, *byte)),
            (RESET, [value]) => return (value & 0x04 != 0).then_some(Wish::Reset),
            (0xcf8..=0xcff, _) => self.pci.port_write(port, data),
            (KEYBOARD, [KEYBOARD_RESET]) => return Some(Wish::Reset),
            (SLEEP, [value]) if value & SLEEP_ENABLE != 0 && value >> 2 & 7 == SLEEP_OFF => {
                return Some(Wish::PowerOff);
            }
            _ => {}
        }
        None
    }
}
