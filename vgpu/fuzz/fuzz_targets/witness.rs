// SPDX-License-Identifier: MIT OR Apache-2.0
//! The witness's registers and records, with the oracle behind them: any record in any order, mixed with register accesses.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use vgpu::function::Function as _;
use vgpu::gates::{Conductor, Doors};
use vgpu::memory::SystemMemory;
use vgpu::oracle::{Oracle, OracleConfig};
use vgpu::testing::anonymous_file;
use vgpu::witness::{GuestSink, Witness};
use vgpu_spec::regs::witness as regs;
use vgpu_spec::witness::Record;

struct Nobody;

impl GuestSink for Nobody {
    fn message(&self, _: &[u8]) {}
    fn heartbeat(&self, _: u64, _: u64) {}
    fn hello(&self, _: &Record) {}
}

/// Lets everybody go on at the second look.
struct Porter;

impl Conductor for Porter {
    fn record(&self, _: &Record, _: &Doors) {}
    fn looked(&self, slot: usize, doors: &Doors) {
        doors.open(slot);
    }
}

const RAM: u64 = 0x10_0000;

fuzz_target!(|input: &[u8]| {
    let memory = Arc::new(SystemMemory::new());
    let file = anonymous_file(1 << 16);
    if memory.map(RAM, 1 << 16, &file, 0, true).is_err() {
        return;
    }
    let oracle = Oracle::new(OracleConfig { max_violations: 10, ..OracleConfig::default() });
    let witness = Witness::new(Arc::clone(&memory), Arc::clone(&oracle), Arc::new(Nobody));
    witness.conduct(Arc::new(Porter));
    let _ = witness.config_write(4, &6_u16.to_le_bytes());
    let write = |register: u32, value: u32| drop(witness.bar_write(0, register.into(), &value.to_le_bytes()));
    write(regs::RECORDS_LO, RAM as u32);
    write(regs::SLOTS, 4);
    for chunk in input.chunks_exact(66).take(512) {
        let (head, record) = chunk.split_at(2);
        match head[0] % 4 {
            0 => drop(witness.bar_write(0, u64::from(head[1]) * 4, &record[..usize::from(head[1] % 9)])),
            _ => {
                let slot = u64::from(head[1] % 4);
                // Mostly a record of a kind that exists, about one of few address spaces.
                let mut bytes = [0; 64];
                bytes.copy_from_slice(record);
                if head[0] % 4 != 3 {
                    let kind = u32::from(record[0]);
                    let kind = if kind >= 0xc0 { 0x40 + kind % 8 } else { 1 + kind % 13 };
                    bytes[..4].copy_from_slice(&kind.to_le_bytes());
                    bytes[8..16].copy_from_slice(&u64::from(record[8] % 4).to_le_bytes());
                }
                if memory.snapshot().write_object(RAM + 64 * slot, &bytes).is_ok() {
                    write(regs::EVENT, slot as u32);
                }
            }
        }
    }
    let counters = oracle.counters();
    assert!(oracle.violations().len() <= 10 && counters.contexts == 0);
});
