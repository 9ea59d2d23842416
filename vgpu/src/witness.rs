// SPDX-License-Identifier: MIT OR Apache-2.0
//! The witness's PCI function: the door through which the guest's witness module reports.
//!
//! It has no interrupts and no state beyond a few registers. A record is judged inside the register write that announces
//! it, so the guest's CPU does not go on before.

use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use vgpu_spec::gate::SLOTS;
use vgpu_spec::regs::witness as regs;
use vgpu_spec::witness::{CONSTANTS, HEARTBEAT, HELLO, MAX_MESSAGE, MESSAGE, RECORD_BYTES, Record};
use vgpu_spec::{PCI_DEVICE_WITNESS, PCI_VENDOR_ID};

use crate::function::{Backing, Bar, Effects, Function};
use crate::gates::{Conductor, Doors, GateRecord};
use crate::memory::SystemMemory;
use crate::oracle::Oracle;
use crate::pci::{BarShape, CLASS_WITNESS, ConfigSpace, Identity};

/// Who else wants to hear of the guest. Called inside a register access of the guest: it must not block.
pub trait GuestSink: Send + Sync {
    /// A message of the guest's agent.
    fn message(&self, json: &[u8]);
    /// A heartbeat, by the guest's count, and the probes missed so far; whether it counts. One that does not is none to the oracle: a
    /// guest that the host lets run a tenth of the time has a tenth of the heartbeats. One by which more probes are missed must count.
    fn heartbeat(&self, count: u64, missed: u64) -> bool;
    /// The witness module is loaded.
    fn hello(&self, record: &Record);
}

/// Nobody who wants to hear of the guest: for benchmarks, and tests of machines.
pub struct Deaf;

impl GuestSink for Deaf {
    fn message(&self, _: &[u8]) {}
    fn heartbeat(&self, _: u64, _: u64) -> bool {
        true
    }
    fn hello(&self, _: &Record) {}
}

/// Offset behind the last gate slot's register.
const GATES_END: u32 = regs::GATE + 4 * SLOTS as u32;

#[derive(Clone, Copy, Default)]
struct Registers {
    records_lo: u32,
    records_hi: u32,
    slots: u32,
}

impl Registers {
    /// Bus address of a slot, if the guest has set things up so that there is one.
    fn slot(&self, number: u32) -> Option<u64> {
        let base = u64::from(self.records_hi) << 32 | u64::from(self.records_lo);
        let fits = number < self.slots && self.slots <= regs::MAX_SLOTS;
        if base == 0 || base % RECORD_BYTES as u64 != 0 || !fits {
            return None;
        }
        base.checked_add(u64::from(number) * RECORD_BYTES as u64)
    }
}

/// The witness's function.
pub struct Witness {
    memory: Arc<SystemMemory>,
    oracle: Arc<Oracle>,
    sink: Arc<dyn GuestSink>,
    config: Mutex<ConfigSpace>,
    registers: Mutex<Registers>,
    request: AtomicU32,
    bad_records: AtomicU32,
    doors: Doors,
    conductor: OnceLock<Arc<dyn Conductor>>,
}

impl Witness {
    /// A witness that reports to `oracle` and `sink`, and reads records from `memory`.
    #[must_use]
    pub fn new(memory: Arc<SystemMemory>, oracle: Arc<Oracle>, sink: Arc<dyn GuestSink>) -> Arc<Self> {
        let identity = Identity {
            vendor: PCI_VENDOR_ID,
            device: PCI_DEVICE_WITNESS,
            class: CLASS_WITNESS,
            revision: regs::VERSION_VALUE as u8,
        };
        let bar = BarShape { index: 0, size: regs::BAR_BYTES, prefetchable: false };
        Arc::new(Self {
            memory,
            oracle,
            sink,
            config: Mutex::new(ConfigSpace::new(identity, &[bar], 0, None)),
            registers: Mutex::default(),
            request: AtomicU32::new(0),
            bad_records: AtomicU32::new(0),
            doors: Doors::default(),
            conductor: OnceLock::new(),
        })
    }

    /// Who decides on gates. Without one nobody is held at any. To be called once, before the guest runs.
    pub fn conduct(&self, conductor: Arc<dyn Conductor>) {
        // The first one stays.
        let _ = self.conductor.set(conductor);
    }

    /// Asks something of the guest (`REQUEST_*`) at its next heartbeat.
    pub fn request(&self, bits: u32) {
        self.request.fetch_or(bits, SeqCst);
    }

    /// Records refused.
    #[must_use]
    pub fn bad_records(&self) -> u32 {
        self.bad_records.load(SeqCst)
    }

    fn read_register(&self, offset: u64) -> u32 {
        let Ok(offset) = u32::try_from(offset) else { return 0 };
        match offset {
            regs::ID => regs::ID_VALUE,
            regs::VERSION => regs::VERSION_VALUE,
            regs::RECORDS_LO => self.registers.lock().records_lo,
            regs::RECORDS_HI => self.registers.lock().records_hi,
            regs::SLOTS => self.registers.lock().slots,
            regs::REQUEST => self.request.swap(0, SeqCst),
            regs::BAD_RECORDS => self.bad_records(),
            regs::GATE..GATES_END => self.door((offset - regs::GATE) / 4),
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        let Ok(offset) = u32::try_from(offset) else { return };
        match offset {
            regs::RECORDS_LO => self.registers.lock().records_lo = value,
            regs::RECORDS_HI => self.registers.lock().records_hi = value,
            regs::SLOTS => self.registers.lock().slots = value & 0x3ff,
            regs::EVENT => self.announced(value),
            _ => {}
        }
    }

    /// A task looks whether it may go on.
    fn door(&self, slot: u32) -> u32 {
        let slot = slot as usize;
        if !self.doors.is_open(slot) {
            if let Some(conductor) = self.conductor.get() {
                conductor.looked(slot, &self.doors);
            }
        }
        self.doors.is_open(slot).into()
    }

    /// Somebody has come to a gate, or something else is told of one. None if it makes no sense.
    fn gate(&self, record: &Record) -> Option<()> {
        let told = GateRecord::read(record)?;
        match (told, self.conductor.get()) {
            (GateRecord::Reached { slot: Some(slot), .. }, Some(_)) => self.doors.close(slot),
            (GateRecord::Reached { slot: Some(slot), .. }, None) => self.doors.open(slot),
            _ => {}
        }
        Some(())
    }

    /// Slot `number` is said to hold a record. Another CPU may report meanwhile: nothing is locked while this one is judged.
    fn announced(&self, number: u32) {
        if self.take(number).is_none() {
            self.bad_records.fetch_add(1, SeqCst);
            self.oracle.bad_record();
        }
    }

    /// Takes the record in a slot, or says that there is none.
    fn take(&self, number: u32) -> Option<()> {
        if !self.config.lock().bus_master_enabled() {
            return None;
        }
        let registers = *self.registers.lock();
        let address = registers.slot(number)?;
        let snapshot = self.memory.snapshot();
        let record: Record = snapshot.read_object(address).ok()?;
        if GateRecord::is_kind(record.kind) {
            self.gate(&record)?;
        } else if !CONSTANTS.iter().any(|(_, kind, _)| *kind == u64::from(record.kind)) {
            return None;
        }
        let mut message = Vec::new();
        if record.kind == MESSAGE {
            let [from, bytes, ..] = record.arg;
            if bytes == 0 || bytes > MAX_MESSAGE {
                return None;
            }
            message.resize(bytes as usize, 0);
            snapshot.read(from, &mut message).ok()?;
        }
        drop(snapshot);
        if record.kind != HEARTBEAT || self.sink.heartbeat(record.arg[0], record.arg[1]) {
            self.oracle.witness(&record);
        }
        if let Some(conductor) = self.conductor.get().filter(|_| record.kind != MESSAGE) {
            conductor.record(&record, &self.doors);
        }
        match record.kind {
            HELLO => self.sink.hello(&record),
            MESSAGE => self.sink.message(&message),
            _ => {}
        }
        Some(())
    }
}

impl Function for Witness {
    fn bars(&self) -> Vec<Bar<'_>> {
        vec![Bar { index: 0, size: regs::BAR_BYTES, prefetchable: false, backing: Backing::Trapped }]
    }
    fn vectors(&self) -> u16 {
        0
    }
    fn has_msix(&self) -> bool {
        false
    }
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.config.lock().read(offset, data);
    }
    fn config_write(&self, offset: u16, data: &[u8]) -> Effects {
        let effect = self.config.lock().write(offset, data);
        if effect.flr {
            return self.reset();
        }
        Effects::default()
    }
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if bar == 0 && offset % 4 == 0 && data.len() == 4 {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
    }
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> Effects {
        if let (0, 0, Ok(value)) = (bar, offset % 4, <[u8; 4]>::try_from(data)) {
            self.write_register(offset, u32::from_le_bytes(value));
        }
        Effects::default()
    }
    fn reset(&self) -> Effects {
        let Self {
            memory: _,
            oracle: _,
            sink: _,
            config,
            registers,
            request,
            bad_records,
            doors,
            conductor: _,
        } = self;
        config.lock().reset();
        *registers.lock() = Registers::default();
        request.store(0, SeqCst);
        bad_records.store(0, SeqCst);
        doors.open_all();
        Effects::default()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vgpu_spec::witness::{MM_BEGIN, MM_RELEASED};

    use super::*;
    use crate::oracle::OracleConfig;
    use crate::testing::anonymous_file;

    #[derive(Default)]
    struct Heard(Mutex<Vec<String>>);
    impl GuestSink for Heard {
        fn message(&self, json: &[u8]) {
            self.0.lock().push(String::from_utf8_lossy(json).into_owned());
        }
        fn heartbeat(&self, count: u64, missed: u64) -> bool {
            self.0.lock().push(format!("beat {count} {missed}"));
            count != 0
        }
        fn hello(&self, record: &Record) {
            self.0.lock().push(format!("hello {}", record.arg[0]));
        }
    }

    const RAM: u64 = 0x10_0000;
    const RECORDS: u64 = RAM + 0x1000;
    const TEXT: u64 = RAM + 0x4000;

    struct Bench {
        memory: Arc<SystemMemory>,
        oracle: Arc<Oracle>,
        heard: Arc<Heard>,
        witness: Arc<Witness>,
    }

    fn bench() -> Bench {
        let memory = Arc::new(SystemMemory::new());
        memory.map(RAM, 0x8000, &anonymous_file(0x8000), 0, true).unwrap();
        let oracle = Oracle::new(OracleConfig::default());
        let heard = Arc::new(Heard::default());
        let witness = Witness::new(memory.clone(), oracle.clone(), heard.clone());
        Bench { memory, oracle, heard, witness }
    }

    impl Bench {
        fn set(&self, register: u32, value: u32) {
            let _ = self.witness.bar_write(0, register.into(), &value.to_le_bytes());
        }
        fn get(&self, register: u32) -> u32 {
            let mut data = [0; 4];
            self.witness.bar_read(0, register.into(), &mut data);
            u32::from_le_bytes(data)
        }
        fn ready(self) -> Self {
            let _ = self.witness.config_write(4, &[6]);
            self.set(regs::RECORDS_LO, RECORDS as u32);
            self.set(regs::SLOTS, 4);
            self
        }
        fn send(&self, slot: u32, record: Record) {
            let at = RECORDS + u64::from(slot) * RECORD_BYTES as u64;
            self.memory.snapshot().write_object(at, &record).unwrap();
            self.set(regs::EVENT, slot);
        }
    }

    #[test]
    fn records_reach_oracle_and_sink() {
        let b = bench().ready();
        assert_eq!(b.get(regs::ID), regs::ID_VALUE);
        assert_eq!(b.get(regs::SLOTS), 4);
        b.send(0, Record { kind: HELLO, arg: [1, 0, 1, 1], ..Default::default() });
        b.send(3, Record { kind: HEARTBEAT, arg: [9, 2, 0, 0], ..Default::default() });
        b.send(3, Record { kind: HEARTBEAT, arg: [0, 2, 0, 0], ..Default::default() });
        b.memory.snapshot().write(TEXT, b"{\"a\":1}").unwrap();
        b.send(1, Record { kind: MESSAGE, arg: [TEXT, 7, 0, 0], ..Default::default() });
        b.send(0, Record { kind: MM_BEGIN, mm: 1, ..Default::default() });
        b.send(0, Record { kind: MM_RELEASED, mm: 1, ..Default::default() });
        assert_eq!(*b.heard.0.lock(), ["hello 1", "beat 9 2", "beat 0 2", "{\"a\":1}"]);
        let counters = b.oracle.counters();
        assert_eq!((counters.releases, counters.heartbeats, counters.probes_missed), (1, 1, 2));
        assert_eq!((counters.bad_records, b.get(regs::BAD_RECORDS)), (0, 0));
    }

    #[test]
    fn bad_records_are_counted_and_go_nowhere() {
        let b = bench();
        b.set(regs::EVENT, 0);
        let _ = b.witness.config_write(4, &[6]);
        b.set(regs::EVENT, 0);
        let b = b.ready();
        b.set(regs::EVENT, 4);
        b.set(regs::EVENT, u32::MAX);
        b.send(0, Record { kind: 99, ..Default::default() });
        b.send(0, Record::default());
        b.send(0, Record { kind: MESSAGE, arg: [TEXT, MAX_MESSAGE + 1, 0, 0], ..Default::default() });
        b.send(0, Record { kind: MESSAGE, arg: [u64::MAX - 3, 8, 0, 0], ..Default::default() });
        b.set(regs::RECORDS_LO, RECORDS as u32 + 8);
        b.set(regs::EVENT, 0);
        b.set(regs::RECORDS_HI, u32::MAX);
        b.set(regs::RECORDS_LO, 0xffff_ffc0);
        b.set(regs::EVENT, 1);
        assert_eq!(b.get(regs::BAD_RECORDS), 10);
        assert_eq!(b.oracle.counters().bad_records, 10);
        assert!(b.heard.0.lock().is_empty());
    }

    #[test]
    fn requests_are_read_once_and_reset_forgets() {
        let b = bench().ready();
        b.witness.request(regs::REQUEST_ALL_CPUS);
        b.witness.request(regs::REQUEST_PANIC);
        assert_eq!(b.get(regs::REQUEST), regs::REQUEST_ALL_CPUS | regs::REQUEST_PANIC);
        assert_eq!(b.get(regs::REQUEST), 0);
        b.witness.request(regs::REQUEST_PANIC);
        let _ = b.witness.config_write(0x58, &[0, 0x80]);
        assert_eq!((b.get(regs::REQUEST), b.get(regs::SLOTS), b.get(regs::RECORDS_LO)), (0, 0, 0));
        b.set(regs::EVENT, 0);
        assert_eq!(b.get(regs::BAD_RECORDS), 1);
    }

    /// Opens a door when it has been looked at twice.
    #[derive(Default)]
    struct Patient(Mutex<Vec<String>>, AtomicU32);
    impl Conductor for Patient {
        fn record(&self, record: &Record, doors: &Doors) {
            if let Some(GateRecord::Reached { slot: Some(slot), .. }) = GateRecord::read(record) {
                assert!(!doors.is_open(slot));
            }
            self.0.lock().push(format!("{}", record.kind));
        }
        fn looked(&self, slot: usize, doors: &Doors) {
            if self.1.fetch_add(1, SeqCst) == 1 {
                doors.open(slot);
            }
        }
    }

    #[test]
    fn a_task_waits_until_its_door_is_opened() {
        use vgpu_spec::gate::{PASSED, REACHED};
        let b = bench().ready();
        let gate = |slot: u32| b.get(regs::GATE + 4 * slot);
        b.send(0, Record { kind: REACHED, arg: [2 | 5 << 16, 0, 0, 0], ..Default::default() });
        assert_eq!(gate(5), 1, "nobody decides");
        let patient = Arc::new(Patient::default());
        b.witness.conduct(patient.clone());
        b.send(0, Record { kind: REACHED, arg: [2 | 5 << 16, 0, 0, 0], ..Default::default() });
        assert_eq!((gate(5), gate(4), gate(63)), (0, 1, 1));
        assert_eq!((gate(5), gate(5)), (1, 1));
        b.send(0, Record { kind: PASSED, arg: [2 | 5 << 16, 0, 0, 0], ..Default::default() });
        b.send(0, Record { kind: HELLO, ..Default::default() });
        assert_eq!(*patient.0.lock(), [REACHED.to_string(), PASSED.to_string(), HELLO.to_string()]);
        assert_eq!(b.get(regs::BAD_RECORDS), 0);
        // A gate or a slot that does not exist.
        for arg in [64, 64 << 16] {
            b.send(0, Record { kind: REACHED, arg: [arg, 0, 0, 0], ..Default::default() });
        }
        assert_eq!((b.get(regs::BAD_RECORDS), b.oracle.counters().bad_records), (2, 2));
        b.send(0, Record { kind: REACHED, arg: [7 << 16, 0, 0, 0], ..Default::default() });
        let _ = b.witness.reset();
        assert!(b.witness.doors.is_open(7), "nobody is held by a device that was reset");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_access_is_harmless(ops in proptest::collection::vec((any::<u8>(), 0u64..0x40, proptest::collection::vec(any::<u8>(), 0..9)), 0..64)) {
            let b = bench().ready();
            for (i, byte) in ops.iter().flat_map(|op| &op.2).enumerate() {
                b.memory.snapshot().write(RECORDS + i as u64 % 0x100, &[*byte % 16]).unwrap();
            }
            for (bar, offset, data) in ops {
                let _ = b.witness.bar_write(bar % 2, offset, &data);
                let mut out = vec![1; data.len()];
                b.witness.bar_read(bar % 2, offset, &mut out);
            }
        }
    }
}
