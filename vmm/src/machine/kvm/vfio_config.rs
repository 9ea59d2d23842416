// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a guest sees of the configuration space of a device that is handed over.
//!
//! The host's kernel filters already (it lets no guest move the real BARs or name a message's address). On top of it this
//! keeps for the guest alone whatever would make the device stop answering this process, or is the machine's: the command
//! register but for bus mastering, BARs, MSI and MSI-X, the power state. Behind the first 256 bytes everything is read-only,
//! and capabilities by which a device would ask more of its platform than this one has are hidden.

use std::collections::BTreeSet;

use super::msi::{CAP_EXPRESS, CAP_MSI, CAP_MSIX, MOST_CAPABILITIES};

/// Bytes whose value can be the guest's own.
const OWN: usize = 256;
/// The whole space.
const ALL: u16 = 4096;

const COMMAND: usize = 0x04;
const COMMAND_MEMORY: u8 = 1 << 1;
const COMMAND_BUS_MASTER: u8 = 1 << 2;
/// What the guest can set of the low byte: memory, bus mastering, parity errors.
const COMMAND_LOW: u8 = COMMAND_MEMORY | COMMAND_BUS_MASTER | 1 << 6;
/// And of the high byte: system errors, no interrupt line. The device itself always has the latter set.
const COMMAND_HIGH: u8 = 1 | COMMAND_NO_LINE;
const COMMAND_NO_LINE: u8 = 1 << 2;
const STATUS: usize = 0x06;
const CACHE_LINE: usize = 0x0c;
const HEADER: usize = 0x0e;
const HEADER_FUNCTIONS: u8 = 1 << 7;
const SELF_TEST: usize = 0x0f;
const BARS: usize = 0x10;
const BARS_END: usize = 0x28;
const ROM: usize = 0x30;
const CAP_POINTER: usize = 0x34;
const LINE: usize = 0x3c;
const PIN: usize = 0x3d;
const CAPABILITIES: usize = 0x40;

const CAP_POWER: u8 = 0x01;
const CAP_FEATURES: u8 = 0x13;

/// Extended capabilities that are hidden: those of routing (ARI), address translation (ATS, PRI, PASID), virtual functions and
/// resizable BARs.
const HIDDEN: [u16; 7] = [0x0e, 0x0f, 0x10, 0x13, 0x15, 0x1b, 0x24];
/// Extended capabilities that fit.
const MOST_EXTENDED: usize = (ALL as usize - OWN) / 8;

/// The device's own configuration space.
pub(super) trait Raw {
    /// Reads; what cannot be read is left as it is.
    fn read(&self, offset: u16, data: &mut [u8]);
    /// Writes.
    fn write(&self, offset: u16, data: &[u8]);
}

/// A memory BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BarShape {
    pub(super) index: u8,
    pub(super) size: u64,
    pub(super) wide: bool,
    pub(super) prefetchable: bool,
}

/// The guest's view.
pub(super) struct Config {
    /// Bytes that are the guest's own; others are the device's.
    own: [bool; OWN],
    at_reset: [u8; OWN],
    value: [u8; OWN],
    /// Which bits of its own the guest can write.
    mask: [u8; OWN],
    /// Where extended capabilities begin whose number reads as none.
    hidden: BTreeSet<u16>,
    /// The device control register's high byte, if the device can be reset by it.
    resets_at: Option<usize>,
}

impl Config {
    /// From a device with memory BARs of these sizes (a power of two, or 0 for none), by BAR number.
    pub(super) fn new(raw: &dyn Raw, sizes: [u64; 6]) -> (Self, Vec<BarShape>) {
        let mut real = [0; OWN];
        raw.read(0, &mut real);
        let mut config = Self {
            own: [false; OWN],
            at_reset: real,
            value: real,
            mask: [0; OWN],
            hidden: hidden(raw),
            resets_at: None,
        };
        config.keep(COMMAND, 0, COMMAND_LOW);
        config.keep(COMMAND + 1, 0, COMMAND_HIGH);
        config.keep(CACHE_LINE, real[CACHE_LINE], 0xff);
        config.keep(CACHE_LINE + 1, real[CACHE_LINE + 1], 0xff);
        config.keep(HEADER, real[HEADER] & !HEADER_FUNCTIONS, 0);
        config.keep(SELF_TEST, 0, 0);
        config.keep(LINE, 0, 0xff);
        config.keep(PIN, 0, 0);
        (BARS..BARS_END).chain(ROM..ROM + 4).for_each(|at| config.keep(at, 0, 0));
        let bars = config.bars(&real, sizes);
        config.capabilities(&real);
        config.value = config.at_reset;
        (config, bars)
    }

    fn keep(&mut self, at: usize, value: u8, mask: u8) {
        if at < OWN {
            self.own[at] = true;
            self.at_reset[at] = value;
            self.mask[at] = mask;
        }
    }

    fn bars(&mut self, real: &[u8; OWN], sizes: [u64; 6]) -> Vec<BarShape> {
        let mut bars = Vec::new();
        let mut index = 0;
        while index < sizes.len() {
            let at = BARS + 4 * index;
            let kind = real[at] & 0xf;
            let (wide, size) = (kind & 6 == 4 && index < 5, sizes[index]);
            // An I/O BAR is not shown: nothing here decodes ports for a device.
            if kind & 1 == 0 && size.is_power_of_two() && size >= 16 && (wide || size <= 1 << 31) {
                let bits = !(size - 1);
                for (i, byte) in bits.to_le_bytes().into_iter().take(if wide { 8 } else { 4 }).enumerate() {
                    self.keep(at + i, if i == 0 { kind } else { 0 }, byte);
                }
                bars.push(BarShape { index: index as u8, size, wide, prefetchable: kind & 8 != 0 });
            }
            index += if wide { 2 } else { 1 };
        }
        bars
    }

    fn capabilities(&mut self, real: &[u8; OWN]) {
        if real[STATUS] & 1 << 4 == 0 {
            return;
        }
        let mut at = usize::from(real[CAP_POINTER] & 0xfc);
        for _ in 0..MOST_CAPABILITIES {
            if !(CAPABILITIES..OWN - 4).contains(&at) {
                return;
            }
            let byte = |offset: usize| real.get(at + offset).copied().unwrap_or(0);
            match real[at] {
                CAP_MSI => {
                    let (wide, maskable) = (byte(2) & 1 << 7 != 0, byte(3) & 1 != 0);
                    // On or off, and how many vectors.
                    self.keep(at + 2, byte(2) & !0x71, 0x71);
                    self.keep(at + 3, byte(3), 0);
                    (at + 4..at + 8).for_each(|at| self.keep(at, 0, 0xff));
                    self.keep(at + 4, 0, 0xfc);
                    let data = if wide { at + 12 } else { at + 8 };
                    (at + 8..data + 2).for_each(|at| self.keep(at, 0, 0xff));
                    if maskable {
                        (data + 4..data + 8).for_each(|at| self.keep(at, 0, 0xff));
                        (data + 8..data + 12).for_each(|at| self.keep(at, 0, 0));
                    }
                }
                CAP_MSIX => {
                    self.keep(at + 2, byte(2), 0);
                    self.keep(at + 3, byte(3) & 0x07, 0xc0);
                }
                CAP_POWER => {
                    // A device that sleeps answers nothing. So the state is only remembered, and waking does not reset.
                    self.keep(at + 4, byte(4) & !3 | 1 << 3, 3);
                    self.keep(at + 5, byte(5) & 0x7e, 0);
                }
                CAP_EXPRESS if byte(7) & 1 << 4 != 0 => self.resets_at = Some(at + 9),
                CAP_FEATURES => {
                    // Its reset would be the second of its kind.
                    self.keep(at + 3, byte(3) & !2, 0);
                    self.keep(at + 4, 0, 0);
                }
                _ => {}
            }
            at = usize::from(byte(1) & 0xfc);
        }
    }

    /// Reads as the guest does. What is not there reads as all ones.
    pub(super) fn read(&self, raw: &dyn Raw, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        if usize::from(offset) + data.len() > usize::from(ALL) {
            return;
        }
        raw.read(offset, data);
        for (at, byte) in (usize::from(offset)..).zip(data) {
            if self.own.get(at).is_some_and(|own| *own) {
                *byte = self.value[at];
            }
            // The number's two bytes; where the next one is stays.
            if self.hidden.contains(&((at & !3) as u16)) && at & 3 < 2 {
                *byte = 0;
            }
        }
    }

    /// Writes as the guest does. Says whether it asked for a reset, which is the caller's.
    #[must_use]
    pub(super) fn write(&mut self, raw: &dyn Raw, offset: u16, data: &[u8]) -> bool {
        let first = usize::from(offset);
        let master = self.value[COMMAND] & COMMAND_BUS_MASTER;
        let mut through = Vec::with_capacity(data.len());
        let mut reset = false;
        for (at, byte) in (first..OWN).zip(data) {
            if self.own[at] {
                self.value[at] = self.value[at] & !self.mask[at] | byte & self.mask[at];
            } else if self.resets_at == Some(at) {
                reset |= byte & 1 << 7 != 0;
                through.push((at, byte & !(1 << 7)));
            } else if at >= CAPABILITIES || (STATUS..STATUS + 2).contains(&at) {
                through.push((at, *byte));
            }
        }
        if through.len() == data.len() {
            let bytes: Vec<u8> = through.iter().map(|(_, byte)| *byte).collect();
            raw.write(offset, &bytes);
        } else {
            through.iter().for_each(|(at, byte)| raw.write(*at as u16, &[*byte]));
        }
        if master != self.value[COMMAND] & COMMAND_BUS_MASTER {
            self.set_command(raw);
        }
        reset
    }

    /// Sets the device's own command register: it always answers, uses no interrupt line, and masters the bus if the guest
    /// wants that.
    pub(super) fn set_command(&self, raw: &dyn Raw) {
        let master = self.value[COMMAND] & COMMAND_BUS_MASTER;
        raw.write(COMMAND as u16, &[COMMAND_MEMORY | master, COMMAND_NO_LINE]);
    }

    /// As at power-on.
    pub(super) fn reset(&mut self, raw: &dyn Raw) {
        self.value = self.at_reset;
        self.set_command(raw);
    }
}

fn hidden(raw: &dyn Raw) -> BTreeSet<u16> {
    let mut hidden = BTreeSet::new();
    let mut at = OWN as u16;
    for _ in 0..MOST_EXTENDED {
        let mut head = [0; 4];
        raw.read(at, &mut head);
        let head = u32::from_le_bytes(head);
        if HIDDEN.contains(&(head as u16)) {
            hidden.insert(at);
        }
        at = (head >> 20) as u16 & 0xffc;
        if usize::from(at) < OWN {
            break;
        }
    }
    hidden
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use proptest::prelude::*;

    use super::*;

    struct Fake {
        bytes: RefCell<[u8; 4096]>,
        writes: RefCell<Vec<(u16, Vec<u8>)>>,
    }

    impl Raw for Fake {
        fn read(&self, offset: u16, data: &mut [u8]) {
            data.copy_from_slice(&self.bytes.borrow()[usize::from(offset)..][..data.len()]);
        }
        fn write(&self, offset: u16, data: &[u8]) {
            self.writes.borrow_mut().push((offset, data.to_vec()));
        }
    }

    /// A device with a narrow BAR 0, a wide BAR 2, an I/O BAR 5, and all capabilities that matter.
    fn fake() -> Fake {
        let mut bytes = [0; 4096];
        bytes[..4].copy_from_slice(&[0x34, 0x12, 0xe8, 0x11]);
        bytes[COMMAND] = 7;
        bytes[STATUS] = 0x10;
        bytes[HEADER] = 0x80;
        bytes[BARS + 3] = 0xfe;
        bytes[BARS + 8] = 0xc;
        bytes[BARS + 20] = 1;
        bytes[PIN] = 1;
        bytes[CAP_POINTER] = 0x40;
        bytes[0x40..0x46].copy_from_slice(&[CAP_MSI, 0x60, 0x81, 1, 0, 0]);
        bytes[0x60..0x64].copy_from_slice(&[CAP_MSIX, 0x70, 3, 0x80]);
        bytes[0x70..0x75].copy_from_slice(&[CAP_POWER, 0x80, 0, 0, 3]);
        bytes[0x80..0x88].copy_from_slice(&[CAP_EXPRESS, 0, 2, 0, 0, 0, 0, 0x10]);
        bytes[0x100..0x104].copy_from_slice(&(0x0001_0010_u32 | 0x180 << 20).to_le_bytes());
        bytes[0x180..0x184].copy_from_slice(&0x0001_0001_u32.to_le_bytes());
        Fake { bytes: RefCell::new(bytes), writes: RefCell::default() }
    }

    const SIZES: [u64; 6] = [1 << 20, 0, 1 << 24, 0, 0, 32];

    fn word(config: &Config, raw: &Fake, at: u16) -> u32 {
        let mut bytes = [0; 4];
        config.read(raw, at, &mut bytes);
        u32::from_le_bytes(bytes)
    }
    fn set(config: &mut Config, raw: &Fake, at: u16, value: u32) -> bool {
        config.write(raw, at, &value.to_le_bytes())
    }

    #[test]
    fn bars_are_the_guests_own() {
        let raw = fake();
        let (mut config, bars) = Config::new(&raw, SIZES);
        let shape = |index, size, wide, prefetchable| BarShape { index, size, wide, prefetchable };
        assert_eq!(bars, [shape(0, 1 << 20, false, false), shape(2, 1 << 24, true, true)]);
        for at in (0x10..0x28).step_by(4) {
            assert!(!set(&mut config, &raw, at, u32::MAX));
        }
        let seen: Vec<u32> = (0x10..0x28).step_by(4).map(|at| word(&config, &raw, at)).collect();
        assert_eq!(seen, [0xfff0_0000, 0, 0xff00_000c, u32::MAX, 0, 0]);
        set(&mut config, &raw, 0x30, u32::MAX);
        assert_eq!(word(&config, &raw, 0x30), 0);
        assert_eq!(word(&config, &raw, 0x3c) >> 8 & 0xff, 0, "no interrupt line");
        assert_eq!(word(&config, &raw, 0x0c) >> 16, 0, "a single function");
        assert!(raw.writes.borrow().is_empty());
    }

    #[test]
    fn the_device_always_answers() {
        let raw = fake();
        let (mut config, _) = Config::new(&raw, SIZES);
        assert_eq!(word(&config, &raw, 4) as u16, 0);
        set(&mut config, &raw, 4, 0xffff);
        assert_eq!(word(&config, &raw, 4) as u16, 0x0546);
        let to_device =
            |raw: &Fake| raw.writes.borrow().iter().filter(|w| w.0 == 4).cloned().collect::<Vec<_>>();
        assert_eq!(to_device(&raw), [(4, vec![6, 4])]);
        set(&mut config, &raw, 4, 2);
        set(&mut config, &raw, 4, 0);
        assert_eq!(to_device(&raw)[1..], [(4, vec![2, 4])], "memory stays on");
        // Asleep for the guest only.
        raw.writes.borrow_mut().clear();
        assert!(!config.write(&raw, 0x74, &[3, 0]));
        assert_eq!(word(&config, &raw, 0x74) & 0xff, 0xb);
        assert!(raw.writes.borrow().is_empty());
    }

    #[test]
    fn messages_never_reach_the_device() {
        let raw = fake();
        let (mut config, _) = Config::new(&raw, SIZES);
        assert_eq!(
            (word(&config, &raw, 0x40) >> 16, word(&config, &raw, 0x60) >> 16),
            (0x0180, 3),
            "both off"
        );
        for (at, value) in
            [(0x40, 0x0071_0000), (0x44, u32::MAX), (0x48, 7), (0x4c, 0x42), (0x50, 5), (0x60, 0xffff_0000)]
        {
            set(&mut config, &raw, at, value);
        }
        assert_eq!(word(&config, &raw, 0x40) >> 16, 0x01f1);
        assert_eq!((word(&config, &raw, 0x44), word(&config, &raw, 0x48)), (0xffff_fffc, 7));
        assert_eq!((word(&config, &raw, 0x4c) as u16, word(&config, &raw, 0x50)), (0x42, 5));
        assert_eq!(word(&config, &raw, 0x60) >> 16, 0xc003);
        let reached: Vec<u16> = raw.writes.borrow().iter().map(|(at, _)| *at).collect();
        assert!(
            reached.iter().all(|at| matches!(at, 0x40 | 0x41 | 0x4e | 0x4f | 0x60 | 0x61)),
            "{reached:x?}"
        );
    }

    #[test]
    fn a_reset_is_the_callers() {
        let raw = fake();
        let (mut config, _) = Config::new(&raw, SIZES);
        set(&mut config, &raw, 4, 6);
        raw.writes.borrow_mut().clear();
        assert!(config.write(&raw, 0x88, &[0x10, 0x80]));
        assert_eq!(*raw.writes.borrow(), [(0x88, vec![0x10, 0])]);
        config.reset(&raw);
        assert_eq!(word(&config, &raw, 4) as u16, 0);
        assert_eq!(raw.writes.borrow()[1], (4, vec![2, 4]));
    }

    #[test]
    fn extended_capabilities() {
        let raw = fake();
        let (mut config, _) = Config::new(&raw, SIZES);
        assert_eq!(word(&config, &raw, 0x100), 0x0001_0000 & 0xffff_0000 | 0x180 << 20, "hidden, but a link");
        assert_eq!(word(&config, &raw, 0x180), 0x0001_0001);
        assert!(!set(&mut config, &raw, 0x184, u32::MAX));
        assert!(raw.writes.borrow().is_empty());
        let mut beyond = [0; 4];
        config.read(&raw, 4094, &mut beyond);
        assert_eq!(beyond, [0xff; 4]);
    }

    proptest! {
        #[test]
        fn hostile_spaces_and_writes(seed in prop::collection::vec(any::<u8>(), 512), writes in prop::collection::vec((0_u16..4096, any::<u32>()), 0..40)) {
            let raw = fake();
            raw.bytes.borrow_mut()[..512].copy_from_slice(&seed);
            let (mut config, _) = Config::new(&raw, [u64::MAX, 3, 1 << 40, 1 << 63, 16, 1 << 12]);
            for (at, value) in writes {
                let at = at.min(4092);
                let _ = config.write(&raw, at, &value.to_le_bytes());
                let mut back = [0; 4];
                config.read(&raw, at, &mut back);
            }
            let reached = raw.writes.borrow();
            prop_assert!(reached.iter().all(|(at, data)| usize::from(*at) + data.len() <= OWN));
            prop_assert!(reached.iter().all(|(at, _)| *at >= 0x40 || matches!(at, 4 | 6 | 7)));
        }
    }
}
