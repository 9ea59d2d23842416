// SPDX-License-Identifier: MIT OR Apache-2.0
//! Interrupts: cause bits, and messages for those that are enabled.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use vgpu_spec::regs::gpu::{ERROR, IRQ_ENABLE, IRQ_STATUS, VECTOR_EVENT};

use super::counters::count;
use super::registers::Registers;
use crate::function::InterruptSink;

/// The way out for interrupts.
pub(crate) struct Interrupts {
    sink: Arc<dyn InterruptSink>,
    pub(crate) raised: AtomicU64,
}

impl Interrupts {
    pub(crate) fn new(sink: Arc<dyn InterruptSink>) -> Self {
        Self { sink, raised: AtomicU64::new(0) }
    }

    /// Sets the cause bit and sends the message, also if the bit was set: a driver that never clears it still hears of news.
    pub(crate) fn raise(&self, vector: u32, registers: &Registers) {
        registers.set_bits(IRQ_STATUS, 1 << vector);
        // IRQ_ENABLE is read after the bit is set; who enables reads IRQ_STATUS after: one of both sends.
        if registers.get(IRQ_ENABLE) & 1 << vector != 0 {
            count(&self.raised, 1);
            self.sink.raise(vector as u16);
        }
    }

    /// Reports an error to the driver.
    pub(crate) fn error(&self, bits: u32, registers: &Registers) {
        registers.set_bits(ERROR, bits);
        self.raise(VECTOR_EVENT, registers);
    }
}
